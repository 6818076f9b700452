"""What is done in which order and in how much time; nothing here knows of GPUs.

The state lies in one small file, so that the next call, perhaps on another machine, goes on where
this one stopped.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

Status = Literal["open", "done", "failed", "blocked"]
FINAL: tuple[Status, ...] = ("done", "failed")
STATE = "state.json"


@dataclass(frozen=True)
class Stage:
    """A process that does one kind of work.

    Attributes:
        name: Of the stage.
        least: Seconds below which it is not started.
        most: Seconds after which it is cut off within one call, so that the next stages start.
        after: Stages without whose success it is not started.
        group: Stages of one group that are still open share the time that is left.
        calls: How often it may be cut off before that counts as a failure; 0 is any number, for
            work that goes on where it was cut off.
    """

    name: str
    least: float
    after: tuple[str, ...] = ()
    group: str = ""
    calls: int = 0
    most: float = math.inf


class Outcome(NamedTuple):
    """How a process ended."""

    code: int
    cut_off: bool
    note: str = ""


@dataclass
class Record:
    """What is known of a stage."""

    status: Status = "open"
    calls: int = 0
    seconds: float = 0.0
    note: str = ""


@dataclass
class State:
    """What is known of all stages."""

    records: dict[str, Record] = field(default_factory=dict[str, Record])

    def of(self, name: str) -> Record:
        return self.records.setdefault(name, Record())

    def done(self, name: str) -> bool:
        return self.of(name).status == "done"

    def save(self, path: Path) -> None:
        content = {name: asdict(record) for name, record in self.records.items()}
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> "State":
        if not path.exists():
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls({name: Record(**values) for name, values in content.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise SystemExit(
                f"gpu: {path} is damaged ({error}). Delete it to start anew."
            ) from error


Runner = Callable[[Stage, float], Outcome]
"""Runs a stage for at most so many seconds."""


def carry_on(
    stages: Sequence[Stage],
    state: State,
    run: Runner,
    *,
    now: Callable[[], float],
    deadline: float,
    save: Callable[[], None],
    say: Callable[[str], None],
) -> bool:
    """Runs what is open, in order, until all is done or the time is over.

    Args:
        stages: In their order.
        state: Is brought up to date.
        run: Runs a stage.
        now: The clock, in seconds.
        deadline: When everything has to have ended, on that clock.
        save: Called after each change of the state.
        say: Told what happens.

    Returns:
        Whether nothing is left to do.
    """
    for i, stage in enumerate(stages):
        record = state.of(stage.name)
        if record.status in FINAL:
            say(f"{stage.name}: {record.status} before")
            continue
        missing = [name for name in stage.after if not state.done(name)]
        if missing:
            record.status, record.note = "blocked", f"waits for {', '.join(missing)}"
            say(f"{stage.name}: not started, {record.note}")
            save()
            if any(state.of(name).status == "open" for name in missing):
                return False  # an earlier stage goes on in the next call
            continue
        record.status = "open"
        sharing = [s for s in stages[i:] if s == stage or (s.group and s.group == stage.group)]
        sharing = [s for s in sharing if state.of(s.name).status not in FINAL]
        limit = min((deadline - now()) / len(sharing), stage.most)
        if limit < stage.least:
            say(
                f"{stage.name}: not started, {max(limit, 0):.0f} s left of {stage.least:.0f} needed"
            )
            save()
            return False
        say(f"{stage.name}: at most {limit:.0f} s")
        start = now()
        outcome = run(stage, limit)
        _enter(record, stage, outcome, now() - start)
        say(f"{stage.name}: {record.status} after {now() - start:.0f} s {record.note}".rstrip())
        save()
    return all(state.of(stage.name).status != "open" for stage in stages)


def _enter(record: Record, stage: Stage, outcome: Outcome, seconds: float) -> None:
    """Writes down how a stage ended."""
    record.calls += 1
    record.seconds = round(record.seconds + seconds, 1)
    record.note = outcome.note
    if outcome.cut_off:
        if stage.calls and record.calls >= stage.calls:
            record.status = "failed"
            record.note = f"cut off {record.calls} times without an end"
        else:
            record.note = "cut off, goes on in the next call"
    else:
        record.status = "done" if outcome.code == 0 else "failed"
