"""One run trained by several processes: who they are, what they tell one another, who is lost.

The first process (rank 0) alone claims the run folder, writes and evaluates; the others take their
part of every step and wait for what it says. Gradients and the epoch's sums travel over the default
process group, everything else over one for the CPU, so that no GPU is waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from spem.training.claim import process_start
from spem.training.signals import Interrupted, StopSignals

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(days=1)
"""How long a process waits for what the first one does alone, such as an evaluation. One that has
ended is noticed at once, since its connections close."""
_GONE_SECONDS = 3.0
"""How long the system may take to show that a process whose connection closed has ended."""
_DONE, _FAILED = b"+", b"-"


class LostProcessError(RuntimeError):
    """Another process of this run is gone."""


class FollowerError(RuntimeError):
    """The first process of this run stopped, and says itself why."""


@contextlib.contextmanager
def process_group(device: str = "auto") -> Generator[bool]:
    """Join the processes that torchrun started, for the length of a `with` block.

    Without torchrun's variables, or with a WORLD_SIZE of 1, nothing is joined. The processes
    speak over gloo, and over NCCL about tensors on GPUs.

    Args:
        device: where the processes will train: "auto", "cpu", "cuda" ...

    Yields:
        Whether this is the first process, the one that speaks for all.

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


class _Peer(NamedTuple):
    """A process of a run, as `process_start` tells it from another one of its id."""

    host: str
    pid: int
    started: str | None


@dataclass(frozen=True)
class Team:
    """The processes that train one run together; without a process group, this one alone.

    Args:
        rank: number of this process, from 0.
        size: how many there are.
        control: the process group of what they tell one another; None if there is but one.
        peers: all of them, by rank.
    """

    rank: int = 0
    size: int = 1
    control: ProcessGroup | None = None
    peers: tuple[_Peer, ...] = ()

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
                told = {"message": str(error), "code": getattr(error, "code", None)}
                # The error counts, even if there is nobody left to hear of it.
                with contextlib.suppress(RuntimeError):
                    self._broadcast(_FAILED + json.dumps(told).encode())
                raise
            self._broadcast(_DONE + content)
            return content
        received = self._broadcast(b"")
        if received[:1] == _DONE:
            return received[1:]
        told = json.loads(received[1:])
        if isinstance(told["code"], int):
            raise Interrupted(told["message"], told["code"])
        raise FollowerError(f"train: the first process of this run stopped. {told['message']}")

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
        """Turn what a broken connection raises in a `with` block into a sentence on who is gone.

        Raises:
            LostProcessError: another process has ended or cannot be reached.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _of_a_connection(error):
                raise
            raise LostProcessError(self._loss(checkpoint)) from error

    def _loss(self, checkpoint: Path) -> str:
        deadline = time.monotonic() + _GONE_SECONDS
        while not (gone := self._gone()) and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = ", ".join(f"rank {rank} (process {self.peers[rank].pid})" for rank in gone)
        who = f"{ranks or 'one'} of the {self.size} processes of this run"
        again = "There is no checkpoint yet; run the same command again."
        if checkpoint.exists():
            again = f"The checkpoint is {checkpoint}; run the same command again to go on from it."
        return (
            f"train: {who} is gone: killed, out of memory, or ended by an error that it has told "
            f"itself. {again}"
        )

    def _gone(self) -> list[int]:
        """The ranks on this machine whose processes have ended."""
        here = socket.gethostname()
        return [
            rank
            for rank, peer in enumerate(self.peers)
            if peer.host == here and process_start(peer.pid) != peer.started
        ]

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
    me = _Peer(socket.gethostname(), os.getpid(), process_start(os.getpid()))
    mine = torch.zeros(512, dtype=torch.uint8)
    text = json.dumps(me).encode()
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine, group=control)
    peers = tuple(_Peer(*json.loads(p.numpy().tobytes().rstrip(b"\0"))) for p in everyone)
    yield Team(dist.get_rank(), dist.get_world_size(), control, peers)
    dist.destroy_process_group(control)


def _of_a_connection(error: RuntimeError) -> bool:
    """Whether an error is that of a process group, which has no one type for it."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo", "NCCL", "Connection closed", "Connection reset")
    )
