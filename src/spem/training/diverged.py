"""Names that callers still import from here; goes with them."""

from pathlib import Path
from typing import NamedTuple

from spem.training.config import RunConfig
from spem.training.folder import read_run

DIVERGED = "result.json"


class Divergence(NamedTuple):
    epoch: int
    message: str


def read_diverged(config: RunConfig, folder: Path) -> Divergence | None:
    """When and why this very run diverged."""
    if not (folder / DIVERGED).exists():
        return None
    run = read_run(folder)
    if run.error is None or (run.config.id, run.config.seed) != (config.id, config.seed):
        return None
    return Divergence(len(run.epochs), run.error)
