"""What attention stands in beside a host's module: after its output, or before its input."""

from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.insert.keys import Around


class AfterNorm(Around):
    """attention(norm(x)); the norm, or any other module of the host, keeps its keys.

    Args:
        norm: The host's module.
        attention: What follows it.
    """

    inner = "norm"
    added = ("attention",)

    def __init__(self, norm: nn.Module, attention: ChannelAttention) -> None:
        super().__init__(norm)
        self.attention = attention

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """attention(norm(x)), [N, C, H, W]."""
        return self.attention(self.norm(x, *args, **kwargs))


class BeforeModule(Around):
    """module(attention(x)): for a branch that ends in a module of the host without weights.

    Args:
        module: The host's module.
        attention: What stands before it.
    """

    inner = "after"
    added = ("attention",)

    def __init__(self, module: nn.Module, attention: ChannelAttention) -> None:
        super().__init__(module)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """module(attention(x)), [N, C, H, W]."""
        return self.after(self.attention(x))
