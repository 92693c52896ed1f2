"""Loads the compiled module, and says in one sentence what is wrong where it cannot be."""

import torch

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"lect11ext's compiled module does not load with torch {torch.__version__} ({error}); build it again for this "
        "torch, in its source folder: pip install --no-build-isolation --force-reinstall --no-deps ."
    ) from error

__all__ = ["_C"]
