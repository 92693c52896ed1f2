"""The modules as drop-ins: checkpoints, initialisation, missing states, prepacking."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from lect11ext import functional, nn
from tests.helpers import flat

PAIRS = [(nn.LSTMCell, torch.nn.LSTMCell), (nn.GRUCell, torch.nn.GRUCell)]


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip_and_initialisation(ours: Any, torchs: Any, bias: bool) -> None:
    torch.manual_seed(3)
    a = ours(5, 7, bias)
    torch.manual_seed(3)
    b = torchs(5, 7, bias)
    assert list(a.state_dict()) == list(b.state_dict())
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    other = ours(5, 7, bias)
    other.load_state_dict(b.state_dict(), strict=True)
    torchs(5, 7, bias).load_state_dict(other.state_dict(), strict=True)
    x = torch.randn(4, 5)
    for p, q in zip(flat(other(x)), flat(b(x)), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_unbatched_and_missing_state(ours: Any, torchs: Any) -> None:
    cell = ours(5, 7)
    like = torchs(5, 7)
    like.load_state_dict(cell.state_dict())
    x = torch.randn(5)
    for p, q in zip(flat(cell(x)), flat(like(x)), strict=True):
        assert p.shape == (7,)
        torch.testing.assert_close(p, q)
    state = torch.randn(7)
    hx = (state, state) if ours is nn.LSTMCell else state
    for p, q in zip(flat(cell(x, hx)), flat(like(x, hx)), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_copies_and_repr(ours: Any, torchs: Any) -> None:
    cell = ours(5, 7, grad_clip=2.0)
    x = torch.randn(3, 5)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert all(torch.equal(a, b) for a, b in zip(flat(cell(x)), flat(other(x)), strict=True))
    assert repr(cell) == f"{ours.__name__}(5, 7, grad_clip=2.0)"
    assert repr(ours(5, 7)) == repr(torchs(5, 7))


def test_keyword_arguments_reach_the_function() -> None:
    x = torch.randn(3, 5)
    cell = nn.LSTMCell(5, 7, candidate="sigmoid")
    zeros = torch.zeros(3, 7)
    expected = functional.lstm_cell(x, (zeros, zeros), *cell.parameters(), candidate="sigmoid")
    assert torch.equal(cell(x)[0], expected[0])
    gru = nn.GRUCell(5, 7, reset_after=False)
    assert torch.equal(gru(x, zeros + 1), functional.gru_cell(x, zeros + 1, *gru.parameters(), reset_after=False))
    assert not torch.equal(gru(x, zeros + 1), functional.gru_cell(x, zeros + 1, *gru.parameters()))


def test_parametrised_weights() -> None:
    cell = nn.LSTMCell(5, 7)
    x, before = torch.randn(3, 5), cell.weight_ih.detach().clone()
    torch.nn.utils.parametrizations.weight_norm(cell, "weight_ih")
    torch.testing.assert_close(cell.weight_ih, before)
    cell(x)[0].sum().backward()
    assert cell.parametrizations.weight_ih.original0.grad is not None


def test_functional_call_replaces_the_weights() -> None:
    cell, x = nn.GRUCell(5, 7), torch.randn(1, 5)
    zeros = {name: torch.zeros_like(p) for name, p in cell.named_parameters()}
    with torch.no_grad():
        cell.prepack()
        assert torch.equal(torch.func.functional_call(cell, zeros, (x,)), torch.zeros(1, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda *a, **k: nn.LSTMCell(*a, **k),
        lambda *a, **k: nn.GRUCell(*a, **k),
        lambda *a, **k: nn.GRUCell(*a, reset_after=False, **k),
    ],
)
@pytest.mark.parametrize("sizes", [(5, 7), (33, 70), (64, 64)])
def test_prepack(make: Any, dtype: torch.dtype, sizes: tuple[int, int], capability: str) -> None:
    cell = make(*sizes, dtype=dtype)
    x = torch.randn(1, sizes[0]).to(dtype)
    with torch.no_grad():
        plain = flat(cell(x))
        packed = flat(cell.prepack()(x))
    assert (cell._packed is not None) == (dtype != torch.bfloat16)
    for a, b in zip(plain, packed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 7, 20])
def test_packed_ops_for_every_batch(batch: int, capability: str) -> None:
    for cell, op in ((nn.LSTMCell(9, 21), "lstm_cell_packed"), (nn.GRUCell(9, 21), "gru_cell_packed")):
        x, state = torch.randn(batch, 9), torch.randn(batch, 21)
        states = (state, state) if isinstance(cell, nn.LSTMCell) else (state,)
        last = "tanh" if isinstance(cell, nn.LSTMCell) else True
        with torch.no_grad():
            expected = flat(cell(x, states if len(states) == 2 else state))
            packed = cell.prepack()._packed.weights
            got = flat(getattr(torch.ops.lect11ext, op)(x, *states, *packed, cell.bias_ih, cell.bias_hh, last))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_what_undoes_prepack() -> None:
    x = torch.randn(1, 5)

    def packed() -> nn.LSTMCell:
        return nn.LSTMCell(5, 7).eval().prepack()

    assert packed().train()._packed is None
    assert packed().double()._packed is None
    assert copy.deepcopy(packed())._packed is None
    assert pickle.loads(pickle.dumps(packed()))._packed is None
    cell = packed()
    cell.load_state_dict(nn.LSTMCell(5, 7).state_dict())
    assert cell._packed is None
    cell = packed()
    cell.weight_hh = torch.nn.Parameter(torch.zeros(28, 7))
    with torch.no_grad():
        fresh = nn.LSTMCell(5, 7)
        fresh.load_state_dict(cell.state_dict())
        assert torch.equal(cell(x)[0], fresh(x)[0])
    cell = packed()
    cell(x)[0].sum().backward()  # grad is on: the packed copy is not used
    assert cell.weight_ih.grad is not None


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_prepacked_copy_is_dropped_with_the_memory_it_was_made_from(kind: str) -> None:
    cell = getattr(nn, kind)(5, 4).eval()
    x = torch.randn(1, 5)

    def step() -> Tensor:
        out = cell(x)
        return out[0] if isinstance(out, tuple) else out

    changes = [
        cell.reset_parameters,
        lambda: setattr(cell.weight_ih, "data", torch.randn_like(cell.weight_ih)),
        lambda: torch.nn.utils.vector_to_parameters(
            torch.randn(sum(p.numel() for p in cell.parameters())), cell.parameters()
        ),
        lambda: torch.utils.swap_tensors(cell.weight_hh, torch.nn.Parameter(torch.randn_like(cell.weight_hh))),
    ]

    def optimizer_step() -> None:
        with torch.enable_grad():
            step().sum().backward()
        torch.optim.SGD(cell.parameters(), lr=0.5).step()

    for change in [*changes, optimizer_step]:
        cell.eval().prepack()
        change()
        with torch.no_grad():
            packed = step()
            cell.train()
            assert torch.equal(packed, step())


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_prepacked_copy_is_of_this_memory_and_no_later_one(kind: str) -> None:
    """A weight that is replaced is freed, and the next but one may lie where it lay."""
    for _ in range(30):
        cell = getattr(nn, kind)(64, 256).eval().prepack()
        x = torch.randn(1, 64)
        for _ in range(2):
            cell.weight_hh = torch.nn.Parameter(torch.randn_like(cell.weight_hh))
        fresh = copy.deepcopy(cell)
        state = torch.randn(1, 256)
        hx = (state, state) if kind == "LSTMCell" else state
        with torch.no_grad():
            assert torch.equal(flat(cell(x, hx))[0], flat(fresh(x, hx))[0])


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_prepacked_copy_is_of_these_strides(kind: str) -> None:
    cell, gates = getattr(nn, kind)(5, 4).eval(), 4 if kind == "LSTMCell" else 3
    table = torch.randn(8 * gates, 4)
    cell.weight_hh = torch.nn.Parameter(table[::2])
    cell.prepack()
    cell.weight_hh = torch.nn.Parameter(table[: 4 * gates])
    with torch.no_grad():
        assert torch.equal(flat(cell(torch.ones(1, 5)))[0], flat(copy.deepcopy(cell)(torch.ones(1, 5)))[0])


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_prepacked_copy_does_not_outlive_fused_optimizers(kind: str, optimizer: Any) -> None:
    """Whose writes raise no version."""
    cell, x = getattr(nn, kind)(5, 4).eval().prepack(), torch.randn(1, 5)
    flat(cell(x))[0].sum().backward()
    optimizer(cell.parameters(), lr=1.0, fused=True).step()
    with torch.no_grad():
        assert torch.equal(flat(cell(x))[0], flat(copy.deepcopy(cell)(x))[0])


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_a_trace_of_a_prepacked_cell_has_its_weights_as_inputs(kind: str) -> None:
    cell, x = getattr(nn, kind)(5, 4).eval().prepack(), torch.randn(1, 5)
    first = lambda p, x: flat(torch.func.functional_call(cell, p, (x,)))[0]  # noqa: E731
    parameters = {name: p.detach() for name, p in cell.named_parameters()}
    with torch.no_grad():
        traced = make_fx(first)(parameters, x)
        doubled = {name: 2 * p for name, p in parameters.items()}
        torch.testing.assert_close(traced(doubled, x), first(doubled, x))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_inference_tensors_are_not_packed(kind: str) -> None:
    """Nothing counts how often they are written."""
    with torch.inference_mode():
        cell = getattr(nn, kind)(5, 4).eval().prepack()
    assert cell._packed is None


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_prepacked_cells_treat_odd_calls_as_others_do(kind: str) -> None:
    cell, x = getattr(nn, kind)(5, 4).eval().prepack(), torch.ones(1, 5)
    wrap = (lambda h: (h, h)) if kind == "LSTMCell" else (lambda h: h)
    with torch.no_grad():
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            assert flat(cell(x))[0].dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but h is on meta"):
            cell(x, wrap(torch.zeros(1, 4, device="meta")))
        with pytest.raises(ValueError, match="input must have input_size columns"):
            cell(x[:, :4])
        with pytest.raises(TypeError, match="h must be a Tensor, but got int"):
            cell(x, wrap(3))
        with pytest.raises(TypeError, match="input must be a Tensor, but got list"):
            cell([1.0])
        with pytest.raises(TypeError, match="input must be a Tensor, but got str"):
            cell("x", wrap(torch.zeros(1, 4)))
        with pytest.raises(TypeError, match=r"(state|h) must be"):
            cell(x, 3)
        compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(flat(compiled(x))[0], flat(cell(x))[0])
    for sizes in [(0, 4), (5, 0)]:
        getattr(nn, kind)(*sizes).prepack()
    if kind == "LSTMCell":
        cell.candidate = "relu"
        with torch.no_grad(), pytest.raises(ValueError, match="candidate must be 'tanh' or 'sigmoid'"):
            cell(x)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_prepacked_cells_have_tangents_and_batches_while_grad_is_off(kind: str) -> None:
    cell, x, d = getattr(nn, kind)(5, 4).eval(), torch.randn(1, 5), torch.randn(1, 5)
    first = lambda x: flat(cell(x))[0]  # noqa: E731

    def results() -> list[Tensor | None]:
        with torch.no_grad():
            with forward_ad.dual_level():
                own = forward_ad.unpack_dual(first(forward_ad.make_dual(x, d))).tangent
            return [own, torch.func.jvp(first, (x,), (d,))[1], torch.func.jacfwd(first)(x), torch.vmap(first)(x[None])]

    expected = results()
    cell.prepack()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a fallback that runs sample by sample
        for a, b in zip(results(), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_pruned_and_normalised_weights(kind: str) -> None:
    ours, x = getattr(nn, kind)(5, 4), torch.randn(2, 5)
    torchs = getattr(torch.nn, kind)(5, 4)
    torchs.load_state_dict(ours.state_dict())
    for cell in (ours, torchs):
        torch.nn.utils.prune.l1_unstructured(cell, "weight_hh", amount=0.5)
    for a, b in zip(flat(ours(x)), flat(torchs(x)), strict=True):
        torch.testing.assert_close(a, b)
