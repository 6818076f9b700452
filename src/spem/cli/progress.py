"""Many runs at once, for people: progress on stderr, then table, answer and the report's path."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem.cli.output import print_json, print_table
from spem.extras import require

if TYPE_CHECKING:
    from spem.reproduce.report import Report
    from spem.reproduce.run import Ended
    from spem.reproduce.tables import Table
    from spem.training import RunConfig
    from spem.training.progress import Status

LEFT = 3
"""Exit code where a budget was over before every run was finished."""


class Several:
    """One line on how far many runs are: in place on a terminal, now and then elsewhere."""

    def __init__(self, total: int) -> None:
        from spem.training.progress import LiveBar, choose_progress

        self._total, self._done = total, 0
        self._shares: dict[Any, float] = {}
        self._said: set[str] = set()
        self._config: RunConfig | None = None
        self._began = time.monotonic()
        self._output = choose_progress()
        self._live = isinstance(self._output, LiveBar)

    def start(self, config: RunConfig) -> None:
        """A run begins, or goes on."""
        self._config = config
        self._show()

    def running(self, done: Mapping[RunConfig, float]) -> None:
        """Runs that are under way in other processes, and the share that each has done."""
        self._shares = dict(done)
        self._show()

    def finish(self, ended: Ended) -> None:
        """A run has ended."""
        self._done += 1
        self._shares.pop(ended.config, None)
        said = ended.error if ended.status == "finished" else f"{ended.status}: {ended.error}"
        from spem.reproduce.tables import run_name

        self.message(f"run {self._done}/{self._total}: {run_name(ended.config)}: {said}")
        self._show()

    def due(self) -> bool:
        """Whether it is time for another `step`."""
        return self._output.due()

    def step(self, status: Status) -> None:
        """Progress within an epoch of the run in this process."""
        done, all_steps = status.epoch * status.steps + status.step, status.epochs * status.steps
        self._shares = {self._config: done / all_steps}
        self._show()

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """An epoch is complete: nothing, the run's own `metrics.jsonl` has it."""

    def message(self, text: str) -> None:
        """Something worth a line of its own; what every run says is shown once."""
        if text in self._said:
            return
        self._said.add(text)
        self._output.message(text)

    def close(self) -> None:
        """One run has ended; the line stays for the next."""
        self._shares = {}

    def stop(self) -> None:
        """No more runs: take the line away."""
        self._output.close()

    def _show(self) -> None:
        share = sum(self._shares.values())
        text = f"{self._done} of {self._total} runs done"
        if self._shares:
            text += f", {len(self._shares)} under way"
        if self._done + share > 0.05:
            took = time.monotonic() - self._began
            left = took * (self._total - self._done - share) / (self._done + share)
            text += f", {roughly(left)} left"
        if self._live or self._output.due():
            self._output.show(self._done + share, self._total, text)


def carry_out(
    planned: Mapping[RunConfig, Sequence[str]],
    runs: Path,
    out: Path,
    *,
    baseline: str | None = None,
    workers: int = 1,
    address: str | None = None,
    per_gpu: int = 1,
    budget: float | None = None,
    retry_diverged: bool = False,
    json: bool = False,
) -> int:
    """Train what is missing, write tables and report, and show the answer.

    Returns:
        The exit code: 0, or `LEFT` where the budget was over before every run was finished.

    Raises:
        FileNotFoundError: The weights that a run starts from are not here.
        FloatingPointError: Runs failed or diverged; the others are trained and in the tables.
        Interrupted: A signal stopped the runs; what is finished is in the tables.
        OSError: A file cannot be written.
        ValueError: A file of the results folder is damaged.
    """
    for module in ("scipy.stats", "statsmodels", "matplotlib", "jinja2"):  # missed now, not later
        require(module, extra="train", purpose="tables and report")
    from spem.reproduce.report import build_report
    from spem.reproduce.run import (
        FAILED,
        STOPPED,
        Ended,
        forget_diverged,
        missing,
        require_weights,
        run_missing,
    )
    from spem.reproduce.tables import record, require_tables

    out.mkdir(parents=True, exist_ok=True)
    require_tables(out)
    if retry_diverged:
        forget_diverged(planned, runs)
    todo = missing(planned, runs)
    require_weights(todo)
    _announce(planned, todo, workers)
    progress, ended = Several(len(todo)), list[Ended]()
    interrupted: KeyboardInterrupt | None = None
    try:
        ended = run_missing(
            todo,
            runs,
            progress,
            workers=workers,
            address=address,
            per_gpu=per_gpu,
            budget=budget,
        )
    except KeyboardInterrupt as stop:
        interrupted = stop
    finally:
        progress.stop()
    failed = {one.config: one.error for one in ended if one.status == FAILED}
    problems = record(planned, runs, out, failed=failed, baseline=baseline)
    report = build_report(out) if (out / "runs.csv").exists() else None
    if interrupted is not None:
        raise interrupted
    left = sum(one.status == STOPPED for one in ended)
    if report is not None:
        show(report, left=left, json=json)
    else:  # the budget was over before the first run was
        print_json({"report": None, "tables": [], "left": left}) if json else print(
            "No run is finished yet."
        )
    if left and not json:
        print(f"{left} runs are left; the same command goes on from their checkpoints.")
    if problems:
        sys.stdout.flush()
        many = f"{len(problems)} run" + ("s" if len(problems) > 1 else "")
        lines = "\n".join(f"  {text}" for text in problems)
        text = f"{many} did not end well; the others are kept.\n{lines}"
        raise FloatingPointError(text)
    return LEFT if left else 0


