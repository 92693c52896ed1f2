"""The systems of the lecture's autoencoders, each trained on handwritten digits and measured on held-out ones.

Every function of :data:`SYSTEMS` returns the rows of its table and adds what is to be drawn to the pictures. Errors
are squared errors an image, over its 64 pixels of 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

import torch
from autoencoder_modules import CLASSES, SPARSE_UNITS, ContractiveAutoencoder, Denoiser, SparseAutoencoder, Variational
from digits_vae import HELD_OUT, HIDDEN, PIXELS, load_images, perceptron
from torch import Tensor, nn

import lect11ext.nn as ext
from lect11ext.functional import corrupt, pack_bits, reconstruction_loss, tangent_directions

BATCH = 128
LINEAR_UNITS = (2, 8)
ACTIVE, L1_WEIGHT = 12, 0.2
CONTRACTION, TANGENTS = 0.3, 6
MASKED = 0.4
CURVE_NOISE = 0.1
DRAWS = 16
BITS, CODE_NOISE, NEIGHBOURS, RADIUS = 24, 2.0, 10, 2
STACK = (PIXELS, 128, 16)


class Row(NamedTuple):
    """A line of the table: a value, and what it is to be seen beside."""

    system: str
    measure: str
    value: float
    beside: str
    other: float


@dataclass
class Digits:
    """Images ``[n, 64]`` and their labels, to train on and held out, and how many steps a model is trained."""

    training: Tensor
    training_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    steps: int
    seed: int
    pictures: dict[str, Tensor] = field(default_factory=dict)


def load(steps: int, seed: int) -> Digits:
    """The digits, split as those of the variational autoencoder are."""
    images, labels = load_images(seed)
    return Digits(images[HELD_OUT:], labels[HELD_OUT:], images[:HELD_OUT], labels[:HELD_OUT], steps, seed)


def fit(
    parameters: Iterable[Tensor], loss: Callable[..., Tensor], *data: Tensor, steps: int, rate: float = 2e-3
) -> None:
    """Adam on batches of ``data``, the same ones for every model."""
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for _ in range(steps):
        chosen = torch.randint(len(data[0]), (BATCH,), generator=generator)
        value = loss(*(x[chosen] for x in data))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


def error(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of an image."""
    return reconstruction_loss(output, target, "squared_error").mean()


def undercomplete(digits: Digits) -> list[Row]:
    """Linear encoder and decoder with squared error find the PCA subspace, though not its axes.

    In float64 and by L-BFGS: of nearly equal variances the subspace shows only once the error is at its minimum.
    """
    rows = []
    training, held_out = (x.double() - digits.training.double().mean(0) for x in (digits.training, digits.held_out))
    _, _, axes = torch.linalg.svd(training, full_matrices=False)
    for units in LINEAR_UNITS:
        model = nn.Sequential(nn.Linear(PIXELS, units), nn.Linear(units, PIXELS)).double()
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=digits.steps, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = error(model(training), training)
            loss.backward()
            return loss

        optimizer.step(closure)
        basis = axes[:units].T
        projected = held_out @ basis @ basis.T
        found, _ = torch.linalg.qr(model[1].weight.detach())
        # What of one basis lies beyond the other: the sine of the largest angle, which keeps the digits of small ones.
        sine = torch.linalg.matrix_norm(found - basis @ (basis.T @ found), 2).clamp(max=1)
        name = f"linear, {units} units"
        rows += [
            Row(name, "error", error(model(held_out), held_out).item(), "PCA", error(projected, held_out).item()),
            Row(name, "largest angle to PCA's subspace, °", math.degrees(sine.asin()), "same subspace", 0.0),
        ]
    return rows


