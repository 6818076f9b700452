"""What training needs and a deployed network does not: learned numbers that became constants."""

import copy
from typing import TypeVar

from torch import Tensor, nn

from spem.attention import ChannelAttention
from spem.attention.pooling import FixedMix, LearnedMix
from spem.insert import IdentityStart

_M = TypeVar("_M", bound=nn.Module)


class FoldedStart(IdentityStart):
    """An attention that started as the identity, with its alpha as a constant of the graph.

    Formula:
        y = x * ((1 - alpha) + alpha v), v the gate of the attention; a module that mixes maps gives
        y = (1 - alpha) x + alpha attention(x). With alpha = 0, y = x: the attention is not computed
        at all, and no operation of it stands in an exported graph.

    Shape:
        x and output: as for the attention.

    Args:
        start: The trained module; its attention is taken over, not copied.
    """

    def __init__(self, start: IdentityStart) -> None:
        super().__init__(start.inner)
        del self.alpha
        self.constant = float(start.alpha.detach())
        self.train(start.training)

    def why_composed(self) -> str:
        """That exported tails are composed of modules."""
        return "exported"

    def forward(self, x: Tensor) -> Tensor:
        """y, as in the formula."""
        if self.constant == 0.0:
            return x
        if not self._mixes_maps:
            return ChannelAttention.forward(self, x)
        return (1.0 - self.constant) * x + self.constant * self.inner(x)

    def _from_one(self, v: Tensor) -> Tensor:
        return (1.0 - self.constant) + self.constant * v


def folded(model: _M) -> _M:
    """A copy of a network in evaluation mode, its learned scalars folded into constants.

    The alpha of every identity start and the lambda of every learned mix become numbers of the
    graph. The network itself is left as it is.
    """
    twin = copy.deepcopy(model).eval()
    holder = nn.ModuleList([twin])  # so that a single module can be replaced too
    for parent in list(holder.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is IdentityStart:
                setattr(parent, name, FoldedStart(child))
            elif isinstance(child, LearnedMix):
                setattr(parent, name, FixedMix(float(child.lam.detach())))
    return holder[0]  # pyright: ignore[reportReturnType]  # the type of what replaces it stands in
