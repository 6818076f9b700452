"""The training step as a CUDA graph: recorded once for each batch size, then replayed.

A step of a deep network launches thousands of kernels, each in less time on the GPU than the CPU
takes to launch it; a replay launches all of them at once. What is recorded are addresses, so images
and labels are copied into buffers that stay, the learning rate lies in a tensor, and the momentum
exists before the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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


class CapturedStep:
    """A training step that is recorded for a batch size when it first occurs, and replayed.

    The learning rates of the optimiser's groups stay plain numbers, in checkpoints too; they are
    carried over into the tensors the graph reads. Weights, buffers and momentum end where the same
    steps without a graph would end. A checkpoint is loaded before the first step: the graph keeps
    the momentum that it was recorded with.

    Args:
        step: to record.
        model: that it trains.
        optimizer: that it uses.
        capturer: a `CudaCapturer`, or what does the same elsewhere.
    """

    def __init__(
        self, step: Step, model: nn.Module, optimizer: torch.optim.Optimizer, capturer: CudaCapturer
    ) -> None:
        self._step, self._model, self._optimizer = step, model, optimizer
        self._capturer = capturer
        self._recordings: dict[int, tuple[Tensor, Tensor, StepOutput, Callable[[], None]]] = {}
        device = next(model.parameters()).device
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def __call__(self, images: Tensor, labels: Tensor) -> StepOutput:
        """Take one step; its results are the caller's to keep."""
        self.prepare(images, labels)
        kept_images, kept_labels, output, replay = self._recordings[len(images)]
        kept_images.copy_(images)
        kept_labels.copy_(labels)
        self._fill_rates()
        replay()
        return StepOutput(*(value.clone() for value in output))

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Record for this batch size, without taking a step; the weights stay as they are."""
        if len(images) in self._recordings:
            return
        images, labels = images.clone(), labels.clone()
        momenta = momenta_from_zero(self._optimizer)
        kept = [*self._model.parameters(), *self._model.buffers(), *momenta]
        copies = [tensor.detach().clone() for tensor in kept]
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        self._fill_rates()

        def run() -> StepOutput:
            return self._step(images, labels)

        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
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
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number
            with torch.no_grad():
                for tensor, copy in zip(kept, copies, strict=True):
                    tensor.copy_(copy)
        self._recordings[len(images)] = images, labels, output, replay

    def _fill_rates(self) -> None:
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])


def momenta_from_zero(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The momentum of every parameter, zero where there is none yet.

    SGD's first step sets the momentum to the gradient, a branch that must not be recorded; from
    zero the ordinary step computes the same, bit for bit.
    """
    momenta: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
            momenta.append(state["momentum_buffer"])
    return momenta
