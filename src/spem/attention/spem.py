"""SPEM: self-adaptive pooling enhanced attention, three published forms, all reweight variants."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, register_attention
from spem.attention.options import Device, Dtype, one_of
from spem.attention.pooling import FixedMix, LearnedMix, Mix, PoolSpec
from spem.attention.precision import cast
from spem.ops import PlaneStats
from spem.ops.autograd import spem_gate
from spem.ops.inference import CompiledGate, compiled_by
from spem.ops.library import has_hooks

Form = Literal["text", "figure", "code"]
Reweight = Literal[
    "shared_sum", "unshared_sum", "sum_of_sigmoids", "product_of_sigmoids", "sigmoid_of_product",
    "linear_sum", "linear_product", "double_sigmoid", "max_only", "min_only", "none"
]  # fmt: skip

_REWEIGHTS: dict[str, Callable[[Callable[[Any], Any], Any, Any], Any]] = {
    "shared_sum": lambda s, a, b: s(a + b),
    "unshared_sum": lambda s, a, b: s(a + b),
    "sum_of_sigmoids": lambda s, a, b: s(a) + s(b),
    "product_of_sigmoids": lambda s, a, b: s(a) * s(b),
    "sigmoid_of_product": lambda s, a, b: s(a * b),
    "linear_sum": lambda s, a, b: a + b,
    "linear_product": lambda s, a, b: a * b,
    "double_sigmoid": lambda s, a, b: s(s(a) + s(b)),
    "max_only": lambda s, a, b: s(a),
    "min_only": lambda s, a, b: s(b),
    "none": lambda s, a, b: 1.0,
}
"""R of the logistic sigmoid, a and b."""


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
        Shape: [N, C, ...], one to three spatial axes.

    Args:
        form: Which of the three published formulas.
        pool: What u is; the paper's learned mix by default, ``Mix(0.3)`` for a constant lambda.
        reweight: Which R; ``form="code"`` has ``shared_sum`` only.

    Paper: eqs. (1)-(8); published as SPEM: Self-adaptive Pooling Enhanced Attention Module for
    Image Recognition (MMM 2023). Symbols: w_e, b_e of g_exc; w_r, b_r of g_rew (the official
    program's w1, b1, w2, b2).

    Differences: lambda is computed scale-invariantly in at least float32 (the direct formula is 0/0
    for small p). The penalty 0.1 sum(p0^2 + p1^2) is a function over the model, `spem.penalty`.
    """

    w_e: nn.Parameter
    b_e: nn.Parameter
    w_r: nn.Parameter
    b_r: nn.Parameter
    w_r2: nn.Parameter
    b_r2: nn.Parameter

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
        self.form, self.reweight = form, reweight
        names = ["w_e", "b_e"] if reweight == "none" else ["w_e", "b_e", "w_r", "b_r"]
        if reweight == "unshared_sum":
            names += ["w_r2", "b_r2"]
        if reweight != "none":
            self._reads(("max", "min"))
        for name in names:
            parameter = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        factor = _REWEIGHTS[reweight](_sigmoid, -1.0, -1.0)  # every affine map gives -1
        self.start_gate = _sigmoid(-factor) if form == "figure" else _sigmoid(-1.0) * factor
        self._draw_start({name: 0.0 if name[0] == "w" else -1.0 for name in names})

    def _mix(self) -> FixedMix | LearnedMix | None:
        """The pool of a gate that the CPU kernels know; None for other gates."""
        pool = self.pool
        known = self.reweight == "shared_sum" and not has_hooks(pool)
        return pool if known and isinstance(pool, (FixedMix, LearnedMix)) else None

    def _compiled(self) -> CompiledGate | None:
        mix = self._mix()
        if mix is None:
            return None
        p = getattr(mix, "p", None)
        weights = (self.w_e, self.b_e, self.w_r, self.b_r, p)
        return CompiledGate(
            f"spem_{self.form}", weights, 0.0 if p is not None else mix.numbers()[0]
        )

    @compiled_by(_compiled)
    def gate_from(self, stats: PlaneStats) -> Tensor:
        """v, [N, C]."""
        if stats.direct and (mix := self._mix()) is not None:
            weights = self.w_e, self.b_e, self.w_r, self.b_r
            return spem_gate(self.form, mix.numbers(), stats.max, stats.min, *weights)
        u = self.pool(stats)
        if self.form == "code":  # which maps both pools before mixing them; the weights sum to 1
            u = _affine(self.w_r, self.b_r, u)
        e = _affine(self.w_e, self.b_e, u)
        if self.reweight == "none":
            return torch.sigmoid(e)
        own = self.reweight == "unshared_sum"
        a = _affine(self.w_r, self.b_r, stats.max)
        b = _affine(self.w_r2 if own else self.w_r, self.b_r2 if own else self.b_r, stats.min)
        factor = _REWEIGHTS[self.reweight](torch.sigmoid, a, b)
        return torch.sigmoid(e * factor) if self.form == "figure" else torch.sigmoid(e) * factor


def _affine(w: Tensor, b: Tensor, v: Tensor | None) -> Tensor:
    assert v is not None
    return torch.addcmul(cast(b, v), cast(w, v), v)


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))