def sparse(digits: Digits) -> list[Row]:
    """Top-k and L1 reconstruct with few units an image; without a penalty most of them are active."""
    found = {}
    for weight in (0.0, L1_WEIGHT):
        torch.manual_seed(digits.seed)
        model = SparseAutoencoder()

        def loss(x: Tensor, model: nn.Module = model, weight: float = weight) -> Tensor:
            output, _, penalty = model(x)
            return error(output, x) + weight * penalty.mean()

        fit(model.parameters(), loss, digits.training, steps=digits.steps)
        output, code, _ = model(digits.held_out)
        found[weight] = error(output, digits.held_out).item(), (code > 0).sum(1).float().mean().item()

    torch.manual_seed(digits.seed)
    topk = ext.TopKAutoencoder(PIXELS, SPARSE_UNITS, ACTIVE)
    fit(
        topk.parameters(),
        lambda x: error(topk.normalize_decoder_()(x)[0], x),
        digits.training,
        steps=digits.steps,
    )
    output, values, _ = topk(digits.held_out)
    found[math.inf] = error(output, digits.held_out).item(), (values > 0).sum(1).float().mean().item()
    rows = []
    for name, weight in (("sparse, L1", L1_WEIGHT), (f"sparse, top {ACTIVE}", math.inf)):
        rows += [
            Row(name, measure, found[weight][i], "no penalty", found[0.0][i])
            for i, measure in enumerate(("error", f"active units of {SPARSE_UNITS}"))
        ]
    return rows


def contractive(digits: Digits) -> list[Row]:
    """The penalty flattens the code in all directions but those that the reconstruction needs: the tangents."""
    found = {}
    chosen = torch.cat([(digits.held_out_labels == digit).nonzero()[:1, 0] for digit in (0, 3, 4, 7)])
    for weight in (0.0, CONTRACTION):
        torch.manual_seed(digits.seed)
        model = ContractiveAutoencoder()

        def loss(x: Tensor, model: nn.Module = model, weight: float = weight) -> Tensor:
            output, penalty = model(x)
            return error(output, x) + weight * penalty.mean()

        fit(model.parameters(), loss, digits.training, steps=digits.steps)
        output, penalty = model(digits.held_out)
        points = digits.held_out[chosen]
        directions, strengths = tangent_directions(lambda x, m=model: m.encoder(x)[0], digits.held_out)
        squares = strengths.square()
        share = (squares[:, :TANGENTS].sum(1) / squares.sum(1)).mean()
        found[weight] = error(output, digits.held_out).item(), penalty.mean().item(), share.item()
        digits.pictures[f"tangents, λ = {weight:g}"] = torch.cat([points[:, None], directions[chosen, :TANGENTS]], 1)
    measures = "error", "mean ‖∂h/∂x‖²", f"share of it in {TANGENTS} tangents"
    return [
        Row(f"contractive, λ = {CONTRACTION:g}", measure, ours, "λ = 0", other)
        for measure, ours, other in zip(measures, found[CONTRACTION], found[0.0], strict=True)
    ]


def denoising(digits: Digits) -> list[Row]:
    """Trained on corrupted images it fills in what is missing; a plain autoencoder hands the holes through."""
    x = digits.held_out
    torch.manual_seed(digits.seed)
    corrupted = corrupt(x, "masking", MASKED)
    restored = {}
    for name, corruption in (("plain", nn.Identity()), ("denoising", ext.Corruption("masking", MASKED))):
        torch.manual_seed(digits.seed)
        model = Denoiser(corruption)

        def loss(x: Tensor, model: nn.Module = model) -> Tensor:
            return reconstruction_loss(model(x), x).mean()

        fit(model.parameters(), loss, digits.training, steps=digits.steps)
        restored[name] = model.eval()(corrupted).sigmoid()
    ours, plain = (error(restored[name], x).item() for name in ("denoising", "plain"))
    digits.pictures["denoising"] = torch.stack([x, corrupted, restored["denoising"], restored["plain"]])
    name = f"denoising, {MASKED:.0%} masked"
    return [
        Row(name, "error", ours, "the corrupted", error(corrupted, x).item()),
        Row(name, "error", ours, "plain autoencoder", plain),
    ]


def curve(count: int) -> Tensor:
    """Points of a spiral of one turn and a half in the plane, ``[count, 2]``."""
    angle = torch.linspace(math.pi, 4 * math.pi, count)
    return angle[:, None] / (4 * math.pi) * torch.stack([angle.cos(), angle.sin()], 1)


def denoising_field(digits: Digits) -> list[Row]:
    """g(f(x)) − x points back to the data: on a curve in the plane it can be drawn."""
    points = curve(2000)
    # Rectified units bend as sharply as the spiral asks; smooth ones take many more steps.
    model = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))

    def restore(x: Tensor) -> Tensor:
        return error(model(corrupt(x, "gaussian", CURVE_NOISE)), x)

    fit(model.parameters(), restore, points, steps=digits.steps, rate=1e-2)
    noisy = corrupt(points, "gaussian", CURVE_NOISE)
    before, after = (torch.cdist(x, points).amin(1).mean().item() for x in (noisy, model(noisy)))
    axis = torch.linspace(-1.2, 1.2, 25)
    grid = torch.cartesian_prod(axis, axis)
    digits.pictures["field"] = torch.stack([grid, model(grid) - grid])
    return [Row("denoising, spiral", "distance to the spiral", after, "the corrupted", before)]


