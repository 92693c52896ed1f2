"""Three small models trained with our layers and with torch.nn's, from the same seed: the same curve of losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lect11ext import nn
from tests.helpers import HERE

STEPS, WORDS, WIDTH = 30, 11, 16


class Tagger(torch.nn.Module):
    """Tags of words by two directions over sentences of several lengths, packed or with ``lengths=``."""

    def __init__(self, place: Any, packed: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, WIDTH)
        self.layer = place.LSTM(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True)
        self.head = torch.nn.Linear(2 * WIDTH, 3)
        self.packed = packed

    def forward(self) -> Tensor:
        lengths = torch.randint(2, 10, (16,))
        words = torch.randint(WORDS, (16, 9))
        tags = words.roll(-1, 1) % 3  # the next word's: only the reverse direction knows
        tags[torch.arange(9) >= lengths[:, None] - 1] = -100
        x = self.embed(words)
        if self.packed:
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            output, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=9)
        else:
            output, _ = self.layer(x, lengths=lengths)
        return cross_entropy(self.head(output).flatten(0, 1), tags.flatten())


class Reverser(torch.nn.Module):
    """Sequence to sequence: the decoder begins with the encoder's state, and sees the last symbol."""

    def __init__(self, place: Any, packed: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, WIDTH)
        self.encoder, self.decoder = place.GRU(WIDTH, 2 * WIDTH), place.GRU(WIDTH, 2 * WIDTH)
        self.head = torch.nn.Linear(2 * WIDTH, WORDS)

    def forward(self) -> Tensor:
        source = torch.randint(1, WORDS, (4, 16))
        target = source.flip(0)
        _, h = self.encoder(self.embed(source))
        seen = torch.cat([torch.zeros_like(target[:1]), target[:-1]])
        output, _ = self.decoder(self.embed(seen), h)
        return cross_entropy(self.head(output).flatten(0, 1), target.flatten())


class LanguageModel(torch.nn.Module):
    """A text in pieces, the states carried on without their history; the head is the embedding, dropout draws alike:
    but not cuDNN's."""

    def __init__(self, place: Any, packed: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, WIDTH)
        self.layer = place.LSTM(WIDTH, 2 * WIDTH, 2, proj_size=WIDTH, dropout=0.1 if HERE == "cpu" else 0.0)
        self.state: tuple[Tensor, Tensor] | None = None
        self.at = 0

    def forward(self) -> Tensor:
        text = (torch.arange(self.at, self.at + 13).square()[:, None] + torch.arange(5)) % WORDS
        output, state = self.layer(self.embed(text[:-1]), self.state)
        self.state, self.at = tuple(s.detach() for s in state), self.at + 12
        return cross_entropy((output @ self.embed.weight.t()).flatten(0, 1), text[1:].flatten())


def losses(model: Callable[..., Any], place: Any, packed: bool) -> Tensor:
    torch.manual_seed(1)
    made = model(place, packed)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.03)
    curve = []
    for _ in range(STEPS):
        loss = made()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve)


@pytest.mark.parametrize("model", [Tagger, Reverser, LanguageModel])
def test_the_same_losses_as_with_torch_nn(model: Any) -> None:
    expected = losses(model, torch.nn, packed=True)
    assert expected[-5:].mean() < 0.9 * expected[0]  # it learns: the gradients matter
    for packed in (True, False):
        # Roundings of 1e-7 a step, which training multiplies: torch.nn's own curves with one thread and with two are
        # up to 1e-5 apart.
        torch.testing.assert_close(losses(model, nn, packed), expected, rtol=0, atol=1e-4)
