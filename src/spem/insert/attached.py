"""What was attached to a network, remembered on it: what it takes to do it again."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Attached:
    """The arguments of one call of `spem.attach` that changed a network.

    Attributes:
        attention: The text of the spec.
        include: Patterns of site names; None is all.
        stages: Numbers of stages; None is all.
        replace: As for `spem.attach`, and so are the others.
        start: ``"identity"`` or ``"module"``.
        fuse: Whether tails are fused.
        input_shape: Of the traced forward pass, or None.
        where: Whether sites were found by a rule of the caller's.
    """

    attention: str
    include: tuple[str, ...] | None
    stages: tuple[int, ...] | None
    replace: bool
    start: str
    fuse: bool
    input_shape: tuple[int, ...] | None
    where: bool


_KEY = "attached_by_spem"


def remember(model: nn.Module, call: Attached) -> None:
    """Adds a call to what a network remembers; it is no part of the state dict."""
    vars(model)[_KEY] = (*vars(model).get(_KEY, ()), call)


def forget(model: nn.Module) -> None:
    """Makes a network and its parts forget all calls."""
    for module in model.modules():
        vars(module).pop(_KEY, None)


def remembered(model: nn.Module) -> list[tuple[str, Attached]]:
    """Every call that changed a network or a part of it, with the name of that part."""
    return [(n, call) for n, m in model.named_modules() for call in vars(m).get(_KEY, ())]
