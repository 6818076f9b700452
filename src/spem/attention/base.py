"""The module contract: what every channel-attention module is and declares, and their registry."""

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from keyword import iskeyword
from types import EllipsisType
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.hooks import RemovableHandle

from spem.attention.options import Device, Dtype, one_of, positive_int
from spem.attention.pooling import LearnedMix, Pool, PoolSpec, learned_mixes, make_pool
from spem.attention.precision import without_autocast
from spem.ops import Choice, PlaneStats, bn_gate_tail, gate_tail, plane_stats
from spem.ops.dispatch import log_choice
from spem.ops.library import has_hooks, may_show, without_hooks
from spem.ops.stats import STATISTICS
from spem.ops.tail import called
from spem.seeding import Initialiser

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)  # pyright: ignore[reportPrivateUsage]
Place = Literal["tail", "conv", "norm", "middle", "between", "stage"]
PLACES: dict[Place, str] = {
    "tail": "after the last norm of every block",
    "conv": "before every convolution",
    "norm": "in place of every norm but the shortcuts'",
    "middle": "in place of the 3x3 convolution of every bottleneck, with its norm",
    "between": "after every stage but the last",
    "stage": "after every stage",
}
"""Places of a network where a module can go."""
Tail = Callable[[Tensor, Tensor, nn.Module | None], Tensor]
"""relu(attention(norm(z)) + residual) of z, residual and norm."""
GateObserver = Callable[[Tensor, int], None]
"""Called with a gate, broadcastable to [N, C, ...], and N."""

_computing: ContextVar[frozenset[int]] = ContextVar("computing", default=frozenset())
"""The modules whose gate is being computed, in this thread or task."""


@dataclass(frozen=True)
class Needs:
    """What a module's definition demands of its caller; checked in forward and shown in tables.

    Attributes:
        statistics: Plane statistics its gate reads besides its pool's ("mean", "var", "max",
            "min"); the others are None in `gate_from`.
        pixels: Smallest number of positions of a map (H W).
        batch: Smallest number of images in training.
        values: Smallest number of values N H W in training.
        batch_statistics: Whether training and evaluation differ (the module holds a batch norm).
        divides: Name of the option that must divide the channels, or None.
        no_decay: Parameters (relative names) that its authors train without weight decay.
        size: Whether it is built for one map size (option ``size``).
        fixed_size: Whether it refuses maps of another size than it was built for.
        stops_gradients: Parameters (relative names) without the full gradient, by definition.
        adds: Whether it also adds to the map: y = x * gate(x) + shift(x).
        place: Where in a network it goes (`PLACES`); its option ``placement``, if there is one.
        shared: Whether the blocks of a stage share one module.
        replaces: The layer it is used instead of, or None; its output is not x * gate(x).
    """

    statistics: tuple[str, ...] = ()
    pixels: int = 1
    batch: int = 1
    values: int = 1
    batch_statistics: bool = False
    divides: str | None = None
    no_decay: tuple[str, ...] = ()
    size: bool = False
    fixed_size: bool = False
    stops_gradients: tuple[str, ...] = ()
    adds: bool = False
    place: Place = "tail"
    shared: bool = False
    replaces: Literal["norm", "conv"] | None = None

    def __post_init__(self) -> None:
        for name in self.statistics:
            one_of("Needs", STATISTICS, statistics=name)


