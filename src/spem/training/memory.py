"""Names that callers still import from here; goes with them."""

from spem.training.step import keep_freed_memory

__all__ = ["keep_freed_memory"]
