"""The partition: the law of each strategy, and that every process draws the same."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ist.config.partition import Partition
from ist.errors import ModelError
from ist.neurons.group import Group
from ist.rng import Purpose, permutation, torch_seed, uniform
from ist.subnet.partition import Assignment, assign, check_workers, coverage, is_disjoint, share_sizes, sizes_vary
from tests.conftest import naming

EVERY_STRATEGY: dict[str, Partition] = {
    "disjoint": Partition(),
    "unequal": Partition(capacities=[1, 2, 4]),
    "categorical": Partition(strategy="categorical", capacities=[1, 2, 3]),
    "bernoulli": Partition(strategy="bernoulli", keep=0.5),
    "rolling": Partition(strategy="rolling", keep=0.5, capacities=[1, 2, 4]),
    "nested": Partition(strategy="nested", capacities=[1, 2, 4]),
    "blocks": Partition(strategy="blocks", blocks=["*"], min_depth=5),
}

CAPACITIES = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def plain(assignment: Assignment) -> list[list[list[int]]]:
    return [[part.tolist() for part in share] for share in assignment]


def held(partition: Partition, size: int, workers: int, rounds: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return a mask of shape (rounds, workers, size): who holds which neuron in each round."""
    masks = np.zeros((rounds, workers, size), bool)
    for number in range(rounds):
        for worker, (neurons,) in enumerate(assign([Group("a", size, ())], workers, seed, number, partition)):
            masks[number, worker, neurons] = True
    return masks


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 2**31), st.integers(0, 1000), st.data())
def test_every_neuron_has_exactly_one_owner(sizes: list[int], seed: int, number: int, draw: st.DataObject) -> None:
    workers = draw.draw(st.integers(1, min(sizes)))
    groups = [Group(str(number), size, ()) for number, size in enumerate(sizes)]

    shares = assign(groups, workers, seed, number)

    for index, size in enumerate(sizes):
        parts = [share[index] for share in shares]
        assert [len(part) for part in parts] == share_sizes(size, workers)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(size))
        assert all((np.diff(part) > 0).all() for part in parts)


def test_rounds_seeds_and_groups_are_drawn_independently() -> None:
    groups = [Group("a", 64, ()), Group("b", 64, ())]

    base = assign(groups, 4, 0, 0)

    assert not np.array_equal(base[0][0], base[0][1])
    assert not np.array_equal(base[0][0], assign(groups, 4, 0, 1)[0][0])
    assert not np.array_equal(base[0][0], assign(groups, 4, 1, 0)[0][0])


def test_two_neurons_are_together_as_often_as_a_random_partition_says() -> None:
    rounds, size, workers = 4000, 8, 2
    together = sum(
        {0, 1} <= set(share[0].tolist())
        for round_number in range(rounds)
        for share in assign([Group("a", size, ())], workers, 0, round_number)
    )

    # Two of eight neurons share a half with probability 3/7; the sample's deviation is 0.008.
    assert abs(together / rounds - 3 / 7) < 0.04


def test_the_random_stream_is_frozen() -> None:
    """Other versions must draw the same: checkpoints and processes on other machines depend on it."""
    assert permutation(8, 1, Purpose.PARTITION, 2, 3).tolist() == [0, 5, 7, 6, 1, 2, 4, 3]
    assert torch_seed(1, Purpose.MODEL) == 616139784949098269
    assert (uniform(3, 1, Purpose.PARTITION, 2) * 2**53).tolist() == [
        1850791762888547,
        724960247177992,
        3230987466512809,
    ]


