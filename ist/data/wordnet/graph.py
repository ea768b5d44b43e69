"""WordNet's nouns as a graph: 82,115 synsets with glosses, 115,310 edges, 26 classes.

The class of a synset is its lexicographer file (noun.animal, noun.food, ...), which is mostly that of its neighbors:
propagating the known labels along the edges, without any features, beats a network on the glosses. So the accuracy
here says nothing about graph networks in general; the data set serves to compare ways to train the same network.

For training, the graph is cut into clusters, and the edges between them are dropped (W.-L. Chiang et al.,
"Cluster-GCN", arXiv 1905.07953). The test uses the full graph.

Where it sits: the loader `wordnet_graph` of `ist/data/registry.py`.
Not here: reading the file (`nouns.py`), features (`tfidf.py`).
"""

from pathlib import Path

import numpy as np
import torch

from ist.data.graphs.graph import Graph, GraphDataset, only, undirected
from ist.data.registry import Splits
from ist.data.wordnet.nouns import Nouns, read_nouns
from ist.data.wordnet.tfidf import STOP_WORDS, tfidf
from ist.errors import DataError
from ist.rng import Indices, Purpose, permutation

HELD_OUT = 0.2
"""The fraction of the nodes for testing, and the same fraction for validation."""

_SWEEPS, _SLACK = 3, 1.1


def wordnet_graph(
    root: Path | None = None,
    clusters: int = 64,
    num_features: int = 512,
    train_fraction: float = 0.1,
    validation: bool = False,
    seed: int = 0,
) -> Splits:
    """Load the graph of the nouns, with the TF-IDF of the most frequent words of their glosses as features.

    Args:
        root: WordNet's `data.noun` or its folder; None: the folder of Debian's package.
        clusters: The number of training items: clusters of about equal size.
        num_features: The number of words; stop words do not count.
        train_fraction: The fraction of the nodes whose class is known in training; in (0, 0.6].
        validation: Test on the validation nodes instead of the test nodes: for tuning.
        seed: Determines the split of the nodes.

    Returns:
        Train: `clusters` graphs; test: one graph with all nodes and edges. Features are float32 (nodes, num_features)
        with rows of norm 1 or 0, targets int64 in 0..25, or -100 for nodes of another part.

    Raises:
        DataError: The file is missing or malformed, or a cluster has no training node.
        ValueError: An argument is out of range.
    """
    nouns = read_nouns(root)
    nodes = len(nouns.classes)
    if not 1 <= clusters <= nodes:
        raise ValueError(f"clusters is {clusters}: expected 1 to {nodes}, the number of nodes")
    if not 0 < train_fraction <= 1 - 2 * HELD_OUT:
        raise ValueError(f"train_fraction is {train_fraction}: expected a number in (0, {1 - 2 * HELD_OUT}]")
    if num_features < 1:
        raise ValueError(f"num_features is {num_features}: expected at least 1")
    features, _ = tfidf(nouns.glosses, np.arange(nodes), max_words=num_features, stop_words=STOP_WORDS)
    order = permutation(nodes, seed, Purpose.SHARD, 1)  # independent of the workers' shards, whose key has no 1
    held_out = int(nodes * HELD_OUT)
    training = only(nouns.classes, order[2 * held_out :][: int(nodes * train_fraction)])
    tested = only(nouns.classes, order[held_out : 2 * held_out] if validation else order[:held_out])

    edges = undirected(nouns.edges, nodes)
    cluster_of = cut(nouns, edges, clusters)
    items = []
    for members, inside in _members(cluster_of, edges, clusters):
        targets = training[torch.from_numpy(members)]
        if not bool((targets >= 0).any()):
            raise DataError(
                f"a cluster of {len(members)} nodes has no training node: use fewer clusters than {clusters}"
            )
        items.append(Graph(features.rows(members), torch.from_numpy(inside), targets))
    return Splits(GraphDataset(items), GraphDataset([Graph(features, torch.from_numpy(edges), tested)]))


