"""Graph networks of PyTorch Geometric, on a random graph of 24 nodes; classifying its nodes, or two halves of it."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.entry import Entry, Inputs, drawn, seeded

NODES, EDGES, FEATURES, CLASSES = 24, 70, 11, 7


class Stack(nn.Module):
    """Graph convolutions with an activation between them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Return the classes of the nodes."""
        for layer in self.layers[:-1]:
            x = F.elu(layer(x, edges))
        out: Tensor = self.layers[-1](x, edges)
        return out


class Propagated(nn.Module):
    """A perceptron on every node, then propagation without parameters (APPNP)."""

    def __init__(self, propagation: nn.Module) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(FEATURES, 28), nn.ReLU(), nn.Linear(28, CLASSES))
        self.propagation = propagation

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Return the classes of the nodes."""
        out: Tensor = self.propagation(self.before(x), edges)
        return out


class InitialResidual(nn.Module):
    """Convolutions that all read the first hidden state too (GCN2)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 20), nn.Linear(20, CLASSES)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Return the classes of the nodes."""
        start = hidden = F.relu(self.first(x))
        for layer in self.layers:
            hidden = F.relu(layer(hidden, start, edges))
        out: Tensor = self.last(hidden)
        return out


class Pooled(nn.Module):
    """Convolutions, the mean over each graph's nodes, and a perceptron: graph classification."""

    def __init__(self, stack: nn.Module, width: int) -> None:
        super().__init__()
        self.stack = stack
        self.head = nn.Sequential(nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, CLASSES))

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        """Return the classes of the graphs."""
        out: Tensor = self.head(_library().global_mean_pool(F.relu(self.stack(x, edges)), graph))
        return out


def _library() -> Any:
    return importlib.import_module("torch_geometric.nn")


def _graph(with_batch: bool) -> Callable[[], Inputs]:
    def draw() -> Inputs:
        half = NODES // 2
        edges = torch.cat([torch.randint(0, half, (2, EDGES // 2)), torch.randint(half, NODES, (2, EDGES // 2))], 1)
        x = torch.randn(NODES, FEATURES)
        return ((x, edges, torch.arange(2).repeat_interleave(half)) if with_batch else (x, edges)), {}

    return drawn(draw)


def _entry(family: str, make: Callable[[Any], nn.Module], with_batch: bool = False, on_meta: bool = True) -> Entry:
    return Entry(seeded(lambda: make(_library())), _graph(with_batch), "torch_geometric", family, on_meta)


def _basic(name: str, **arguments: Any) -> Entry:
    """One of the library's ready-made networks."""
    size = {"hidden_channels": 20, "num_layers": 3, "out_channels": CLASSES}
    return _entry("ready-made", lambda pyg: getattr(pyg, name)(FEATURES, **(size | arguments)))


def _stack(name: str, on_meta: bool = True, **arguments: Any) -> Entry:
    """Three convolutions of one kind."""

    def make(pyg: Any) -> nn.Module:
        kind = getattr(pyg, name)
        sizes = [(FEATURES, 20), (20, 28), (28, CLASSES)]
        return Stack(*(kind(inputs, outputs, **arguments) for inputs, outputs in sizes))

    return _entry("convolutions", make, on_meta=on_meta)


def _attention_stack(name: str) -> Entry:
    """Convolutions with 3 concatenated heads of 8, then with 5 averaged heads."""

    def make(pyg: Any) -> nn.Module:
        kind = getattr(pyg, name)
        return Stack(kind(FEATURES, 8, heads=3), kind(24, CLASSES, heads=5, concat=False))

    return _entry("attention", make)


def _pna(pyg: Any) -> nn.Module:
    statistics = {
        "aggregators": ["mean", "min", "max", "std"],
        "scalers": ["identity", "amplification", "attenuation"],
        "deg": torch.tensor([2, 5, 6, 6, 3, 2]),
    }
    network: nn.Module = pyg.PNA(FEATURES, 20, 2, CLASSES, towers=1, **statistics)
    return network


def _gin_pooled(pyg: Any) -> nn.Module:
    return Pooled(pyg.GIN(FEATURES, 20, 2, 28, norm="batch_norm"), 28)


def _gine(pyg: Any) -> nn.Module:
    def layer(inputs: int, hidden: int, outputs: int) -> nn.Module:
        inner = nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        made: nn.Module = pyg.GINConv(inner, train_eps=True)
        return made

    return Stack(layer(FEATURES, 36, 20), layer(20, 44, CLASSES))


ENTRIES = {
    "pyg_gcn": _basic("GCN"),
    "pyg_gcn_batchnorm": _basic("GCN", norm="batch_norm"),
    "pyg_gcn_jumping_cat": _basic("GCN", jk="cat"),
    "pyg_gcn_jumping_max": _basic("GCN", jk="max"),
    "pyg_gcn_jumping_lstm": _basic("GCN", jk="lstm"),
    "pyg_sage": _basic("GraphSAGE"),
    "pyg_sage_layernorm": _basic("GraphSAGE", norm="layer_norm"),
    "pyg_gin": _basic("GIN", norm="batch_norm"),
    "pyg_gat": _basic("GAT", hidden_channels=24, heads=3),
    "pyg_gatv2": _basic("GAT", hidden_channels=24, heads=3, v2=True),
    "pyg_edge_cnn": _basic("EdgeCNN"),
    "pyg_pna": _entry("ready-made", _pna, on_meta=False),  # averages the degrees while it builds
    "pyg_gat_conv": _attention_stack("GATConv"),
    "pyg_gatv2_conv": _attention_stack("GATv2Conv"),
    "pyg_transformer_conv": _attention_stack("TransformerConv"),
    "pyg_gin_conv": _entry("convolutions", _gine),
    "pyg_cheb": _stack("ChebConv", K=3, on_meta=False),  # makes its weights on the CPU regardless of the default device
    "pyg_tag": _stack("TAGConv"),
    "pyg_graph_conv": _stack("GraphConv"),
    "pyg_arma": _stack("ARMAConv"),
    "pyg_sgconv": _stack("SGConv", K=2),
    "pyg_gcn2": _entry(
        "convolutions",
        lambda pyg: InitialResidual(*(pyg.GCN2Conv(20, 0.1, theta=0.5, layer=level + 1) for level in range(3))),
    ),
    "pyg_appnp": _entry("convolutions", lambda pyg: Propagated(pyg.APPNP(K=4, alpha=0.1))),
    "pyg_gcn_pooled": _entry(
        "graph classification", lambda pyg: Pooled(pyg.GCN(FEATURES, 20, 2, 28), 28), with_batch=True
    ),
    "pyg_gin_pooled": _entry("graph classification", _gin_pooled, with_batch=True),
}
