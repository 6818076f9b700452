"""Names that callers still import from here; goes with them."""

from spem.training.step import stored_impl

__all__ = ["stored_impl"]