# The first is the assignment of version 0.1, which had no strategies.
FROZEN = {
    "disjoint": [[[0, 1, 8, 9], [0, 5, 6]], [[2, 3, 5], [2, 3]], [[4, 6, 7], [1, 4]]],
    "unequal": [[[0], [0]], [[3, 6, 9], [3, 5]], [[1, 2, 4, 5, 7, 8], [1, 2, 4, 6]]],
    "categorical": [[[1, 4], [0, 1]], [[0], [2, 6]], [[2, 3, 5, 6, 7, 8, 9], [3, 4, 5]]],
    "bernoulli": [[[0, 1, 4], [0, 1, 2, 6]], [[1, 5, 7, 9], [0, 1, 3, 6]], [[2, 3, 4, 5, 6, 7, 8], [0, 4, 5]]],
    "blocks": [[[0, 1, 2, 4, 5], [0, 1, 2, 3, 6]], [[3, 6, 7, 8, 9], [0, 2, 3, 4, 5]], [[2, 4, 6, 7, 8], [0, 1, 4, 5, 6]]],
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_assignments_are_frozen(name: str) -> None:
    groups = [Group("a", 10, ()), Group("b", 7, ())]

    assert plain(assign(groups, 3, 5, 2, EVERY_STRATEGY[name])) == FROZEN[name]


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_a_partition_is_a_function_of_seed_and_round_and_every_worker_holds_neurons(name: str) -> None:
    groups = [Group("a", 9, ()), Group("b", 30, ())]
    partition = EVERY_STRATEGY[name]

    rounds = [assign(groups, 3, 1, number, partition) for number in range(20)]
    again = [assign(groups, 3, 1, number, partition) for number in reversed(range(20))]

    assert [plain(shares) for shares in rounds] == [plain(shares) for shares in reversed(again)]
    for neurons in (neurons for shares in rounds for share in shares for neurons in share):
        assert len(neurons) >= 1
        assert neurons.dtype == np.int64
        assert (np.diff(neurons) > 0).all()
    if name != "nested":
        assert plain(rounds[0]) != plain(rounds[1])
    if name not in ("nested", "rolling"):
        assert plain(rounds[0]) != plain(assign(groups, 3, 2, 0, partition))


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_is_disjoint_and_sizes_vary_are_true_of_every_strategy(name: str) -> None:
    partition = EVERY_STRATEGY[name]

    masks = held(partition, size=20, workers=3, rounds=30)

    assert is_disjoint(partition) == (masks.sum(axis=1) <= 1).all()
    assert sizes_vary(partition) == (masks.sum(axis=2) != masks[0].sum(axis=1)).any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 99), st.floats(0.01, 100))
def test_equal_capacities_assign_the_same_as_no_capacities(size: int, workers: int, seed: int, capacity: float) -> None:
    workers = min(size, workers)
    groups = [Group("a", size, ())]

    equal = assign(groups, workers, seed, 0, Partition(capacities=[capacity] * workers))

    order = permutation(size, seed, Purpose.PARTITION, 0, 0)
    assert plain(equal) == [[sorted(order[worker::workers].tolist())] for worker in range(workers)]
    assert plain(equal) == plain(assign(groups, workers, seed, 0))


@settings(max_examples=50, deadline=None)
@given(CAPACITIES, st.integers(0, 200), st.integers(0, 99))
def test_shares_are_proportional_to_capacities(capacities: list[float], more: int, seed: int) -> None:
    workers, size = len(capacities), len(capacities) + more

    sizes = share_sizes(size, workers, capacities)

    assert sum(sizes) == size
    assert min(sizes) >= 1
    quotas = [size * capacity / sum(capacities) for capacity in capacities]
    if min(quotas) >= 1:  # no share had to be raised to one neuron
        assert all(abs(found - quota) < 1 for found, quota in zip(sizes, quotas, strict=True))
    masks = held(Partition(capacities=capacities), size, workers, rounds=2, seed=seed)
    assert (masks.sum(axis=1) == 1).all()
    assert (masks.sum(axis=2) == sizes).all()


@pytest.mark.parametrize(
    ("size", "capacities", "sizes"),
    [
        (8, [1, 1, 2], [2, 2, 4]), (10, [1, 1, 1], [4, 3, 3]), (10, [2, 3, 2], [3, 4, 3]),
        (4, [1, 100, 1], [1, 2, 1]), (7, [1e-300, 1e308, 1e308], [1, 3, 3]), (3, [5, 1, 1], [1, 1, 1]),
    ],
)  # fmt: skip
def test_the_largest_remainders_get_the_rest_and_every_worker_gets_a_neuron(
    size: int, capacities: list[float], sizes: list[int]
) -> None:
    assert share_sizes(size, len(capacities), capacities) == sizes


