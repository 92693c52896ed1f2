"""Modules, as torch.nn holds torch's: same arguments, parameter names, initialisation and ``state_dict``."""

from .autoencoder import GaussianLatent
from .recurrent import GRUCell, LSTMCell

__all__ = ["GRUCell", "GaussianLatent", "LSTMCell"]
