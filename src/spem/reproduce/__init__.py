"""Several runs together: run what is missing, collect tables, CSV and a picture, read them."""

from spem.reproduce.compare import Observer, plan, run_missing
from spem.reproduce.inference import PairedTest, paired_test
from spem.reproduce.results import Line, Run, collect, table, write_csv
from spem.reproduce.statistics import Summary, summarise

__all__ = [
    "Line",
    "Observer",
    "PairedTest",
    "Run",
    "Summary",
    "collect",
    "paired_test",
    "plan",
    "run_missing",
    "summarise",
    "table",
    "write_csv",
]
