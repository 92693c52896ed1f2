"""corrupt under transforms and compilers; its module; its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from lect11ext import functional, nn, reference
from tests.helpers import HERE, Tagged, Watch, default_generator, seeded

KEY = torch.tensor([11, 0])
corrupt = functional.corrupt
KINDS = [("gaussian", 0.7), ("masking", 0.3), ("salt_and_pepper", 0.4)]
every_kind = pytest.mark.parametrize(("kind", "amount"), KINDS, ids=lambda v: str(v))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vmap_randomness(kind: str, amount: float, dtype: torch.dtype) -> None:
    x = torch.full((5, 3, 7), 0.5, dtype=dtype)

    def draw(x: Tensor) -> Tensor:
        return corrupt(x, kind, amount)

    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(draw)(x)
    same = vmap(draw, randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))
    alone = vmap(lambda _: draw(x[0]), randomness="different")(torch.zeros(2))
    assert not torch.equal(alone[0], alone[1])
    torch.manual_seed(5)
    key = functional.philox_key(x, 1)
    torch.manual_seed(5)
    different = vmap(draw, randomness="different")(x)
    words = 2 if kind == "gaussian" and dtype == torch.float64 else 1
    blocks = (words * 3 * 7 + 3) // 4
    for i in range(5):
        assert torch.equal(different[i], corrupt(x[i], kind, amount, key=key + torch.tensor([0, i * blocks])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_share_no_noise(dtype: torch.dtype) -> None:
    noise = vmap(lambda x: corrupt(x, "gaussian", 1.0), randomness="different")(torch.zeros(5, 2, 9, dtype=dtype))
    assert noise.unique().numel() == noise.numel()


@every_kind
def test_vmap_with_a_key_and_a_mask(kind: str, amount: float) -> None:
    x, keys = torch.randn(3, 4, 5), torch.stack([KEY + i for i in range(4)])
    in_dims = (1, 0)
    output, mask = vmap(lambda x, k: corrupt(x, kind, amount, key=k, return_mask=True), in_dims)(x, keys)
    only = vmap(lambda x, k: corrupt(x, kind, amount, key=k), in_dims)(x, keys)
    for i in range(4):
        one = corrupt(x[:, i], kind, amount, key=keys[i], return_mask=True)
        assert torch.equal(output[i], one[0]) and torch.equal(mask[i], one[1]) and torch.equal(only[i], one[0])
    assert vmap(lambda x: corrupt(x, kind, amount, key=KEY))(x[:0]).shape == (0, 4, 5)


@every_kind
def test_gradients_by_sample(kind: str, amount: float) -> None:
    x = torch.randn(4, 9)

    def loss(x: Tensor, key: Tensor) -> Tensor:
        return corrupt(x, kind, amount, key=key).pow(2).sum()

    keys = torch.stack([KEY + i for i in range(4)])
    per_sample = vmap(grad(loss))(x, keys)
    for i in range(4):
        assert torch.equal(per_sample[i], grad(loss)(x[i], keys[i]))
    # Draws without a key, where a derivative stands inside vmap.
    drawn = vmap(grad(lambda x: corrupt(x, kind, amount).pow(2).sum()), randomness="different")(torch.ones(3, 40))
    assert not torch.equal(drawn[0], drawn[1])


@every_kind
def test_derivatives_of_every_mode(kind: str, amount: float) -> None:
    x, tangent = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)

    def loss(module: Any) -> Any:
        return lambda x: module.corrupt(x, kind, amount, key=KEY).pow(3).sum()

    ours, theirs = loss(functional), loss(reference)
    torch.testing.assert_close(grad(ours)(x), grad(theirs)(x))
    expected = hessian(theirs)(x)
    for composed in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f))):
        torch.testing.assert_close(composed(ours)(x), expected)
    for a, b in zip(jvp(ours, (x,), (tangent,)), jvp(theirs, (x,), (tangent,)), strict=True):
        torch.testing.assert_close(a, b)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(ours(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), leaf, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), leaf)
    leaf_2 = x.clone().requires_grad_()
    (first_2,) = torch.autograd.grad(theirs(leaf_2), leaf_2, create_graph=True)
    (second_2,) = torch.autograd.grad(first_2.pow(2).sum(), leaf_2, create_graph=True)
    torch.testing.assert_close(third, torch.autograd.grad(second_2.sum(), leaf_2)[0])


@every_kind
def test_a_tangent_is_its_own_memory(kind: str, amount: float) -> None:
    """Changing the output in place must not change the input's tangent."""
    x, tangent = torch.randn(6), torch.ones(6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        corrupt(dual, kind, amount, key=KEY).mul_(5)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, torch.ones(6))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@every_kind