def _announce(planned: Mapping[RunConfig, Any], todo: Sequence[RunConfig], workers: int) -> None:
    """How many runs there are to train, and about how long that takes."""
    if not todo:
        print(f"All {len(planned)} runs are finished; nothing is trained.", file=sys.stderr)
        return
    from spem.reproduce.run import estimate_seconds

    seconds = estimate_seconds(todo)
    took = "" if seconds is None else f", {roughly(seconds / min(workers, len(todo)))}"
    there = len(planned) - len(todo)
    done = f" ({there} more are finished)" if there else ""
    print(f"{len(todo)} runs to train{done}{took} on this machine.", file=sys.stderr, flush=True)


def show(report: Report, *, left: int = 0, json: bool = False) -> None:
    """Print the table and the answer of a report's first screen, and where the report lies."""
    table = report.headline
    if json:
        print_json(_document(report) | {"left": left})
        return
    if table is None:
        print(f"No run is finished yet.\nreport: {report.page}")
        return
    print_report_table(table)
    print(f"\n{table.answer}\n")
    if len(report.tables) > 1:
        others = len(report.tables) - 1
        print(f"{others} more table{'s are' if others > 1 else ' is'} in the report.")
    print(f"report: {report.page}")


def print_report_table(table: Table) -> None:
    """Print one table, without the columns that only a page has room for."""
    from spem.reproduce.report import MINUS, notes, shown

    text = shown(table).rename(columns=lambda name: name.replace(MINUS, "-"))
    text = text.drop(columns=[n for n in ("note", "p", "parameters, paper") if n in text])
    rows = [[str(cell).replace(MINUS, "-") for cell in row] for row in text.to_numpy().tolist()]
    right = {"verdict", "paper's number", ""}
    align = "".join("l" if name in right else "r" for name in text.columns)
    print_table(list(text.columns), rows, align=align, title=f"{table.title}: {table.where}")
    for note in notes(table):
        print(note)


def _document(report: Report) -> dict[str, Any]:
    return {
        "report": str(report.page),
        "tables": [
            {
                "name": table.name,
                "question": table.question,
                "answer": table.answer,
                "where": table.where,
                "reference": table.reference,
                "rows": records(table.frame),
            }
            for table in report.tables
        ],
    }


def records(frame: Any) -> list[dict[str, Any]]:
    """The rows of a table for JSON, None where there is nothing."""
    import pandas as pd

    return [
        {key: None if pd.isna(value) else value for key, value in row.items()}
        for row in frame.astype(object).to_dict("records")
    ]


def roughly(seconds: float) -> str:
    """A time as people say it.

    >>> [roughly(s) for s in (4, 80, 4000, 90_000, 146_403_278)]
    ['about 4 s', 'about 80 s', 'about 67 min', 'about 25 h', 'about 5 years']
    """
    units = (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48), ("days", 86_400, 730))
    for name, size, most in units:
        if seconds < most * size:
            return f"about {max(1, round(seconds / size))} {name}"
    return f"about {round(seconds / 31_557_600)} years"


def parse_seeds(text: str) -> list[int]:
    """The seeds that "3" (0, 1, 2) or "0,4,7" stand for.

    Raises:
        ValueError: The text is neither.

    >>> parse_seeds("3"), parse_seeds("0,4,7"), parse_seeds("5,")
    ([0, 1, 2], [0, 4, 7], [5])
    """
    if text.isascii() and text.isdigit():
        return list(range(int(text[:7])))
    parts = text.removesuffix(",").split(",")
    if all(part.isascii() and part.isdigit() for part in parts):
        return [int(part[:18]) for part in parts]
    raise ValueError(f"{text!r} is no number of seeds (3) and no list of them (0,4,7).")


def parse_duration(text: str) -> float:
    """Seconds of a time such as 90s, 30m, 1.5h or 45 (seconds).

    Raises:
        ValueError: The text is no such time.

    >>> parse_duration("30m"), parse_duration("1.5h"), parse_duration("45")
    (1800.0, 5400.0, 45.0)
    """
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?) *([smh]?)", text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is no time. Write 90s, 30m or 8h.")
    return float(found[1]) * {"m": 60, "h": 3600}.get(found[2], 1)
