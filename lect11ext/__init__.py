"""Fused CPU and CUDA kernels for PyTorch: LSTM and GRU steps, and the losses of autoencoders.

Change one import: ``torch.nn.LSTMCell`` becomes ``lect11ext.nn.LSTMCell``. See :mod:`lect11ext.nn` for the modules,
:mod:`lect11ext.functional` for the functions, :mod:`lect11ext.reference` for the same functions in plain PyTorch.
"""

from importlib.metadata import PackageNotFoundError, version

from . import _vmap, functional, nn, reference

try:
    __version__ = version("lect11ext")
except PackageNotFoundError:  # run from a source tree that was built in place
    __version__ = "0+unknown"

_vmap.register()

__all__ = ["__version__", "functional", "nn", "reference"]
