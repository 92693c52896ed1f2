"""Values, derivatives and numerics of gaussian_rsample_kl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lect11ext import functional, reference
from tests.helpers import check, room, same_for_any_threads

KEY = torch.tensor([2**40 + 3, 5])
SHAPES = [(1,), (1, 1), (3, 2), (5, 7), (64, 64), (3, 1025), (2, 3, 5, 31), (1, 4099), (700, 3), (0, 4), (4, 0)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"reduction": "sum"},
    {"reduction": "batchmean"},
    {"num_samples": 1},
    {"num_samples": 3, "free_bits": 0.2},
    {"logvar_range": (-0.5, 0.7)},
]


def operands(shape: tuple[int, ...], dtype: torch.dtype, prior: bool, device: str | None = None) -> list[Tensor]:
    count = 4 if prior else 2
    return [torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(count)]


def call(module: Any, **options: Any) -> Any:
    def run(mean: Tensor, logvar: Tensor, prior_mean: Tensor | None = None, prior_logvar: Tensor | None = None) -> Any:
        key = KEY.to(mean.device)
        if module is reference:  # float64 results are to be judged by float32's stream
            shape = mean.shape if options.get("num_samples") is None else (options["num_samples"], *mean.shape)
            dtype = torch.promote_types(run.dtype, torch.float32)
            noise = reference.philox_normal(shape, key, dtype=dtype, exact=mean.dtype == torch.float64)
            return reference.gaussian_rsample_kl(
                mean, logvar, prior_mean=prior_mean, prior_logvar=prior_logvar, noise=noise, **options
            )
        return module.gaussian_rsample_kl(
            mean, logvar, prior_mean=prior_mean, prior_logvar=prior_logvar, key=key, **options
        )

    run.dtype = torch.float32
    return run


def check_both(args: list[Tensor], slack: float = 8.0, **options: Any) -> None:
    plain = call(reference, **options)
    plain.dtype = args[0].dtype
    check(call(functional, **options), plain, args, slack)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], prior: bool, options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    check_both(operands(shape, dtype, prior, device), **options)


@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
def test_every_capability(prior: bool, dtype: torch.dtype, capability: str) -> None:
    for shape in [(5, 7), (2, 1500)]:
        check_both(operands(shape, dtype, prior), num_samples=2)


def test_strided_halves_broadcast_priors_and_mixed_types(dtype: torch.dtype) -> None:
    packed = torch.randn(9, 2 * 13).to(dtype)
    mean, logvar = (t.requires_grad_() for t in packed.chunk(2, -1))
    check_both([mean, logvar])
    prior = [torch.randn(13, requires_grad=True), torch.randn(9, 1, requires_grad=True)]
    if dtype != torch.float64:
        check_both([mean, logvar, *prior])
    transposed = [torch.randn(13, 9).to(dtype).t().requires_grad_() for _ in range(2)]
    check_both(transposed)
    expanded = [torch.randn(1, 13).to(dtype).expand(9, 13), torch.randn(9, 13).to(dtype)]
    check_both(expanded)
    permuted = [torch.randn(2, 3, 4, 5).to(dtype).permute(3, 1, 0, 2).requires_grad_() for _ in range(2)]
    check_both(permuted, num_samples=2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    step=st.integers(1, 3),
    samples=st.sampled_from([None, 1, 2]),
)
def test_any_shape_and_strides(shape: list[int], order: Any, step: int, samples: int | None) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    args = []
    for _ in range(2):
        big = torch.randn([s * step for s in shape]).permute(axes)
        args.append(big[tuple(slice(None, None, step) for _ in shape)].requires_grad_())
    check_both(args, num_samples=samples)


def test_noise_is_the_public_stream(dtype: torch.dtype) -> None:
    zeros = torch.zeros(3, 50, dtype=dtype)
    z, _ = functional.gaussian_rsample_kl(zeros, zeros, key=KEY)
    assert torch.equal(z, functional.philox_normal((3, 50), KEY, dtype=dtype))


def test_gradcheck_of_every_order() -> None:
    for prior, options in [(False, {}), (True, {"num_samples": 2}), (True, {"reduction": "batchmean"})]:
        args = operands((2, 3), torch.float64, prior)
        function = call(functional, **options)
        assert torch.autograd.gradcheck(function, args, check_forward_ad=True, check_undefined_grad=True)
        assert torch.autograd.gradgradcheck(function, args, check_fwd_over_rev=True)


def test_threads_agree_on_a_broadcast_prior() -> None:
    args = operands((300, 901), torch.float32, False)
    prior = [torch.full((1,), v, requires_grad=True) for v in (0.3, -0.2)]

    def results() -> Sequence[Tensor]:
        kl = functional.gaussian_rsample_kl(*args, prior_mean=prior[0], prior_logvar=prior[1])[1]
        return torch.autograd.grad(kl.sin().sum(), prior)

    same_for_any_threads(results, (1, 2, 3))


@pytest.mark.parametrize("shape", [(300, 64), (1, 50001), (3000, 5)], ids=str)
def test_threads_and_repeats_give_the_same_bits(shape: tuple[int, ...]) -> None:
    args = operands(shape, torch.float32, True)

    def results() -> Sequence[Tensor]:
        outs = [o for reduction in ("sum_latent", "sum") for o in call(functional, reduction=reduction)(*args)]
        return [*outs, *torch.autograd.grad(outs, args, [torch.ones_like(o) for o in outs])]

    same_for_any_threads(results)


def excess(x: Tensor) -> Tensor:
    """e^x − 1 − x for small x, by its series: near zero the difference loses its digits in float64 too."""
    x = x.double()
    return sum(x**k / float(math.factorial(k)) for k in range(2, 25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kl_keeps_its_digits_near_the_prior(dtype: torch.dtype, capability: str) -> None:
    eps = torch.finfo(dtype).eps
    for exponent in (*range(-12, 0), -0.31, -0.29):  # on both sides of a half too
        logvar = torch.full((1, 8), 10.0**exponent, dtype=dtype)
        exact = excess(logvar).sum() / 2
        _, kl = functional.gaussian_rsample_kl(torch.zeros_like(logvar), logvar, key=KEY)
        assert (kl.double() - exact).abs() <= 4 * eps * exact
        prior = torch.randn(1, 8, dtype=dtype)
        _, kl = functional.gaussian_rsample_kl(
            prior, prior + logvar, prior_mean=prior, prior_logvar=prior, key=KEY, reduction="none"
        )
        d = (prior + logvar).double() - prior.double()
        exact = excess(d) / 2
        assert ((kl.double() - exact).abs() <= 8 * eps * exact).all()


@pytest.mark.parametrize("value", [-100.0, -88.0, 80.0, 88.5, 100.0, 200.0, float("inf"), float("-inf")])
def test_extreme_logvar_is_infinite_where_the_reference_is(value: float) -> None:
    mean, logvar = torch.randn(4, 16), torch.randn(4, 16)
    logvar[1, 3] = value
    ours = functional.gaussian_rsample_kl(mean, logvar, key=KEY)
    plain = reference.gaussian_rsample_kl(mean, logvar, key=KEY)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.isinf(), b.isinf()) and torch.equal(a.isnan(), b.isnan())
        finite = b.isfinite()
        torch.testing.assert_close(a[finite], b[finite], rtol=1e-5, atol=1e-5)


def test_drifted_logvars_do_not_overflow() -> None:
    mean, zeros = torch.ones(1, 4), torch.zeros(1, 4)
    _, kl = functional.gaussian_rsample_kl(mean, zeros - 120, prior_mean=zeros + 1, prior_logvar=zeros - 120, key=KEY)
    assert kl.item() == 0.0
    _, kl = functional.gaussian_rsample_kl(mean, zeros - 80, prior_mean=zeros, prior_logvar=zeros + 80, key=KEY)
    torch.testing.assert_close(kl, torch.tensor([4 * 0.5 * 159.0]))


def test_nan_survives_in_its_own_row_alone() -> None:
    for clamp in (None, (-1.0, 1.0)):
        mean, logvar = torch.randn(4, 40), torch.randn(4, 40)
        logvar[1, 3] = mean[2, 5] = float("nan")
        z, kl = functional.gaussian_rsample_kl(mean, logvar, key=KEY, logvar_range=clamp)
        assert kl.isnan().tolist() == [False, True, True, False]
        assert z.isnan().sum() == 2 and z[1, 3].isnan() and z[2, 5].isnan()


def test_free_bits_have_no_gradient_below() -> None:
    mean = torch.tensor([[0.1, 2.0]], requires_grad=True)
    logvar = torch.zeros(1, 2, requires_grad=True)
    _, kl = functional.gaussian_rsample_kl(mean, logvar, free_bits=0.5, key=KEY)
    torch.testing.assert_close(kl, torch.tensor([2.5]))
    kl.sum().backward()
    assert mean.grad.tolist() == [[0.0, 2.0]]


def test_no_gradient_where_a_factor_is_infinite() -> None:
    """Zero times infinity is not NaN: priors so narrow that the KL's slopes overflow, unused or below the free bits."""
    mean = torch.ones(2, 3, requires_grad=True)
    prior_mean, prior_logvar = torch.zeros(3, requires_grad=True), torch.full((3,), -89.0, requires_grad=True)
    z, _ = functional.gaussian_rsample_kl(mean, mean, prior_mean=prior_mean, prior_logvar=prior_logvar, key=KEY)
    for create_graph in (False, True):
        grads = torch.autograd.grad(z.sum(), [prior_mean, prior_logvar], retain_graph=True, create_graph=create_graph)
        assert all(torch.equal(g, torch.zeros(3)) for g in grads)
    logvar = torch.tensor([[float("nan"), 3.0, 0.0]], requires_grad=True)
    z, _ = functional.gaussian_rsample_kl(torch.zeros(1, 3), logvar, logvar_range=(-1, 1), key=KEY)
    for create_graph in (False, True):
        (slope,) = torch.autograd.grad(z.sum(), logvar, retain_graph=True, create_graph=create_graph)
        assert slope[0, 0] == 0 and slope[0, 1] == 0 and slope[0, 2] != 0


