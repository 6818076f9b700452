"""One run trained by several processes: who they are, what they exchange, which one is lost.

The first process (rank 0) alone claims the run folder, writes and evaluates; the others take their
part of every step and wait for its messages. Gradients and the epoch's sums travel over the default
process group, everything else over one for the CPU, so that no GPU is waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from spem.attention import ChannelAttention
from spem.ops.library import BATCH_NORMS
from spem.ops.synchronised import SharedBatchNorm
from spem.training.config import OptimConfig, RuntimeConfig
from spem.training.signals import Interrupted, StopSignals
from spem.training.step import Step, StepOutput, lambdas, make_forward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(days=1)
"""How long a process waits for what the first one does alone, such as an evaluation. One that has
ended is noticed at once, since its connections close."""
_DONE, _FAILED = b"+", b"-"


class LostProcessError(RuntimeError):
    """Another process of this run is gone."""


class FollowerError(RuntimeError):
    """The first process of this run stopped, and says itself why."""


@contextlib.contextmanager
def process_group(device: str = "auto") -> Generator[bool]:
    """Join the processes that torchrun started, for the length of a `with` block.

    Without torchrun's variables, or with a WORLD_SIZE of 1, nothing is joined. The processes
    communicate over gloo, and over NCCL for tensors on GPUs.

    Args:
        device: where the processes will train: "auto", "cpu", "cuda" ...

    Yields:
        Whether this is the first process, the one that reports for all.

    Raises:
        ValueError: this torch cannot connect processes.
    """
    if not set(_VARIABLES) <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield True
        return
    if not dist.is_available():
        raise ValueError(
            "train: this torch was built without torch.distributed. Start it without torchrun."
        )
    cuda = device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    yield dist.get_rank() == 0
    # After an error the process ends; taking leave of one that is lost might wait for it.
    dist.destroy_process_group()


@dataclass(frozen=True)
class Team:
    """The processes that train one run together; without a process group, this one alone.

    Args:
        rank: number of this process, from 0.
        size: how many there are.
        control: the process group for their messages; None if there is only one process.
    """

    rank: int = 0
    size: int = 1
    control: ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def share(self, work: Callable[[], bytes]) -> bytes:
        """Let the first process do something and give all of them what it returns.

        Raises:
            Interrupted: the work was stopped by a signal; in all processes.
            FollowerError: the work failed; in the other processes, the first one raises its own
                error.
        """
        if self.size == 1:
            return work()
        if self.leads:
            try:
                content = work()
            except BaseException as error:
                failure = {"message": str(error), "code": getattr(error, "code", None)}
                # The error counts, even if there is nobody left to hear of it.
                with contextlib.suppress(RuntimeError):
                    self._broadcast(_FAILED + json.dumps(failure).encode())
                raise
            self._broadcast(_DONE + content)
            return content
        received = self._broadcast(b"")
        if received[:1] == _DONE:
            return received[1:]
        failure = json.loads(received[1:])
        if isinstance(failure["code"], int):
            raise Interrupted(failure["message"], failure["code"])
        raise FollowerError(f"train: the first process of this run stopped. {failure['message']}")

    def lead(self, work: Callable[[], T]) -> T:
        """As `share`, for what JSON can hold."""
        if self.size == 1:
            return work()
        return json.loads(self.share(lambda: json.dumps(work()).encode()))

    def alone(self, work: Callable[[], T]) -> T | None:
        """As `share`, but the result stays in the first process; the others get None."""
        found: list[T] = []

        def done() -> bytes:
            found.append(work())
            return b""

        self.share(done)
        return found[0] if found else None

    def require_same(self, name: str, mine: Any) -> None:
        """Refuse to train together what is not the same in this process and in the first one.

        Raises:
            ValueError: the plain values differ.
        """
        first = self.lead(lambda: mine)
        if first != mine:
            raise ValueError(
                f"train: process {self.rank} differs from the first one in its {name} "
                f"({first} -> {mine}). Give all processes the same command and the same images."
            )

    def agree(self, stop: StopSignals, due: bool) -> tuple[bool, bool]:
        """Whether to stop here, asked for in any process, and what the first process finds due.

        All processes get the same answers, so that all stop after the same step. It does not wait
        for a GPU.
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
        """The sum of the processes' parts, a new tensor."""
        if self.size == 1:
            return part
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by the sum of the processes' ones, in one exchange."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, whole in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(whole.view(gradient.shape))

    def part(self, images: int) -> slice:
        """The images of a batch that this process takes; sizes differ by one at most."""
        return slice(self.rank * images // self.size, (self.rank + 1) * images // self.size)

    def device(self, kind: str) -> torch.device:
        """The device of this process: the planned one, or the GPU of its local rank.

        Raises:
            ValueError: this machine has fewer GPUs than processes.
        """
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
        """Turn what a broken connection raises in a `with` block into a sentence on what to do.

        Raises:
            LostProcessError: another process has ended or cannot be reached.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _of_a_connection(error):
                raise
            again = "There is no checkpoint yet; run the same command again."
            if checkpoint.exists():
                again = (
                    f"The checkpoint is {checkpoint}; run the same command again to go on from it."
                )
            raise LostProcessError(
                f"train: another of the {self.size} processes of this run is gone: killed, out of "
                f"memory, or ended by an error that it has reported itself. {again}"
            ) from error

    def _broadcast(self, content: bytes) -> bytes:
        """The first process's bytes, in all processes."""
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0, group=self.control)
        payload = torch.zeros(int(length), dtype=torch.uint8)
        if self.leads:
            payload = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self.control)
        return payload.numpy().tobytes()


