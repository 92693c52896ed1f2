"""The modules of autoencoders that are not of one function alone, and the lecture's systems trained with them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lect11ext import functional
from lect11ext import nn as fused
from tests.helpers import gradcheck, gradgradcheck

KEY = torch.tensor([5, 0])


def test_contractive_linear_is_a_linear() -> None:
    layer, plain = fused.ContractiveLinear(6, 4, activation="tanh"), nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6)
    code, penalty = layer(x)
    torch.testing.assert_close(code, plain(x).tanh())
    assert penalty.shape == (3,) and "activation='tanh'" in repr(layer)
    assert fused.ContractiveLinear(6, 4, bias=False, dtype=torch.float64).bias is None
    with pytest.raises(ValueError, match="activation must be one of"):
        fused.ContractiveLinear(6, 4, activation="gelu")


def test_sparse_activation() -> None:
    x, scale = torch.randn(5, 8), torch.rand(8)
    module = fused.SparseActivation("tanh")
    torch.testing.assert_close(module(x, scale), functional.sparse_activation(x, "tanh", scale=scale))
    module = fused.SparseActivation("sigmoid", penalty="kl", target=0.2)
    torch.testing.assert_close(module(x), functional.sparse_activation(x, "sigmoid", penalty="kl", target=0.2))
    assert "target=0.2" in repr(module)
    with pytest.raises(ValueError, match="target must lie between 0 and 1"):
        fused.SparseActivation("sigmoid", penalty="kl", target=1.0)


def test_conditional_latent() -> None:
    latent = fused.ConditionalGaussianLatent(6, 3, 2, free_bits=0.01)
    names = [n for n, _ in latent.named_parameters()]
    assert names == [f"{m}.{p}" for m in ("mean", "logvar", "prior_mean", "prior_logvar") for p in ("weight", "bias")]
    x, y = torch.randn(4, 6), torch.randn(4, 3)
    z, kl = latent(x, y, key=KEY)
    both = torch.cat([x, y], 1)
    expected = functional.gaussian_rsample_kl(
        latent.mean(both), latent.logvar(both), prior_mean=latent.prior_mean(y), prior_logvar=latent.prior_logvar(y),
        free_bits=0.01, key=KEY,
    )  # fmt: skip
    assert torch.equal(z, expected[0]) and torch.equal(kl, expected[1])
    drawn = latent.sample_prior(y, key=KEY)
    noise = functional.philox_normal((4, 2), KEY)
    torch.testing.assert_close(drawn, latent.prior_mean(y) + (latent.prior_logvar(y) / 2).exp() * noise)
    (kl.sum() + z.sum()).backward()
    assert all(p.grad is not None for p in latent.parameters())
    # Of equal posterior and prior the divergence is zero.
    with torch.no_grad():
        for posterior, prior in ((latent.mean, latent.prior_mean), (latent.logvar, latent.prior_logvar)):
            posterior.weight.zero_()[:, 6:] = prior.weight
            posterior.bias.copy_(prior.bias)
    latent.free_bits = 0.0
    torch.testing.assert_close(latent(x, y)[1], torch.zeros(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"num_samples": 3, "bias": False}, {"reduction": "batchmean"}], ids=str)
def test_a_conditional_latent_is_a_module_as_others(options: dict[str, Any]) -> None:
    make = lambda: fused.ConditionalGaussianLatent(6, 3, 2, dtype=torch.float64, **options)  # noqa: E731
    latent, other = make(), make()
    other.load_state_dict(copy.deepcopy(latent).state_dict())
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for call in (pickle.loads(pickle.dumps(other)), torch.compile(other, fullgraph=True, backend="aot_eager")):
        for a, b in zip(call(x, y, key=KEY), latent(x, y, key=KEY), strict=True):
            torch.testing.assert_close(a, b)
    samples = options.get("num_samples")
    assert latent.sample_prior(y, key=KEY).shape == ((samples, 4, 2) if samples else (4, 2))
    run = lambda x, y: latent(x, y, key=KEY)  # noqa: E731
    args = (x.requires_grad_(), y.requires_grad_())
    assert gradcheck(run, args, check_forward_ad=True) and gradgradcheck(run, args)


def test_errors_of_a_conditional_latent() -> None:
    latent, x, y = fused.ConditionalGaussianLatent(6, 3, 2), torch.zeros(4, 6), torch.zeros(4, 3)
    with pytest.raises(RuntimeError):  # torch.cat's
        latent(x, y[:2])
    with pytest.raises(TypeError, match="key must be an int64 tensor"):
        latent(x, y, key=KEY.int())
    with pytest.raises(ValueError, match="reduction must be"):
        fused.ConditionalGaussianLatent(6, 3, 2, reduction="mean")


def linear_stack() -> fused.StackedAutoencoder:
    widths = ((8, 5), (5, 3), (3, 2))
    return fused.StackedAutoencoder([nn.Linear(a, b) for a, b in widths], [nn.Linear(b, a) for a, b in widths])


def test_stacked() -> None:
    stack, x = linear_stack(), torch.randn(4, 8)
    one, two, three = stack.encoders
    assert len(stack) == 3
    torch.testing.assert_close(stack.encode(x, 2), two(one(x)))
    torch.testing.assert_close(stack.encode(x), three(two(one(x))))
    assert torch.equal(stack.encode(x, 0), x)
    torch.testing.assert_close(stack.decode(stack.encode(x)), stack(x))
    torch.testing.assert_close(stack.decode(two(one(x)), 2), stack.decoders[0](stack.decoders[1](two(one(x)))))
    loss = stack.stage_loss(x, 1)
    torch.testing.assert_close(loss, nn.functional.mse_loss(stack.decoders[1](two(one(x))), one(x)))
    loss.backward()
    own = {id(p) for p in stack.stage_parameters(1)}
    assert len(own) == 4
    for p in stack.parameters():
        assert (p.grad is not None) == (id(p) in own)


def test_stacked_denoising_stages() -> None:
    stack, x = linear_stack(), torch.randn(4, 8)
    corruption = fused.Corruption("masking", 1.0)
    below = stack.encoders[0](x)
    expected = nn.functional.l1_loss(stack.decoders[1](stack.encoders[1](torch.zeros_like(below))), below)
    torch.testing.assert_close(stack.stage_loss(x, 1, nn.functional.l1_loss, corruption), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, x: s.encode(x, 4), ValueError, "depth must lie between 0 and 3, but got 4"),
        (lambda s, x: s.decode(x, -1), ValueError, "depth must lie between 0 and 3, but got -1"),
        (lambda s, x: s.encode(x, 1.0), TypeError, "depth must be an int, but got float"),
        (lambda s, x: s.stage_loss(x, 3), ValueError, "stage must lie between 0 and 2, but got 3"),
        (lambda s, x: s.stage_loss(x, None), TypeError, "stage must be an int, but got NoneType"),
        (lambda s, x: fused.StackedAutoencoder(nn.Linear(1, 1), []), TypeError, "encoders must be a Sequence or"),
        (lambda s, x: fused.ContractiveLinear(8, 3, "tanh"), TypeError, "bias must be a bool, but got str"),
        (lambda s, x: fused.BinaryCode()(x.long()), TypeError, "logits must be of a floating-point type, but got"),
        (lambda s, x: s.stage_parameters(True), TypeError, "stage must be an int, but got bool"),
        (lambda s, x: fused.StackedAutoencoder([], []), ValueError, "at least one, but got 0 and 0"),
        (lambda s, x: fused.StackedAutoencoder([nn.Linear(1, 1)], []), ValueError, "must be as many"),
    ],
)
def test_errors_of_the_modules(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(linear_stack(), torch.zeros(2, 8))


# --- the lecture's systems do what they are for -------------------------------------------------------------------


def minimise(loss: Any, parameters: list[Tensor], steps: int, rate: float = 0.02) -> float:
    optimizer = torch.optim.Adam(parameters, rate)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    return value.item()


def test_a_linear_undercomplete_autoencoder_finds_the_principal_components() -> None:
    torch.manual_seed(0)
    x = (
        torch.randn(200, 6)
        @ torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.5, 0.3, 0.1]))
        @ torch.linalg.qr(torch.randn(6, 6))[0]
    )
    x = x - x.mean(0)
    encoder, decoder = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
    loss = lambda: functional.reconstruction_loss(decoder(encoder(x)), x, "squared_error", reduction="batchmean")  # noqa: E731
    reached = minimise(loss, [encoder.weight, decoder.weight], 800)
    _, singular, right = torch.linalg.svd(x, full_matrices=False)
    least = float(singular[2:].square().sum()) / 200
    assert least <= reached < 1.01 * least
    basis = torch.linalg.qr(decoder.weight.detach())[0]
    cosines = torch.linalg.svdvals(right[:2] @ basis)  # of the principal angles between the two planes
    assert (cosines > 0.999).all()


def test_a_denoising_autoencoder_points_back_to_the_manifold() -> None:
    """Data on a line: the learned field g(f(x)) − x leads towards it (Alain & Bengio 2013)."""
    torch.manual_seed(0)
    line = torch.tensor([0.8, 0.6])
    x = torch.randn(512, 1) * line
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    corruption = fused.Corruption("gaussian", 0.3)

    def loss() -> Tensor:
        return functional.reconstruction_loss(model(corruption(x)), x, "squared_error", reduction="batchmean")

    minimise(loss, list(model.parameters()), 600)
    normal = torch.tensor([-0.6, 0.8])
    points = torch.randn(100, 1) * line
    for side in (-0.4, 0.4):
        away = points + side * normal
        field = (model(away) - away).detach() @ normal
        assert (field * side < 0).float().mean() > 0.95
        assert (field / -side).mean() > 0.5


def test_the_contractive_penalty_flattens_an_encoder() -> None:
    torch.manual_seed(0)
    x = torch.rand(200, 12)
    sizes = []
    for weight in (0.0, 0.3):
        torch.manual_seed(1)
        encoder, decoder = fused.ContractiveLinear(12, 20), nn.Linear(20, 12)

        def loss(encoder: Any = encoder, decoder: Any = decoder, weight: float = weight) -> Tensor:
            code, penalty = encoder(x)
            error = functional.reconstruction_loss(decoder(code), x, "squared_error")
            return (error + weight * penalty).mean()

        minimise(loss, [*encoder.parameters(), *decoder.parameters()], 200)
        sizes.append(float(encoder(x)[1].mean()))
    assert sizes[1] < 0.5 * sizes[0]


def test_kl_sparsity_reaches_its_target() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 10)
    layer, activation = nn.Linear(10, 16), fused.SparseActivation("sigmoid", penalty="kl", target=0.1)
    minimise(lambda: activation(layer(x))[1], list(layer.parameters()), 300)
    torch.testing.assert_close(activation(layer(x))[0].mean(0), torch.full((16,), 0.1), rtol=0, atol=0.01)


def test_noise_saturates_a_binary_code() -> None:
    """Semantic hashing: noise before the sigmoid drives codes to 0 and 1 (Salakhutdinov & Hinton 2009)."""
    torch.manual_seed(0)
    x = (torch.rand(8, 20) < 0.5).float().repeat(32, 1)
    grey = []
    for noise in (0.0, 3.0):
        torch.manual_seed(1)
        encoder, code, decoder = nn.Linear(20, 6), fused.BinaryCode(noise), nn.Linear(6, 20)

        def loss(encoder: Any = encoder, code: Any = code, decoder: Any = decoder) -> Tensor:
            return functional.reconstruction_loss(decoder(code(encoder(x))), x, reduction="batchmean")

        minimise(loss, [*encoder.parameters(), *decoder.parameters()], 400)
        h = encoder(x).sigmoid()
        grey.append(float(torch.minimum(h, 1 - h).mean()))
    assert grey[1] < 0.5 * grey[0] and grey[1] < 0.05
