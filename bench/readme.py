"""``python -m bench.readme [--write]``: the README's table of speed, from bench/results.

A cell gives the least and the greatest ratio to the best peer among the workloads that a pattern names.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- python -m bench.readme --write -->\n", "<!-- end -->\n"
PROCESSORS = {"Sapphire Rapids": "sapphire-rapids", "Zen 5": "zen5"}
AMX = "-amx"  # of files measured with it, taken where there are no others

# The work, and patterns of workloads: one for each ";", "|" between alternatives.
ROWS = [
    (
        "`gaussian_rsample_kl`, 16k to 4M elements: forward; with the backward",
        ["gaussian_rsample_kl/forward/*", "gaussian_rsample_kl/train/*"],
    ),
    (
        "`reconstruction_loss`, 100k to 8M elements: Bernoulli; continuous",
        ["reconstruction_loss/bernoulli/*", "reconstruction_loss/continuous_bernoulli/*"],
    ),
    (
        "the same: Gaussian with its variance; squared error",
        ["reconstruction_loss/gaussian/*", "reconstruction_loss/squared_error/*"],
    ),
    (
        "`corrupt`, 803k and 4M elements: Gaussian; masking and salt-and-pepper",
        ["corrupt/gaussian/*", "corrupt/masking/*|corrupt/salt_and_pepper/*"],
    ),
    ("`sparse_activation`, 33k to 17M elements: L1; KL", ["sparse_activation/l1/*", "sparse_activation/kl/*"]),
    (
        "`contractive_linear`, 128 × 784 to 64 and 256 units: forward; with the backward",
        ["contractive_linear/forward/*", "contractive_linear/train/*"],
    ),
    (
        "`topk_code`, 32 of 16384, 1024 rows; `sparse_decode` of them: forward; with the backward",
        ["topk_code/*", "sparse_decode/forward/*", "sparse_decode/train/*"],
    ),
    ("`TopKAutoencoder`, a training step, 512 → 16384, 1024 rows", ["TopKAutoencoder/*"]),
    (
        "`hamming_topk` and `hamming_radius`, a million codes of 32 to 256 bits, against faiss: 64 queries; one",
        ["hamming_*/queries64", "hamming_*/queries1"],
    ),
    (
        "LSTM and GRU cells, batch 1 to 8, hidden 64 to 256: forward; with the backward",
        ["*Cell/forward/float32/B1/*|*Cell/forward/float32/B8/*", "*Cell/train/float32/B1/*|*Cell/train/float32/B8/*"],
    ),
    (
        "the same, batch 32 to 256, hidden 256 to 1024",
        [f"*Cell/{way}/float32/B32/*|*Cell/{way}/float32/B256/*" for way in ("forward", "train")],
    ),
    ("bfloat16 cells forward, batch 32 to 256", ["*Cell/forward/bfloat16/*"]),
    (
        "LSTM layer, 64 steps, batch 1, hidden 64 to 512: forward; with the backward",
        ["LSTM/forward/float32/T64/B1/*", "LSTM/train/float32/T64/B1/*"],
    ),
    ("the same, batch 32, hidden 256 and 512", ["LSTM/forward/float32/T64/B32/*", "LSTM/train/float32/T64/B32/*"]),
    ("GRU layer, batch 1", ["GRU/forward/float32/T64/B1/*", "GRU/train/float32/T64/B1/*"]),
    ("the same, batch 32", ["GRU/forward/float32/T64/B32/*", "GRU/train/float32/T64/B32/*"]),
    ("bfloat16 LSTM layer, batch 1", ["LSTM/forward/bfloat16/T64/B1/*", "LSTM/train/bfloat16/T64/B1/*"]),
    ("the same, batch 32", ["LSTM/forward/bfloat16/T64/B32/*", "LSTM/train/bfloat16/T64/B32/*"]),
    (
        "LSTM layer, 32 steps, against the same model in torch ops: forward-mode AD; double backward",
        ["LSTM-jvp/*", "LSTM-double_backward/*"],
    ),
    (
        "time to the first gradients of a compiled LSTM of 512 steps, against torch.nn.LSTMCell in a loop",
        ["LSTM-compilation/T512/*"],
    ),
    (
        "layer norm, peepholes, zoneout, lengths, early reset, against the compiled loop (16 steps, with the "
        "backward), batch 1; batch 32",
        ["*-*/train/float32/T16/B1/*", "*-*/train/float32/T16/B32/*"],
    ),
    (
        "attention forward, 128 to 8192 keys, 64 and 128 columns, float32; bfloat16",
        ["attention/forward/float32/d*", "attention/forward/bfloat16/d*"],
    ),
    ("the same with the backward", ["attention/train/float32/d*", "attention/train/bfloat16/d*"]),
    ("many sequences of 20 to 64 positions", ["attention/*/float32/[0-9]*x*/L*"]),
    (
        "with dropout; a mask's gradient; 3-D input; wider values (with the backward, 1024 keys)",
        ["attention-dropout/*", "attention-mask_gradient/*", "attention-3d/*", "attention-wide_values/*"],
    ),
    ("forward-mode AD, 2048 keys, full; causal", ["attention-jvp/float32/L2048", "attention-jvp/float32/L2048/causal"]),
    (
        "one query, 1024 and 8192 keys, float32; bfloat16",
        ["attention/decode/float32/*", "attention/decode/bfloat16/*"],
    ),
    (
        "one and eight queries, 1024 keys, with the backward, float32; bfloat16",
        ["attention/few_queries/float32/*", "attention/few_queries/bfloat16/*"],
    ),
    (
        "window of 256 of 8192 keys; half of the blocks masked: against our own dense time",
        ["attention/window256/*", "attention/half_mask/*"],
    ),
    (
        "MultiheadAttention, 128 to 2048 positions, inference and training; with weights",
        ["MultiheadAttention/*/L[0-9]*[0-9]", "MultiheadAttention/*/weights"],
    ),
    (
        "additive attention, 512 queries and keys, 256 hidden units: forward; with the backward",
        ["additive_attention/forward/float32/B1/*", "additive_attention/train/float32/B1/*"],
    ),
    (
        "the same, one query in a batch of 32, 128 keys",
        ["additive_attention/forward/float32/B32/*", "additive_attention/train/float32/B32/*"],
    ),
]


def results(processor: str, ending: str = "") -> dict[str, float]:
    """The ratio to the best peer of every workload measured there."""
    found = {}
    for path in sorted((HERE / "results").glob(f"*cpu-2-cores-{processor}{ending}.json")):
        for name, result in json.loads(path.read_text())["results"].items():
            if result["ratios"]:
                found[name] = min(result["ratios"].values())
    return found


def figure(ratio: float) -> str:
    """Rounded once; two digits where a rounded one would hide that the peer is faster."""
    if ratio < 0.995:
        return f"**{ratio:.2f}**"
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


def span(pattern: str, ratios: dict[str, float]) -> str:
    chosen = [r for name, r in ratios.items() if any(fnmatch(name, p) for p in pattern.split("|"))]
    if not chosen:
        return ""
    low, high = figure(min(chosen)), figure(max(chosen))
    return low if low == high else f"{low} to {high}"


def cell(patterns: list[str], processor: str) -> str:
    for ending in ("", AMX):
        ratios = results(processor, ending)
        spans = [span(pattern, ratios) for pattern in patterns]
        if all(spans):
            return "; ".join(spans) + (" (with AMX)" if ending else "")
    return "–"


def table() -> str:
    lines = [f"| work | {' | '.join(PROCESSORS)} |", "| --- | --- | --- |"]
    lines += [f"| {work} | {' | '.join(cell(patterns, p) for p in PROCESSORS.values())} |" for work, patterns in ROWS]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    if parser.parse_args().write:
        before, rest = README.read_text().split(BEGIN)
        README.write_text(before + BEGIN + table() + END + rest.split(END, 1)[1])
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
