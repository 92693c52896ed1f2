"""gaussian_rsample_kl under transforms and compilers; its module; its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from lect11ext import functional, nn, reference
from tests.helpers import HERE

KEY = torch.tensor([11, 0])
sample = functional.gaussian_rsample_kl


def noise_of(z: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    return (z - mean) / (logvar / 2).exp()


def test_vmap_randomness() -> None:
    mean, logvar = torch.randn(5, 3, 7), torch.randn(5, 3, 7)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(sample)(mean, logvar)
    same = noise_of(vmap(sample, randomness="same")(mean, logvar)[0], mean, logvar)
    torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-3, atol=1e-4)
    different = noise_of(vmap(sample, randomness="different")(mean, logvar)[0], mean, logvar)
    assert len({round(v, 3) for v in different[:, 0, 0].tolist()}) == 5
    alone, _ = vmap(lambda _: sample(mean[0], logvar[0]), randomness="different")(torch.zeros(2))
    assert not torch.equal(alone[0], alone[1])
    torch.manual_seed(5)
    key = functional.philox_key(mean, 1)
    torch.manual_seed(5)
    z, _ = vmap(sample, randomness="different")(mean, logvar)
    blocks = (3 * 7 + 3) // 4
    for i in range(5):
        assert torch.equal(z[i], sample(mean[i], logvar[i], key=key + torch.tensor([0, i * blocks]))[0])


def test_randomness_under_nested_transforms() -> None:
    """Draws without a key where a derivative stands inside or outside vmap."""

    def z(x: torch.Tensor) -> torch.Tensor:
        return sample(x, x)[0]

    zeros = torch.zeros(3, 4)
    per_sample = vmap(grad(lambda x: z(x).sum()), randomness="different")(zeros)  # 1 + ε/2
    assert per_sample.unique().numel() == 12
    same = vmap(grad(lambda x: z(x).sum()), randomness="same")(zeros)
    assert torch.equal(same, same[:1].expand_as(same))
    assert jacfwd(z, randomness="different")(zeros[0]).shape == (4, 4)
    nested = vmap(grad(lambda x: vmap(z, randomness="different")(x).sum()), randomness="different")(zeros[..., None])
    assert nested.unique().numel() == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_share_no_noise(dtype: torch.dtype) -> None:
    zeros = torch.zeros(5, 2, 9, dtype=dtype)
    z = vmap(lambda m: sample(m, m)[0], randomness="different")(zeros)
    assert z.unique().numel() == z.numel()
    prior = torch.zeros(9, dtype=dtype)
    z = vmap(lambda m: sample(m, m, prior_mean=prior, prior_logvar=prior)[0], randomness="different")(zeros.float())
    assert z.unique().numel() == z.numel()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_compiled_vmap_draws_as_the_eager_one(randomness: str) -> None:
    def draw(x: torch.Tensor) -> torch.Tensor:
        return vmap(lambda y: sample(y, y)[0], randomness=randomness)(x)

    torch.manual_seed(0)
    eager = draw(torch.zeros(3, 4))
    torch.manual_seed(0)
    assert torch.equal(torch.compile(draw, fullgraph=True, backend="aot_eager")(torch.zeros(3, 4)), eager)


def test_vmap_with_a_key() -> None:
    mean, logvar = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    keys = torch.stack([KEY + i for i in range(4)])
    z, kl = vmap(lambda m, v, k: sample(m, v, key=k))(mean, logvar, keys)
    for i in range(4):
        one = sample(mean[i], logvar[i], key=keys[i])
        assert torch.equal(z[i], one[0]) and torch.equal(kl[i], one[1])


def test_second_derivatives() -> None:
    mean, logvar = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)

    def loss(module: Any) -> Any:
        return lambda v: sum(o.pow(3).sum() for o in module.gaussian_rsample_kl(mean, v, key=KEY))

    expected = hessian(loss(reference))(logvar)
    for composed in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        torch.testing.assert_close(composed(loss(functional))(logvar), expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_break(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda m, v, k: sample(m, v, key=k, num_samples=2), fullgraph=True, dynamic=True, backend=backend
    )
    for rows in (3, 5, 8):
        args = [torch.randn(rows, 6, requires_grad=True) for _ in range(2)]
        ours, eager = compiled(*args, KEY), sample(*args, key=KEY, num_samples=2)
        grads = [torch.autograd.grad(out, args, [torch.ones_like(o) for o in out]) for out in (ours, eager)]
        for a, b in zip([*ours, *grads[0]], [*eager, *grads[1]], strict=True):
            torch.testing.assert_close(a, b)


def test_compile_with_the_default_generator() -> None:
    torch._dynamo.reset()
    mean, logvar = torch.randn(4, 6), torch.randn(4, 6)
    compiled = torch.compile(sample, fullgraph=True)
    compiled(mean, logvar)
    torch.manual_seed(1)
    first = compiled(mean, logvar)[0]
    torch.manual_seed(1)
    assert torch.equal(first, sample(mean, logvar)[0])
    assert not torch.equal(first, compiled(mean, logvar)[0])


def test_opcheck() -> None:
    ops = torch.ops.lect11ext
    args = [torch.randn(3, 5, requires_grad=True) for _ in range(4)]
    options = (KEY, 2, 0.1, -1.0, 1.0, "sum_latent")
    torch.library.opcheck(ops.gaussian_rsample_kl.default, (*args, *options))
    torch.library.opcheck(
        ops.gaussian_rsample_kl.default, (args[0], args[1], None, None, KEY, None, 0.0, None, None, "sum")
    )
    grads = (torch.randn(2, 3, 5, requires_grad=True), torch.randn(3))
    for inputs in (args, [a.detach() for a in args]):
        torch.library.opcheck(ops.gaussian_rsample_kl_backward.default, (*grads, *inputs, *options, [True] * 4))
    torch.library.opcheck(ops.philox_normal.default, (KEY, [3, 5], torch.float32))
    # Two draws differ, so that only what does not compare values applies.
    torch.library.opcheck(ops.philox_key.default, (args[0], 5), test_utils=("test_schema", "test_faketensor"))


def test_export() -> None:
    latent = nn.GaussianLatent(6, 2)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(
        latent, (torch.randn(4, 6),), {"key": KEY}, dynamic_shapes={"input": {0: batch}, "key": None}
    )
    x = torch.randn(9, 6)
    torch.testing.assert_close(exported.module()(x, key=KEY), latent(x, key=KEY))


def test_latent_module() -> None:
    latent = nn.GaussianLatent(6, 2, num_samples=3, free_bits=0.1, logvar_range=(-5, 5), reduction="batchmean")
    assert [n for n, _ in latent.named_parameters()] == ["mean.weight", "mean.bias", "logvar.weight", "logvar.bias"]
    x = torch.randn(4, 6)
    z, kl = latent(x, key=KEY)
    assert z.shape == (3, 4, 2) and kl.shape == ()
    expected = sample(
        latent.mean(x), latent.logvar(x), num_samples=3, free_bits=0.1, logvar_range=(-5, 5), reduction="batchmean",
        key=KEY,
    )  # fmt: skip
    assert torch.equal(z, expected[0]) and torch.equal(kl, expected[1])
    conditional = latent(x, torch.ones(4, 2), torch.zeros(2), key=KEY)
    assert torch.equal(conditional[0], z) and not torch.equal(conditional[1], kl)
    assert "num_samples=3" in repr(latent)


M = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((M, M[:2]), {}, ValueError, r"logvar must have shape \[3, 4\] \(that of mean\), but got \[2, 4\]"),
        ((M.long(), M), {}, TypeError, "mean must be float32, float64, bfloat16 or float16, but got Long"),
        ((M, M.cfloat()), {}, TypeError, "logvar must be float32"),
        ((M, M.to("meta")), {}, RuntimeError, "Expected all tensors to be on the same device"),
        ((M, M), {"prior_mean": M}, ValueError, "prior_mean and prior_logvar must be given together"),
        ((M, M), {"prior_logvar": M}, ValueError, "given together, but got only prior_logvar"),
        ((M, M), {"prior_mean": M[0, :3], "prior_logvar": M}, ValueError, "prior_mean must broadcast"),
        ((M, M), {"prior_mean": M, "prior_logvar": M[None]}, ValueError, "prior_logvar must broadcast"),
        ((M, M), {"prior_mean": M.int(), "prior_logvar": M}, TypeError, "prior_mean must be float32"),
        ((M, M), {"num_samples": 0}, ValueError, "num_samples must be at least 1, but got 0"),
        ((M, M), {"num_samples": 2**59}, ValueError, r"num_samples must be at most 2\*\*31 - 1, but got 576460752"),
        ((M, M), {"free_bits": -0.1}, ValueError, "free_bits must be nonnegative, but got -0.1"),
        ((M, M), {"logvar_range": (1.0, -1.0)}, ValueError, "low <= high"),
        ((M, M), {"reduction": "mean"}, ValueError, "reduction must be one of .* but got 'mean'"),
        ((M[0, 0], M[0, 0]), {}, ValueError, "mean must have at least one dimension"),
        ((M, M), {"key": KEY.int()}, TypeError, r"key must be an int64 tensor \[seed, offset\], but got Int"),
        ((M, M), {"key": torch.tensor([1, 2, 3])}, ValueError, r"key must have shape \[2\]"),
        ((M, M), {"key": KEY.to("meta")}, RuntimeError, f"Expected key to be on {HERE}"),
    ],
)
def test_errors_name_the_argument(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(*arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tangents_of_the_kl_keep_their_digits_near_the_prior(dtype: torch.dtype) -> None:
    logvar = torch.cat([10.0 ** torch.arange(-12, 1), -(10.0 ** torch.arange(-12, 1)), torch.tensor([0.0, 0.5, 3.0])])
    logvar, zeros = logvar.to(dtype), torch.zeros(29, dtype=dtype)

    def kl(v: Tensor, prior: Tensor | None = None) -> Tensor:
        given = {} if prior is None else {"prior_mean": zeros, "prior_logvar": prior}
        return functional.gaussian_rsample_kl(zeros, v, reduction="none", key=torch.tensor([7, 0]), **given)[1]

    expected = torch.expm1(logvar.double()) / 2
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0.0}
    for function in (kl, lambda v: kl(v, zeros)):
        tangent = torch.func.jvp(function, (logvar,), (torch.ones_like(logvar),))[1]
        torch.testing.assert_close(tangent.double(), expected, **close)