@contextlib.contextmanager
def gather_team() -> Generator[Team]:
    """The processes of the default process group for a `with` block, or this one alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield Team()
        return
    control: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
    yield Team(dist.get_rank(), dist.get_world_size(), control)
    dist.destroy_process_group(control)


def _of_a_connection(error: RuntimeError) -> bool:
    """Whether an error is that of a process group, which has no one type for it."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo", "NCCL", "Connection closed", "Connection reset")
    )


# ---- the step
#
# What comes out is the step that one process takes with the whole batch, within rounding: norms
# share their statistics, and loss, penalty and gradient are sums over the processes, each weighted
# by its share of the images. So the penalty counts once. Gradients are added in one exchange after
# the backward pass: a CIFAR ResNet has too few of them for overlapping to gain anything.


def shared_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    runtime: RuntimeConfig,
    team: Team,
) -> Step:
    """Build the step of one process of several; its batch norms become shared ones.

    The step is given the whole batch in every process and takes its part. A batch that would leave
    a process fewer images than the network's modules need in training, such as the last one of an
    epoch, is taken whole by every process. The loss and the correct answers it returns are this
    process's parts of the batch's.

    Args:
        model: in training mode, on the process's device, the same in all processes.
        optimizer: of `make_optimizer`.
        optim: gives the coefficient of the penalty and the size of a batch.
        runtime: gives the precision.
        team: the processes.

    Raises:
        ValueError: a module cannot be trained by several processes, or the batch is too small.
    """
    norms = share_norms(model)
    least = max((_least(m) for m in model.modules() if isinstance(m, ChannelAttention)), default=1)
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
        team.add_up(model.parameters())
        optimizer.step()
        counted = correct if divided or team.leads else torch.zeros_like(correct)
        return StepOutput(share * loss.detach(), extra.detach(), counted, lambdas(model))

    return step


def share_norms(model: nn.Module) -> list[SharedBatchNorm]:
    """Put shared norms in the place of a network's batch norms, with the same tensors.

    Raises:
        ValueError: a module normalises over the batch without a batch norm of torch, or draws at
            random by an image's place in its batch.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BATCH_NORMS):
                setattr(module, name, SharedBatchNorm.of(child))
    for name, module in model.named_modules():
        reason = _unshareable(module)
        if reason is not None:
            raise ValueError(
                f"train: {name} ({type(module).__name__}) {reason}, which several processes cannot "
                "share. Train this network in one process, without torchrun."
            )
    return [module for module in model.modules() if isinstance(module, SharedBatchNorm)]


def _unshareable(module: nn.Module) -> str | None:
    if callable(getattr(module, "reseed", None)):
        return "draws at random by an image's place in the batch"
    unshared = isinstance(module, ChannelAttention) and module.needs.batch_statistics
    if unshared and not any(isinstance(inner, SharedBatchNorm) for inner in module.modules()):
        return "takes statistics of the batch by itself"
    return None


def _least(module: ChannelAttention) -> int:
    """How many images a module certainly can train on; of the smallest maps, one position."""
    return max(module.needs.batch, module.needs.values)
