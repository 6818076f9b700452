"""The training step as a CUDA graph: recorded once for each batch size, then replayed.

A step of a deep network launches thousands of kernels, each in less time on the GPU than the CPU
takes to launch it; a replay launches all of them at once. What is recorded are addresses, so images
and labels are copied into buffers that stay, the learning rate lies in a tensor, and the momentum
exists before the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

WARM_UPS = 3
"""Steps before a recording: they compile all kernels and let libraries choose theirs."""


class StepOutput(NamedTuple):
    """What a step computed, on the device."""

    loss: Tensor
    """Mean cross entropy."""
    penalty: Tensor
    correct: Tensor
    """Number of correct answers."""
    lambdas: Tensor
    """Lambda of every learned mix after the step."""


Step = Callable[[Tensor, Tensor], StepOutput]
"""Takes normalised images and labels, updates the network, and does not wait for the device."""


class Capturer(Protocol):
    """What records the work of a function on a device."""

    def warm_up(self, run: Callable[[], StepOutput]) -> None:
        """Run it, so that nothing is left to compile or to choose."""
        ...

    def capture(self, run: Callable[[], StepOutput]) -> tuple[StepOutput, Callable[[], None]]:
        """Record it; return its results, and what renews them by replaying the recording."""
        ...


class CudaCapturer:
    """Records CUDA graphs that share their memory; only one of them may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Both warm-up and recording: autograd ties the leaves of a graph to a stream.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], StepOutput]) -> None:
        """Run it a few times on the side stream."""
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            here.wait_stream(self._stream)

    def capture(self, run: Callable[[], StepOutput]) -> tuple[StepOutput, Callable[[], None]]:
        """Record it on the same stream."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
        ):
            output = run()
        return output, graph.replay


@dataclass(frozen=True)
class _Recording:
    """One batch size: buffers that the graph reads and writes, and what replays it."""

    images: Tensor
    labels: Tensor
    output: StepOutput
    replay: Callable[[], None]


class CapturedStep:
    """A training step that is recorded for a batch size when it first occurs, and replayed.

    The learning rates of the optimiser's groups stay plain numbers, in checkpoints too; they are
    carried over into the tensors the graph reads. Weights, buffers and momentum end where the same
    steps without a graph would end.
    """

    def __init__(
        self, step: Step, model: nn.Module, optimizer: torch.optim.Optimizer, capturer: Capturer
    ) -> None:
        self._step, self._model, self._optimizer = step, model, optimizer
        self._capturer = capturer
        self._recordings: dict[int, _Recording] = {}
        self._momenta: list[Tensor] = []
        device = next(model.parameters()).device
        self._filled = [float(group["lr"]) for group in optimizer.param_groups]
        self._rates = [
            torch.tensor(rate, dtype=torch.float32, device=device) for rate in self._filled
        ]

    def __call__(self, images: Tensor, labels: Tensor) -> StepOutput:
        """Take one step; its results are the caller's to keep."""
        recording = self._recording(images, labels)
        recording.images.copy_(images)
        recording.labels.copy_(labels)
        self._fill_rates()
        recording.replay()
        return StepOutput(*(value.clone() for value in recording.output))

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Record for this batch size, without taking a step; the weights stay as they are."""
        self._recording(images, labels)

    def _recording(self, images: Tensor, labels: Tensor) -> _Recording:
        if self._recordings and not self._same_momenta():
            self._recordings.clear()  # a checkpoint was loaded: the momentum lies elsewhere now
        found = self._recordings.get(len(images))
        if found is None:
            found = self._record(images.clone(), labels.clone())
            self._recordings[len(images)] = found
        return found

    def _record(self, images: Tensor, labels: Tensor) -> _Recording:
        """Warm up and record on these buffers, then put everything back to where it was."""
        self._momenta = momenta_from_zero(self._optimizer)
        kept = [*self._model.parameters(), *self._model.buffers(), *self._momenta]
        copies = [tensor.detach().clone() for tensor in kept]

        def run() -> StepOutput:
            return self._step(images, labels)

        try:
            with self._tensor_rates():
                self._capturer.warm_up(run)
                # The gradients are the recording's own, so that it need not add to older ones.
                self._optimizer.zero_grad(set_to_none=True)
                output, replay = self._capturer.capture(run)
        except RuntimeError as error:
            raise RuntimeError(
                f"train: the step for {len(images)} images cannot be captured as a CUDA graph "
                f"({str(error).strip()}). Use runtime.step='compile' or 'eager'."
            ) from error
        finally:
            with torch.no_grad():
                for tensor, copy in zip(kept, copies, strict=True):
                    tensor.copy_(copy)
        return _Recording(images, labels, output, replay)

    def _fill_rates(self) -> None:
        for i, group in enumerate(self._optimizer.param_groups):
            rate = float(group["lr"])
            if rate != self._filled[i]:
                self._rates[i].fill_(rate)
                self._filled[i] = rate

    @contextmanager
    def _tensor_rates(self) -> Generator[None]:
        """Let the optimiser read its rates from the tensors."""
        self._fill_rates()
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

    def _same_momenta(self) -> bool:
        if not self._momenta:
            return True
        first = next(p for p in _with_momentum(self._optimizer))
        return self._optimizer.state[first].get("momentum_buffer") is self._momenta[0]


def momenta_from_zero(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The momentum of every parameter, zero where there is none yet.

    SGD's first step sets the momentum to the gradient, a branch that must not be recorded; from
    zero the ordinary step computes the same, bit for bit.
    """
    momenta: list[Tensor] = []
    for parameter in _with_momentum(optimizer):
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        momenta.append(state["momentum_buffer"])
    return momenta


def _with_momentum(optimizer: torch.optim.Optimizer) -> Generator[Tensor]:
    for group in optimizer.param_groups:
        if group["momentum"]:
            yield from (p for p in group["params"] if p.requires_grad)
