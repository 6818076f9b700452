"""timm's ResNet blocks with a fused tail; see `spem.insert.fused`."""

from timm.models.resnet import BasicBlock, Bottleneck

from spem.insert.fused import FusedTail, Tail


class FusedBasicBlock(FusedTail, BasicBlock):
    """Two 3x3 convolutions; attention in the slot ``se``."""

    _tail = Tail(("conv1", "bn1 drop_block act1", "aa", "conv2"), "bn2", "se", "act2")


class FusedBottleneck(FusedTail, Bottleneck):
    """1x1, 3x3 and 1x1 convolutions; attention in the slot ``se``."""

    _tail = Tail(
        ("conv1", "bn1 act1", "conv2", "bn2 drop_block act2", "aa", "conv3"), "bn3", "se", "act3"
    )
