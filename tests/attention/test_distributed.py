"""Sharding rules and ring attention: two processes against one. They start once and run all of CHECKS."""

from __future__ import annotations

import datetime
import doctest
import importlib
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lect11ext.functional import scaled_dot_product_attention

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lect11ext.integrations._sharding import _divides
from lect11ext.integrations.distributed import gather_sequence, register_sharding, ring_attention, shard_sequence

pytestmark = pytest.mark.cpu

PROCESSES = 2
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The same in all processes, which are seeded alike."""
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def close(got: Any, expected: Tensor) -> None:
    if isinstance(got, DTensor):
        got = got.full_tensor()
    room = 1e-10 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, expected, atol=room, rtol=room)


def distributed(tensors: list[Tensor], placements: list[list[Any]], mesh: Any) -> list[Tensor]:
    return [
        distribute_tensor(x.detach(), mesh, p).requires_grad_(x.requires_grad)
        for x, p in zip(tensors, placements, strict=True)
    ]


def same(
    function: Callable[..., Any], tensors: list[Tensor], placements: list[list[Any]], mesh: Any
) -> tuple[list[Any], list[Any]]:
    """Results and gradients of shards against those of the whole; returns what the shards gave."""
    shards = distributed(tensors, placements, mesh)
    expected, got = function(*tensors), function(*shards)
    if isinstance(expected, Tensor):
        expected, got = (expected,), (got,)
    for g, e in zip(got, expected, strict=True):
        close(g, e)
    cotangents = [torch.randn_like(e) for e in expected]
    wanted = [(x, s) for x, s in zip(tensors, shards, strict=True) if x.requires_grad]
    of_whole = torch.autograd.grad(expected, [x for x, _ in wanted], cotangents)
    theirs = [distribute_tensor(c, mesh, g.placements) for c, g in zip(cotangents, got, strict=True)]
    of_shards = torch.autograd.grad(got, [s for _, s in wanted], theirs)
    for g, e in zip(of_shards, of_whole, strict=True):
        close(g, e)
    return list(got), list(of_shards)


# --- DTensor ------------------------------------------------------------------------------------------------------


def line() -> Any:
    return init_device_mesh("cpu", (2,))


@check
def heads_stay_sharded() -> None:
    """Grouped queries, causal, with the LSE and its gradient."""

    def attend(*x: Tensor) -> Any:
        return scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True, return_lse=True)

    got, gradients = same(attend, inputs((1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 4)), [[Shard(1)]] * 3, line())
    assert [x.placements for x in [*got, *gradients]] == [(Shard(1),)] * 5


@check
def batches_stay_sharded() -> None:
    got, gradients = same(
        scaled_dot_product_attention, inputs((3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8)), [[Shard(0)]] * 3, line()
    )
    assert [x.placements for x in [*got, *gradients]] == [(Shard(0),)] * 4


@check
def mask_gradients_are_sums_over_shards() -> None:
    shapes = [(2, 4, 5, 8)] * 3
    for shard, mask, placement, of_gradient in (
        (Shard(0), (1, 4, 5, 5), Replicate(), Partial()),
        (Shard(0), (2, 1, 1, 5), Shard(0), Shard(0)),
        (Shard(1), (1, 4, 5, 5), Shard(1), Shard(1)),
        (Shard(1), (2, 1, 5, 5), Replicate(), Partial()),
        (Shard(1), (5, 5), Replicate(), Partial()),
    ):
        _, gradients = same(scaled_dot_product_attention, inputs(*shapes, mask), [[shard]] * 3 + [[placement]], line())
        assert gradients[3].placements == (of_gradient,), (shard, mask, gradients[3].placements)


@check
def bool_masks_and_slopes() -> None:
    qkv = inputs((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8))
    seen, slopes = torch.rand(2, 1, 5, 5) < 0.7, [torch.rand(4), torch.rand(2, 4)]

    def attend(*x: Tensor) -> Any:
        return scaled_dot_product_attention(*x[:4], alibi_slopes=x[4])

    for shard in (Shard(0), Shard(1)):
        for slope in slopes:
            dim = shard.dim - 2 + slope.dim()
            of_slopes = Shard(dim) if dim >= 0 else Replicate()
            of_mask = Shard(0) if shard.dim == 0 else Replicate()
            got, _ = same(attend, [*qkv, seen, slope], [[shard]] * 3 + [[of_mask], [of_slopes]], line())
            assert got[0].placements == (shard,)


@check
def other_placements_are_redistributed() -> None:
    shapes = [(2, 4, 6, 8), (2, 4, 6, 8), (2, 4, 6, 8)]
    for placements in ([Shard(2)], [Replicate()], [Shard(3)]):
        same(scaled_dot_product_attention, inputs(*shapes), [placements] * 3, line())
    same(scaled_dot_product_attention, inputs(*shapes), [[Shard(1)], [Replicate()], [Shard(0)]], line())


@check
def heads_that_do_not_divide() -> None:
    def attend(*x: Tensor) -> Any:
        return scaled_dot_product_attention(*x, enable_gqa=True)

    for heads in (1, 3):  # three would be cut between other queries than those that share them
        shapes = ((1, 6, 5, 8), (1, heads, 5, 8), (1, heads, 5, 8))
        got, _ = same(attend, inputs(*shapes), [[Shard(1)]] * 3, line())
        assert got[0].placements == (Replicate(),)
    got, _ = same(scaled_dot_product_attention, inputs(*[(1, 3, 5, 8)] * 3), [[Shard(1)]] * 3, line())
    assert got[0].placements == (Shard(1),)


@check
def meshes_of_rank_two() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    got, _ = same(
        scaled_dot_product_attention, inputs(*[(2, 4, 5, 8)] * 3, (4, 5, 5)),
        [[Shard(0), Shard(1)]] * 3 + [[Replicate(), Shard(0)]], mesh,
    )  # fmt: skip
    assert got[0].placements == (Shard(0), Shard(1))


@check
def second_derivatives_of_shards() -> None:
    def gradient_norm(*x: Tensor) -> Any:
        out = scaled_dot_product_attention(*x, is_causal=True)
        return sum(g.square().sum() for g in torch.autograd.grad(out.square().sum(), x, create_graph=True))

    whole = inputs(*[(2, 4, 5, 8)] * 3)
    for shard in (Shard(0), Shard(1)):
        shards = distributed(whole, [[shard]] * 3, line())
        expected, got = (torch.autograd.grad(gradient_norm(*x), x) for x in (whole, shards))
        for g, e in zip(got, expected, strict=True):
            close(g, e)


@check
def tangents_of_shards() -> None:
    ops = torch.ops.lect11ext
    options = (None, None, None, None, 0.0, None, None, 0, False, None)
    whole = [x.detach() for x in inputs(*[(2, 4, 5, 8)] * 3, (1, 4, 5, 5))]
    directions = [x.detach() for x in inputs(*[(2, 4, 5, 8)] * 3, (1, 4, 5, 5))]
    cotangent = torch.randn(2, 4, 5, 8, dtype=torch.float64)

    def all_of(mask_at: Any, at: Any) -> list[Any]:
        q, k, v, mask, qt, kt, vt, mask_t = distributed([*whole, *directions], [[at]] * 3 + [[mask_at]] + [[at]] * 3 + [
            [mask_at]
        ], line()) if at is not None else [*whole, *directions]  # fmt: skip
        g = distribute_tensor(cotangent, line(), [at]) if at is not None else cotangent
        args = (q, k, v, mask, *options)
        out = ops.attention(*args)
        out_t = ops.attention_tangent(*args, *out, qt, kt, vt, mask_t)
        points = ops.attention_backward_tangent(
            g, None, *args, *out, None, None, qt, kt, vt, mask_t, *out_t, (True, False, True, True)
        )
        return [*out_t, *points]

    expected = all_of(None, None)
    for at, mask_at in ((Shard(0), Replicate()), (Shard(1), Shard(1))):
        for g, e in zip(all_of(mask_at, at), expected, strict=True):
            assert (g is None) == (e is None)
            if e is not None:
                close(g, e)


@check
def each_shard_drops_by_its_own_key() -> None:
    whole = inputs(*[(2, 4, 5, 8)] * 3)
    key = torch.tensor([3, 0])
    shards = distributed([x.detach() for x in whole], [[Shard(0)]] * 3, line())
    mine = DTensor.from_local(key + dist.get_rank(), line(), [Replicate()], run_check=False)
    out = scaled_dot_product_attention(*shards, dropout_p=0.5, dropout_key=mine)
    for rank in range(2):
        part = [x[rank : rank + 1] for x in whole]
        close(
            out.full_tensor()[rank : rank + 1],
            scaled_dot_product_attention(*part, dropout_p=0.5, dropout_key=key + rank),
        )


@check
def dropout_without_a_key_says_what_to_give() -> None:
    shards = distributed(inputs(*[(2, 4, 5, 8)] * 3), [[Shard(0)]] * 3, line())
    with pytest.raises(RuntimeError, match="dropout_key must be given, a DTensor"):
        scaled_dot_product_attention(*shards, dropout_p=0.5)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        heads = [layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in self.inward]
        return self.outward(scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2))


@check
def tensor_parallel_module() -> None:
    whole, parallel = SelfAttention(), SelfAttention()
    parallel.load_state_dict(whole.state_dict())
    plan = {f"inward.{i}": ColwiseParallel(use_local_output=False) for i in range(3)}
    parallelize_module(parallel, line(), {**plan, "outward": RowwiseParallel()})
    x = torch.randn(2, 5, 16)
    expected, got = whole(x), parallel(x)
    close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    for g, e in zip(parallel.parameters(), whole.parameters(), strict=True):
        close(g.grad, e.grad)


# --- the ring -----------------------------------------------------------------------------------------------------


def ring_is_one_process(dtype: torch.dtype, causal: bool, layout: str, gqa: bool, keys: int = 8) -> None:
    whole = inputs((2, 4, 8, 16), (2, 2 if gqa else 4, keys, 16), (2, 2 if gqa else 4, keys, 5), dtype=dtype)
    parts = [shard_sequence(x.detach(), layout=layout).clone().requires_grad_() for x in whole]
    expected, expected_lse = scaled_dot_product_attention(*whole, is_causal=causal, enable_gqa=gqa, return_lse=True)
    out, lse = ring_attention(*parts, is_causal=causal, enable_gqa=gqa, layout=layout, return_lse=True)
    room = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 0.02}[dtype]

    def equal(got: Tensor, exact: Tensor, dim: int = -2) -> None:
        assert got.dtype == exact.dtype
        torch.testing.assert_close(
            gather_sequence(got, dim, layout=layout), exact.detach(), atol=room * 2, rtol=room * 2
        )

    equal(out, expected)
    equal(lse, expected_lse, -1)
    g, g_lse = torch.randn_like(expected), torch.randn_like(expected_lse)
    exact = torch.autograd.grad([expected, expected_lse], whole, [g, g_lse])
    mine = [shard_sequence(g, layout=layout), shard_sequence(g_lse, -1, layout=layout)]
    for got, e in zip(torch.autograd.grad([out, lse], parts, mine), exact, strict=True):
        equal(got, e)


@check
def ring() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        ring_is_one_process(dtype, False, "contiguous", False)


@check
def ring_causal() -> None:
    for layout in ("contiguous", "zigzag"):
        for gqa in (False, True):
            ring_is_one_process(torch.float64, True, layout, gqa)
        ring_is_one_process(torch.bfloat16, True, layout, True)


@check
def ring_of_more_keys_than_queries() -> None:
    for layout in ("contiguous", "zigzag"):
        ring_is_one_process(torch.float32, False, layout, False, keys=12)


@check
def ring_with_options() -> None:
    whole = inputs(*[(1, 2, 6, 4)] * 3)
    parts = [shard_sequence(x).transpose(2, 3).contiguous().transpose(2, 3) for x in whole]  # odd strides
    out = ring_attention(*parts, None, True, 0.3)
    close(gather_sequence(out), scaled_dot_product_attention(*whole, is_causal=True, scale=0.3))
    assert torch.equal(out, ring_attention(*parts, None, True, 0.3))
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    close(ring_attention(*whole, alone, True), scaled_dot_product_attention(*whole, is_causal=True))


@check
def ring_of_unused_results() -> None:
    """Of one process only the LSE is used."""
    whole = inputs(*[(1, 2, 6, 4)] * 3)
    parts = [shard_sequence(x.detach()).clone().requires_grad_() for x in whole]
    out, lse = ring_attention(*parts, return_lse=True)
    (lse if dist.get_rank() else out).sum().backward()
    exact, exact_lse = scaled_dot_product_attention(*whole, return_lse=True)
    (exact[:, :, :3].sum() + exact_lse[:, :, 3:].sum()).backward()
    for part, x in zip(parts, whole, strict=True):
        close(gather_sequence(part.grad), x.grad)


@check
def ring_under_autocast() -> None:
    query, key = inputs((1, 2, 4, 8), dtype=torch.float32)[0], inputs((1, 2, 4, 8), dtype=torch.bfloat16)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = ring_attention(query, key, key)
    grads = torch.autograd.grad(out.sum(), (query, key))
    assert out.dtype == torch.bfloat16 and [g.dtype for g in grads] == [query.dtype, key.dtype]


# --- here, in the test's own process ------------------------------------------------------------------------------


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # poisons fresh memory
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES, timeout=limit)
    register_sharding()
    register_sharding()
    failed: dict[str, str] = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function()
        except Exception:
            failed[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(failed))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in the processes, by the check's name."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, args=(str(folder),), nprocs=PROCESSES)
    found: dict[str, str] = {}
    for rank in range(PROCESSES):
        for name, text in json.loads((folder / f"{rank}.json").read_text()).items():
            found[name] = found.get(name, "") + f"process {rank}: {text}\n"
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, failures: dict[str, str]) -> None:
    if name in failures:
        pytest.fail(failures[name], pytrace=False)


@pytest.mark.parametrize(
    ("heads", "mesh", "sharded"),
    [
        (8, (4, 8), True),
        (12, (2, 4), False),
        (12, (2, 2), True),
        (3, (2,), False),
        (4, (1, 2, 2), True),
        (1, (2,), True),
    ],
)
def test_heads_of_grouped_queries_on_a_mesh(heads: int, mesh: tuple[int, ...], sharded: bool) -> None:
    """Of one head DTensor makes no shards, whatever the rule says."""
    assert _divides(heads, mesh) == sharded


X = torch.randn(1, 2, 4, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ring_attention(X[0], X, X), r"query must be \[batch, heads, positions, columns\], but got shape"),
        (lambda: ring_attention(X, None, X), "key must be a Tensor, but got NoneType"),
        (lambda: ring_attention(X, X, X, is_causal=1), "is_causal must be a bool"),
        (lambda: ring_attention(X, X, X, scale="1"), "scale must be a float"),
        (lambda: ring_attention(X, X, X, scale=10**400), "scale must be finite"),
        (lambda: ring_attention(X, X, X, enable_gqa="no"), "enable_gqa must be a bool, but got str"),
        (lambda: ring_attention(X, X, X, return_lse="no"), "return_lse must be a bool, but got str"),
        (
            lambda: ring_attention(X, X[:, :1], X),
            "key must have as many heads as query, 2, without enable_gqa, but got 1",
        ),
        (
            lambda: ring_attention(X, X[:, :, :3], X, None, True),
            "key must have as many positions as query, 4, with is_c",
        ),
        (
            lambda: ring_attention(*[X[:, :, :3]] * 3, None, True, layout="zigzag"),
            "query must have an even number of positions with layout 'zigzag', but got 3",
        ),
        (lambda: ring_attention(X, X, X, layout="ring"), "layout must be 'contiguous' or 'zigzag', but got 'ring'"),
        (lambda: ring_attention(X, X, X), "group must be a process group, but torch.distributed is not initialized"),
        (lambda: shard_sequence(X), "group must be a process group"),
        (lambda: gather_sequence(None), "x must be a Tensor, but got NoneType"),  # type: ignore[arg-type]
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("name", ["_ring", "_sharding"])
def test_examples_of_the_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"lect11ext.integrations.{name}"))
    assert result.attempted > 0 and result.failed == 0
