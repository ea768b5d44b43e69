"""The schedule of a run: its rounds with their local steps and stages, and the settings and samples of each step.

Where it sits: `ist/runs/build.py` builds it once in each process, for the round loop, the coordinator and the workers.
Not here: the neurons of each worker in a round (`ist/subnet/assignments.py`), the changes that a stage makes to the
partition (`ist/subnet/partition.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ist.config.recipe import MergeScale, Outer, Recipe, Stage
from ist.config.schema import Config
from ist.data.shards.unequal import Sampler
from ist.optimization.stages import WHOLE_RUN, Span, spans
from ist.optimization.step_settings import StepSettings


def run_spans(config: Config, sampler: Sampler) -> Sequence[Span]:
    """Return all rounds of a run, with their steps and stages."""
    train = config.train
    total = None
    if train.epochs is not None:
        assert sampler.steps_per_epoch is not None  # the configuration gives the rounds
        total = train.epochs * sampler.steps_per_epoch
    stages = config.recipe.stages if config.method_spec.needs_groups else ()
    return spans(stages, train.local_steps, train.rounds, total)


@dataclass(frozen=True)
class Schedule:
    """The rounds and steps of a run; the same in every process.

    Attributes:
        spans: The rounds of the run; the last may be shorter than others, and is merged like any other.
        recipe: The configuration section `recipe`, with the stages.
        sampler: The assignment of samples to workers and steps.
        settings: The settings of the learning-rate schedule at each local step; empty without one.
        group_of: For each trained parameter, the index of its group in an optimizer over all of them.
    """

    spans: Sequence[Span]
    recipe: Recipe
    sampler: Sampler
    settings: Sequence[StepSettings]
    group_of: Mapping[str, int]

    @property
    def total_steps(self) -> int:
        """The number of local steps of each worker in the whole run."""
        return self.spans[-1].steps.stop

    @property
    def num_rounds(self) -> int:
        """The number of rounds of the run."""
        return len(self.spans)

    def steps(self, round_number: int) -> range:
        """Return the numbers of a round's local steps."""
        return self.spans[round_number].steps

    def stage(self, round_number: int) -> Stage:
        """Return the stage of a round; without stages the whole run is one stage."""
        return self.spans[round_number].stage if self.recipe.stages else WHOLE_RUN

    def outer(self, round_number: int) -> Outer:
        """Return the settings of the outer optimizer in a round."""
        return self.recipe.outer_of(self.spans[round_number].stage)

    def merge_scale(self, round_number: int, is_full_width: bool) -> MergeScale:
        """Return the scale of the merged update of a round; `is_full_width`: workers train the full network in it."""
        return self.recipe.merge_scale_of(self.stage(round_number), is_full_width)

    @property
    def main_round(self) -> int:
        """The first round of the open stage, which is neither warm-up nor full-width phase."""
        if not self.recipe.stages:
            return 0
        return next(number for number, span in enumerate(self.spans) if span.stage.is_open)

    def sampler_for(self, num_workers: int) -> Sampler:
        """Return the assignment of samples to steps in a round with the given number of workers."""
        if num_workers == self.sampler.num_workers:
            return self.sampler
        return replace(self.sampler, num_workers=num_workers)
