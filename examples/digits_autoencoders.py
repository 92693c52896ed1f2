"""The lecture's autoencoders on real data, handwritten digits of 8x8 pixels: one table and four pictures.

    python examples/digits_autoencoders.py [--output out/autoencoders] [--seed 0] [--steps 2000]

Needs no network: the digits come with scikit-learn. What each system shows:

undercomplete    linear, with squared error: it finds PCA's subspace, and its error
sparse           few active units an image, by an L1 penalty or by keeping the k largest, and what that costs
contractive      a code that changes little where the image does, but along a few directions: the tangents
denoising        fills in masked pixels, where a plain autoencoder hands them through; g(f(x)) - x points to the data
variational      told the digit, a tighter bound, and images of the digit that is asked for
hashing          codes of a few bits, learnt without labels, whose neighbours show the same digit
stacked          one autoencoder on the code of another, trained stage by stage, beside all at once

All values are of images that no model was trained on, but the spiral's, which are points with new noise. The constants
of autoencoder_systems.py and autoencoder_modules.py were chosen on a part of the training images, before the held-out
ones were looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

try:
    from autoencoder_systems import SYSTEMS, Row, curve, load
    from matplotlib.figure import Figure
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "sklearn", "tqdm"):
        raise
    raise SystemExit(f"This example needs {error.name}: pip install --no-build-isolation '.[examples]'") from None


def format_rows(rows: Sequence[Row]) -> str:
    """One line a row: text to the left, numbers to the right."""
    lines = [("system", "measure", "value", "beside", "value")]
    lines += [(row.system, row.measure, f"{row.value:.3f}", row.beside, f"{row.other:.3f}") for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    aligned = [
        "  ".join(
            cell.rjust(n) if i in (2, 4) else cell.ljust(n)
            for i, (cell, n) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(aligned)


def draw_images(path: Path, title: str, rows: Sequence[tuple[str, Tensor]], signed: bool = False) -> None:
    """Rows of images, each with its name. Of signed ones, all but the first of a row are drawn in two colours."""
    columns = len(rows[0][1])
    figure = Figure(figsize=(0.8 * columns + 1.5, 0.8 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title)
    for axes, (name, images) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        axes[0].set_ylabel(name, rotation="horizontal", ha="right", va="center")
        for i, (ax, image) in enumerate(zip(axes, images, strict=True)):
            reach = image.abs().max().item()
            scale = {"cmap": "RdBu", "vmin": -reach, "vmax": reach} if signed and i else {"cmap": "gray_r"}
            ax.imshow(image.view(8, 8), **({"vmin": 0, "vmax": 1} | scale))
            ax.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def draw_field(path: Path, field: Tensor) -> None:
    """Where a denoising autoencoder moves each point of the plane."""
    grid, moves = field
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*curve(500).T, color="tab:orange", linewidth=2, label="data")
    axes.quiver(*grid.T, *moves.T, angles="xy", scale_units="xy", scale=1.5, width=0.003)
    axes.set_title("Denoising: g(f(x)) − x points to the data")
    axes.set_aspect("equal")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw(pictures: dict[str, Tensor], folder: Path) -> list[Path]:
    """Tangents, restored images, the field, and generated digits."""
    paths = [folder / f"{name}.png" for name in ("tangents", "denoising", "field", "generated")]
    tangents = [
        (name.removeprefix("tangents, "), row)
        for name, images in pictures.items()
        if name.startswith("tangents")
        for row in images
    ]
    draw_images(paths[0], "A digit and the directions to which its code reacts most", tangents, signed=True)
    names = ("original", "corrupted", "denoising", "plain")
    draw_images(
        paths[1], "Held-out digits, masked and restored", list(zip(names, pictures["denoising"][:, :12], strict=True))
    )
    draw_field(paths[2], pictures["field"])
    draw_images(paths[3], "Drawn from the prior of each digit", [("", row) for row in pictures["generated"]])
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/autoencoders"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="of every model's training")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    start = perf_counter()

    digits = load(options.steps, options.seed)
    rows: list[Row] = []
    for system in tqdm(SYSTEMS, desc="autoencoders", unit="system"):
        torch.manual_seed(options.seed)
        rows += system(digits)

    with torch.no_grad():
        paths = draw({name: picture.detach() for name, picture in digits.pictures.items()}, options.output)
    print(f"\n{len(digits.held_out)} held-out images; an error is a squared error summed over 64 pixels of 0 to 1\n")
    print(f"{format_rows(rows)}\n")
    for path in paths:
        print(f"wrote {path}")
    print(f"in {perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
