"""The section `recipe`: stages of a run, the scale of merged updates, the outer optimizer, the average of networks.

Where it sits: a section of `ist/config/schema.py`. `docs/recipes.md` measures the effect of each.
Not here: the merge (`ist/subnet/cut.py`), the outer optimizer (`ist/training/outer_optimizer.py`). Does not import
torch.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ist.config.base import Fraction, PositiveFloat, PositiveInt, Section


class Outer(Section):
    """The outer optimizer: the coordinator's step with the merged update of a round.

    Example:
        >>> ist.Outer(lr=0.7, momentum=0.9).is_plain
        False
    """

    lr: PositiveFloat = Field(default=1.0, description="learning rate: factor of the merged update")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Nesterov momentum on the merged update; a weight's momentum advances only in rounds that trained "
        "it. 0: no momentum",
    )

    @property
    def is_plain(self) -> bool:
        """Whether merged weights are used unchanged."""
        return self.momentum == 0 and self.lr == 1


class MergeScale(Section):
    """Factors of the update that a round's merge makes: the new weights are old + factor * (merged - old).

    A number is the factor of all weights: `0.5` means `{own: 0.5, shared: 0.5}`. So does `auto`.

    Example:
        >>> ist.MergeScale(own=0.5)
        MergeScale(own=0.5, shared=1.0)
    """

    own: float | Literal["auto"] = Field(
        default=1.0,
        description="factor of the update of weights that one worker returned in a round, more than 0 and at most 2; "
        "auto: in every round the coordinator tries factors from 1 to 1 / workers on evaluate.batch_size training "
        "samples, and takes the best. A number or auto instead of this mapping (merge_scale: 0.5) is the factor of all "
        "weights",
    )
    shared: float | Literal["auto"] = Field(
        default=1.0,
        description="factor of the mean update of weights that several workers returned in a round; auto: the same as "
        "the chosen factor of own weights",
    )

    @property
    def is_plain(self) -> bool:
        """Whether merged weights are used unchanged."""
        return self.own == 1 and self.shared == 1

    @property
    def is_auto(self) -> bool:
        """Whether the coordinator chooses a factor in every round."""
        return "auto" in (self.own, self.shared)

    def factors(self, chosen: float) -> tuple[float, float]:
        """Return the factors (own, shared) if `chosen` is the factor that the coordinator chooses."""
        return (chosen if self.own == "auto" else self.own, chosen if self.shared == "auto" else self.shared)

    @model_validator(mode="before")
    @classmethod
    def _of_a_number(cls, value: Any) -> Any:
        if not isinstance(value, int | float | str | list):
            return value
        scale = _checked_scale(value)
        return {"own": scale, "shared": scale}

    @field_validator("own", "shared", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        return _checked_scale(value)


def _checked_scale(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (is_number and 0 < value <= 2):
        raise ValueError(f"it is {value!r}: expected a number more than 0 and at most 2, such as 0.5, or 'auto'")
    return value


class Stage(Section):
    """A number of consecutive rounds of an IST run with their own settings.

    Example:
        >>> ist.Stage(share=0.2, keep=1, lr_scale=2).is_open
        False
    """

    rounds: PositiveInt | None = Field(
        default=None,
        description="number of rounds; exactly one stage has neither rounds nor share, and takes the remaining rounds "
        "of the run",
    )
    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="fraction of the run, to the nearest round, instead of rounds: of the run's rounds if train.rounds "
        "is given, else of its local steps",
    )
    keep: Fraction | None = Field(
        default=None,
        description="keep fraction: fraction of every group that a worker holds, instead of partition.keep; 1: every "
        "worker trains the full network (local SGD), as a warm-up or a final full-width phase",
    )
    rest: Literal["absent", "frozen"] | None = Field(default=None, description="replaces partition.rest in this stage")
    local_steps: PositiveInt | None = Field(default=None, description="replaces train.local_steps in this stage")
    lr_scale: PositiveFloat = Field(default=1.0, description="factor of the schedule's learning rate")
    outer: Outer | None = Field(
        default=None, description="replaces recipe.outer in this stage, such as {lr: 0.7, momentum: 0.9}"
    )
    merge_scale: MergeScale | None = Field(
        default=None, description="replaces recipe.merge_scale in this stage, also if it is a full-width phase"
    )

    @property
    def is_open(self) -> bool:
        """Whether it takes the rounds that the other stages leave."""
        return self.rounds is None and self.share is None

    @model_validator(mode="after")
    def _one_length(self) -> "Stage":
        if self.rounds is not None and self.share is not None:
            raise ValueError("'rounds' and 'share' both set the length of the stage: give only one")
        return self


class Average(Section):
    """The average of the full network over rounds; it is evaluated and saved instead of the last weights.

    Example:
        >>> ist.Average(kind="ema").decay
        0.8
    """

    kind: Literal["none", "ema", "swa"] = Field(
        default="none",
        description="'ema': exponential moving average; 'swa': equal weight for every round. For all methods; costs no "
        "bytes",
    )
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.8, description="ema: weight of the previous average in each round, or step ('decay_unit')"
    )
    decay_unit: Literal["round", "step"] = Field(
        default="round",
        description="ema: what 'decay' is of. 'step': a round of n local steps counts as n, with decay ** n, as an "
        "average over steps would if the network changed at the end of a round only: between two merges no process has "
        "the full network, so what workers do within a round is not averaged",
    )
    start: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="fraction of the rounds before averaging starts"
    )


class Recipe(Section):
    """How settings change during an IST run, and how merged weights are used.

    Example:
        >>> full_width = ist.Stage(share=0.2, keep=1)  # every worker trains the full network
        >>> recipe = ist.Recipe(stages=[ist.Stage(), full_width], average=ist.Average(kind="ema"))
        >>> [stage.is_open for stage in recipe.stages]
        [True, False]
    """

    stages: list[Stage] = Field(
        default_factory=list,
        description="stages of an IST run, in order, such as [{}, {share: 0.2, keep: 1}]: in the last fifth of the run "
        "every worker trains the full network; default: one stage",
    )
    outer: Outer = Field(default_factory=Outer, description="the outer optimizer of IST")
    merge_scale: MergeScale = Field(
        default_factory=MergeScale,
        description="the scale of merged updates of IST: a number, auto, or factors for own and shared weights",
    )
    average: Average = Field(default_factory=Average, description="the average over rounds")

    def outer_of(self, stage: Stage) -> Outer:
        """Return the outer optimizer of a stage."""
        return stage.outer or self.outer

    def merge_scale_of(self, stage: Stage, is_full_width: bool) -> MergeScale:
        """Return the scale of merged updates of a stage.

        Args:
            stage: The stage.
            is_full_width: Whether its workers train the full network. Their mean does not overshoot, so that only the
                stage's own scale applies.
        """
        return stage.merge_scale or (MergeScale() if is_full_width else self.merge_scale)

    def rests(self, of_run: str) -> set[str]:
        """Return what workers have of the neurons that they lack, in all stages in which they lack some.

        Args:
            of_run: `partition.rest`, for stages that do not replace it.
        """
        return {stage.rest or of_run for stage in self.stages or [Stage()] if stage.keep != 1}

    @property
    def has_auto_scale(self) -> bool:
        """Whether the coordinator chooses the scale of merged updates in some stage."""
        return self.merge_scale.is_auto or any(stage.merge_scale and stage.merge_scale.is_auto for stage in self.stages)

    @property
    def has_outer_optimizer(self) -> bool:
        """Whether any stage uses the outer optimizer."""
        return any(not self.outer_of(stage).is_plain for stage in self.stages or [Stage()])

    @model_validator(mode="after")
    def _one_takes_the_rest(self) -> "Recipe":
        open_ended = sum(stage.is_open for stage in self.stages)
        if self.stages and open_ended != 1:
            raise ValueError(
                f"'stages' has {len(self.stages)} stages, and {open_ended} of them have no 'rounds' and no 'share': "
                "exactly one must leave both out; it takes the remaining rounds"
            )
        return self
