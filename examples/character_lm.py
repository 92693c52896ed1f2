"""A character language model: an LSTM layer over the English text of Python's own help pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import torch
from side_by_side import Contender, draw_losses, train
from torch import Tensor, nn

import lect11ext

EMBEDDING, HIDDEN, BATCH, LENGTH = 64, 256, 32, 48
State = tuple[Tensor, Tensor] | None

# Printable ASCII and the end of a line; control characters and rare ones have no place in a small vocabulary.
VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
INDEX = {character: i for i, character in enumerate(VOCABULARY)}
PLAIN = str.maketrans("‘’“”–—", "''\"\"--")


def load_text() -> Tensor:
    """All help pages that ``pydoc`` knows, as indices into the vocabulary."""
    text = "\n".join(topics.values()).translate(PLAIN)
    return torch.tensor([INDEX[character] for character in text if character in INDEX])


class CharacterLM(nn.Module):
    """Predicts the next character.

    ``layers`` is ``torch.nn`` or ``lect11ext.nn``: the LSTM has the same name, arguments, parameters and
    state_dict in both, so that changing the import is all there is to do.
    """

    def __init__(self, layers: ModuleType) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), EMBEDDING)
        self.lstm = layers.LSTM(EMBEDDING, HIDDEN)
        self.head = nn.Linear(HIDDEN, len(VOCABULARY))

    def forward(self, characters: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Logits ``[time, batch, vocabulary]`` for characters ``[time, batch]``, and the state after them."""
        outputs, state = self.lstm(self.embedding(characters), state)
        return self.head(outputs), state


@dataclass
class Result:
    """What the training leaves for the table and the pictures."""

    torch: Contender
    fused: Contender
    model: CharacterLM


def run(steps: int, seed: int) -> Result:
    """Trains two copies from the same weights on the same text: one on torch.nn, one on lect11ext.nn."""
    text = load_text()
    # The text is cut into BATCH streams, read in parallel, LENGTH characters a step: [time, batch].
    streams = text[: len(text) // BATCH * BATCH].view(BATCH, -1).t().contiguous()
    chunks = (len(streams) - 1) // LENGTH

    torch.manual_seed(seed)
    models = {"torch.nn": CharacterLM(torch.nn), "lect11ext.nn": CharacterLM(lect11ext.nn)}
    models["lect11ext.nn"].load_state_dict(models["torch.nn"].state_dict())

    def stepper(model: CharacterLM) -> Callable[[int], float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        state: State = None

        def step(i: int) -> float:
            nonlocal state
            at = i % chunks * LENGTH
            if at == 0:
                state = None
            logits, state = model(streams[at : at + LENGTH], state)
            targets = streams[at + 1 : at + LENGTH + 1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            # The next chunk goes on from here, but its gradient does not reach back across this line.
            state = state[0].detach(), state[1].detach()
            return loss.item()

        return step

    contenders = {name: Contender(name, stepper(model)) for name, model in models.items()}
    train("character LM", list(contenders.values()), steps)
    return Result(contenders["torch.nn"], contenders["lect11ext.nn"], models["lect11ext.nn"])


@torch.no_grad()
def write(model: CharacterLM, seed: int, length: int = 600, temperature: float = 0.6) -> str:
    """Lets the model go on from a first word; a temperature below 1 prefers what is likely."""
    generator = torch.Generator().manual_seed(seed)
    characters = [INDEX[character] for character in "\nThe "]
    logits, state = model(torch.tensor(characters)[:, None])
    for _ in range(length):
        weights = (logits[-1, 0] / temperature).softmax(-1)
        following = torch.multinomial(weights, 1, generator=generator)
        characters.append(int(following))
        logits, state = model(following[None], state)
    return "".join(VOCABULARY[i] for i in characters).strip()


def draw(result: Result, folder: Path) -> list[Path]:
    """The loss curves."""
    path = folder / "text_losses.png"
    title = "Character LM: same weights, only the import changed"
    draw_losses(path, title, "nats a character", result.torch, result.fused)
    return [path]
