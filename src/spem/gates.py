"""Looking inside: the gates that a network's attention computes, recorded as it runs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spem.attention import ChannelAttention
from spem.attention.pooling import FixedMix, LearnedMix
from spem.insert import IdentityStart
from spem.insert.sites import attentions_of


@dataclass(frozen=True, eq=False)
class GateRecord:
    """One gate that was computed, in at least float32, without gradient.

    Shape:
        gate, own, shift: [N, C] where the factor of a channel is one number, else that of every
            position, [N, C, H, W].

    Attributes:
        name: The attention's name in the state dict. One that the blocks of a stage share has the
            number of the block behind it: ``layer1.shared[0]``.
        module: The attention; of an identity start, what it starts.
        gate: What the map was multiplied by. A module that replaces a norm or a convolution says in
            its own words what its gate is (`Needs.replaces`).
        own: The attention's own gate v; an identity start makes ``gate`` 1 + alpha (v - 1).
        shift: What was added to the map, for a module that adds (`Needs.adds`).
    """

    name: str
    module: ChannelAttention
    gate: Tensor
    own: Tensor
    shift: Tensor | None = None


class Inspection:
    """Records gates while its ``with`` block runs; see `inspect`.

    Attributes:
        names: The names of all attentions of the network, from the first to the last.
        records: Every gate since the block began or `clear`, in the order they were computed.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"inspect: needs a torch.nn.Module, got {type(model).__name__}.")
        if any(
            "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None)
            for module in model.modules()
        ):
            raise ValueError(
                "inspect: the network is compiled, and compiled code does not show its gates. "
                "Inspect the network it was compiled from."
            )
        self._model = model
        self._found = attentions_of(model)
        self._blocks: dict[str, int] = {}
        if not self._found:
            raise ValueError(
                f"inspect: {type(model).__name__} has no attention of this library. "
                "Put it in with spem.attach."
            )
        self.names = list(self._found)
        self.records: list[GateRecord] = []
        self._open: ExitStack | None = None

    @property
    def gates(self) -> dict[str, Tensor]:
        """The latest gate of every attention that has run, by name."""
        return {record.name: record.gate for record in self.records}

    @property
    def silent(self) -> list[str]:
        """The names of the attentions that have computed no gate."""
        heard = {id(record.module) for record in self.records}
        return [name for name, found in self._found.items() if id(_inner(found)) not in heard]

    @property
    def lambdas(self) -> dict[str, float]:
        """The weight of the maximum in every mix of the network as it is now, by name."""
        return {
            f"{name}.{part}".removeprefix("."): float(mix.lam.detach())
            for name, attention in self._found.items()
            for part, mix in attention.named_modules()
            if isinstance(mix, (FixedMix, LearnedMix))
        }

    @property
    def alphas(self) -> dict[str, float]:
        """The alpha of every identity start as it is now, by name."""
        return {
            name: float(attention.alpha.detach())
            for name, attention in self._found.items()
            if isinstance(attention, IdentityStart)
        }

    def clear(self) -> None:
        """Forgets the records."""
        self.records.clear()

    def __enter__(self) -> Inspection:
        if self._open is not None:
            raise RuntimeError("inspect: this inspection is running. Begin another one.")
        with ExitStack() as stack:
            for name, attention in self._found.items():
                inner = _inner(attention)
                if inner.computes_gate_in_forward():
                    handle = inner.observe_gates(partial(self._write, name, attention))
                else:
                    see = partial(self._before, name, attention)
                    handle = inner.register_forward_pre_hook(see)
                stack.enter_context(handle)
                if attention.needs.shared and name:
                    # Its blocks are numbered from 0 in every pass of their stage.
                    stage = self._model.get_submodule(name.rpartition(".")[0])
                    begin = lambda *_, name=name: self._blocks.update({name: 0})  # noqa: E731
                    stack.enter_context(stage.register_forward_pre_hook(begin))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._open is not None
        self._open.close()
        self._open = None

    def _before(
        self, name: str, attention: ChannelAttention, module: nn.Module, inputs: tuple[Any, ...]
    ) -> None:
        """Computes the gate of a forward that is about to run, and leaves no trace of it."""
        assert isinstance(module, ChannelAttention)
        x: Tensor = inputs[0]
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            # A norm in training counts the batch in clones: autograd may have kept the buffers.
            probe = _Gate(module)
            buffers = {name: buffer.clone() for name, buffer in probe.named_buffers()}
            gate, shift = functional_call(probe, buffers, (x,))
        self._write(name, attention, gate, x.shape[0], shift)

    def _write(
        self,
        name: str,
        attention: ChannelAttention,
        gate: Tensor,
        images: int,
        shift: Tensor | None = None,
    ) -> None:
        inner = _inner(attention)
        own = _expanded(gate, images, inner.channels)
        full = own
        shift = None if shift is None else _expanded(shift, images, inner.channels)
        if isinstance(attention, IdentityStart):
            alpha = attention.alpha.detach().to(own.dtype)
            full = 1.0 + alpha * (own - 1.0)
            shift = None if shift is None else alpha * shift
        if attention.needs.shared:
            block = self._blocks.get(name, 0)
            self._blocks[name] = block + 1
            name = f"{name}[{block}]"
        self.records.append(GateRecord(name, inner, full, own, shift))


def inspect(model: nn.Module) -> Inspection:
    """Records the gates of every attention of a network, for the length of a ``with`` block.

    Outputs, gradients, running statistics and random numbers are those without it, bit for bit,
    with fused tails and composed ones, in training and in evaluation. Nothing stays on the network
    afterwards, also if the block ends in an exception.

    Raises:
        ValueError: There is no attention in it, or it is compiled.

    Examples:
        >>> import spem
        >>> model = spem.resnet(11, attention="spem").eval()
        >>> with spem.inspect(model) as inside:
        ...     answer = model(torch.zeros(2, 3, 32, 32))
        >>> [tuple(gate.shape) for gate in inside.gates.values()]
        [(2, 64), (2, 128), (2, 256)]
    """
    return Inspection(model)


def _inner(attention: ChannelAttention) -> ChannelAttention:
    return attention.inner if isinstance(attention, IdentityStart) else attention


def _expanded(value: Tensor, images: int, channels: int) -> Tensor:
    """[N, C], or [N, C, H, W] where positions differ."""
    value = value.detach().expand(images, channels, *value.shape[2:])
    flat = value.dim() > 2 and all(size == 1 for size in value.shape[2:])
    return value.flatten(1) if flat else value


class _Gate(nn.Module):
    """What an attention multiplies its map by, and what it adds, as a forward."""

    def __init__(self, module: ChannelAttention) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.module.gate(x), self.module.shift(x) if self.module.needs.adds else None
