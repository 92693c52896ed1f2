"""Prints what the build needs to know of torch, as a CMake list:

version; CUDA version or "none"; folders: of torch, of pybind11's headers, of the headers in NVIDIA packages or "none".
"""

import site
from pathlib import Path

import pybind11
import torch

cuda = torch.version.cuda or "none"
packages = [Path(p) / "nvidia" / f"cu{cuda.split('.')[0]}" / "include" for p in site.getsitepackages()]
headers = next((str(p) for p in packages if p.is_dir()), "none")
print(torch.__version__, cuda, Path(torch.__file__).parent, pybind11.get_include(), headers, sep=";")
