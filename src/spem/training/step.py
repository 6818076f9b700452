"""One training step, what runs it, and the settings of torch it runs under.

The step that trains is the step that benchmarks time: both call `make_step`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
from collections.abc import Callable, Generator

import torch
from torch import Tensor, nn
from torch.nn import functional

from spem.attention import learned_mixes, param_groups, penalty
from spem.cost import block_tails, tails_text
from spem.ops import Choice, choose, use_impl
from spem.ops.dispatch import requested, unsupported
from spem.training import capture
from spem.training.capture import Step, StepOutput
from spem.training.config import OptimConfig, RuntimeConfig

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def make_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, optim: OptimConfig, runtime: RuntimeConfig
) -> Step:
    """Build the training step: cross entropy plus penalty, backward, SGD.

    Args:
        model: in training mode, on its device.
        optimizer: of `make_optimizer`.
        optim: gives the coefficient of the penalty.
        runtime: gives precision, and whether forward and loss are compiled, or the whole step is
            captured as a CUDA graph.
    """
    device = next(model.parameters()).device
    forward = make_forward(model, runtime)
    if runtime.step == "compile":
        # Every run compiles this function again; without a reset the compilations of a comparison's
        # networks add up to dynamo's limit for one function.
        torch.compiler.reset()
        # Two shapes occur, the batch and the smaller last one; each is compiled for itself.
        forward = torch.compile(forward, fullgraph=True, dynamic=False)

    def step(images: Tensor, labels: Tensor) -> StepOutput:
        optimizer.zero_grad(set_to_none=True)
        loss, extra, correct = forward(images, labels)
        (loss + optim.penalty * extra).backward()
        optimizer.step()
        return StepOutput(loss.detach(), extra.detach(), correct, lambdas(model))

    if runtime.step != "graph":
        return step
    return capture.CapturedStep(step, model, optimizer, capture.CudaCapturer(device))


def make_forward(
    model: nn.Module, runtime: RuntimeConfig
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Build what a step differentiates: images and labels to loss, penalty and correct answers."""
    device = next(model.parameters()).device.type
    bf16 = runtime.precision == "bf16"

    def forward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            logits = model(images)
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels)
        return loss, penalty(model), (logits.argmax(1) == labels).sum()

    return forward


def require_cuda(device: str) -> None:
    """Raise ValueError for `step="graph"` on a device without CUDA graphs."""
    if device != "cuda":
        raise ValueError(
            f"train: runtime.step='graph' captures the step as a CUDA graph, which {device!r} does "
            "not have. Use 'auto', 'compile' or 'eager'."
        )


@torch.no_grad()
def lambdas(model: nn.Module) -> Tensor:
    """The lambda of every learned mix, on the device of the model."""
    found = [mix.lam for _, mix in learned_mixes(model)]
    if found:
        return torch.stack(found)
    return torch.zeros(0, device=next(model.parameters()).device)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.SGD:
    """Build SGD with one group that decays everything, or with every module's declared rules.

    Each group keeps its starting rate as "initial_lr", from which `set_rate` computes.
    """
    if optim.rules == "declared":
        groups = param_groups(model, optim.lr, optim.weight_decay, mix_lr=optim.mix_lr)
    else:
        groups = [
            {"params": list(model.parameters()), "lr": optim.lr, "weight_decay": optim.weight_decay}
        ]
    for group in groups:
        group["initial_lr"] = group["lr"]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=fused)


def decay(optim: OptimConfig, epoch: int) -> float:
    """What the starting rates are multiplied by in an epoch, counted from 0."""
    if optim.schedule == "cosine":
        return (1 + math.cos(math.pi * epoch / optim.epochs)) / 2
    return optim.factor ** sum(epoch >= milestone for milestone in optim.milestones)


