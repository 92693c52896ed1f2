"""``make gpu-check``: builds for the GPU at hand, tests, sanitizes and measures all CUDA kernels, and writes one JSON.

    python tools/gpu_check.py [--only TEXT] [--steps build,kernels,tests,general,sanitize,bench] [--minutes 9]
                              [--out DIR] [--go-on]

Needs no network: the Python that runs it has torch with CUDA, pybind11, CMake, Ninja and pytest; nvcc is on the path.
``--only`` names the part of tests' and workloads' names that is wanted (``GPU_ONLY=attention make gpu-check``). What
does not fit the minutes is left out, and said to be; ``--go-on`` begins behind the tests of an earlier session, whose
``--out`` has come along (with as many processors). The kernels' own check comes before everything that imports
torch, and runs while the extension is still being built.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.shards import BEGUN, DONE, keep_passed, read  # noqa: E402

STEPS = ["build", "kernels", "tests", "general", "sanitize", "bench"]
SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
PROGRAMS_BUILT = ROOT / "out" / "programs"
PEERS = ROOT / "out" / "peers"  # packages that are measured against, where `make gpu-peers` has put them
TAIL = 4000  # characters of a command's output that are kept in the JSON; all of it goes to a file
RESERVE = 15.0  # seconds at the end
GRACE = 8.0  # seconds to say what has been done
MOST_SHARDS = 14  # processes of pytest
SANITIZER_SHARES = 3  # processes of a sanitizer, each with a share of the cases
MOST_RESTARTS = 8  # of one of them, behind a test that took its process along
GENERAL = {"LECT11EXT_ATTENTION_HOPPER": "0"}  # without attention's kernels of sm_90a
# Programs that need no torch, each with the kernels that it tries.
ATTENTION = [
    *(f"attention/cuda/dot_product_{name}.cu" for name in ("forward", "backward", "hopper_forward", "hopper_backward")),
    "common/cuda/tensor_map.cu",
]
PROGRAMS = {
    "attention_on_gpu": ATTENTION,
    "float_attention_on_gpu": ATTENTION,
    "layer_on_gpu": [f"recurrent/cuda/layer{name}.cu" for name in ("", "_backward", "_dataflow", "_dataflow_backward")],
    "elementwise_on_gpu": [
        *(f"autoencoder/cuda/{name}.cu" for name in ("variational", "corruption", "penalties", "reconstruction")),
        *(f"autoencoder/cuda/{name}.cu" for name in ("sparse_code_topk", "hashing_search")),
        *(f"recurrent/cuda/{name}_cell.cu" for name in ("lstm", "gru")),
    ],
}
NVCC = ["nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a"]
NVCC += ["-DLECT11EXT_SM90A", "-I", "csrc", "-I", "tools"]


@dataclass
class Run:
    """The commands of a session, what came of them, and how long is left."""

    out: Path
    only: str
    ends: float
    goes_on: bool
    report: dict[str, Any] = field(default_factory=dict)
    writing: threading.Lock = field(default_factory=threading.Lock)

    def left(self) -> float:
        return self.ends - time.monotonic()

    def command(self, name: str, command: list[str], share: float = 1.0, **environment: str) -> int:
        """Runs it, in at most this share of what is left. Its output goes to a file, its end into the report."""
        limit = max(1.0, share * (self.left() - RESERVE))
        begin, log = time.monotonic(), self.out / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}.log"
        with log.open("w") as file:
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{PEERS}", **environment},
                    stdout=file, stderr=subprocess.STDOUT,
                )  # fmt: skip
                status = _wait(process, limit)
            except OSError as error:
                file.write(f"{error}\n")
                status = 127
        seconds = round(time.monotonic() - begin, 1)
        tail = log.read_text(errors="replace")[-TAIL:]
        print(f"{name}: status {status} after {seconds} s", flush=True)
        with self.writing:
            self.report[name] = {"status": status, "seconds": seconds, "tail": tail}
            self.write()
        return status

    def write(self) -> None:
        (self.out / "gpu-check.json").write_text(json.dumps(self.report, indent=1))


def _wait(process: subprocess.Popen[bytes], limit: float) -> int:
    """Its status, or that of `timeout`: pytest still says what has failed where it is interrupted, and not killed."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return 124


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def build(run: Run) -> None:
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    status = run.command(
        "build", python("setup.py", "--quiet", "build_ext", "--inplace"), share=0.6,
        LECT11EXT_CUDA="1", LECT11EXT_CUDA_ARCHITECTURES="90a", MAX_JOBS=jobs,
    )  # fmt: skip
    if status != 0:
        sys.exit(f"the build failed: see {run.out}/build.log")


def kernels(run: Run) -> None:
    """Attention's two families of kernels, its kernels of floats, and a layer's paths, against one another, and the
    times of what the memory binds, without torch."""
    PROGRAMS_BUILT.mkdir(parents=True, exist_ok=True)

    def wanted(name: str) -> bool:
        return run.only in " ".join([name, *(kernel.split("/")[0] for kernel in PROGRAMS[name])])

    def compile_kernel(kernel: str) -> None:
        run.command(f"kernels: {kernel}", [*NVCC, "-c", f"csrc/{kernel}", "-o", str(objects[kernel])], share=0.4)

    names = [name for name in PROGRAMS if wanted(name)]
    missing = [name for name in names if not (PROGRAMS_BUILT / name).exists()]  # others came along
    objects = {kernel: PROGRAMS_BUILT / f"{Path(kernel).stem}.o" for name in missing for kernel in PROGRAMS[name]}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_kernel, objects))
    for name in names:
        program = PROGRAMS_BUILT / name
        if name in missing:
            needed = [str(objects[kernel]) for kernel in PROGRAMS[name]]
            run.command(f"kernels: {name}", [*NVCC, f"tools/{name}.cu", *needed, "-o", str(program)], share=0.4)
        if program.exists():
            run.command(f"kernels: run {name}", [str(program)], share=0.4)


