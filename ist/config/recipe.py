"""The configuration of how IST goes on its way: stages of a run, the outer step, the average of merged networks.

Where it sits: sections of `ist/config/schema.py`. `docs/recipes.md` tells what each was worth.
Not here: torch.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ist.config.base import Fraction, PositiveFloat, PositiveInt, Section


class Outer(Section):
    """The step that the coordinator makes with what the workers' rounds add up to.

    Example:
        >>> ist.Outer(lr=0.7, momentum=0.9).is_plain
        False
    """

    lr: PositiveFloat = Field(default=1.0, description="what the merged change is multiplied by")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Nesterov momentum of the merged change, for each weight by the rounds in which it was trained; 0: "
        "the merged weights are taken as they are",
    )

    @property
    def is_plain(self) -> bool:
        """Whether merged weights are taken as they are."""
        return self.momentum == 0 and self.lr == 1


class Stage(Section):
    """A part of an IST run, some rounds long, in which some settings differ.

    Example:
        >>> ist.Stage(share=0.2, keep=1, lr_scale=2).is_open
        False
    """

    rounds: PositiveInt | None = Field(
        default=None,
        description="how many rounds it lasts; exactly one stage has neither this nor share, and takes what is left of "
        "the run",
    )
    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="what part of the run it lasts, to the nearest round, in place of rounds: of its rounds where "
        "train.rounds is given, else of its local steps",
    )
    keep: Fraction | None = Field(
        default=None,
        description="the part of every group that a worker holds, in place of partition.keep; 1: every worker trains "
        "the whole network (local SGD), as a warm-up or a finish",
    )
    local_steps: PositiveInt | None = Field(default=None, description="in place of train.local_steps")
    lr_scale: PositiveFloat = Field(default=1.0, description="what the learning rate of the schedule is multiplied by")
    outer: Outer | None = Field(default=None, description="in place of recipe.outer, such as {lr: 0.7, momentum: 0.9}")

    @property
    def is_open(self) -> bool:
        """Whether it takes what the others leave of the run."""
        return self.rounds is None and self.share is None

    @model_validator(mode="after")
    def _one_length(self) -> "Stage":
        if self.rounds is not None and self.share is not None:
            raise ValueError("'rounds' and 'share' both say how long the stage lasts: give one")
        return self


class Average(Section):
    """The average of the whole network over rounds, which is what is evaluated and kept.

    Example:
        >>> ist.Average(kind="ema").decay
        0.8
    """

    kind: Literal["none", "ema", "swa"] = Field(
        default="none",
        description="'ema': exponential, 'swa': every round weighs the same; costs no bytes. Of every method",
    )
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.8, description="ema: what the average keeps of itself a round"
    )
    start: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="the part of the rounds that pass before the average begins"
    )


class Recipe(Section):
    """How an IST run changes on its way, and how what workers trained is taken.

    Example:
        >>> finish = ist.Stage(share=0.2, keep=1)  # every worker trains the whole network
        >>> recipe = ist.Recipe(stages=[ist.Stage(), finish], average=ist.Average(kind="ema"))
        >>> [stage.is_open for stage in recipe.stages]
        [True, False]
    """

    stages: list[Stage] = Field(
        default_factory=list,
        description="what differs in parts of an IST run, in order, such as [{}, {share: 0.2, keep: 1}]: the last "
        "fifth with the whole network on every worker; default: one stage",
    )
    outer: Outer = Field(default_factory=Outer, description="the outer step of IST")
    average: Average = Field(default_factory=Average, description="the average over rounds")

    def outer_of(self, stage: Stage) -> Outer:
        """Return the outer step of a stage's rounds."""
        return stage.outer or self.outer

    @property
    def has_outer_step(self) -> bool:
        """Whether merged weights are moved on in any round."""
        return any(not self.outer_of(stage).is_plain for stage in self.stages or [Stage()])

    @model_validator(mode="after")
    def _one_takes_the_rest(self) -> "Recipe":
        open_ended = sum(stage.is_open for stage in self.stages)
        if self.stages and open_ended != 1:
            raise ValueError(
                f"'stages' has {len(self.stages)} stages, {open_ended} of which have no 'rounds' and no 'share': "
                "exactly one must leave both out, and takes what is left of the run"
            )
        return self
