"""Training one run in several processes: who they are, what they exchange, how a loss shows.

Only the first process (rank 0) holds the run folder, writes and evaluates; the others do their part
of every step and wait for its messages. Gradients and the epoch's sums use the default process
group; everything else uses one for the CPU, which never waits for a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed as dist, nn

from spem.attention import ChannelAttention
from spem.ops.library import BATCH_NORMS
from spem.ops.synchronised import SharedBatchNorm
from spem.training.config import OptimConfig, RuntimeConfig
from spem.training.signals import Interrupted, StopSignals
from spem.training.step import Step, StepOutput, lambdas, make_forward

T = TypeVar("T")

_PATIENCE = timedelta(days=1)
"""How long a process waits while the first works alone; one that has ended is noticed at once."""


class FollowerError(RuntimeError):
    """The first process of this run stopped; it reports the reason itself."""


@contextlib.contextmanager
def process_group(device: str = "auto") -> Generator[bool]:
    """Join the processes that torchrun started, if any, for a `with` block.

    They communicate over gloo, and over NCCL for tensors on GPUs.

    Args:
        device: where the processes will train: "auto", "cpu", "cuda" ...

    Yields:
        Whether this is the first process, which reports for all.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield True
        return
    cuda = device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    yield dist.get_rank() == 0
    # Not after an error: this could wait for a lost process.
    dist.destroy_process_group()


@dataclass(frozen=True)
class Team:
    """The processes that train one run together; without a process group, this one alone."""

    rank: int = 0
    size: int = 1
    control: Any = None  # the process group for the CPU

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def lead(self, work: Callable[[], T]) -> T:
        """Run something in the first process and return its result in all.

        If it fails there, the others raise FollowerError, or Interrupted if a signal stopped it.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]  # what was returned, and how it failed
        if self.leads:
            try:
                outcome[0] = work()
            except BaseException as error:
                outcome[1] = (str(error), getattr(error, "code", None))
                # Raise the error even if no process is left to receive it.
                with contextlib.suppress(RuntimeError):
                    dist.broadcast_object_list(outcome, 0, self.control)
                raise
        dist.broadcast_object_list(outcome, 0, self.control)
        if outcome[1] is None:
            return outcome[0]
        message, code = outcome[1]
        if isinstance(code, int):
            raise Interrupted(message, code)
        raise FollowerError(f"train: the first process of this run stopped. {message}")

    def require_same(self, name: str, mine: Any) -> None:
        """Raise ValueError if plain values differ from the first process's."""
        first = self.lead(lambda: mine)
        if first != mine:
            raise ValueError(
                f"train: process {self.rank} differs from the first one in its {name} "
                f"({first} -> {mine}). Give all processes the same command and the same images."
            )

    def agree(self, stop: StopSignals, due: bool = False) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and what the first process finds due.

        All get the same answers, so all stop after the same step. This does not wait for a GPU.
        """
        if self.size == 1:
            return stop.received is not None, due
        word = torch.tensor([stop.received or 0, due and self.leads], dtype=torch.int64)
        dist.all_reduce(word, dist.ReduceOp.MAX, group=self.control)
        number, anything = word.tolist()
        if number:
            stop.received = Signals(number)
        return bool(number), bool(anything)

    def total(self, part: Tensor) -> Tensor:
        """The sum over the processes, as a new tensor."""
        whole = part.clone()
        if self.size > 1:
            dist.all_reduce(whole)
        return whole

    def part(self, images: int) -> slice:
        """This process's share of a batch; shares differ by at most one image."""
        return slice(self.rank * images // self.size, (self.rank + 1) * images // self.size)

    def device(self, kind: str) -> torch.device:
        """The device of this process: the planned one, or the GPU of its local rank."""
        device = torch.device(kind)
        if self.size == 1 or device.type != "cuda":
            return device
        local, count = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"train: process {local} of this machine has no GPU, there are {count}. Use "
                f"torchrun --nproc-per-node {count}, or --runtime.device cpu."
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    @contextlib.contextmanager
    def watched(self, checkpoint: Path) -> Generator[None]:
        """Turn the RuntimeError of a broken connection into one that says what to do."""
        try:
            yield
        except RuntimeError as error:
            # Process groups raise errors of many types.
            signs = ("gloo", "NCCL", "Connection closed", "Connection reset")
            lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
            if self.size == 1 or not lost:
                raise
            there = checkpoint.exists()
            kept = f"The checkpoint is {checkpoint}" if there else "There is no checkpoint yet"
            raise RuntimeError(
                f"train: another of the {self.size} processes of this run is gone: killed, out of "
                f"memory, or ended by an error that it reported itself. {kept}; run the same "
                "command again to resume."
            ) from error


@contextlib.contextmanager
def gather_team() -> Generator[Team]:
    """The processes of the default process group, or this one alone, for a `with` block."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield Team()
        return
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    yield Team(dist.get_rank(), dist.get_world_size(), control)
    dist.destroy_process_group(control)


def shared_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    runtime: RuntimeConfig,
    team: Team,
) -> Step:
    """Build one process's training step; batch norms become synchronised.

    Together the processes take the step that one would take, within rounding. Every process gets
    the full batch and works on its share, or on all of a batch too small for the network's modules
    to split. The returned loss and correct answers are this process's share.

    Raises:
        ValueError: a module cannot be trained in several processes, or the batch is too small.
    """
    norms = share_norms(model)
    # Images that each module needs for training, assuming maps of one position.
    needs = [m.needs for m in model.modules() if isinstance(m, ChannelAttention)]
    least = max((max(need.batch, need.values) for need in needs), default=1)
    if optim.batch < least * team.size:
        raise ValueError(
            f"train: optim.batch={optim.batch} leaves each of {team.size} processes fewer than the "
            f"{least} images that this network needs. Start fewer processes."
        )
    forward = make_forward(model, runtime)

    def step(images: Tensor, labels: Tensor) -> StepOutput:
        count = len(images)
        divided = count >= least * team.size
        for norm in norms:
            norm.alone = not divided
        here = team.part(count) if divided else slice(0, count)
        share = (here.stop - here.start) / count if divided else 1 / team.size
        optimizer.zero_grad(set_to_none=True)
        loss, extra, correct = forward(images[here], labels[here])
        (share * (loss + optim.penalty * extra)).backward()
        # One exchange after the backward pass: a CIFAR ResNet gains nothing from overlapping.
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        wholes = flat.split([gradient.numel() for gradient in gradients])
        for gradient, whole in zip(gradients, wholes, strict=True):
            gradient.copy_(whole.view(gradient.shape))
        optimizer.step()
        counted = correct if divided or team.leads else torch.zeros_like(correct)
        return StepOutput(share * loss.detach(), extra.detach(), counted, lambdas(model))

    return step


def share_norms(model: nn.Module) -> list[SharedBatchNorm]:
    """Replace a network's batch norms by synchronised ones with the same tensors."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BATCH_NORMS):
            model.set_submodule(name, SharedBatchNorm.of(module))
    for name, module in model.named_modules():
        reason = ""
        if callable(getattr(module, "reseed", None)):
            reason = "draws random numbers by an image's position in the batch"
        alone = isinstance(module, ChannelAttention) and module.needs.batch_statistics
        if alone and not any(isinstance(inner, SharedBatchNorm) for inner in module.modules()):
            reason = "computes batch statistics of its own"
        if reason:
            raise ValueError(
                f"train: {name} ({type(module).__name__}) {reason}, which several processes cannot "
                "share. Train this network in one process, without torchrun."
            )
    return [module for module in model.modules() if isinstance(module, SharedBatchNorm)]
