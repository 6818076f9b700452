"""Attention as timm's blocks ask for it: a function of a number of channels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from spem.attention import PLACES, AttentionSpec, ChannelAttention, as_spec


@dataclass(frozen=True)
class AttnLayer:
    """Builds an attention for a number of channels, as timm's blocks ask for it."""

    spec: AttentionSpec

    def __call__(
        self,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hints: object,
    ) -> ChannelAttention:
        """The attention; hints for timm's own layers (``rd_ratio``, ``act_layer``) are left out."""
        del hints
        return self.spec.build(channels, device=device, dtype=dtype)


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
    return AttnLayer(tail_spec(spec, "attn_layer"))


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
    if attention is not None and not isinstance(attention, (str, AttentionSpec)):
        raise TypeError(
            f"{asker}: attention={attention!r} is no spec. Pass its text, such as 'se', an "
            f"AttentionSpec, or the class."
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
