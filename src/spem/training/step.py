"""One training step, its implementation, and the torch settings it runs under.

Training and benchmarks both call `make_step`, so what is timed is what trains.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from spem.attention import learned_mixes, param_groups, penalty
from spem.cost import block_tails, tails_text
from spem.ops import choose, use_impl
from spem.ops.dispatch import requested, unsupported
from spem.training.config import OptimConfig, RuntimeConfig

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
WARM_UPS = 3  # steps before a recording: kernels are compiled, and libraries select theirs


class StepOutput(NamedTuple):
    """The results of a step, on the device."""

    loss: Tensor  # mean cross entropy
    penalty: Tensor
    correct: Tensor  # number of correct answers
    lambdas: Tensor  # of every learned mix, after the step


Step = Callable[[Tensor, Tensor], StepOutput]
"""Takes normalised images and labels and updates the network, without waiting for the device."""


def make_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, optim: OptimConfig, runtime: RuntimeConfig
) -> Step:
    """Build the training step: cross entropy plus `optim.penalty` times the penalty, backward, SGD.

    The model must be in training mode and on its device; `runtime` sets the precision, and whether
    forward and loss are compiled or the full step is captured as a CUDA graph.
    """
    forward = make_forward(model, runtime)
    if runtime.step == "compile":
        torch.compiler.reset()  # else the networks of a comparison reach dynamo's limit
        # Two shapes occur, the batch and the smaller last one; each is compiled separately.
        forward = torch.compile(forward, fullgraph=True, dynamic=False)

    def step(images: Tensor, labels: Tensor) -> StepOutput:
        optimizer.zero_grad(set_to_none=True)
        loss, extra, correct = forward(images, labels)
        (loss + optim.penalty * extra).backward()
        optimizer.step()
        return StepOutput(loss.detach(), extra.detach(), correct, lambdas(model))

    return CapturedStep(step, model, optimizer) if runtime.step == "graph" else step


class CapturedStep:
    """A step as CUDA graphs, recorded when a batch size first occurs and replayed after that.

    A step of a deep network launches thousands of kernels, each taking longer to launch than to
    run; a replay launches all at once. A graph records addresses, so images and labels are copied
    into fixed buffers, the rates into tensors (the optimiser's groups and checkpoints keep plain
    numbers), momentum exists before the recording, and a checkpoint is loaded before the first
    step. Weights, buffers and momentum end up as without a graph.
    """

    def __init__(self, step: Step, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._step, self._model, self._optimizer = step, model, optimizer
        self._recordings: dict[int, tuple[Tensor, Tensor, StepOutput, Callable[[], None]]] = {}
        self._device = next(model.parameters()).device
        self._rates = [torch.zeros((), device=self._device) for _ in optimizer.param_groups]
        self._stream: Any = None
        self._pool: Any = None  # memory that the graphs share: only one of them runs at a time

    def __call__(self, images: Tensor, labels: Tensor) -> StepOutput:
        """Run one step; the caller may keep its results."""
        self.prepare(images, labels)
        kept_images, kept_labels, output, replay = self._recordings[len(images)]
        kept_images.copy_(images)
        kept_labels.copy_(labels)
        self._fill_rates()
        replay()
        return StepOutput(*(value.clone() for value in output))

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Record a graph for this batch size; the weights do not change."""
        if len(images) in self._recordings:
            return
        images, labels = images.clone(), labels.clone()
        momenta = momenta_from_zero(self._optimizer)
        kept = [*self._model.parameters(), *self._model.buffers(), *momenta]
        copies = [tensor.detach().clone() for tensor in kept]
        groups = self._optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        self._fill_rates()
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            output, replay = self._record(lambda: self._step(images, labels))
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

    def _record(self, run: Callable[[], StepOutput]) -> tuple[StepOutput, Callable[[], None]]:
        """Warm up and record; return the results and the function that replays."""
        with torch.cuda.device(self._device):
            if self._stream is None:
                # For warm-up and recording alike: autograd ties a graph's leaves to a stream.
                self._stream = torch.cuda.Stream(self._device)
                self._pool = torch.cuda.graph_pool_handle()
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            here.wait_stream(self._stream)
            # Gradients are created while recording, so that it does not add to older ones.
            self._optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = run()
        return output, graph.replay

    def _fill_rates(self) -> None:
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])


def momenta_from_zero(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The momentum of every parameter, created as zero if missing, which gives the same bits.

    SGD's first step sets momentum to the gradient, a branch that must not be recorded.
    """
    momenta: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
            momenta.append(state["momentum_buffer"])
    return momenta


def make_forward(
    model: nn.Module, runtime: RuntimeConfig
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Build the forward pass: images and labels to loss, penalty and correct answers."""
    device = next(model.parameters()).device.type
    bf16 = runtime.precision == "bf16"

    def forward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            logits = model(images)
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels)
        return loss, penalty(model), (logits.argmax(1) == labels).sum()

    return forward


