"""Names that callers still import from here; goes with them."""

from spem.training.folder import RESULT, Result, write_result

__all__ = ["RESULT", "Result", "write_result"]
