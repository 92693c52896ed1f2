"""Every fused function in plain PyTorch: the oracle of the tests and the baseline of the benchmarks.

Same names, same arguments and same meaning as in :mod:`lect11ext.functional`, any device, any dtype, all derivatives.
"""

from .autoencoder import gaussian_rsample_kl, philox_normal
from .recurrent import gru_cell, gru_layer, lstm_cell, lstm_layer

__all__ = ["gaussian_rsample_kl", "gru_cell", "gru_layer", "lstm_cell", "lstm_layer", "philox_normal"]
