"""Compiles every CUDA kernel and the programs of tools/ with nvcc alone, and prints each kernel's registers, spilled
bytes and shared memory.

    python3 tools/cuda_report.py [-j N] [--arch 80 90a 100] [--only TEXT]

Needs nvcc and the runtime's headers, and neither a GPU nor torch. The exit status is 1 if a file does not
compile.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ["80", "90a", "100"]  # those of cmake/cuda.cmake
OPTIONS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-I", str(ROOT / "csrc")]
OPTIONS += ["-I", str(ROOT / "tools"), "-c"]


@dataclass
class Kernel:
    name: str
    registers: int = 0
    spilled: int = 0  # bytes stored and loaded
    shared: int = 0


@dataclass
class Result:
    source: Path
    architecture: str
    kernels: list[Kernel]
    failed: bool
    log: str  # what to show: all of it after a failure, else the warnings


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def demangle(text: str) -> str:
    """Replaces the mangled names in a text; as it is where the tool for that is missing."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is not None:
        text = subprocess.run([tool], input=text, capture_output=True, text=True, check=True).stdout
    return text


def shorten(name: str) -> str:
    """A kernel's name without its namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "").replace("lect11ext::", "")
    name = re.sub(r"\((?:int|bool|unsigned int)\)", "", name.replace("cuda::", "")).removeprefix("void ")
    return re.sub(r"\([^()]*\)$", "", name)


def parse(log: str) -> list[Kernel]:
    """Kernels in ptxas' account of them; other device functions, which have no "entry", are left out."""
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(.+)' for", line):
            kernels.append(Kernel(shorten(entry[1])))
        elif not kernels:
            continue
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[-1].spilled = int(spills[1]) + int(spills[2])
        elif used := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(used[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernels[-1].shared = int(shared[1])
    return kernels


def compile_one(nvcc: str, source: Path, architecture: str) -> Result:
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *OPTIONS, target, str(source), "-o", f"{folder}/kernel.o"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = demangle(done.stdout)
    # ptxas says by no more than an "info" that products of a warpgroup wait for one another.
    warnings = "".join(f"{line}\n" for line in log.splitlines() if "warning" in line or "Performance Loss" in line)
    failed = done.returncode != 0
    return Result(source, architecture, parse(log), failed, log if failed else warnings)


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("-j", "--jobs", type=int, default=1, help="compilers at a time (1)")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="architectures (%(default)s)")
    parser.add_argument("--only", default="", help="only files whose path contains this")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found: put it on PATH, or set CUDA_HOME.", file=sys.stderr)
        return 1
    everything = [*sorted(ROOT.glob("csrc/**/cuda/*.cu")), *sorted(ROOT.glob("tools/*.cu"))]
    sources = [path for path in everything if options.only in str(path.relative_to(ROOT))]
    jobs = [(nvcc, source, architecture) for source in sources for architecture in options.arch]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: compile_one(*job), jobs))

    for source in sources:
        mine = [result for result in results if result.source == source]
        print(f"\n{source.relative_to(ROOT)}")
        print(f"  {'':58}" + "".join(f"{'sm_' + r.architecture:>24}" for r in mine))
        print(f"  {'kernel':58}" + f"{'registers spill shared':>24}" * len(mine))
        by_architecture = [{kernel.name: kernel for kernel in result.kernels} for result in mine]
        for name in sorted({name for kernels in by_architecture for name in kernels}):
            cells = ""
            for kernels in by_architecture:
                kernel = kernels.get(name)
                cells += (
                    f"{'-':>24}" if kernel is None else (f"{kernel.registers:>11}{kernel.spilled:>6}{kernel.shared:>7}")
                )
            print(f"  {name:58}{cells}")
        for result in mine:
            if result.log:
                outcome = "does not compile" if result.failed else "compiles with warnings"
                print(f"  sm_{result.architecture} {outcome}:\n{result.log}", file=sys.stderr)
    spilling = sum(kernel.spilled > 0 for result in results for kernel in result.kernels)
    kernels_built = sum(len(result.kernels) for result in results)
    print(f"\n{len(results)} compilations, {kernels_built} kernels, {spilling} with spills.")
    return 1 if any(result.failed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
