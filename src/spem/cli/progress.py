"""Many runs at once, for people: progress on stderr, then table, answer and the report's path."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from spem.cli.config import check_data
from spem.cli.network import REGISTERED, register_files
from spem.cli.options import RARE
from spem.cli.output import print_json, print_table
from spem.extras import require
from spem.training.config import RunConfig
from spem.training.progress import Silent, choose_progress

if TYPE_CHECKING:
    from spem.reproduce.report import Report
    from spem.reproduce.run import Ended
    from spem.reproduce.tables import Table

LEFT = 3
"""Exit code where a budget was over before every run was finished."""
_WORKERS = "runs at a time, as tasks of Ray"
_ADDRESS = "of a Ray cluster whose machines share the folder"
_RETRY = "train runs that diverged once more, from their start"


class Several(Silent):
    """One line on how far many runs are: in place on a terminal, now and then elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._began = total, 0, time.monotonic()
        self._shares: dict[RunConfig, float] = {}
        self._said: set[str] = set()
        self._output = choose_progress()
        self.stop = self._output.close

    def start(self, config: RunConfig) -> None:
        """A run starts, or resumes."""
        self.running({config: 0})

    def running(self, done: Mapping[RunConfig, float]) -> None:
        """Runs that are under way, and the share that each has done."""
        self._shares = dict(done)
        finished = self._done + sum(done.values())
        text = f"{self._done} of {self._total} runs done"
        text += f", {len(done)} under way" if done else ""
        if finished > 0.05:
            took = time.monotonic() - self._began
            text += f", {roughly(took * (self._total - finished) / finished)} left"
        self._output.step(finished, self._total, text)

    def finish(self, ended: Ended) -> None:
        """A run has ended."""
        from spem.reproduce.tables import run_name

        self._done += 1
        said = ended.error if ended.status == "finished" else f"{ended.status}: {ended.error}"
        self.message(f"run {self._done}/{self._total}: {run_name(ended.config)}: {said}")
        self.running({one: share for one, share in self._shares.items() if one != ended.config})

    def step(self, done: int, total: int, text: str) -> None:
        """A step of the run in this process."""
        self.running(dict.fromkeys(self._shares, done / total))

    def message(self, text: str) -> None:
        """Something worth a line of its own; what every run says is shown once."""
        if text not in self._said:
            self._said.add(text)
            self._output.message(text)


def carry_out(
    planned: Mapping[RunConfig, Sequence[str]],
    runs: Path,
    out: Path,
    *,
    workers: Annotated[int, "N", _WORKERS] = 1,
    address: Annotated[str | None, "ADDRESS", _ADDRESS, RARE] = None,
    per_gpu: Annotated[int, "N", "runs at a time on a GPU", RARE] = 1,
    retry_diverged: Annotated[bool, _RETRY, RARE] = False,
    budget: float | None = None,
    baseline: str | None = None,
    json: bool = False,
) -> int:
    """Train what is missing, write tables and report, and show the answer; the exit code.

    Runs are planned with the experiments they belong to; the others of a comparison are compared
    with the baseline. FloatingPointError, once all is written, if runs failed or diverged.
    """
    for module in ("scipy.stats", "statsmodels", "matplotlib", "jinja2"):  # missed now, not later
        require(module, extra="train", purpose="writing tables and report")
    from spem.reproduce import run
    from spem.reproduce.report import build_report
    from spem.reproduce.tables import read_results, record

    if (out / "runs.csv").exists():
        read_results(out)  # a damaged table is reported before hours of training
    if retry_diverged:
        run.forget_diverged(planned, runs)
    todo = run.missing(planned, runs)
    run.require_weights(todo)
    for data in dict.fromkeys(config.data for config in todo):
        check_data(data)
    out.mkdir(parents=True, exist_ok=True)
    _announce(planned, todo, workers)
    progress, ended = Several(len(todo)), list[run.Ended]()
    try:
        how: Any = {"workers": workers, "address": address, "per_gpu": per_gpu, "budget": budget}
        how["prepare"] = partial(register_files, tuple(REGISTERED))
        ended = run.run_missing(todo, runs, progress, **how)
    finally:  # what is finished is written, also where a signal stopped the rest
        progress.stop()
        failed = {one.config: one.error for one in ended if one.status == run.FAILED}
        problems = record(planned, runs, out, failed=failed, baseline=baseline)
        report = build_report(out) if (out / "runs.csv").exists() else None
    left = sum(one.status == run.STOPPED for one in ended)
    if report is not None:  # what was asked for comes first, whatever else the folder holds
        ids = [config.id for config in planned]
        report.tables.sort(key=lambda table: -table.runs["config"].isin(ids).mean())
    show(report, left=left, json=json)
    if problems:
        sys.stdout.flush()
        many = f"{len(problems)} run" + "s" * (len(problems) > 1)
        lines = "\n".join(f"  {text}" for text in problems)
        raise FloatingPointError(f"{many} did not end well; the others are kept.\n{lines}")
    return LEFT if left else 0