def test_categorical_draws_each_neuron_independently_in_proportion_to_capacity() -> None:
    rounds, size, chances = 1000, 40, np.array([1, 2, 5]) / 8

    masks = held(Partition(strategy="categorical", capacities=[1, 2, 5]), size, 3, rounds)

    assert (masks.sum(axis=1) == 1).all()
    # Five sigma of a frequency, and the effect of the condition: the first worker would hold none of the 40 neurons with
    # probability 0.5 %, so no frequency changes by more than this fraction.
    deviation = np.sqrt(chances * (1 - chances) / rounds)[:, None]
    assert (np.abs(masks.mean(axis=0) - chances[:, None]) < 5 * deviation + 0.005 * chances.max()).all()
    # Independent: the size of the last worker's share has the binomial's variance (five of its own deviations are 0.23).
    assert abs(masks[:, 2].sum(axis=1).var() / (size * chances[2] * (1 - chances[2])) - 1) < 0.23


def test_bernoulli_draws_independently_for_each_worker_and_neuron() -> None:
    rounds, size = 1000, 40
    partition = Partition(strategy="bernoulli", keep=0.6, capacities=[1, 2, 2])

    masks = held(partition, size, 3, rounds)

    chances = np.array([0.3, 0.6, 0.6])[:, None]
    assert (np.abs(masks.mean(axis=0) - chances) < 5 * np.sqrt(chances * (1 - chances) / rounds)).all()
    for left, right, chance in ((0, 1, 0.18), (1, 2, 0.36)):  # two workers draw independently
        both = (masks[:, left] & masks[:, right]).mean()
        assert abs(both - chance) < 5 * np.sqrt(chance * (1 - chance) / (rounds * size))
    sizes = masks[:, 1].sum(axis=1)  # two neurons are drawn independently: binomial variance
    assert abs(sizes.var() / (size * 0.24) - 1) < 0.23


def test_a_draw_that_leaves_a_worker_empty_is_drawn_again() -> None:
    categorical = held(Partition(strategy="categorical"), size=3, workers=3, rounds=120)
    bernoulli = held(Partition(strategy="bernoulli", keep=0.1), size=3, workers=2, rounds=120)

    assert (categorical.sum(axis=2) == 1).all()
    assert len({tuple(mask.argmax(axis=1)) for mask in categorical}) == 6  # every order of three occurs
    assert (bernoulli.sum(axis=2) >= 1).all()
    # The chance of a neuron, given that at least one of three is drawn: 0.1 / (1 - 0.9^3) = 0.369; the mean over 240
    # shares deviates by 0.007.
    assert abs(bernoulli.mean() - 0.369) < 0.035


