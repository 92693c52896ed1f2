"""The modules of the autoencoders of digits: lect11ext's layers between ordinary ones."""

from __future__ import annotations

import torch
from digits_vae import HIDDEN, PIXELS, perceptron
from torch import Tensor, nn

import lect11ext.nn as ext
from lect11ext.functional import reconstruction_loss

CLASSES, LATENT = 10, 4
SPARSE_UNITS, CONTRACTIVE_UNITS = 256, 128


class SparseAutoencoder(nn.Module):
    """An overcomplete code of rectified units whose L1 norm costs, each unit weighed by the norm of its atom.

    Without the weights the code could shrink at no cost to the atoms, which would grow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(PIXELS, SPARSE_UNITS)
        self.activation = ext.SparseActivation("relu")
        self.decoder = nn.Linear(SPARSE_UNITS, PIXELS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code, penalty = self.activation(self.encoder(x), self.decoder.weight.norm(dim=0))
        return self.decoder(code), code, penalty


class ContractiveAutoencoder(nn.Module):
    """A sigmoid layer and its transpose, as Rifai et al. have it: two layers could undo each other's shrinking."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ext.ContractiveLinear(PIXELS, CONTRACTIVE_UNITS)
        self.bias = nn.Parameter(torch.zeros(PIXELS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code, penalty = self.encoder(x)
        return code @ self.encoder.weight + self.bias, penalty


class Denoiser(nn.Module):
    """Corrupts while it trains. Its output are logits of the pixels."""

    def __init__(self, corruption: nn.Module) -> None:
        super().__init__()
        self.corruption = corruption
        self.layers = perceptron(PIXELS, HIDDEN, HIDDEN // 4, HIDDEN, PIXELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.corruption(x))


class Variational(nn.Module):
    """A variational autoencoder, and with a condition a conditional one: its encoder, decoder and prior see a label."""

    def __init__(self, conditional: bool) -> None:
        super().__init__()
        self.conditional = conditional
        self.encoder = nn.Sequential(perceptron(PIXELS, HIDDEN, HIDDEN), nn.SiLU())
        if conditional:
            self.latent: nn.Module = ext.ConditionalGaussianLatent(HIDDEN, CLASSES, LATENT)
        else:
            self.latent = ext.GaussianLatent(HIDDEN, LATENT)
        self.decoder = perceptron(LATENT + CLASSES * conditional, HIDDEN, HIDDEN, PIXELS)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The negative evidence lower bound in nats, ``[batch]``; grey values are the probabilities of black."""
        condition = (nn.functional.one_hot(labels, CLASSES).float(),) if self.conditional else ()
        z, kl = self.latent(self.encoder(x), *condition)
        return reconstruction_loss(self.decoder(torch.cat([z, *condition], -1)), x) + kl

    def generate(self, labels: Tensor) -> Tensor:
        """Draws of the conditional prior, decoded."""
        condition = nn.functional.one_hot(labels, CLASSES).float()
        return self.decoder(torch.cat([self.latent.sample_prior(condition), condition], -1)).sigmoid()
