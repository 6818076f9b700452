"""A training step that several processes take together, each with its part of the batch.

What comes out is the step that one process takes with the whole batch, within rounding: norms share
their statistics, and loss, penalty and gradient are sums over the processes, each weighted by its
share of the images. So the penalty counts once. Gradients are added in one exchange after the
backward pass: a CIFAR ResNet has too few of them for overlapping to gain anything.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.ops.synchronised import SharedBatchNorm
from spem.training.config import OptimConfig, RuntimeConfig
from spem.training.distributed import Team
from spem.training.step import Step, StepOutput, lambdas, make_forward

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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
            if isinstance(child, _NORMS):
                setattr(module, name, SharedBatchNorm.of(child))
    for name, module in model.named_modules():
        reason = _obstacle(module)
        if reason is not None:
            raise ValueError(
                f"train: {name} ({type(module).__name__}) {reason}, which several processes cannot "
                "share. Train this network in one process, without torchrun."
            )
    return [module for module in model.modules() if isinstance(module, SharedBatchNorm)]


def _obstacle(module: nn.Module) -> str | None:
    if callable(getattr(module, "reseed", None)):
        return "draws at random by an image's place in the batch"
    unshared = isinstance(module, ChannelAttention) and module.needs.batch_statistics
    if unshared and not any(isinstance(inner, SharedBatchNorm) for inner in module.modules()):
        return "takes statistics of the batch by itself"
    return None


def _least(module: ChannelAttention) -> int:
    """How many images a module certainly can train on; of the smallest maps, one position."""
    return max(module.needs.batch, module.needs.values)
