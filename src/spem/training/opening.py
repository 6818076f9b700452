"""A run folder opened for training: claimed by one process, planned for all of a run."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from spem.training.claim import Claim, claimed
from spem.training.config import RunConfig
from spem.training.distributed import Team
from spem.training.diverged import DIVERGED
from spem.training.log import NoLog, Progress, RunLog, choose_progress
from spem.training.results import Result
from spem.training.runs import finished, plan_run


class Opened(NamedTuple):
    """What a process trains by."""

    config: RunConfig
    """As planned, the same in all processes."""
    log: RunLog
    claim: Claim | None
    """Of the first process, which alone writes into the folder."""


@contextmanager
def opened(
    config: RunConfig, folder: Path, progress: Progress | None, team: Team
) -> Generator[Opened | Result]:
    """Open a run folder for the length of a `with` block, or find the run finished.

    Raises:
        ValueError: the folder holds another run, a file of it is damaged, the plan cannot be
            carried out, or the processes were asked for different runs.
        HeldError: another process trains in the folder.
    """
    team.require_same("run", [config.id, config.seed])
    with ExitStack() as held:
        result = _finished(config, folder, team)
        if result is not None:
            yield result
            return
        claim = team.alone(lambda: held.enter_context(claimed(folder)))
        result = _finished(config, folder, team)  # by another process, since the first look
        if result is not None:
            yield result
            return
        log = NoLog() if claim is None else RunLog(folder, progress or choose_progress())
        held.callback(log.close)

        def plan() -> dict[str, Any]:
            for leftover in folder.glob(".*.tmp"):  # of a process killed while it wrote
                leftover.unlink()
            if claim is not None and claim.taken_over:
                log.message(claim.taken_over)
            (folder / DIVERGED).unlink(missing_ok=True)  # of a try before this one
            return plan_run(config, folder, log.message, team.size).to_dict()

        yield Opened(RunConfig.from_dict(team.lead(plan)), log, claim)


def _finished(config: RunConfig, folder: Path, team: Team) -> Result | None:
    def look() -> dict[str, Any] | None:
        result = finished(config, folder)
        return None if result is None else asdict(result)

    found = team.lead(look)
    return None if found is None else Result(**found)
