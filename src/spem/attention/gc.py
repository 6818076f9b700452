"""GC: the global context block of GCNet."""

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, hidden_units, one_of
from spem.attention.precision import call, without_autocast
from spem.ops.stats import compute_dtype
from spem.seeding import kaiming_normal_fan_in

Fusion = Literal["add", "mul", "both"]


class Transform(nn.Module):
    """W2 relu(LN(W1 c + b1)) + b2, [N, C] -> [N, C, 1, 1]."""

    def __init__(self, channels: int, hidden: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden, **factory)
        self.norm = nn.LayerNorm(hidden, **factory)
        self.fc2 = nn.Linear(hidden, channels, **factory)

    def forward(self, context: Tensor) -> Tensor:
        """The transformed context, in its dtype."""
        hidden = torch.relu(call(self.norm, call(self.fc1, context)))
        return call(self.fc2, hidden)[..., None, None]


@register_attention(
    "gc",
    paper="GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond (2019), https://arxiv.org/abs/1904.11492",
    needs=Needs(adds=True),
)
class GC(ChannelAttention):
    """Global context: one attention map for the image, its context added to every position.

    Formula:
        a = softmax over H, W of a 1 x 1 convolution of x to one channel; c = sum_HW a x; delta = W2
        relu(LN(W1 c + b1)) + b2, hidden width h = C // reduction, LN over the h channels. add: y =
        x + delta. mul: y = x * s(delta). both: y = x * s(delta1) + delta2, two networks. Start: W2
        = b2 = 0, so add is the identity and mul 0.5; the convolution N(0, 2/C), its bias 0.
        Parameters: C + 1 + 2 C h + 3 h + C; both has the network's twice. Shape: [N, C, H, W].

    Args:
        fusion: ``"add"``, ``"mul"`` or ``"both"``.
        reduction: r, the hidden width is C // r; at least 2, since the norm of one value is a
            constant. The paper has 16 and 4.

    Differences: none; of timm's layers of this family, one starts away from the identity and the
    other is mul.
    """

    random_init = {"mask.weight": kaiming_normal_fan_in}  # noqa: RUF012  # typed in the base class

    def __init__(
        self,
        channels: int,
        *,
        fusion: Fusion = "add",
        reduction: int = 16,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels)
        one_of("GC", get_args(Fusion), fusion=fusion)
        hidden = hidden_units("GC", channels, reduction, least=2)  # a norm of one is a constant
        factory = Factory(device=device, dtype=dtype)
        self.fusion = fusion
        self.needs = replace(self.needs, adds=fusion != "mul")
        self.mask = nn.Conv2d(channels, 1, 1, **factory)
        if fusion != "add":
            self.mul = Transform(channels, hidden, **factory)
        if fusion != "mul":
            self.add = Transform(channels, hidden, **factory)
        self.start_gate = 1.0 if fusion == "add" else 0.5
        zero = [name for name, _ in self.named_parameters() if ".fc2." in name]
        self._draw_start(dict.fromkeys(["mask.bias", *zero], 0.0))

    @without_autocast
    def forward(self, x: Tensor) -> Tensor:
        """y = x * gate(x) + shift(x), the context computed once."""
        self._check(x)
        context = self._context(x)
        # In the precision of the gate, rounded once: a sum that cancels shows every rounding.
        y = x if self.fusion == "add" else x * torch.sigmoid(self.mul(context))
        return (y if self.fusion == "mul" else y + self.add(context)).to(x.dtype)

    def gate(self, x: Tensor) -> Tensor:
        """s(delta), [N, C, 1, 1]; ones for add."""
        if self.fusion != "add":
            return torch.sigmoid(self.mul(self._context(x)))
        ones = torch.ones((), device=x.device, dtype=compute_dtype(x.dtype))
        return ones.expand(x.shape[0], self.channels, 1, 1)

    def shift(self, x: Tensor) -> Tensor:
        """delta, [N, C, 1, 1], of add and both."""
        return super().shift(x) if self.fusion == "mul" else self.add(self._context(x))

    def _context(self, x: Tensor) -> Tensor:
        """sum_HW a x, [N, C]."""
        wide = x.to(compute_dtype(x.dtype))
        weight = call(self.mask, wide).flatten(2).softmax(2)  # [N, 1, H W]
        return (wide.flatten(2) * weight).sum(2)
