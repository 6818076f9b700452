"""Names that callers still import from here; goes with them."""

from pathlib import Path
from typing import Any

from spem.data.folder import decode as _decode


def decode(label: str, data: bytes | Path, pillow: Any = None) -> Any:
    """As `spem.data.folder.decode`."""
    return _decode(label, data)