@pytest.mark.parametrize(
    ("partition", "parts"),
    [
        (
            Partition(strategy="bernoulli", keep=1e-6),
            ["'bernoulli'", "'partition.keep' 1e-06", "1000 draws", "raise 'partition.keep'", "widen the group"],
        ),
        (
            Partition(strategy="categorical", capacities=[1, 1e9]),
            ["'categorical'", "'partition.capacities' [1.0, 1000000000.0]", "'partition.exclude'"],
        ),
    ],
)
def test_a_group_too_small_for_its_strategy_is_refused_by_name(partition: Partition, parts: list[str]) -> None:
    with pytest.raises(ModelError, match=naming("'small'", "3 neurons", "2 workers", "train.workers", *parts)):
        assign([Group("small", 3, ())], 2, 0, 0, partition)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_a_rolling_window_starts_at_the_round_wraps_and_covers_evenly(size: int) -> None:
    masks = held(Partition(strategy="rolling", keep=0.5, capacities=[1, 2]), size, 2, rounds=size)

    counts = [max(1, size // 4), max(1, size // 2)]
    for number, worker in np.ndindex(size, 2):
        window = {(number + step) % size for step in range(counts[worker])}
        assert set(np.flatnonzero(masks[number, worker]).tolist()) == window
    assert (masks.sum(axis=0) == np.array(counts)[:, None]).all()


def test_nested_shares_are_prefixes_by_capacity() -> None:
    groups = [Group("a", 100, ()), Group("b", 3, ())]

    shares = assign(groups, 3, 0, 7, Partition(strategy="nested", keep=0.29, capacities=[2, 1, 2]))

    # 0.29 of 100 are 29, although 0.29 * 100 is less in floating point; every worker holds at least one.
    assert plain(shares) == [[list(range(count)), [0]] for count in (29, 14, 29)]


def test_without_keep_rolling_assigns_equal_parts_and_nested_the_full_group() -> None:
    rolling = assign([Group("a", 49, ())], 49, 0, 0, Partition(strategy="rolling"))
    nested = assign([Group("a", 12, ())], 2, 0, 0, Partition(strategy="nested", capacities=[1, 4]))

    assert plain(rolling) == [[[0]]] * 49
    assert plain(nested) == [[[0, 1, 2]], [list(range(12))]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 40), st.integers(0, 99), st.integers(0, 9))
def test_every_block_has_a_holder_and_every_worker_equally_many_blocks(
    size: int, workers: int, min_depth: int, seed: int, number: int
) -> None:
    partition = Partition(strategy="blocks", blocks=["*"], min_depth=min_depth)

    shares = [share[0] for share in assign([Group("a", size, ())], workers, seed, number, partition)]

    assert {len(set(share.tolist())) for share in shares} == {max(-(-size // workers), min(min_depth, size))}
    holders = np.bincount(np.concatenate(shares), minlength=size)
    assert holders.min() >= 1
    assert holders.max() - holders.min() <= 1


def test_every_worker_holds_every_block_and_every_pair_of_blocks_equally_often() -> None:
    rounds, size, workers = 1000, 6, 3

    masks = held(Partition(strategy="blocks", blocks=["*"], min_depth=3), size, workers, rounds)

    # Each worker holds half of the blocks, and two of six are both in a half with probability 1/5; 5 sigma are 0.079.
    assert (np.abs(masks.mean(axis=0) - 0.5) < 0.079).all()
    assert (np.abs((masks[:, :, 0] & masks[:, :, 1]).mean(axis=0) - 0.2) < 0.079).all()


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_coverage_counts_workers_and_rounds(name: str) -> None:
    groups = [Group("a", 12, ()), Group("b", 20, ())]

    counts = coverage(groups, 3, 4, [EVERY_STRATEGY[name]] * 24)

    assert [count.dtype for count in counts] == [np.int64, np.int64]
    for index, group in enumerate(groups):
        expected = [0] * group.size
        for number in range(24):
            for share in assign(groups, 3, 4, number, EVERY_STRATEGY[name]):
                for neuron in share[index].tolist():
                    expected[neuron] += 1
        assert counts[index].tolist() == expected
    if is_disjoint(EVERY_STRATEGY[name]):
        assert counts[0].tolist() == [24] * 12


def test_fewer_neurons_than_workers_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=naming("'small'", "3 neurons", "4 workers", "train.workers", "at most 3")):
        check_workers([Group("large", 8, ()), Group("small", 3, ())], 4)


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_only_a_disjoint_strategy_needs_a_neuron_for_each_worker(name: str) -> None:
    partition = EVERY_STRATEGY[name]

    if is_disjoint(partition):
        with pytest.raises(ModelError, match=naming("2 neurons", "3 workers", "train.workers")):
            check_workers([Group("small", 2, ())], 3, partition)
    else:
        check_workers([Group("small", 2, ())], 3, partition)
        assert all(len(share[0]) >= 1 for share in assign([Group("small", 2, ())], 3, 0, 0, partition))


@pytest.mark.parametrize("name", EVERY_STRATEGY)
def test_a_network_without_hidden_layers_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=naming("no hidden neurons", "train.workers 1")):
        check_workers([], 2, EVERY_STRATEGY[name])
    check_workers([], 1, EVERY_STRATEGY[name])
