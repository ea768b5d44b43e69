"""Small networks of many kinds, with their expected groups."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    example: Any
    groups: dict[str, int]  # name: number of neurons
    residual: bool = False


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.second = nn.Conv2d(7, 8, 3, padding=1)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.second(self.norm(self.first(x)).relu())
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Dense(nn.Module):
    """Concatenates, as DenseNets and U-Nets do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(9, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(13), nn.Conv2d(13, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.first(x).relu()], dim=1)
        x = torch.cat([x, self.second(x).relu()], dim=1)
        return self.last(self.norm(x)).mean((2, 3))


class Flipped(nn.Module):
    """Data movement for which elementwise rules are wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.last = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(6, 5, 3)
        self.fc, self.out = nn.Linear(5 * 36, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(F.pixel_shuffle(self.up(x), 2)[:, :, ::2, ::2].flip(1))
        return self.out(self.fc(x.flatten(1)).tanh().flip(1))


class Heads(nn.Module):
    """Grouped-query attention, whose forward uses the number of heads."""

    def __init__(self, width: int = 20, heads: int = 6, kv_heads: int = 3, head_dim: int = 4) -> None:
        super().__init__()
        self.num_heads, self.num_kv, self.head_dim = heads, kv_heads, head_dim
        self.q, self.k, self.v = (nn.Linear(width, n * head_dim) for n in (heads, kv_heads, kv_heads))
        self.norm, self.out = nn.LayerNorm(head_dim), nn.Linear(heads * head_dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.norm(self.q(x).view(b, t, self.num_heads, self.head_dim)).transpose(1, 2)
        k, v = (p(x).view(b, t, self.num_kv, self.head_dim).transpose(1, 2) for p in (self.k, self.v))
        k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, self.num_heads * self.head_dim))


class Fused(nn.Module):
    """A fused projection whose split size is an attribute, rotary positions in a buffer, and a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.split_size = 4, 24
        self.qkv, self.proj = nn.Linear(12, 72), nn.Linear(24, 12)
        self.gate_up, self.down = nn.Linear(12, 30), nn.Linear(15, 12)
        self.norm = nn.LayerNorm(12)
        self.register_buffer("angles", torch.linspace(0, 1, 3), persistent=False)
        self.slopes = torch.tensor(0.5)  # a plain attribute

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.qkv(x).split(self.split_size, dim=-1)
        )
        q, k = self.rotate(q), self.rotate(k)
        y = (q @ k.transpose(-2, -1) / 6**0.5 - self.slopes).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return {"states": x + self.down(F.silu(gate) * up)}

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * self.angles
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


