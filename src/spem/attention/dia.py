"""DIANet: one recurrent attention unit for all blocks of a stage."""

import torch
from torch import Tensor, nn

from spem.attention.base import Needs, register_attention
from spem.attention.carrying import Carrying, State
from spem.attention.pooling import PoolSpec
from spem.attention.precision import linear
from spem.attention.se import hidden_units
from spem.ops import PlaneStats


@register_attention(
    "dia",
    paper="DIANet: Dense-and-Implicit Attention Network (2020), https://arxiv.org/abs/1905.10671",
    needs=Needs(shared=True),
)
class DIA(Carrying):
    """Dense-and-implicit attention: a recurrent unit that the blocks of a stage share.

    Formula:
        With z the pooled channels (global average by default) and (h, c) the state, zero before the
        first block of a stage: (i, f, g, o) = A(z) + B(h), each of A and B a network W2 relu(W1 v +
        b1) + b2 of C -> C // reduction -> 4C; c' = s(f) c + s(i) tanh(g); h' = s(o) s(c');
        y = x * h'. Parameters of one stage: 10 C q + 2 q + 8 C, q = C // reduction.

    Shape:
        x: [N, C, ...], one to three spatial axes; every block of a stage with the same N.

    Args:
        channels: C.
        reduction: Of the hidden layers, 4 in the paper.
        pool: How a plane becomes a number.
        device: Where the parameters live.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: ``reduction`` leaves no hidden unit.

    Paper: DIANet (2020), https://arxiv.org/abs/1905.10671.

    Differences: none; h' has a sigmoid of c' where an LSTM has tanh, as in the official code, whose
    dropout acts on nothing and is left out.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 4,
        pool: PoolSpec = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        hidden = hidden_units("DIA", channels, reduction)
        self.input1 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.input2 = nn.Linear(hidden, 4 * channels, device=device, dtype=dtype)
        self.state1 = nn.Linear(channels, hidden, device=device, dtype=dtype)
        self.state2 = nn.Linear(hidden, 4 * channels, device=device, dtype=dtype)
        self._draw_start()

    def step(self, stats: PlaneStats, state: State) -> tuple[Tensor, State]:
        """h', and (h', c')."""
        z = self.pool(stats)
        h, c = state or (torch.zeros_like(z), torch.zeros_like(z))
        gates = linear(self.input2, torch.relu(linear(self.input1, z)))
        gates = gates + linear(self.state2, torch.relu(linear(self.state1, h)))
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.sigmoid(c)
        return h, (h, c)
