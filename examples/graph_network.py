"""Train a graph network of torch-geometric by independent subnets.

python examples/graph_network.py                              # 4 workers in one process
torchrun --nproc-per-node 4 examples/graph_network.py         # 4 processes, rank 0 coordinates

The graph connects each of scikit-learn's handwritten digits with the eight most similar ones. Every worker holds the
full graph, as buffers of the network, and its own shard of the labelled nodes; input features and classes are not
split. Needs `pip install torch-geometric scikit-learn`.

Reference: Wolfe et al., arXiv 2102.10424 (GIST: independent subnets of graph networks).
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch_geometric.nn import GCNConv

import ist


class NodeClassifier(nn.Module):
    """Two graph convolutions over a fixed graph; node numbers, shape (batch,), to scores, (batch, classes)."""

    def __init__(self, features: Tensor, edges: Tensor, hidden: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("edges", edges, persistent=False)
        self.first, self.second = GCNConv(features.shape[1], hidden), GCNConv(hidden, classes)

    def forward(self, nodes: Tensor) -> Tensor:
        """Return the scores of some nodes, which depend on their neighbors' neighbors."""
        hidden = self.first(self.features, self.edges).relu()
        scores: Tensor = self.second(hidden, self.edges)
        return scores[nodes]


def digits_graph(neighbors: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Return features (1797, 64), edges (2, E) in both directions, and classes (1797,)."""
    data = load_digits()
    features = torch.from_numpy(data.data).float() / 16
    nearest = torch.cdist(features, features).topk(neighbors + 1, largest=False).indices[:, 1:]
    targets = torch.arange(len(features)).repeat_interleave(neighbors)
    one_way = torch.stack([nearest.flatten(), targets])
    edges = torch.unique(torch.cat([one_way, one_way.flip(0)], dim=1), dim=1)
    return features, edges, torch.from_numpy(data.target).long()


def main() -> None:
    """Train, and print the accuracy."""
    torch.manual_seed(0)
    features, edges, classes = digits_graph()
    nodes = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    train, test = nodes[:300], nodes[300:]
    model = NodeClassifier(features, edges, hidden=128, classes=10)
    result = ist.train(
        model, TensorDataset(train, classes[train]), test_data=TensorDataset(test, classes[test]), workers=4,
        local_steps=5, rounds=30, batch_size=75, optimizer=ist.Optimizer(name="Adam", args={"lr": 0.01}),
        evaluate=ist.Evaluate(batch_size=1497),
    )  # fmt: skip
    if result.is_coordinator:
        last = result.history[-1]
        print(f"accuracy {last['accuracy']:.1%} with 300 labels after {last['sent_bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
