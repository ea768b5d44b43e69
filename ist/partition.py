"""Who gets which neurons in a round.

A pure function of (groups, number of workers, seed, round), so that every process computes it
and no list of neurons ever crosses the network.
Not here: tensors.

Reference: Yuan et al., arXiv 1910.02120, section 3: a random partition without replacement,
drawn anew each round and independently for each hidden layer.
"""

from collections.abc import Sequence

from ist.errors import ModelError
from ist.groups import Group
from ist.rng import Indices, Purpose, permutation

Assignment = tuple[tuple[Indices, ...], ...]
"""assignment[worker][group]: the sorted neuron numbers that the worker holds, int64."""


def check_workers(groups: Sequence[Group], num_workers: int) -> None:
    """Check that every worker gets at least one neuron of every group.

    Raises:
        ModelError: A group has fewer neurons than there are workers, or no group exists although
            there is more than one worker.
    """
    if num_workers > 1 and not groups:
        raise ModelError("the network has no hidden neurons to split among workers: use train.workers 1")
    for group in groups:
        if group.size < num_workers:
            raise ModelError(
                f"group '{group.name}' has {group.size} neurons, fewer than the {num_workers} workers "
                f"(train.workers): widen it or use at most {group.size} workers"
            )


def share_sizes(size: int, num_workers: int) -> list[int]:
    """Return how many of `size` neurons each worker gets: equal up to one, the first workers get the extra ones."""
    return [len(range(worker, size, num_workers)) for worker in range(num_workers)]


def assign(groups: Sequence[Group], num_workers: int, seed: int, round_number: int) -> Assignment:
    """Deal every group's neurons to the workers at random, in equal parts, without replacement.

    Args:
        groups: The neuron groups of the network.
        num_workers: Number of workers, at least 1 and at most the size of the smallest group.
        seed: The run's seed.
        round_number: The round, from 0.

    Returns:
        For each worker, for each group, the sorted numbers of its neurons. Over the workers they are
        disjoint and complete. A worker's share has the same size in every round.
    """
    dealt = [
        permutation(group.size, seed, Purpose.PARTITION, round_number, number) for number, group in enumerate(groups)
    ]
    shares = [[_sorted(order[worker::num_workers]) for order in dealt] for worker in range(num_workers)]
    return tuple(tuple(share) for share in shares)


def _sorted(neurons: Indices) -> Indices:
    # Ascending neurons keep memory access in order when a tensor is cut.
    copy = neurons.copy()
    copy.sort()
    return copy
