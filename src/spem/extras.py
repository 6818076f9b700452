"""Optional dependencies: imported where used; a missing one names the line that installs it."""

from importlib import import_module
from types import ModuleType


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Imports an optional dependency, which an extra of this package brings.

    Raises:
        ImportError: The module is not installed; the message begins with the purpose and ends in
            the line that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = error.name or module
        if missing.partition(".")[0] != module.partition(".")[0]:
            raise  # the dependency is there and broken: its own message says more
        raise ImportError(
            f"{purpose} needs {missing.partition('.')[0]}, which is not installed. "
            f'Install it, from a checkout: pip install ".[{extra}]"',
            name=error.name,
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what another package raised, without a full stop; never empty."""
    return str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__
