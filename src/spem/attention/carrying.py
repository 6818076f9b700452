"""Modules that one stage shares and that hand a state from block to block."""

from typing import Any, overload

from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Ending
from spem.attention.precision import without_autocast
from spem.ops import Choice, PlaneStats, bn_gate_tail, gate_tail
from spem.ops.dispatch import log_choice
from spem.ops.library import has_hooks

State = tuple[Tensor, ...]
"""What a block hands to the next one; () before the first block of a stage."""


class Carrying(ChannelAttention):
    """Base of modules whose gate depends on what they saw in the blocks before.

    Such a module writes one pure function, `step`: plane statistics and the state before a block
    give the gate and the state after it. Nothing is kept on the module: a state lives as long as
    the forward pass of a stage (`begin`). Called with a map alone, the module acts as at the first
    block.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the step of every module run with autocast off, as its gate does."""
        super().__init_subclass__(**kwargs)
        if "step" in cls.__dict__:
            setattr(cls, "step", without_autocast(cls.__dict__["step"]))  # noqa: B010

    def step(self, stats: PlaneStats, state: State) -> tuple[Tensor, State]:
        """The gate [N, C] in at least float32, and the state after this block."""
        raise NotImplementedError(f"{type(self).__name__} has no step.")

    def begin(self) -> Ending:
        """A walk through the blocks of a stage, from the state ()."""
        return Walk(self)

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """The gate of the first block, [N, C]."""
        return self.step(stats, ())[0]

    def gate(self, x: Tensor, state: State = ()) -> Tensor:
        """The gate after a state, [N, C, 1, ...]."""
        return self._gate_and_state(x, state)[0]

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]: ...
    def forward(self, x: Tensor, state: State | None = None) -> Tensor | tuple[Tensor, State]:
        """x * gate(x), and if a state is given, the state after it."""
        self._check(x)
        v, after = self._gate_and_state(x, () if state is None else state)
        y = x * v.to(x.dtype)
        return y if state is None else (y, after)

    def walk(
        self,
        z: Tensor,
        residual: Tensor,
        norm: nn.Module | None,
        state: State,
    ) -> tuple[Tensor, State]:
        """`tail` of a block, with the state before it and after it."""
        composed = self.why_composed()
        if composed is not None:
            log_choice("tail", z, Choice("reference", composed))
            y, state = self(z if norm is None else norm(z), state)
            return (y + residual).relu_(), state
        self._check(z)
        after = state

        def gate(stats: PlaneStats) -> Tensor:
            nonlocal after
            v, after = self.step(stats, state)
            return v

        read = self.statistics
        if norm is None:
            y = gate_tail(z, residual, gate, statistics=read)
        else:
            y = bn_gate_tail(z, residual, norm, gate, statistics=read)
        return y, after

    def why_composed(self) -> str | None:
        """Why the tail of this module is composed of modules; None if its gate can be fused."""
        if self.reads_map and self.training:
            return f"{self.name} pools random regions of the map in training"
        if type(self).forward is not Carrying.forward or type(self).gate is not Carrying.gate:
            return f"{type(self).__name__} has a forward of its own"
        return f"cannot call the hooks of {type(self).__name__}" if has_hooks(self) else None

    def _gate_and_state(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        v, after = self.step(self.stats_of(x), state)
        return v.reshape(*v.shape, *[1] * (x.dim() - 2)), after


class Walk:
    """One forward pass of a module through the blocks of a stage; it alone holds the state."""

    def __init__(self, attention: Carrying) -> None:
        self._attention = attention
        self._state: State = ()

    def tail(self, z: Tensor, residual: Tensor, norm: nn.Module | None = None) -> Tensor:
        """relu(attention(norm(z)) + residual) of the next block."""
        y, self._state = self._attention.walk(z, residual, norm, self._state)
        return y
