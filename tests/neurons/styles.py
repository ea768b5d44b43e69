"""More networks in the styles of published code; for these only the sizes of groups and the cuts are checked."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.neurons.networks import IMAGE, rand


class Style(NamedTuple):
    build: Callable[[], nn.Module]
    example: Any
    sizes: list[int]  # of the groups


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = chain(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(F.adaptive_avg_pool2d(x, 1).flatten(1))[:, :, None, None]


class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.change, self.gate, self.out = (nn.Linear(*s) for s in ((12, 9), (9, 9), (9, 9), (9, 5)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).relu()
        gate = self.gate(x).sigmoid()
        return self.out(gate * self.change(x).relu() + (1 - gate) * x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.up, self.out = nn.Conv2d(14, 7, 3, padding=1), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.down(x).relu()
        deep = self.bottom(F.max_pool2d(wide, 2)).relu()
        deep = F.interpolate(deep, size=wide.shape[2:], mode="bilinear", align_corners=False)
        return self.out(self.up(torch.cat([wide, deep], 1)).relu())


class Capsules(nn.Module):
    """Routing by agreement."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.primary = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, stride=2)
        self.weights = nn.Parameter(torch.randn(1, 12, 5, 6, 4) / 10)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.squash(self.primary(self.first(x).relu()).view(len(x), 12, 4))
        votes = (self.weights @ parts[:, :, None, :, None]).squeeze(-1)
        logits = torch.zeros(len(x), 12, 5, dtype=x.dtype)
        for _ in range(2):
            found = self.squash((logits.softmax(-1)[..., None] * votes).sum(1))
            logits = logits + (votes * found[:, None]).sum(-1)
        return found.norm(dim=-1)

    @staticmethod
    def squash(x: Tensor) -> Tensor:
        size = (x**2).sum(-1, keepdim=True)
        return size / (1 + size) * x / (size.sqrt() + 1e-8)


class HyperNetwork(nn.Module):
    """A hypernetwork: another network computes the weights of its hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.out = chain(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 72)), nn.Linear(6, 5)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        weights = self.maker(task).view(-1, 6, 12)
        return self.out(torch.bmm(weights, x.unsqueeze(-1)).squeeze(-1).relu())


class Conditioned(nn.Module):
    """Scales and shifts channels by a conditioning input (FiLM, conditional batch norm)."""

    def __init__(self, given: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)
        self.given, self.out = given, nn.Linear(8, 5)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.given(condition).chunk(2, dim=1)
        x = self.norm(self.conv(x)) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return self.out(x.relu().mean((2, 3)))


class MixtureDensity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.weight, self.mean, self.scale = (nn.Linear(*s) for s in ((12, 9), (9, 3), (9, 6), (9, 6)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.hidden(x).tanh()
        return self.weight(h).softmax(-1), self.mean(h).view(-1, 3, 2), self.scale(h).exp().view(-1, 3, 2)


class SoftMixture(nn.Module):
    """Soft mixture of experts: every expert gets weighted means of all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(12, 3, 2))
        self.up, self.down = nn.Parameter(torch.randn(3, 12, 10)), nn.Parameter(torch.randn(3, 10, 12))
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bnd,des->bnes", x, self.slots)
        weights = logits.flatten(2).softmax(-1).view_as(logits)
        seen = torch.einsum("bnd,bnes->besd", x, logits.softmax(1))
        made = torch.einsum("besh,ehd->besd", torch.einsum("besd,edh->besh", seen, self.up).relu(), self.down)
        return self.out(torch.einsum("besd,bnes->bnd", made, weights))


class Quantized(nn.Module):
    """Vector quantization: the nearest entry of a table, with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.table = chain(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)), nn.Embedding(7, 4)
        self.decode = chain(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        code, table = self.encode(x), self.table.weight
        far = code.pow(2).sum(1, keepdim=True) - 2 * code @ table.t() + table.pow(2).sum(1)
        near = self.table(far.argmin(1))
        return self.decode(code + (near - code).detach())


class Coupling(nn.Module):
    """A coupling flow: one half of the features shifts the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([chain(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 12)) for _ in range(2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x), dtype=x.dtype)
        for part in self.parts:
            kept, moved = x.chunk(2, 1)
            scale, shift = part(kept).chunk(2, 1)
            x, total = torch.cat([moved * scale.tanh().exp() + shift, kept], 1), total + scale.tanh().sum(1)
        return x, total


class DataInitialized(nn.Module):
    """Initializes its scales from the first batch, as in Glow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(12, 9), nn.Linear(9, 5)
        self.scale, self.shift = nn.Parameter(torch.ones(9)), nn.Parameter(torch.zeros(9))
        self.register_buffer("is_set", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.is_set.item() == 0:
            with torch.no_grad():
                self.shift.copy_(-h.mean(0))
                self.scale.copy_(1 / (h.std(0) + 1e-3))
                self.is_set.fill_(1)
        return self.out(((h + self.shift) * self.scale).relu())


class Interactions(nn.Module):
    """Products of all pairs of embeddings, as in DLRM."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(9, 6) for _ in range(3)])
        self.bottom = chain(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.top = chain(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 1))

    def forward(self, dense: Tensor, kinds: Tensor) -> Tensor:
        first = self.bottom(dense)
        vectors = torch.stack([first, *[table(kinds[:, k]) for k, table in enumerate(self.tables)]], 1)
        rows, columns = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([first, torch.bmm(vectors, vectors.transpose(1, 2))[:, rows, columns]], 1))


