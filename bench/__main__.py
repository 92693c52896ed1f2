"""``python -m bench [--only TEXT] [--json FILE]``: runs all benchmarks and prints the table of ratios."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

FAMILIES = ["ceilings", "autoencoder", "recurrent"]
HERE = Path(__file__).parent


def medians(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Seconds a call of every implementation, by workload, with the workload's flops and bytes."""
    rounds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    facts: dict[str, dict[str, Any]] = {}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        rounds[entry["group"]][info["implementation"]] += entry["stats"]["data"]
        facts[entry["group"]] = {"flops": info["flops"], "bytes": info["bytes"]}
    return {
        name: {**facts[name], "seconds": {impl: median(data) for impl, data in implementations.items()}}
        for name, implementations in rounds.items()
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Ratios to every peer; per cent of the product's and of the copy's ceiling; microseconds."""
    ceilings = {k: v for k, v in results.items() if k.startswith("ceiling/")}
    lines = []
    for name, r in ceilings.items():
        rate = (r["flops"] or r["bytes"]) / r["seconds"]["eager"] / 1e9
        lines.append(f"{name:32} {rate:8.1f} {'GFLOP/s' if r['flops'] else 'GB/s'}")
    lines.append(f"\n{'workload':46} {'us':>9} {'best peer':>16} {'ratio':>6} {'% product':>10} {'% copy':>7}")
    for name, r in results.items():
        if name in ceilings:
            continue
        seconds = dict(r["seconds"])
        ours = seconds.pop("lect11ext")
        peer = min(seconds, key=lambda impl: seconds[impl])
        dtype = "bfloat16" if "/bfloat16/" in name else "float32"
        product, copy = ceilings.get(f"ceiling/product/{dtype}"), ceilings.get("ceiling/copy/float32")
        per_cent = [
            100 * (r[unit] / ours) / (ceiling[unit] / ceiling["seconds"]["eager"]) if ceiling and r[unit] else None
            for unit, ceiling in (("flops", product), ("bytes", copy))
        ]
        shown = [f"{p:.0f}" if p is not None else "" for p in per_cent]
        lines.append(f"{name:46} {ours * 1e6:9.1f} {peer:>16} {seconds[peer] / ours:6.2f} {shown[0]:>10} {shown[1]:>7}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default="", help="workloads whose name contains this text (the ceilings always run)")
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
    status = subprocess.run(command, env=environment, check=False).returncode
    if status != 0:
        return status
    report = json.loads(raw.read_text())
    raw.unlink()
    results = medians(report)
    machine = report["machine_info"]["cpu"].get("brand_raw", "")
    out.write_text(json.dumps({"cpu": machine, "results": results}, indent=1))
    print(table(results))
    print(f"\nMedians were written to {out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
