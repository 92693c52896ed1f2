"""lect11ext in a few minutes: four small models on real data, trained on PyTorch and on the fused functions.

    python examples/quickstart.py [--output out/quickstart] [--seed 0]

Prints a table of losses and times, a text and translations, and draws pictures. Needs no network: the digits come with
scikit-learn, the text with Python, the dates with Babel.
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
    import translate_dates
    from side_by_side import LAST_STEPS, format_table, models_table
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "sklearn", "tqdm"):
        raise
    raise SystemExit(f"The quickstart needs {error.name}: pip install --no-build-isolation '.[examples]'") from None


def sampling_table() -> str:
    """Sampling and KL without the rest of the VAE, whose layers take most of a step."""
    sizes = {"of this VAE": (digits_vae.BATCH, digits_vae.LATENT), "large": (16384, 64)}
    rows = []
    for name, (batch, latent) in sizes.items():
        eager, fused = digits_vae.time_sampling(batch, latent)
        rows.append((f"{name}, {batch} x {latent}", f"{eager:.1f}", f"{fused:.1f}", f"{eager / fused:.2f}"))
    return format_table(("size", "eager\nµs", "lect11ext\nµs", "times\nfaster"), rows)


NOTES = f"""\
Losses: nats an image, nats a character of text and of a date, means of the last {LAST_STEPS} steps. Both sides
start from the same weights; they differ by rounding at first, if at all, and training amplifies any
difference later. The baseline of the VAE's losses is lect11ext.reference, on the same noise. It makes that
noise in NumPy, slowly, so the VAE's times have another baseline: what people write by hand, randn_like and
the KL of the textbook.
Times: medians of whole training steps, both sides in turns."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-vae", type=int, default=2400)
    parser.add_argument("--steps-text", type=int, default=900)
    parser.add_argument("--steps-transformer", type=int, default=translate_dates.STEPS_TRANSFORMER)
    parser.add_argument("--steps-lstm", type=int, default=translate_dates.STEPS_LSTM)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    print(f"lect11ext {lect11ext.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")

    vae = digits_vae.run(options.steps_vae, options.seed)
    text = character_lm.run(options.steps_text, options.seed)
    dates = translate_dates.run(options.steps_transformer, options.steps_lstm, options.seed)
    pictures = [
        *digits_vae.draw(vae, options.output),
        *character_lm.draw(text, options.output),
        *translate_dates.draw(dates, options.output),
    ]

    print("\nThe text model writes:\n")
    for line in character_lm.write(text.model, options.seed).splitlines():
        for part in wrap(line, 100) or [""]:
            print("    |", part)
    print(f"\nThe date models translate a day that neither has seen:\n\n{translate_dates.readings(dates)}")
    print(f"\n{translate_dates.exact_match_table(dates)}")
    # For each: what the losses are compared with, what the times are compared with, and lect11ext itself.
    cases = {
        "digits VAE": (vae.reference, vae.eager, vae.fused),
        "character LM": (text.torch, text.torch, text.fused),
        **dates.cases,
    }
    print(f"\n{models_table(cases)}\n\n{NOTES}")
    print(f"\nSampling and KL alone, forward and backward:\n\n{sampling_table()}\n")
    for picture in pictures:
        print(f"wrote {picture}")
    print(f"in {perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
