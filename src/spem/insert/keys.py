"""Modules that stand around one of a host's and leave its state-dict keys as they were."""

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from torch import nn


class Around(nn.Module):
    """Base of modules that hold a host's module and give its weights the names they had without.

    The state dict holds the host's keys unchanged, beside those of what was added, so weights of
    the plain network load before and after insertion. Attributes of the host's module are found
    here too: hosts read some, such as a norm's ``weight``.

    Args:
        host: The module of the host.
    """

    inner: ClassVar[str] = "host"
    """Name of the child that the host's module is."""
    added: ClassVar[tuple[str, ...]] = ()
    """Names of the children that were added; the host's module may have no attribute of them."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self._stand_around(host)

    def _stand_around(self, host: nn.Module) -> None:
        """Takes the host's module in; once the module itself is initialised."""
        for name in self.added:
            if hasattr(host, name):
                raise ValueError(
                    f"attach: {type(host).__name__} has an attribute {name!r} of its own, which "
                    f"{type(self).__name__} needs for itself. Pass where= another module."
                )
        self.add_module(self.inner, host)
        self.register_state_dict_post_hook(_hide)
        self.register_load_state_dict_pre_hook(_show)
        self.register_load_state_dict_post_hook(_name_missing)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # `fuse` of a host's layer gives one to put in its place: here it would take attention
            # out with it. Those that call it find the layer itself one level below.
            if name in (type(self).inner, *type(self).added, "fuse"):
                raise
            return getattr(super().__getattr__(type(self).inner), name)


class Node(NamedTuple):
    """A module of a network: its name in the state dict, and the attribute that holds it."""

    name: str
    module: nn.Module
    parent: nn.Module | None
    key: str


def walk(model: nn.Module) -> Iterator[Node]:
    """Every module of a network once, under the name its weights have without what was added."""
    seen: set[int] = set()

    def visit(node: Node) -> Iterator[Node]:
        if id(node.module) in seen:
            return
        seen.add(id(node.module))
        yield node
        for key, child in node.module.named_children():
            hidden = isinstance(node.module, Around) and key == node.module.inner
            name = node.name if hidden else joined(node.name, key)
            yield from visit(Node(name, child, node.module, key))

    yield from visit(Node("", model, None, ""))


def joined(prefix: str, name: str) -> str:
    """A dotted name; either part may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _hide(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    """Takes the child's name out of the keys; their order stays."""
    assert isinstance(module, Around)
    inner = f"{prefix}{module.inner}."
    for key in [key for key in state if key.startswith(prefix)]:
        value = state.pop(key)
        state[prefix + key.removeprefix(inner) if key.startswith(inner) else key] = value


def _show(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Puts the child's name into every key that belongs to the host."""
    assert isinstance(module, Around)
    own = tuple(f"{prefix}{name}." for name in module.added)
    for key in [key for key in state if key.startswith(prefix)]:
        if not key.startswith(own):
            state[f"{prefix}{module.inner}.{key.removeprefix(prefix)}"] = state.pop(key)
    vars(module)["_loaded_from"] = prefix  # the hook that runs afterwards is not told


def _name_missing(module: nn.Module, incompatible: Any) -> None:
    """Names missing keys as the state dict has them."""
    assert isinstance(module, Around)
    prefix = vars(module).pop("_loaded_from", None)
    inner = f"{prefix}{module.inner}."
    if prefix is None:
        return
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        keys[:] = [prefix + key[len(inner) :] if key.startswith(inner) else key for key in keys]
