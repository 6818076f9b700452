"""Whether weights are those of a config, found out before memory is taken for its network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spem.hub.network import checked, misfit, rebuild


def misfit_of(
    tensors: Mapping[str, Tensor],
    network: object,
    calls: object,
    dtype: torch.dtype,
    *,
    subject: str,
) -> str | None:
    """How weights differ from those of a described network; None if nothing is found.

    First by bounds that cost nothing: every layer counted in a depth has a tensor, every class
    and every channel of the input a number. Then on the device meta, which allocates nothing; a
    network whose constructor does not run there is left to the caller.

    Args:
        tensors: The weights.
        network: As for `rebuild`, and so are ``calls`` and ``subject``.
        calls: What was attached.
        dtype: Of the network.
        subject: Start of messages.

    Raises:
        ValueError: A field of the description is unknown, missing or of another type.
    """
    kind, given = checked(network, subject=subject)
    total = sum(tensor.numel() for tensor in tensors.values())
    bounds = {"depth": len(tensors), "classes": total, "num_classes": total, "in_chans": total}
    for name, value in (given if kind == "spem.resnet" else given["options"]).items():
        if name in bounds and value > bounds[name]:
            return f"{name}={value} is too large for {len(tensors)} tensors of {total:,} numbers"
    model = _on_meta(network, calls, dtype, subject)
    if model is not None:
        return misfit(tensors, model.state_dict())
    # What attention cannot be put into is said by the caller's build, if it is of a sane size.
    host = _on_meta(network, [], dtype, subject)
    needed = 0 if host is None else sum(t.numel() for t in host.state_dict().values())
    if needed > 2 * total:
        return f"the network without attention has {needed:,} numbers, the weights have {total:,}"
    return None


def _on_meta(network: object, calls: object, dtype: torch.dtype, subject: str) -> nn.Module | None:
    try:
        with torch.device("meta"):
            return rebuild(network, calls, subject=subject).to(dtype)
    except ImportError:
        raise
    except Exception:  # noqa: BLE001  # whatever is wrong beside sizes is said by the real build
        return None
