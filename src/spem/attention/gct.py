"""GCT: gated channel transformation."""

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, register_attention
from spem.attention.options import Device, Dtype, Factory, one_of
from spem.attention.precision import cast
from spem.ops import PlaneStats
from spem.ops.stats import compute_dtype

Mode = Literal["l2", "l1"]
Placement = Literal["tail", "conv"]
EPS = 1e-5


@register_attention(
    "gct",
    paper="Gated Channel Transformation for Visual Recognition (2020), https://arxiv.org/abs/1909.11519",
    needs=Needs(statistics=("mean", "var"), no_decay=("beta",)),
)
class GCT(ChannelAttention):
    """Gated channel transformation: channels compete by their norms, from the identity on.

    Formula:
        y = x * (1 + tanh(n + beta)). l2: e_c = alpha_c sqrt(sum_HW x_c^2 + eps), n_c = gamma_c e_c
        / sqrt(mean_c e^2 + eps). l1: e_c = alpha_c sum_HW |x_c|, n_c = gamma_c e_c / (mean_c |e| +
        eps). eps = 1e-5. alpha = 1, gamma = beta = 0 at the start: the identity. Parameters: 3C.
        Shape: [N, C, ...], one to three spatial axes; with ``mode="l1"`` [N, C, H, W].

    Args:
        mode: The norm of a plane, ``"l2"`` or ``"l1"``. Only l2 is a function of plane statistics:
            sum x^2 = K (var + mean^2), K positions.
        placement: At the ``"tail"`` of every block, or before every ``"conv"``, as in the official
            networks.

    Differences: the official networks put it before every convolution (stem and shortcuts too),
    ``placement="conv"``; the default is placed like any other attention. In l2 an infinite value
    makes all gates of its image NaN. Its authors train beta without weight decay
    (`Needs.no_decay`).
    """

    start_gate = 1.0

    def __init__(
        self,
        channels: int,
        *,
        mode: Mode = "l2",
        placement: Placement = "tail",
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels)
        factory = Factory(device=device, dtype=dtype)
        one_of("GCT", get_args(Mode), mode=mode)
        one_of("GCT", get_args(Placement), placement=placement)
        self.mode = mode
        self.needs = replace(self.needs, place=placement)
        self.alpha = nn.Parameter(torch.empty(channels, **factory))
        self.gamma = nn.Parameter(torch.empty(channels, **factory))
        self.beta = nn.Parameter(torch.empty(channels, **factory))
        self._draw_start({"alpha": 1.0, "gamma": 0.0, "beta": 0.0})

    def takes_any_rank(self) -> bool:
        """Whether the norm is l2."""
        return self.mode == "l2"

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """1 + tanh(n + beta) of l2, [N, C]."""
        if self.mode == "l1":
            return super().gate_from(stats)  # there is none
        assert stats.mean is not None
        assert stats.var is not None
        norm = torch.sqrt(stats.size * (stats.var + stats.mean.square()) + EPS)
        e = cast(self.alpha, norm) * norm
        return self._compare(e, torch.sqrt(e.square().mean(1, keepdim=True) + EPS))

    def map_gate(self, x: Tensor) -> Tensor:
        """1 + tanh(n + beta) of l1, [N, C, 1, 1]."""
        norm = x.abs().flatten(2).sum(2, dtype=compute_dtype(x.dtype))
        e = cast(self.alpha, norm) * norm
        return self._compare(e, e.abs().mean(1, keepdim=True) + EPS)[..., None, None]

    def _compare(self, e: Tensor, size: Tensor) -> Tensor:
        return 1.0 + torch.tanh(cast(self.gamma, e) * e / size + cast(self.beta, e))
