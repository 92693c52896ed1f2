"""``python -m bench [--only TEXT] [--json FILE]``: runs all benchmarks and prints the table of ratios."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import torch

import lect11ext
from lect11ext._load import _C

from . import PROCESSORS
from .ceilings import CEILINGS

FAMILIES = [
    "autoencoder",
    "corruption",
    "penalties",
    "reconstruction",
    "hashing",
    "sparse_code",
    "recurrent",
    "layers",
    "attention",
    "additive",
    "compilation",
]
HERE = Path(__file__).parent


def seconds_by_turn(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of every workload: seconds a call of every implementation and ceiling, turn by turn, and its work."""
    results: dict[str, dict[str, Any]] = {}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        result = results.setdefault(entry["group"], {"work": info["work"], "turns": defaultdict(dict)})
        seconds = info.get("seconds") or median(entry["stats"]["data"])
        result["turns"][info["turn"]][info["implementation"]] = seconds
    return results


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Medians over the turns: seconds, ratios to the peers, per cent of the ceilings."""
    turns, work = list(result["turns"].values()), result["work"]
    peers = [name for name in turns[0] if name not in CEILINGS and name != "lect11ext"]
    share = {name: median(t[name] / t["lect11ext"] * work[name] / CEILINGS[name].work for t in turns) for name in work}
    return {
        "seconds": {name: median(t[name] for t in turns) for name in turns[0]},
        "ratios": {peer: median(t[peer] / t["lect11ext"] for t in turns) for peer in peers},
        "per_cent": {name: 100 * value for name, value in share.items()},
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Microseconds, the ratio to the best peer, per cent of the product's and of the copy's ceiling."""
    lines = []
    for name, ceiling in CEILINGS.items():
        seconds = [r["seconds"][name] for r in results.values() if name in r["seconds"]]
        if seconds:
            lines.append(f"{name:32} {ceiling.work / median(seconds) / 1e9:8.1f} {ceiling.unit}")
    lines.append(f"\n{'workload':46} {'us':>9} {'best peer':>16} {'ratio':>6} {'% product':>10} {'% copy':>7}")
    for name, r in results.items():
        peer = min(r["ratios"], key=lambda p: r["ratios"][p], default="-")
        product = next((f"{v:.0f}" for k, v in r["per_cent"].items() if k.startswith("product")), "")
        copy = f"{r['per_cent']['copy']:.0f}" if "copy" in r["per_cent"] else ""
        ours = r["seconds"]["lect11ext"] * 1e6
        lines.append(f"{name:46} {ours:9.1f} {peer:>16} {r['ratios'].get(peer, nan):6.2f} {product:>10} {copy:>7}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default="", help="only workloads whose name contains this text, or one of these")
    parser.add_argument("--json", default="out/bench.json", help="where the medians are written")
    args = parser.parse_args()
    out = Path(args.json)
    out.parent.mkdir(parents=True, exist_ok=True)
    raw = out.with_suffix(".raw.json")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]
    command += [str(HERE / f"{family}.py") for family in FAMILIES]
    command += ["--benchmark-quiet", "--benchmark-save-data", f"--benchmark-json={raw}"]
    # Bound to its processor, a thread cannot be put beside another: kernels of virtual machines do that, and halve
    # whatever is measured.
    environment = {"OMP_PROC_BIND": "true", **os.environ, "BENCH_ONLY": args.only}
    if PROCESSORS is not None:
        os.sched_setaffinity(0, PROCESSORS)
    status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        return status
    if not raw.exists():
        parser.error(f"no workload's name contains {args.only!r}; names are those of the table of ratios")
    report = json.loads(raw.read_text())
    raw.unlink()
    results = {name: summary(result) for name, result in seconds_by_turn(report).items()}
    facts = {
        "cpu": report["machine_info"]["cpu"].get("brand_raw", ""),
        "threads": torch.get_num_threads(),
        "capability": _C.cpu_capability(),
        "torch": torch.__version__,
        "lect11ext": lect11ext.__version__,
        "date": report["datetime"],
    }
    out.write_text(json.dumps({**facts, "results": results}, indent=1))
    print(table(results))
    print(f"\nMedians were written to {out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