@torch.no_grad()
def lambdas(model: nn.Module) -> Tensor:
    """The lambda of every learned mix, on the model's device."""
    found = [mix.lam for _, mix in learned_mixes(model)]
    device = next(model.parameters()).device
    return torch.stack(found) if found else torch.zeros(0, device=device)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.SGD:
    """Build SGD with one group that decays everything, or by each module's declared rules.

    Each group keeps its starting rate as "initial_lr", from which `set_rate` computes.
    """
    if optim.rules == "declared":
        groups = param_groups(model, optim.lr, optim.weight_decay, mix_lr=optim.mix_lr)
    else:
        alike = {"lr": optim.lr, "weight_decay": optim.weight_decay}
        groups = [{"params": list(model.parameters()), **alike}]
    for group in groups:
        group["initial_lr"] = group["lr"]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, optim: OptimConfig, epoch: int) -> float:
    """Set the rates for an epoch, which depend on nothing else, and return the common one."""
    factor = optim.factor ** sum(epoch >= milestone for milestone in optim.milestones)
    if optim.schedule == "cosine":
        factor = (1 + math.cos(math.pi * epoch / optim.epochs)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return optim.lr * factor


@contextlib.contextmanager
def execution(
    runtime: RuntimeConfig, device: torch.device | None = None
) -> Generator[torch.device]:
    """Set threads, determinism, full float32 and the implementation of all tails in a `with` block.

    Yields the device to run on: the one given, or the planned one.
    """
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.set_num_threads(runtime.threads)
        torch.backends.cudnn.benchmark = not runtime.deterministic
        if runtime.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        with full_float32(), use_impl(runtime.impl) if runtime.impl else contextlib.nullcontext():
            yield device or torch.device(runtime.device)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextlib.contextmanager
def full_float32() -> Generator[None]:
    """Round no inputs of float32 convolutions and products to TF32 or bfloat16, as torch may do."""
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    parts: Any = ()
    before: list[str] = []
    if hasattr(cudnn, "conv"):  # from torch 2.9 on; reading the older settings may then fail
        parts = cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.matmul
        before = [part.fp32_precision for part in parts]
        tf32, words = "tf32" in before[:2], {"bf16": "medium", "tf32": "high"}
        products = words.get(before[4]) or words.get(before[2]) or "highest"
    else:
        tf32, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    def settle(tf32: bool, products: str, precisions: list[str]) -> None:
        # The older settings come first: they change the newer ones, and may not contradict them.
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(products)
        for part, precision in zip(parts, precisions, strict=True):
            part.fp32_precision = precision

    settle(False, "highest", ["ieee"] * len(parts))
    try:
        yield
    finally:
        settle(tf32, products, before)


def map_dtype(runtime: RuntimeConfig) -> torch.dtype:
    """The dtype of feature maps in training; in evaluation it is float32."""
    return torch.bfloat16 if runtime.precision == "bf16" else torch.float32


def choose_impl(runtime: RuntimeConfig, device: str, *, attention: bool = True) -> str:
    """Choose the implementation of a run's tails; ValueError if the requested one cannot run."""
    graph, dtype = attention and runtime.step == "graph", map_dtype(runtime)
    impl = choose("train", device, dtype, impl=runtime.impl, graph=graph).impl
    asked = requested(runtime.impl, "train") is not None
    compiled = device == "cuda" and runtime.step == "compile"
    return "formula" if impl == "reference" and compiled and not asked else impl


def evaluation_impl(impl: str | None) -> str | None:
    """The implementation that evaluates such a run: "formula" is for compiled steps only."""
    return "reference" if impl == "formula" else impl


def tails_of(model: nn.Module, runtime: RuntimeConfig) -> str:
    """What runs the tails of a planned run, and why if they are not fused."""
    device, dtype = torch.device(runtime.device).type, map_dtype(runtime)
    with use_impl(runtime.impl):
        tails = block_tails(model, device=device, dtype=dtype)
    with use_impl(None):
        unasked = block_tails(model, device=device, dtype=dtype)
    # Planning requested this implementation; if it would be chosen anyway, give that reason.
    same = [tail.impl for tail in tails] == [tail.impl for tail in unasked]
    return tails_text(unasked if same else tails)


def stored_impl(trained: str | None, device: str, message: Callable[[str], None]) -> str | None:
    """The implementation to evaluate with: requested, else that of training if it runs here."""
    asked, stored = requested(None, "eval"), evaluation_impl(trained)
    if asked is not None or stored is None:
        return asked
    reason = unsupported(stored, device, torch.float32)
    if reason is None:
        return stored
    other = choose("eval", device, torch.float32).impl
    message(f"the run was trained with impl={stored!r}, which {reason}; evaluating with {other}")
    return None


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next allocation; return whether it does.

    Otherwise every step on a CPU pays for clearing hundreds of megabytes of fresh pages. This
    affects the entire process and cannot be undone: commands call it and the library does not.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Both: otherwise memory that no longer comes from mmap would be trimmed.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
