"""Benchmarks: every fused function against its peers, and against what the machine can do, in one run.

``python -m bench`` runs them and prints one table of ratios; ``pytest bench/recurrent.py`` runs a family alone.
"""

import os

# Where OMP_PROC_BIND is set, importing torch binds this thread to one processor, and a child would have no other.
PROCESSORS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def is_chosen(name: str, only: str) -> bool:
    """Whether a workload's name contains the text of ``--only``, or one of its texts between commas."""
    return any(text in name for text in only.split(","))


def name_of(dtype: object) -> str:
    """A torch.dtype's, as workloads are named."""
    return str(dtype).removeprefix("torch.")
