"""Reading data files whole, and comparing them with a known sum."""

import hashlib
from collections.abc import Sequence
from pathlib import Path


def read_files(paths: Sequence[Path], *, sha256: str | None = None) -> list[bytes]:
    """Reads files and, if a sum is given, compares it with that of all their bytes in a row.

    Args:
        paths: The files, in the order they are summed in.
        sha256: Expected SHA-256 in hex; None checks nothing.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The sum is not 64 hex digits, or is not that of the files.
    """
    if sha256 is not None:
        check_sum_text(sha256)
    contents = [path.read_bytes() for path in paths]
    if sha256 is not None:
        digest = hashlib.sha256()
        for content in contents:
            digest.update(content)
        if digest.hexdigest() != sha256.lower():
            raise ValueError(
                f"{describe(paths)}: SHA-256 is {digest.hexdigest()}, expected {sha256.lower()}. "
                "The data is damaged or not the expected one: fetch it again, or correct sha256=."
            )
    return contents


def check_sum_text(sha256: str) -> None:
    """Raises ValueError unless the text is 64 hex digits."""
    if len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef"):
        raise ValueError(f"sha256={sha256!r} is not a SHA-256 sum. Give its 64 hex digits.")


def describe(paths: Sequence[Path]) -> str:
    """Names one or a few files in full, many by the first, the last and their number."""
    if len(paths) <= 6:
        return ", ".join(str(path) for path in paths)
    return f"{paths[0]} ... {paths[-1]} ({len(paths)} files)"
