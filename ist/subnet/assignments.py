"""Who holds which neurons in each round of a run, for the workers that are there.

Where it sits: between the run's values and `ist/subnet/partition.py`, which assigns neurons for one round. The
coordinator and every worker ask it with the same arguments and get the same answer, so no assignment ever travels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ist.config.partition import Partition
from ist.optimization.schedule import Schedule
from ist.rng import Indices
from ist.subnet.cut import Cut
from ist.subnet.partition import Assignment, assign, at_stage, holds_everything, is_disjoint
from ist.subnet.split_model import SplitModel


@dataclass(frozen=True)
class Team:
    """The workers of a round.

    Attributes:
        num_workers: How many they are.
        capacities: One positive number for each, to which its share is proportional; None: as configured.
    """

    num_workers: int
    capacities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class WorkerSlot:
    """A worker's place in a round: with seed and round, all that its share of network and data depends on.

    Attributes:
        worker: Which worker it is in this round, from 0.
        team: Those of the round.
    """

    worker: int
    team: Team


class Assignments:
    """The neurons of every worker in every round; a pure function with a small cache.

    Args:
        split: The network.
        schedule: The rounds, and the seed.
        partition: How neurons are assigned where a stage does not say otherwise.
    """

    def __init__(self, split: SplitModel, schedule: Schedule, partition: Partition) -> None:
        self._split = split
        self._schedule = schedule
        self._partition = partition
        self._team = Team(schedule.sampler.num_workers)
        self._known: dict[tuple[int, Team], Assignment] = {}

    def partition(self, round_number: int, team: Team | None = None) -> Partition:
        """Return how neurons are assigned in a round; `team` as in `of`."""
        partition = self._partition
        if team is not None and team.capacities:
            partition = partition.model_copy(update={"capacities": list(team.capacities)})
        return at_stage(partition, self._schedule.stage(round_number).keep)

    def of(self, round_number: int, team: Team | None = None) -> Assignment:
        """Return the neurons that each worker holds in a round, by group.

        Args:
            round_number: The round, from 0.
            team: The workers of the round; None: as many as configured.
        """
        key = (round_number, team or self._team)
        if key not in self._known:
            while len(self._known) > 1:  # all workers of a process ask for the same round, and for the next one
                self._known.pop(next(iter(self._known)))
            self._known[key] = assign(
                self._split.groups,
                key[1].num_workers,
                self._schedule.sampler.seed,
                round_number,
                self.partition(round_number, team),
            )
        return self._known[key]

    def cuts(self, round_number: int, team: Team | None = None) -> list[Cut]:
        """Return every worker's positions in every tensor that travels both ways; arguments as in `of`."""
        return [self._split.cut(neurons) for neurons in self.of(round_number, team)]

    def exclusive(self, round_number: int) -> frozenset[str]:
        """Return the tensors of which no entry has two holders in a round."""
        return self._split.exclusive if is_disjoint(self.partition(round_number)) else frozenset()

    def block_scales(self, team: Team | None = None) -> dict[str, float]:
        """Return, for each residual block that is assigned as a neuron, the part of all blocks that a worker holds.

        The full network is used with these scales (`ist/subnet/residual_blocks.py`).
        """
        groups = self._split.groups
        if not any(group.modules for group in groups):
            return {}
        team = team or self._team
        partition = self._partition
        if team.capacities:
            partition = partition.model_copy(update={"capacities": list(team.capacities)})
        shares: Sequence[Indices] = assign(groups, team.num_workers, self._schedule.sampler.seed, 0, partition)[0]
        return {
            path: len(held) / group.size for group, held in zip(groups, shares, strict=True) for path in group.modules
        }

    def training_block_scales(self, round_number: int, team: Team | None = None) -> dict[str, float]:
        """Return by what a worker scales residual blocks in a round: nothing, unless it trains all of them."""
        return self.block_scales(team) if holds_everything(self.partition(round_number, team)) else {}
