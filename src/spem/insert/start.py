"""How attention starts in a trained network: as the identity, or as the SE that was there."""

import dataclasses

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention, Needs, make_pool
from spem.attention.pooling import Pool, PoolSpec
from spem.attention.precision import call
from spem.insert.wrap import Around
from spem.ops import PlaneStats
from spem.ops.inference import CompiledGate, compiled_by


class IdentityStart(ChannelAttention):
    """An attention whose gate starts at one and learns from there.

    Formula:
        y = x * (1 + alpha (v - 1)), v the gate of the attention, alpha one learned number, 0 at the
        start. A module that adds to the map (`Needs.adds`), or has a forward of its own, mixes the
        maps: y = x + alpha (attention(x) - x). With alpha = 1 it is the attention itself.

    Differences: at the start alpha has a gradient and the attention none, since alpha = 0
    multiplies it; from the second step on both learn.
    """

    start_gate = 1.0

    def __init__(
        self,
        inner: ChannelAttention,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inner.channels)
        self.inner = inner
        vars(self).update(name=inner.name, paper=inner.paper)  # what tables call it
        self.needs = dataclasses.replace(
            inner.needs,
            # Pulling alpha to 0 would take the attention out again.
            no_decay=("alpha", *(f"inner.{name}" for name in inner.needs.no_decay)),
            stops_gradients=tuple(f"inner.{name}" for name in inner.needs.stops_gradients),
        )
        self.statistics, self.reads_map = inner.statistics, inner.reads_map
        kind = type(inner)
        self._mixes_maps = inner.needs.adds or kind.forward is not ChannelAttention.forward
        self.alpha = nn.Parameter(torch.zeros((), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """alpha = 0; the attention resets itself."""
        nn.init.zeros_(self.alpha)

    def takes_any_rank(self) -> bool:
        """Whether the attention does."""
        return self.inner.takes_any_rank()

    def _why_no_gate(self) -> str | None:
        if self._mixes_maps:
            return f"{self.name} is mixed with its map"
        return self.inner._why_no_gate()

    def _compiled(self) -> CompiledGate | None:
        find = getattr(self.inner.gate_from, "compiled", None)
        compiled = None if find is None else find(self.inner)
        if compiled is None or compiled.alpha is not None:
            return None
        return compiled._replace(alpha=self.alpha, observed=bool(self.inner._observers))

    @compiled_by(_compiled)
    def gate_from(self, stats: PlaneStats) -> Tensor:
        """1 + alpha (v - 1), [N, C]."""
        return self._from_one(self.inner.gate_from(stats))

    def map_gate(self, x: Tensor) -> Tensor:
        """1 + alpha (v - 1), broadcastable to x."""
        return self._from_one(self.inner.gate(x))

    def forward(self, x: Tensor) -> Tensor:
        """y, as in the formula."""
        if not self._mixes_maps:
            return super().forward(x)
        return x + self.alpha.to(x.dtype) * (self.inner(x) - x)

    def _check(self, x: Tensor) -> None:
        self.inner._check(x)  # whose name says more

    def _from_one(self, v: Tensor) -> Tensor:
        return 1.0 + self.alpha.to(v.dtype) * (v - 1.0)


SE_LAYERS = {
    "timm.layers.squeeze_excite:SEModule": "fc1 bn act fc2 gate",
    "timm.models._efficientnet_blocks:SqueezeExcite": "conv_reduce act1 conv_expand gate",
    "timm.models.senet:SEModule": "fc1 relu fc2 sigmoid",
    "torchvision.ops.misc:SqueezeExcitation": "fc1 activation fc2 scale_activation",
}
"""Squeeze-and-excitation layers: the parts between the average and the factor, in their order."""

OTHER_LAYERS = {
    *("timm.layers.squeeze_excite:EffectiveSEModule", "timm.layers.squeeze_excite:SqueezeExciteCl"),
    *("timm.layers.eca:EcaModule", "timm.layers.eca:CecaModule"),
    *("timm.layers.cbam:CbamModule", "timm.layers.cbam:LightCbamModule"),
    *("timm.layers.gather_excite:GatherExcite", "timm.layers.global_context:GlobalContext"),
    *("timm.layers.coord_attn:CoordAttn", "timm.models.hgnet:EseModule"),
}
"""Other attention layers that can be replaced."""


def existing_layer(module: object) -> str | None:
    """What attention layer a module of a host is: its key in these tables; None if it is none."""
    keys = (f"{cls.__module__}:{cls.__name__}" for cls in type(module).__mro__)
    return next((key for key in keys if key in SE_LAYERS or key in OTHER_LAYERS), None)


def se_parts(module: object) -> list[str]:
    """What an SE of a host has between the average and the factor; nothing if it is none.

    Nor if it is a subclass with a forward of its own, which may do something else with them.
    """
    kinds = type(module).__mro__
    owner = next((cls for cls in kinds if "forward" in vars(cls)), object)
    return SE_LAYERS.get(f"{owner.__module__}:{owner.__name__}", "").split()


class FromAverage(Pool):
    """A pool that starts as the average and learns how much of another one to take.

    Formula:
        u = avg + beta (pool - avg), beta one learned number, 0 at the start.
    """

    def __init__(self, pool: PoolSpec, like: Tensor) -> None:
        super().__init__()
        self.pool = make_pool(pool, device=like.device, dtype=like.dtype)
        self.beta = nn.Parameter(like.new_zeros(()))
        self.statistics = tuple(dict.fromkeys(("mean", *self.pool.statistics)))
        self.needs_map = self.pool.needs_map

    def forward(self, stats: PlaneStats) -> Tensor:
        """u, [N, C]."""
        average = stats.mean
        assert average is not None
        return average + self.beta.to(average.dtype) * (self.pool(stats) - average)


class CarriedSE(Around, ChannelAttention):
    """The SE of a host with its weights, activation and gate, and with a pool of ours.

    Formula:
        y = x * s(W2 act(W1 u + b1) + b2); act and s are the host's, u = avg + beta (pool - avg).

    Args:
        host: The layer (`SE_LAYERS`).
        pool: The pool; ``"avg"`` leaves the layer as it is.
        exact: Whether it starts as the exact average; else it is the pool from the start.
        place: Its name in the host.
    """

    inner = "host"
    role = "in an attention that took over its weights"
    name = "se"
    needs = Needs()

    def __init__(
        self, host: nn.Module, pool: PoolSpec, *, channels: int, exact: bool, place: str = ""
    ) -> None:
        ChannelAttention.__init__(self, channels)
        self._hold(host, place)
        self._parts = se_parts(host)
        like = next(host.parameters())
        if exact and pool != "avg":
            chosen: Pool = FromAverage(pool, like)
            # Pulling beta to 0 would take the pool out again.
            self.needs = dataclasses.replace(self.needs, no_decay=("pool.beta",))
            self._constants = {"pool.beta": 0.0}
        else:
            chosen = make_pool(pool, device=like.device, dtype=like.dtype)
        self.add_module("pool", chosen)  # the host may have one of its own
        self._reads(self.pool.statistics)
        self.reads_map = self.pool.needs_map

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """s(W2 act(W1 u + b1) + b2), [N, C]."""
        z = self.pool(stats)[:, :, None, None]
        for name in self._parts:
            z = call(self.host.get_submodule(name), z)
        return z.flatten(1)
