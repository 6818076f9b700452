"""The runs of a grid while they train: a live table on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TYPE_CHECKING, Any

from spem.cli.progress import LIVE_SECONDS, PLAIN_SECONDS
from spem.extras import require

if TYPE_CHECKING:
    from spem.reproduce.board import Board, Run
    from spem.training import RunConfig


class GridTable:
    """Shows how a grid stands, on standard error.

    On a terminal there is a row for every run in progress, under the totals; elsewhere a line for
    each run that begins or ends and one every half minute.
    """

    def __init__(self) -> None:
        self._shown = time.monotonic()
        self._said: set[str] = set()
        self._live: Any = None
        if sys.stderr.isatty():
            require("rich.live", extra="train", purpose="the live table")
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True, highlight=False)
            self._live = Live(console=console, transient=True, auto_refresh=False)
            self._live.start()

    def event(self, kind: str, config: "RunConfig", text: str) -> None:
        """Say what happened to a run; a reason that many runs share is said once."""
        if kind == "stopped" or (kind == "start" and self._live is not None):
            return
        if kind in ("failed", "diverged"):
            if text in self._said:
                text = "for the same reason"
            self._said.add(text)
        if kind == "held":
            text = "another process has it; it is looked at again at the end"
        self._say(f"{kind:<8} {run_name(config)}" + (f": {text}" if text else ""))

    def show(self, board: "Board") -> None:
        """Draw the table anew, or print a line, if it is time."""
        pause = PLAIN_SECONDS if self._live is None else LIVE_SECONDS
        if time.monotonic() - self._shown < pause:
            return
        self._shown = time.monotonic()
        if self._live is None:
            self._say("; ".join([totals(board), *(_standing(run) for run in board.running)]))
        else:
            self._live.update(_drawn(board), refresh=True)

    def close(self) -> None:
        """Take the table away."""
        if self._live is not None:
            self._live.stop()

    def _say(self, text: str) -> None:
        if self._live is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._live.console.print(text, markup=False, soft_wrap=True)


def run_name(config: "RunConfig") -> str:
    """What a run is called in a line: data set, depth, attention, seed."""
    model, name = config.model, config.data.name.rpartition("/")[2]
    special = [f"start {model.branch_start:g}"] if model.branch_start is not None else []
    special += [f"penalty {config.optim.penalty:g}"] if config.optim.penalty != 0.1 else []
    special += [config.runtime.precision] if config.runtime.precision != "fp32" else []
    more = f" ({', '.join(special)})" if special else ""
    return f"{name} {model.depth} {model.attention}{more}, seed {config.seed}"


def totals(board: "Board") -> str:
    """The whole grid in one line."""
    from spem.training.log import duration

    parts = [f"{board.finished} of {board.total} runs done", f"{len(board.running)} running"]
    counts = {
        "to come": board.waiting,
        "diverged": board.diverged,
        "failed": board.failed,
        "held by other processes": board.held,
    }
    parts += [f"{count} {what}" for what, count in counts.items() if count]
    if board.stopping:
        parts.append(f"stopping ({board.stopping}), writing checkpoints")
    elif board.seconds_left is not None:
        parts.append(f"about {duration(board.seconds_left)} left in all")
    return ", ".join(parts)


def _standing(run: "Run") -> str:
    if run.status is None:
        return f"{run_name(run.config)}: starting"
    return f"{run_name(run.config)}: {run.status.text}"


def _cells(run: "Run") -> list[str]:
    from spem.training.log import duration

    status = run.status
    accuracy = "" if run.accuracy is None else f"{run.accuracy:.2f}"
    if status is None:
        return [run_name(run.config), "starting", "", accuracy, "", ""]
    return [
        run_name(run.config),
        f"{status.epoch + 1}/{status.epochs}",
        f"{status.step}/{status.steps}",
        accuracy,
        f"{status.images_per_second:.0f}",
        duration(status.seconds_left),
    ]


def _drawn(board: "Board") -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    for column in ("epoch", "step", "accuracy %", "images/s", "left"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in board.running:
        # Text, because a spec may hold brackets that rich would take for markup.
        table.add_row(*(Text(cell) for cell in _cells(run)))
    return Group(table, Text(totals(board)))
