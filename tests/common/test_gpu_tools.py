"""What is to be run on a GPU, tried in small on the CPU: there its minutes are few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)


def test_cases_of_every_kernel() -> None:
    done = run("tools/gpu_cases.py", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all kernels: all good\n")


def test_measuring(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ["--device", "cpu", "--small", "--only", "forward/float32/T", "--json", str(out)]
    done = run("-m", "bench.gpu", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["copy"] > 0 and len(report["results"]) == 2
    for result in report["results"].values():
        assert result["ratios"]["lect11ext"]["cudnn"] > 0 and not result["errors"]


def test_what_fails_is_reported(tmp_path: Path) -> None:
    arguments = ["--steps", "sanitize", "--only", "nothing", "--minutes", "1", "--out", str(tmp_path)]
    done = run("tools/gpu_check.py", *arguments, PATH=str(tmp_path))  # without compute-sanitizer
    report = json.loads((tmp_path / "gpu-check.json").read_text())
    assert done.returncode == 1 and report["cases"]["status"] == 0
    assert {"sanitize: memcheck", "sanitize: racecheck, general"} < set(report["failed"])
    assert report["sanitize: memcheck"]["status"] == 127


def test_unknown_steps_are_refused() -> None:
    done = run("tools/gpu_check.py", "--steps", "build,cook")
    assert done.returncode == 2 and "but got ['cook']" in done.stderr