class Oddities(nn.Module):
    """Tied and shared weights, an unused one, one outside any module, several inputs, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 9)
        self.shared = nn.Linear(9, 14)
        self.back = nn.Linear(14, 9)
        self.unused = nn.Linear(7, 6)
        self.scale = nn.Parameter(torch.ones(14))
        self.table = nn.Parameter(torch.ones(5, 14))
        self.decode = nn.Linear(9, 11)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor, extra: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(tokens) + extra
        first = self.back((self.shared(x) * self.scale + self.table).relu())
        second = self.back(self.shared(first) * self.scale)
        return self.decode(second), [first.mean()]


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 8)
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encode(x).relu(), self.encode.weight.t(), self.bias)


class Experts(nn.Module):
    """A dense mixture of experts: one tensor holds the weights of all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 10)), nn.Parameter(torch.randn(3, 10, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.bmm(torch.bmm(x.expand(3, *x.shape), self.up).relu(), self.down)
        return self.out((each * self.router(x).softmax(-1).t().unsqueeze(-1)).sum(0))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(6, 7, num_layers=2, batch_first=True, **options)
        self.out = nn.Linear(14 if options.get("bidirectional") else 7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


class CrossAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 4, **options)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.out(self.attention(x, context, context, need_weights=False)[0])


class NonContiguous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 9, bias=False), nn.Linear(9, 5)
        self.first.weight = nn.Parameter(torch.randn(12, 9).t())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Graph(nn.Module):
    """Messages along edges given by index tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for number, layer in enumerate([self.first, self.second]):
            message = layer(x)[edges[0]]
            x = torch.zeros(len(x), message.shape[1], dtype=x.dtype).index_add_(0, edges[1], message)
            x = x.relu() if number == 0 else x
        return x


class Bags(nn.Module):
    """Weighted sums of rows of a table; the weights are an input, or the output of a hidden unit."""

    def __init__(self) -> None:
        super().__init__()
        self.given = nn.EmbeddingBag(7, 10, mode="sum", padding_idx=6)
        self.hidden, self.scales = nn.Linear(3, 8), nn.Linear(8, 3)
        self.scaled = nn.EmbeddingBag(7, 6, mode="sum")
        self.mean = nn.EmbeddingBag(7, 9, mode="mean")
        self.out = nn.Linear(25, 5)

    def forward(self, words: Tensor, weights: Tensor) -> Tensor:
        scaled = self.scaled(words, per_sample_weights=self.scales(self.hidden(weights).relu()))
        given = self.given(words, per_sample_weights=weights)
        return self.out(torch.cat([given.relu(), scaled.relu(), self.mean(words)], dim=1))


class Variational(nn.Module):
    """A variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.log_variance = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.decode, self.out = nn.Linear(3, 7), nn.Linear(7, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encode(x).relu()
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.out(self.decode(code).relu()), mean, log_variance


class MaskedAutoencoder(nn.Module):
    """Masks half of the positions, chosen by sorting noise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.mask = nn.Linear(12, 10), Block(10), nn.Parameter(torch.ones(1, 1, 10))
        self.decode, self.out = nn.Linear(10, 9), nn.Linear(9, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size, length, _ = x.shape
        order = torch.rand(size, length, device=x.device).argsort(dim=1)
        back = order.argsort(dim=1)
        x = self.embed(x)
        seen = self.block(x.gather(1, order[:, : length // 2, None].expand(-1, -1, 10)))
        whole = torch.cat([seen, self.mask.repeat(size, length - length // 2, 1)], dim=1)
        whole = whole.gather(1, back[:, :, None].expand(-1, -1, 10))
        return self.out(self.decode(whole).relu()), (back >= length // 2)


class NoisyUnits(nn.Module):
    """Noise on hidden units, and noise as the input of a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)
        self.generate = nn.Linear(3, 6)
        self.read = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x + 0.1 * torch.randn_like(x))).relu()
        h = h * (1 + 0.5 * torch.randn(h.shape[1], dtype=x.dtype))
        return self.last(h) + self.read(self.generate(torch.randn(len(x), 3, dtype=x.dtype)).relu())


