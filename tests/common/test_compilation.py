"""What torch's compilers ask of every op: one graph for all sizes, outputs that a schema names, AOTInductor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import functional, nn
from tests.helpers import Ops, flat

KEY = torch.tensor([7, 3], device="cpu")
COLUMNS = 6


class Call(torch.nn.Module):
    """A function of x, and of a module where there is one."""

    def __init__(self, function: Callable[..., Any], *module: torch.nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, torch.nn.ModuleList(module)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.module)


def keyed(x: Tensor) -> Tensor:
    return KEY.to(x.device)


# From [steps, batch, COLUMNS].
CASES: dict[str, Callable[[], Any]] = {
    "LSTM": lambda: nn.LSTM(COLUMNS, 4),
    "LSTM norm": lambda: nn.LSTM(COLUMNS, 4, layer_norm=True),
    "LSTM zoneout": lambda: nn.LSTM(COLUMNS, 4, zoneout=0.2),
    "LSTM recurrent dropout": lambda: nn.LSTM(COLUMNS, 4, recurrent_dropout=0.2),
    "LSTM dropout": lambda: nn.LSTM(COLUMNS, 4, 2, dropout=0.2),
    "GRU": lambda: nn.GRU(COLUMNS, 4),
    "GRU zoneout": lambda: nn.GRU(COLUMNS, 4, zoneout=0.2),
    "GRU reset first": lambda: nn.GRU(COLUMNS, 4, reset_after=False),
    "LSTMCell": lambda: Call(lambda x, cell: cell(x[0]), nn.LSTMCell(COLUMNS, 4)),
    "GRUCell": lambda: Call(lambda x, cell: cell(x[0]), nn.GRUCell(COLUMNS, 4)),
    "attention": lambda: Call(lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)),
    "attention of a kernel": lambda: Call(lambda x: functional.kernel_attention(x, x, x, 0.5)),
    "additive attention": lambda: Call(lambda x: functional.additive_attention(x, x, x, x[0, 0])),
    "multihead attention": lambda: Call(lambda x, m: m(x, x, x), nn.MultiheadAttention(COLUMNS, 2, dropout=0.1)),
    "normals": lambda: Call(lambda x: x + functional.philox_normal(x.shape, keyed(x))),
    "corruption": lambda: nn.Corruption("masking", 0.3),
    "binary code": lambda: Call(lambda x, m: m(x, key=keyed(x)), nn.BinaryCode(1.0)),
    "Jacobian": lambda: Call(
        lambda x, m: functional.jacobian_penalty(m, x.flatten(0, 1))[1], torch.nn.Linear(COLUMNS, 4)
    ),
    "contractive": lambda: nn.ContractiveLinear(COLUMNS, 3),
    "sparse": lambda: nn.SparseActivation(),
    "k-sparse": lambda: nn.TopKAutoencoder(COLUMNS, 16, k=3),
    "latent": lambda: nn.GaussianLatent(COLUMNS, 3),
    "reconstruction": lambda: Call(lambda x: functional.reconstruction_loss(x, x.sigmoid(), "bernoulli")),
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph_takes_all_sizes(name: str) -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    module, first = CASES[name](), 0
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=count)
    for steps, batch in ((7, 3), (9, 4), (11, 6), (5, 8)):
        x = torch.randn(steps, batch, COLUMNS)
        torch.manual_seed(5)
        got = flat(compiled(x))
        torch.manual_seed(5)
        for a, b in zip(got, flat(module(x)), strict=True):
            torch.testing.assert_close(a, b)
        first = first or len(graphs)  # the first trace may start again, once it has seen what are numbers
    assert len(graphs) == first


@pytest.mark.parametrize("name", ["LSTM zoneout", "GRU zoneout", "LSTM recurrent dropout", "normals"])
def test_export_in_training_with_any_number_of_steps(name: str) -> None:
    steps = torch.export.Dim("steps", min=2, max=99)
    module = CASES[name]()
    exported = torch.export.export(module, (torch.randn(7, 3, COLUMNS),), dynamic_shapes=({0: steps},)).module()
    assert flat(exported(torch.randn(12, 3, COLUMNS)))[0].shape[:2] == (12, 3)


@pytest.mark.parametrize("name", CASES)
def test_what_an_op_leaves_out_is_optional_in_its_schema(name: str) -> None:
    compiled = torch.compile(CASES[name](), backend="eager")  # through torch.ops
    x = torch.randn(5, 2, COLUMNS)
    for gradients in (True, False):
        with Ops() as ops, torch.set_grad_enabled(gradients):
            compiled(x)
        calls = [(func._schema, out) for func, out in ops.calls if func.namespace == "lect11ext"]
        assert calls
        for schema, out in calls:
            outputs = out if isinstance(out, tuple) else (out,)
            for returned, output in zip(schema.returns, outputs, strict=True):
                assert output is not None or isinstance(returned.type, torch.OptionalType), (schema.name, returned.name)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell", "GRU", "GRUCell", "additive attention"])
def test_what_an_op_gives_does_not_depend_on_who_needs_a_gradient(name: str) -> None:
    """Or a trace for inference has outputs that are not there when it runs."""
    module = CASES[name]()
    found = []
    for parameter in (True, False):
        module.requires_grad_(parameter)
        x = torch.randn(5, 2, COLUMNS).requires_grad_(parameter)
        given: list[list[bool]] = []

        def note(graph: Any, example: Any, given: list[list[bool]] = given) -> Any:
            class Interpreter(torch.fx.Interpreter):
                def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                    out = super().call_function(target, args, kwargs)
                    if "lect11ext" in str(target) and isinstance(out, tuple):
                        given.append([o is None for o in out])
                    return out

            return lambda *inputs: Interpreter(graph).run(*inputs)

        torch._dynamo.reset()
        torch.compile(module, backend=note)(x)
        assert given
        found.append(given)
    assert found[0] == found[1]


# torch.export takes no vmap over directions of a parameter's products.
INFERRED = [n for n in CASES if n != "Jacobian"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "LSTM" else pytest.mark.slow) for n in INFERRED])
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    module = CASES[name]().eval()
    x = torch.randn(5, 2, COLUMNS)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            exported = torch.export.export(module, (x,))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "m.pt2"))
        torch.manual_seed(5)
        got = flat(torch._inductor.aoti_load_package(package)(x))
        torch.manual_seed(5)
        for a, b in zip(got, flat(module(x)), strict=True):
            torch.testing.assert_close(a, b)
