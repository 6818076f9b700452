"""EAN: one squeeze-and-excitation for all blocks of a stage."""

from spem.attention.base import Needs, register_attention
from spem.attention.se import SE


@register_attention(
    "ean",
    paper="Efficient Attention Network: Accelerate Attention by Searching Where to Plug (2020), "
    "https://arxiv.org/abs/2011.14058",
    needs=Needs(shared=True),
)
class EAN(SE):
    """Efficient attention network: squeeze-and-excitation that the blocks of a stage share.

    Formula:
        y = x * s(W2 relu(W1 z + b1) + b2) with the same W1, b1, W2, b2 in every block of a stage.
        Parameters of one stage: 2 C h + h + C.

    Shape and options are those of `SE`.

    Differences: here every block has it; the authors search which blocks keep it, by policy
    gradient. The shared module is SE; the official code has others too.
    """
