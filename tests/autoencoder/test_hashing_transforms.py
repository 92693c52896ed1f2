"""Semantic hashing under transforms and compilers; its modules; its errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from lect11ext import functional, nn, reference
from tests.helpers import Tagged, seeded

KEY = torch.tensor([11, 0])
NAN = float("nan")
binarize, pack_bits, unpack_bits = functional.binarize, functional.pack_bits, functional.unpack_bits


def random_codes(*size: int) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bits are counted as on processors of AVX-512 without VPOPCNTDQ."""
    monkeypatch.setenv("LECT11EXT_HASHING_VPOPCNT", "0")
    yield


def test_without_the_instruction_for_counting(table: None, capability: str) -> None:
    for size in (0, 1, 3, 4, 7, 8, 16, 20, 24, 32, 48, 63, 64, 65, 127, 128, 1024, 4100):
        query, codes = random_codes(3, size), random_codes(300, size)
        if size:
            codes[7] = ~query[0]  # all bits differ
            codes[70] = query[1]
        expected = reference.hamming_distance(query, codes)
        assert torch.equal(functional.hamming_distance(query, codes), expected)
        for got, want in zip(
            [*functional.hamming_topk(query, codes, 20), *functional.hamming_radius(query, codes, 4 * size)],
            [*reference.hamming_topk(query, codes, 20), *reference.hamming_radius(query, codes, 4 * size)],
            strict=True,
        ):
            assert torch.equal(got, want)


# --- transforms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_of_codes(dim: int) -> None:
    x = torch.randn(3, 4, 17)
    for function in (binarize, pack_bits, lambda t: unpack_bits(pack_bits(t), 3)):
        samples = [function(t) for t in x.unbind(dim)]
        assert torch.equal(vmap(function, dim)(x), torch.stack(samples))
    assert torch.equal(vmap(vmap(pack_bits))(x), pack_bits(x))
    assert torch.equal(vmap(binarize)(x[0, 0]), binarize(x[0, 0]))
    with pytest.raises(ValueError, match="at least one dimension"):
        vmap(pack_bits)(x[0, 0])


def test_vmap_of_distances() -> None:
    a, b = random_codes(3, 2, 5, 8), random_codes(3, 7, 8)
    got = vmap(functional.hamming_distance)(a, b)
    assert torch.equal(got, torch.stack([functional.hamming_distance(x, y) for x, y in zip(a, b, strict=True)]))
    assert torch.equal(vmap(functional.hamming_distance, (1, None))(a[0], b), functional.hamming_distance(
        a[0].movedim(1, 0)[:, None], b
    ))  # fmt: skip
    assert torch.equal(vmap(functional.hamming_distance, (None, 0), 2)(a[0], b), torch.stack(
        [functional.hamming_distance(a[0], y) for y in b], 2
    ))  # fmt: skip
    assert vmap(functional.hamming_distance)(a[:0], b[:0]).shape == (0, 2, 5, 7)


def test_vmap_of_topk() -> None:
    a, b = random_codes(3, 5, 8), random_codes(3, 70, 8)
    distances, indices = vmap(lambda x, y: functional.hamming_topk(x, y, 6))(a, b)
    for i in range(3):
        one = functional.hamming_topk(a[i], b[i], 6)
        assert torch.equal(distances[i], one[0]) and torch.equal(indices[i], one[1])


def test_derivatives_under_transforms() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)

    def loss(t: Tensor) -> Tensor:
        return (binarize(t) + t).pow(3).sum()

    y = binarize(x) + x
    torch.testing.assert_close(grad(loss)(x), 6 * y.square())
    torch.testing.assert_close(vmap(grad(loss))(x), 6 * y.square())
    assert torch.equal(jacfwd(binarize)(x[0]), torch.eye(3, dtype=x.dtype))
    assert torch.equal(jacrev(binarize)(x[0]), torch.eye(3, dtype=x.dtype))
    torch.testing.assert_close(hessian(loss)(x[0]), torch.diag(24 * y[0]))


