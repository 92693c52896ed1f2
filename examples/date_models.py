"""Two readers of dates: a transformer, and an LSTM encoder and decoder with Bahdanau's attention between them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from date_pairs import ISO, ISO_LENGTH, PADDING, START
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

WIDTH, HEADS, LAYERS, LONGEST = 64, 4, 2, 64
EMBEDDING, HIDDEN = 32, 64

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, attn_mask: Tensor) -> Tensor:
    """Additive attention as one writes it in PyTorch: with a tensor of all queries, keys and hidden units."""
    scores = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3)) @ score_weight
    return scores.masked_fill(~attn_mask, -torch.inf).softmax(-1) @ value


class Transformer(nn.Module):
    """Encoder and decoder of torch.nn's layers; ``lect11ext.convert`` exchanges the attention in them."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout": 0.0, "activation": "relu", "batch_first": True, "norm_first": True}
        self.source = nn.Embedding(vocabulary, WIDTH, PADDING)
        self.target = nn.Embedding(len(ISO) + 1, WIDTH)
        self.place = nn.Parameter(torch.randn(LONGEST, WIDTH))
        encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **options)
        decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, **options)
        self.encoder = nn.TransformerEncoder(encoder, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, LAYERS, nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, len(ISO))

    def encode(self, source: Tensor) -> Tensor:
        embedded = self.source(source) + self.place[: source.size(1)]
        return self.encoder(embedded, src_key_padding_mask=source == PADDING)

    def decode(self, memory: Tensor, source: Tensor, before: Tensor) -> Tensor:
        """Logits of the character that follows each of ``before``."""
        embedded = self.target(before) + self.place[: before.size(1)]
        later = torch.ones(before.size(1), before.size(1), dtype=torch.bool).triu(1)
        padding = source == PADDING
        decoded = self.decoder(embedded, memory, later, memory_key_padding_mask=padding, tgt_is_causal=True)
        return self.head(decoded)

    def forward(self, source: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
        return self.decode(self.encode(source), source, before)

    @torch.no_grad()
    def translate(self, source: Tensor, lengths: Tensor) -> Tensor:
        """The likeliest character, one after the other."""
        memory = self.encode(source)
        written = torch.full((len(source), 1), START)
        for _ in range(ISO_LENGTH):
            following = self.decode(memory, source, written)[:, -1].argmax(-1)
            written = torch.cat([written, following[:, None]], 1)
        return written[:, 1:]

    @torch.no_grad()
    def weights(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Attention ``[batch, target, source]`` of the last decoder layer, mean of its heads."""
        found: list[Tensor] = []
        attention = self.decoder.layers[-1].multihead_attn
        hooks = (
            attention.register_forward_pre_hook(lambda _, x, o: (x, {**o, "need_weights": True}), with_kwargs=True),
            attention.register_forward_hook(lambda _, x, output: found.append(output[1])),
        )
        self(source, lengths, shifted(target))
        for hook in hooks:
            hook.remove()
        return found[0]


class Recurrent(nn.Module):
    """Bahdanau's model, with LSTMs: the decoder's state asks, and the answer goes into its next step.

    ``layers`` is ``torch.nn`` or ``lect11ext.nn``, ``attend`` the plain function above or lect11ext.functional's.
    """

    def __init__(self, vocabulary: int, layers: ModuleType = nn, attend: Attend = plain_attention) -> None:
        super().__init__()
        self.attend = attend
        self.source = nn.Embedding(vocabulary, EMBEDDING, PADDING)
        self.target = nn.Embedding(len(ISO) + 1, EMBEDDING)
        self.encoder = layers.LSTM(EMBEDDING, HIDDEN, batch_first=True, bidirectional=True)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.query = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.key = nn.Linear(2 * HIDDEN, HIDDEN)
        self.score = nn.Parameter(torch.empty(HIDDEN).uniform_(-(HIDDEN**-0.5), HIDDEN**-0.5))
        self.cell = layers.LSTMCell(EMBEDDING + 2 * HIDDEN, HIDDEN)
        self.head = nn.Linear(3 * HIDDEN, len(ISO))

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the encoder says of each character, and the decoder's first state."""
        packed = pack_padded_sequence(self.source(source), lengths, batch_first=True, enforce_sorted=False)
        outputs, (h, _) = self.encoder(packed)
        memory, _ = pad_packed_sequence(outputs, batch_first=True, total_length=source.size(1))
        state = torch.tanh(self.first(h[1]))
        return memory, (state, torch.zeros_like(state))

    def run(self, source: Tensor, lengths: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits, and the queries; without ``before`` the likeliest character goes into the next step."""
        memory, state = self.encode(source, lengths)
        keys, mask = self.key(memory), (source != PADDING).unsqueeze(1)
        embedded = None if before is None else self.target(before)
        word = self.target(torch.full((len(source),), START))
        logits, queries = [], []
        for i in range(ISO_LENGTH):
            query = self.query(state[0]).unsqueeze(1)
            context = self.attend(query, keys, memory, self.score, mask).squeeze(1)
            word = word if embedded is None else embedded[:, i]
            state = self.cell(torch.cat([word, context], 1), state)
            logits.append(self.head(torch.cat([state[0], context], 1)))
            queries.append(query)
            if embedded is None:
                word = self.target(logits[-1].argmax(-1))
        return torch.stack(logits, 1), torch.cat(queries, 1)

    def forward(self, source: Tensor, lengths: Tensor, before: Tensor) -> Tensor:
        return self.run(source, lengths, before)[0]

    @torch.no_grad()
    def translate(self, source: Tensor, lengths: Tensor) -> Tensor:
        return self.run(source, lengths, None)[0].argmax(-1)

    @torch.no_grad()
    def weights(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Attention ``[batch, target, source]``: what it makes of values that are the unit vectors."""
        _, queries = self.run(source, lengths, shifted(target))
        memory, _ = self.encode(source, lengths)
        places = torch.eye(source.size(1)).expand(len(source), -1, -1)
        mask = (source != PADDING).unsqueeze(1)
        return self.attend(queries, self.key(memory), places, self.score, mask)


def shifted(target: Tensor) -> Tensor:
    """What is known before each character: the ones before it."""
    return nn.functional.pad(target[:, :-1], (1, 0), value=START)
