"""Attention as timm's blocks ask for it: a function of a number of channels."""

from collections.abc import Callable
from functools import partial

import torch

from spem.attention import PLACES, AttentionSpec, ChannelAttention, as_spec


def attn_layer(
    spec: str | AttentionSpec | type[ChannelAttention],
) -> Callable[..., ChannelAttention]:
    """What timm takes as ``attn_layer``: a function of a number of channels.

    Raises:
        ValueError: The spec is unreadable, unknown or "none", or names a module that does not stand
            in the tail of a block.

    Examples:
        >>> attn_layer("se(reduction=8)")(64).channels
        64
    """
    return partial(_build, tail_spec(spec, "attn_layer"))


def _build(
    spec: AttentionSpec,
    channels: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **_hints: object,
) -> ChannelAttention:
    """Leaves out hints for timm's own layers (``rd_ratio``, ``act_layer``)."""
    return spec.build(channels, device=device, dtype=dtype)


def tail_spec(attention: str | AttentionSpec | type[ChannelAttention], asker: str) -> AttentionSpec:
    """The spec of a module that other people's networks have a place for.

    Raises:
        TypeError: It is no spec, text or class.
        ValueError: It is "none", stands elsewhere than in the tail of a block, or is shared by the
            blocks of a stage.
    """
    if isinstance(attention, type) and issubclass(attention, ChannelAttention):
        if not attention.name:
            raise ValueError(
                f"{asker}: {attention.__name__} has no name. Register the class with "
                f"spem.register_attention."
            )
        attention = AttentionSpec(attention.name)
    if isinstance(attention, ChannelAttention):
        raise TypeError(
            f"{asker}: got one {type(attention).__name__}, and every site needs its own. Pass the "
            f"class or its spec, such as '{attention.name or 'se'}'."
        )
    spec = as_spec(attention)
    if spec is None:
        raise ValueError(f"{asker}: 'none' is the plain network; there is nothing to put in.")
    if spec.shared:
        raise ValueError(
            f"{asker}: {spec} is one module for all blocks of a stage, which only spem.resnet "
            f"has. Use a module with one instance a block (spem list)."
        )
    if spec.place != "tail":
        raise ValueError(
            f"{asker}: {spec} stands {PLACES[spec.place]}, not in the tail of a block. "
            f"Use a module of placement 'tail' (spem list)."
        )
    return spec
