"""Benchmarks: every fused function against its peers, and against what the machine can do, in one run.

``python -m bench`` runs them and prints one table of ratios; ``pytest bench/recurrent.py`` runs a family alone.
"""
