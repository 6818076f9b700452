"""Places of a network other than the block's tail; most modules know nothing of this."""

from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Place
from spem.attention.spec import AttentionSpec

PLACES: dict[Place, str] = {
    "tail": "after the last norm of every block",
    "conv": "before every convolution",
    "norm": "in place of every norm but the shortcuts'",
    "middle": "in place of the 3x3 convolution of every bottleneck, with its norm",
    "between": "after every stage but the last",
    "stage": "after every stage",
}
"""Places of a network where a module can go."""


class Places:
    """Answers a network at each of its slots: the attention that is there, or the plain layer.

    The network asks at every slot it has; the spec says which of them is its own. So no network
    knows any module.

    Args:
        spec: The attention, or None for the plain network.
    """

    def __init__(self, spec: AttentionSpec | None) -> None:
        self._spec = spec

    def at(
        self,
        place: Place,
        channels: int,
        *,
        size: int | None = None,
        stride: int | None = None,
        shared: bool = False,
    ) -> ChannelAttention | None:
        """The module of a place; ``shared``: the one that all blocks of a stage have there."""
        spec = self._spec
        if spec is None or spec.place != place or spec.shared != shared:
            return None
        return spec.build(channels, size=size, stride=stride)

    def norm(self, channels: int) -> nn.Module:
        """A batch norm, or the module that replaces it."""
        return self.at("norm", channels) or nn.BatchNorm2d(channels)

    def conv(self, conv: nn.Conv2d) -> nn.Conv2d:
        """A convolution, with the module before it if there is one."""
        attention = self.at("conv", conv.in_channels)
        return conv if attention is None else GatedConv(conv, attention)

    def middle(self, conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
        """A bottleneck's 3x3 convolution and its norm, or the module in place of both."""
        attention = self.at("middle", conv.out_channels, stride=conv.stride[0])
        return (conv, norm) if attention is None else (attention, nn.Identity())


class GatedConv(nn.Conv2d):
    """A convolution of attention(x); weight and bias keep the names they have without attention.

    Args:
        conv: The convolution that it becomes, weights and all.
        attention: The module before it.
    """

    def __init__(self, conv: nn.Conv2d, attention: ChannelAttention) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(conv))
        self.attention = attention

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """conv(attention(x)), [N, C, H, W]."""
        return super().forward(self.attention(input))
