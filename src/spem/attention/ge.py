"""GE: gather-excite."""

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spem.attention.base import ChannelAttention, register_attention
from spem.attention.options import Device, Dtype, Size, hidden_units, is_int, map_size, one_of
from spem.attention.pooling import PoolSpec
from spem.attention.precision import call
from spem.ops import PlaneStats
from spem.ops.stats import compute_dtype
from spem.seeding import kaiming_normal_fan_in

Form = Literal["theta_minus", "theta", "theta_plus"]
GLOBAL = "global"


@register_attention(
    "ge",
    paper="Gather-Excite: Exploiting Feature Context in CNNs (2018), https://arxiv.org/abs/1810.12348",
)
class GE(ChannelAttention):
    """Gather-excite: every channel gated by what is gathered from itself; three forms.

    Formula:
        theta_minus: y = x * s(z), z the pooled channels (global average by default), or, with
        an extent e, the averages over windows of 2e - 1 at a stride of e, repeated to H x W
        (nearest). Parameters: none.

        theta: y = x * s(BN(g)), g a depthwise convolution with a kernel of the whole map, without
        bias unless ``bias``. Parameters: C (H W + 2), and C with bias.

        theta_plus: y = x * s(W2 relu(W1 relu(BN(g)) + b1) + b2), hidden width h = C // reduction.
        Parameters: C (H W + 2) + 2 C h + h + C.

        Start: kernels N(0, 2 / (H W)), W1 and W2 N(0, 0.01^2), biases 0, BN 1/0. Shape: [N, C,
        ...], one to three spatial axes, for theta_minus of global extent; [N, C, H, W] for the
        others; theta and theta_plus take the map size they were built for and in training N >= 2.

    Args:
        form: ``"theta_minus"``, ``"theta"`` or ``"theta_plus"``.
        extent: ``"global"``, or for theta_minus an integer e >= 2 (2, 4 and 8 in the paper).
        reduction: r of theta_plus, the hidden width is C // r >= 1.
        bias: Whether the depthwise convolution of theta and theta_plus has a bias, which the norm
            takes away again; the port in SRM's repository has one.
        size: H = W, or (H, W), of the maps; theta and theta_plus need it.
        pool: How a plane becomes a number in theta_minus of global extent.

    Differences: theta and theta_plus only with global extent. Windows over the edge average what
    lies inside the map. Its authors train biases and norms of theta and theta_plus without weight
    decay (`Needs.no_decay`).
    """

    def __init__(
        self,
        channels: int,
        *,
        form: Form = "theta_minus",
        extent: int | Literal["global"] = GLOBAL,
        reduction: int = 16,
        bias: bool = False,
        size: Size | None = None,
        pool: PoolSpec = "avg",
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        one_of("GE", get_args(Form), form=form)
        minus, whole = form == "theta_minus", extent == GLOBAL
        pooled = pool if minus and whole else ...
        super().__init__(channels, pool=pooled, device=device, dtype=dtype)
        if not whole and not (minus and is_int(extent) and extent >= 2):
            takes = "extent='global'" + " or an integer >= 2" * minus
            raise ValueError(f"GE: form={form!r} takes {takes}, got extent={extent!r}.")
        if pool != "avg" and not (minus and whole):
            raise ValueError(
                f"GE: pool={pool!r} needs form='theta_minus' and extent='global', "
                f"got form={form!r} and extent={extent!r}."
            )
        if not isinstance(bias, bool) or (bias and minus):
            raise ValueError(
                f"GE: bias={bias!r} is not True or False, or form={form!r} has no convolution."
            )
        self.form, self.extent = form, extent
        if minus:
            return
        factory: Any = {"device": device, "dtype": dtype}
        self.size = map_size("GE", size)
        depthwise: Any = {"groups": channels, "bias": bias, **factory}
        self.gather = nn.Conv2d(channels, channels, self.size, **depthwise)
        self.norm = nn.BatchNorm2d(channels, **factory)
        self.random_init = {"gather.weight": kaiming_normal_fan_in}
        biases: tuple[str, ...] = ()
        if form == "theta_plus":
            hidden = hidden_units("GE", channels, reduction)
            self.fc1 = nn.Linear(channels, hidden, **factory)
            self.fc2 = nn.Linear(hidden, channels, **factory)
            self.random_init |= {f"fc{k}.weight": normal_hundredth for k in (1, 2)}
            biases = ("fc1.bias", "fc2.bias")
        no_decay = ("norm.weight", "norm.bias", *(["gather.bias"] if bias else []), *biases)
        sized: Any = {"size": True, "fixed_size": True, "batch": 2, "batch_statistics": True}
        self.needs = replace(self.needs, no_decay=no_decay, **sized)
        self._draw_start(dict.fromkeys(biases, 0.0))

    def takes_any_rank(self) -> bool:
        """Whether it is theta_minus of global extent."""
        return self.form == "theta_minus" and self.extent == GLOBAL

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """s(z) of theta_minus, [N, C]."""
        if not self.takes_any_rank():
            return super().gate_from(stats)  # there is none
        return torch.sigmoid(self.pool(stats))

    def map_gate(self, x: Tensor) -> Tensor:
        """The gate of the other forms, [N, C, 1, 1]; [N, C, H, W] with an extent."""
        wide = x.to(compute_dtype(x.dtype))
        if isinstance(self.extent, int):
            side, step = 2 * self.extent - 1, self.extent
            means = F.avg_pool2d(wide, side, step, padding=step - 1, count_include_pad=False)
            return F.interpolate(torch.sigmoid(means), size=x.shape[2:], mode="nearest")
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(
                f"GE: form={self.form!r} was built for maps of size={self.size}, "
                f"got {list(x.shape)}."
            )
        z = call(self.norm, call(self.gather, wide))
        if self.form == "theta_plus":
            hidden = torch.relu(call(self.fc1, torch.relu(z.flatten(1))))
            z = call(self.fc2, hidden)[..., None, None]
        return torch.sigmoid(z)


def normal_hundredth(weight: Tensor, generator: torch.Generator | None) -> None:
    """N(0, 0.01^2)."""
    nn.init.normal_(weight, 0.0, 0.01, generator)
