"""Loads the compiled module, and says in one sentence what is wrong where it cannot be."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

AGAIN = (
    "build it again for this torch, in its source folder: "
    "pip install --no-build-isolation --force-reinstall --no-deps ."
)

try:
    from . import _C
except ImportError as error:
    folder = Path(__file__).parent
    if not any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        raise ImportError(
            f"there is no compiled module in {folder}: either this is the source folder, which hides the installed "
            "package from a Python that is started in it, or it was never built (make demo, or pip install "
            "--no-build-isolation --editable .)"
        ) from error
    raise ImportError(
        f"lect11ext's compiled module does not load with torch {torch.__version__} ({error}); {AGAIN}"
    ) from error


def minor(version: str) -> list[str]:
    return version.split(".")[:2]


# Another minor version may find every symbol and still lay out its classes otherwise.
if minor(_C.build_info()["torch"]) != minor(torch.__version__):
    raise ImportError(
        f"lect11ext's compiled module was built against torch {_C.build_info()['torch']} and this is torch "
        f"{torch.__version__}; {AGAIN}"
    )

__all__ = ["_C"]
