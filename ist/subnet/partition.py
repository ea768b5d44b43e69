"""Assign the neurons of each group to the workers of a round.

The assignment is a pure function of (groups, number of workers, seed, round, strategy). So every process computes it,
and no list of neurons crosses the network.
Where it sits: `ist/config/partition.py` holds the keys (`Partition`); `ist/subnet/assignments.py` calls `assign` for
the rounds of a run; `ist/subnet/cut.py` translates neurons into positions of tensors.
Not here: tensors. Only the name and the size of a group matter: with strategy 'blocks' its "neurons" are residual
blocks.

`disjoint` is the IST algorithm and the default. `categorical` and `bernoulli` are the masks of the theory. `rolling`,
`nested` and `blocks` come from other papers; with them a neuron may have several holders.

Reference: Yuan et al., arXiv 1910.02120, section 3: a random partition without replacement, drawn again in each round
and independently for each hidden layer.

Shape letters: K neurons in a group, n workers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ist.config.partition import Partition
from ist.errors import ModelError
from ist.neurons.group import Group
from ist.rng import Indices, Purpose, permutation, uniform

Assignment = tuple[tuple[Indices, ...], ...]
"""assignment[worker][group]: the sorted neuron numbers that the worker holds, int64."""

DISJOINT = Partition()
"""The default: every neuron has one owner, in equal shares."""

MAX_DRAWS = 1000
"""How many times a group is drawn at most, until every worker holds at least one of its neurons."""


def is_disjoint(partition: Partition) -> bool:
    """Return whether no neuron ever has two holders."""
    return partition.strategy in ("disjoint", "categorical") and partition.keep is None


def at_stage(partition: Partition, keep: float | None) -> Partition:
    """Return the partition of a stage of the run.

    Args:
        partition: How neurons are assigned where no stage changes it.
        keep: The stage's keep fraction: the part of every group that a worker holds; None: unchanged.
    """
    if keep is None:
        return partition
    # With a keep fraction of 1 every worker holds the full network, whatever the capacities.
    return partition.model_copy(update={"keep": keep} | ({"capacities": None} if keep == 1 else {}))


def is_full_width(partition: Partition) -> bool:
    """Return whether every worker holds the full network, as in a warm-up or a full-width phase."""
    is_full = partition.keep == 1 and len(set(partition.capacities or [1.0])) == 1
    return is_full and partition.strategy != "bernoulli"  # it draws as in every round, with probability 1


def sizes_vary(partition: Partition) -> bool:
    """Return whether the size of a worker's share of a group may change from round to round."""
    return partition.strategy in ("categorical", "bernoulli") or partition.coverage == "balanced"


def check_workers(
    groups: Sequence[Group], num_workers: int, partition: Partition = DISJOINT, causes: Sequence[str] = ()
) -> None:
    """Check that every worker can hold at least one neuron of every group.

    Args:
        groups: The groups that are split.
        num_workers: Workers of a round.
        partition: How neurons are assigned.
        causes: Which operators prevent neurons from being split, for the message.

    Raises:
        ModelError: There is more than one worker but no group; or a group has fewer neurons than there are workers,
            and no neuron may have two holders.
    """
    if num_workers > 1 and not groups:
        raise ModelError(
            "the network has no hidden neurons to split among workers: use train.workers 1. Inputs, outputs and "
            f"neurons that an operator mixes are not split (docs/groups.md){_causes(causes)}"
        )
    for group in groups:
        if is_disjoint(partition) and group.size < num_workers:
            raise ModelError(
                f"group '{group.name}' has {group.size} neurons, fewer than the {num_workers} workers "
                f"(train.workers): widen it, use at most {group.size} workers, or share it (partition.exclude)"
            )


def _causes(causes: Sequence[str]) -> str:
    """Return the end of a message: which operators prevent a split, and where."""
    further = f"; and {len(causes) - 6} more" if len(causes) > 6 else ""
    return f". Not split because of: {'; '.join(causes[:6])}{further}" if causes else ""


def share_sizes(size: int, num_workers: int, capacities: Sequence[float] | None = None) -> list[int]:
    """Return how many of `size` neurons each worker gets in fixed, disjoint shares.

    Args:
        size: Number of neurons.
        num_workers: Number of workers, at least 1.
        capacities: One positive number for each worker; None: equal.

    Returns:
        Sizes that add up to `size` and are proportional to the capacities, rounded by largest remainder; among equal
        remainders the first worker comes first. If there are enough neurons, every worker gets at least one. With
        equal capacities the sizes differ by at most one, and the first workers get the larger ones.
    """
    if capacities is None:
        return [len(range(worker, size, num_workers)) for worker in range(num_workers)]
    weights = [capacity / max(capacities) for capacity in capacities]
    quotas = [size * weight / math.fsum(weights) for weight in weights]
    sizes = [max(1, math.floor(quota)) for quota in quotas]
    while sum(sizes) < size:
        sizes[max(range(num_workers), key=lambda worker: quotas[worker] - sizes[worker])] += 1
    while sum(sizes) > size:
        least = 1 if size >= num_workers else 0
        givers = [worker for worker in range(num_workers) if sizes[worker] > least]
        sizes[max(givers, key=lambda worker: sizes[worker] - quotas[worker])] -= 1
    return sizes


