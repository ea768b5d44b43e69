"""Attention with many kinds of positions and states, as users write it, with the expected groups."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.neurons.networks import Case
from tests.neurons.spellings import layer


class Projections(nn.Module):
    """Four projections; subclasses differ in the attention between them."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.n_head, self.n_embd, self.head_dim = heads, width, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.n_head, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(project(x)) for project in (self.q, self.k, self.v))
        y = self.attend(q, k, v)
        return self.o(y.transpose(1, 2).contiguous().view(*x.shape[:2], self.n_embd))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class RelativeBias(Projections):
    """T5: a learned bias for each head and distance."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(7, self.n_head)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = torch.arange(q.shape[2])
        bias = self.bias((steps[None] - steps[:, None]).clamp(-3, 3) + 3).permute(2, 0, 1).unsqueeze(0)
        return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v


class RepeatedMask(Projections):
    """A mask that is repeated for each head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.tril(torch.ones(q.shape[2], q.shape[2])).bool()[None, None].repeat(len(q), self.n_head, 1, 1)
        return (q @ k.transpose(-1, -2)).masked_fill(~mask, -1e9).softmax(-1) @ v


class Rotary(Projections):
    """LLaMA: rotations as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.linspace(0, 3, 16 * self.head_dim // 2).view(16, -1)
        self.register_buffer("angles", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * self.angles[: x.shape[2]])
            for x in (q, k)
        )
        return F.scaled_dot_product_attention(q.flatten(3), k.flatten(3), v, is_causal=True)


class LinearKernel(Projections):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scale = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
        return torch.einsum("bhnd,bhde,bhn->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v), scale)


class StateSpace(nn.Module):
    """mamba-minimal: a scan over states of each inner channel."""

    def __init__(self, width: int = 32, inner: int = 24, states: int = 4, rank: int = 3) -> None:
        super().__init__()
        self.inner, self.states, self.rank = inner, states, rank
        self.in_proj, self.out = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.conv = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj, self.dt = nn.Linear(inner, rank + 2 * states, bias=False), nn.Linear(rank, inner)
        self.logs, self.skip = nn.Parameter(torch.randn(inner, states)), nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor) -> Tensor:
        size, length, _ = x.shape
        x, gate = self.in_proj(x).split([self.inner, self.inner], -1)
        x = F.silu(self.conv(x.transpose(1, 2))[:, :, :length].transpose(1, 2))
        dt, b, c = self.x_proj(x).split([self.rank, self.states, self.states], -1)
        dt = F.softplus(self.dt(dt))
        decay = torch.exp(torch.einsum("bld,dn->bldn", dt, -torch.exp(self.logs)))
        given = torch.einsum("bld,bln,bld->bldn", dt, b, x)
        h, outputs = torch.zeros(size, self.inner, self.states), list[Any]()
        for step in range(length):
            h = decay[:, step] * h + given[:, step]
            outputs.append(torch.einsum("bdn,bn->bd", h, c[:, step]))
        return self.out((torch.stack(outputs, 1) + x * self.skip) * F.silu(gate))


POSITIONS: dict[str, Case] = {
    "relative bias": layer(RelativeBias, 4),
    "repeated mask": layer(RepeatedMask, 4),
    "rotary": layer(Rotary, 4),
    "linear kernel": layer(LinearKernel, 4),
    "state space": Case(
        layer(StateSpace, 24).build,
        layer(StateSpace, 24).example,
        {"block.attn": 24, "block.attn.x_proj": 3, "block.mlp": 24},
    ),
}
