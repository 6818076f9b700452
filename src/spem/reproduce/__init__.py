"""Experiments: lists of runs, what runs them, their tables, figures and report."""

from spem.reproduce.tables import load_runs

__all__ = ["load_runs"]
