"""The sections `partition` and `exchange`: how neurons are assigned to workers, and how their slices are encoded.

Where it sits: sections of `ist/config/schema.py`.
Not here: settings of the baselines (`ist/config/methods.py`). Does not import torch.
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
"""The strategies that use a key of `Partition`; with any other strategy, the key must have its default."""


class Partition(Section):
    """How hidden neurons are assigned to workers.

    Example:
        >>> partition = ist.Partition(strategy="rolling", keep=0.5, exclude=["head.*"])
        >>> partition.keep, partition.residual
        (0.5, False)
    """

    strategy: Literal["disjoint", "categorical", "bernoulli", "rolling", "nested", "blocks"] = Field(
        default="disjoint",
        description="'disjoint': each neuron to exactly one worker, in shares of fixed size; 'categorical': each "
        "neuron to one worker, drawn independently; 'bernoulli': each worker holds each neuron with probability "
        "'keep'; 'rolling': a window that moves by one neuron per round; 'nested': the first neurons of each group; "
        "'blocks': full residual blocks instead of neurons",
    )
    keep: Fraction | None = Field(
        default=None,
        description="keep fraction. bernoulli: probability that a worker holds a neuron; rolling (default 1 / workers) "
        "and nested (default 1): fraction of each group that the worker with the largest capacity holds; disjoint "
        "(default: its share only): random neurons are added to a worker's share up to this fraction, so that shares "
        "overlap",
    )
    capacities: Annotated[list[PositiveFloat], Field(min_length=1)] | None = Field(
        default=None,
        description="one number per worker; its share, its probability or its 'keep' is proportional to it; default: "
        "equal",
    )
    coverage: Literal["random", "balanced"] = Field(
        default="random",
        description="disjoint. 'random': new shares every round; 'balanced': new shares only after as many rounds as "
        "there are workers, and in these rounds each share of a group is combined with each share of the next group "
        "exactly once",
    )
    rest: Literal["absent", "frozen"] = Field(
        default="absent",
        description="what a worker has of the neurons that it does not hold. 'absent': nothing, it trains a smaller "
        "network; 'frozen': their weights, rounded (exchange.rest) and read-only, so it computes the full network and "
        "trains its own neurons only",
    )
    balance: Literal["equal", "speed"] = Field(
        default="equal",
        description="'speed': capacities follow the measured time of each worker's local steps (inline, ray)",
    )
    residual: bool = Field(default=False, description="also split residual streams, unless a norm prevents it")
    exclude: list[Pattern] = Field(
        default_factory=list,
        description="patterns (*, ?) of names of groups that are not split; all workers share them",
    )
    sizes: dict[Pattern, dict[str, str]] = Field(
        default_factory=dict,
        description="for modules whose integer attributes are not found automatically: pattern of module paths -> "
        "attribute -> tensor of the module in proportion to which the attribute shrinks, such as {'blocks.*.attn': "
        "{num_heads: qkv.weight}}",
    )
    blocks: list[Pattern] = Field(
        default_factory=list,
        description="strategy blocks: patterns of paths of the modules to assign to workers, such as ['layer3.*']",
    )
    min_depth: PositiveInt = Field(
        default=1,
        description="strategy blocks: smallest number of blocks per worker; several workers may hold the same block",
    )
    verify: Literal["auto", "full"] = Field(
        default="auto",
        description="how the start checks that a worker's part computes the same as the masked full network. 'auto': a "
        "network of more than 5 million parameters is checked with pseudo-random values that are made one layer at a "
        "time; 'full': with its initial values, which needs the memory of several copies of the network",
    )

    @field_validator(*USED_BY)
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        strategy, users = info.data.get("strategy"), USED_BY[str(info.field_name)]
        default = cls.model_fields[str(info.field_name)].get_default(call_default_factory=True)
        if strategy is not None and strategy not in users and value != default:
            raise ValueError(
                f"is {value!r}, but strategy '{strategy}' does not use this key: leave it out, or set "
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
                f"strategy 'nested' with 'capacities' {self.capacities} and no 'keep' gives every worker the full "
                "network: set 'keep', such as 0.5, or different 'capacities'"
            )
        if self.balance == "speed" and self.capacities is not None:
            raise ValueError("'balance' is 'speed', which measures 'capacities': leave one of the two out")
        if self.coverage == "balanced" and (self.capacities is not None or self.balance == "speed"):
            raise ValueError(
                "'coverage' is 'balanced', where every worker gets every share in turn, so shares cannot follow "
                f"{'capacities' if self.capacities is not None else 'balance'!r}: leave one of the two out"
            )
        if self.strategy == "blocks" and not self.blocks:
            raise ValueError("strategy 'blocks' needs 'blocks', patterns of module paths, such as ['layer3.*']")
        return self


Coding = Literal["exact", "bfloat16", "float16", "int8", "int7", "int6", "int5", "int4", "int3", "int2"]


class Exchange(Section):
    """How IST's slices are encoded for transport. Only matrices are rounded; all other tensors are sent exactly.

    Example:
        >>> exchange = ist.Exchange(up="int4", values="deltas", error_feedback=True)
        >>> exchange.down
        'exact'
    """

    down: Coding = Field(
        default="exact",
        description="encoding of the slices that are sent to a worker: exact, or rounded to this type (int types have "
        "a scale per row)",
    )
    up: Coding = Field(default="exact", description="encoding of the slices that a worker returns")
    values: Literal["weights", "deltas"] = Field(
        default="weights",
        description="what a worker returns: its trained weights, or their difference from the weights that it "
        "received; rounding loses less with deltas",
    )
    rest: Coding = Field(
        default="int4",
        description="encoding of the frozen rest of the network (partition.rest), which a worker holds in this form; "
        "here the int types have a scale for every 32 numbers",
    )
    error_feedback: bool = Field(
        default=False,
        description="error feedback: a worker adds the rounding error of its last deltas (the residual) to its next "
        "deltas; it keeps residuals for the full network, and discards them when the number of workers changes",
    )

    @model_validator(mode="after")
    def _error_feedback_needs_rounding(self) -> "Exchange":
        if self.error_feedback and (self.up == "exact" or self.values != "deltas"):
            raise ValueError(
                f"'error_feedback' needs rounded deltas, but 'up' is {self.up} and 'values' is {self.values}: set "
                "'exchange.up', such as int8, and 'exchange.values' deltas, or leave 'error_feedback' out"
            )
        return self