class ChannelAttention(nn.Module):
    """Base of all channel-attention modules: y = x * gate(x).

    A module whose gate is a function of plane statistics writes `gate_from`; it then takes maps of
    any rank (N x C x L, N x C x H x W, N x C x D x H x W). Any other module writes `gate` and takes
    N x C x H x W. One with forms of both kinds writes `gate_from` and `map_gate`, and
    `takes_any_rank` says which of them an instance is. Gates are computed in at least float32 with
    autocast off; only the final factor is cast to the map's dtype. Layers inside are called
    (`spem.attention.precision.call`), so that hooks, LoRA, pruning and quantisation act on them.

    Shape: x and output: [N, C, ...], equal shape, dtype and memory format; x is never changed.

    Args:
        channels: C.
        pool: How a plane becomes a number; left out by a module that has no pool.

    Raises:
        ValueError: A number of channels, or an option, that the module's own text does not allow.
    """

    name: ClassVar[str] = ""
    """Registry key, set by `register_attention`."""
    paper: ClassVar[str] = ""
    """Where the module is defined: title, year, link."""
    needs: Needs = Needs(statistics=STATISTICS)
    """What the default form demands; an instance of another form may have its own. A class that
    declares nothing gets every statistic."""
    random_init: Mapping[str, Initialiser] = {}  # replaced, never changed
    """Rules for randomly drawn parameters (relative names) that differ from torch's default for
    their layer; an instance may have its own."""
    start_gate: float | None = None
    """The gate's value at initialisation if it does not depend on the data, else None."""
    _constants: Mapping[str, float] = {}  # an instance has its own
    _observers: Mapping[int, GateObserver] = {}  # an instance that is observed has its own

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the gates of every module run with autocast off and be observed, whoever calls."""
        super().__init_subclass__(**kwargs)
        for method in ("gate", "gate_from", "map_gate", "step", "shift"):
            if method in cls.__dict__:
                wrapped = without_autocast(cls.__dict__[method])
                setattr(cls, method, wrapped if method == "shift" else cls._observed(wrapped))

    def __init__(
        self,
        channels: int,
        *,
        pool: PoolSpec | EllipsisType = ...,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        positive_int(type(self).__name__, channels=channels)
        self.channels = channels
        self.statistics: tuple[str, ...] = ()
        """Plane statistics the gate reads, in canonical order: the module's own and its pools'."""
        self.reads_map = False
        """Whether a pool must be given the map itself in training."""
        self._reads(self.needs.statistics)
        if pool is not ...:
            self.pool = self._make_pool(pool, device=device, dtype=dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output; a network that `torch.fx` traces calls the whole module as one."""
        if not args and "x" in kwargs:
            args = (kwargs.pop("x"),)  # hooks look for it there
        if args and isinstance(args[0], Proxy):
            x = args[0]
            path: str = x.tracer.path_of_module(self)  # pyright: ignore[reportAttributeAccessIssue]
            return x.tracer.create_proxy("call_module", path, args, kwargs)
        return super().__call__(*args, **kwargs)

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """The gate as a function of plane statistics, [N, C] in at least float32."""
        raise NotImplementedError(
            f"{type(self).__name__} is not a function of plane statistics; call gate(x)."
        )

    def gate(self, x: Tensor) -> Tensor:
        """The recalibration factor in at least float32, broadcastable to x ([N, C, 1, ...])."""
        if not self.takes_any_rank():
            return self.map_gate(x)
        return along(self.gate_from(self.stats_of(x)), x)

    def map_gate(self, x: Tensor) -> Tensor:
        """The gate of an instance that is not a function of plane statistics, though others are."""
        raise NotImplementedError(f"{type(self).__name__} has neither gate_from nor a gate.")

    def stats_of(self, x: Tensor) -> PlaneStats:
        """The plane statistics that gate and pools read; with the map where a pool needs it."""
        stats = plane_stats(x, self.statistics)
        return stats._replace(map=x) if self.reads_map and self.training else stats

    def shift(self, x: Tensor) -> Tensor:
        """What a module that adds (`Needs.adds`) adds to x * gate(x), in at least float32."""
        raise NotImplementedError(f"{type(self).__name__} adds nothing to the map.")

    def forward(self, x: Tensor) -> Tensor:
        """y = x * gate(x).

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: Wrong rank or channel count, or a map or batch smaller than `needs` says.
        """
        self._check(x)
        return x * self.gate(x).to(x.dtype)

    def tail(self, z: Tensor, residual: Tensor, norm: nn.Module | None = None) -> Tensor:
        """The end of a residual branch: relu(self(norm(z)) + residual).

        A gate that is a function of plane statistics runs in one operation with the norm
        (`spem.ops.bn_gate_tail`); any other is composed, and so is a module with hooks in training
        or where gradients are recorded. z and residual keep their values.

        Shape:
            z, residual, output: [N, C, ...].
        """
        return self._tail(z, residual, norm, lambda m: m.gate_from, lambda m, x: m(x))

    def begin(self, blocks: int) -> list[Tail]:
        """The tails of the blocks of a stage that share this module, for one forward pass."""
        return [self.tail] * blocks

    def observe_gates(self, observer: GateObserver) -> RemovableHandle:
        """Calls ``observer(gate, N)`` with every gate that is computed; changes no result.

        Modules whose forward is their own may compute none (`computes_gate_in_forward`).
        """
        if not self._observers:
            self._observers = OrderedDict()
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer  # pyright: ignore[reportIndexIssue]  # its own
        return handle

    def computes_gate_in_forward(self) -> bool:
        """Whether a forward pass calls the methods that are observed; a forward of its own may."""
        return type(self).forward is self._plain.forward

    @property
    def _plain(self) -> "type[ChannelAttention]":
        """The class whose forward and gate are what a fused tail computes."""
        return ChannelAttention

    def why_composed(self) -> str | None:
        """Why the tail of this module is composed of modules; None if its gate can be fused.

        Without gradients hooks are no reason: they are called in addition to the fused tail.
        """
        hooked = f"cannot call the hooks of {type(self).__name__}" if has_hooks(self) else None
        return self._why_no_gate() or hooked

    def _why_no_gate(self) -> str | None:
        """Why a tail cannot be fused, with hooks or without."""
        kind, plain, name = type(self), self._plain, self.name or type(self).__name__
        if not self.takes_any_rank():
            return f"{name} is not a function of plane statistics"
        if self.reads_map and self.training:
            return f"{name} pools random regions of the map in training"
        if kind.forward is not plain.forward or kind.gate is not plain.gate:
            return f"{kind.__name__} has a forward of its own"
        return None

    def reset_parameters(self) -> None:
        """Sets what starts as a constant, norms at 1/0; a module with more of it extends this."""
        for name, part in self.named_modules():
            drawn = f"{name}.weight" in self.random_init
            if isinstance(part, (LearnedMix, *_NORMS)) and not drawn:
                part.reset_parameters()
        for name, value in self._constants.items():
            owner, _, local = name.rpartition(".")
            nn.init.constant_(getattr(self.get_submodule(owner), local), value)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Numbers of axes of the maps it takes: (3, 4, 5), or (4,) for [N, C, H, W] alone."""
        return (3, 4, 5) if self.takes_any_rank() else (4,)

    def takes_any_rank(self) -> bool:
        """Whether the gate is a function of plane statistics, so that any rank is taken."""
        return type(self).gate_from is not ChannelAttention.gate_from

    def extra_repr(self) -> str:
        """The channels and the options that it keeps."""
        kept = [f"{k}={vars(self)[k]}" for k in options_of(type(self)) if k in vars(self)]
        return ", ".join([str(self.channels), *kept])

    def _tail(
        self,
        z: Tensor,
        residual: Tensor,
        norm: nn.Module | None,
        gate_of: Callable[[Self], Callable[[PlaneStats], Tensor]],
        call: Callable[[Self, Tensor], Tensor],
    ) -> Tensor:
        traced = not isinstance(z, Tensor)
        trains = self.training or getattr(norm, "training", False)
        shown = not traced and not trains and may_show(self, z)
        composed = "traced" if traced else self._why_no_gate() if shown else self.why_composed()
        if composed is not None:
            log_choice("tail", z, Choice("reference", composed))
            x = z if norm is None else norm(z)
            return (call(self, x) + residual).relu_()
        self._check(z)
        watched = self
        if shown:
            # Hooks are given maps that were made for them; where they only look, the tail is fused.
            x, norm = (z, None) if norm is None else called(norm, z)
            z = x if norm is None else z
            watched = without_hooks(self, inside=True)
            plain, seen = call(watched, x), call(self, x)
            if not torch.equal(seen, plain):
                return (seen + residual).relu_()
        if norm is None:
            return gate_tail(z, residual, gate_of(watched), statistics=self.statistics)
        return bn_gate_tail(z, residual, norm, gate_of(watched), statistics=self.statistics)

    @staticmethod
    def _observed(method: Callable[..., Any]) -> Callable[..., Any]:
        """Calls the observers with what is computed; gates called by another one are part of it."""

        @wraps(method)
        def wrapped(self: ChannelAttention, x: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._observers or id(self) in _computing.get():
                return method(self, x, *args, **kwargs)
            token = _computing.set(_computing.get() | {id(self)})
            try:
                result = method(self, x, *args, **kwargs)
            finally:
                _computing.reset(token)
            gate = result[0] if isinstance(result, tuple) else result
            for observer in list(self._observers.values()):
                observer(gate, x.shape[0] if isinstance(x, Tensor) else x.batch)
            return result

        return wrapped

    def _make_pool(self, pool: PoolSpec, *, device: Device, dtype: Dtype) -> Pool:
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

    def _draw_start(self, constants: Mapping[str, float] | None = None) -> None:
        """Initialises with torch's global generator; called at the end of a constructor.

        ``constants``: What parameters and buffers (relative names) start from, in every position.
        """
        self._constants = constants or {}
        for name, rule in self.random_init.items():
            rule(self.get_parameter(name), None)
        self.reset_parameters()

    def _check(self, x: Tensor) -> None:
        label, needs = type(self).__name__, self.needs
        shape = "[N, C, H, W]" if self.ranks == (4,) else "[N, C, ...] with 1 to 3 spatial axes"
        if isinstance(x, Proxy):
            raise TypeError(
                f"{label}: torch.fx traces networks that hold an attention, and not an attention "
                f"alone. Trace torch.nn.Sequential(module)."
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"{label}: needs a map {shape} as a tensor, got {type(x).__name__}.")
        if not x.is_floating_point():
            raise TypeError(
                f"{label}: needs a floating-point map, got {x.dtype}. Convert it, e.g. x.float()."
            )
        if x.dim() not in self.ranks:
            raise ValueError(f"{label}: needs a map {shape}, got {x.dim()} axes {list(x.shape)}.")
        if x.shape[1] != self.channels:
            raise ValueError(
                f"{label}: built for channels={self.channels}, got a map with {x.shape[1]} "
                f"channels {list(x.shape)}."
            )
        if x.is_meta and not all(p.is_meta for p in self.parameters()):
            raise ValueError(
                f"{label}: the map is on the meta device, which holds no values, and the "
                f"parameters are not. Move the module to it, or give a map with values."
            )
        count, pixels = x.shape[0], 1
        for extent in x.shape[2:]:
            pixels = pixels * extent
        if pixels < needs.pixels:
            raise ValueError(
                f"{label}: needs maps of at least {needs.pixels} "
                f"position{'s' * (needs.pixels > 1)}, got {list(x.shape)}."
            )
        normalises = self.training and needs.batch_statistics and count > 0
        if normalises and (count < needs.batch or count * pixels < needs.values):
            least = f"{needs.batch} images" if needs.batch > 1 else f"{needs.values} values (N H W)"
            raise ValueError(
                f"{label}: training needs a batch of at least {least}, since it normalises over "
                f"the batch; got {list(x.shape)}. Use a larger batch, or eval()."
            )


def along(v: Tensor, x: Tensor) -> Tensor:
    """A gate [N, C] with an axis of length 1 for each spatial axis of a map."""
    return v.reshape(*v.shape, *[1] * (x.dim() - 2))


_A = TypeVar("_A", bound=type[ChannelAttention])
_REGISTRY: dict[str, type[ChannelAttention]] = {}


def register_attention(
    name: str,
    *,
    paper: str,
    needs: Needs | None = None,
) -> Callable[[_A], _A]:
    """Registers a module class under a name for specs, the command line and generated tables.

    Args:
        name: Registry key, an identifier in lower case.
        paper: Title, year and link of the definition.
        needs: What its definition demands; None is what the class, or its base, says.

    Raises:
        ValueError: The name is another class's, reserved, or no lower-case identifier.
        TypeError: The class is no `ChannelAttention`.
    """
    reserved = iskeyword(name) or name in ("none", "mix")
    if reserved or not name.isidentifier() or name != name.lower():
        raise ValueError(f"register_attention: {name!r} is not a free lower-case identifier.")

    def decorate(cls: _A) -> _A:
        if not issubclass(cls, ChannelAttention):
            raise TypeError(f"register_attention: {cls.__name__} is no spem.ChannelAttention.")
        known = _REGISTRY.get(name, cls)
        # The same class again is a cell of a notebook that has run twice, or a module reloaded.
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"register_attention: {name!r} is already registered, by {known.__qualname__}. "
                f"Use another name."
            )
        own = Needs() if cls.needs is ChannelAttention.needs else cls.needs
        cls.name, cls.paper, cls.needs = name, paper, needs or own
        _REGISTRY[name] = cls
        return cls

    return decorate


def options_of(cls: type[ChannelAttention]) -> list[str]:
    """The keywords of a module's constructor but ``device`` and ``dtype``."""
    parameters = list(inspect.signature(cls).parameters)[1:]  # the first is the channel count
    return [name for name in parameters if name not in ("device", "dtype")]


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, *, mix_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimiser groups that honour what every module declares.

    Each trainable parameter is in exactly one group. Parameters that a module's authors train
    without weight decay (`Needs.no_decay`) and those of learned mixes get none (a mix without decay
    keeps lambda from drifting); all others get ``weight_decay``.

    Args:
        model: The network.
        lr: Learning rate.
        weight_decay: Weight decay of ordinary parameters.
        mix_lr: A learning rate of their own for learned mixes, or None for ``lr``.
    """
    mix_lr = lr if mix_lr is None else mix_lr
    decay, spared, mixes = groups = [
        dict[str, Any](params=[], lr=rate, weight_decay=own)
        for rate, own in ((lr, weight_decay), (lr, 0.0), (mix_lr, 0.0))
    ]
    group_of = {id(parameter): spared for parameter in _declared_no_decay(model)}
    group_of |= {id(p): mixes for _, mix in learned_mixes(model) for p in mix.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            group_of.get(id(parameter), decay)["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _declared_no_decay(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, ChannelAttention):
            for full, parameter in module.named_parameters():
                # Where a parametrisation, weight norm or pruning has moved what has this name.
                plain = re.sub(r"parametrizations\.(\w+)\.\w+(\.\w+)*$|_(orig|g|v)$", r"\1", full)
                if plain in module.needs.no_decay:
                    yield parameter


def attention_parameters(model: nn.Module) -> int:
    """Number of parameters that belong to channel-attention modules, shared ones once.

    Those of a module that replaces a norm or a convolution count whole, with what they replace.
    """
    own = (module for module in model.modules() if isinstance(module, ChannelAttention))
    return sum(p.numel() for p in {p for module in own for p in module.parameters()})
