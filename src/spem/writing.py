"""Writing a file that somebody named: whole or not at all, through links, into devices."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file such that a reader finds the old content or the new one, never a part.

    A symbolic link stays one, and what it points to is written; a device or a pipe (`/dev/stdout`)
    is written into, not replaced.

    Args:
        path: Where; its folder must exist.
        content: What.

    Raises:
        OSError: It cannot be written; the error names the file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        target.write_bytes(content)
        return
    try:
        # Of a name that nobody can guess or has planted.
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # As open() would have made it, or as it was.
        umask = os.umask(0)
        os.umask(umask)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~umask
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # a full disk does not say which
        raise