def variational(digits: Digits) -> list[Row]:
    """Told the digit, the code need not say it: the bound on log p(x | y) lies above that on log p(x)."""
    bounds = {}
    for conditional in (False, True):
        torch.manual_seed(digits.seed)
        model = Variational(conditional)
        fit(
            model.parameters(),
            lambda x, y, m=model: m(x, y).mean(),
            digits.training,
            digits.training_labels,
            steps=digits.steps,
        )
        torch.manual_seed(digits.seed)
        draws = model(digits.held_out.repeat(DRAWS, 1), digits.held_out_labels.repeat(DRAWS))
        bounds[conditional] = draws.mean().item()
    digits.pictures["generated"] = model.generate(torch.arange(CLASSES).repeat(6)).view(6, CLASSES, PIXELS)
    return [
        Row("conditional variational", "negative bound, nats an image", bounds[True], "unconditional", bounds[False])
    ]


def precision(neighbours: Tensor, digits: Digits) -> float:
    """The share of neighbours (indices of training images, ``[queries, k]``) that show the query's digit."""
    return (digits.training_labels[neighbours] == digits.held_out_labels[:, None]).float().mean().item()


def hashing(digits: Digits) -> list[Row]:
    """Held-out images look up the training images by short codes learnt without labels."""
    encoder, binary = perceptron(PIXELS, HIDDEN, BITS), ext.BinaryCode(CODE_NOISE)
    decoder = perceptron(BITS, HIDDEN, PIXELS)
    model = nn.Sequential(encoder, binary, decoder)
    fit(model.parameters(), lambda x: reconstruction_loss(model(x), x).mean(), digits.training, steps=digits.steps)
    binary.eval()

    def look_up(code: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        index = ext.HammingIndex(BITS)
        index.add(pack_bits(code(digits.training), 0.0))
        queries = pack_bits(code(digits.held_out), 0.0)
        nearest = index.search(queries, NEIGHBOURS)[1]
        return precision(nearest, digits), len(index.within(queries, RADIUS)[2]) / len(queries)

    mean = digits.training.mean(0)
    planes = torch.randn(DRAWS, PIXELS, BITS)
    found, within = look_up(lambda x: binary(encoder(x)))
    by_chance = [look_up(lambda x, plane=plane: (x - mean) @ plane) for plane in planes]
    random_found, random_within = (fmean(values) for values in zip(*by_chance, strict=True))
    pixels = torch.cdist(digits.held_out, digits.training).topk(NEIGHBOURS, largest=False).indices
    name, measure = f"semantic hashing, {BITS} bits", f"precision@{NEIGHBOURS} of labels"
    return [
        Row(name, measure, found, "random hyperplanes", random_found),
        Row(name, measure, found, "pixels, Euclidean", precision(pixels, digits)),
        Row(name, f"entries within {RADIUS} bits", within, "random hyperplanes", random_within),
    ]


def stacked(digits: Digits) -> list[Row]:
    """One autoencoder on the code of another, trained stage by stage; in as many steps, all at once does better."""

    def build() -> ext.StackedAutoencoder:
        torch.manual_seed(digits.seed)
        sizes = list(pairwise(STACK))
        encoders = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in sizes]
        return ext.StackedAutoencoder(encoders, [nn.Sequential(nn.Linear(b, a)) for a, b in sizes])

    greedy, together = build(), build()
    for stage in range(len(greedy)):
        fit(
            greedy.stage_parameters(stage),
            lambda x, stage=stage: greedy.stage_loss(x, stage, error),
            digits.training,
            steps=digits.steps,
        )
    fit(
        together.parameters(),
        lambda x: error(together(x), x),
        digits.training,
        steps=digits.steps * len(greedy),
    )
    ours, other = (error(model(digits.held_out), digits.held_out).item() for model in (greedy, together))
    return [Row(f"stacked, {' → '.join(map(str, STACK))}", "error", ours, "trained at once", other)]


SYSTEMS = (undercomplete, sparse, contractive, denoising, denoising_field, variational, hashing, stacked)
