"""Several runs together: run what is missing, collect tables, CSV and a picture, read them."""

from spem.reproduce.compare import Observer, plan, run_missing
from spem.reproduce.results import Line, Run, collect, table, write_csv
from spem.reproduce.statistics import (
    PairedDifference,
    Summary,
    paired_difference,
    reading,
    summarise,
)

__all__ = [
    "Line",
    "Observer",
    "PairedDifference",
    "Run",
    "Summary",
    "collect",
    "paired_difference",
    "plan",
    "reading",
    "run_missing",
    "summarise",
    "table",
    "write_csv",
]
