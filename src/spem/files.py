"""Safe files: atomic writes, regular files only, JSON with a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, cast


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that readers find the old content or the new, never a part.

    The content reaches the disk before the name does; the folder's entry is synced last, where the
    file system can. Links and devices are not replaced (ValueError).
    """
    require_regular(path, missing_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say which file it was
        raise
    with contextlib.suppress(OSError):  # Windows opens no folder, some mounts sync none
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_regular(path: Path) -> bytes:
    """Read a file; a pipe or a device, which might never end, is refused."""
    require_regular(path.resolve())
    return path.read_bytes()


def require_regular(path: Path, *, missing_ok: bool = False) -> None:
    """Raise ValueError for a link, pipe, device or folder where a file is expected."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if missing_ok:
            return
        raise
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
        raise ValueError(
            f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file. It is left as it "
            "is; name another file."
        )


def canonical_json(values: object) -> bytes:
    """JSON with sorted keys and no spaces; equal values give equal bytes."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def save_json(values: dict[str, Any], path: Path) -> None:
    """Write a table as JSON with the SHA-256 of its canonical form in the field "sha256"."""
    digest = hashlib.sha256(canonical_json(values)).hexdigest()
    text = json.dumps({**values, "sha256": digest}, indent=2, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def load_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a file of `save_json`, without the field "sha256"; ValueError if it is damaged."""
    content = read_regular(path)
    try:
        values = json.loads(content)
        digest = values.pop("sha256")
        whole = digest == hashlib.sha256(canonical_json(values)).hexdigest()
    except Exception as error:  # RecursionError and MemoryError among others
        reason = f"it is not a table with a checksum ({error or type(error).__name__})"
        raise damaged(path, reason, remedy) from error
    if not whole:
        reason = "its SHA-256 does not match (damaged, or edited by hand)"
        raise damaged(path, reason, remedy)
    return cast("dict[str, Any]", values)


def damaged(path: Path, finding: str, remedy: str) -> ValueError:
    """The error for a file with wrong content."""
    return ValueError(f"{path} is damaged: {finding}. {remedy}")
