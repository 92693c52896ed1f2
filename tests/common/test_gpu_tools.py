"""What is to be run on a GPU, tried in small on the CPU: there its minutes are few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shards import BEGUN, DONE, keep_passed, read

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
    assert {"sanitize: memcheck 0/3", "sanitize: racecheck general"} < set(report["failed"])
    assert report["sanitize: memcheck 0/3"]["status"] == 127


def test_shards_go_on_behind_what_broke_off(tmp_path: Path) -> None:
    """Three shards have every test once; one that ends its process is known, and not begun again."""
    lines = ["import os"] + [
        f"def test_{i}(): assert {i} != 7 and {i} != 5 or {i} != 7 and os._exit(3)" for i in range(20)
    ]
    (tmp_path / "test_them.py").write_text("\n".join(lines))
    outcomes: dict[str, str] = {}
    for shard in range(3):
        record = tmp_path / f"{shard}.txt"
        arguments = ["-p", "tests.shards", "--shards", "3", "--shard", str(shard), "--record", str(record)]
        for _ in range(2):
            run("-m", "pytest", str(tmp_path / "test_them.py"), "-p", "no:cacheprovider", "-p", "no:xdist", *arguments)
        found = read(record)
        assert found.pop(DONE) == DONE and not outcomes.keys() & found.keys()
        outcomes |= {name.rsplit("_", 1)[1]: outcome for name, outcome in found.items()}
    assert outcomes == {str(i): {5: BEGUN, 7: "failed"}.get(i, "passed") for i in range(20)}
    kept = {}
    for record in tmp_path.glob("?.txt"):
        keep_passed(record)
        kept |= read(record)
    assert len(kept) == 18 and set(kept.values()) == {"passed"}


def test_unknown_steps_are_refused() -> None:
    done = run("tools/gpu_check.py", "--steps", "build,cook")
    assert done.returncode == 2 and "but got ['cook']" in done.stderr
