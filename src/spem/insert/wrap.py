"""Wrappers that put attention after or before a layer of a host."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from spem.attention import ChannelAttention

_V = TypeVar("_V")


class Around(nn.Module):
    """Base of the modules that hold a layer of a host.

    It answers for nothing but itself: reading ``bn2.weight`` raises an error that names
    ``bn2.norm.weight``, so that nothing takes the layer's numbers and leaves the attention out.
    Writing reaches the layer (``bn2.momentum = 0.1``), since a value stored here would be ignored.
    Its keys are its names, ``bn2.norm.weight``; weights of the plain network load all the same
    (`true_keys`).

    Args:
        layer: The layer of the host.
        attention: What goes after or before it.
        place: Name of the layer in the host, such as ``"bn2"``; for messages.
    """

    inner: ClassVar[str] = "norm"
    """Name of the child that the host's layer is."""
    role: ClassVar[str] = "with attention after it"
    """Where the layer is, for messages."""

    def __init__(self, layer: nn.Module, attention: ChannelAttention, place: str = "") -> None:
        super().__init__()
        self._hold(layer, place)
        self.add_module("attention", attention)  # the layer may have one of its own

    def _hold(self, layer: nn.Module, place: str) -> None:
        self._place = place
        self.add_module(self.inner, layer)
        self.register_load_state_dict_pre_hook(_load_plain)

    @property
    def layer(self) -> nn.Module:
        """The layer of the host."""
        return self.get_submodule(self.inner)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layer = vars(self).get("_modules", {}).get(self.inner)
            if layer is None or name.startswith("__") or not hasattr(layer, name):
                raise
            here = vars(self).get("_place") or type(self).__name__
            raise AttributeError(
                f"{here} is a {type(layer).__name__} {self.role} since spem.attach, "
                f"and has no {name!r}. Use {here}.{self.inner}.{name}."
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Options and weights of the layer (``bn2.momentum = 0.1``) are set on the layer."""
        layer = vars(self).get("_modules", {}).get(self.inner)
        own = name in vars(self) or hasattr(type(self), name) or name.startswith("_")
        if layer is None or own or name in self._modules or not hasattr(layer, name):
            super().__setattr__(name, value)
        else:
            setattr(layer, name, value)


class AfterNorm(Around):
    """attention(norm(x)); the norm may be any other layer that ends a branch."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """attention(norm(x)), [N, C, ...]."""
        return self.attention(self.norm(x, *args, **kwargs))


class BeforeModule(Around):
    """after(attention(x)): for a branch that ends in a layer without weights, such as drop path."""

    inner = "after"
    role = "with attention before it"

    def forward(self, x: Tensor) -> Tensor:
        """after(attention(x)), [N, C, ...]."""
        return self.after(self.attention(x))


def true_keys(model: nn.Module, state: Mapping[str, _V]) -> dict[str, _V]:
    """The state of a plain network under the names of a model.

    ``bn2.weight`` becomes ``bn2.norm.weight`` where a wrapper holds ``bn2``. Keys that the
    model has stay as they are.
    """
    found = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, Around):
            _load_plain(module, found, f"{name}." if name else "")
    return found


def _load_plain(
    module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: object
) -> None:
    """Renames the plain keys of a wrapper; also the pre-hook of its `load_state_dict`."""
    assert isinstance(module, Around)
    inner, own = f"{prefix}{module.inner}.", module.layer.state_dict()
    if any(inner + name in state for name in own):
        return  # they are the wrapper's
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        # The layer may have parts that are called as those of the wrapper are.
        if name in own or name.partition(".")[0] not in module._modules:
            state[inner + name] = state.pop(key)