class Masked(nn.Linear):
    """Weights times a mask, as in MADE."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", (torch.arange(outputs)[:, None] % 3 >= torch.arange(inputs) % 2).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedConv(nn.Conv2d):
    """A filter that sees only pixels above and to the left, as in PixelCNN; the mask is a plain attribute."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.mask = torch.ones(outputs, inputs, 3, 3)
        self.mask[:, :, 1, 2] = self.mask[:, :, 2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


class Bayesian(nn.Module):
    """Weights that are drawn at random, with a learned mean and deviation for each."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean, self.rho = nn.Parameter(torch.randn(outputs, inputs) / 3), nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mean + F.softplus(self.rho) * torch.randn_like(self.mean), self.bias)


class Noisy(nn.Module):
    """Weights with factorized noise, which its forward draws into a buffer (NoisyNet)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.mean, self.bias = nn.Parameter(torch.randn(outputs, inputs) / 3), nn.Parameter(torch.zeros(outputs))
        self.deviation = nn.Parameter(torch.ones(outputs, inputs) / 10)
        self.register_buffer("noise", torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        self.noise.copy_(torch.randn(self.outputs).outer(torch.randn(self.inputs)))
        return F.linear(x, self.mean + self.deviation * self.noise, self.bias)


class Positive(nn.Linear):
    """Weights that cannot be negative."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.exp(), self.bias)


class Spline(nn.Module):
    """A layer of a Kolmogorov-Arnold network: a function of every input for every output, on a grid."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.base, self.scale = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.ones(outputs, inputs))
        self.spline = nn.Parameter(torch.randn(outputs, inputs, 4) / 4)
        self.register_buffer("grid", torch.linspace(-1, 1, 4).expand(inputs, 4).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        bases = torch.exp(-((x.unsqueeze(-1) - self.grid) ** 2)).reshape(len(x), -1)
        return F.linear(F.silu(x), self.base) + F.linear(
            bases, (self.spline * self.scale.unsqueeze(-1)).view(self.outputs, -1)
        )


class LowRank(nn.Linear):
    """Weights plus a product of two low-rank matrices, as in LoRA."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(3, inputs)), nn.Parameter(torch.randn(outputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


class Standardized(nn.Conv2d):
    """Filters of mean 0 and deviation 1."""

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = nn.Linear(12, 8), nn.Linear(12, 7), nn.Bilinear(8, 7, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.both(self.left(x).relu(), self.right(x).relu()).relu())


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x)))


class Checkpointed(nn.Module):
    """Recomputes its hidden units, and their dropout, in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(12, 8), nn.Linear(8, 7), nn.Linear(7, 5)

    def hidden(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.first(x).relu(), 0.3, self.training)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.hidden, x, use_reentrant=False))


class Skips(nn.Module):
    """Its last block computes a residual that is never read, as in WaveNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 10)
        self.up = nn.ModuleList([nn.Linear(10, 8) for _ in range(2)])
        self.back = nn.ModuleList([nn.Linear(8, 10) for _ in range(2)])
        self.skip = nn.ModuleList([nn.Linear(8, 5) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), torch.zeros(())
        for up, back, skip in zip(self.up, self.back, self.skip, strict=True):
            hidden = up(x).tanh()
            x, total = x + back(hidden), total + skip(hidden)
        return total


def of_layers(layer: Callable[[int, int], nn.Module]) -> nn.Module:
    return nn.Sequential(layer(12, 8), nn.Tanh(), layer(8, 7), nn.Tanh(), layer(7, 5))


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), nn.Sequential(*[Block() for _ in range(5)]), nn.Linear(12, 5))


IMAGE, TOKENS = rand(2, 3, 8, 8), rand(2, 5, 12)

CASES: dict[str, Case] = {
    "residual": Case(Residual, IMAGE, {"first": 7}),
    "residual, all of it": Case(Residual, IMAGE, {"stem": 8, "first": 7}, residual=True),
    "dense": Case(Dense, IMAGE, {"first": 6, "second": 4}),
    "flips and pixel shuffle": Case(Flipped, IMAGE, {"up": 6, "last": 5, "fc": 10}),
    "depthwise and grouped": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 12, 3, groups=4), nn.ReLU(),
            nn.Conv2d(12, 5, 1),
        ),
        IMAGE,
        {"0": 2},  # a group of the third convolution takes in three groups of the second
    ),
    "group norm": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.SiLU(), nn.Flatten(), nn.Linear(432, 5)),
        IMAGE,
        {"0": 4},
    ),
    "transposed": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 3, 3)),
        IMAGE,
        {"0": 6, "1": 8},
    ),
    "grouped queries": Case(Heads, rand(2, 5, 20), {"0": 3}),
    "fused": Case(Fused, {"x": TOKENS}, {"0": 4, "1": 15}),
    "encoder layer": Case(
        lambda: nn.TransformerEncoderLayer(12, 3, 20, dropout=0.2, batch_first=True), TOKENS, {"self_attn": 3, "1": 20}
    ),
    "cross attention": Case(lambda: CrossAttention(batch_first=True), (TOKENS, TOKENS[:, :3]), {"0": 4, "1": 12}),
    "cross attention, own widths": Case(
        lambda: CrossAttention(kdim=6, vdim=6, bias=False), (rand(5, 2, 12), rand(3, 2, 6)), {"0": 4, "1": 12}
    ),
    "oddities": Case(
        Oddities, (torch.tensor([[1, 2, 3, 4, 5], [2, 3, 4, 5, 6]]), rand(2, 5, 9)), {"shared": 14}
    ),
    "tied autoencoder": Case(TiedAutoencoder, rand(3, 12), {"encode": 8}),
    "experts": Case(Experts, rand(4, 8), {"0": 10, "1": 8}),
    "LSTM": Case(lambda: Recurrent(nn.LSTM), rand(2, 4, 6), {"cell": 7, "cell#2": 7}),
    "GRU, both ways": Case(
        lambda: Recurrent(nn.GRU, bidirectional=True), rand(2, 4, 6), {"cell": 7, "cell#2": 7, "cell#3": 7, "cell#4": 7}
    ),
    "not contiguous": Case(NonContiguous, rand(3, 12), {"first": 9}),
    "graph": Case(Graph, (rand(5, 6), torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]])), {"first": 9}),
    "bags of embeddings": Case(
        Bags,
        (torch.tensor([[0, 1, 6], [2, 2, 5], [3, 4, 1]]), rand(3, 3)),
        {"given": 10, "hidden": 8, "scaled": 6, "mean": 9},
    ),
    "masked weights": Case(lambda: of_layers(Masked), rand(4, 12), {"0": 8, "2": 7}),
    "masked filters": Case(
        lambda: nn.Sequential(MaskedConv(3, 8), nn.ReLU(), MaskedConv(8, 6), nn.ReLU(), MaskedConv(6, 5)),
        IMAGE, {"0": 8, "2": 6},
    ),
    "Bayesian weights": Case(lambda: of_layers(Bayesian), rand(4, 12), {"0": 8, "2": 7}),
    "noisy weights": Case(lambda: of_layers(Noisy), rand(4, 12), {"0": 8, "2": 7}),
    "positive weights": Case(lambda: of_layers(Positive), rand(4, 12), {"0": 8, "2": 7}),
    "splines": Case(lambda: nn.Sequential(Spline(12, 8), Spline(8, 7), Spline(7, 5)), rand(4, 12), {"0": 8, "1": 7}),
    "weights of low rank": Case(lambda: of_layers(LowRank), rand(4, 12), {"0": 8, "2": 7}),
    "weight norm": Case(
        lambda: nn.Sequential(weight_norm(nn.Linear(12, 8)), nn.ReLU(), nn.Linear(8, 5)), rand(4, 12), {"0": 8}
    ),
    "weight norm in the middle": Case(
        lambda: nn.Sequential(nn.Linear(12, 9), weight_norm(nn.Linear(9, 8)), nn.ReLU(), nn.Linear(8, 5)),
        rand(4, 12), {"1": 8},
    ),
    "standardized filters": Case(
        lambda: nn.Sequential(Standardized(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)), IMAGE, {"0": 8}
    ),
    "bilinear": Case(Pairs, rand(4, 12), {"left": 8, "right": 7, "both": 6}),
    "gated": Case(Gated, rand(4, 12), {"0": 8}),
    "checkpointed": Case(Checkpointed, rand(4, 12), {"first": 8, "second": 7}),
    "a block that is never read": Case(Skips, rand(4, 12), {"0": 8, "1": 8}),
    "instance norm": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 5, 1)),
        IMAGE, {"0": 8},
    ),
    "variational autoencoder": Case(Variational, rand(4, 12), {"encode": 8, "decode": 7}),
    "masked autoencoder": Case(MaskedAutoencoder, rand(2, 6, 12), {"block": 16, "decode": 9}),
    "noise": Case(NoisyUnits, rand(6, 12), {"0": 8, "1": 6}),
}  # fmt: skip
