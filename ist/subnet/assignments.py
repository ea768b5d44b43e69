"""Who holds which neurons in each round of a run, for the workers that take part in it.

Where it sits: between the values of a run (`ist/subnet/job.py`) and `ist/subnet/partition.py`, which assigns neurons
for one round. The coordinator and every worker call it with the same arguments and get the same result, so no
assignment is ever sent.
Not here: how neurons are drawn (`ist/subnet/partition.py`), tensors (`ist/subnet/cut.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ist.config.partition import Partition
from ist.optimization.schedule import Schedule
from ist.rng import Indices
from ist.subnet.cut import Cut
from ist.subnet.partition import Assignment, assign, at_stage, is_disjoint, is_full_width
from ist.subnet.split_model import HeldFractions, SplitModel


@dataclass(frozen=True)
class Team:
    """The workers of a round.

    Attributes:
        num_workers: How many workers there are.
        capacities: A positive number for each worker; its share is proportional to it. None: as configured.
    """

    num_workers: int
    capacities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class WorkerSlot:
    """A worker's rank in a round; with the seed and the round it determines the worker's neurons and samples.

    Attributes:
        worker: The worker's number in this round, from 0.
        team: All workers of the round.
        rank: The number of this process among those that train the worker's subnet together, from 0.
        ranks: How many they are; each uses its part of the worker's samples.
    """

    worker: int
    team: Team
    rank: int = 0
    ranks: int = 1


class Assignments:
    """The neurons of every worker in every round: a pure function with a small cache.

    Args:
        split: The split network.
        schedule: The rounds and the seed.
        partition: How neurons are assigned where no stage changes it.
    """

    def __init__(self, split: SplitModel, schedule: Schedule, partition: Partition) -> None:
        self._split = split
        self._schedule = schedule
        self._partition = partition
        self._team = Team(schedule.sampler.num_workers)
        self._known: dict[tuple[int, Team], Assignment] = {}
        self._held = HeldFractions(split)

    def partition(self, round_number: int, team: Team | None = None) -> Partition:
        """Return how neurons are assigned in a round; for `team` see `of`."""
        return at_stage(self._partition_for(team), self._schedule.stage(round_number).keep)

    def _partition_for(self, team: Team | None) -> Partition:
        """Return how neurons are assigned to a team where no stage changes it."""
        if team is None or not team.capacities:
            return self._partition
        return self._partition.model_copy(update={"capacities": list(team.capacities)})

    def of(self, round_number: int, team: Team | None = None) -> Assignment:
        """Return the neurons that each worker holds in a round, by group.

        Args:
            round_number: The round, from 0.
            team: The workers of the round; None: as many as are configured.
        """
        key = (round_number, team or self._team)
        if key not in self._known:
            while len(self._known) > 1:  # the workers of a process ask for a round and for the next one
                self._known.pop(next(iter(self._known)))
            self._known[key] = assign(
                self._split.groups,
                key[1].num_workers,
                self._schedule.sampler.seed,
                round_number,
                self.partition(round_number, team),
            )
        return self._known[key]

    @property
    def ever_has_rest(self) -> bool:
        """Whether workers hold the frozen rest of the network in some round."""
        return "frozen" in self._schedule.recipe.rests(self._partition.rest)

    @property
    def _ever_lacks_neurons(self) -> bool:
        """Whether a worker's module lacks neurons in some round."""
        return "absent" in self._schedule.recipe.rests(self._partition.rest)

    def has_rest(self, round_number: int, neurons: Sequence[Indices] | None = None) -> bool:
        """Return whether a worker holds the frozen rest of the network in a round, besides its own neurons.

        Args:
            round_number: The round, from 0.
            neurons: For each group, the neurons that the worker holds, which may be all; None: those of any worker.
        """
        rest = self._schedule.stage(round_number).rest or self._partition.rest
        holds_all = self._team.num_workers == 1 or is_full_width(self.partition(round_number))
        if neurons is not None:
            holds_all |= all(len(held) == group.size for held, group in zip(neurons, self._split.groups, strict=True))
        return rest == "frozen" and not holds_all

    def cuts(self, round_number: int, team: Team | None = None) -> list[Cut]:
        """Return each worker's positions in every tensor that is sent and returned; for the arguments see `of`."""
        return [self._split.cut(neurons) for neurons in self.of(round_number, team)]

    def held_fraction(self, round_number: int, team: Team | None = None) -> float:
        """Return the largest fraction of the network's parameters that a worker holds; for the arguments see `of`."""
        return max(self._held.of(neurons) for neurons in self.of(round_number, team))

    def exclusive(self, round_number: int) -> frozenset[str]:
        """Return the tensors in which no entry has two holders in a round."""
        return self._split.exclusive if is_disjoint(self.partition(round_number)) else frozenset()

    def block_scales(self, team: Team | None = None) -> dict[str, float]:
        """Return, for each residual block that is assigned like a neuron, which part of its blocks a worker holds.

        Outside training, the full network runs with these scales (`ist/subnet/residual_blocks.py`).
        """
        groups = self._split.groups
        if not any(group.modules for group in groups) or not self._ever_lacks_neurons:
            return {}
        num_workers, seed = (team or self._team).num_workers, self._schedule.sampler.seed
        shares: Sequence[Indices] = assign(groups, num_workers, seed, 0, self._partition_for(team))[0]
        return {
            path: len(share) / group.size for group, share in zip(groups, shares, strict=True) for path in group.modules
        }

    def training_block_scales(self, round_number: int, team: Team | None = None) -> dict[str, float]:
        """Return a worker's scales of residual blocks in a round; there are none unless it trains all blocks."""
        is_full = is_full_width(self.partition(round_number, team)) or self.has_rest(round_number)
        return self.block_scales(team) if is_full else {}
