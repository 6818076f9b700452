"""DIANet: one recurrent attention unit for all blocks of a stage."""

import torch
from torch import Tensor, nn

from spem.attention.base import ChannelAttention, Needs, Tail, along, register_attention
from spem.attention.options import Device, Dtype, Factory, hidden_units
from spem.attention.pooling import PoolSpec
from spem.attention.precision import call
from spem.ops import PlaneStats

State = tuple[Tensor, ...]
"""What a block hands to the next one, (h, c); () before the first block of a stage."""
Step = tuple[Tensor, State]
"""A gate, or what it has scaled, and the state after it."""


@register_attention(
    "dia",
    paper="DIANet: Dense-and-Implicit Attention Network (2020), https://arxiv.org/abs/1905.10671",
    needs=Needs(shared=True),
)
class DIA(ChannelAttention):
    """Dense-and-implicit attention: a recurrent unit that the blocks of a stage share.

    Formula:
        With z the pooled channels (global average by default) and (h, c) the state, zero before the
        first block of a stage: (i, f, g, o) = A(z) + B(h), each of A and B a network W2 relu(W1 v +
        b1) + b2 of C -> C // reduction -> 4C; c' = s(f) c + s(i) tanh(g); h' = s(o) s(c'); y = x *
        h'. Parameters of one stage: 10 C q + 2 q + 8 C, q = C // reduction. Shape: [N, C, ...], one
        to three spatial axes; every block of a stage with the same N.

    Args:
        reduction: r of the hidden layers, 4 in the paper; C // r >= 1.
        pool: How a plane becomes a number.

    Differences: none; h' has a sigmoid of c' where an LSTM has tanh, as in the official code, whose
    dropout acts on nothing and is left out.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 4,
        pool: PoolSpec = "avg",
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(channels, pool=pool, device=device, dtype=dtype)
        factory = Factory(device=device, dtype=dtype)
        hidden = hidden_units("DIA", channels, reduction)
        self.input1 = nn.Linear(channels, hidden, **factory)
        self.input2 = nn.Linear(hidden, 4 * channels, **factory)
        self.state1 = nn.Linear(channels, hidden, **factory)
        self.state2 = nn.Linear(hidden, 4 * channels, **factory)

    def step(self, stats: PlaneStats, state: State) -> Step:
        """h', and (h', c')."""
        z = self.pool(stats)
        h, c = state or (torch.zeros_like(z), torch.zeros_like(z))
        gates = call(self.input2, torch.relu(call(self.input1, z)))
        gates = gates + call(self.state2, torch.relu(call(self.state1, h)))
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.sigmoid(c)
        return h, (h, c)

    def gate_from(self, stats: PlaneStats) -> Tensor:
        """The gate of the first block, [N, C]."""
        return self.step(stats, ())[0]

    def gate(self, x: Tensor, state: State = ()) -> Tensor:
        """The gate after a state, [N, C, 1, ...]."""
        return along(self.step(self.stats_of(x), state)[0], x)

    def forward(self, x: Tensor, state: State | None = None) -> Tensor | Step:
        """x * gate(x) as in the first block; with a state, the state after it too."""
        self._check(x)
        gate, after = self.step(self.stats_of(x), state or ())
        y = x * along(gate, x).to(x.dtype)
        return y if state is None else (y, after)

    def begin(self, blocks: int) -> list[Tail]:
        """The tails of the blocks of a stage, which hand the state on; they alone hold it."""
        # A state for every block, so that one that activation checkpointing runs again finds its.
        states: list[State] = [()] * (blocks + 1)

        def tail_of(block: int) -> Tail:
            def keep(computed: Step) -> Tensor:
                value, states[block + 1] = computed
                return value

            def tail(z: Tensor, residual: Tensor, norm: nn.Module | None = None) -> Tensor:
                before = states[block]
                return self._tail(
                    z,
                    residual,
                    norm,
                    lambda module: lambda stats: keep(module.step(stats, before)),
                    lambda module, x: keep(module(x, before)),
                )

            return tail

        return [tail_of(block) for block in range(blocks)]

    @property
    def _plain(self) -> type[ChannelAttention]:
        return DIA  # whose forward and tail both call `step`
