"""What a measurement is told: device, rounds, implementation; and who takes part in it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from spem.ops.dispatch import IMPLEMENTATIONS, unsupported

COMPOSED, OFFICIAL, FUSED = "composed", "official", "fused"
COMPILED, FORMULA = "compiled", "formula compiled"
FOLDED, FUSED_FOLDED, COMPOSED_FOLDED = "folded", "fused folded", "composed folded"
GRAPH = " graph"
"""Ending of a way that replays a CUDA graph."""

FUSED_IMPLS = tuple(name for name in IMPLEMENTATIONS if name != "reference")
CODE = "spem(form=code)"
"""The form that the official program computes."""


@dataclass(frozen=True)
class Subject:
    """One line of a comparison: an attention, and the way in which it is computed.

    Attributes:
        attention: Text of a spec, or ``"none"``.
        way: ``composed`` (torch's operations one by one, as people write them; without attention
            this is plain PyTorch), ``official`` (the published program's computation),
            ``compiled``, ``formula compiled`` (the four passes as torch operations, compiled) or
            ``fused`` (this machine's kernels; without attention the same passes with v = 1). In
            inference ``folded`` has the norms folded into the convolutions.
    """

    attention: str
    way: str

    def __str__(self) -> str:
        return f"{self.attention}, {self.way}"


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: ``"cpu"``, ``"cuda"`` or ``"auto"`` (CUDA where there is any).
        rounds: Timed calls of each provider.
        warm_up: Calls of each provider before those.
        threads: CPU threads, 0 for torch's choice.
        impl: What counts as fused; None takes this machine's kernels.
        compiled: Whether compiled ways take part.
        quick: Tiny sizes, to see that everything runs; such times mean nothing.
    """

    device: str = "auto"
    rounds: int = 15
    warm_up: int = 2
    threads: int = 0
    impl: str | None = None
    compiled: bool = True
    quick: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 2:
            raise ValueError(f"bench: rounds={self.rounds}: quantiles need at least 2.")
        if self.warm_up < 0 or self.threads < 0:
            raise ValueError("bench: warm_up and threads must not be negative.")
        if self.impl not in (None, *FUSED_IMPLS):
            raise ValueError(
                f"bench: impl={self.impl!r} has no fused passes. Use {', '.join(FUSED_IMPLS)}."
            )

    def where(self) -> torch.device:
        """The device.

        Raises:
            ValueError: It is not there, or nothing here can time it.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"bench: device {name!r} cannot be timed. Use 'cpu' or 'cuda'.")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("bench: torch sees no CUDA device here. Use device='cpu'.")
        return device


def fused_impl(settings: Settings, dtype: torch.dtype) -> tuple[str | None, str]:
    """The implementation that counts as fused on maps of a dtype, or None and why there is none."""
    device = settings.where().type
    impl = settings.impl or ("triton" if device == "cuda" else "numba")
    if impl == "triton" and device == "cpu":
        return None, "triton's interpreter is not timed"
    reason = unsupported(impl, device, dtype)
    return (impl, "") if reason is None else (None, f"{impl} {reason}")


def impl_of(way: str, fused: str | None) -> str:
    """The implementation under which a way runs."""
    if way.startswith(FUSED):
        assert fused is not None
        return fused
    return "formula" if way.startswith(FORMULA) else "reference"


def with_graphs(
    subjects: Sequence[Subject],
    attentions: Sequence[str],
    ways: Sequence[str] = (COMPOSED, FUSED),
) -> list[Subject]:
    """The subjects, followed by those of some attentions and ways as graphs."""
    replayed = [
        Subject(s.attention, s.way + GRAPH)
        for s in subjects
        if s.attention in attentions and s.way in ways
    ]
    return [*subjects, *replayed]


@contextlib.contextmanager
def full_precision(threads: int) -> Generator[None]:
    """Sets threads, and float32 convolutions and products without TF32, for a ``with`` block."""
    before = torch.get_num_threads()
    convolutions = torch.backends.cudnn.allow_tf32
    products = torch.backends.cuda.matmul.allow_tf32
    search = torch.backends.cudnn.benchmark
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.benchmark = search