def test_compile_without_a_break(backend: str, kind: str, amount: float) -> None:
    torch._dynamo.reset()

    def both(x: Tensor, key: Tensor) -> Any:
        return *corrupt(x, kind, amount, key=key, return_mask=True), corrupt(x, kind, amount, key=key + 1)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 8):
        x = torch.randn(rows, 6, requires_grad=True)
        results = [compiled(x, KEY), both(x, KEY)]
        grads = [torch.autograd.grad([r[0], r[2]], x, [torch.ones_like(x)] * 2) for r in results]
        for a, b in zip([*results[0], *grads[0]], [*results[1], *grads[1]], strict=True):
            assert torch.equal(a, b)


@every_kind
def test_compile_with_the_default_generator(kind: str, amount: float) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 60)

    def draw(x: Tensor) -> tuple[Tensor, Tensor]:
        return corrupt(x, kind, amount), corrupt(x, kind, amount)

    compiled = torch.compile(draw, fullgraph=True)
    compiled(x)
    torch.manual_seed(1)
    first = compiled(x)
    torch.manual_seed(1)
    eager = draw(x)
    assert torch.equal(first[0], eager[0]) and torch.equal(first[1], eager[1])
    assert not torch.equal(*first)


@every_kind
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_compiled_vmap_draws_as_the_eager_one(kind: str, amount: float, randomness: str) -> None:
    def draw(x: Tensor) -> Tensor:
        return vmap(lambda y: corrupt(y, kind, amount), randomness=randomness)(x)

    torch.manual_seed(0)
    eager = draw(torch.ones(3, 4))
    torch.manual_seed(0)
    assert torch.equal(torch.compile(draw, fullgraph=True, backend="aot_eager")(torch.ones(3, 4)), eager)


@every_kind
def test_opcheck(kind: str, amount: float) -> None:
    ops = torch.ops.lect11ext
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
        for inputs in (x, x.detach(), x.t()):
            for return_mask in (False, True):
                torch.library.opcheck(ops.corrupt.default, (inputs, KEY, kind, amount, 0.0, 1.0, return_mask))
            torch.library.opcheck(ops.corrupt_backward.default, (inputs, KEY, kind, amount))


@every_kind
def test_export(kind: str, amount: float) -> None:
    corruption = nn.Corruption(kind, amount)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(
        corruption, (torch.randn(4, 6),), {"key": KEY}, dynamic_shapes={"input": {0: batch}, "key": None}
    )
    x = torch.randn(9, 6)
    assert torch.equal(exported.module()(x, key=KEY), corruption(x, key=KEY))


@every_kind
def test_types_devices_and_autocast(kind: str, amount: float, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, dtype=dtype)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert corrupt(x, kind, amount).dtype == dtype
    output, mask = corrupt(x.to("meta"), kind, amount, key=KEY.to("meta"), return_mask=True)
    assert output.is_meta and output.dtype == dtype and output.shape == (2, 3) and mask.dtype == torch.bool


@every_kind
def test_subclasses_and_function_modes_see_the_call(kind: str, amount: float) -> None:
    x = torch.randn(3, 5)
    tagged = x.as_subclass(Tagged)
    assert type(corrupt(tagged, kind, amount)) is Tagged
    assert all(type(t) is Tagged for t in corrupt(tagged, kind, amount, key=KEY, return_mask=True))
    assert torch.equal(corrupt(tagged, kind, amount, key=KEY), corrupt(x, kind, amount, key=KEY))
    with Watch() as watch:
        corrupt(x, kind, amount)
    assert "lect11ext.corrupt" in watch.seen


@every_kind
def test_module(kind: str, amount: float) -> None:
    corruption = nn.Corruption(kind, amount, low=-1.0, high=2.0)
    x = torch.randn(4, 60, requires_grad=True)
    output, mask = corruption(x, key=KEY, return_mask=True)
    expected = corrupt(x, kind, amount, low=-1.0, high=2.0, key=KEY, return_mask=True)
    assert torch.equal(output, expected[0]) and torch.equal(mask, expected[1])
    torch.manual_seed(3)
    first = corruption(x)
    assert torch.equal(corruption(x, generator=seeded(3)), first)
    assert torch.equal(functional_call(corruption, {}, (x,), {"key": KEY}), output)
    assert not list(corruption.state_dict())
    before = default_generator().get_state()
    corruption.eval()
    assert corruption(x) is x
    same, nothing = corruption(x, return_mask=True)
    assert same is x and nothing.dtype == torch.bool and not nothing.any()
    assert torch.equal(default_generator().get_state(), before)
    ends = ", low=-1.0, high=2.0" if kind == "salt_and_pepper" else ""
    assert repr(corruption) == f"Corruption({kind!r}, amount={amount}{ends})"


