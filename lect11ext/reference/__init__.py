"""Every fused function in plain PyTorch: the oracle of the tests and the baseline of the benchmarks.

Names, arguments and meaning are those of :mod:`lect11ext.functional`, on any device and dtype, with all derivatives.
The layers are here before their fused functions.
"""

from .autoencoder import gaussian_rsample_kl, philox_normal
from .recurrent import gru_cell, gru_layer, lstm_cell, lstm_layer

__all__ = ["gaussian_rsample_kl", "gru_cell", "gru_layer", "lstm_cell", "lstm_layer", "philox_normal"]