def assign(
    groups: Sequence[Group], num_workers: int, seed: int, round_number: int, partition: Partition = DISJOINT
) -> Assignment:
    """Assign every group's neurons to the workers.

    Every worker holds at least one neuron of every group. Strategies 'categorical' and 'bernoulli' draw a group again
    until this is true, so their distribution is the published one conditioned on it. The difference matters only for
    groups that are not much larger than the number of workers.

    Args:
        groups: The neuron groups of the network; see `check_workers`.
        num_workers: Number of workers, at least 1.
        seed: The run's seed.
        round_number: The round, from 0.
        partition: The strategy and its numbers; `capacities`, if any, one for each worker.

    Returns:
        For each worker, for each group, the sorted numbers of its neurons. If `is_disjoint(partition)`, the shares of
        a group are disjoint and together hold all of its neurons. Unless `sizes_vary(partition)`, a worker's share has
        the same size in every round.

    Raises:
        ModelError: The group is too small: each of `MAX_DRAWS` draws left a worker without a neuron.
    """
    assert partition.capacities is None or len(partition.capacities) == num_workers
    if is_full_width(partition):
        return (tuple(np.arange(group.size) for group in groups),) * num_workers
    split = _STRATEGIES[partition.strategy]
    shares_by_group = [
        split(_GroupInRound(group.name, group.size, num_workers, partition, seed, round_number, number))
        for number, group in enumerate(groups)
    ]
    return tuple(tuple(_sorted(shares[worker]) for shares in shares_by_group) for worker in range(num_workers))


def coverage(
    groups: Sequence[Group], num_workers: int, seed: int, partitions: Sequence[Partition]
) -> tuple[Indices, ...]:
    """Return how often each neuron is held, which shows neurons that are trained more often than others, or never.

    Args:
        groups: The neuron groups of the network.
        num_workers: Number of workers, at least 1.
        seed: The run's seed.
        partitions: The strategy and its numbers for each round to count, from round 0.

    Returns:
        For each group an int64 array of shape (K,): in how many pairs (worker, round) the neuron is held.
    """
    times_held = tuple(np.zeros(group.size, np.int64) for group in groups)
    for round_number, partition in enumerate(partitions):
        for share in assign(groups, num_workers, seed, round_number, partition):
            for counts, neurons in zip(times_held, share, strict=True):
                counts[neurons] += 1
    return times_held


@dataclass(frozen=True)
class _GroupInRound:
    """A group whose neurons are assigned in a round.

    Attributes:
        name: The group's name.
        size: How many neurons it has.
        num_workers: Workers of the round.
        partition: The strategy and its numbers.
        seed: The run's seed.
        round_number: The round, from 0.
        number: The group's index among the groups.
    """

    name: str
    size: int
    num_workers: int
    partition: Partition
    seed: int
    round_number: int
    number: int


def _disjoint(group: _GroupInRound) -> list[Indices]:
    """Assign neurons in random order, in turn, to the workers whose share is not full; with `keep`, enlarge shares.

    Reference: enlarging shares after every neuron has a holder: TwIST, arXiv 2511.03983.
    """
    if group.partition.coverage == "balanced":
        shares = _balanced(group)
    else:
        order = permutation(group.size, group.seed, Purpose.PARTITION, group.round_number, group.number)
        shares = _shares(group, order)
    if group.partition.keep is None:
        return shares
    return [_filled_up(group, worker, share) for worker, share in enumerate(shares)]


def _shares(group: _GroupInRound, order: Indices) -> list[Indices]:
    sizes = share_sizes(group.size, group.num_workers, group.partition.capacities)
    turns = np.concatenate([np.arange(size) for size in sizes])
    owners = np.repeat(np.arange(group.num_workers), sizes)[np.argsort(turns, kind="stable")]
    return [order[owners == worker] for worker in range(group.num_workers)]


def _balanced(group: _GroupInRound) -> list[Indices]:
    """Draw shares once for n rounds; in each round the shares of group g move by g workers.

    So a worker's shares of two neighboring groups form a different pair in each of the n rounds, and every pair occurs
    once. Each entry of the matrix between the groups is trained exactly once in n rounds, not once on average.
    """
    cycle, turn = divmod(group.round_number, group.num_workers)
    shares = _shares(group, permutation(group.size, group.seed, Purpose.PARTITION, cycle, group.number))
    return [shares[(worker + turn * group.number) % group.num_workers] for worker in range(group.num_workers)]


def _filled_up(group: _GroupInRound, worker: int, share: Indices) -> Indices:
    """Enlarge a share to the keep fraction of the group with other neurons, drawn at random."""
    more = _counts(group)[worker] - len(share)
    if more <= 0:
        return share
    order = permutation(group.size, group.seed, Purpose.PARTITION, group.round_number, group.number, worker)
    others = order[~np.isin(order, share)]
    return np.concatenate([share, others[:more]])


