"""Balanced coverage: disjoint shares that meet evenly; and shares that `keep` enlarges until they overlap."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ist.config.partition import Partition
from ist.errors import ConfigError
from ist.neurons.group import Group
from ist.subnet.partition import assign, at_stage, is_disjoint, is_full_width, share_sizes, sizes_vary
from tests.conftest import config_tree, naming, small_config, validate
from tests.subnet.test_partition import held, plain

BALANCED = Partition(coverage="balanced")


def masks(
    groups: list[Group], workers: int, seed: int, number: int, partition: Partition
) -> list[np.ndarray[Any, Any]]:
    """Return for each group a mask of shape (workers, size): who holds which neuron in a round."""
    found = [np.zeros((workers, group.size), bool) for group in groups]
    for worker, share in enumerate(assign(groups, workers, seed, number, partition)):
        for mask, neurons in zip(found, share, strict=True):
            mask[worker, neurons] = True
    return found


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("cycle", [0, 1, 5])
def test_in_a_cycle_every_pair_of_neighboring_neurons_has_one_common_holder_once(workers: int, cycle: int) -> None:
    groups = [Group(str(number), size, ()) for number, size in enumerate([7, 16, 12, 29, 8])]
    rounds = [masks(groups, workers, 3, cycle * workers + turn, BALANCED) for turn in range(workers)]

    for first, second in zip(range(4), range(1, 5), strict=True):
        meetings = sum(np.einsum("wi,wj->ij", found[first].astype(int), found[second].astype(int)) for found in rounds)
        assert (meetings == 1).all()
    for found in rounds:
        assert all((mask.sum(axis=0) == 1).all() for mask in found)
        assert all(mask.any(axis=1).all() for mask in found)


def test_each_cycle_draws_new_shares_from_the_seed_alone() -> None:
    groups = [Group("a", 24, ()), Group("b", 24, ())]
    first = [plain(assign(groups, 3, 1, number, BALANCED)) for number in range(6)]

    assert first == [plain(assign(groups, 3, 1, number, BALANCED)) for number in range(6)]
    assert (
        len({str(sorted(share[1] for share in shares)) for shares in first[:3]}) == 1
    )  # the same shares in the whole cycle
    assert sorted(share[1] for share in first[2]) != sorted(share[1] for share in first[3])
    assert first[0] != plain(assign(groups, 3, 2, 0, BALANCED))


def test_is_disjoint_and_sizes_vary_are_true_of_balanced_and_of_enlarged_shares() -> None:
    assert is_disjoint(BALANCED)
    assert sizes_vary(BALANCED)  # workers take turns to hold the larger shares
    sizes = {len(assign([Group("a", 9, ()), Group("b", 10, ())], 3, 0, number, BALANCED)[0][1]) for number in range(3)}
    assert sizes == {3, 4}
    assert not is_disjoint(Partition(keep=0.5))
    assert not sizes_vary(Partition(keep=0.5))


@pytest.mark.parametrize("partition", [{"capacities": [1, 2, 3, 4]}, {"balance": "speed"}])
def test_balanced_shares_refuse_capacities_by_name(partition: dict[str, Any]) -> None:
    (key,) = partition

    with pytest.raises(ConfigError, match=naming("'coverage' is 'balanced'", f"'{key}'")):
        small_config(partition={"coverage": "balanced", **partition})


# Enlarged shares


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 8), st.floats(0, 1), st.integers(0, 99), st.sampled_from(["random", "balanced"])
)
def test_enlarged_shares_have_their_size_and_every_neuron_has_a_holder(
    size: int, workers: int, part: float, seed: int, coverage: Any
) -> None:
    keep = 1 / workers + part * (1 - 1 / workers)
    partition = Partition(keep=keep, coverage=coverage)

    found = held(partition, size, workers, rounds=3, seed=seed)

    assert found.any(axis=1).all()
    least = sorted(max(own, 1, math.floor(keep * size + 1e-9)) for own in share_sizes(size, workers))
    assert all(sorted(sizes) == least for sizes in found.sum(axis=2).tolist())
    assert (held(partition, size, workers, rounds=3, seed=seed) == found).all()


def test_an_enlarged_share_contains_the_disjoint_share() -> None:
    own, more = held(Partition(), 20, 3, rounds=5), held(Partition(keep=0.6), 20, 3, rounds=5)

    assert (own <= more).all()
    assert (more.sum(axis=2) == 12).all()
    assert (held(Partition(keep=0.6), 20, 3, rounds=5, seed=1) != more).any()
    # The additional neurons are drawn independently for each worker and each round.
    assert (more[0, 0] != more[1, 0]).any()
    assert (more[0].sum(axis=0) < 3).any()


def test_shares_of_workers_with_smaller_capacities_are_enlarged_less() -> None:
    partition = Partition(keep=0.8, capacities=[1, 2, 4])

    found = held(partition, 100, 3, rounds=2)

    assert (found.sum(axis=2) == [20, 40, 80]).all()
    assert found.any(axis=1).all()


@pytest.mark.parametrize("capacities", [None, [1.0, 1.0, 1.0, 2.0]])
def test_shares_of_a_group_with_fewer_neurons_than_workers_can_be_enlarged(capacities: list[float] | None) -> None:
    found = held(Partition(keep=0.5, capacities=capacities), 3, 4, rounds=10)

    assert found.any(axis=1).all()
    assert (found.sum(axis=2) >= 1).all()


def test_a_keep_fraction_that_leaves_neurons_without_a_holder_is_refused_by_its_key() -> None:
    with pytest.raises(
        ConfigError, match=naming("'partition.keep' is 0.2", "'disjoint'", "4 workers", "at least 0.25")
    ):
        small_config(partition__keep=0.2)
    with pytest.raises(ConfigError, match=naming("'partition.keep' is 0.3", "2 workers", "at least 0.5")):
        small_config(partition__keep=0.3, train__workers={"min": 2, "max": 4})

    assert small_config(partition__keep=0.25).partition.keep == 0.25
    third = small_config(partition__keep=1 / 3, train__workers=3)
    assert validate(third.model_dump(), "test") == third
    ddp = config_tree(partition__keep=0.3, train__workers=2, method="ddp", pool={"kind": "torchrun"})
    assert validate(ddp, "test").partition.keep == 0.3  # it assigns no neurons


@pytest.mark.parametrize(
    "partition",
    [
        Partition(), BALANCED, Partition(capacities=[1, 2, 5]), Partition(strategy="categorical", capacities=[1, 2, 5]),
        Partition(strategy="rolling", keep=0.5, capacities=[1, 2, 5]), Partition(strategy="nested", keep=0.5),
        Partition(strategy="bernoulli", keep=0.5, capacities=[1, 2, 5]), Partition(strategy="blocks", blocks=["*"]),
    ],
)  # fmt: skip
def test_a_stage_with_a_keep_fraction_of_one_gives_every_worker_the_full_network(partition: Partition) -> None:
    full = at_stage(partition, 1.0)

    assert held(full, 12, 3, rounds=3).all()
    assert not is_disjoint(full)
    assert is_full_width(full) == (partition.strategy != "bernoulli")
    assert at_stage(partition, None) == partition
    assert not is_full_width(partition)
