"""Values, derivatives and statistics of corrupt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lect11ext import functional, reference
from lect11ext.reference.random import philox_words
from tests.helpers import check, default_generator, room, same_for_any_threads, seeded

KEY = torch.tensor([2**40 + 3, 2**32 - 1])  # the blocks cross 2^32
SHAPES = [(), (1,), (3, 2), (5, 7), (64, 64), (3, 1025), (2, 3, 5, 31), (1, 4099), (700, 3), (0, 4), (4, 0)]
GAUSSIAN, MASKING, SALT = ("gaussian", 0.7), ("masking", 0.3), ("salt_and_pepper", 0.4)
CASES: list[tuple[tuple[str, float], dict[str, Any]]] = [
    (GAUSSIAN, {}),
    (MASKING, {}),
    (SALT, {}),
    (SALT, {"low": 2.7, "high": -1.3}),
]
REPLACING = [MASKING, SALT]
replacing = pytest.mark.parametrize(("kind", "amount"), REPLACING, ids=["masking", "salt_and_pepper"])
every_kind = pytest.mark.parametrize(("kind", "amount"), [GAUSSIAN, *REPLACING], ids=lambda v: str(v))
every_case = pytest.mark.parametrize(("how", "options"), CASES, ids=str)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> Tensor:
    return torch.randn(shape).to(device, dtype).requires_grad_()


def check_both(x: Tensor, how: tuple[str, float], **options: Any) -> None:
    """Normals by the rule; what is replaced is exact."""
    key = KEY.to(x.device)
    if how[0] == "gaussian":
        stream = torch.promote_types(x.dtype, torch.float32)  # that of the type, for the judge in float64 too

        def plain(x: Tensor) -> Tensor:
            noise = reference.philox_normal(x.shape, key, dtype=stream, exact=x.dtype == torch.float64)
            return reference.corrupt(x, *how, noise=noise)

        check(lambda x: functional.corrupt(x, *how, key=key), plain, [x], slack=8.0)
        return
    ours, mask = functional.corrupt(x, *how, key=key, return_mask=True, **options)
    plain_out, plain_mask = reference.corrupt(x, *how, key=key, return_mask=True, **options)
    assert ours.dtype == x.dtype and mask.dtype == torch.bool and ours.is_contiguous() and mask.is_contiguous()
    assert torch.equal(mask, plain_mask) and torch.equal(ours, plain_out)
    assert torch.equal(functional.corrupt(x, *how, key=key, **options), ours)
    if x.requires_grad:
        grad = torch.randn(x.shape).to(x)
        (got,) = torch.autograd.grad(ours, x, grad)
        assert torch.equal(got, torch.autograd.grad(plain_out, x, grad)[0])


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], how: tuple[str, float], options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    check_both(drawn(*shape, dtype=dtype, device=device), how, **options)


@every_case
def test_every_capability(how: tuple[str, float], options: dict[str, Any], dtype: torch.dtype, capability: str) -> None:
    for shape in [(5, 7), (2, 1500), (1024,), (33, 129)]:
        check_both(drawn(*shape, dtype=dtype), how, **options)


@every_case
def test_strided_input_and_gradient(how: tuple[str, float], options: dict[str, Any], dtype: torch.dtype) -> None:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    for x in (
        make(9, 26)[:, 13:],
        make(13, 9).t(),
        make(1, 13).expand(9, 13),
        make(9, 1).expand(9, 130),
        make(1).expand(7, 5),
        make(2, 3, 4, 5).permute(3, 1, 0, 2),
        make(5, 1100)[:, ::2],
        make(4001)[1:],  # misaligned
        make(2049)[1:],
        make(*[2] * 10).permute(9, 1, 3, 5, 7, 0, 2, 4, 6, 8),  # more dimensions than a view has
    ):
        check_both(x.requires_grad_(), how, **options)
    # What comes back from a sum is one value everywhere.
    x = make(9, 13).requires_grad_()
    output, mask = functional.corrupt(x, *how, key=KEY, return_mask=True)
    output.sum().backward()
    kept = torch.ones_like(mask) if how[0] == "gaussian" else ~mask
    assert torch.equal(x.grad, kept.to(dtype))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    how=st.sampled_from([GAUSSIAN, MASKING, SALT]),
    half=st.booleans(),
)
def test_any_shape_and_strides(shape: list[int], order: Any, step: int, how: tuple[str, float], half: bool) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    big = torch.randn([s * step for s in shape]).to(torch.bfloat16 if half else torch.float32).permute(axes)
    check_both(big[tuple(slice(None, None, step) for _ in shape)].requires_grad_(), how)


def test_gaussian_noise_is_the_public_stream(dtype: torch.dtype) -> None:
    zeros = torch.zeros(3, 500, dtype=dtype)
    noise = functional.philox_normal((3, 500), KEY, dtype=dtype)
    output, mask = functional.corrupt(zeros, "gaussian", 1.0, key=KEY, return_mask=True)
    assert torch.equal(output, noise) and mask.all()


@replacing
def test_the_same_elements_in_every_type(kind: str, amount: float, capability: str) -> None:
    shape = (3, 1111)
    words = torch.from_numpy(philox_words(*KEY.tolist(), -(-3 * 1111 // 4)).astype("int64")).reshape(-1)[: 3 * 1111]
    expected = (words < round(amount * 2**32)).view(shape)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        ones = torch.ones(shape, dtype=dtype)
        output, mask = functional.corrupt(ones, kind, amount, low=-2, high=2, key=KEY, return_mask=True)
        assert torch.equal(mask, expected) and torch.equal(output != 1, expected)


def test_bounds_next_to_a_word(dtype: torch.dtype, capability: str) -> None:
    """The share of all words that are below a known one, or just not."""
    seed = next(seed for seed in range(99) if philox_words(seed, 0, 1)[0, 0] < 2**31)
    word, key = int(philox_words(seed, 0, 1)[0, 0]), torch.tensor([seed, 0])
    for x in (torch.ones(4, dtype=dtype), torch.ones(1024, dtype=dtype)):
        for bound, corrupted in ((word, False), (word + 0.25, False), (word + 0.75, True), (word + 1, True)):
            output, mask = functional.corrupt(x, "masking", bound / 2**32, key=key, return_mask=True)
            assert mask[0].item() is corrupted and output[0] == 1 - corrupted
        for bound, value in ((2 * word, 5.0), (2 * word + 1, 5.0), (2 * word + 2, -5.0)):  # low is for half of them
            assert functional.corrupt(x, "salt_and_pepper", bound / 2**32, low=-5, high=5, key=key)[0] == value


@replacing
def test_amounts_0_and_1(kind: str, amount: float, dtype: torch.dtype, capability: str) -> None:
    for size in (5, 5000):
        x = drawn(size, dtype=dtype)
        output, mask = functional.corrupt(x, kind, 0.0, key=KEY, return_mask=True)
        assert torch.equal(output, x) and not mask.any() and output.data_ptr() != x.data_ptr()
        output.sum().backward()
        assert torch.equal(x.grad, torch.ones_like(x))
        tiny = functional.corrupt(x, kind, 1e-12, key=KEY, return_mask=True)  # rounds to no word
        assert torch.equal(tiny[0], x) and not tiny[1].any()
        x.grad = None
        output, mask = functional.corrupt(x, kind, 1, low=3, high=4, key=KEY, return_mask=True)
        assert mask.all() and set(output.tolist()) <= ({0.0} if kind == "masking" else {3.0, 4.0})
        output.sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))
    strided = drawn(6, 4, dtype=dtype).t()
    assert functional.corrupt(strided, kind, 0.0, key=KEY).is_contiguous()


def test_gaussian_of_no_deviation(dtype: torch.dtype) -> None:
    x = drawn(5, 300, dtype=dtype)
    assert torch.equal(functional.corrupt(x, "gaussian", 0, key=KEY), x)


def test_values_that_salt_may_have(dtype: torch.dtype) -> None:
    x = torch.zeros(40, 50, dtype=dtype)
    for low, high in [(math.nan, math.inf), (-math.inf, 0.1), (1e300, -1e300), (1, 0)]:
        output, mask = functional.corrupt(x, *SALT, low=low, high=high, key=KEY, return_mask=True)
        expected = reference.corrupt(x, *SALT, low=low, high=high, key=KEY)
        assert torch.equal(output.nan_to_num(7), expected.nan_to_num(7))
        assert torch.equal(output.isnan(), expected.isnan()) and mask.any()
    assert output[mask].unique().tolist() == [0, 1]


@replacing
def test_what_is_replaced_does_not_show(kind: str, amount: float, dtype: torch.dtype) -> None:
    """NaN and inf at elements that are replaced, in the input and in the gradient; at the others they stay."""
    for shape in [(40,), (3000,)]:
        mask = functional.corrupt(torch.zeros(shape, dtype=dtype), kind, amount, key=KEY, return_mask=True)[1]
        for bad in (math.nan, math.inf, -math.inf):
            x = torch.where(mask, bad, torch.ones(shape)).to(dtype).requires_grad_()
            output = functional.corrupt(x, kind, amount, key=KEY)
            assert output.isfinite().all()
            for create_graph in (False, True):
                grad = torch.where(mask, bad, torch.ones(shape)).to(dtype)
                (got,) = torch.autograd.grad(output, x, grad, retain_graph=True, create_graph=create_graph)
                assert torch.equal(got, (~mask).to(dtype))
            output = functional.corrupt(torch.full(shape, bad, dtype=dtype), kind, amount, key=KEY)
            assert torch.equal(output.isfinite(), mask)


def test_nan_stays_where_it_is_in_noise(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 50, dtype=dtype)
    x[1, 3], x[2, 7] = math.nan, math.inf
    output = functional.corrupt(x, *GAUSSIAN, key=KEY)
    assert torch.equal(output.isnan(), x.isnan()) and torch.equal(output.isinf(), x.isinf())


@every_kind
def test_gradcheck_of_every_order(kind: str, amount: float) -> None:
    x = drawn(3, 7, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return functional.corrupt(x, kind, amount, key=KEY)

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_undefined_grad=True)
    assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@every_kind
def test_the_backward_keeps_nothing_but_the_key(kind: str, amount: float) -> None:
    x = drawn(100, 100)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, mask = functional.corrupt(x, kind, amount, key=KEY, return_mask=True)
    assert [t.shape for t in kept] == [(2,)] and output.requires_grad and not mask.requires_grad
    assert not functional.corrupt(x.detach(), kind, amount).requires_grad
    with torch.no_grad():
        assert not functional.corrupt(x, kind, amount).requires_grad


@every_kind
@pytest.mark.parametrize("shape", [(300, 64), (50001,), (3000, 5)], ids=str)
def test_threads_and_repeats_give_the_same_bits(shape: tuple[int, ...], kind: str, amount: float) -> None:
    x = drawn(*shape)

    def results() -> Sequence[Tensor]:
        output, mask = functional.corrupt(x, kind, amount, key=KEY, return_mask=True)
        return [output, mask, *torch.autograd.grad(output, x, torch.ones_like(x))]

    same_for_any_threads(results)


@every_kind
def test_outputs_beyond_the_caches(kind: str, amount: float, dtype: torch.dtype) -> None:
    """From 32 MiB on the outputs are streamed past the caches: the same bits as in smaller pieces."""
    rows, piece, width = 6016, 188, 2047  # the last tile is no whole one
    if dtype.itemsize > 2:
        rows, piece = 3008, 188
    x, grad = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    per_block = 2 if kind == "gaussian" and dtype == torch.float64 else 4

    def run(first: int, last: int, shift: int) -> list[Tensor]:
        part = torch.empty((last - first) * width + shift, dtype=dtype)[shift:].view(-1, width).copy_(x[first:last])
        part.requires_grad_()
        key = KEY + torch.tensor([0, first * width // per_block])
        output, mask = functional.corrupt(part, kind, amount, key=key, return_mask=True)
        return [output.detach(), mask, *torch.autograd.grad(output, part, grad[first:last])]

    pieces = [run(first, first + piece, 0) for first in range(0, rows, piece)]
    for shift in (0, 1):
        for i, got in enumerate(run(0, rows, shift)):
            assert torch.equal(got, torch.cat([p[i] for p in pieces]))


@pytest.mark.cpu  # of a GPU all memory is there that is asked for
def test_strides_beyond_32_bits() -> None:
    near = torch.randn(2, 3).bfloat16()
    far = room(2**31 + 64, torch.bfloat16).as_strided((2, 3), (2**31 + 11, 1)).copy_(near)
    for how in (GAUSSIAN, MASKING):
        assert torch.equal(functional.corrupt(far, *how, key=KEY), functional.corrupt(near, *how, key=KEY))


@every_kind
def test_generators(kind: str, amount: float) -> None:
    x = torch.randn(3, 50)

    def draw(**options: Any) -> Tensor:
        return functional.corrupt(x, kind, amount, **options)

    torch.manual_seed(1)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    key = functional.philox_key(x, x.numel())  # by as many a GPU's generator advances
    assert torch.equal(draw(key=key), first)
    with torch.random.fork_rng():
        assert torch.equal(draw(), second)
    assert torch.equal(draw(), second)
    generator = seeded(1)
    before = default_generator().get_state()
    assert torch.equal(draw(generator=generator), first)
    assert torch.equal(draw(generator=generator), second)
    draw(key=KEY)
    assert torch.equal(default_generator().get_state(), before)


@every_kind
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("key", [None, KEY], ids=["drawn", "key"])
def test_checkpointing_corrupts_the_same_elements_again(
    kind: str, amount: float, reentrant: bool, key: Tensor | None
) -> None:
    x = drawn(4, 60)

    def loss(x: Tensor) -> Tensor:
        output, mask = functional.corrupt(x, kind, amount, key=key, return_mask=True)
        return (output.pow(3) * (1 + mask)).sum()

    torch.manual_seed(2)
    (plain,) = torch.autograd.grad(loss(x), x)
    torch.manual_seed(2)
    checkpoint(loss, x, use_reentrant=reentrant, preserve_rng_state=key is None).backward()
    assert torch.equal(x.grad, plain)


def test_statistics() -> None:
    n = 4_000_000
    key = torch.tensor([42, 0])
    noise = functional.corrupt(torch.full((n,), 3.0), "gaussian", 0.5, key=key)
    assert stats.kstest(((noise - 3) / 0.5).cpu().numpy(), "norm").pvalue > 1e-3
    half = torch.full((n,), 0.5)
    for p in (0.001, 0.1, 0.25, 0.5, 0.9):
        sigma = math.sqrt(n * p * (1 - p))
        for kind in ("masking", "salt_and_pepper"):
            output, mask = functional.corrupt(half, kind, p, key=key, return_mask=True)
            assert abs(mask.sum().item() - n * p) < 5 * sigma
            ones, count = (output == 1).sum().item(), mask.sum().item()
            if kind == "salt_and_pepper":
                assert abs(ones - count / 2) < 5 * math.sqrt(count) / 2
        lags = mask.double() - mask.double().mean()
        for lag in (1, 2, 3, 4, 8, 1024):
            assert (lags[:-lag] * lags[lag:]).mean().abs() < 5 * p * (1 - p) / math.sqrt(n)
    other = functional.corrupt(half, "masking", 0.5, key=key + torch.tensor([1, 0]), return_mask=True)[1]
    first = functional.corrupt(half, "masking", 0.5, key=key, return_mask=True)[1]
    assert abs((other == first).sum().item() - n / 2) < 5 * math.sqrt(n) / 2


@pytest.mark.slow
@every_case
def test_every_size(how: tuple[str, float], options: dict[str, Any], dtype: torch.dtype, capability: str) -> None:
    for size in (*range(1, 300), 1023, 1024, 1025, 2047, 2049, 5000):
        check_both(drawn(size, dtype=dtype), how, **options)
