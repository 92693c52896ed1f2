"""Compiles every .cu file of csrc for the host, against the stand-in headers, into one shared library."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
# A misaligned vector access works on the host and stops a GPU: the sanitizer stops here too.
SANITIZE = ["-fsanitize=alignment,bounds,shift,null,signed-integer-overflow", "-fno-sanitize-recover=all"]
# `make sanitize` runs Python itself under AddressSanitizer, which then sees reads beyond tensors and shared memory.
# Not of the stacks: fibers leave theirs without a word.
if "address" in os.environ.get("SANITIZE", "").split(","):
    SANITIZE += ["-fsanitize=address", "--param=asan-stack=0"]
# Warnings are errors: what g++ doubts in a kernel is worth a look. Unknown to it is `#pragma unroll`;
# a compiler before GCC 4.6 passed aligned arguments otherwise, which is of no concern.
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
# Fibers jump from stack to stack, which a fortified longjmp takes for a mistake.
OPTIONS = ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-fPIC"]
FLAGS = [*OPTIONS, "-DLECT11EXT_SM90A", *WARNINGS, *SANITIZE, "-I", str(HERE / "include"), "-I", str(CSRC)]


LIBRARY = "libkernels_on_host.so"
JOBS = 2  # compilers at a time, of up to 1 GiB each


def build(folder: Path) -> Path:
    """Builds into ``folder`` and returns the library's path."""
    compiler = os.environ.get("CXX", "g++")
    own = [HERE / name for name in ("selftest.cu", "entry.cpp", "emulator.cpp", "hopper.cpp")]
    sources = [*sorted(CSRC.glob("**/cuda/*.cu")), *own]

    def compile_one(source: Path) -> Path:
        built = folder / f"{source.parent.parent.name}_{source.stem}.o"
        subprocess.run([compiler, *FLAGS, "-x", "c++", "-c", source, "-o", built], check=True)
        return built

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, sources))
    # Under another name until it is whole.
    part = folder / f"{LIBRARY}.part"
    subprocess.run([compiler, "-shared", *SANITIZE, *objects, "-o", part, "-pthread"], check=True)
    return part.rename(folder / LIBRARY)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    print(build(target))