class Points(nn.Module):
    """Rotates a point cloud by a matrix that it computes, as in PointNet."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.turn = nn.Conv1d(3, 8, 1), chain(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 9))
        self.read, self.out = nn.Conv1d(3, 10, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.turn(self.look(x).relu().amax(2)).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        return self.out(self.read(torch.bmm(matrix, x)).relu().amax(2))


class DropsWeights(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class MixesSamples(nn.Module):
    """Manifold mixup."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(12, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        share = torch.distributions.Beta(0.4, 0.4).sample().to(x)
        h = self.first(x).relu()
        return self.out(share * h + (1 - share) * h[torch.randperm(len(x))])


class CutsOut(nn.Module):
    """Cutout on the image, and blocks dropped from the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        top, left = random.randint(0, 4), int(torch.randint(0, 5, (1,)))
        x = x.clone()
        x[:, :, top : top + 3, left : left + 3] = 0
        h = self.conv(x).relu()
        seeds = (torch.rand(len(h), 1, *h.shape[2:]) < 0.1).to(h.dtype)
        kept = 1 - F.max_pool2d(seeds, 3, 1, 1)
        return self.out((h * kept * kept.numel() / kept.sum()).mean((2, 3)))


class Shaken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(12, 8), nn.Linear(8, 5)
        self.left, self.right = (chain(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        share = torch.rand(len(x), 1, dtype=x.dtype)
        return self.out(x + share * self.left(x) + (1 - share) * self.right(x))


class Diffusion(nn.Module):
    """Diffusion: draws a time and noise, and predicts the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.hidden = chain(nn.Linear(8, 9), nn.SiLU(), nn.Linear(9, 12)), nn.Linear(12, 10)
        self.out = nn.Linear(10, 12)
        self.register_buffer("kept", torch.linspace(0.99, 0.01, 50))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        time, noise = torch.randint(0, 50, (len(x),)), torch.randn_like(x)
        kept = self.kept[time][:, None]
        angles = time[:, None] * torch.exp(-torch.arange(4).to(x.dtype))
        moved = kept.sqrt() * x + (1 - kept).sqrt() * noise
        return self.out(self.hidden(moved + self.time(torch.cat([angles.sin(), angles.cos()], -1))).relu()), noise


class Ensemble(nn.Module):
    """A batch ensemble: members share a weight and have their own scales."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.out = nn.Linear(12, 9, bias=False), nn.Linear(9, 5)
        self.inner, self.outer = nn.Parameter(torch.ones(2, 12)), nn.Parameter(torch.ones(2, 9))

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(2, *x.shape) * self.inner[:, None]
        return self.out((self.shared(x) * self.outer[:, None]).relu()).mean(0)


class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(12, 24), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).view(len(x), 8, 3).amax(2))


class Twice(nn.Module):
    """Positive and negative parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.out(torch.cat([h, -h], 1).relu()).mean((2, 3))


def with_bottleneck() -> nn.Module:
    return chain(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 8, 1),
        SqueezeExcite(8), nn.Conv2d(8, 5, 1),
    )  # fmt: skip


FLAT = rand(4, 12)
KINDS = torch.tensor([[1, 2, 3], [4, 5, 6]])

STYLES: dict[str, Style] = {
    "groups of channels, squeeze and excite": Style(with_bottleneck, IMAGE, [4, 8, 4]),
    "highway": Style(Highway, FLAT, [9]),
    "U-Net": Style(UNet, IMAGE, [6, 8, 7]),
    "capsules": Style(Capsules, IMAGE, [8]),
    "hypernetwork": Style(HyperNetwork, (FLAT, rand(4, 4)), [9, 6]),
    "FiLM": Style(lambda: Conditioned(nn.Linear(4, 16)), (IMAGE, rand(2, 4)), [8]),
    "conditional norm": Style(lambda: Conditioned(nn.Embedding(4, 16)), (IMAGE, torch.tensor([1, 2])), [8]),
    "mixture density": Style(MixtureDensity, FLAT, [9]),
    "soft mixture of experts": Style(SoftMixture, rand(2, 5, 12), [10, 12]),
    "vector quantized": Style(Quantized, FLAT, [9, 8]),
    "flow": Style(Coupling, FLAT, [9, 9]),
    "initialized by data": Style(DataInitialized, FLAT, [9]),
    "interactions": Style(Interactions, (rand(2, 4), KINDS), [8, 9]),
    "points": Style(Points, rand(2, 3, 9), [8, 7, 10]),
    "dropped weights": Style(lambda: chain(DropsWeights(12, 9), nn.ReLU(), DropsWeights(9, 5)), FLAT, [9]),
    "mixed samples": Style(MixesSamples, FLAT, [9]),
    "cut-out": Style(CutsOut, IMAGE, [8]),
    "shaken": Style(Shaken, FLAT, [10, 10]),
    "diffusion": Style(Diffusion, FLAT, [9, 10]),
    "ensemble": Style(Ensemble, FLAT, [9]),
    "maxout": Style(Maxout, FLAT, [8]),
    "both signs": Style(Twice, IMAGE, [8]),
    "random leaks": Style(lambda: chain(nn.Linear(12, 9), nn.RReLU(), nn.Linear(9, 5)), FLAT, [9]),
    "random pools": Style(
        lambda: chain(nn.Conv2d(3, 8, 3), nn.FractionalMaxPool2d(2, output_size=3), nn.Conv2d(8, 5, 1)), IMAGE, [8]
    ),
}  # fmt: skip
