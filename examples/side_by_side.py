"""Trains copies of one model side by side, so that losses and times can be compared step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from time import perf_counter

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

# Losses are compared over the first steps: training amplifies rounding, so that any two runs part in the end.
FIRST_STEPS = 50
LAST_STEPS = 50


@dataclass
class Contender:
    """One implementation of a model in training: ``step(i)`` does the i-th step and returns its loss."""

    name: str
    step: Callable[[int], float]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def final_loss(self) -> float:
        """Mean of the last steps; the loss of a single batch would say little."""
        return fmean(self.losses[-LAST_STEPS:])

    @property
    def milliseconds(self) -> float:
        """Median time of a step; the first tenth warms up."""
        return 1e3 * median(self.seconds[len(self.seconds) // 10 :])

    def parting(self, other: Contender) -> float:
        """Largest difference of the two loss curves over the first steps."""
        pairs = zip(self.losses[:FIRST_STEPS], other.losses[:FIRST_STEPS], strict=True)
        return max(abs(mine - theirs) for mine, theirs in pairs)


def train(title: str, contenders: Sequence[Contender], steps: int) -> None:
    """Trains all contenders, each step of one next to the same step of the others.

    A noisy machine then hurts all alike. Who comes first, with the colder cache, changes from step to step.
    """
    with tqdm(range(steps), desc=title, unit="step") as bar:
        for i in bar:
            first = i % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                start = perf_counter()
                loss = contender.step(i)
                contender.seconds.append(perf_counter() - start)
                contender.losses.append(loss)
            if i % 20 == 0:
                bar.set_postfix({c.name: f"{c.losses[-1]:.3f}" for c in contenders}, refresh=False)


def microseconds(functions: Sequence[Callable[[], object]], seconds: float = 1.5) -> list[float]:
    """Median time of each function, in turns, for about so many seconds in all."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:  # warm up
        function()
    end = perf_counter() + seconds
    while perf_counter() < end or len(times[0]) < 5:
        for function, record in zip(functions, times, strict=True):
            start = perf_counter()
            function()
            record.append(perf_counter() - start)
    return [1e6 * median(record) for record in times]


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


def models_table(cases: Mapping[str, tuple[Contender, Contender, Contender]]) -> str:
    """Losses and times. Each case: what losses are compared with, what times are compared with, and lect11ext."""
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


def draw_losses(path: Path, title: str, unit: str, one: Contender, two: Contender) -> None:
    """Both loss curves over one another, and under them how far they are apart."""
    a, b = np.array(one.losses), np.array(two.losses)
    window = max(1, len(a) // 100)
    steps = np.arange(window, len(a) + 1)

    def smooth(x: np.ndarray) -> np.ndarray:
        return np.convolve(x, np.full(window, 1 / window), "valid")

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    top.plot(steps, smooth(a), color="tab:orange", linewidth=4, alpha=0.5, label=one.name)
    top.plot(steps, smooth(b), color="tab:blue", linewidth=1.2, label=two.name)
    top.set_title(title)
    top.set_ylabel(f"loss ({unit})" + (f",\nmean of {window} steps" if window > 1 else ""))
    top.legend()
    bottom.plot(np.arange(1, len(a) + 1), np.abs(a - b), ".", markersize=2, color="tab:gray")
    bottom.set_yscale("symlog", linthresh=1e-8)  # logarithmic, and yet with a place for losses that are equal
    bottom.set_ylim(bottom=-5e-9)
    bottom.axvspan(1, FIRST_STEPS, color="tab:green", alpha=0.2, label=f"first {FIRST_STEPS} steps")
    bottom.set_xlabel("training step")
    bottom.set_ylabel("difference of the\nlosses of one step")
    bottom.legend(loc="center right")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
