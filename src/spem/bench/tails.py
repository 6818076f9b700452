"""One block tail as a provider: built, compared with the reference in float64, then timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from spem.attention import SPEM, ChannelAttention, as_spec
from spem.bench.checks import (
    BATCH_NORMALISED,
    COMPOSED_IN_HALF,
    MAPS,
    PARAMETERS,
    require_close,
)
from spem.bench.official import OfficialWay, official, our_name
from spem.bench.settings import COMPILED, FORMULA, GRAPH, OFFICIAL, Subject
from spem.bench.timing import Sample, captured, timed
from spem.models import residual_tail
from spem.ops import use_impl
from spem.seeding import initialise, keyed_generator

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
HIGH, LOW = 7.0, -5.0
"""The extrema of every plane: so far out that no rounding gives them company, which would make it a
matter of precision to which position their gradient goes; and their sum, which SPEM takes, is not
what rounding leaves of zero."""


@dataclass(frozen=True)
class Case:
    """A map, and whether the norm is in training."""

    op: str
    """``bn_train`` or ``bn_eval``."""
    batch: int
    channels: int
    height: int
    width: int
    dtype: str = "float32"
    layout: str = "contiguous"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W]."""
        return self.batch, self.channels, self.height, self.width

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.op} {shape} {self.dtype} {self.layout}"


@dataclass
class Inputs:
    """The tensors that all providers of a case share."""

    z: Tensor
    residual: Tensor
    gradient: Tensor
    training: bool
    input: Tensor
    """What the tails are given: z itself, or in inference on a CPU, where a tail writes its result
    into its input, a copy that is made anew before each call."""