def test_a_module_is_made_without_drawing() -> None:
    before = default_generator().get_state()
    with torch.device("meta"):
        nn.Corruption("masking", 0.5)
    assert torch.equal(default_generator().get_state(), before)
    for options, error, message in [
        ({"kind": "pepper", "amount": 0.1}, ValueError, "kind must be one of"),
        ({"kind": "masking", "amount": 1.1}, ValueError, "amount must be between 0 and 1"),
        ({"kind": "gaussian", "amount": "much"}, TypeError, "amount must be a float or an int, but got str"),
        ({"kind": "salt_and_pepper", "amount": 0.1, "low": None}, TypeError, "low must be a float or an int"),
    ]:
        with pytest.raises(error, match=message):
            nn.Corruption(**options)


NAN, INF = float("nan"), float("inf")
M = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], "masking", 0.1), {}, TypeError, "input must be a Tensor, but got list"),
        ((M.long(), "masking", 0.1), {}, TypeError, "input must be float32, float64, bfloat16 or float16, but got Lo"),
        ((M.bool(), "gaussian", 0.1), {}, TypeError, "input must be float32"),
        ((M.cfloat(), "gaussian", 0.1), {}, TypeError, "input must be float32"),
        (
            (M, "dropout", 0.1),
            {},
            ValueError,
            "kind must be one of 'gaussian', 'masking', 'salt_and_pepper', but got '",
        ),
        ((M, None, 0.1), {}, TypeError, "kind must be a str, but got NoneType"),
        ((M, "gaussian", -0.1), {}, ValueError, r"amount must be nonnegative and finite .*, but got -0.1"),
        ((M, "gaussian", INF), {}, ValueError, "amount must be nonnegative and finite .*, but got inf"),
        ((M, "gaussian", NAN), {}, ValueError, "amount must be nonnegative and finite .*, but got nan"),
        ((M, "masking", 1.0000001), {}, ValueError, r"amount must be between 0 and 1 \(a probability\), but got 1"),
        ((M, "masking", -1e-9), {}, ValueError, "amount must be between 0 and 1 .*, but got -1e-09"),
        ((M, "masking", NAN), {}, ValueError, "amount must be between 0 and 1 .*, but got nan"),
        ((M, "salt_and_pepper", INF), {}, ValueError, "amount must be between 0 and 1 .*, but got inf"),
        ((M, "salt_and_pepper", "0.1"), {}, TypeError, "amount must be a float or an int, but got str"),
        ((M, "salt_and_pepper", 0.1), {"low": None}, TypeError, "low must be a float or an int, but got NoneType"),
        ((M, "salt_and_pepper", 0.1), {"high": "1"}, TypeError, "high must be a float or an int, but got str"),
        ((M, "masking", 0.1), {"return_mask": None}, TypeError, "return_mask must be a bool, but got NoneType"),
        ((M, "masking", 0.1), {"return_mask": 1}, TypeError, "return_mask must be a bool, but got int"),
        ((M, "masking", 0.1), {"generator": 3}, TypeError, "generator must be a Generator or None, but got int"),
        ((M, "masking", 0.1), {"key": [1, 2]}, TypeError, "key must be a Tensor or None, but got list"),
        (
            (M, "masking", 0.1),
            {"key": KEY.int()},
            TypeError,
            r"key must be an int64 tensor \[seed, offset\], but got I",
        ),
        ((M, "masking", 0.1), {"key": torch.tensor([1, 2, 3])}, ValueError, r"key must have shape \[2\]"),
        ((M, "masking", 0.1), {"key": KEY.to("meta")}, RuntimeError, f"Expected key to be on {HERE}"),
    ],
)
def test_errors_name_the_argument_and_draw_nothing(
    arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    before = default_generator().get_state()
    with pytest.raises(error, match=message):
        corrupt(*arguments, **options)
    assert torch.equal(default_generator().get_state(), before)


def test_errors_of_the_backward_name_its_argument() -> None:
    backward = torch.ops.lect11ext.corrupt_backward
    with pytest.raises(TypeError, match="grad must be float32, float64, bfloat16 or float16, but got Long"):
        backward(M.long(), KEY, "masking", 0.1)
    with pytest.raises(ValueError, match="amount must be between 0 and 1"):
        backward(M, KEY, "masking", 2.0)
    with pytest.raises(ValueError, match="kind must be one of"):
        backward(M.to("meta"), KEY.to("meta"), "mask", 0.5)
