"""From a network to the graph that torch.export sees, with the axes that may change."""

from typing import Any

import torch
from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.ops import use_impl


def capture(
    model: nn.Module, example: Tensor, *, batch: bool, size: bool
) -> torch.export.ExportedProgram:
    """Captures a network in evaluation mode; tails are composed of torch's own operations.

    Args:
        model: The network.
        example: An input [N, C, ...].
        batch: Whether N may change.
        size: Whether the axes after C may.

    Raises:
        ValueError: The network cannot be captured, or is tied to the size of the example.
    """
    if batch and example.shape[0] == 1:
        example = torch.cat([example, example])  # an axis of length one is taken for a constant
    axes = [0] * batch + list(range(2, example.dim())) * size
    dynamic = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    call: dict[str, Any] = {"dynamic_shapes": (dynamic,) if dynamic else None, "strict": False}
    # Without gradients the extrema are plain reductions; with them they would carry indices.
    with use_impl("reference"), torch.no_grad():
        try:
            return torch.export.export(model, (example,), **call)
        except Exception as error:
            # Whatever the network raises, and many types of torch's own.
            if not dynamic:
                why = f"with an input {list(example.shape)}"
                remedy = "Check that it runs on such an input."
            elif size:
                why = "with a dynamic height and width"
                remedy = "Leave dynamic_size out."
            else:
                why = "with a dynamic batch"
                remedy = "Pass dynamic_batch=False."
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"to_onnx: {type(model).__name__} cannot be exported {why}: {reason.rstrip('.')}. "
                f"{remedy}"
            ) from error


def refuse_fixed_sizes(model: nn.Module) -> None:
    """Raises if a module of the network is built for one map size.

    Raises:
        ValueError: There is one; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, ChannelAttention) and (module.needs.size or module.needs.fixed_size):
            place = f"{name} ({module.name})" if name else module.name
            raise ValueError(
                f"to_onnx: dynamic_size=True: {place} is built for maps of one size. "
                f"Leave dynamic_size out."
            )
