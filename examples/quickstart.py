"""lect11ext in a few minutes: two small models on real data, trained on PyTorch and on the fused functions.

    python examples/quickstart.py [--output out/quickstart] [--seed 0]

Prints a table of losses and times and a text, and draws pictures. Needs no network: the digits come with
scikit-learn, the text with Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from time import perf_counter

import torch

import lect11ext

try:
    import character_lm
    import digits_vae
    from side_by_side import FIRST_STEPS, LAST_STEPS
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "sklearn", "tqdm"):
        raise
    raise SystemExit(f"The quickstart needs {error.name}: pip install --no-build-isolation '.[examples]'") from None


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, first column to the left, numbers to the right; a header may have several lines."""
    lines = [line.split("\n") for line in header]
    height = max(map(len, lines))
    head = [[cell[i - height] if i - height >= -len(cell) else "" for cell in lines] for i in range(height)]
    widths = [max(len(row[column]) for row in (*head, *rows)) for column in range(len(header))]

    def join(row: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "  ".join([row[0].ljust(len(first)), *others])

    return "\n".join([*map(join, head), "  ".join("-" * width for width in widths), *map(join, rows)])


def models_table(vae: digits_vae.Result, text: character_lm.Result) -> str:
    """Losses and times of both models."""
    # For each: what the losses are compared with, what the times are compared with, and lect11ext itself.
    cases = {
        "digits VAE": (vae.reference, vae.eager, vae.fused),
        "character LM": (text.torch, text.torch, text.fused),
    }
    header = (
        "model",
        "final loss\nbaseline",
        "\nlect11ext",
        f"largest difference\nin first {FIRST_STEPS} steps",
        "ms per step\nbaseline",
        "\nlect11ext",
        "times\nfaster",
    )
    rows = [
        (
            name,
            f"{same.final_loss:.4f}",
            f"{fused.final_loss:.4f}",
            f"{fused.parting(same):.1e}",
            f"{timed.milliseconds:.3f}",
            f"{fused.milliseconds:.3f}",
            f"{timed.milliseconds / fused.milliseconds:.2f}",
        )
        for name, (same, timed, fused) in cases.items()
    ]
    return format_table(header, rows)


def sampling_table() -> str:
    """Sampling and KL without the rest of the VAE, whose layers take most of a step."""
    sizes = {"of this VAE": (digits_vae.BATCH, digits_vae.LATENT), "large": (16384, 64)}
    rows = []
    for name, (batch, latent) in sizes.items():
        eager, fused = digits_vae.time_sampling(batch, latent)
        rows.append((f"{name}, {batch} x {latent}", f"{eager:.1f}", f"{fused:.1f}", f"{eager / fused:.2f}"))
    return format_table(("size", "eager\nµs", "lect11ext\nµs", "times\nfaster"), rows)


NOTES = f"""\
Losses: nats an image and nats a character, means of the last {LAST_STEPS} steps. Both sides start from the
same weights; they differ by rounding at first, if at all, and training amplifies any difference later. The
baseline of the VAE's losses is lect11ext.reference, on the same noise. It makes that noise in NumPy, slowly,
so the VAE's times have another baseline: what people write by hand, randn_like and the KL of the textbook.
Times: medians of whole training steps, both sides in turns."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-vae", type=int, default=2400)
    parser.add_argument("--steps-text", type=int, default=900)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    print(f"lect11ext {lect11ext.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")

    vae = digits_vae.run(options.steps_vae, options.seed)
    text = character_lm.run(options.steps_text, options.seed)
    pictures = digits_vae.draw(vae, options.output) + character_lm.draw(text, options.output)

    print("\nThe text model writes:\n")
    for line in character_lm.write(text.model, options.seed).splitlines():
        for part in wrap(line, 100) or [""]:
            print("    |", part)
    print(f"\n{models_table(vae, text)}\n\n{NOTES}")
    print(f"\nSampling and KL alone, forward and backward:\n\n{sampling_table()}\n")
    for picture in pictures:
        print(f"wrote {picture}")
    print(f"in {perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
