"""ResNet blocks whose tail, relu(attention(norm(z)) + residual), runs as one operation.

`spem.attach` with ``fuse=True`` gives a block a subclass of its class. The object stays the same
one, with its names, keys and hooks. Its forward reads the attributes as they are at the time; where
one is not what the fused tail knows, the forward of the host's own class runs.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.insert.wrap import AfterNorm
from spem.ops import norm_relu
from spem.ops.library import BATCH_NORMS, has_hooks

_LOG = logging.getLogger("spem.insert")
_LOGGED: set[str] = set()
_NORMS = (*BATCH_NORMS, nn.SyncBatchNorm)


class Tail(NamedTuple):
    """Names of a block's attributes."""

    # Layers before the last norm; a norm, what is between, and its activation are one group.
    branch: tuple[str, ...]
    norm: str  # the last one
    slot: str  # the attention; "" where `AfterNorm` around the norm holds it
    act: str  # after the addition


class FusedTail(nn.Module):
    """What the four subclasses have in common; comes before the host's class."""

    _tail: ClassVar[Tail]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        parts = self.tail_parts()
        if isinstance(parts, str) or isinstance(x, torch.fx.Proxy):
            return super().forward(x)
        norm, attention = parts
        z = x
        for step in self._tail.branch:
            layer, *after = (getattr(self, name) for name in step.split())
            if after and _is_relu_after_norm(after):
                z = norm_relu(z, layer)
            else:
                for part in (layer, *after):
                    z = part(z)
        downsample = cast("nn.Module | None", self.downsample)
        residual = x if downsample is None else downsample(x)
        return attention.tail(z, residual, norm)

    def tail_parts(self) -> tuple[nn.Module, ChannelAttention] | str:
        """The norm and the attention of the tail; or why it is composed of modules."""
        _, last, slot, end = self._tail
        norm: object = getattr(self, last)
        attention: object = getattr(self, slot) if slot else None
        if not slot:
            if type(norm) is not AfterNorm or has_hooks(norm):
                return _logged(f"{last} is {_what(norm)}")
            norm, attention = norm.layer, norm.attention
        act, drop = getattr(self, end), getattr(self, "drop_path", None)
        if not isinstance(attention, ChannelAttention):
            return _logged(f"{slot or 'attention'} is {_what(attention)}")
        if type(norm) not in _NORMS or has_hooks(cast("nn.Module", norm)):
            return _logged(f"the last norm is {_what(norm)}")
        if type(act) is not nn.ReLU or has_hooks(act):
            return _logged(f"{end} is {_what(act)}")
        dropping = drop is not None and type(drop) is not nn.Identity
        if dropping and (self.training or has_hooks(cast("nn.Module", drop))):
            return _logged(f"drop_path is {_what(drop)}")
        return cast("nn.Module", norm), attention


def why_not_fused(block: nn.Module, parent: nn.Module, key: str) -> str | None:
    """Why a block with attention at this attribute cannot get the fused tail; None if it can."""
    kind = _fused_class(block)
    if kind is None:
        return (
            f"is in a {type(block).__name__}; only the ResNet and ResNeXt blocks of timm and "
            f"torchvision have a fused tail"
        )
    if parent is not block or key != (kind._tail.slot or kind._tail.norm):
        return f"is not what ends the branch of a {type(block).__name__}"
    act, drop = getattr(block, kind._tail.act), getattr(block, "drop_path", None)
    if not isinstance(act, nn.ReLU):
        return f"is in a block that ends in {type(act).__name__}, not ReLU"
    if drop is not None and not isinstance(drop, nn.Identity):
        return f"has a {type(drop).__name__} between it and the addition"
    return None


def fuse(block: nn.Module) -> None:
    """Gives a block the subclass with the fused tail."""
    kind = _fused_class(block)
    assert kind is not None
    block.__class__ = kind


def unfuse(block: nn.Module) -> None:
    """Gives a block its host's class back; does nothing to others."""
    kinds = type(block).__mro__
    if kinds[0].__module__.startswith("spem.insert.fused_"):
        block.__class__ = kinds[kinds.index(FusedTail) + 1]


def _fused_class(block: nn.Module) -> type[FusedTail] | None:
    """The subclass for a block; none for a subclass of the host's, whose forward may differ."""
    kind = type(block)
    library, _, module = kind.__module__.partition(".")
    if library not in ("timm", "torchvision") or module != "models.resnet":
        return None
    # In modules of their own, since they import the host's library.
    fused = import_module(f"spem.insert.fused_{library}")
    return getattr(fused, f"Fused{kind.__name__}", None)


def _is_relu_after_norm(after: list[nn.Module]) -> bool:
    """Whether nothing but a ReLU follows a norm, and nobody watches it."""
    *between, act = after
    identities = all(type(module) is nn.Identity for module in between)
    return type(act) is nn.ReLU and identities and not any(map(has_hooks, after))


def _what(module: object) -> str:
    hooked = isinstance(module, nn.Module) and has_hooks(module)
    return f"a {type(module).__name__}{' with hooks' if hooked else ''}"


def _logged(reason: str) -> str:
    """Logs once why a block is composed."""
    if not torch.compiler.is_compiling() and reason not in _LOGGED:
        _LOGGED.add(reason)
        _LOG.info("A fused block runs composed: %s.", reason)
    return reason
