"""torchvision's ResNet blocks with a fused tail; see `spem.insert.fused`."""

from torchvision.models.resnet import BasicBlock, Bottleneck

from spem.insert.fused import FusedTail, Tail


class FusedBasicBlock(FusedTail, BasicBlock):
    """Two 3x3 convolutions; attention around the norm ``bn2``."""

    _tail = Tail(("conv1", "bn1 relu", "conv2"), "bn2", "", "relu")


class FusedBottleneck(FusedTail, Bottleneck):
    """1x1, 3x3 and 1x1 convolutions; attention around the norm ``bn3``."""

    _tail = Tail(("conv1", "bn1 relu", "conv2", "bn2 relu", "conv3"), "bn3", "", "relu")
