"""Other packages: imported on use, with errors that say in a sentence what to do."""

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, installed by an extra of this package.

    Raises:
        ImportError: The module is not installed; the message starts with the purpose and ends with
            the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        missing = error.name or module
        if missing.partition(".")[0] != module.partition(".")[0]:
            raise  # it is installed but broken: its own message says more
        raise ImportError(
            f"{purpose} needs {missing.partition('.')[0]}, which is not installed. "
            f'Install it, from a checkout: pip install ".[{extra}]"',
            name=error.name,
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of another package's error, without a full stop; never empty."""
    return str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__


@contextmanager
def rephrased(
    said: str, remedy: str = "", *, kind: type[Exception] = ValueError
) -> Generator[None]:
    """Makes one sentence of what another package raises: said, its first line, a remedy."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise kind(f"{said}: {first_line(error)}. {remedy}".rstrip()) from error
