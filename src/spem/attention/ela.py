"""ELA: efficient local attention."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, divides, one_of
from spem.attention.precision import call
from spem.ops.stats import compute_dtype

Form = Literal["T", "B", "S", "L"]
_FORMS: dict[Form, tuple[int, int, int]] = {
    "T": (5, 1, 32),
    "B": (7, 1, 16),
    "S": (5, 8, 16),
    "L": (7, 8, 16),
}
"""Kernel, channels in a group of the convolution, groups of the norm."""


@register_attention(
    "ela",
    paper="ELA: Efficient Local Attention for Deep CNNs (2024), https://arxiv.org/abs/2403.01123",
    needs=Needs(divides="norm_groups"),
)
class ELA(ChannelAttention):
    """Efficient local attention: one gate along the height and one along the width, shared layers.

    Formula:
        p_h = mean over W, p_w = mean over H; a(p) = s(GN(conv_k(p))), conv_k along the axis,
        grouped, zero padding, no bias, the same convolution and norm for both axes; y = x * a(p_h)
        * a(p_w). GN 1/0 at the start. k, channels a group, groups of the norm: T 5, 1, 32; B 7, 1,
        16; S 5, 8, 16; L 7, 8, 16. Parameters: T 7C, B 9C, S 42C, L 58C. Shape: [N, C, H, W].

    Args:
        channels: C; in S and L a multiple of 8.
        form: ``"T"``, ``"B"``, ``"S"`` or ``"L"``.
        norm_groups: Groups of the norm, must divide C; None is the form's.

    Differences: there is no official code; this is the widely copied listing. timm's layer of this
    name has a convolution for each axis and another norm.
    """

    def __init__(
        self,
        channels: int,
        *,
        form: Form = "B",
        norm_groups: int | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels)
        factory = Factory(device=device, dtype=dtype)
        one_of("ELA", get_args(Form), form=form)
        kernel, together, usual = _FORMS[form]
        groups = usual if norm_groups is None else norm_groups
        divides("ELA", channels, norm_groups=groups)
        if channels % together:
            raise ValueError(
                f"ELA: form={form!r} has groups of {together} channels, which do not divide "
                f"channels={channels}. Use form='T' or 'B'."
            )
        self.form = form
        local: Any = {"padding": kernel // 2, "groups": channels // together, "bias": False}
        self.conv = nn.Conv1d(channels, channels, kernel, **local, **factory)
        self.norm = nn.GroupNorm(groups, channels, **factory)

    def gate(self, x: Tensor) -> Tensor:
        """a(p_h) a(p_w), [N, C, H, W]."""
        along_h, along_w = (x.mean(axis, dtype=compute_dtype(x.dtype)) for axis in (3, 2))
        return self._along(along_h)[..., None] * self._along(along_w)[:, :, None, :]

    def _along(self, p: Tensor) -> Tensor:
        return torch.sigmoid(call(self.norm, call(self.conv, p)))
