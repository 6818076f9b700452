"""Names that callers still import from here; goes with them."""

import contextlib
from collections.abc import Generator
from pathlib import Path

from spem.training.folder import HeldError
from spem.training.folder import held as claimed

__all__ = ["HeldError", "claimed", "folder_lock"]


@contextlib.contextmanager
def folder_lock(folder: Path) -> Generator[None]:
    """One process at a time."""
    import filelock

    with filelock.FileLock(folder / ".lock"):
        yield
