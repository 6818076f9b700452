"""The fused tail's four passes written out, forward and backward, against autograd in float64."""

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5


def gate(mean: Tensor, var: Tensor, highest: Tensor, lowest: Tensor) -> Tensor:
    """Any differentiable function of the four plane statistics, [B, C]."""
    return torch.sigmoid(0.3 * mean - 0.2 * (var + EPS).sqrt() + 0.5 * highest + 0.7 * lowest)


def by_autograd(z: Tensor, r: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    x = F.batch_norm(z, None, None, gamma, beta, training=True, eps=EPS)
    v = gate(x.mean(2), x.var(2, unbiased=False), x.max(2).values, x.min(2).values)
    return torch.relu(v[..., None] * x + r)


torch.manual_seed(0)
B, C, K = 4, 3, 10
n = B * K
leaves = [torch.randn(B, C, K), torch.randn(B, C, K), torch.randn(C), torch.randn(C)]
leaves = [leaf.double().requires_grad_() for leaf in leaves]
g = torch.randn(B, C, K).double()
y_true = by_autograd(*leaves)
y_true.backward(g)
z, r, gamma, beta = (leaf.detach() for leaf in leaves)

# F1: one reading of z gives every plane its mean, variance, maximum, minimum and their positions.
zb, Vz = z.mean(2), z.var(2, unbiased=False)
first, last = z.max(2).indices, z.min(2).indices
mu = zb.mean(0)
rstd = (Vz + (zb - mu).square()).mean(0).add(EPS).rsqrt()
a = gamma * rstd
# The extrema of x = a (z - mu) + beta are those of z, exchanged where a is negative.
i, j = torch.where(a > 0, first, last), torch.where(a > 0, last, first)
z_i, z_j = (z.gather(2, k[..., None])[..., 0] for k in (i, j))
shifted = (zb - mu, z_i - mu, z_j - mu)
parts = (a * shifted[0] + beta, a.square() * Vz, a * shifted[1] + beta, a * shifted[2] + beta)
stats = [part.detach().requires_grad_() for part in parts]
v = gate(*stats)

# F2: the output is an affine map of each plane.
al, be = (v * a).detach(), (v * (beta - a * mu)).detach()
y = torch.relu(al[..., None] * z + be[..., None] + r)

# B1: two sums for each plane, and the shortcut's gradient.
d = torch.where(y > 0, g, 0.0)
A = d.sum(2)
Bc = (d * (z - mu[:, None])).sum(2)
v.backward(a * Bc + beta * A)  # autograd runs through the gate, on [B, C] numbers only
dmean, dvar, dmax, dmin = (torch.zeros_like(A) if s.grad is None else s.grad for s in stats)
v = v.detach()
S0 = (v * A + dmean + dmax + dmin).sum(0)
S1 = (v * Bc + dmean * shifted[0] + 2 * a * dvar * Vz + dmax * shifted[1] + dmin * shifted[2]).sum(
    0
)

# B2: the gradient of z is an affine map of d and z, and two spikes.
P = a * v
Q = a * (dmean / K - 2 * a * dvar * shifted[0] / K - S0 / n)
T = a * (2 * a * dvar / K - rstd.square() * S1 / n)
dz = P[..., None] * d + Q[..., None] + T[..., None] * (z - mu[:, None])
dz.scatter_add_(2, i[..., None], (a * dmax)[..., None])
dz.scatter_add_(2, j[..., None], (a * dmin)[..., None])

pairs = {"y": (y, y_true.detach())}
for name, mine, leaf in zip(
    ("dz", "dr", "dgamma", "dbeta"), (dz, d, rstd * S1, S0), leaves, strict=True
):
    assert leaf.grad is not None
    pairs[name] = (mine, leaf.grad)
for name, (mine, theirs) in pairs.items():
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    print(f"{name}: largest difference {float((mine - theirs).abs().max()):.1e}")
