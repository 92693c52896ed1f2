"""``python -m lect11ext [--json]``: versions, the compiler, CPU capability and backends; paste it into a bug report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

import torch

from . import __version__
from ._load import _C

# Column of the table: dispatch key. vmap's rules stand under the key of functorch.
BACKENDS = {
    "CPU": "CPU",
    "CUDA": "CUDA",
    "Meta": "Meta",
    "Autograd": "Autograd",
    "AutocastCPU": "AutocastCPU",
    "AutocastCUDA": "AutocastCUDA",
    "vmap": "FuncTorchBatched",
}


def backends_of(op: str) -> list[str]:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name, key in BACKENDS.items() if has_kernel(op, key)]


def collect() -> dict[str, Any]:
    """Everything that is reported, ready for JSON."""
    ops = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lect11ext::"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "lect11ext": __version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "build": _C.build_info(),
        "cpu_capability": _C.cpu_capability(),
        "best_cpu_capability": _C.best_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("LECT11EXT_")},
        "ops": {op.removeprefix("lect11ext::"): backends_of(op) for op in ops},
    }


def describe_cuda(report: dict[str, Any]) -> str:
    build, torch_cuda = report["build"], report["torch_cuda"]
    if build["cuda"]:
        return f"built for {build['cuda_architectures']}"
    if torch_cuda is None:
        return "not built, this is a CPU-only build: torch itself was built without CUDA."
    return (
        f"not built, this is a CPU-only build although torch has CUDA {torch_cuda}: "
        "nvcc was not found when it was compiled, or LECT11EXT_CUDA=0 was set."
    )


def describe(report: dict[str, Any]) -> str:
    build = report["build"]
    other = "" if report["torch"] == build["torch"] else " (not the one that lect11ext was built for)"
    lines = {
        "lect11ext": f"{report['lect11ext']}, built for torch {build['torch']} by {build['compiler']}",
        "torch": report["torch"] + other,
        "Python": f"{report['python']}, {report['platform']}",
        "CPU": f"{report['cpu_capability']} in use, best here {report['best_cpu_capability']}; "
        f"{report['threads']} threads; compiled for {build['cpu_builds']}",
        "CUDA": describe_cuda(report),
        "GPU": ", ".join(report["gpus"]) or "none that torch sees",
    }
    if report["environment"]:
        lines["set"] = ", ".join(f"{name}={value}" for name, value in report["environment"].items())
    width = max(map(len, report["ops"]))
    table = ["  ".join([" " * width, *BACKENDS])]
    for op, backends in report["ops"].items():
        marks = ("yes" if name in backends else "-" for name in BACKENDS)
        table.append(
            op.ljust(width) + "".join(f"  {mark:>{len(name)}}" for mark, name in zip(marks, BACKENDS, strict=True))
        )
    return "\n".join([*(f"{name:10} {text}" for name, text in lines.items()), "", *table])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lect11ext", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for machines")
    report = collect()
    try:
        print(json.dumps(report, indent=2) if parser.parse_args().json else describe(report), flush=True)
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
