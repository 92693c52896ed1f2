"""Reads dates as people write them, in two dozen languages, and writes them in ISO 8601.

    python examples/translate_dates.py [--output out/dates] [--seed 0]

Two models that attend to the characters of the date: a transformer, and an LSTM encoder and decoder with Bahdanau's
attention. Each is trained twice from the same weights on the same pairs, on torch.nn and on lect11ext. Prints losses,
times and how many days that no model has seen are read without a mistake, and draws the attention. Needs no network:
the dates come from the locale data that ships with Babel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

import lect11ext

try:
    from date_models import Recurrent, Transformer, plain_attention, shifted
    from date_pairs import ISO, STYLES, Batch, Pair, Vocabulary, draw_pairs, in_batches, make_pair, split_days
    from matplotlib.figure import Figure
    from side_by_side import Contender, draw_losses, format_table, models_table, train
except ModuleNotFoundError as error:
    if error.name not in ("babel", "matplotlib", "tqdm"):
        raise
    raise SystemExit(f"This example needs {error.name}: pip install --no-build-isolation '.[examples]'") from None

BATCH, TESTED = 64, 1000
STEPS_TRANSFORMER, STEPS_LSTM = 700, 300
LEARNING_RATES = {"transformer": 8e-3, "LSTM": 1e-2}
# Both sides compute the same but for rounding, which training amplifies: they are compared before it has much. (1e-7 of
# the first weights makes 1e-4 of the loss in these steps, on either side.)
COMPARED_STEPS, TOLERANCE = 20, 1e-3
SAMPLES = (("en_US", "short"), ("de", "full"), ("hu", "yMMMEd"), ("ru", "long"), ("ar_EG", "full"), ("ja", "full"))
DRAWN = 4  # of the samples: those whose letters matplotlib's own font has

Model = Transformer | Recurrent


@dataclass
class Result:
    """What the training of one model on both sides leaves for the tables and the pictures."""

    torch: Contender
    fused: Contender
    model: Model  # lect11ext's
    right: dict[str, list[bool]]  # of each side: is the pair translated without a mistake?


@dataclass
class Results:
    vocabulary: Vocabulary
    held_out: list[Pair]
    samples: list[Pair]  # one held-out day in several languages
    models: dict[str, Result]

    @property
    def cases(self) -> dict[str, tuple[Contender, Contender, Contender]]:
        """The rows of the table of models."""
        return {f"dates, {name}": (one.torch, one.torch, one.fused) for name, one in self.models.items()}


def build(name: str, vocabulary: int) -> tuple[Model, Model]:
    """A model on torch.nn and on lect11ext, with the same weights: by conversion, or by other imports."""
    if name == "transformer":
        transformer = Transformer(vocabulary)
        return transformer, lect11ext.convert(deepcopy(transformer))[0]
    plain = Recurrent(vocabulary, nn, plain_attention)
    fused = Recurrent(vocabulary, lect11ext.nn, lect11ext.functional.additive_attention)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def stepper(model: Model, batches: Sequence[Batch], learning_rate: float) -> Callable[[int], float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(batches), pct_start=0.2)

    def step(i: int) -> float:
        batch = batches[i]
        logits = model(batch.source, batch.lengths, shifted(batch.target))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


def check(one: Contender, two: Contender) -> None:
    """Fails where the two sides do not compute the same."""
    for i, (a, b) in enumerate(zip(one.losses[:COMPARED_STEPS], two.losses[:COMPARED_STEPS], strict=True)):
        if not abs(a - b) <= TOLERANCE:  # so that NaN fails, too
            raise SystemExit(f"The losses of step {i} differ: {one.name} {a:.6f}, {two.name} {b:.6f}")


def run(steps_transformer: int, steps_lstm: int, seed: int) -> Results:
    """Trains both models on both sides and lets them translate the held-out days."""
    steps = {"transformer": steps_transformer, "LSTM": steps_lstm}
    training_days, held_out_days = split_days(seed)
    pairs = draw_pairs(training_days, BATCH * max(steps.values()), seed)
    held_out = draw_pairs(held_out_days, TESTED, seed)
    samples = [make_pair(held_out_days[0], locale, style) for locale, style in SAMPLES]
    vocabulary = Vocabulary(pairs + held_out + samples)
    batches = in_batches(pairs, vocabulary, BATCH, seed)
    test = vocabulary.batch(held_out)

    results = Results(vocabulary, held_out, samples, {})
    for name in steps:
        torch.manual_seed(seed)
        plain, fused = build(name, len(vocabulary))
        sides = {"torch.nn": plain, "lect11ext": fused}
        contenders = [
            Contender(side, stepper(model, batches[: steps[name]], LEARNING_RATES[name]))
            for side, model in sides.items()
        ]
        train(f"dates, {name}", contenders, steps[name])
        check(*contenders)
        right = {
            side: (model.translate(test.source, test.lengths) == test.target).all(1).tolist()
            for side, model in sides.items()
        }
        results.models[name] = Result(*contenders, fused, right)
    return results


def exact_match_table(results: Results) -> str:
    """How many of the held-out pairs come out without a mistake, in all and by style."""
    styles = [pair.style for pair in results.held_out]
    rows = []
    for name, result in results.models.items():
        for side, right in result.right.items():
            some = [[one for one, style in zip(right, styles, strict=True) if style == which] for which in STYLES]
            rows.append((f"{name}, {side}", *(f"{100 * sum(which) / len(which):.1f}" for which in (right, *some))))
    return format_table(("held-out pairs without a mistake, %", "all", *STYLES), rows)


def readings(results: Results) -> str:
    """What both models make of the same day in several languages, line by line."""
    pairs = results.samples
    batch = results.vocabulary.batch(pairs)
    columns = []
    for result in results.models.values():
        written = result.model.translate(batch.source, batch.lengths).tolist()
        columns.append(["".join(ISO[i] for i in line) for line in written])
    lines = [[*results.models, "as people write it"]]
    lines += [[*line, f"{pair.source} ({pair.locale})"] for *line, pair in zip(*columns, pairs, strict=True)]
    return "\n".join("  ".join(f"{cell:11}" for cell in line).rstrip() for line in lines)


def draw_attention(path: Path, results: Results) -> None:
    """For each written character, the characters that the model looked at."""
    pairs = results.samples[:DRAWN]
    batch = results.vocabulary.batch(pairs)
    figure = Figure(figsize=(14, 4 * len(pairs)), layout="constrained")
    axes = figure.subplots(len(pairs), len(results.models), squeeze=False)
    for column, (name, result) in enumerate(results.models.items()):
        weights = result.model.weights(batch.source, batch.lengths, batch.target)
        for row, pair in enumerate(pairs):
            tokens = [token.replace(" ", "␣") for token in pair.tokens]
            axis = axes[row, column]
            axis.imshow(weights[row, :, : len(tokens)].numpy(), cmap="Blues", vmin=0, vmax=1)
            axis.set_xticks(range(len(tokens)), tokens)
            axis.get_xticklabels()[0].set_rotation(90)  # the locale, one token of several letters
            axis.set_yticks(range(len(pair.target)), list(pair.target))
            axis.set_title(f"{name}: {pair.source}")
    figure.savefig(path, dpi=100)


def draw(results: Results, folder: Path) -> list[Path]:
    """The loss curves, and the attention."""
    paths = []
    for name, result in results.models.items():
        paths.append(folder / f"dates_losses_{name.lower()}.png")
        title = f"Dates, {name}: same weights, on torch.nn and on lect11ext"
        draw_losses(paths[-1], title, "nats a character", result.torch, result.fused)
    paths.append(folder / "dates_attention.png")
    draw_attention(paths[-1], results)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/dates"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-transformer", type=int, default=STEPS_TRANSFORMER)
    parser.add_argument("--steps-lstm", type=int, default=STEPS_LSTM)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    results = run(options.steps_transformer, options.steps_lstm, options.seed)
    pictures = draw(results, options.output)
    print(f"\n{models_table(results.cases)}\n\n{exact_match_table(results)}\n\n{readings(results)}\n")
    for picture in pictures:
        print(f"wrote {picture}")
    print(f"in {perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
