"""The largest part of a network that a worker holds in a run.

Nothing is trained: the number follows from the split network and the schedule.
"""

from dataclasses import dataclass
from itertools import groupby

from ist.subnet.job import Job, assignments
from ist.transport.frozen_parameters import rest_fraction


@dataclass(frozen=True)
class Held:
    """The largest part of the network that a worker holds in a run.

    Attributes:
        fraction: The largest fraction of the network's parameters that a worker holds in any round; with the frozen
            rest of the network, plus its encoded bytes relative to those of all parameters.
        steps: The fraction of the run's local steps in which a worker holds that much.
    """

    fraction: float
    steps: float

    def __str__(self) -> str:
        """Return both as a cell of a table."""
        if self.steps == 1:
            return f"{self.fraction:.0%}"
        return f"{self.fraction:.0%}, in {self.steps:.0%} of its steps"


def held(job: Job) -> Held:
    """Return the most of the network that a worker holds in a run without lost workers."""
    if not job.config.method_spec.needs_groups:
        return Held(1.0, 1.0)
    shares, schedule = assignments(job), job.schedule
    parts: list[tuple[float, int]] = []
    for _, rounds in groupby(range(schedule.num_rounds), key=lambda number: schedule.spans[number].stage):
        numbers = list(rounds)
        fraction = max(shares.held_fraction(number) for number in numbers)
        if shares.has_rest(numbers[0]):
            fraction += rest_fraction(job.split, job.config.exchange)
        parts.append((fraction, sum(len(schedule.steps(number)) for number in numbers)))
    most = max(fraction for fraction, _ in parts)
    return Held(most, sum(steps for fraction, steps in parts if fraction == most) / schedule.total_steps)
