"""SPEM: self-adaptive pooling enhanced attention, three published forms, all reweight variants."""

import math
import typing
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention
from spem.attention.options import Device, Dtype, one_of
from spem.attention.pooling import FixedMix, Mix, MixPool, PoolSpec, SigmoidMix, SquaresMix
from spem.attention.precision import cast
from spem.attention.spec import register_attention
from spem.ops import PlaneStats
from spem.ops.dispatch import requested, unsupported
from spem.ops.inference import CompiledGate, compiled_by
from spem.ops.library import has_hooks, kernels_of, runs_eagerly

Form = Literal["text", "figure", "code"]
Reweight = Literal[
    "shared_sum",
    "unshared_sum",
    "sum_of_sigmoids",
    "product_of_sigmoids",
    "sigmoid_of_product",
    "linear_sum",
    "linear_product",
    "double_sigmoid",
    "max_only",
    "min_only",
    "none",
]

_POOLS = (SquaresMix, SigmoidMix, FixedMix)


@register_attention(
    "spem",
    paper="Mix-Pooling Strategy for Attention Mechanism (2022), https://arxiv.org/abs/2208.10322",
)
class SPEM(ChannelAttention):
    """Self-adaptive pooling enhanced attention: a mix of max and min excites, both reweight.

    Formula:
        M, m the maximum and minimum of a plane; u = lambda M + (1 - lambda) m; e = w_e u + b_e;
        a = w_r M + b_r, b = w_r m + b_r; R = s(a + b); s the logistic sigmoid. The gate v is

        text    s(e) R                          the paper's prose
        figure  s(e R)                          the paper's Fig. 3
        code    s(w_e (w_r u + b_r) + b_e) R    the official program

        w_e = w_r = 0 and b_e = b_r = -1 at the start, so v = 0.0320586 (text, code) or 0.4702345
        (figure) whatever the input. Parameters: 4C, and 2 for a learned lambda.

        Reweight variants (the paper's Table 4) replace R: ``unshared_sum`` s(w_r M + b_r + w_r2 m +
        b_r2) (6C), ``sum_of_sigmoids`` s(a) + s(b), ``product_of_sigmoids`` s(a) s(b),
        ``sigmoid_of_product`` s(a b), ``linear_sum`` a + b, ``linear_product`` a b,
        ``double_sigmoid`` s(s(a) + s(b)), ``max_only`` s(a), ``min_only`` s(b), ``none`` 1 (2C).

    Shape:
        x: [N, C, ...], one to three spatial axes.

    Args:
        channels: C.
        form: Which of the three published formulas.
        pool: What u is; the paper's learned mix by default, ``Mix(0.3)`` for a constant lambda.
        reweight: Which R; ``form="code"`` has ``shared_sum`` only.

    Raises:
        ValueError: Unknown form or reweight variant, or a variant that the form does not have.

    Paper: Mix-Pooling Strategy for Attention Mechanism (2022), https://arxiv.org/abs/2208.10322,
    eqs. (1)-(8); published as SPEM: Self-adaptive Pooling Enhanced Attention Module for Image
    Recognition (MMM 2023). Symbols: w_e, b_e of g_exc; w_r, b_r of g_rew (the official program's
    w1, b1, w2, b2).

    Differences: lambda is computed scale-invariantly in at least float32 (the direct formula is 0/0
    for small p). The penalty 0.1 sum(p0^2 + p1^2) is a function over the model, `spem.penalty`.
    """

    def __init__(
        self,
        channels: int,
        *,
        form: Form = "text",
        pool: PoolSpec = Mix(),  # noqa: B008  # frozen
        reweight: Reweight = "shared_sum",
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        one_of("SPEM", get_args(Form), form=form)
        one_of("SPEM", get_args(Reweight), reweight=reweight)
        if form == "code" and reweight != "shared_sum":
            raise ValueError(
                f"SPEM: form='code' has reweight='shared_sum' only (the official program has no "
                f"other), got reweight={reweight!r}. Use form='text' or 'figure'."
            )
        self.form: Form = form
        self.reweight: Reweight = reweight

        def per_channel() -> nn.Parameter:
            return nn.Parameter(torch.empty(channels, device=device, dtype=dtype))

        self.w_e, self.b_e = per_channel(), per_channel()
        if reweight != "none":
            self._reads(("max", "min"))
            self.w_r, self.b_r = per_channel(), per_channel()
        if reweight == "unshared_sum":
            self.w_r2, self.b_r2 = per_channel(), per_channel()
        self._draw_start()

    def reset_parameters(self) -> None:
        """All weights 0, all biases -1, p = (0.5, 0.5)."""
        super().reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.constant_(parameter, 0.0 if name.startswith("w") else -1.0)

    @property
    def start_gate(self) -> float:
        """The gate where every affine map gives -1."""
        minus_one = torch.tensor(-1.0, dtype=torch.float64)
        factor = None if self.reweight == "none" else _combine(self.reweight, minus_one, minus_one)
        if self.form == "figure":
            return _sigmoid(-1.0 if factor is None else -float(factor))
        return _sigmoid(-1.0) * (1.0 if factor is None else float(factor))

    def _compiled(self) -> CompiledGate | None:
        pool = self.pool
        if self.reweight != "shared_sum" or has_hooks(pool):
            return None
        weights = (self.w_e, self.b_e, self.w_r, self.b_r)
        if type(pool) is SquaresMix:
            return CompiledGate(f"spem_{self.form}", (*weights, pool.p))
        if not isinstance(pool, MixPool):
            return None
        return CompiledGate(f"spem_{self.form}", (*weights, None), float(pool.lam))

    @compiled_by(_compiled)
    def gate_from(self, stats: PlaneStats) -> Tensor:
        """v, [N, C]."""
        if self._has_kernel(stats):
            assert stats.max is not None
            lam = cast(typing.cast("Tensor", self.pool.lam), stats.max)
            weights = (cast(w, lam) for w in (self.w_e, self.b_e, self.w_r, self.b_r))
            return _TextGate.apply(lam, stats.max, stats.min, *weights)
        u = self.pool(stats)
        w_e, b_e = cast(self.w_e, u), cast(self.b_e, u)
        if self.reweight == "none":
            return torch.sigmoid(torch.addcmul(b_e, w_e, u))
        assert stats.max is not None
        assert stats.min is not None
        w_r, b_r = cast(self.w_r, u), cast(self.b_r, u)
        if self.reweight == "shared_sum":  # of one affine map, so one of the sum
            factor = torch.sigmoid(torch.addcmul(b_r + b_r, w_r, stats.max + stats.min))
        else:
            unshared = self.reweight == "unshared_sum"
            w_m, b_m = (cast(self.w_r2, u), cast(self.b_r2, u)) if unshared else (w_r, b_r)
            a, b = torch.addcmul(b_r, w_r, stats.max), torch.addcmul(b_m, w_m, stats.min)
            factor = _combine(self.reweight, a, b)
        if self.form == "figure":
            return torch.sigmoid(torch.addcmul(b_e, w_e, u) * factor)
        # The official program maps both pools before mixing them; the weights sum to 1, so it may
        # be done after.
        embedded = torch.addcmul(b_r, w_r, u) if self.form == "code" else u
        return torch.sigmoid(torch.addcmul(b_e, w_e, embedded)) * factor

    def _has_kernel(self, stats: PlaneStats) -> bool:
        """Whether kernels compute the gate: on a CPU, eagerly, where a gradient is recorded."""
        known = self.form == "text" and self.reweight == "shared_sum" and type(self.pool) in _POOLS
        high = stats.max
        if not known or high is None or not torch.is_grad_enabled() or not runs_eagerly(high):
            return False
        if requested(None, "SPEM") not in (None, "numba"):
            return False
        if not high.numel():  # asked last, since a tracer would record the question
            return False
        return not has_hooks(self.pool) and not unsupported("numba", high.device.type, high.dtype)

    def extra_repr(self) -> str:
        """Form and reweight variant."""
        return f"{self.channels}, form={self.form}, reweight={self.reweight}"


class _TextGate(torch.autograd.Function):
    """The gate and its gradients, a kernel each, where torch needs 84 operators."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        """v of lambda, the extrema, w_e, b_e, w_r, b_r."""
        v, *factors = kernels_of("numba").spem_gate(*inputs)
        ctx.save_for_backward(*inputs, *factors)
        return v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of all seven inputs; differentiable in turn, by way of the formula."""
        *inputs, excited, factor = ctx.saved_tensors
        lam, high, low, w_e, b_e, w_r, b_r = inputs
        if not torch.is_grad_enabled():
            backward = kernels_of("numba").spem_gate_backward
            return backward(grad, lam, high, low, w_e, w_r, excited, factor)
        u = torch.addcmul(lam * high, 1.0 - lam, low)
        factor = torch.sigmoid(torch.addcmul(b_r + b_r, w_r, high + low))
        v = torch.sigmoid(torch.addcmul(b_e, w_e, u)) * factor
        needed = [x for x, needs in zip(inputs, ctx.needs_input_grad, strict=True) if needs]
        found = iter(torch.autograd.grad(v, needed, grad, create_graph=True))
        return tuple(next(found) if needs else None for needs in ctx.needs_input_grad)


def _combine(reweight: Reweight, a: Tensor, b: Tensor) -> Tensor:
    """R of a = g_rew(M) and b = g_rew(m)."""
    match reweight:
        case "shared_sum" | "unshared_sum":
            return torch.sigmoid(a + b)
        case "sum_of_sigmoids":
            return torch.sigmoid(a) + torch.sigmoid(b)
        case "product_of_sigmoids":
            return torch.sigmoid(a) * torch.sigmoid(b)
        case "sigmoid_of_product":
            return torch.sigmoid(a * b)
        case "linear_sum":
            return a + b
        case "linear_product":
            return a * b
        case "double_sigmoid":
            return torch.sigmoid(torch.sigmoid(a) + torch.sigmoid(b))
        case "max_only":
            return torch.sigmoid(a)
        case "min_only":
            return torch.sigmoid(b)
        case "none":
            return torch.ones_like(a)


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))
