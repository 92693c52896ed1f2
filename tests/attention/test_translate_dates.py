"""The example that translates dates: its pairs say the same day, and both sides of it compute the same."""

from __future__ import annotations

import importlib
import re
import unicodedata
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("babel")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.cpu

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("date_pairs")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("translate_dates")


KNOWN = [
    ("en_US", "short", "2/1/03", "2003-02-01"),
    ("en_GB", "short", "01/02/2003", "2003-02-01"),
    ("sv", "short", "2003-02-01", "2003-02-01"),
    ("ko", "short", "03. 2. 1.", "2003-02-01"),
    ("de", "full", "Sonntag, 9. November 1980", "1980-11-09"),
    ("hu", "long", "1980. november 9.", "1980-11-09"),
    ("pl", "long", "9 listopada 1980", "1980-11-09"),
    ("ja", "full", "1980年11月9日日曜日", "1980-11-09"),
    ("ar_EG", "long", "٩ نوفمبر ١٩٨٠", "1980-11-09"),
    ("bn", "long", "৯ নভেম্বর, ১৯৮০", "1980-11-09"),
]


@pytest.mark.parametrize(("locale", "style", "source", "target"), KNOWN)
def test_known_spellings(pairs: ModuleType, locale: str, style: str, source: str, target: str) -> None:
    assert pairs.make_pair(date.fromisoformat(target), locale, style) == (locale, style, source, target)


def test_sources_say_the_target(pairs: ModuleType) -> None:
    """Babel reads numeric dates back; the others hold the day and the year in digits."""
    from babel.dates import parse_date

    training, _ = pairs.split_days(0)
    for pair in pairs.draw_pairs(training, 1000, 0):
        day = date.fromisoformat(pair.target)
        digits = "".join(str(unicodedata.digit(c, c)) for c in pair.source)
        if pair.style == "short":
            read = parse_date(digits, pair.locale, format="short")
            assert (read.month, read.day, read.year % 100) == (day.month, day.day, day.year % 100), pair
        else:
            assert {day.day, day.year} <= {int(number) for number in re.findall(r"\d+", digits)}, pair


def test_no_spelling_stands_for_two_days(pairs: ModuleType) -> None:
    days = [date(2026, 1, 1) + timedelta(i) for i in range(365)]
    for locale in pairs.LOCALES:
        for style in pairs.STYLES:
            assert len({pairs.write(day, locale, style) for day in days}) == len(days), (locale, style)


def test_held_out_days_are_never_trained_on(pairs: ModuleType) -> None:
    training, held_out = pairs.split_days(3)
    days = (pairs.LAST - pairs.FIRST).days + 1
    assert not set(training) & set(held_out)
    assert len(training) + len(held_out) == days and len(held_out) == round(pairs.HELD_OUT * days)
    seen, unseen = pairs.draw_pairs(training, 500, 3), pairs.draw_pairs(held_out, 500, 3)
    assert not {pair.target for pair in seen} & {pair.target for pair in unseen}
    assert seen == pairs.draw_pairs(pairs.split_days(3)[0], 500, 3)
    assert seen != pairs.draw_pairs(training, 500, 4)


def test_batches_hold_every_pair_once(pairs: ModuleType) -> None:
    drawn = pairs.draw_pairs(pairs.split_days(0)[0], 50, 0)
    vocabulary = pairs.Vocabulary(drawn)
    batches = pairs.in_batches(drawn, vocabulary, 8, 0, pool=2)
    tokens = {i: token for token, i in vocabulary.index.items()}
    found = []
    for batch in batches:
        assert batch.source.shape == (len(batch.target), int(batch.lengths.max()))
        for source, length, target in zip(*(x.tolist() for x in batch), strict=True):
            assert all(i == pairs.PADDING for i in source[length:])
            found.append(([tokens[i] for i in source[:length]], "".join(pairs.ISO[i] for i in target)))
    assert sorted(found) == sorted((pair.tokens, pair.target) for pair in drawn)


@pytest.mark.parametrize("name", ["transformer", "LSTM"])
def test_both_sides_compute_the_same(example: ModuleType, pairs: ModuleType, name: str) -> None:
    drawn = pairs.draw_pairs(pairs.split_days(0)[0], 24, 0)
    vocabulary = pairs.Vocabulary(drawn)
    batches = pairs.in_batches(drawn, vocabulary, 8, 0)
    torch.manual_seed(0)
    sides = example.build(name, len(vocabulary))
    assert any(type(module).__module__.startswith("lect11ext") for module in sides[1].modules())
    assert not any(type(module).__module__.startswith("lect11ext") for module in sides[0].modules())

    # The attention before training: averages, and nothing for padding.
    plain, fused = (side.weights(batches[0].source, batches[0].lengths, batches[0].target) for side in sides)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused.sum(-1), torch.ones(fused.shape[:-1]))
    assert not fused.transpose(1, 2)[batches[0].source == pairs.PADDING].any()

    steps = [example.stepper(side, batches, 1e-3) for side in sides]
    for i in range(len(batches)):
        ours, theirs = steps[1](i), steps[0](i)
        assert ours == pytest.approx(theirs, rel=1e-5)
        # The gradients, too, after rounding of a few steps; those that are zero but for rounding tell nothing.
        largest = max(float(p.grad.abs().max()) for p in sides[0].parameters())
        for one, two in zip(sides[1].parameters(), sides[0].parameters(), strict=True):
            assert float((one.grad - two.grad).abs().max()) <= 1e-4 * largest
    assert sides[1].translate(batches[0].source, batches[0].lengths).shape == (8, pairs.ISO_LENGTH)
