"""The module contract: what every channel-attention module is, and declares to its users."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from spem.attention.descriptor import MapStats, Pool
from spem.attention.needs import Needs
from spem.attention.pooling import LearnedMix, PoolSpec, make_pool
from spem.attention.precision import without_autocast
from spem.ops import Choice, PlaneStats, bn_gate_tail, gate_tail, plane_stats
from spem.ops.dispatch import log_choice
from spem.ops.library import has_hooks
from spem.ops.stats import STATISTICS
from spem.seeding import Initialiser


class Ending(Protocol):
    """What ends a residual branch: a module, or what `ChannelAttention.begin` gave for a stage."""

    def tail(self, z: Tensor, residual: Tensor, norm: nn.Module | None = None) -> Tensor:
        """relu(attention(norm(z)) + residual)."""
        ...


class ChannelAttention(nn.Module):
    """Base of all channel-attention modules: y = x * gate(x).

    A module whose gate is a function of plane statistics writes `gate_from`; it then takes maps of
    any rank (N x C x L, N x C x H x W, N x C x D x H x W). Any other module writes `gate` and takes
    N x C x H x W. One with forms of both kinds writes `gate_from` and `map_gate`, and
    `takes_any_rank` says which of them an instance is. Gates are computed in at least float32 with
    autocast off; only the final factor is cast to the map's dtype.

    A module whose `needs` say that it replaces a norm or a convolution writes its own `forward`;
    one that carries a state from block to block extends `spem.attention.carrying.Carrying`.

    Shape:
        x and output: [N, C, ...], equal shape, dtype and memory format; x is never changed.
    """

    name: ClassVar[str] = ""
    """Registry key, set by `register_attention`."""
    paper: ClassVar[str] = ""
    """Where the module is defined: title, year, link."""
    needs: Needs = Needs()
    """What the default form demands; an instance of another form may have its own."""
    random_init: Mapping[str, Initialiser] = {}  # replaced, never changed
    """Rules for randomly drawn parameters (relative names) that differ from torch's default for
    their layer; an instance may have its own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the gates of every module run with autocast off, whoever calls."""
        super().__init_subclass__(**kwargs)
        for method in ("gate", "gate_from", "map_gate", "shift"):
            if method in cls.__dict__:
                setattr(cls, method, without_autocast(cls.__dict__[method]))

    def __init__(
        self,
        channels: int,
        *,
        pool: PoolSpec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Checks the channel count and builds the pool, if the module has one."""
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(
                f"{type(self).__name__}: channels={channels!r} is not a positive integer."
            )
        self.channels = channels
        self.statistics: tuple[str, ...] = ()
        """Plane statistics the gate reads, in canonical order: the module's own and its pools'."""
        self.reads_map = False
        """Whether a pool must be given the map itself in training."""
        self._reads(self.needs.statistics)
        if pool is not None:
            self.pool = self._make_pool(pool, device=device, dtype=dtype)

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """The gate as a function of plane statistics, [N, C] in at least float32."""
        raise NotImplementedError(
            f"{type(self).__name__} is no function of plane statistics; call gate(x)."
        )

    def gate(self, x: Tensor) -> Tensor:
        """The recalibration factor in at least float32, broadcastable to x ([N, C, 1, ...])."""
        if not self.takes_any_rank():
            return self.map_gate(x)
        v = self.gate_from(self.stats_of(x))
        return v.reshape(*v.shape, *[1] * (x.dim() - 2))

    def stats_of(self, x: Tensor) -> PlaneStats:
        """The plane statistics that gate and pools read; with the map where a pool needs it."""
        stats = plane_stats(x, self.statistics)
        if not (self.reads_map and self.training):
            return stats
        return cast("PlaneStats", MapStats(*stats, x))  # the same fields, and one more

    def map_gate(self, x: Tensor) -> Tensor:
        """The gate of an instance that is no function of plane statistics, though others are."""
        raise NotImplementedError(f"{type(self).__name__} has neither gate_from nor a gate.")

    def shift(self, x: Tensor) -> Tensor:
        """What a module that adds (`Needs.adds`) adds to x * gate(x), in at least float32."""
        raise NotImplementedError(f"{type(self).__name__} adds nothing to the map.")

    def forward(self, x: Tensor) -> Tensor:
        """y = x * gate(x).

        Raises:
            TypeError: x is no floating-point tensor.
            ValueError: Wrong rank or channel count, or a map or batch smaller than `needs` says.
        """
        self._check(x)
        return x * self.gate(x).to(x.dtype)

    def tail(self, z: Tensor, residual: Tensor, norm: nn.Module | None = None) -> Tensor:
        """The end of a residual branch: relu(self(norm(z)) + residual).

        A module whose gate is a function of plane statistics runs it in one operation with the
        norm (`spem.ops.bn_gate_tail`); any other is composed, and so is one with hooks.
        z and residual keep their values.

        Shape:
            z, residual, output: [N, C, ...].
        """
        composed = self.why_composed()
        if composed is not None:
            log_choice("tail", z, Choice("reference", composed))
            return (self(z if norm is None else norm(z)) + residual).relu_()
        self._check(z)
        read = self.statistics
        if norm is None:
            return gate_tail(z, residual, self.gate_from, statistics=read)
        return bn_gate_tail(z, residual, norm, self.gate_from, statistics=read)

    def begin(self) -> Ending:
        """What the blocks of a stage that share this module get, anew in each forward pass."""
        return self

    def why_composed(self) -> str | None:
        """Why the tail of this module is composed of modules; None if its gate can be fused."""
        kind = type(self)
        if not self.takes_any_rank():
            return f"{self.name or kind.__name__} is no function of plane statistics"
        if self.needs.replaces is not None:
            return f"{self.name or kind.__name__} stands in place of a {self.needs.replaces}"
        if self.reads_map and self.training:
            return f"{self.name or kind.__name__} pools random regions of the map in training"
        if kind.forward is not ChannelAttention.forward or kind.gate is not ChannelAttention.gate:
            return f"{kind.__name__} has a forward of its own"
        return f"cannot call the hooks of {kind.__name__}" if has_hooks(self) else None

    def reset_parameters(self) -> None:
        """Sets the parameters that start as constants; a module that has some extends this."""
        for mix in self.modules():
            if isinstance(mix, LearnedMix):
                mix.reset_parameters()

    @property
    def start_gate(self) -> float | None:
        """The gate's value at initialisation if it does not depend on the data, else None."""
        return None

    def takes_any_rank(self) -> bool:
        """Whether the gate is a function of plane statistics, so that any rank is taken."""
        return type(self).gate_from is not ChannelAttention.gate_from

    def _make_pool(
        self,
        pool: PoolSpec,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Pool:
        """Builds a pool and adds what it reads to ``statistics``."""
        try:
            built = make_pool(pool, device=device, dtype=dtype)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None
        self._reads(built.statistics)
        self.reads_map = self.reads_map or built.needs_map
        return built

    def _reads(self, names: Iterable[str]) -> None:
        read = {*self.statistics, *names}
        self.statistics = tuple(name for name in STATISTICS if name in read)

    def _draw_start(self) -> None:
        """Initialises with torch's global generator; called at the end of a constructor."""
        for name, rule in self.random_init.items():
            rule(self.get_parameter(name), None)
        self.reset_parameters()

    def _check(self, x: Tensor) -> None:
        label = type(self).__name__
        if not x.is_floating_point():
            raise TypeError(
                f"{label}: needs a floating-point map, got {x.dtype}. Convert it, e.g. x.float()."
            )
        rank = x.dim()
        if not (3 <= rank <= 5 if self.takes_any_rank() else rank == 4):
            allowed = (
                "[N, C, ...] with 1 to 3 spatial axes" if self.takes_any_rank() else "[N, C, H, W]"
            )
            raise ValueError(f"{label}: needs a map {allowed}, got {rank} axes {list(x.shape)}.")
        if x.shape[1] != self.channels:
            raise ValueError(
                f"{label}: built for channels={self.channels}, got a map with {x.shape[1]} "
                f"channels {list(x.shape)}."
            )
        pixels = 1
        for extent in x.shape[2:]:
            pixels = pixels * extent
        if pixels < self.needs.pixels:
            raise ValueError(
                f"{label}: needs maps of at least {self.needs.pixels} positions, "
                f"got {list(x.shape)}; its definition divides by the deviation of a plane."
            )
        count = x.shape[0]
        if not self.training or not self.needs.batch_statistics or count == 0:
            return
        if count < self.needs.batch or count * pixels < self.needs.values:
            least = (
                f"{self.needs.batch} images"
                if self.needs.batch > 1
                else f"{self.needs.values} values (N H W)"
            )
            raise ValueError(
                f"{label}: training needs a batch of at least {least}, since it normalises over "
                f"the batch; got {list(x.shape)}. Use a larger batch, or eval()."
            )


_A = TypeVar("_A", bound=type[ChannelAttention])
_REGISTRY: dict[str, type[ChannelAttention]] = {}


def register_attention(
    name: str,
    *,
    paper: str,
    needs: Needs = Needs(),  # noqa: B008  # frozen
) -> Callable[[_A], _A]:
    """Registers a module class under a name for specs, the command line and generated tables.

    Args:
        name: Registry key, an identifier in lower case.
        paper: Title, year and link of the definition.
        needs: What its definition demands.

    Raises:
        ValueError: The name is taken, reserved, or no lower-case identifier.
    """
    if not name.isidentifier() or name != name.lower() or name in ("none", "mix"):
        raise ValueError(f"register_attention: {name!r} is no free lower-case identifier.")

    def decorate(cls: _A) -> _A:
        if name in _REGISTRY:
            raise ValueError(
                f"register_attention: {name!r} is already registered, "
                f"by {_REGISTRY[name].__qualname__}."
            )
        cls.name, cls.paper, cls.needs = name, paper, needs
        _REGISTRY[name] = cls
        return cls

    return decorate


def attention_class(name: str) -> type[ChannelAttention]:
    """The registered class of a name.

    Raises:
        ValueError: No such name; the message lists the nearest ones.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = get_close_matches(name.lower(), [*_REGISTRY, "none"], n=3, cutoff=0.5)
    hint = (
        f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(list_attention())}."
    )
    raise ValueError(f"unknown attention {name!r}. {hint}")


def list_attention(pattern: str = "*") -> list[str]:
    """Registered names that match a wildcard pattern, sorted.

    >>> list_attention("s[eg]*")
    ['se', 'sge']
    """
    return sorted(name for name in _REGISTRY if fnmatchcase(name, pattern))
