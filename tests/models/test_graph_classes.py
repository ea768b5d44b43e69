"""Graph networks of PyTorch Geometric: all hidden features are split, as in GIST (arXiv 2102.10424)."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ist
from ist.checks.verify import verify_cuts
from ist.data.batched import BatchedDataset
from ist.rng import Indices
from ist.subnet.job import assignments
from tests.networks import seeded
from tests.neurons.networks import rand
from tests.neurons.test_neurons import job_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the library warns when it is imported
    models: Any = pytest.importorskip("torch_geometric.nn.models", reason="torch_geometric is not installed")

FEATURES, HIDDEN, CLASSES = 12, 8, 5
EXAMPLE = (rand(20, FEATURES), torch.randint(0, 20, (2, 60), generator=torch.Generator().manual_seed(1)))

by_kind = pytest.mark.parametrize("kind", ["GCN", "GraphSAGE"])
by_norm = pytest.mark.parametrize("norm", ["batch_norm", None])


def network(kind: str, norm: str | None, hidden: int = HIDDEN) -> nn.Module:
    return seeded(lambda: getattr(models, kind)(FEATURES, hidden, 3, CLASSES, norm=norm, act="relu", dropout=0.1))


class Clusters(BatchedDataset):
    """Parts of a graph: neighbors have the same class, and features depend on the class."""

    def __init__(self, numbers: Indices | range = range(24)) -> None:
        self.numbers = list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return self.batch(np.array([index]))

    def batch(self, indices: Indices) -> tuple[tuple[Tensor, Tensor], Tensor]:
        features, edges, labels = [], [], []
        for place, index in enumerate(indices):
            generator = torch.Generator().manual_seed(int(self.numbers[int(index)]))
            of_nodes = torch.randint(CLASSES, (10,), generator=generator)
            centers = nn.functional.one_hot(of_nodes, FEATURES)
            features.append(centers + 0.5 * torch.randn(10, FEATURES, generator=generator))
            edges.append((of_nodes[:, None] == of_nodes).nonzero().t() + 10 * place)
            labels.append(of_nodes)
        return (torch.cat(features), torch.cat(edges, dim=1)), torch.cat(labels)

    def part(self, indices: Indices) -> "Clusters":
        return Clusters([self.numbers[int(index)] for index in indices])


@by_kind
@by_norm
def test_only_hidden_features_are_split_not_input_features_or_classes(kind: str, norm: str | None) -> None:
    job = job_of(network(kind, norm), EXAMPLE)

    linear = "lin" if kind == "GCN" else "lin_l"
    assert not job.split.found.unknown
    assert {g.name: g.size for g in job.split.groups} == {f"convs.{layer}.{linear}": HIDDEN for layer in (0, 1)}
    specs = job.split.submodel_plan(assignments(job).of(0)[0]).specs
    shapes = [specs[f"convs.{layer}.{linear}.weight"].shape for layer in range(3)]
    assert shapes == [(HIDDEN // 2, FEATURES), (HIDDEN // 2, HIDDEN // 2), (CLASSES, HIDDEN // 2)]


@by_kind
@by_norm
@pytest.mark.parametrize("workers", [2, 3])
def test_a_subnet_is_the_masked_full_network(kind: str, norm: str | None, workers: int) -> None:
    verify_cuts(job_of(network(kind, norm), EXAMPLE, workers=workers))


@by_kind
@by_norm
def test_split_networks_learn_from_parts_of_a_graph(kind: str, norm: str | None) -> None:
    history = ist.train(
        network(kind, norm, hidden=32), Clusters(), workers=2, local_steps=8, rounds=4, batch_size=4, optimizer="Adam",
        optimizer_args={"lr": 0.03}, progress=False,
    ).history  # fmt: skip

    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