def tests(run: Run, name: str = "tests", pattern: str = "**/test_*.py", **environment: str) -> None:
    """The tests with their tensors on the GPU, by several processes (tests/shards.py); none waits for ever where
    pytest-timeout is."""
    files = [f.relative_to(ROOT) for f in sorted((ROOT / "tests").glob(pattern)) if "cuda_on_host" not in f.parts]
    files = [f for f in files if run.only in str(f)]
    if not files:
        return
    shards = max(1, min(MOST_SHARDS, (os.cpu_count() or 2) - 2))
    arguments = ["-q", "-m", "not slow and not cpu", "-p", "no:cacheprovider", "-p", "tests.shards", "--no-header"]
    arguments += ["--continue-on-collection-errors"]  # one file's is not to cost all others their minutes
    arguments += ["--tb=short", "--device", "cuda", "--shards", str(shards)]
    if importlib.util.find_spec("xdist"):
        arguments += ["-p", "no:xdist"]
    if importlib.util.find_spec("pytest_timeout"):
        arguments += ["--timeout", "45", "--timeout-method", "thread"]
    ends, folder = time.monotonic() + 0.75 * (run.left() - RESERVE), run.out / name
    if not run.goes_on:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    for record in folder.glob("*.txt"):
        keep_passed(record)

    def one(shard: int) -> dict[str, str]:
        record = folder / f"{shard}.txt"
        for restart in range(MOST_RESTARTS):
            own = ["--shard", str(shard), "--record", str(record)]
            run.command(f"{name}/{shard}-{restart}", python("-m", "pytest", *map(str, files), *arguments, *own),
                        (ends - time.monotonic()) / max(1.0, run.left() - RESERVE),
                        OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1", **environment)  # fmt: skip
            if DONE in read(record) or time.monotonic() >= ends:
                break
        return read(record)

    with ThreadPoolExecutor(shards) as pool:
        records = list(pool.map(one, range(shards)))
    finished = all(DONE in record for record in records)
    outcomes = {test: outcome for record in records for test, outcome in record.items() if test != DONE}
    failed = sorted(test for test, outcome in outcomes.items() if outcome in ("failed", BEGUN))
    run.report[name] = {
        "status": 0 if finished and not failed else 1,
        **Counter(outcomes.values()),
        "failed or broken off": failed,
        "all were begun": finished,
    }
    print(f"{name}: {dict(Counter(outcomes.values()))}{'' if finished else ', and not all were begun'}", flush=True)


def general(run: Run) -> None:
    """Attention's tests once more, with the kernels for all devices where those of sm_90a would be taken."""
    if run.only in "attention":
        run.command("general: cases", python("tools/gpu_cases.py", "--only", "attention"), 0.3, **GENERAL)
        tests(run, "general", "attention/test_dot_product*.py", **GENERAL)


def sanitize(run: Run) -> None:
    """A small case of every kernel under each tool; attention's without the kernels of sm_90a too."""
    run.command("cases", python("tools/gpu_cases.py", "--only", run.only), 0.3)
    shares = [f"{i}/{SANITIZER_SHARES}" for i in range(SANITIZER_SHARES)]
    jobs = [(tool, run.only, share, {}) for tool in SANITIZERS for share in shares]
    jobs += [(tool, "attention bf16", "0/1", GENERAL) for tool in SANITIZERS]

    def one(job: tuple[str, str, str, dict[str, str]]) -> None:
        tool, only, share, environment = job
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "60"]
        command += python("tools/gpu_cases.py", "--only", only, "--share", share)
        label = f"sanitize: {tool} {'general' if environment else share}"
        run.command(label, command, 0.5, OMP_NUM_THREADS="2", **environment)

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(one, jobs))


def bench(run: Run) -> None:
    seconds = max(1.0, run.left() - 3 * RESERVE)
    run.command(
        "bench",
        python("-m", "bench.gpu", "--only", run.only, "--seconds", f"{seconds:.0f}",
               "--json", str(run.out / "gpu-bench.json")),
    )  # fmt: skip
    measured = run.out / "gpu-bench.json"
    if measured.exists():
        run.report["measured"] = json.loads(measured.read_text())
        measured.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=os.environ.get("GPU_ONLY", ""))
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-check")
    parser.add_argument("--go-on", action="store_true", help="leave out tests that have passed by the records in --out")
    options = parser.parse_args()
    wanted = options.steps.split(",")
    if unknown := set(wanted) - set(STEPS):
        parser.error(f"--steps must be of {STEPS}, but got {sorted(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options.out.resolve(), options.only, time.monotonic() + 60 * options.minutes, options.go_on)
    if shutil.which("git") is not None:  # a tree may have come without
        command = ["git", "rev-parse", "HEAD"]
        run.report["commit"] = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    with ThreadPoolExecutor(2) as pool:  # the kernels' own check needs nothing that is built
        begun = [pool.submit(step, run) for name, step in (("kernels", kernels), ("build", build)) if name in wanted]
        for future in begun:
            future.result()
    for name, step in (("tests", tests), ("general", general), ("sanitize", sanitize), ("bench", bench)):
        if name not in wanted:
            continue
        if run.left() < 2 * RESERVE:
            run.report[name] = "left out: no time"
            continue
        step(run)
    failed = [n for n, r in run.report.items() if isinstance(r, dict) and r.get("status", 0) != 0]
    run.report["failed"] = failed
    run.write()
    print(f"written to {run.out / 'gpu-check.json'}; failed: {failed or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
