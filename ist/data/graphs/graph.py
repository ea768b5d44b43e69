"""Data sets whose items are graphs: edges, and nodes with features and a target each.

A batch of several graphs is one graph with unconnected parts.
Where it sits: `cora.py` and `ist/data/wordnet/graph.py` build these data sets.
Not here: the data (`cora.py`, `ist/data/wordnet/graph.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ist.data.batched import IGNORED, BatchedDataset
from ist.data.graphs.sparse import SparseRows
from ist.errors import DataError
from ist.rng import Indices

GraphBatch = tuple[tuple[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Graph:
    """A graph whose nodes are numbered from 0.

    Args:
        features: float32, shape (nodes, features), or sparse rows, which become dense in a batch.
        edge_index: int64, shape (2, edges): from and to; an undirected edge appears in both directions.
        targets: int64, shape (nodes,): the class, or -100 for an ignored node.
    """

    features: Tensor | SparseRows
    edge_index: Tensor
    targets: Tensor


class GraphDataset(BatchedDataset):
    """Graphs; a batch is ((features, edge_index), targets), as one graph."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self.graphs = tuple(graphs)

    def __len__(self) -> int:
        """Return the number of graphs."""
        return len(self.graphs)

    def __getitem__(self, index: int) -> GraphBatch:
        """Return one graph as ((features, edge_index), targets)."""
        return self.batch(np.array([index], dtype=np.int64))

    def batch(self, indices: Indices) -> GraphBatch:
        """Return the graphs at `indices` as one graph with unconnected parts.

        Returns:
            ((features float32 (nodes, features), edge_index int64 (2, edges)), targets int64 (nodes,)).
        """
        graphs = [self.graphs[int(index)] for index in indices]
        features = [_dense(graph.features) for graph in graphs]
        if len(graphs) == 1:
            return (features[0], graphs[0].edge_index), graphs[0].targets
        starts = np.cumsum([0, *(len(graph.targets) for graph in graphs)])
        edges = [graph.edge_index + int(start) for graph, start in zip(graphs, starts, strict=False)]
        return (torch.cat(features), torch.cat(edges, dim=1)), torch.cat([graph.targets for graph in graphs])

    def part(self, indices: Indices) -> "GraphDataset":
        """Return a data set of only the graphs at `indices`."""
        return GraphDataset([self.graphs[int(index)] for index in indices])


def _dense(features: Tensor | SparseRows) -> Tensor:
    return features if isinstance(features, Tensor) else features.dense()


def undirected(edges: Indices, num_nodes: int) -> Indices:
    """Return edges in both directions, sorted, without duplicates and loops.

    Args:
        edges: int64, shape (2, edges).
        num_nodes: The number of nodes.

    Raises:
        DataError: An edge has a node that does not exist.
    """
    if edges.size and not (edges.min() >= 0 and edges.max() < num_nodes):
        raise DataError(f"edges have nodes {edges.min()} to {edges.max()}: expected nodes from 0 to {num_nodes - 1}")
    proper = edges[:, edges[0] != edges[1]]
    both = np.concatenate([proper[0] * num_nodes + proper[1], proper[1] * num_nodes + proper[0]])
    return np.stack(np.divmod(np.unique(both), num_nodes))


def only(targets: Indices, nodes: Indices) -> Tensor:
    """Return int64 targets of all nodes: -100 for nodes that are not in `nodes`."""
    masked = np.full_like(targets, IGNORED)
    masked[nodes] = targets[nodes]
    return torch.from_numpy(masked)