def test_integers_never_require_gradients() -> None:
    x = torch.randn(5, 16, requires_grad=True)
    codes = pack_bits(x)
    assert not codes.requires_grad and not unpack_bits(codes).requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_break(backend: str) -> None:
    torch._dynamo.reset()

    def everything(x: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        query = pack_bits(x, 0.1)
        found = functional.hamming_topk(query, codes, 3)
        distance = functional.hamming_distance(query, codes)
        return binarize(x, 0.1) * 2, unpack_bits(query, x.size(-1)), distance + 1, *found

    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 8):
        x, codes = torch.randn(rows, 20, requires_grad=True), random_codes(10 * rows, 3)
        ours, eager = compiled(x, codes), everything(x, codes)
        for got, want in zip(ours, eager, strict=True):
            assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad(out[0].sum(), x)[0] for out in (ours, eager)))


def test_compiled_radius_search() -> None:
    torch._dynamo.reset()

    def count(query: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        offsets, distances, indices = functional.hamming_radius(query, codes, 9)
        return offsets, distances.sum() + indices.sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(count, fullgraph=True, backend="aot_eager")
        for rows in (3, 5):
            query, codes = random_codes(rows, 3), random_codes(100, 3)
            for got, want in zip(compiled(query, codes), count(query, codes), strict=True):
                assert torch.equal(got, want)


def test_opcheck() -> None:
    ops = torch.ops.lect11ext
    x, query, codes = torch.randn(5, 19, requires_grad=True), random_codes(4, 9), random_codes(30, 9)
    torch.library.opcheck(ops.binarize.default, (x, 0.5))
    torch.library.opcheck(ops.binarize.default, (x.detach().t(), 0.5))
    for values in (x, x.detach() > 0, torch.arange(20)):
        torch.library.opcheck(ops.pack_bits.default, (values, 0.5))
    torch.library.opcheck(ops.unpack_bits.default, (codes, 70, torch.float16))
    torch.library.opcheck(ops.unpack_bits.default, (codes, None, torch.bool))
    torch.library.opcheck(ops.hamming_distance.default, (query, codes))
    torch.library.opcheck(ops.hamming_distance.default, (query[:, None], codes))
    torch.library.opcheck(ops.hamming_topk.default, (query, codes, 7))
    torch.library.opcheck(ops.hamming_radius.default, (query, codes, 30))


def test_meta_and_autocast() -> None:
    x, codes = torch.zeros(3, 20, device="meta"), torch.zeros(7, 3, dtype=torch.uint8, device="meta")
    assert binarize(x).shape == (3, 20) and pack_bits(x).shape == (3, 3)
    assert unpack_bits(codes, 17).shape == (7, 17)
    assert functional.hamming_distance(pack_bits(x), codes).shape == (3, 7)
    assert functional.hamming_topk(codes, codes, 4)[1].shape == (7, 4)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert binarize(torch.randn(3)).dtype == torch.float32


def test_export() -> None:
    class Search(torch.nn.Module):
        def forward(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
            return functional.hamming_topk(pack_bits(x), codes, 2)

    rows, count = torch.export.Dim("rows", min=2), torch.export.Dim("count", min=2)
    args = (torch.randn(4, 16), random_codes(9, 2))
    exported = torch.export.export(Search(), args, dynamic_shapes={"x": {0: rows}, "codes": {0: count}})
    x, codes = torch.randn(6, 16), random_codes(40, 2)
    for got, want in zip(exported.module()(x, codes), Search()(x, codes), strict=True):
        assert torch.equal(got, want)


def test_subclasses_come_out() -> None:
    assert type(binarize(torch.zeros(3).as_subclass(Tagged))) is Tagged
    assert type(pack_bits(torch.zeros(3).as_subclass(Tagged))) is Tagged


# --- modules ------------------------------------------------------------------------------------------------------


def test_binary_code(dtype: torch.dtype) -> None:
    logits = torch.randn(50, 12).to(dtype)
    logits[0, :3] = torch.tensor([0.0, 1e-7, NAN])
    exact = torch.where(logits.isnan(), logits, (logits > 0).to(dtype))
    code = nn.BinaryCode(noise=2.0)
    assert torch.equal(code.eval()(logits).nan_to_num(7), exact.nan_to_num(7))
    noise = functional.philox_normal(logits.shape, KEY, dtype=dtype)
    assert torch.equal(code.train()(logits, key=KEY).nan_to_num(7), (logits + 2 * noise).sigmoid().nan_to_num(7))
    drawn = code(logits, generator=seeded(3))
    torch.manual_seed(3)
    assert torch.equal(code(logits).nan_to_num(7), drawn.nan_to_num(7))
    assert torch.equal(nn.BinaryCode()(logits).nan_to_num(7), logits.sigmoid().nan_to_num(7))
    hard = nn.BinaryCode(straight_through=True)(logits)
    assert torch.equal(hard.nan_to_num(7), exact.nan_to_num(7))
    assert "noise=2.0" in repr(code)
    with pytest.raises(ValueError, match="noise must be nonnegative, but got -1"):
        nn.BinaryCode(noise=-1.0)
    for noise, error, message in (
        (None, TypeError, "noise must be a float or an int, but got NoneType"),
        (float("inf"), ValueError, "noise must be finite, but got inf"),
        (NAN, ValueError, "noise must be finite, but got nan"),
        (10**400, ValueError, "noise must be finite"),
    ):
        with pytest.raises(error, match=message):
            nn.BinaryCode(noise)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="straight_through must be a bool, but got int"):
        nn.BinaryCode(1.0, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="logits must be a Tensor, but got list"):
        nn.BinaryCode()([1.0])


def test_code_compiles_with_noise() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(nn.BinaryCode(noise=1.0), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (4, 7):
        logits = torch.randn(rows, 6)
        torch.manual_seed(3)
        got = compiled(logits)
        torch.manual_seed(3)
        torch.testing.assert_close(got, nn.BinaryCode(noise=1.0)(logits))


@pytest.mark.parametrize("train", [False, True])
def test_the_codes_slope_is_the_sigmoids(train: bool) -> None:
    logits = torch.randn(50, 12, requires_grad=True)
    weight = torch.randn(50, 12)
    code = nn.BinaryCode(straight_through=True).train(train)
    (got,) = torch.autograd.grad(code(logits), logits, weight)
    (expected,) = torch.autograd.grad(logits.sigmoid(), logits, weight)
    assert torch.equal(got, expected)
    _, tangent = torch.func.jvp(code, (logits.detach(),), (weight,))
    torch.testing.assert_close(tangent, expected)


def test_noise_saturates_the_code() -> None:
    """An autoencoder of random patterns: with noise its code is less changed by rounding."""

    def unrounded(noise: float) -> float:
        torch.manual_seed(0)
        patterns = torch.randn(32, 16)
        model = torch.nn.Sequential(torch.nn.Linear(16, 8), nn.BinaryCode(noise), torch.nn.Linear(8, 16))
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(300):
            optimizer.zero_grad()
            (model(patterns) - patterns).square().mean().backward()
            optimizer.step()
        logits = model[0](patterns)
        return (logits.sigmoid() - model.eval()[1](logits)).abs().mean().item()

    assert unrounded(2.0) < 0.5 * unrounded(0.0)


@pytest.mark.parametrize("bits", [9, 16])
def test_what_stands_behind_the_last_bit_does_not_count(bits: int) -> None:
    index, full = nn.HammingIndex(bits), torch.full((1, 2), 255, dtype=torch.uint8)
    index.add(full)
    for query, expected in ((torch.zeros(1, 2, dtype=torch.uint8), bits), (full, 0), (torch.ones(1, bits), 0)):
        assert index.search(query, 1)[0].item() == expected
        assert index.within(query, bits)[1].item() == expected


def test_index() -> None:
    index = nn.HammingIndex(20)
    values = torch.rand(30, 20)
    assert len(index) == 0
    index.add(values[:10])
    index.add(values[10:] > 0.5)
    index.add(pack_bits(values[:1]))
    assert len(index) == 31 and torch.equal(index.codes[:30], pack_bits(values))
    codes = pack_bits(values)
    for query in (values[:3], values[:3] > 0.5, codes[:3]):
        distances, indices = index.search(query, 5)
        assert torch.equal(distances, reference.hamming_topk(codes[:3], index.codes, 5)[0])
        assert indices[0, :2].tolist() == [0, 30]
        for got, want in zip(index.within(query, 8), reference.hamming_radius(codes[:3], index.codes, 8), strict=True):
            assert torch.equal(got, want)
    assert "num_bits=20, codes=31" in repr(index)
    assert index.half().codes.dtype == torch.uint8


def test_index_in_a_checkpoint() -> None:
    index = nn.HammingIndex(20)
    index.add(torch.rand(30, 20))
    model, empty = torch.nn.ModuleDict({"index": index}), torch.nn.ModuleDict({"index": nn.HammingIndex(20)})
    for assign in (False, True):
        empty.load_state_dict(model.state_dict(), assign=assign)
        assert len(empty["index"]) == 30 and torch.equal(empty["index"].codes, index.codes)
    empty["index"].load_state_dict(nn.HammingIndex(20).state_dict())
    assert len(empty["index"]) == 0
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        index.load_state_dict(nn.HammingIndex(50).state_dict())
    with pytest.raises(RuntimeError, match=r"codes must be uint8, but the checkpoint has torch.int64"):
        index.load_state_dict({"codes": torch.zeros(4, 3, dtype=torch.int64)})
    with pytest.raises(RuntimeError, match="size mismatch for codes"):
        index.load_state_dict({"codes": torch.zeros(4, 3, dtype=torch.uint8, device="meta")})
    for assign in (False, True):
        with pytest.raises(RuntimeError, match="codes must be strided, but the checkpoint has"):
            index.load_state_dict({"codes": torch.zeros(4, 3, dtype=torch.uint8).to_sparse()}, assign=assign)
    before = index.codes
    index.load_state_dict({}, strict=False)
    assert len(index) == 30 and index.codes is before
    index = nn.HammingIndex(20, device="meta")
    index.load_state_dict(model["index"].state_dict(), assign=True)
    assert torch.equal(index.codes, model["index"].codes)


@pytest.mark.parametrize("assign", [False, True])
def test_bits_behind_the_last_do_not_count_in_a_checkpoint(assign: bool) -> None:
    index, codes = nn.HammingIndex(3), torch.tensor([[0b01011111], [0]], dtype=torch.uint8)
    index.load_state_dict({"codes": codes}, assign=assign)
    assert index.search(torch.tensor([[0.0, 1.0, 0.0]]), 2)[0].tolist() == [[0, 1]]
    assert codes[0] == 0b01011111


# --- errors -------------------------------------------------------------------------------------------------------

X = torch.zeros(3, 4)
C = torch.zeros(3, 4, dtype=torch.uint8)
ERRORS: list[Any] = [
    ("binarize", (X.long(),), TypeError, "input must be float32, float64, bfloat16 or float16, but got Long"),
    ("binarize", (X, NAN), ValueError, "threshold must be a number, but got nan"),
    ("binarize", ([1.0],), TypeError, "input must be a Tensor, but got list"),
    ("binarize", (X, "a"), TypeError, "threshold must be a float or an int, but got str"),
    ("pack_bits", (X.cfloat(),), TypeError, "input must be float32, .* but got ComplexFloat"),
    ("pack_bits", (X[0, 0],), ValueError, "input must have at least one dimension"),
    ("pack_bits", (X, NAN), ValueError, "threshold must be a number, but got nan"),
    ("pack_bits", (None,), TypeError, "input must be a Tensor, but got NoneType"),
    ("unpack_bits", (X,), TypeError, "codes must be uint8, packed bits, but got Float"),
    ("unpack_bits", (C[0, 0],), ValueError, "codes must have at least one dimension"),
    ("unpack_bits", (C, 33), ValueError, "num_bits must be from 0 to 32, the bits of a code, but got 33"),
    ("unpack_bits", (C, -1), ValueError, "num_bits must be from 0 to 32"),
    ("unpack_bits", (C, 2.5), TypeError, "num_bits must be an int or None, but got float"),
    ("unpack_bits", (C, 2**70), ValueError, "num_bits must fit in 64 bits, but got one of 72"),
    ("unpack_bits", (C, None, torch.cfloat), TypeError, "dtype must be float32, .* but got ComplexFloat"),
    ("unpack_bits", (C, None, "float"), TypeError, "dtype must be a torch.dtype, but got str"),
    ("hamming_distance", (X, C), TypeError, "a must be uint8, packed bits, but got Float"),
    ("hamming_distance", (C, C.int()), TypeError, "b must be uint8, packed bits, but got Int"),
    ("hamming_distance", (C[0], C), ValueError, r"a must have at least two dimensions, .* but got shape \[4\]"),
    ("hamming_distance", (C, C[:, :2]), ValueError, "b must have as many bytes a code as a, 4, but got 2"),
    ("hamming_distance", (C.expand(2, 3, 4), C.expand(3, 3, 4)), ValueError, "the batches of a and b must broadcast"),
    ("hamming_distance", (C, C.to("meta")), RuntimeError, "Expected all tensors to be on the same device"),
    ("hamming_distance", (C.new_zeros(1, 8192),) * 2, ValueError, "a must have at most 8191 bytes a code"),
    ("hamming_topk", (C[0], C, 1), ValueError, r"query must have two dimensions, .* but got shape \[4\]"),
    ("hamming_topk", (C, C[None], 1), ValueError, "codes must have two dimensions"),
    ("hamming_topk", (C, C[:, :2], 1), ValueError, "codes must have as many bytes a code as query, 4, but got 2"),
    ("hamming_topk", (X, C, 1), TypeError, "query must be uint8"),
    ("hamming_topk", (C, X, 1), TypeError, "codes must be uint8"),
    ("hamming_topk", (C, C, 4), ValueError, "k must be from 0 to the number of codes, 3, but got 4"),
    ("hamming_topk", (C, C, -1), ValueError, "k must be from 0 to the number of codes, 3, but got -1"),
    ("hamming_topk", (C, C, 1.5), TypeError, "k must be an int, but got float"),
    ("hamming_radius", (C, C, -1), ValueError, "radius must be nonnegative, but got -1"),
    ("hamming_radius", (C, C[0], 1), ValueError, "codes must have two dimensions"),
    ("hamming_radius", (C, C, None), TypeError, "radius must be an int, but got NoneType"),
    ("hamming_radius", ("a", C, 1), TypeError, "query must be a Tensor, but got str"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "error", "message"), ERRORS)
def test_errors_name_the_argument(name: str, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(functional, name)(*arguments)


def test_errors_of_the_index() -> None:
    index = nn.HammingIndex(20)
    with pytest.raises(ValueError, match=r"codes must have shape \[n, 20\] \(one value a bit\), but got \[2, 19\]"):
        index.add(torch.zeros(2, 19))
    with pytest.raises(ValueError, match=r"query must have shape \[n, 3\] \(packed codes\), but got \[3\]"):
        index.search(torch.zeros(3, dtype=torch.uint8), 1)
    with pytest.raises(ValueError, match="num_bits must be from 1 to 65528, but got 0"):
        nn.HammingIndex(0)
    with pytest.raises(ValueError, match="num_bits must be from 1 to 65528, but got 65529"):
        nn.HammingIndex(65529)
    for bits in (True, 1.5, None):
        with pytest.raises(TypeError, match="num_bits must be an int, but got"):
            nn.HammingIndex(bits)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="codes must be a Tensor, but got list"):
        index.add([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="query must be a Tensor, but got NoneType"):
        index.within(None, 1)  # type: ignore[arg-type]
