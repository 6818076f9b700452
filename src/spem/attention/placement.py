"""Places of a network other than the block's tail, and the modules that its blocks share.

Most modules stand at the tail of every block and know nothing of this.
"""

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
"""Places of a network that a module can stand in, and what they are."""


class Places:
    """Answers a network at each of its slots: the attention that stands there, or the plain layer.

    The network asks at every slot it has; the spec says which of them is its own. So no network
    knows any module.

    Args:
        spec: The attention, or None for the plain network.
    """

    def __init__(self, spec: AttentionSpec | None) -> None:
        self._spec = spec
        self._place: Place | None = None if spec is None else spec.place

    def tail(self, channels: int, size: int | None) -> ChannelAttention | None:
        """A block's own module after its last norm."""
        return self._build("tail", channels, size=size) if not self._is_shared() else None

    def shared(self, channels: int, size: int | None) -> ChannelAttention | None:
        """The one module that stands after the last norm of all blocks of a stage."""
        return self._build("tail", channels, size=size) if self._is_shared() else None

    def after(self, channels: int, size: int | None, *, last: bool) -> ChannelAttention | None:
        """The module after a stage; ``last`` says that no stage follows."""
        if self._place == "between" and not last:
            return self._build("between", channels, size=size)
        return self._build("stage", channels, size=size)

    def norm(self, channels: int) -> nn.Module:
        """A batch norm, or the module that stands in place of it."""
        attention = self._build("norm", channels)
        return nn.BatchNorm2d(channels) if attention is None else attention

    def conv(self, conv: nn.Conv2d) -> nn.Conv2d:
        """A convolution, with the module before it if there is one."""
        attention = self._build("conv", conv.in_channels)
        return conv if attention is None else GatedConv(conv, attention)

    def middle(self, conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
        """A bottleneck's 3x3 convolution and its norm, or the module in place of both."""
        attention = self._build("middle", conv.out_channels, stride=conv.stride[0])
        return (conv, norm) if attention is None else (attention, nn.Identity())

    def _is_shared(self) -> bool:
        return self._spec is not None and self._spec.shared

    def _build(
        self, place: Place, channels: int, *, size: int | None = None, stride: int | None = None
    ) -> ChannelAttention | None:
        if self._spec is None or self._place != place:
            return None
        return self._spec.build(channels, size=size, stride=stride)


class GatedConv(nn.Conv2d):
    """A convolution of attention(x); weight and bias keep the names they have without attention.

    Args:
        conv: The convolution whose sizes it has; its weights are not taken over.
        attention: The module before it.
    """

    def __init__(self, conv: nn.Conv2d, attention: ChannelAttention) -> None:
        padding = conv.padding
        assert not isinstance(padding, str)
        assert conv.padding_mode == "zeros"
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            stride=(conv.stride[0], conv.stride[1]),
            padding=(padding[0], padding[1]),
            dilation=(conv.dilation[0], conv.dilation[1]),
            groups=conv.groups,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        self.attention = attention

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """conv(attention(x)), [N, C, H, W]."""
        return super().forward(self.attention(input))
