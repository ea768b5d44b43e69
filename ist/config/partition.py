"""The configuration of how IST partitions neurons among workers, and in how many bits it sends their slices.

Where it sits: sections of `ist/config/schema.py`.
Not here: settings of the other methods (`ist/config/methods.py`); torch.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ist.config.base import Fraction, Pattern, PositiveFloat, PositiveInt, Section

USED_BY: dict[str, tuple[str, ...]] = {
    "keep": ("disjoint", "bernoulli", "rolling", "nested"),
    "capacities": ("disjoint", "categorical", "bernoulli", "rolling", "nested"),
    "balance": ("disjoint", "categorical", "bernoulli", "rolling", "nested"),
    "coverage": ("disjoint",),
    "residual": ("disjoint", "categorical", "bernoulli", "rolling", "nested"),
    "blocks": ("blocks",),
    "min_depth": ("blocks",),
}
"""Which strategies use a key of `Partition`; with any other it must keep its default."""


class Partition(Section):
    """How hidden neurons are dealt to workers.

    Example:
        >>> partition = ist.Partition(strategy="rolling", keep=0.5, exclude=["head.*"])
        >>> partition.keep, partition.residual
        (0.5, False)
    """

    strategy: Literal["disjoint", "categorical", "bernoulli", "rolling", "nested", "blocks"] = Field(
        default="disjoint",
        description="'disjoint': every neuron to one worker, in fixed shares; 'categorical': to one worker, drawn "
        "for each neuron alone; 'bernoulli': a coin for each worker and neuron; 'rolling': a window that moves by one "
        "neuron a round; 'nested': the first neurons; 'blocks': whole residual blocks instead of neurons",
    )
    keep: Fraction | None = Field(
        default=None,
        description="bernoulli: the probability that a worker holds a neuron; rolling (default 1 / workers) and "
        "nested (default 1): the part of every group that a worker of the largest capacity holds; disjoint (default: "
        "no more than its share): a worker's share is filled up at random to this part, so that shares overlap",
    )
    capacities: Annotated[list[PositiveFloat], Field(min_length=1)] | None = Field(
        default=None,
        description="one number for each worker, to which its share, its probability or its 'keep' is proportional; "
        "default: equal",
    )
    coverage: Literal["random", "balanced"] = Field(
        default="random",
        description="disjoint: shares are drawn anew every round, or 'balanced': once in as many rounds as there are "
        "workers, in which every share of a group meets every share of the next one exactly once",
    )
    balance: Literal["equal", "speed"] = Field(
        default="equal",
        description="'speed': capacities follow the measured time of each worker's local steps (inline, ray)",
    )
    residual: bool = Field(default=False, description="also split residual streams where no norm forbids it")
    exclude: list[Pattern] = Field(
        default_factory=list,
        description="patterns (*, ?) of names of groups that are not split: all workers share them",
    )
    sizes: dict[Pattern, dict[str, str]] = Field(
        default_factory=dict,
        description="for modules whose narrow widths are not found: pattern of module paths, then integer attribute, "
        "then the module's tensor in proportion to which it shrinks: {'blocks.*.attn': {num_heads: qkv.weight}}",
    )
    blocks: list[Pattern] = Field(
        default_factory=list,
        description="strategy blocks: patterns of paths of the modules to deal out, such as ['layer3.*']",
    )
    min_depth: PositiveInt = Field(
        default=1,
        description="strategy blocks: a worker holds at least this many, so that a block may have several holders",
    )

    @field_validator(*USED_BY)
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        strategy, users = info.data.get("strategy"), USED_BY[str(info.field_name)]
        default = cls.model_fields[str(info.field_name)].get_default(call_default_factory=True)
        if strategy is not None and strategy not in users and value != default:
            raise ValueError(
                f"strategy '{strategy}' does not use it, but it is {value!r}: leave it out, or set "
                f"'partition.strategy' to {' or '.join(users)}"
            )
        return value

    @model_validator(mode="after")
    def _is_enough(self) -> "Partition":
        if self.strategy == "bernoulli" and self.keep is None:
            raise ValueError(
                "strategy 'bernoulli' needs 'keep', the probability that a worker holds a neuron, such as 0.5"
            )
        if (
            self.strategy == "nested"
            and self.keep is None
            and self.balance == "equal"
            and len(set(self.capacities or ())) < 2
        ):
            raise ValueError(
                f"strategy 'nested' with 'capacities' {self.capacities} and no 'keep' gives every worker the whole "
                "network: set 'keep', such as 0.5, or 'capacities' that differ"
            )
        if self.balance == "speed" and self.capacities is not None:
            raise ValueError("'capacities' are measured where 'balance' is 'speed': leave one of the two out")
        if self.coverage == "balanced" and (self.capacities is not None or self.balance == "speed"):
            raise ValueError(
                "'coverage' is 'balanced', in which every worker gets every share in turn, so that shares cannot "
                f"follow {'capacities' if self.capacities is not None else 'balance'!r}: leave one of the two out"
            )
        if self.strategy == "blocks" and not self.blocks:
            raise ValueError("strategy 'blocks' needs 'blocks', patterns of module paths, such as ['layer3.*']")
        return self


Coding = Literal["exact", "bfloat16", "float16", "int8", "int7", "int6", "int5", "int4", "int3", "int2"]


class Exchange(Section):
    """In how many bits IST's slices travel; matrices alone, everything else travels as it is.

    Example:
        >>> exchange = ist.Exchange(up="int4", values="deltas", error_feedback=True)
        >>> exchange.down
        'exact'
    """

    down: Coding = Field(
        default="exact",
        description="the slices that go to a worker: as they are, or each number rounded to so many bits (int: with a "
        "scale for each row)",
    )
    up: Coding = Field(default="exact", description="the slices that a worker returns")
    values: Literal["weights", "deltas"] = Field(
        default="weights",
        description="what a worker returns: its trained weights, or how they differ from those that it got; rounded "
        "deltas lose less",
    )
    error_feedback: bool = Field(
        default=False,
        description="a worker adds to its next deltas what rounding took from the last ones; it holds that for the "
        "whole network, and forgets it when the number of workers changes",
    )

    @model_validator(mode="after")
    def _feeds_back_what_is_lost(self) -> "Exchange":
        if self.error_feedback and (self.up == "exact" or self.values != "deltas"):
            raise ValueError(
                f"'error_feedback' is for rounded deltas, but 'up' is {self.up} and 'values' is {self.values}: set "
                "'exchange.up', such as int8, and 'exchange.values' deltas, or leave it out"
            )
        return self
