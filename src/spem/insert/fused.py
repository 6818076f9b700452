"""Blocks of timm's and torchvision's ResNets whose tail runs as one operation."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.insert.keys import Around
from spem.insert.wrap import AfterNorm


class Parts(NamedTuple):
    """Names of a block's parts: the layers before its last norm, that norm, and what follows it."""

    branch: tuple[str, ...]
    norm: str
    slot: str
    act: str


BLOCKS = {
    "timm.models.resnet:BasicBlock": Parts(
        ("conv1", "bn1", "drop_block", "act1", "aa", "conv2"), "bn2", "se", "act2"
    ),
    "timm.models.resnet:Bottleneck": Parts(
        ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3"),
        "bn3",
        "se",
        "act3",
    ),
    "torchvision.models.resnet:BasicBlock": Parts(
        ("conv1", "bn1", "relu", "conv2"), "bn2", "", "relu"
    ),
    "torchvision.models.resnet:Bottleneck": Parts(
        ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3"), "bn3", "", "relu"
    ),
}
"""The blocks with a fused tail, by module path and class name; no subclass, whose forward may be
another."""


def why_not_fused(block: nn.Module, parent: nn.Module, key: str) -> str | None:
    """Why a block with attention at this attribute cannot get the fused tail; None if it can."""
    kind = type(block)
    parts = BLOCKS.get(f"{kind.__module__}:{kind.__name__}")
    if parts is None:
        return (
            f"is in a {kind.__name__}; only the ResNet and ResNeXt blocks of timm and torchvision "
            f"have a fused tail"
        )
    if parent is not block or key != (parts.slot or parts.norm):
        return f"is not what ends the branch of a {kind.__name__}"
    act = getattr(block, parts.act)
    if not isinstance(act, nn.ReLU):
        return f"is in a block that ends in {type(act).__name__}, not ReLU"
    drop = getattr(block, "drop_path", None)
    if drop is not None and not isinstance(drop, nn.Identity):
        return f"has a {type(drop).__name__} between it and the addition"
    return None


class FusedBlock(Around):
    """A residual block with relu(attention(norm(z)) + residual) as one operation.

    Args:
        block: A block of `BLOCKS` with attention in it.
    """

    inner = "block"

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self._parts = BLOCKS[f"{type(block).__module__}:{type(block).__name__}"]

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        # A norm that attention follows is told as the norm it is: what reads a fused block (such as
        # spem.cost) finds a block with norms and an attention.
        return found.norm if isinstance(found, AfterNorm) else found

    @property
    def attention(self) -> ChannelAttention:
        """The attention between norm and addition."""
        if self._parts.slot:
            return self.block.get_submodule(self._parts.slot)  # pyright: ignore[reportReturnType]  # checked when it was built
        return self.block.get_submodule(self._parts.norm).attention

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        z = x
        for name in self._parts.branch:
            z = getattr(self.block, name)(z)
        downsample = getattr(self.block, "downsample", None)
        residual = x if downsample is None else downsample(x)
        return self.attention.tail(z, residual, getattr(self, self._parts.norm))
