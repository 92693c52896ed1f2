"""Values, derivatives, masks and numerics of additive_attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lect11ext import functional, reference
from tests.helpers import ONE_STEP, check, flat, room, same_for_any_threads

attend = functional.additive_attention
# (batch, L, S, H', Dv)
SHAPES = [
    ((), 1, 1, 1, 1), ((2,), 3, 5, 7, 4), ((3,), 1, 50, 33, 16), ((2, 2), 17, 64, 16, 9), ((), 65, 131, 20, 3),
    ((1,), 130, 67, 96, 40), ((2,), 9, 7, 1, 130), ((0,), 3, 4, 5, 6), ((2,), 0, 4, 5, 6), ((2,), 3, 0, 5, 6),
    ((2,), 3, 4, 0, 6), ((2,), 3, 4, 5, 0),
]  # fmt: skip
# Of a sum with few terms plain PyTorch's error can be zero by luck; this leaves room for the roundings of e^2q, e^2k
# and their product.
SLACK = ONE_STEP


def operands(
    batch: tuple[int, ...],
    L: int,
    S: int,
    H: int,
    D: int,
    dtype: torch.dtype,
    device: str | None = None,
    spread: float = 1.0,
) -> list[Tensor]:
    sizes = [(*batch, L, H), (*batch, S, H), (*batch, S, D), (H,)]
    scales = [spread, spread, 1.0, max(H, 1) ** -0.5]
    return [(s * torch.randn(n)).to(device, dtype).requires_grad_() for n, s in zip(sizes, scales, strict=True)]


def check_both(args: list[Any], slack: float | None = None) -> None:
    # In float64 plain PyTorch is judged by itself: oneDNN's bound of the longest sum, that over all pairs.
    pairs = args[0].shape[:-1].numel() * args[1].size(-2)
    usual = SLACK * max(1, math.ceil(math.log2(max(pairs, 1)))) if args[0].dtype == torch.float64 else SLACK
    check(attend, reference.additive_attention, args, usual if slack is None else slack)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: Any, dtype: torch.dtype, device: str) -> None:
    check_both(operands(*shape, dtype, device))


@pytest.mark.parametrize("spread", [1e-3, 0.1, 3.0, 12.0, 40.0, 300.0])
def test_small_and_large_sums(spread: float, device: str) -> None:
    """The forms that the kernel takes for keys and queries: small, factored, and too large for that."""
    check_both(operands((2,), 20, 150, 48, 8, torch.float32, device, spread))
    args = operands((2,), 20, 150, 48, 8, torch.float32, device)
    with torch.no_grad():
        args[0][0, 3] *= spread  # one query only, one key only
        args[1][1, 70] *= spread
        args[1][1, :64] *= 0.01
    check_both(args)


def test_opposite_large_sums_meet_in_the_middle() -> None:
    for size in (5.0, 15.0, 19.9, 21.0, 80.0, 1e4):
        query, key = torch.full((2, 3, 16), size), torch.full((2, 9, 16), -size) + 0.25 * torch.randn(2, 9, 16)
        args = [query.requires_grad_(), key.requires_grad_(), torch.randn(2, 9, 4), torch.randn(16, requires_grad=True)]
        check_both(args)


def test_every_capability(dtype: torch.dtype, capability: str) -> None:
    mask = torch.rand(11, 70) < 0.7
    for spread in (0.05, 1.0, 30.0):
        args = operands((2,), 11, 70, 37, 19, dtype, spread=spread)
        if spread == 1.0 or dtype != torch.float64:
            check_both([*args, mask])


def test_longer_sums_lose_no_digits() -> None:
    check_both(operands((), 600, 40, 64, 32, torch.float32), slack=1.0)
    check_both(operands((), 40, 3000, 64, 32, torch.float32), slack=1.0)


# --- masks --------------------------------------------------------------------------------------------------------

MASKS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "bool": lambda t: torch.rand(2, 9, 70) < 0.5,
    "bool of all queries": lambda t: torch.rand(2, 1, 70) < 0.5,
    "bool of keys alone": lambda t: torch.rand(70) < 0.5,
    "bool of queries alone": lambda t: torch.rand(9, 1) < 0.5,
    "causal": lambda t: torch.ones(9, 70, dtype=torch.bool).tril(),
    "transposed": lambda t: (torch.rand(70, 9) < 0.5).t(),
    "none": lambda t: torch.zeros(9, 70, dtype=torch.bool),
    "additive": lambda t: torch.randn(2, 9, 70).to(t).requires_grad_(),
    "additive of keys": lambda t: torch.randn(2, 1, 70).to(t).requires_grad_(),
    "additive of queries": lambda t: torch.randn(9, 1).to(t).requires_grad_(),
    "additive, transposed": lambda t: torch.randn(70, 9).to(t).t().requires_grad_(),
    "one number": lambda t: torch.randn(()).to(t).requires_grad_(),
    "infinite": lambda t: torch.zeros(9, 70).masked_fill(torch.rand(9, 70) < 0.5, -torch.inf).to(t).requires_grad_(),
    "float32": lambda t: torch.randn(2, 9, 70).to(torch.promote_types(t, torch.float32)).requires_grad_(),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, dtype: torch.dtype, device: str) -> None:
    mask = MASKS[name](dtype).detach().to(device)
    # What is added to all scores of a query changes nothing: that gradient is zero, and its roundings cannot be judged.
    constant = name in ("additive of queries", "one number")
    mask.requires_grad_(mask.dtype != torch.bool and not constant)
    args = operands((2,), 9, 70, 16, 5, dtype, device)
    out = attend(*args, mask)
    assert out.dtype == dtype
    check_both([*args, mask])
    if constant:
        mask.requires_grad_()
        (grad,) = torch.autograd.grad(attend(*args, mask).sum(), mask)
        assert (
            grad.dtype == mask.dtype
            and grad.abs().max() <= 100 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        )


def test_a_query_without_keys_gives_zeros(dtype: torch.dtype, device: str) -> None:
    for kind in ("bool", "additive"):
        mask = torch.rand(2, 9, 70) < 0.8
        mask[0, 4] = mask[1, 0] = False
        mask = mask.to(device)
        if kind == "additive":
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf).requires_grad_()
        args = operands((2,), 9, 70, 16, 5, dtype, device)
        out = attend(*args, mask)
        assert (out[0, 4] == 0).all() and (out[1, 0] == 0).all() and out.isfinite().all()
        wanted = [*args, mask] if kind == "additive" else args
        for create_graph in (False, True):
            grads = torch.autograd.grad(out.sum(), wanted, retain_graph=True, create_graph=create_graph)
            assert all(g.isfinite().all() for g in grads)
            assert (grads[0][0, 4] == 0).all() and (grads[0][1, 0] == 0).all()
            # What comes back to it goes nowhere, be it NaN.
            back = torch.ones_like(out)
            back[0, 4] = back[1, 0] = torch.nan
            again = torch.autograd.grad(out, wanted, back, retain_graph=True, create_graph=create_graph)
            assert all(torch.equal(a, g) for a, g in zip(again, grads, strict=True))
        check_both([*args, mask])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_barred_is_not_looked_at(bad: float, dtype: torch.dtype, device: str) -> None:
    """Padding behind two of the sequences, and a key and a value that some queries alone may see."""
    args = operands((2,), 20, 70, 16, 5, dtype, device)
    mask = torch.ones(2, 20, 70, dtype=torch.bool)
    mask[0, :, 50:] = False
    mask[1, :, 66:] = False
    mask[1, 3:, 7] = False
    clean, mask = attend(*args, mask.to(device)), mask.to(device)
    expected = torch.autograd.grad(clean[0].sum() + clean[1, 3:].sum(), args)
    with torch.no_grad():
        args[1][0, 50:], args[2][0, 50:], args[1][1, 66:], args[2][1, 67] = bad, bad, bad, bad
        args[1][1, 7], args[2][1, 7] = bad, bad
    out = attend(*args, mask)
    # Where a key is plainly computed, and not factored, the last digits differ.
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out[0], clean[0], **tolerance)
    torch.testing.assert_close(out[1, 3:], clean[1, 3:], **tolerance)
    if bad != bad:
        assert out[1, :3].isnan().all()
    grads = torch.autograd.grad(out[0].sum(), args, retain_graph=True)
    assert all(g[:1].isfinite().all() for g in grads[:3])
    mask[1, :3, 7] = False
    out = attend(*args, mask)
    for create_graph in (False, True):
        grads = torch.autograd.grad(out.sum(), args, retain_graph=True, create_graph=create_graph)
        assert all(g.isfinite().all() for g in grads)
        assert (grads[1][0, 50:] == 0).all() and (grads[2][0, 50:] == 0).all() and (grads[1][1, 7] == 0).all()
    assert [g.shape for g in grads] == [e.shape for e in expected]


def test_nan_stays_in_its_own_rows() -> None:
    query, key, value, weight = (t.detach() for t in operands((2,), 20, 70, 16, 5, torch.float32))
    query[0, 3, 2] = value[1, 5, 4] = float("nan")
    out = attend(query, key, value, weight)
    assert out[0].isnan().any(-1).tolist() == [i == 3 for i in range(20)]
    assert out[1, :, 4].isnan().all() and not out[1, :, :4].isnan().any()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 70), st.integers(1, 40), st.integers(1, 20)),
    broadcast=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=4, max_size=4),
    step=st.integers(1, 2),
    turned=st.booleans(),
    kind=st.sampled_from([None, "bool", "additive"]),
)
def test_any_shapes_strides_and_broadcasts(
    batch: list[int], sizes: Any, broadcast: Any, step: int, turned: bool, kind: str | None
) -> None:
    L, S, H, D = sizes

    def lead(which: int) -> list[int]:
        keep, ones = broadcast[which]
        kept = batch[min(keep, len(batch)) :]
        return [1] * len(kept) if ones and which > 0 else kept

    def strided(*size: int) -> Tensor:
        if turned:
            size = (*size[:-2], size[-1], size[-2])
        big = torch.randn([n * step for n in size])[tuple(slice(None, None, step) for _ in size)]
        return (big.mT if turned else big).requires_grad_()

    args: list[Any] = [strided(*lead(0), L, H), strided(*lead(1), S, H), strided(*lead(2), S, D), torch.randn(H)]
    args[3].requires_grad_()
    full = torch.broadcast_shapes(*(a.shape[:-2] for a in args[:3]))
    if kind is not None:
        mask = torch.randn(*full, L, S)[(slice(0, 1),) * len(full)] if broadcast[3][1] else torch.randn(*full, L, S)
        args.append(mask > 0 if kind == "bool" else mask.requires_grad_())
    check_both(args)


def test_more_batch_dimensions_than_a_struct_holds() -> None:
    args = operands((1, 2, 1, 2, 1, 2, 1, 2, 1, 2), 3, 5, 6, 4, torch.float32)
    check_both([args[0], args[1][:, :1].detach().requires_grad_(), *args[2:]])


@pytest.mark.cpu  # of a GPU all memory is there that is asked for
def test_offsets_beyond_32_bits() -> None:
    args = operands((3,), 3, 5, 16, 16, torch.float32)
    for position in range(3):
        far = list(args)
        rows = args[position].size(-2)
        memory = room(2**31 + 1024, torch.float32)
        view = memory.as_strided((3, rows, 16), (2**30, 16, 1))
        far[position] = view.copy_(args[position].detach()).requires_grad_()
        check_both(far)


def test_gradcheck_of_every_order() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    for extra in ([], [mask], [torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)]):
        args = [*operands((2,), 2, 3, 4, 2, torch.float64), *extra]
        assert torch.autograd.gradcheck(attend, args, check_forward_ad=True, check_undefined_grad=True)
        assert torch.autograd.gradgradcheck(attend, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("asked", range(1, 32))
def test_every_subset_of_gradients(asked: int) -> None:
    args = [*operands((2,), 5, 7, 8, 3, torch.float32), torch.randn(5, 7, requires_grad=True)]
    everything = torch.autograd.grad(attend(*args).sum(), args)
    some = [a.detach().requires_grad_(bool(asked >> i & 1)) for i, a in enumerate(args)]
    wanted = [i for i in range(5) if asked >> i & 1]
    for i, got in zip(wanted, torch.autograd.grad(attend(*some).sum(), [some[i] for i in wanted]), strict=True):
        assert torch.equal(got, everything[i])


@pytest.mark.parametrize("shape", [((), 300, 200, 64, 32), ((40,), 1, 60, 32, 8), ((3,), 70, 90, 16, 4)], ids=str)
def test_threads_and_repeats_give_the_same_bits(shape: Any) -> None:
    args = [*operands(*shape, torch.float32), torch.randn(shape[2], requires_grad=True)]

    def results() -> Sequence[Tensor]:
        out = attend(*args)
        return [out, *torch.autograd.grad(out, args, torch.ones_like(out))]

    same_for_any_threads(results, (1, 2, 3, 2))


def test_weights_are_kept_for_gradients_alone() -> None:
    args = operands((2,), 5, 7, 8, 3, torch.bfloat16)
    op = torch.ops.lect11ext.additive_attention
    output, weights = op(*args, None, True)
    assert weights.dtype == torch.float32 and weights.shape == (2, 5, 7) and not weights.requires_grad
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    with torch.no_grad():
        again, none = op(*args, None, False)
    assert none is None and torch.equal(again, output)
    assert flat(attend(*args))[0].grad_fn.name() == "AdditiveAttentionBackward"
