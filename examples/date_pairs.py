"""Dates as people write them and as ISO 8601 writes them, from the locale data that ships with Babel."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from functools import cache
from typing import NamedTuple

import torch
from babel import Locale
from babel.dates import format_date, format_skeleton
from torch import Tensor

# A hundred years, so that two digits of a year are enough to know it.
FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)
LOCALES = (
    "en_US", "en_GB", "de", "fr", "es", "it", "pt_BR", "nl", "sv", "fi", "pl", "hu", "tr", "id", "vi", "el", "ru",
    "uk", "he", "ar_EG", "hi", "bn", "ja", "ko", "zh_CN",
)  # fmt: skip
# In the United States: 9/7/26; Sep 7, 2026; September 7, 2026; Monday, September 7, 2026; Mon, Sep 7, 2026.
STYLES = ("short", "medium", "long", "full", "yMMMEd")
# Babel writes dates in European digits. These are the zeros of the others.
ZEROS = {"arab": "٠", "beng": "০"}
HELD_OUT = 0.1  # of all days

ISO = "0123456789-"
ISO_LENGTH = len("2026-09-07")
PADDING = 0  # the index in a source
START = len(ISO)  # the index of what comes before the first character of a target


class Pair(NamedTuple):
    """A day in two spellings. Without the locale nobody could read 7/9/26."""

    locale: str
    style: str
    source: str
    target: str

    @property
    def tokens(self) -> list[str]:
        return [self.locale, *self.source]


@cache
def digits(name: str) -> dict[int, int]:
    """From European digits to those of a locale, for ``str.translate``."""
    zero = ZEROS.get(Locale.parse(name).default_numbering_system, "0")
    return {ord("0") + i: ord(zero) + i for i in range(10)}


def write(day: date, locale: str, style: str) -> str:
    """The day as it is written there, with plain spaces, and without the marks that tell a screen the direction."""
    if style in ("short", "medium", "long", "full"):
        text = format_date(day, style, locale=locale)
    else:
        text = format_skeleton(style, day, locale=locale)
    return " ".join(text.translate(digits(locale)).replace("\u200f", "").split())


def make_pair(day: date, locale: str, style: str) -> Pair:
    return Pair(locale, style, write(day, locale, style), day.isoformat())


def split_days(seed: int) -> tuple[list[date], list[date]]:
    """Days to train on, and days that are held out in every locale and every style."""
    days = [FIRST + timedelta(i) for i in range((LAST - FIRST).days + 1)]
    random.Random(seed).shuffle(days)
    held_out = round(HELD_OUT * len(days))
    return days[held_out:], days[:held_out]


def draw_pairs(days: Sequence[date], count: int, seed: int) -> list[Pair]:
    """Random days in random locales and styles."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        day, locale, style = rng.choice(days), rng.choice(LOCALES), rng.choice(STYLES)
        pairs.append(make_pair(day, locale, style))
    return pairs


class Batch(NamedTuple):
    """``source`` ``[batch, longest]``, padded, its ``lengths``, and ``target`` ``[batch, ISO_LENGTH]``."""

    source: Tensor
    lengths: Tensor
    target: Tensor


class Vocabulary:
    """The characters of sources, and the locales, each of which is one token."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        tokens = sorted({token for pair in pairs for token in pair.tokens})
        self.index = {token: i for i, token in enumerate(tokens, PADDING + 1)}

    def __len__(self) -> int:
        return len(self.index) + 1

    def batch(self, pairs: Sequence[Pair]) -> Batch:
        rows = [torch.tensor([self.index[token] for token in pair.tokens]) for pair in pairs]
        source = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
        target = torch.tensor([[ISO.index(character) for character in pair.target] for pair in pairs])
        return Batch(source, torch.tensor([len(row) for row in rows]), target)


def in_batches(pairs: Sequence[Pair], vocabulary: Vocabulary, size: int, seed: int, pool: int = 10) -> list[Batch]:
    """All pairs in batches. Sources of about the same length go together, within ``pool`` batches, to pad less."""
    result = []
    for at in range(0, len(pairs), pool * size):
        near = sorted(pairs[at : at + pool * size], key=lambda pair: len(pair.source))
        result += [vocabulary.batch(near[i : i + size]) for i in range(0, len(near), size)]
    random.Random(seed).shuffle(result)
    return result