class Tail(nn.Module):
    """The end of a residual branch, as the networks have it."""

    def __init__(self, norm: nn.Module, attention: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.attention = norm, attention

    def forward(self, z: Tensor, residual: Tensor) -> Tensor:
        """relu(attention(norm(z)) + residual)."""
        attention = cast("ChannelAttention | None", self.attention)
        return residual_tail(z, residual, self.norm, attention)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Gaussian maps, with one clear maximum and minimum in each plane."""
    generator = keyed_generator(0, "bench", *case.shape)
    z, residual, gradient = (torch.randn(case.shape, generator=generator) for _ in range(3))
    planes = z.view(case.batch, case.channels, -1)
    size = planes.shape[2]
    high = torch.randint(size, planes.shape[:2], generator=generator).unsqueeze(2)
    step = torch.randint(1, max(size, 2), planes.shape[:2], generator=generator).unsqueeze(2)
    planes.scatter_(2, (high + step) % size, LOW)
    planes.scatter_(2, high, HIGH)
    dtype, layout = getattr(torch, case.dtype), LAYOUTS[case.layout]

    def place(t: Tensor) -> Tensor:
        return t.to(device=device, dtype=dtype).contiguous(memory_format=layout)

    training = case.op == "bn_train"
    z, residual, gradient = place(z), place(residual), place(gradient)
    z.requires_grad_(training)
    given = z.clone() if device.type == "cpu" and not training else z
    return Inputs(z, residual.requires_grad_(training), gradient, training, given)


def make_tail(case: Case, attention: str, device: torch.device) -> Tail:
    """A tail with a norm and gate away from their starting values, in at least float32."""
    spec = as_spec(attention)
    gate = None if spec is None else spec.build(case.channels)
    tail = Tail(nn.BatchNorm2d(case.channels), gate)
    initialise(tail, 0)  # the same weights for every way
    generator = keyed_generator(0, "bench", attention, case.channels)
    with torch.no_grad():
        for name, parameter in tail.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # The gains of the norm take both signs.
            parameter.copy_(noise if name == "norm.weight" else parameter + 0.2 * noise)
        for name, buffer in tail.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=generator)
            elif name.endswith("running_mean"):
                buffer.normal_(0.0, 0.5, generator=generator)
    dtype = torch.promote_types(getattr(torch, case.dtype), torch.float32)
    return tail.to(device=device, dtype=dtype).train(case.op == "bn_train")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function whole; each one for itself, whatever was compiled before it."""

    def call(*arguments: Any) -> Any:
        return function(*arguments)

    # Compilations are counted by code object, and dynamo's limit is for one of them.
    own = FunctionType(
        call.__code__.replace(co_name=f"call_{id(function)}"),
        call.__globals__,
        call.__name__,
        None,
        call.__closure__,
    )
    return torch.compile(own, fullgraph=True, dynamic=False)


class TailProvider:
    """A tail computed in one way.

    Attributes:
        first_call_s: Seconds of the first call, which compiles what is to be compiled.
    """

    def __init__(self, case: Case, subject: Subject, impl: str, inputs: Inputs) -> None:
        self.subject, self.impl, self.inputs = subject, impl, inputs
        self._case = case
        self._device = inputs.z.device
        self.module = make_tail(case, subject.attention, self._device)
        if subject.way == OFFICIAL:
            assert isinstance(self.module.attention, SPEM)
            self.module.attention = official(self.module.attention)
        self._names = [name for name, _ in self.module.named_parameters()]
        self._leaves = [inputs.z, inputs.residual, *self.module.parameters()]
        self._run: Callable[..., Any] = self.module
        if subject.way.removesuffix(GRAPH) in (COMPILED, FORMULA):
            self._run = compiled(self.module)
        self._y: Tensor | None = None
        self._grads: Sequence[Tensor] = ()
        self._replay: Callable[[], object] | None = None
        self.first_call_s = math.nan

    @property
    def reads_statistics(self) -> bool:
        """Whether the gate reads the planes, which in inference takes a pass of its own."""
        attention = self.module.attention
        return isinstance(attention, OfficialWay) or bool(getattr(attention, "statistics", ()))

    def prepare(self) -> None:
        """Makes the first call and compares it with the reference; captures the graph.

        Raises:
            BenchError: Something deviates.
        """
        gradient = self.inputs.gradient.clone()
        try:
            self._check()
        finally:  # the others are given the whole gradient, whatever happened here
            self.inputs.gradient.copy_(gradient)
            self._free()

    def _check(self) -> None:
        expected = self._expected()
        if self.subject.way.endswith(GRAPH):
            self.first_call_s, self._replay = captured(self._device, self.call, self._free)
            self._replay()
        else:
            start = time.perf_counter()
            self.call()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.first_call_s = time.perf_counter() - start
        self._compare(expected)

    def call(self) -> None:
        """Forward, and backward in training."""
        self._renew()
        with use_impl(self.impl):
            self._forward()
            if self.inputs.training:
                self._backward()

    def sample(self) -> Sample:
        """One call and its milliseconds."""
        if self._replay is not None:
            (both,) = timed(self._device, self._replay)
            return {"both" if self.inputs.training else "forward": both}
        self._renew()
        with use_impl(self.impl):
            if self.inputs.training:
                forward, backward = timed(self._device, self._forward, self._backward)
                sample = {"forward": forward, "backward": backward, "both": forward + backward}
            else:
                (forward,) = timed(self._device, self._forward)
                sample = {"forward": forward}
        self._free()
        return sample

    def _forward(self) -> None:
        with torch.set_grad_enabled(self.inputs.training):
            self._y = self._run(self.inputs.input, self.inputs.residual)

    def _renew(self) -> None:
        if self.inputs.input is not self.inputs.z:
            self.inputs.input.copy_(self.inputs.z)

    def _backward(self) -> None:
        assert self._y is not None
        self._grads = torch.autograd.grad(self._y, self._leaves, self.inputs.gradient)

    def _free(self) -> None:
        self._y, self._grads = None, ()

    def _expected(self) -> dict[str, Tensor]:
        """The reference in float64; sets the gradient to zero where rounding could pass it or not.

        That is where the output is so near to zero that its side of the ReLU is open.
        """
        inputs = self.inputs
        twin = make_tail(self._case, self.subject.attention, self._device).double()
        wide = [t.detach().double() for t in (inputs.z, inputs.residual)]
        for t in wide:
            t.requires_grad_(inputs.training)
        with use_impl("reference"), torch.set_grad_enabled(inputs.training):
            y = twin(*wide)
        size = y.detach().abs()
        inputs.gradient.mul_(size > MAPS[inputs.z.dtype] * float(size.max()))
        if not inputs.training:
            return {"y": y}
        names = ["z", "residual", *(name for name, _ in twin.named_parameters())]
        found = torch.autograd.grad(y, [*wide, *twin.parameters()], inputs.gradient.double())
        return {"y": y.detach(), **dict(zip(names, found, strict=True))}

    def _compare(self, expected: dict[str, Tensor]) -> None:
        assert self._y is not None
        found = {"y": self._y}
        if self.inputs.training:
            names = ["z", "residual", *(our_name(name) for name in self._names)]
            found |= dict(zip(names, self._grads, strict=True))
        dtype = self.inputs.z.dtype
        maps = ("y", "z", "residual")
        sums = PARAMETERS[dtype]
        if dtype.itemsize == 2 and self.impl == "reference":
            sums = COMPOSED_IN_HALF
        # A module that normalises over the batch divides by how little its planes differ there.
        gate = self.subject.attention.partition("(")[0]
        scale = BATCH_NORMALISED if gate == "srm" and self.inputs.training else 1.0
        bounds = {k: scale * (MAPS[dtype] if k in maps else sums) for k in expected}
        require_close(f"{self.subject} ({self._case})", found, expected, bounds)
