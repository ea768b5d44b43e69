"""The schedule of a run: its rounds, their local steps and stages, the settings of each step, the samples of each step.

Where it sits: `ist/runs/build.py` makes it once in each process; the round loop, the coordinator and the workers ask.
Not here: who holds which neurons in a round (`ist/subnet/assignments.py`), how a stage changes the partition
(`ist/subnet/partition.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ist.config.recipe import Outer, Recipe, Stage
from ist.data.batches import Dealing
from ist.optimization.stages import WHOLE_RUN, Span
from ist.optimization.step_settings import StepSettings


@dataclass(frozen=True)
class Schedule:
    """When what happens; the same in every process.

    Attributes:
        spans: Every round of the run; the last may be shorter than others, and is merged like any other.
        recipe: Stages, and what changes with them.
        dealing: Which samples each step of each worker uses.
        settings: What the learning-rate schedule sets at each local step; empty without one.
        group_of: For every parameter that is trained, the number of its group in an optimizer over all of them.
    """

    spans: Sequence[Span]
    recipe: Recipe
    dealing: Dealing
    settings: Sequence[StepSettings]
    group_of: Mapping[str, int]

    @property
    def total_steps(self) -> int:
        """Local steps of every worker in the whole run."""
        return self.spans[-1].steps.stop

    @property
    def num_rounds(self) -> int:
        """Rounds of the run."""
        return len(self.spans)

    def steps(self, round_number: int) -> range:
        """Return the numbers of a round's local steps."""
        return self.spans[round_number].steps

    def stage(self, round_number: int) -> Stage:
        """Return the stage of a round; without stages the whole run is one."""
        return self.spans[round_number].stage if self.recipe.stages else WHOLE_RUN

    def outer(self, round_number: int) -> Outer:
        """Return the settings of the outer optimizer in a round."""
        return self.recipe.outer_of(self.spans[round_number].stage)

    @property
    def main_round(self) -> int:
        """The first round of the stage that takes what is left of the run: neither warm-up nor full-width phase."""
        if not self.recipe.stages:
            return 0
        return next(number for number, span in enumerate(self.spans) if span.stage.is_open)

    def dealing_for(self, num_workers: int) -> Dealing:
        """Return which samples each step uses in a round of so many workers."""
        if num_workers == self.dealing.num_workers:
            return self.dealing
        return replace(self.dealing, num_workers=num_workers)