def _announce(planned: Mapping[RunConfig, Any], todo: Sequence[RunConfig], workers: int) -> None:
    """How many runs there are to train, and about how long that takes."""
    from spem.reproduce.run import estimate_seconds

    if not todo:
        print(f"All {len(planned)} runs are finished; nothing is trained.", file=sys.stderr)
        return
    seconds, there = estimate_seconds(todo), len(planned) - len(todo)
    text = f"{len(todo)} run{'s' * (len(todo) > 1)} to train"
    text += f" ({there} more are finished)" if there else ""
    text += "" if seconds is None else f", {roughly(seconds / min(workers, len(todo)))}"
    print(f"{text} on this machine.", file=sys.stderr, flush=True)


def show(report: Report | None, *, left: int = 0, json: bool = False) -> None:
    """Print a report's first table, its answer and its path, or all tables as JSON."""
    tables = [] if report is None else report.tables
    if json:
        names = ("name", "question", "answer", "where", "reference")
        told = [{n: getattr(t, n) for n in names} | {"rows": records(t.frame)} for t in tables]
        page = None if report is None else str(report.page)
        print_json({"report": page, "tables": told, "left": left})
        return
    if not tables:
        print("No run is finished yet.")
    else:
        _print(tables[0])
        print(f"\n{tables[0].answer}\n")
        if others := len(tables) - 1:
            print(f"{others} more table{'s are' if others > 1 else ' is'} in the report.")
    if report is not None:
        print(f"report: {report.page}")
    if left:
        several = f"{left} runs are" if left > 1 else "1 run is"
        print(f"{several} left; the same command resumes from the checkpoints.")


def _print(table: Table) -> None:
    """Print one table, without the columns that only a page has room for."""
    from spem.reproduce.report import MINUS, notes, shown

    text = shown(table).drop(columns=["note", "p", "parameters, paper"], errors="ignore")
    text = text.astype(str).map(lambda cell: cell.replace(MINUS, "-"))
    columns = [name.replace(MINUS, "-") for name in text]
    print_table(columns, text.to_numpy().tolist(), title=f"{table.title}: {table.where}")
    print(*notes(table), sep="\n", end="\n" * bool(notes(table)))


def records(frame: Any) -> list[dict[str, Any]]:
    """The rows of a table for JSON, None where there is nothing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def roughly(seconds: float) -> str:
    """A time as people say it: about 4 s, about 80 s, about 67 min, about 25 h, about 5 years."""
    units = (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48), ("days", 86_400, 730))
    for name, size, most in units:
        if seconds < most * size:
            return f"about {max(1, round(seconds / size))} {name}"
    return f"about {round(seconds / 31_557_600)} years"


def parse_seeds(text: str) -> list[int]:
    """The seeds that "3" (0, 1, 2) or "0,4,7" stand for; "5," is seed 5 alone."""
    parts = text.removesuffix(",").split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or text == "0":
        raise ValueError(f"{text!r} is neither a number of seeds (3) nor a list of them (0,4,7).")
    seeds = list(range(int(text[:7]))) if text.isdigit() else [int(part[:18]) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{text!r} names a seed twice. Name each once.")
    return seeds


def parse_duration(text: str) -> float:
    """Seconds of a time such as 90s, 30m, 1.5h or 45 (seconds)."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?) *([smh]?)", text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is not a time. Write 90s, 30m or 8h.")
    return float(found[1]) * {"m": 60, "h": 3600}.get(found[2], 1)