def cut(nouns: Nouns, edges: Indices, clusters: int) -> Indices:
    """Cut the graph into clusters of about equal size, with most edges inside clusters.

    The nodes, in the order of a walk down the hypernyms, are cut into equal runs. Then each node moves to the cluster
    of most of its neighbors, as long as no cluster grows to more than 1.1 times the mean size.

    Args:
        nouns: The synsets.
        edges: int64, shape (2, 2 x edges): both directions.
        clusters: The number of clusters.

    Returns:
        int64, shape (nodes,): the cluster of each node; no cluster is empty.
    """
    nodes = len(nouns.classes)
    cluster_of = np.empty(nodes, dtype=np.int64)
    cluster_of[_walk(nouns)] = np.arange(nodes) * clusters // nodes
    most = int(_SLACK * nodes / clusters)
    sizes = np.bincount(cluster_of, minlength=clusters)
    for _ in range(_SWEEPS):
        neighbors = np.bincount(edges[0] * clusters + cluster_of[edges[1]], minlength=nodes * clusters)
        neighbors = neighbors.reshape(nodes, clusters)
        best = neighbors.argmax(axis=1)
        gains = neighbors[np.arange(nodes), best] - neighbors[np.arange(nodes), cluster_of]
        movers = np.flatnonzero(gains > 0)
        for node in movers[np.argsort(-gains[movers], kind="stable")].tolist():
            here, there = cluster_of[node], best[node]
            if sizes[there] < most and sizes[here] > 1:
                sizes[here] -= 1
                sizes[there] += 1
                cluster_of[node] = there
    return cluster_of


def _walk(nouns: Nouns) -> Indices:
    """Return all synsets in preorder of the first hypernyms; siblings with more descendants come first."""
    nodes = len(nouns.classes)
    parents = np.full(nodes, -1, dtype=np.int64)
    children, firsts = np.unique(nouns.hypernyms[0], return_index=True)
    parents[children] = nouns.hypernyms[1][firsts]
    below: list[list[int]] = [[] for _ in range(nodes)]
    for child, parent in enumerate(parents.tolist()):
        if parent >= 0:
            below[parent].append(child)
    roots = np.flatnonzero(parents < 0).tolist()
    order = _preorder(below, roots)
    sizes = [1] * nodes
    for node in reversed(order):
        if parents[node] >= 0:
            sizes[parents[node]] += sizes[node]
    for siblings in below:
        siblings.sort(key=lambda node: sizes[node])
    return np.array(_preorder(below, roots), dtype=np.int64)


def _preorder(below: list[list[int]], roots: list[int]) -> list[int]:
    order, stack = [], roots[::-1]
    while stack:
        node = stack.pop()
        order.append(node)
        stack += below[node]
    return order


def _members(cluster_of: Indices, edges: Indices, clusters: int) -> list[tuple[Indices, Indices]]:
    """Return for each cluster its nodes, sorted, and its inner edges between numbers of nodes within the cluster."""
    position = np.empty(len(cluster_of), dtype=np.int64)
    by_cluster = np.argsort(cluster_of, kind="stable")
    bounds = np.searchsorted(cluster_of[by_cluster], np.arange(clusters + 1))
    position[by_cluster] = np.arange(len(cluster_of)) - bounds[cluster_of[by_cluster]]
    homes = cluster_of[edges[0]]
    inside = np.flatnonzero(homes == cluster_of[edges[1]])
    inside = inside[np.argsort(homes[inside], kind="stable")]
    edge_bounds = np.searchsorted(homes[inside], np.arange(clusters + 1))
    return [
        (
            by_cluster[bounds[cluster] : bounds[cluster + 1]],
            position[edges[:, inside[edge_bounds[cluster] : edge_bounds[cluster + 1]]]],
        )
        for cluster in range(clusters)
    ]
