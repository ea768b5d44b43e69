"""Data sets of graphs: batches of several graphs, Cora's parts, and clusters of WordNet."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ist.data.batches import fetch, take_shard
from ist.data.graphs.cora import ARRAYS, cora
from ist.data.graphs.graph import IGNORED, Graph, GraphDataset, undirected
from ist.data.graphs.sparse import SparseRows
from ist.data.wordnet.graph import cut, wordnet_graph
from ist.data.wordnet.nouns import read_nouns
from ist.errors import DataError
from tests.conftest import ROOT
from tests.data.test_wordnet import installed, write_chain

CORA = ROOT.parent / "shared" / "data" / "cora.npz"


def random_graph(nodes: int, seed: int) -> Graph:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(nodes, (2, 3 * nodes), generator=generator)
    return Graph(torch.rand(nodes, 4, generator=generator), edges, torch.randint(5, (nodes,), generator=generator))


def neighbor_sums(features: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(features).index_add_(0, edge_index[1], features[edge_index[0]])


def test_a_batch_of_graphs_is_one_graph_with_unconnected_parts() -> None:
    graphs = [random_graph(nodes, nodes) for nodes in (3, 1, 5)]
    dataset = GraphDataset(graphs)

    (features, edges), targets = dataset.batch(np.array([2, 0]))

    assert torch.equal(features, torch.cat([graphs[2].features, graphs[0].features]))
    assert torch.equal(targets, torch.cat([graphs[2].targets, graphs[0].targets]))
    apart = [neighbor_sums(*dataset[index][0]) for index in (2, 0)]
    assert torch.equal(neighbor_sums(features, edges), torch.cat(apart))


def test_a_part_of_the_graphs_gives_the_same_batches_as_the_full_data_set() -> None:
    dataset = GraphDataset([random_graph(nodes, nodes) for nodes in range(2, 8)])
    owned = np.array([1, 2, 5])
    cpu = torch.device("cpu")

    (features, edges), targets = fetch(take_shard(dataset, owned), np.array([2, 0]), cpu)

    (whole_features, whole_edges), whole_targets = fetch(dataset, owned[[2, 0]], cpu)
    assert torch.equal(features, whole_features)
    assert torch.equal(edges, whole_edges)
    assert torch.equal(targets, whole_targets)


def test_sparse_features_are_dense_in_a_batch() -> None:
    rows = SparseRows(np.array([0, 1, 1]), np.array([2], dtype=np.int32), np.array([0.5], dtype=np.float32), 3)
    graph = Graph(rows, torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 1]))

    (features, _), _ = GraphDataset([graph, graph]).batch(np.array([0, 1]))

    assert features.tolist() == [[0, 0, 0.5], [0, 0, 0]] * 2


def test_undirected_edges_appear_once_in_each_direction() -> None:
    edges = undirected(np.array([[0, 1, 2, 1, 0], [1, 0, 2, 2, 1]]), 3)

    assert edges.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    with pytest.raises(DataError, match="0 to 3"):
        undirected(np.array([[0], [3]]), 3)


def write_cora(path: Path, **changes: np.ndarray) -> Path:
    """Write a graph of ten nodes in two classes, each with two of six features."""
    arrays = {
        "indptr": np.arange(0, 22, 2, dtype=np.int32),
        "indices": np.arange(20, dtype=np.int32) % 6,
        "shape": np.array([10, 6]),
        "edges": np.array([[0, 1, 2], [1, 2, 9]]),
        "labels": np.arange(10) % 2,
        "train": np.array([0, 1, 2, 3]),
        "val": np.array([4, 5]),
        "test": np.array([7, 8, 9]),
    }
    np.savez(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})
    return path


def labeled(targets: torch.Tensor) -> list[int]:
    return (targets != IGNORED).nonzero().flatten().tolist()


def test_coras_parts_share_the_graph_and_divide_the_training_nodes_by_class(tmp_path: Path) -> None:
    splits = cora(write_cora(tmp_path / "cora.npz"), parts=2)

    assert [labeled(graph.targets) for graph in splits.train.graphs] == [[0, 1], [2, 3]]
    first, second = splits.train.graphs
    assert first.features is second.features is splits.test.graphs[0].features
    (features, edges), targets = splits.test[0]
    torch.testing.assert_close(features.sum(dim=1), torch.ones(10))
    assert edges.tolist() == [[0, 1, 1, 2, 2, 9], [1, 0, 2, 1, 9, 2]]
    assert labeled(targets) == [7, 8, 9]
    assert targets[7:].tolist() == [1, 0, 1]
    assert labeled(cora(tmp_path, parts=2, validation=True).test.graphs[0].targets) == [4, 5]


def test_missing_or_wrong_parts_of_cora_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Planetoid"):
        cora()
    with pytest.raises(DataError, match=r"cora\.npz: .*Planetoid"):
        cora(tmp_path)
    with pytest.raises(DataError, match=f"labels.*{', '.join(ARRAYS)}"):
        cora(write_cora(tmp_path / "other.npz", labels=None))
    with pytest.raises(DataError, match=r"other\.npz.*\b10\b.*\b3\b"):
        cora(write_cora(tmp_path / "other.npz", labels=np.arange(3)))
    with pytest.raises(ValueError, match=r"parts\b.*\b5\b.*1 to 4"):
        cora(write_cora(tmp_path / "cora.npz"), parts=5)


@pytest.mark.skipif(not CORA.exists(), reason=f"{CORA} does not exist")
def test_coras_file_has_the_published_sizes() -> None:
    splits = cora(CORA, parts=4)

    (features, edges), targets = splits.test[0]
    assert (features.shape, edges.shape) == ((2708, 1433), (2, 10556))
    assert len(labeled(targets)) == 1000
    trained = [graph.targets[graph.targets != IGNORED] for graph in splits.train.graphs]
    assert all(torch.equal(targets.bincount(), torch.full((7,), 5)) for targets in trained)


def test_the_clusters_of_wordnet_cover_its_graph(tmp_path: Path) -> None:
    splits = wordnet_graph(write_chain(tmp_path, 100), clusters=5, num_features=8, train_fraction=0.5)

    sizes = [len(graph.targets) for graph in splits.train.graphs]
    assert sum(sizes) == 100
    assert max(sizes) <= 22
    (features, edges), tested = splits.test[0]
    assert features.shape == (100, 8)
    assert edges.shape == (2, 198)
    assert len(labeled(tested)) == 20
    (joined_features, joined_edges), trained = splits.train.batch(np.arange(5))
    assert len(labeled(trained)) == 50
    assert 180 <= joined_edges.shape[1] <= 198  # a chain is cut in four places
    torch.testing.assert_close(joined_features.sum(), features.sum())


def test_training_validation_and_test_nodes_are_disjoint(tmp_path: Path) -> None:
    path = write_chain(tmp_path, 100)
    one = wordnet_graph(path, clusters=1, train_fraction=0.6)
    tuning = wordnet_graph(path, clusters=1, train_fraction=0.6, validation=True)

    parts = [labeled(graph.targets) for graph in (one.train.graphs[0], one.test.graphs[0], tuning.test.graphs[0])]

    assert sorted(node for part in parts for node in part) == list(range(100))
    assert labeled(tuning.train.graphs[0].targets) == parts[0]
    assert labeled(wordnet_graph(path, clusters=1, train_fraction=0.6, seed=1).test.graphs[0].targets) != parts[1]


def test_a_cluster_without_a_training_node_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fewer clusters\b.*\b50\b"):
        wordnet_graph(write_chain(tmp_path, 100), clusters=50, train_fraction=0.1)
    with pytest.raises(ValueError, match=r"train_fraction\b.*\b0\.7\b.*0\.6"):
        wordnet_graph(write_chain(tmp_path, 100), train_fraction=0.7)


@installed
def test_the_clusters_of_debians_wordnet_contain_most_edges() -> None:
    nouns = read_nouns()
    edges = undirected(nouns.edges, len(nouns.classes))

    clusters = cut(nouns, edges, 64)

    assert edges.shape == (2, 2 * 115_310)
    sizes = np.bincount(clusters, minlength=64)
    assert sizes.min() > 0.5 * 82_115 / 64
    assert sizes.max() <= 1.1 * 82_115 / 64
    assert (clusters[edges[0]] == clusters[edges[1]]).mean() > 0.8