def set_rate(optimizer: torch.optim.Optimizer, optim: OptimConfig, epoch: int) -> float:
    """Set the rates of an epoch, by the epoch alone, and return the common one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * decay(optim, epoch)
    return optim.lr * decay(optim, epoch)


@contextlib.contextmanager
def execution(
    runtime: RuntimeConfig, device: torch.device | None = None
) -> Generator[torch.device]:
    """Set threads, determinism, full float32 and the implementation of all tails in a `with` block.

    An implementation that was left open stays so. What is yielded is the device to run on: the
    planned one, or the one given.
    """
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        torch.set_num_threads(runtime.threads)
        torch.backends.cudnn.benchmark = not runtime.deterministic
        # torch would round the inputs of float32 convolutions to TF32, which is another precision.
        torch.backends.cudnn.allow_tf32 = False
        if runtime.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        with use_impl(runtime.impl) if runtime.impl else contextlib.nullcontext():
            yield device or torch.device(runtime.device)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def map_dtypes(runtime: RuntimeConfig) -> tuple[torch.dtype, ...]:
    """The dtypes of the maps that occur in a run: those of training, and evaluation's float32."""
    if runtime.precision == "bf16":
        return (torch.bfloat16, torch.float32)
    return (torch.float32,)


def choose_impl(runtime: RuntimeConfig, device: str, *, attention: bool = True) -> Choice:
    """Decide the implementation of all tails of a run, in training and evaluation alike.

    Raises:
        ValueError: one was asked for that cannot run for every dtype that will occur.
    """
    graph = attention and runtime.step == "graph"
    choices = [
        choose("train", device, d, impl=runtime.impl, graph=graph) for d in map_dtypes(runtime)
    ]
    if requested(runtime.impl, "train") is not None:
        return choices[0]
    # One that takes training's maps but not evaluation's, or the reverse, cannot serve the run.
    differing = [choice for choice in choices if choice.impl == "reference"]
    choice = differing[0] if differing else choices[0]
    if choice.impl == "reference" and device == "cuda" and runtime.step == "compile":
        return Choice("formula", "compiled")
    return choice


def evaluation_impl(impl: str | None) -> str | None:
    """What evaluates a run of this implementation: the formula is for compiled steps only."""
    return "reference" if impl == "formula" else impl


def tails_of(model: nn.Module, runtime: RuntimeConfig) -> str:
    """What runs the tails of a planned run, and why they are composed if they are."""
    device, dtype = torch.device(runtime.device).type, map_dtypes(runtime)[0]
    with use_impl(runtime.impl):
        tails = block_tails(model, device=device, dtype=dtype)
    with use_impl(None):
        unasked = block_tails(model, device=device, dtype=dtype)
    # Planning has asked for this implementation; if it would be chosen anyway, give that reason.
    same = [tail.impl for tail in tails] == [tail.impl for tail in unasked]
    return tails_text(unasked if same else tails)


@contextlib.contextmanager
def stored_impl(
    runtime: RuntimeConfig, device: str, message: Callable[[str], None]
) -> Generator[None]:
    """Run a `with` block under the implementation a run was trained with, if it can run here.

    Else the library's choice for float32 maps is taken, and `message` says so once. What
    `spem.ops.use_impl` or the environment ask for goes before both.
    """
    stored = evaluation_impl(runtime.impl)
    if stored is None or requested(None, "eval") is not None:
        yield
        return
    reason = unsupported(stored, device, torch.float32)
    if reason is None:
        with use_impl(stored):
            yield
        return
    instead = choose("eval", device, torch.float32).impl
    message(f"the run was trained with impl={stored!r}, which {reason}; evaluating with {instead}")
    yield


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next allocation; for processes that train on a CPU.

    By default glibc takes each feature map as fresh pages from the kernel and gives them back when
    it is freed, so every step pays for clearing hundreds of megabytes again. Kept, the process
    stays at its highest size until it ends. It concerns the whole process and cannot be undone, so
    the commands call it and the library does not.

    Returns:
        Whether it took effect; not with another C library than glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Both, or memory that no longer comes from mmap would be trimmed instead.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