def _categorical(group: _GroupInRound) -> list[Indices]:
    """Draw one worker for each neuron, independently.

    Reference: Liao & Kyrillidis, arXiv 2112.02668, categorical masks.
    """
    # A running sum adds in the same order on every machine, so all machines draw the same owners.
    ends = np.cumsum(_fractions(group.num_workers, group.partition))
    workers = np.arange(group.num_workers)

    def draw(numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
        owners = np.searchsorted(ends[:-1], numbers * ends[-1], side="right")
        mask: NDArray[np.bool_] = np.equal.outer(workers, owners)
        return mask

    return _drawn(group, group.size, draw)


def _bernoulli(group: _GroupInRound) -> list[Indices]:
    """Draw for each worker and neuron, independently, whether the worker holds the neuron.

    Reference: Liao & Kyrillidis, arXiv 2112.02668, Bernoulli masks.
    """
    chances = np.array(_fractions(group.num_workers, group.partition))[:, None]

    def draw(numbers: NDArray[np.float64]) -> NDArray[np.bool_]:
        return numbers.reshape(group.num_workers, group.size) < chances

    return _drawn(group, group.num_workers * group.size, draw)


def _drawn(group: _GroupInRound, count: int, draw: Callable[[NDArray[np.float64]], NDArray[np.bool_]]) -> list[Indices]:
    """Draw masks of shape (n, K) from `count` uniform numbers until every worker holds a neuron."""
    for attempt in range(MAX_DRAWS):
        mask = draw(uniform(count, group.seed, Purpose.PARTITION, group.round_number, group.number, attempt))
        if mask.any(axis=1).all():
            return [np.flatnonzero(row) for row in mask]
    keys = {"keep": group.partition.keep, "capacities": group.partition.capacities}
    given = "".join(f", 'partition.{key}' {value}" for key, value in keys.items() if value is not None)
    remedy = "raise 'partition.keep', " if group.partition.keep is not None else ""
    raise ModelError(
        f"group '{group.name}' with {group.size} neurons is too small for {group.num_workers} workers (train.workers) "
        f"and strategy '{group.partition.strategy}'{given}: each of {MAX_DRAWS} draws left a worker without a neuron. "
        f"{remedy}widen the group, use fewer workers, or name it in 'partition.exclude'"
    )


def _rolling(group: _GroupInRound) -> list[Indices]:
    """Give every worker a window that starts one neuron later in each round; only its length depends on the worker.

    Reference: Alam et al. (FedRolex), arXiv 2212.01548.
    """
    return [(group.round_number + np.arange(count)) % group.size for count in _counts(group)]


def _nested(group: _GroupInRound) -> list[Indices]:
    """Give every worker the first neurons of the group, in every round.

    Reference: Diao et al. (HeteroFL), arXiv 2010.01264; Horvath et al. (FjORD), arXiv 2102.13451.
    """
    return [np.arange(count) for count in _counts(group)]


def _blocks(group: _GroupInRound) -> list[Indices]:
    """Give each worker in turn the blocks that have the fewest holders so far; ties are drawn at random.

    So the numbers of holders never differ by more than one, and in the end every block has a holder.

    Reference: Dun et al. (ResIST), arXiv 2107.00961.
    """
    count = max(math.ceil(group.size / group.num_workers), min(group.partition.min_depth, group.size))
    holders = np.zeros(group.size, np.int64)
    shares = []
    for worker in range(group.num_workers):
        order = permutation(group.size, group.seed, Purpose.PARTITION, group.round_number, group.number, worker)
        share = order[np.argsort(holders[order], kind="stable")][:count]
        holders[share] += 1
        shares.append(share)
    return shares


_STRATEGIES: dict[str, Callable[[_GroupInRound], list[Indices]]] = {
    "disjoint": _disjoint,
    "categorical": _categorical,
    "bernoulli": _bernoulli,
    "rolling": _rolling,
    "nested": _nested,
    "blocks": _blocks,
}


def _fractions(num_workers: int, partition: Partition) -> list[float]:
    """Return each worker's part of a group: `keep` for the largest capacity, proportionally less for others."""
    keep = partition.keep or (1 / num_workers if partition.strategy == "rolling" else 1.0)
    capacities = partition.capacities or [1.0] * num_workers
    return [keep * (capacity / max(capacities)) for capacity in capacities]


def _counts(group: _GroupInRound) -> list[int]:
    # Round down, but not because of a rounding error of the product: 0.29 of 100 neurons are 29.
    fractions = _fractions(group.num_workers, group.partition)
    return [max(1, math.floor(fraction * group.size + 1e-9)) for fraction in fractions]


def _sorted(neurons: Indices) -> Indices:
    # With ascending neurons, cutting a tensor reads memory in order.
    return np.sort(neurons)
