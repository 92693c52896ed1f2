"""The random stream: words, normals, keys, generators, statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lect11ext import functional, reference
from lect11ext.functional import gaussian_rsample_kl, philox_key, philox_normal
from lect11ext.reference.random import philox_words
from tests.helpers import default_generator, seeded

KEY = torch.tensor([1, 2])
KEYS = [(0, 0), (7, 0), (2**32 + 5, 2**32 - 2), (-1, -3), (2**63 - 1, -(2**63)), (123456789, 10**12)]


def test_known_answer() -> None:
    assert [hex(w) for w in philox_words(0, 0, 1)[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_normals_against_numpy(key: tuple[int, int], capability: str) -> None:
    tensor = torch.tensor(key)
    for dtype, tolerance in [(torch.float32, 1e-6), (torch.float64, 1e-14)]:
        for size in (1, 3, 33, 1000, 5001):
            ours = philox_normal((size,), tensor, dtype=dtype)
            exact = reference.philox_normal((size,), tensor, dtype=dtype, exact=True)
            assert (ours.double() - exact).abs().max() <= tolerance
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(philox_normal((99,), tensor, dtype=dtype), philox_normal((99,), tensor).to(dtype))


def test_offset_skips_blocks() -> None:
    whole = philox_normal((4000,), torch.tensor([9, 20]))
    assert torch.equal(whole[4 * 33 :], philox_normal((4000 - 4 * 33,), torch.tensor([9, 53])))
    double = philox_normal((4000,), torch.tensor([9, 20]), dtype=torch.float64)
    assert torch.equal(double[66:], philox_normal((4000 - 66,), torch.tensor([9, 53]), dtype=torch.float64))


def test_torchs_own_stream() -> None:
    key = torch.tensor([1234, 56], dtype=torch.uint64)
    try:
        theirs = torch.ops.aten._philox_normal_(torch.empty(1000), key, 0.0, 1.0)
    except (AttributeError, NotImplementedError):
        pytest.skip("torch has its stateless normals from 2.14 on")
    torch.testing.assert_close(philox_normal((1000,), torch.tensor([1234, 56])), theirs, rtol=0, atol=4e-6)


def test_statistics() -> None:
    draws = philox_normal((10_000_000,), torch.tensor([42, 0]))
    assert stats.kstest(draws.cpu().numpy(), "norm").pvalue > 1e-3
    for bound in (3.0, 4.0, 5.0):
        expected = 2 * stats.norm.sf(bound) * draws.numel()
        assert abs((draws.abs() > bound).sum().item() - expected) < 5 * expected**0.5
    lanes = draws[: 64 * 150_000].view(-1, 64)
    correlation = torch.corrcoef(lanes.T).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / 150_000**0.5
    for lag in (1, 2, 3, 4, 16, 32, 4096):
        assert (draws[:-lag] * draws[lag:]).mean().abs() < 5 / draws.numel() ** 0.5
    other = philox_normal((10_000_000,), torch.tensor([43, 0]))
    assert (draws * other).mean().abs() < 5 / draws.numel() ** 0.5


def test_generators() -> None:
    mean = torch.zeros(3, 5)

    def draw(**options: object) -> torch.Tensor:
        return gaussian_rsample_kl(mean, mean, **options)[0]

    torch.manual_seed(1)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    state = default_generator().get_state()
    assert torch.equal(draw(), second)
    default_generator().set_state(state)
    with torch.random.fork_rng():
        assert torch.equal(draw(), second)
    assert torch.equal(draw(), second)
    generator = seeded(1)
    assert torch.equal(draw(generator=generator), first)
    assert torch.equal(draw(generator=generator), second)
    before = default_generator().get_state()
    draw(key=torch.tensor([1, 2]))
    draw(generator=generator)
    assert torch.equal(default_generator().get_state(), before)


@pytest.mark.cpu  # docs/random.md: a GPU's by as many blocks as are drawn
def test_a_draw_advances_the_generator_as_one_64_bit_draw() -> None:
    torch.manual_seed(3)
    philox_key(torch.empty(0), 1000)
    after = default_generator().get_state()
    torch.manual_seed(3)
    torch.empty(1, dtype=torch.int64).random_()
    assert torch.equal(default_generator().get_state(), after)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_noise_again(reentrant: bool) -> None:
    mean = torch.randn(4, 6, requires_grad=True)
    logvar = torch.randn(4, 6, requires_grad=True)

    def loss(m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        z, kl = gaussian_rsample_kl(m, v)
        return z.pow(3).sum() + kl.sum()

    torch.manual_seed(2)
    plain = torch.autograd.grad(loss(mean, logvar), [mean, logvar])
    torch.manual_seed(2)
    checkpoint(loss, mean, logvar, use_reentrant=reentrant).backward()
    assert torch.equal(mean.grad, plain[0]) and torch.equal(logvar.grad, plain[1])


def test_errors() -> None:
    with pytest.raises(TypeError, match="dtype must be float32, float64, bfloat16 or float16, but got Long"):
        functional.philox_normal((3,), torch.tensor([1, 2]), dtype=torch.int64)
    with pytest.raises(TypeError, match="key must be an int64 tensor"):
        functional.philox_normal((3,), torch.tensor([1.0, 2.0]))
    assert functional.philox_normal((0, 3), torch.tensor([1, 2])).shape == (0, 3)
    strided = torch.tensor([[1, 0], [2, 0]])[:, 0]
    assert torch.equal(functional.philox_normal((3,), strided), functional.philox_normal((3,), torch.tensor([1, 2])))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: philox_key(None, 3), TypeError, "like must be a Tensor, but got NoneType"),
        (lambda: philox_key(torch.empty(0), 2.5), TypeError, "numel must be an int, but got float"),
        (lambda: philox_key(torch.empty(0), -1), ValueError, "numel must be nonnegative, but got -1"),
        (lambda: philox_key(torch.empty(0), 1, 5), TypeError, "generator must be a Generator or None, but got int"),
        (lambda: philox_normal(3, KEY), TypeError, "size must be a sequence of ints, but got 3"),
        (lambda: philox_normal((2.5,), KEY), TypeError, "size must be a sequence of ints"),
        (lambda: philox_normal((-3,), KEY), ValueError, "size must be nonnegative"),
        (lambda: philox_normal((3,), None), TypeError, "key must be a Tensor, but got NoneType"),
        (lambda: philox_normal((3,), KEY, dtype="float32"), TypeError, "dtype must be a dtype, but got str"),
        (lambda: philox_normal((3,), KEY.to("meta"), dtype=torch.int32), TypeError, "dtype must be float32"),
        (lambda: philox_normal((3,), torch.zeros(5, dtype=torch.int64, device="meta")), ValueError, "key must have"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_call_that_fails_draws_nothing() -> None:
    before = default_generator().get_state()
    with pytest.raises(ValueError, match="logvar must have shape"):
        gaussian_rsample_kl(torch.zeros(2), torch.zeros(3))
    assert torch.equal(default_generator().get_state(), before)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_keeps_two_draws_apart(backend: str) -> None:
    """Graphs with a backward are rid of calls that are alike."""

    def draws(x: Tensor) -> tuple[Tensor, ...]:
        keys = [philox_key(x, 4) for _ in range(2)]
        samples = [gaussian_rsample_kl(x, x)[0] for _ in range(2)]
        return *(x * philox_normal((4,), key) for key in keys), *samples

    x, results = torch.ones(4, requires_grad=True), []
    for call in (draws, torch.compile(draws, fullgraph=True, backend=backend)):
        torch.manual_seed(0)
        results.append(call(x))
    assert not torch.equal(*results[0][:2]) and not torch.equal(*results[0][2:])
    torch.testing.assert_close(results[1], results[0])
