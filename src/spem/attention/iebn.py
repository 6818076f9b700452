"""IEBN: instance-enhancement batch normalisation."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs
from spem.attention.options import Device, Dtype, number
from spem.attention.pooling import PoolSpec
from spem.attention.precision import batch_norm, cast
from spem.attention.spec import register_attention
from spem.ops import PlaneStats
from spem.ops.stats import compute_dtype


@register_attention(
    "iebn",
    paper="Instance Enhancement Batch Normalization: An Adaptive Regulator of Batch Noise (2020), "
    "https://arxiv.org/abs/1908.04008",
    needs=Needs(values=2, batch_statistics=True, place="norm", replaces="norm"),
)
class IEBN(ChannelAttention):
    """Instance-enhancement batch norm: every image gates the weight of the norm from its input.

    Formula:
        y = xhat * gamma s(w z + b) + beta, xhat the batch norm of x without weight and bias, z the
        pooled channels of x (global average by default). gamma = 1, beta = 0, w = 0, b = -1 at the
        start: the gate is s(-1) = 0.2689414. Parameters: 4C, 2C more than the norm it replaces.

    Shape:
        x: [N, C, ...], one to three spatial axes; N H W >= 2 in training.

    Args:
        channels: C.
        pool: How a plane becomes a number.
        momentum: Weight of a batch in the running statistics.
        eps: Added to the variance.

    Raises:
        ValueError: ``momentum`` or ``eps`` lies outside (0, 1].

    Differences: none. Weight, bias and running statistics have the names they have in torch's
    norms, so a plain network's weights load; processes do not share statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        *,
        pool: PoolSpec = "avg",
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        number("IEBN", momentum=momentum, eps=eps)
        for option, value in (("momentum", momentum), ("eps", eps)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"IEBN: {option}={value!r} is no number above 0 and up to 1.")
        self.momentum, self.eps = float(momentum), float(eps)
        empty = torch.empty(channels, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty_like(empty))
        self.bias = nn.Parameter(torch.empty_like(empty))
        self.w = nn.Parameter(torch.empty_like(empty))
        self.b = nn.Parameter(torch.empty_like(empty))
        self.register_buffer("running_mean", torch.empty_like(empty))
        self.register_buffer("running_var", torch.empty_like(empty))
        batches = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("num_batches_tracked", batches)
        self._draw_start()

    def reset_parameters(self) -> None:
        """gamma = 1, beta = 0, w = 0, b = -1; running statistics 0/1."""
        super().reset_parameters()
        for tensor, value in (
            (self.weight, 1.0),
            (self.bias, 0.0),
            (self.w, 0.0),
            (self.b, -1.0),
            (self.running_mean, 0.0),
            (self.running_var, 1.0),
        ):
            nn.init.constant_(tensor, value)
        with torch.no_grad():
            self.num_batches_tracked.zero_()

    @property
    def start_gate(self) -> float:
        """s(-1)."""
        return 0.2689414213699951

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """s(w z + b), [N, C]: what gamma is multiplied by."""
        z = self.pool(stats)
        return torch.sigmoid(cast(self.w, z) * z + cast(self.b, z))

    def forward(self, x: Tensor) -> Tensor:
        """xhat * gamma s(w z + b) + beta."""
        self._check(x)
        gate = self.gate(x)
        training = self.training and x.shape[0] > 0
        standard = batch_norm(
            x.to(compute_dtype(x.dtype)),
            self.running_mean,
            self.running_var,
            training=training,
            momentum=self.momentum,
            eps=self.eps,
        )
        if training:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
        axes = (-1, *[1] * (x.dim() - 2))
        gamma, beta = (cast(p, gate).reshape(axes) for p in (self.weight, self.bias))
        return (standard * (gamma * gate) + beta).to(x.dtype)

    def extra_repr(self) -> str:
        """Momentum and eps."""
        return f"momentum={self.momentum}, eps={self.eps}"
