"""Fused CPU and CUDA kernels for PyTorch: LSTM and GRU, steps and layers, attention, and the losses of autoencoders.

Change one import: ``torch.nn.LSTM`` becomes ``lect11ext.nn.LSTM``; or let :func:`convert` change a whole model.
See :mod:`lect11ext.nn` for the modules, :mod:`lect11ext.functional` for the functions, :mod:`lect11ext.reference` for
the same functions in plain PyTorch.
"""

from importlib.metadata import PackageNotFoundError, version

from . import _vmap, functional, integrations, nn, reference
from .convert import convert, revert

try:
    __version__ = version("lect11ext")
except PackageNotFoundError:  # run from a source tree that was built in place
    __version__ = "0+unknown"

_vmap.register()

__all__ = ["__version__", "convert", "functional", "integrations", "nn", "reference", "revert"]