def test_a_mean_on_a_narrow_prior_is_no_distance() -> None:
    mean, prior_mean = torch.ones(2, 19, requires_grad=True), torch.ones(19, requires_grad=True)
    narrow = torch.full((19,), -200.0, requires_grad=True)  # its precision overflows
    _, kl = functional.gaussian_rsample_kl(
        mean, narrow.expand(2, 19), prior_mean=prior_mean, prior_logvar=narrow, key=KEY
    )
    assert torch.equal(kl, torch.zeros(2))
    for create_graph in (False, True):
        grads = torch.autograd.grad(kl.sum(), [mean, prior_mean, narrow], retain_graph=True, create_graph=create_graph)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.sum() for g in grads), narrow))


def test_types_of_the_results() -> None:
    for dtype, kl_dtype in [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2]:
        t = torch.zeros(2, 3, dtype=dtype)
        z, kl = functional.gaussian_rsample_kl(t, t)
        assert z.dtype == dtype and kl.dtype == kl_dtype
    half, single = torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3)
    assert functional.gaussian_rsample_kl(half, single)[0].dtype == torch.float32
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert functional.gaussian_rsample_kl(single, single)[0].dtype == torch.float32


def test_outputs_beyond_the_caches() -> None:
    """From 32 MiB on the outputs are streamed past the caches: the same bits as in smaller pieces."""
    rows = 3000
    mean, logvar = torch.randn(rows, 1024), torch.randn(rows, 1024)
    grad_z, grad_kl = torch.randn(rows, 1024), torch.randn(rows)

    def run(first: int, last: int) -> list[Tensor]:
        args = [t[first:last].clone().requires_grad_() for t in (mean, logvar)]
        key = KEY + torch.tensor([0, first * 1024 // 4])
        outs = functional.gaussian_rsample_kl(*args, key=key)
        return [*outs, *torch.autograd.grad(outs, args, [grad_z[first:last], grad_kl[first:last]])]

    whole, pieces = run(0, rows), [run(first, first + 500) for first in range(0, rows, 500)]
    for i, got in enumerate(whole):
        assert torch.equal(got, torch.cat([p[i] for p in pieces]))


@pytest.mark.cpu  # of a GPU all memory is there that is asked for
def test_strides_beyond_32_bits() -> None:
    near = torch.randn(2, 3).bfloat16()
    far = room(2**31 + 64, torch.bfloat16).as_strided((2, 3), (2**31 + 11, 1)).copy_(near)
    for a, b in zip(
        functional.gaussian_rsample_kl(far, far, key=KEY),
        functional.gaussian_rsample_kl(near, near, key=KEY),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": [1.0]}, "mean must be a Tensor, but got list"),
        ({"logvar": None}, "logvar must be a Tensor, but got NoneType"),
        ({"prior_mean": 0.0, "prior_logvar": 0.0}, "prior_mean must be a Tensor or None, but got float"),
        ({"num_samples": torch.tensor(2.5)}, "num_samples must be an int or None, but got Tensor"),
        ({"num_samples": 2.5}, "num_samples must be an int or None, but got float"),
        ({"free_bits": None}, "free_bits must be a float or an int, but got NoneType"),
        ({"logvar_range": 3}, r"logvar_range must be \(low, high\), but got 3"),
        ({"logvar_range": (1.0,)}, r"logvar_range must be \(low, high\), but got \(1.0,\)"),
        ({"logvar_range": ("a", 1.0)}, r"logvar_range\[0\] must be a float or an int or None, but got str"),
        ({"reduction": None}, "reduction must be a str, but got NoneType"),
        ({"generator": 3}, "generator must be a Generator or None, but got int"),
        ({"key": [1, 2]}, "key must be a Tensor or None, but got list"),
    ],
    ids=str,
)
def test_wrong_python_types_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        functional.gaussian_rsample_kl(**{"mean": torch.zeros(2, 3), "logvar": torch.zeros(2, 3), **options})


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("prior", [False, True], ids=["standard", "prior"])
def test_every_size(prior: bool, options: dict[str, Any], dtype: torch.dtype, capability: str) -> None:
    for columns in (*range(1, 70), 127, 1023, 1024, 1025, 2047, 2049, 5000):
        for rows in (1, 2, 3, 17):
            check_both(operands((rows, columns), dtype, prior), **options)
