"""The rule by which results are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def flat(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


HERE = str(torch.empty(0).device)  # the tests' device, as messages name it


def default_generator() -> torch.Generator:
    """Which tensors of the tests' device are drawn from."""
    return torch.default_generator if HERE == "cpu" else torch.cuda.default_generators[torch.cuda.current_device()]


def same_products(a: Tensor, b: Tensor) -> bool:
    """The same bits; on a GPU nearly, since cuBLAS has other kernels for other layouts, which sum in other orders."""
    return torch.equal(a, b) if HERE == "cpu" else nearly(a, b)


def nearly(a: Tensor, b: Tensor) -> bool:
    """Sums of float32 in another order: where they cancel, the largest says what an error is."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max().clamp_min(1))


def gradcheck(function: Callable[..., Any], args: Any, **options: Any) -> bool:
    """torch's; on a GPU along drawn directions, where evaluating one element after the other takes a minute."""
    return torch.autograd.gradcheck(function, args, fast_mode=HERE != "cpu", **options)


def gradgradcheck(function: Callable[..., Any], args: Any, **options: Any) -> bool:
    return torch.autograd.gradgradcheck(function, args, fast_mode=HERE != "cpu", **options)


def room(elements: int, dtype: torch.dtype) -> Tensor:
    """Memory of which only the pages that are touched exist: torch.empty would poison all of it."""
    return torch.empty(0, dtype=dtype).set_(torch.UntypedStorage(elements * dtype.itemsize)).view(elements)


def seeded(seed: int) -> torch.Generator:
    """Of the device that the tests run on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def double(args: Sequence[Any]) -> list[Any]:
    """The same inputs in float64, as leaves of their own."""
    return [a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]


# oneDNN's bound for a recurrent step, 4 · (2 in the backward) · ceil(log2(length of the sum)) · eps, at its smallest:
# where the sums have one or two terms, plain PyTorch's error can be zero by luck.
ONE_STEP = 8.0


def chain(steps: int, dtype: torch.dtype) -> float:
    """The slack of a layer. Errors of the steps add up, but those of the 16-bit types are roundings that plain PyTorch
    makes too: one step's room is enough, and that of many would let anything pass."""
    return ONE_STEP * (max(1, steps) if dtype.itemsize > 2 else 1)


# Of so few elements the largest may be what is left of terms that cancel: then the room is that of all gradients.
FEW = 4


def assert_within_rule(
    got: Tensor, plain: Tensor, exact: Tensor, slack: float = 1.0, scale: float | None = None
) -> None:
    """Error against float64 at most twice that of plain PyTorch in the same type, plus slack · eps · max|exact|, or
    · scale."""
    assert got.shape == exact.shape and got.dtype == plain.dtype
    if exact.numel() == 0:
        return
    exact = exact.double()
    error, allowed = (got.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    if got.dtype == torch.float64:
        # "exact" is float64 too, and errs as much; on a GPU products and sums are contracted otherwise than here.
        slack = (4 if exact.is_cuda else 2) * max(slack, ONE_STEP)
    largest = exact.abs().max() if scale is None else torch.tensor(scale, device=exact.device)
    bound = 2 * allowed + slack * torch.finfo(got.dtype).eps * largest.clamp_min(1e-30)
    assert error <= bound, f"error {error:.3e}, bound {bound:.3e}"


def check(ours: Callable[..., Any], reference: Callable[..., Any], args: Sequence[Any], slack: float = 1.0) -> None:
    """Values, and gradients to every input that requires one, of ``ours`` by the rule."""
    wide = double(args)
    outs = [flat(ours(*args)), flat(reference(*args)), flat(reference(*wide))]
    for triple in zip(*outs, strict=True):
        assert_within_rule(*triple, slack)
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    if not inputs:
        return
    cotangents = [torch.randn(o.shape).to(o) for o in outs[1]]
    results = [
        torch.autograd.grad(outs[0], inputs, cotangents),
        torch.autograd.grad(outs[1], inputs, cotangents),
        torch.autograd.grad(
            outs[2], [a for a in wide if isinstance(a, Tensor) and a.requires_grad], [c.double() for c in cotangents]
        ),
    ]
    largest = max((float(g.abs().max()) for g in results[2] if g.numel() > 0), default=0.0)
    for triple in zip(*results, strict=True):
        assert_within_rule(*triple, slack, largest if triple[2].numel() <= FEW else None)


class Tagged(torch.Tensor):
    """A subclass that must come out where it went in."""


class Watch(torch.overrides.TorchFunctionMode):
    """The names of the functions that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def same_for_any_threads(call: Callable[[], Sequence[Tensor]], counts: Sequence[int] = (1, 2, 2)) -> Sequence[Tensor]:
    """What it gives, asserted to be the same bits for every number of threads; one that comes twice is a repetition."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


class Ops(TorchDispatchMode):
    """The calls of ops below autograd, each with what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, out))
        return out
