"""An attention of the user's own, from a Python file: what `--module` takes in every command."""

import hashlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spem.cli.network import import_file
from spem.cli.options import unknown

if TYPE_CHECKING:
    from torch import nn

    from spem.seeding import Initialiser


def register_from_file(where: str) -> str:
    """Import a class from the user's file and register it, so that a spec can name it.

    The registered name ends in a part of the file's SHA-256: runs trained with an edited file are
    other runs. (What the file itself imports is not looked at.)

    Args:
        where: `path/to/file.py:ClassName`. The class takes the number of channels first and its
            `forward` a map [N, C, H, W] to one of the same shape: a `ChannelAttention`, or any
            `torch.nn.Module`.

    Returns:
        The name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No class of that name, no module, or it cannot be built for 64 channels.
    """
    import torch
    from torch import nn

    from spem.attention import ChannelAttention, Needs, list_attention, register_attention

    file, colon, name = where.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"--module {where!r} is not of the form file.py:ClassName.")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--module: there is no file {path}. Check the path.")
    code = hashlib.sha256(path.read_bytes()).hexdigest()[:6]
    label = f"{name.lower()}_{code}"
    if label in list_attention():
        return label
    module = import_file(path)
    kind = getattr(module, name, None)
    if not inspect.isclass(kind) or not issubclass(kind, nn.Module):
        classes = [n for n, v in vars(module).items() if _is_module(v)]
        raise ValueError(
            f"--module: {path} defines no module {name}. {unknown('class', name, classes)}"
        )
    if issubclass(kind, ChannelAttention):
        # One registered by its own decorator too: a class has one name.
        own: type[ChannelAttention] = type(name, (kind,), {}) if kind.name else kind
        needs = own.needs
    else:
        own, needs = _wrapped(kind), Needs(adds=True)
    register_attention(label, paper=f"{name} of {path.name}", needs=needs)(own)
    try:
        x = torch.zeros(2, 64, 8, 8)
        y = own(64)(x)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"--module: {name} of {path} does not work as {name}(64) on a map [2, 64, 8, 8]: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        raise ValueError(
            f"--module: {name} of {path} must return a map of its input's shape [2, 64, 8, 8], "
            f"got {list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__}."
        )
    return label


def _is_module(value: object) -> bool:
    from torch import nn

    return inspect.isclass(value) and issubclass(value, nn.Module)


def _wrapped(kind: "type[nn.Module]") -> Any:
    """A class around a plain module, which is neither gate nor shift: y = x + (module(x) - x)."""
    import torch
    from torch import Tensor

    from spem.attention import ChannelAttention

    class Wrapped(ChannelAttention):
        """A module of the user's own."""

        def __init__(self, channels: int, *, device: Any = None, dtype: Any = None) -> None:
            super().__init__(channels, device=device, dtype=dtype)
            self.inner = kind(channels).to(device=device, dtype=dtype)
            names = [name for name, _ in self.inner.named_parameters()]
            self.random_init = {f"inner.{name}": _draw_like(kind, channels, name) for name in names}

        def gate(self, x: Tensor) -> Tensor:
            """1: how much of the output is a factor cannot be known from outside."""
            return torch.ones_like(x[:, :, :1, :1])

        def shift(self, x: Tensor) -> Tensor:
            """What the module changes."""
            return self.inner(x) - x

        def forward(self, x: Tensor) -> Tensor:
            """The module's output."""
            self._check(x)
            return self.inner(x)

    Wrapped.__name__ = Wrapped.__qualname__ = kind.__name__
    return Wrapped


def _draw_like(kind: "type[nn.Module]", channels: int, name: str) -> "Initialiser":
    """A rule that draws a parameter as the class itself does, from the generator it is given."""
    import torch
    from torch import Tensor

    def fill(parameter: Tensor, generator: torch.Generator | None) -> None:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            if generator is not None:
                torch.manual_seed(generator.initial_seed())
            parameter.copy_(kind(channels).get_parameter(name))

    return fill
