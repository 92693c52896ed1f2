"""Both paths of a layer's CUDA kernels (csrc/recurrent/layer_cuda.h), by the rule."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import ONE_STEP, assert_within_rule, chain, flat
from tests.recurrent.test_layers import KINDS, operands, ours, plain

pytestmark = pytest.mark.gpu

PATHS = {
    "chosen": {},
    "counter": {"LECT11EXT_LAYER_DATAFLOW": "0"},
    "dataflow": {"LECT11EXT_LAYER_TILES": "1"},
    "dataflow, two tiles": {"LECT11EXT_LAYER_TILES": "2"},
}
TYPES = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"),
         (torch.float64, "ieee")]  # fmt: skip


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in PATHS[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.fixture(params=TYPES, ids=lambda t: f"{str(t[0])[6:]}-{t[1]}")
def arithmetic(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.backends.cudnn.allow_tf32 = request.param[1] == "tf32"
    yield request.param[0]
    torch.backends.cudnn.allow_tf32 = False


def tame(args: list[torch.Tensor]) -> list[torch.Tensor]:
    """Smaller weights where there are more hidden units, so that nothing grows from step to step."""
    with torch.no_grad():
        for weight in args[-4:]:
            weight /= args[1].shape[-1] ** 0.5 / 2
    return args


@pytest.mark.parametrize(
    "batch, hidden", [(1, 8), (3, 20), (16, 64), (40, 130), (40, 136), (17, 256), (250, 256), (16, 520)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_by_the_rule(kind: str, batch: int, hidden: int, path: str, arithmetic: torch.dtype) -> None:
    judge(kind, (5, batch, 12, hidden), arithmetic)


@pytest.mark.parametrize("hidden", [777, 1024, 1100, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_large_weights(kind: str, hidden: int, arithmetic: torch.dtype) -> None:
    judge(kind, (4, 9, 12, hidden), arithmetic)


@pytest.mark.parametrize("kind", KINDS)
def test_many_steps_repeat(kind: str, path: str) -> None:
    args = tame(operands(kind, (500, 33, 16, 200), torch.bfloat16, grad=True))
    results = []
    for _ in range(3):
        outs = flat(ours(kind)(*args))
        results.append([*outs, *torch.autograd.grad([o.float().square().sum() for o in outs], args)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(x.isfinite().all() for x in results[0])


def judge(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    args = tame(operands(kind, shape, dtype, grad=True))
    wide = [a.detach().double().requires_grad_() for a in args]
    outs = [flat(ours(kind)(*args)), flat(plain(kind)(*args)), flat(plain(kind)(*wide))]
    cotangents = [torch.randn_like(o) for o in outs[0]]
    results = [
        [*o, *torch.autograd.grad(o, inputs, [c.to(o[0].dtype) for c in cotangents])]
        for o, inputs in zip(outs, (args, args, wide), strict=True)
    ]
    slack = chain(shape[0], dtype)
    if torch.backends.cudnn.rnn.fp32_precision == "tf32" and dtype == torch.float32:
        slack = ONE_STEP * 2**13  # of TF32's ten bits
    for triple in zip(*results, strict=True):
        assert_within_rule(*triple, slack)
