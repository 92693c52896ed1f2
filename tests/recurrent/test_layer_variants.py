"""What the layers have beyond torch.nn's: peepholes, a norm, masks, zoneout, the early reset, cut and kept states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import reference
from tests.conftest import DTYPES
from tests.helpers import ONE_STEP, chain, check, gradcheck, gradgradcheck, same_for_any_threads

SHAPES = [(1, 1, 2, 3), (5, 3, 4, 7), (3, 9, 17, 64), (6, 2, 3, 130), (2, 50, 5, 17)]
BOTH = ["norm", "mask", "zoneout masks", "zoneout rates", "truncate", "sums"]
LSTM = [*BOTH, "peephole", "peephole norm mask zoneout masks"]
GRU = [*BOTH, "first", "first mask zoneout masks truncate", "norm mask zoneout rates"]
CASES = [("lstm", v) for v in LSTM] + [("gru", v) for v in GRU]


class Case:
    """A variant's differentiable arguments, and the op and its reference as functions of them alone."""

    def __init__(self, kind: str, variant: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        steps, batch, inputs, hidden = shape
        gates = 4 if kind == "lstm" else 3
        self.kind, self.options = kind, dict[str, Any]()
        multiplied = "sums" in variant
        sizes: dict[str, tuple[int, ...]] = {
            "input": (steps, batch, gates * hidden if multiplied else inputs),
            "h": (batch, hidden),
            "c": (batch, hidden),
            "weight_ih": (gates * hidden, inputs),
            "weight_hh": (gates * hidden, hidden),
            "bias_ih": (gates * hidden,),
            "bias_hh": (gates * hidden,),
            "weight_peephole": (3, hidden),
            "layer_norm": (gates * hidden,),
            "hidden_mask": (batch, hidden),
        }
        absent = {"c"} if kind == "gru" else set()
        absent |= {n for n, word in (("weight_peephole", "peephole"), ("layer_norm", "norm"), ("hidden_mask", "mask"))
                   if word not in variant.replace("zoneout masks", "")}  # fmt: skip
        absent |= {"weight_ih"} if multiplied else set()
        self.names = [n for n in sizes if n not in absent]
        self.args = [(torch.randn(sizes[n]) * 0.4).to(dtype).requires_grad_() for n in self.names]
        if "zoneout masks" in variant:
            for state in ("h", "c")[: 2 if kind == "lstm" else 1]:
                self.options[f"zoneout_{state}"] = torch.rand(steps, batch, hidden) < 0.4
        if "zoneout rates" in variant:
            for state, rate in (("h", 0.2), ("c", 0.3))[: 2 if kind == "lstm" else 1]:
                self.options[f"zoneout_rate_{state}"] = rate
        if "truncate" in variant:
            self.options["truncate"] = 2
        if "first" in variant:
            self.options["reset_after"] = False

    def named(self, args: tuple[Tensor, ...]) -> dict[str, Any]:
        return {"weight_ih": None, **dict(zip(self.names, args, strict=True)), **self.options}

    def ours(self, *args: Tensor, **options: Any) -> tuple[Tensor, ...]:
        op = getattr(torch.ops.lect11ext, f"{self.kind}_layer")
        return op(**self.named(args), **options)[: 3 if self.kind == "lstm" else 2]

    def plain(self, *args: Tensor, **options: Any) -> tuple[Tensor, ...]:
        named = self.named(args)
        if self.kind == "gru":
            return reference.gru_layer(named.pop("input"), named.pop("h"), **named, **options)
        state = (named.pop("h"), named.pop("c"))
        output, state = reference.lstm_layer(named.pop("input"), state, **named, **options)
        return output, *state

    def with_options(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda *args: function(*args, **options)


def rows(steps: int, batch: int) -> list[dict[str, Any]]:
    """Masks of rows, in both directions."""
    both = {"lengths": torch.randint(0, steps + 1, (batch,)), "reset": torch.rand(steps, batch) < 0.3}
    return [{**masks, "reverse": reverse} for masks in ({}, both) for reverse in (False, True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_values(kind: str, variant: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = Case(kind, variant, shape, dtype)
    for options in rows(*shape[:2]):
        for clip in (None, 0.3):
            choice = {**options, "grad_clip": clip}
            # A norm divides by the deviation of few, small sums; who resets first has two products a step, one behind
            # the other.
            slack = chain(shape[0], dtype) * (2 if "norm" in variant or "first" in variant else 1)
            check(case.with_options(case.ours, **choice), case.with_options(case.plain, **choice), case.args, slack)


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_products_large_enough_for_the_blas(kind: str, variant: str) -> None:
    case = Case(kind, variant, (8, 33, 48, 128), torch.bfloat16)
    for options in rows(8, 33):
        ours, plain = (case.with_options(f, **options) for f in (case.ours, case.plain))
        check(ours, plain, case.args, 8 * ONE_STEP)


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_every_capability(kind: str, variant: str, capability: str) -> None:
    for dtype in DTYPES:
        case = Case(kind, variant, (3, 9, 5, 40), dtype)
        check(case.ours, case.plain, case.args, chain(3, dtype))


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_gradients_of_every_order(kind: str, variant: str) -> None:
    case = Case(kind, variant, (3, 2, 2, 2), torch.float64)
    for options in rows(3, 2):
        function = case.with_options(case.ours, **options)
        if "truncate" in variant:  # no gradient of the function as it stands: against the reference instead
            compare_second_order(case, options)
            continue
        assert gradcheck(function, case.args, check_forward_ad=True)
        assert gradgradcheck(function, case.args, check_fwd_over_rev=True)


def compare_second_order(case: Case, options: dict[str, Any]) -> None:
    results = []
    directions = [torch.randn_like(a) for a in case.args]
    for function in (case.ours, case.plain):
        outputs = function(*case.args, **options)
        first = torch.autograd.grad(sum(o.square().sum() for o in outputs), case.args, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), case.args)
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(a, d) for a, d in zip(case.args, directions, strict=True)]
            tangents = [torch.autograd.forward_ad.unpack_dual(o).tangent for o in function(*duals, **options)]
        results.append([*first, *second, *(torch.zeros(()) if t is None else t for t in tangents)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_batch_first_and_threads(kind: str, variant: str) -> None:
    case = Case(kind, variant, (7, 4, 8, 200), torch.float32)
    expected = same_for_any_threads(lambda: gradients(case, {}), (1, 3))
    turned = Case(kind, variant, (7, 4, 8, 200), torch.float32)
    turned.args = [a.detach() for a in case.args]
    turned.args[0] = turned.args[0].transpose(0, 1)
    turned.args = [a.requires_grad_() for a in turned.args]
    turned.options = {n: v.transpose(0, 1) if isinstance(v, Tensor) else v for n, v in case.options.items()}
    outputs = 3 if kind == "lstm" else 2
    for i, (a, b) in enumerate(zip(gradients(turned, {"batch_first": True}), expected, strict=True)):
        # The sums over all steps have another order.
        torch.testing.assert_close(a.transpose(0, 1) if i in (0, outputs) else a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [24, 29, 101])
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_batches_in_two_parts(kind: str, variant: str, batch: int, dtype: torch.dtype) -> None:
    """Threads of a large batch take turns at its halves, which changes no bit."""
    case = Case(kind, variant, (6, batch, 9, 70), dtype)
    for options in rows(6, batch):
        chosen = {**options, "grad_clip": 0.5}
        same_for_any_threads(lambda chosen=chosen: gradients(case, chosen), (1, 2, 3))


def gradients(case: Case, options: dict[str, Any]) -> list[Tensor]:
    outputs = case.ours(*case.args, **options)
    return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), case.args)]


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_recomputed_gates_give_the_same_gradients(kind: str, variant: str, every: int) -> None:
    case = Case(kind, variant, (7, 6, 5, 20), torch.float64)
    for options in rows(7, 6):
        whole, parts = gradients(case, options), gradients(case, {**options, "recompute": every})
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_derivatives_of_a_recomputing_layer(kind: str) -> None:
    case = Case(kind, "mask", (5, 2, 2, 2), torch.float64)
    function = case.with_options(case.ours, recompute=2)
    assert gradcheck(function, case.args, check_forward_ad=True)
    assert gradgradcheck(function, case.args)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_what_recompute_keeps(kind: str) -> None:
    """Between forward and backward only the outputs, and of an LSTM the cell's state every so many steps."""
    case = Case(kind, "", (32, 2, 3, 8), torch.float32)
    node = case.ours(*case.args, recompute=8)[0].grad_fn
    assert node is not None
    kept = getattr(torch.ops.lect11ext, f"{kind}_layer")(**case.named(tuple(case.args)), recompute=8, save=True)
    cells = [t.shape for t in kept[3:] if t is not None]
    assert cells == ([torch.Size([3, 2, 8])] if kind == "lstm" else [])


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_opcheck(kind: str, variant: str) -> None:
    case = Case(kind, variant, (4, 2, 3, 5), torch.float32)
    op = getattr(torch.ops.lect11ext, f"{kind}_layer").default
    for options in ({}, {"recompute": 2}):
        torch.library.opcheck(op, (), {**case.named(tuple(case.args)), **options})


@pytest.mark.parametrize("options", [{}, {"zoneout_rate_h": 0.2, "zoneout_rate_c": 0.1}, {"grad_clip": 0.05},
                                     {"truncate": 2}], ids=str)  # fmt: skip
def test_projections_run_step_by_step(options: dict[str, Any]) -> None:
    steps, batch, inputs, hidden, size = 4, 3, 2, 5, 3
    sizes = [(steps, batch, inputs), (batch, size), (batch, hidden), (4 * hidden, inputs), (4 * hidden, size)]
    sizes += [(4 * hidden,), (4 * hidden,), (size, hidden), (3, hidden), (4 * hidden,), (batch, size)]
    args = [(torch.randn(s, dtype=torch.float64) * 0.4).requires_grad_() for s in sizes]
    names = ["bias_ih", "bias_hh", "weight_hr", "weight_peephole", "layer_norm", "hidden_mask"]

    def ours(*args: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.lect11ext.lstm_layer(*args, **options)[:3]

    def plain(x: Tensor, h: Tensor, c: Tensor, ih: Tensor, hh: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, rest, strict=True))
        output, state = reference.lstm_layer(x, (h, c), ih, hh, **named, **options)
        return output, *state

    check(ours, plain, args, chain(steps, torch.float64))
    if "truncate" not in options and "grad_clip" not in options:
        assert gradcheck(ours, args, check_forward_ad=True)
        assert gradgradcheck(ours, args)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_peephole": torch.zeros(4, 5)}, ValueError, r"weight_peephole must have shape \[3, 5\]"),
        ({"layer_norm": torch.zeros(15)}, ValueError, r"layer_norm must have shape \[20\]"),
        ({"layer_norm": torch.zeros(20).double()}, TypeError, "layer_norm must have the type of input"),
        ({"hidden_mask": torch.zeros(5)}, ValueError, r"hidden_mask must have shape \[2, 5\]"),
        ({"zoneout_h": torch.zeros(3, 2, 5)}, TypeError, "zoneout_h must be bool"),
        ({"zoneout_c": torch.zeros(2, 3, 5) > 0}, ValueError, r"zoneout_c must have shape \[3, 2, 5\]"),
        ({"zoneout_rate_h": 1.5}, ValueError, "zoneout_rate_h must be a probability, from 0 to 1, but got 1.5"),
        ({"zoneout_rate_c": float("nan")}, ValueError, "zoneout_rate_c must be a probability"),
        ({"truncate": -1}, ValueError, "truncate must be a number of steps, or 0 for none, but got -1"),
        ({"recompute": -2}, ValueError, "recompute must be a number of steps, or 0 for none, but got -2"),
        ({"weight_ih": None}, ValueError, r"input must have gates \* hidden_size columns where there is no weight_ih"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], error: type[Exception], message: str) -> None:
    case = Case("lstm", "", (3, 2, 4, 5), torch.float32)
    with pytest.raises(error, match=message):
        torch.ops.lect11ext.lstm_layer(**{**case.named(tuple(case.args)), **options})


def test_no_norm_of_a_gru_that_resets_first() -> None:
    case = Case("gru", "norm first", (3, 2, 4, 5), torch.float32)
    with pytest.raises(ValueError, match="layer_norm must be None where reset_after is False"):
        case.ours(*case.args)
