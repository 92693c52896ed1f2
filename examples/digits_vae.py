"""A variational autoencoder of handwritten digits: 8x8 pixels, a code of two numbers, no convolutions.

What lect11ext fuses stands between encoder and decoder: from mean and log-variance it draws the code z and
gives its KL divergence to N(0, I), in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from side_by_side import Contender, draw_losses, microseconds, train
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lect11ext import functional, reference

PIXELS, HIDDEN, LATENT, BATCH = 64, 256, 2, 128
HELD_OUT = 400
Sampler = Callable[..., tuple[Tensor, Tensor]]


def eager_rsample_kl(mean: Tensor, logvar: Tensor, *, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What people write by hand. It draws from torch's generator, so that a key means nothing to it."""
    z = mean + (logvar / 2).exp() * torch.randn_like(mean)
    kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1)
    return z, kl


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, with SiLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def load_images(seed: int) -> tuple[Tensor, Tensor]:
    """All images, ``[n, 64]`` of 0 to 1, and their labels, shuffled; the first ``HELD_OUT`` are held out."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order], labels[order]


class DigitsVAE(nn.Module):
    """Three layers down to the code, three layers up from it; ``rsample_kl`` is the implementation to try.

    :class:`lect11ext.nn.GaussianLatent` holds the heads of mean and log-variance and the sampling in one
    module. Here they are apart, because the sampling is what is exchanged.
    """

    def __init__(self, rsample_kl: Sampler) -> None:
        super().__init__()
        self.rsample_kl = rsample_kl
        self.encoder = perceptron(PIXELS, HIDDEN, HIDDEN, 2 * LATENT)
        self.decoder = perceptron(LATENT, HIDDEN, HIDDEN, PIXELS)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the code: halves of one tensor, which the fused kernel reads in place."""
        mean, logvar = self.encoder(x).chunk(2, -1)
        return mean, logvar

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        """The negative evidence lower bound in nats an image; ``key`` names the noise of this step."""
        z, kl = self.rsample_kl(*self.encode(x), key=key)
        # Grey values between 0 and 1 are taken as probabilities that the pixel is black.
        error = nn.functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(-1)
        return (error + kl).mean()


@dataclass
class Result:
    """What the training leaves for the table and the pictures."""

    reference: Contender
    eager: Contender
    fused: Contender
    model: DigitsVAE
    images: Tensor
    labels: Tensor


def run(steps: int, seed: int) -> Result:
    """Trains three copies from the same weights, on the same batches.

    ``reference`` and ``fused`` also get the same keys, hence the same noise, and must follow the same curve.
    The reference makes its noise in NumPy, slowly: it is there for the losses, and ``eager`` for the times.
    """
    images, labels = load_images(seed)
    training = images[HELD_OUT:]
    batches = torch.randint(len(training), (steps, BATCH), generator=torch.Generator().manual_seed(seed))

    samplers = {
        "reference": reference.gaussian_rsample_kl,
        "eager randn": eager_rsample_kl,
        "lect11ext": functional.gaussian_rsample_kl,
    }
    torch.manual_seed(seed)
    models = {name: DigitsVAE(sampler) for name, sampler in samplers.items()}
    for model in models.values():
        model.load_state_dict(models["reference"].state_dict())

    def stepper(model: DigitsVAE) -> Callable[[int], float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        def step(i: int) -> float:
            # A key is [seed, offset], and the offset counts blocks of four normals: each step reads the next
            # stretch of one stream of noise, and could be repeated alone.
            key = torch.tensor([seed, i * (BATCH * LATENT // 4)])
            loss = model(training[batches[i]], key)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            return loss.item()

        return step

    contenders = {name: Contender(name, stepper(model)) for name, model in models.items()}
    train("digits VAE", list(contenders.values()), steps)
    return Result(
        reference=contenders["reference"],
        eager=contenders["eager randn"],
        fused=contenders["lect11ext"],
        model=models["lect11ext"],
        images=images[:HELD_OUT],
        labels=labels[:HELD_OUT],
    )


def time_sampling(rows: int, latent: int) -> tuple[float, float]:
    """Microseconds of sampling and KL alone, forward and backward: by hand, and fused."""
    mean = torch.randn(rows, latent, requires_grad=True)
    logvar = torch.randn(rows, latent, requires_grad=True)
    gradients = torch.randn(rows, latent), torch.randn(rows)

    def timed(sampler: Sampler) -> Callable[[], object]:
        return lambda: torch.autograd.grad(sampler(mean, logvar), (mean, logvar), gradients)

    eager, fused = microseconds([timed(eager_rsample_kl), timed(functional.gaussian_rsample_kl)])
    return eager, fused


@torch.no_grad()
def draw(result: Result, folder: Path) -> list[Path]:
    """Reconstructions, the plane of codes, and the loss curves."""
    paths = [folder / f"vae_{name}.png" for name in ("reconstructions", "latent_plane", "losses")]
    draw_reconstructions(result, paths[0])
    draw_plane(result, paths[1])
    title = "Digits VAE: same weights, same noise, two implementations"
    draw_losses(paths[2], title, "nats an image", result.reference, result.fused)
    return paths


def draw_reconstructions(result: Result, path: Path) -> None:
    """Two held-out images of every digit, over what the decoder makes of their two numbers."""
    chosen = torch.cat([(result.labels == digit).nonzero()[:2, 0] for digit in range(10)])
    originals = result.images[chosen]
    mean, _ = result.model.encode(originals)
    decoded = result.model.decoder(mean).sigmoid()
    figure = Figure(figsize=(13, 1.85), layout="constrained")
    figure.suptitle("Held-out digits and their reconstructions from a code of two numbers")
    axes = figure.subplots(2, len(chosen))
    for row, name, pictures in zip(axes, ("original", "decoded"), (originals, decoded), strict=True):
        row[0].set_ylabel(name)
        for ax, picture in zip(row, pictures, strict=True):
            ax.imshow(picture.view(8, 8), cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def draw_plane(result: Result, path: Path, side: int = 17, limit: float = 2.5) -> None:
    """What the decoder draws at each point of the plane, and where held-out digits lie on it."""
    axis = torch.linspace(-limit, limit, side)
    # imshow draws its first row at the top, so z_2 runs downwards here.
    points = torch.cartesian_prod(axis.flip(0), axis).flip(-1)
    tiles = nn.functional.pad(result.model.decoder(points).sigmoid().view(side, side, 8, 8), (1, 1, 1, 1))
    mean, _ = result.model.encode(result.images)

    figure = Figure(figsize=(13, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    edge = limit * side / (side - 1)  # the outer edge of a tile whose centre is at the limit
    picture = tiles.permute(0, 2, 1, 3).reshape(10 * side, 10 * side)
    left.imshow(picture, cmap="gray_r", extent=(-edge, edge, -edge, edge), vmin=0, vmax=1)
    left.set_title("The plane of codes, decoded")
    dots = right.scatter(mean[:, 0], mean[:, 1], c=result.labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=22)
    right.set_title("Codes of held-out digits (means)")
    right.set_aspect("equal")
    right.grid(alpha=0.3)
    figure.colorbar(dots, ax=right, ticks=range(10), label="digit", shrink=0.85)
    reach = max(edge, 1.05 * mean.abs().max().item())
    for ax, bound in ((left, edge), (right, reach)):
        ax.set(xlabel="$z_1$", ylabel="$z_2$", xlim=(-bound, bound), ylim=(-bound, bound))
    figure.savefig(path, dpi=120)
