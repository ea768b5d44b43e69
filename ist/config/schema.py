"""The configuration of a run as frozen, typed classes: `Config` and its sections.

Where it sits: `ist/config/load.py` reads YAML and overrides into these classes; all other rooms receive them. A key
exists only if it is declared here or in a section that is imported here.
Not here: the sections about methods (`partition.py`, `recipe.py`, `methods.py`) and about how a run is executed
(`runtime.py`), and checks of a value against a model or a data set (`ist/runs/build.py`). Imports neither torch nor
ray.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ist.config.base import (
    Component,
    FolderName,
    NonNegativeInt,
    Pattern,
    PositiveFloat,
    PositiveInt,
    Section,
)
from ist.config.methods import METHODS, POOLS, Baseline, MethodSpec, method_spec
from ist.config.partition import Exchange, Partition
from ist.config.recipe import Recipe
from ist.config.runtime import Checkpoint, Loader, Pool, Watch
from ist.errors import ConfigError

TOTAL_STEPS = "total_steps"
"""An argument of a schedule with this value is replaced by the run's number of local steps."""


FROM_PYTHON = "from-python:"
"""Prefix of `model.name` if the network was passed to `ist.train`: such a network cannot be built from its name."""


class Skew(Section):
    """Shards with a skewed mix of classes, for studies of data that are not identically distributed.

    Example:
        >>> ist.Skew(alpha=0.3).alpha
        0.3
    """

    alpha: PositiveFloat = Field(
        description="concentration of the Dirichlet distribution from which the workers' fractions of each class are "
        "drawn: 100 gives nearly equal mixes, 0.1 very different ones"
    )


class Data(Component):
    """The data set."""

    root: str | None = Field(
        default=None, description="folder with the files; default: where the package installs them"
    )
    shuffle: Literal["local", "global"] = Field(
        default="local",
        description="'local': each worker owns a fixed shard of the training data; 'global': the data is sharded again "
        "every epoch, so every worker's machine must hold all of it",
    )
    shard: Literal["assigned", "own"] = Field(
        default="assigned",
        description="'assigned': every process loads the same data set, whose samples are assigned to the workers; "
        "'own': each worker's process loads a data set of its own, of any length, which never leaves it (needs "
        "'train.rounds'). The loader gets the arguments worker (from 0; None for a coordinator that does not train, "
        "which may return None as training data) and num_workers, if it has them. Each worker goes through its own "
        "epochs, and the merge gives workers equal weight. Batch norm's running statistics are re-estimated from the "
        "coordinator's own data, if it has any",
    )
    skew: Skew | None = Field(
        default=None,
        description="assigns samples by their classes, so that each worker has another mix of classes and another "
        "number of samples (needs 'train.rounds', and class numbers as targets); each worker goes through its own "
        "epochs, and the merge gives workers equal weight; default: samples are assigned at random, in equal shards",
    )
    collate: str | None = Field(
        default=None,
        description="import path of a function that makes a batch of a list of items, such as one that pads them; "
        "default: PyTorch's, which stacks them",
    )
    loader: Loader = Field(default_factory=Loader, description="how batches are read")


class Model(Component):
    """The network."""

    weights: str | None = Field(
        default=None,
        description="file or folder with the initial weights (fine-tuning), read one tensor at a time: a safetensors "
        "file, such as a run's model.safetensors, or a folder of transformers (model.safetensors, or several files and "
        "model.safetensors.index.json) or of torch.distributed.checkpoint; default: random weights from the run's seed",
    )


class ParameterGroup(Section):
    """Parameters that have optimizer settings of their own, such as no weight decay.

    Example:
        >>> no_decay = ist.ParameterGroup(max_dims=1, args={"weight_decay": 0.0})  # norms and biases
        >>> head = ist.ParameterGroup(match=["head.*"], args={"lr": 1e-3})
        >>> [group.match for group in ist.Optimizer(name="AdamW", groups=[no_decay, head]).groups]
        [[], ['head.*']]
    """

    match: list[Pattern] = Field(
        default_factory=list,
        description="patterns of parameter names in the full network, such as ['*.bias', '*norm*']; a parameter is in "
        "the group if one of them matches; default: all parameters",
    )
    max_dims: NonNegativeInt | None = Field(
        default=None,
        description="most dims of a parameter in the group: 1 for norms and biases; default: any number",
    )
    args: dict[str, Any] = Field(description="settings of these parameters, such as {weight_decay: 0.0, lr: 0.01}")

    @model_validator(mode="after")
    def _selects(self) -> "ParameterGroup":
        if not self.match and self.max_dims is None:
            raise ValueError("give 'match' or 'max_dims'; settings of all parameters go into the optimizer's 'args'")
        return self


class Optimizer(Component):
    """A class of torch.optim, or the import path of another class or of a function, and its arguments.

    A function gets a mapping of a subnet's parameters by their names in the full network, and these arguments, and
    returns an optimizer. It is called for every new subnet, so it decides by names or numbers of dims, not by sizes.
    `MuonWithAdamW` trains matrices with Muon and all other parameters with AdamW. Its arguments are `lr` and
    `weight_decay` (of both), `momentum`, `nesterov`, `ns_steps`, `adjust_lr_fn` (of Muon), `adamw` (arguments of
    AdamW), and `adamw_for` (patterns of names of embeddings and output layers, which use AdamW).

    Example:
        >>> ist.Optimizer(name="AdamW", args={"lr": 3e-4, "weight_decay": 0.1}).args["lr"]
        0.0003
    """

    groups: list[ParameterGroup] = Field(
        default_factory=list,
        description="parameter groups with settings of their own, such as [{max_dims: 1, args: {weight_decay: 0.0}}]; "
        "a parameter is in the first group that matches it, or in a last one with the optimizer's own settings; lists "
        "in a schedule's args have an entry for each group, in this order",
    )


class Schedule(Section):
    """A class of torch.optim.lr_scheduler, a function that makes a scheduler, or a factor by step; and its arguments.

    Example:
        >>> schedule = ist.Schedule(name="OneCycleLR", args={"max_lr": 0.1, "total_steps": "total_steps"})
        >>> schedule.args["total_steps"]  # stands for the run's number of steps
        'total_steps'
        >>> def warmup(step, steps):
        ...     return min(1.0, (step + 1) / steps)
        >>> schedule = ist.Schedule(factor=warmup, args={"steps": 100})
    """

    name: str | None = Field(
        default=None,
        description="class of torch.optim.lr_scheduler, or the import path 'package.module:Name' of a class or of a "
        "function that makes a scheduler of an optimizer; give this or 'factor'",
    )
    factor: str | Callable[..., float] | None = Field(
        default=None,
        description="import path 'package.module:name' of a function of the local step (from 0, over the whole run); "
        "it returns a factor of every group's learning rate, as for LambdaLR",
    )
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of this function or class")

    @model_validator(mode="after")
    def _one_of_both(self) -> "Schedule":
        if (self.name is None) == (self.factor is None):
            raise ValueError(
                "give exactly one of 'name' (a scheduler) and 'factor' (a function of the step that returns a factor)"
            )
        return self


class Train(Section):
    """How the network is trained."""

    workers: PositiveInt = Field(
        description="number of workers; each trains one subnet per round. {min: 2, max: 16} allows workers to join and "
        "leave; it is short for 'workers: 16' and 'min_workers: 2'"
    )
    min_workers: PositiveInt | None = Field(
        default=None,
        description="fewest workers that a round can start with, at most 'workers' (needs 'rounds'); default: all",
    )
    epochs: PositiveInt | None = Field(default=None, description="passes over the data; give this or 'rounds'")
    rounds: PositiveInt | None = Field(default=None, description="number of rounds; give this or 'epochs'")
    local_steps: PositiveInt = Field(description="optimizer steps of each worker per round (tau)")
    batch_size: PositiveInt = Field(description="samples in one step of one worker")
    accumulate: PositiveInt = Field(
        default=1,
        description="micro-batches of a step: its samples are split into this many parts of nearly equal size, which "
        "pass through the network one after the other; their gradients add up to the mean over the step's samples. "
        "'batch_size' and 'local_steps' do not change: they count samples of a step and optimizer steps",
    )
    autocast: Literal["bfloat16", "float16"] | None = Field(
        default=None,
        description="dtype in which torch.autocast runs the forward pass and the loss of local steps, on networks with "
        "float32 parameters; null: no autocast. 'float16' needs a GPU and uses a torch.amp.GradScaler, whose state is "
        "not saved: a resumed run, and a worker that is replaced, start with a new one. Evaluation is never autocast",
    )
    compile: str | None = Field(
        default=None,
        description="backend of torch.compile for local steps, such as inductor (on CPUs it needs a C++ compiler) or "
        "aot_eager; null: not compiled. A subnet module is compiled again when its shapes change. Evaluation is never "
        "compiled",
    )
    clip_grad_norm: PositiveFloat | None = Field(
        default=None,
        description="largest norm of a step's gradient; a longer one is scaled down to it, as by "
        "torch.nn.utils.clip_grad_norm_. With IST it is the gradient of the subnet as the worker trains it, over all "
        "of the worker's own parameters: with activation_scale 'folded', of the scaled weights. Data-parallel training "
        "clips the averaged gradient",
    )
    loss: str = Field(default="cross_entropy", description="function of torch.nn.functional, or import path")
    step: str | None = Field(
        default=None,
        description="import path 'package.module:name' of a function of (network, batch) that returns the mean loss of "
        "the batch, in place of 'loss'. It gets each batch as it was collated, on the worker's device: a tuple, a "
        "mapping, or anything else. It must call the network that it gets, and is also used for the test loss. It may "
        "also return (loss, {name: number}), or a mapping with 'loss' and other numbers; see 'logged'",
    )
    logged: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="names of the numbers that 'step' returns beside the loss, or that a loop of your own logs: in "
        "each round, their mean over the samples of all workers is recorded, in metrics.jsonl under 'logged'",
    )
    optimizer: Optimizer = Field(
        description="class of torch.optim; 'MuonWithAdamW', which trains hidden matrices with Muon and the rest with "
        "AdamW; or the import path of a class or of a function that makes an optimizer of named parameters; and its "
        "arguments"
    )
    schedule: Schedule | None = Field(
        default=None,
        description="schedule of the learning rate, which advances every local step; the argument value "
        f"'{TOTAL_STEPS}' is replaced by the run's number of steps",
    )
    schedule_unit: Literal["step", "round"] = Field(
        default="step", description="'step': the schedule's settings change every local step; 'round': once per round"
    )
    optimizer_state: Literal["kept", "reset", "carried"] = Field(
        default="kept",
        description="optimizer state between rounds of IST. 'kept': a worker keeps it while it trains the same "
        "neurons, as in a full-width phase, and starts with new state for other neurons (no bytes); 'reset': new state "
        "every round; 'carried': state travels with its neurons (costs bytes)",
    )
    activation_scale: Literal["none", "width", "folded"] = Field(
        default="folded",
        description="a subnet sums over fewer neurons than the full network. 'folded': during local training, weights "
        "that sum over hidden neurons are multiplied by full width / own width, so the merged network's outputs have "
        "the trained scale; 'width': activations are multiplied instead, as in inverted dropout, which also scales the "
        "weights' steps; 'none': no scaling, as published; enough for class scores, which may be off by a factor",
    )
    running_statistics: Literal["reestimate", "carried"] = Field(
        default="reestimate",
        description="running statistics of batch norm. 'reestimate': computed again before each evaluation; 'carried': "
        "they travel with their neurons (exact only for one worker)",
    )

    @model_validator(mode="before")
    @classmethod
    def _range_of_workers(cls, tree: Any) -> Any:
        workers = tree.get("workers") if isinstance(tree, dict) else None
        if not isinstance(workers, dict):
            return tree
        if set(workers) != {"min", "max"} or tree.get("min_workers") is not None:
            raise ValueError("'workers' must be a number, or {min: 2, max: 16} without 'min_workers'")
        return {**tree, "workers": workers["max"], "min_workers": workers["min"]}

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.epochs is None) == (self.rounds is None):
            raise ValueError("give exactly one of 'epochs' and 'rounds'")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"'min_workers' is {self.min_workers}, more than the {self.workers} 'workers'")
        if self.is_elastic and self.rounds is None:
            raise ValueError("the number of rounds in an epoch depends on the number of workers: give 'rounds'")
        return self

    @model_validator(mode="after")
    def _one_loss(self) -> "Train":
        if self.step is not None and self.loss != Train.model_fields["loss"].default:
            raise ValueError(f"'step' computes the loss, but 'loss' is '{self.loss}': leave one of the two out")
        if twice := [name for name in dict.fromkeys(self.logged) if self.logged.count(name) > 1]:
            raise ValueError(f"'logged' names '{twice[0]}' twice: name each number once")
        if "loss" in self.logged:
            raise ValueError("'logged' names 'loss', which is recorded in any case: leave it out")
        return self

    @model_validator(mode="after")
    def _has_state_to_carry(self) -> "Train":
        if self.autocast == "float16" and self.optimizer_state == "carried":
            raise ValueError(
                "'autocast' is 'float16', whose scaler skips steps in which a gradient overflows, but 'carried' "
                "('optimizer_state') needs the state of every step: use 'kept', 'reset', or 'autocast' 'bfloat16'"
            )
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.min_workers is not None and self.min_workers < self.workers


class Evaluate(Section):
    """How the full network is evaluated.

    Example:
        >>> evaluate = ist.Evaluate(every=5, metric="rmse")
        >>> evaluate.batch_size
        1024
    """

    every: PositiveInt = Field(default=1, description="rounds between evaluations; the last round is always evaluated")
    batch_size: PositiveInt = Field(default=1024, description="samples in one evaluation batch")
    metric: str = Field(
        default="accuracy",
        description="metric to report besides the loss: accuracy, bits_per_byte, precision (at 1, 3 and 5), rmse, "
        "none, or the import path of an ist.Metric",
    )
    statistics_batches: PositiveInt = Field(
        default=16,
        description="most training batches, of evaluate.batch_size samples each, from which batch norm's running "
        "statistics are re-estimated before an evaluation; fewer read fewer samples. Nothing is read for a network "
        "without such statistics. Inputs of up to 64 MiB are read once and kept in memory, unless the data set "
        "draws random numbers, or pool.memory_limit is set",
    )


class Compare(Section):
    """What `ist compare` runs."""

    methods: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]+$", max_length=100)]] = Field(
        default_factory=lambda: ["ist", "ddp"],
        min_length=1,
        description="runs to make, in order: names of methods, or your own labels whose overrides set 'method'",
    )
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="for each method or label: dotted keys of this file and their values, such as {powersgd_rank4: "
        "{method: powersgd, baseline.powersgd_rank: 4}}",
    )

    @field_validator("methods")
    @classmethod
    def _name_folders(cls, methods: list[str]) -> list[str]:
        if twice := [name for name in dict.fromkeys(methods) if methods.count(name) > 1]:
            raise ValueError(f"'{twice[0]}' is listed twice: give one a label, with its 'method' in compare.overrides")
        if taken := {".", "..", "report.html"} & set(methods):
            raise ValueError(f"'{taken.pop()}' cannot be a label, because run folders are named after labels")
        return methods

    @field_validator("overrides")
    @classmethod
    def _are_for_something(
        cls, overrides: dict[str, dict[str, Any]], info: ValidationInfo
    ) -> dict[str, dict[str, Any]]:
        known = [*info.data.get("methods", []), *METHODS]
        for label, changes in overrides.items():
            if label not in known and "method" not in changes and ":" not in label:
                raise ValueError(
                    f"'{label}' is not in compare.methods, is not a method ({', '.join(METHODS)}), and does not "
                    "set 'method'"
                )
        return overrides


class Config(Section):
    """The configuration of a run."""

    name: FolderName = Field(description="name of the run")
    seed: NonNegativeInt = Field(default=0, description="seed of all random numbers")
    method: str = Field(
        default="ist",
        description="; ".join(f"{spec.name}: {spec.title}" for spec in METHODS.values())
        + "; or the import path 'package.module:Name' of another",
    )
    label: str | None = Field(default=None, description="name of the run in tables; default: the method")
    model: Model = Field(description="the network")
    data: Data = Field(description="the data set")
    train: Train = Field(description="how the network is trained")
    partition: Partition = Field(default_factory=Partition, description="how hidden neurons are assigned to workers")
    recipe: Recipe = Field(default_factory=Recipe, description="how settings change during a run")
    exchange: Exchange = Field(default_factory=Exchange, description="how many bits IST's slices take on the network")
    baseline: Baseline = Field(default_factory=Baseline, description="settings of the baselines")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="how the full network is evaluated")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="when and where the run is saved")
    pool: Pool = Field(default_factory=Pool, description="how workers run and how subnets reach them")
    watch: Watch = Field(default_factory=Watch, description="what receives every round's numbers")
    compare: Compare = Field(default_factory=Compare, description="what `ist compare` runs")
    output: str = Field(default="runs", description="folder in which run folders are created")

    @property
    def method_spec(self) -> MethodSpec:
        """What the method is and needs."""
        return method_spec(self.method)

    @model_validator(mode="after")
    def _one_capacity_per_worker(self) -> "Config":
        capacities = self.partition.capacities
        if self.method_spec.needs_groups and capacities is not None and len(capacities) != self.train.workers:
            raise ValueError(
                f"'partition.capacities' is {capacities} ({len(capacities)} numbers), but 'train.workers' is "
                f"{self.train.workers}: give one number per worker"
            )
        if capacities is not None and self.train.is_elastic:
            raise ValueError(
                "'partition.capacities' needs a fixed number of workers, but 'train.min_workers' allows workers to "
                "join and leave: use 'partition.balance' speed, or a fixed number of workers"
            )
        return self

    @model_validator(mode="after")
    def _covers_every_neuron(self) -> "Config":
        train, partition = self.train, self.partition
        if not self.method_spec.needs_groups:
            return self
        keeps = {"partition.keep": partition.keep}
        keeps |= {f"recipe.stages.{number}.keep": stage.keep for number, stage in enumerate(self.recipe.stages)}
        fewest = train.min_workers or train.workers
        for key, keep in keeps.items():
            if keep is not None and partition.strategy == "disjoint" and keep * fewest < 1 - 1e-9:
                raise ValueError(
                    f"'{key}' is {keep}, but strategy 'disjoint' assigns every neuron to a worker, and {fewest} "
                    f"workers with {keep} each cannot hold all neurons: set at least {1 / fewest:.3g}, or use strategy "
                    "'rolling'"
                )
            if keep not in (None, 1) and key != "partition.keep" and partition.strategy in ("categorical", "blocks"):
                raise ValueError(
                    f"'{key}' is {keep}, but strategy '{partition.strategy}' does not use 'keep': only 1, the full "
                    "network, is allowed"
                )
        return self

    @property
    def store_is_sharded(self) -> bool:
        """Whether the full network is stored in shards; methods whose ranks are all equal have no store."""
        return self.pool.store == "sharded" and self.method_spec.has_coordinator

    @property
    def has_frozen_rest(self) -> bool:
        """Whether workers hold the frozen rest of the network in some rounds."""
        return self.method_spec.needs_groups and "frozen" in self.recipe.rests(self.partition.rest)

    @property
    def workers_have_state(self) -> bool:
        """Whether workers keep state of their own between rounds (optimizer state, error-feedback residuals)."""
        keeps = self.train.optimizer_state == "kept" or self.exchange.error_feedback
        return self.method_spec.has_coordinator and keeps

    @model_validator(mode="after")
    def _residuals_outlast_a_round(self) -> "Config":
        if self.exchange.error_feedback and self.partition.balance == "speed":
            raise ValueError(
                "'exchange.error_feedback' is true, but its residuals are discarded whenever shares change, and "
                "'partition.balance' speed changes them nearly every round: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _can_freeze_the_rest(self) -> "Config":
        if not self.method_spec.needs_groups:
            return self
        if not self.has_frozen_rest:
            is_asked = self.partition.rest == "frozen" or any(stage.rest == "frozen" for stage in self.recipe.stages)
            if not is_asked and self.exchange.rest != Exchange.model_fields["rest"].default:
                raise ValueError(
                    f"'exchange.rest' is '{self.exchange.rest}', but no round has the frozen rest of the network: set "
                    "'partition.rest' to frozen, or leave 'exchange.rest' out"
                )
            return self
        what = "'partition.rest' (or that of a stage) is 'frozen', but"
        if self.pool.ranks_per_worker != 1:
            raise ValueError(
                f"{what} 'pool.ranks_per_worker' is {self.pool.ranks_per_worker!r}: use 1, so that every rank is a "
                "worker"
            )
        if self.train.compile is not None:
            raise ValueError(
                f"{what} 'train.compile' is '{self.train.compile}', which cannot compile layers that decode their "
                "weights: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_pool(self) -> "Config":
        kind, pool = self.pool.kind, self.pool.spec
        if self.partition.balance == "speed" and not pool.measures_speed and self.method_spec.needs_groups:
            able = " or ".join(spec.name for spec in POOLS.values() if spec.measures_speed)
            raise ValueError(f"'partition.balance' is 'speed', which needs 'pool.kind' {able}, not {kind}")
        for spec in POOLS.values():
            for key, why in spec.keys.items() if spec.name != kind else ():
                value = getattr(self.pool, key)
                if value != Pool.model_fields[key].get_default(call_default_factory=True):
                    shown = "set" if isinstance(value, Section) else repr(value)
                    raise ValueError(f"'pool.{key}' is {shown}, which needs 'pool.kind' {spec.name}, not {kind}: {why}")
        if pool.reserves_processors and self.pool.device == "cuda" and self.pool.ray.num_gpus == 0:
            raise ValueError(
                "'pool.device' is 'cuda', but 'pool.ray.num_gpus' is 0: a worker would see no GPU; set it to 1"
            )
        if self.train.autocast == "float16":
            ray_on_cpu = pool.reserves_processors and self.pool.ray.num_gpus == 0
            if self.pool.device == "cpu" or ray_on_cpu:
                key, value = ("pool.ray.num_gpus", 0) if ray_on_cpu else ("pool.device", "cpu")
                raise ValueError(
                    f"'train.autocast' is 'float16', which needs a GPU for every worker, but '{key}' is {value!r}: use "
                    "'bfloat16', which CPUs support too"
                )
        if self.pool.message_buffers is not None:
            what = f"'pool.message_buffers' is {self.pool.message_buffers}, but"
            if self.pool.backend == "nccl":
                raise ValueError(f"{what} 'pool.backend' is 'nccl', which sends all messages together: use 'gloo'")
            if self.pool.store == "sharded":
                raise ValueError(f"{what} 'pool.store' is 'sharded', which has no coordinator: leave one of them out")
            if not self.method_spec.has_coordinator and self.label is None:  # a comparison also has such methods
                raise ValueError(f"{what} 'method' is '{self.method}', which has no coordinator: leave it out")
        if self.pool.evaluation is not None and self.pool.store != "sharded":
            raise ValueError(
                f"'pool.evaluation' is '{self.pool.evaluation}', but 'pool.store' is '{self.pool.store}', where rank 0 "
                "holds the network anyway: leave 'pool.evaluation' out, or set 'pool.store' to 'sharded'"
            )
        if self.pool.store_replicas > 1 and (self.pool.store != "sharded" or self.train.workers < 2):
            what = (
                f"'pool.store' is '{self.pool.store}', which has no owners: set it to 'sharded'"
                if self.pool.store != "sharded"
                else f"'train.workers' is {self.train.workers}, and there are as many owners: set it to 2 or more"
            )
            raise ValueError(f"'pool.store_replicas' is {self.pool.store_replicas}, but {what}, or leave it out")
        if self.pool.store == "sharded":
            if not pool.owns_shards:
                able = " or ".join(spec.name for spec in POOLS.values() if spec.owns_shards)
                raise ValueError(
                    f"'pool.store' is 'sharded', which needs 'pool.kind' {able}, not {kind}: one process cannot own "
                    "less than the full network"
                )
            if self.partition.balance == "speed":
                raise ValueError(
                    "'pool.store' is 'sharded' and 'partition.balance' is 'speed', but every owner derives the shares "
                    "by itself, and owners measure other times: leave one of the two out"
                )
            if pool.is_launched and self.pool.coordinator == "dedicated":
                raise ValueError(
                    "'pool.store' is 'sharded' and 'pool.coordinator' is 'dedicated', but every rank is an owner and a "
                    "worker then: set 'pool.coordinator' to 'trains'"
                )
            if not self.store_is_sharded and self.label is None:  # a comparison also has methods without a store
                raise ValueError(
                    f"'pool.store' is 'sharded' and 'method' is '{self.method}', whose ranks hold the full network: "
                    "set 'pool.store' to 'coordinator'"
                )
        if self.pool.min_returned is not None and self.pool.min_returned > self.train.workers:
            raise ValueError(
                f"'pool.min_returned' is {self.pool.min_returned}, more than the {self.train.workers} workers "
                "(train.workers)"
            )
        return self

    @model_validator(mode="after")
    def _can_train_inside(self) -> "Config":
        ranks, train, pool = self.pool.ranks_per_worker, self.train, self.pool.spec
        what = f"'pool.ranks_per_worker' is {ranks!r}"
        if not pool.groups_processes and (ranks != 1 or self.pool.inside != Pool.model_fields["inside"].default):
            able = " or ".join(spec.name for spec in POOLS.values() if spec.groups_processes)
            key = what if ranks != 1 else f"'pool.inside' is '{self.pool.inside}'"
            raise ValueError(f"{key}, which needs 'pool.kind' {able}, not {pool.name}: a worker is one process there")
        if ranks == 1:
            return self
        if ranks == "node" and not pool.is_launched:
            raise ValueError(
                f"{what}, but with 'pool.kind' {pool.name} no launcher starts processes on the nodes: give the number "
                "of actors of a worker"
            )
        if self.pool.store == "sharded":
            raise ValueError(
                f"{what}, but with 'pool.store' 'sharded' every rank is a worker that owns a shard of the network: use "
                "'coordinator', or set 'pool.ranks_per_worker' to 1"
            )
        if ranks == "node" and self.pool.coordinator == "dedicated":
            raise ValueError(
                f"{what}, but with 'pool.coordinator' 'dedicated' rank 0 is one of the processes of the first node, "
                "which then has one process less for its worker: use 'trains', or give the number of processes"
            )
        if self.pool.inside == "fsdp":
            sharded = f"{what} and 'pool.inside' is 'fsdp', which shards parameters and optimizer state, but"
            if train.optimizer_state == "carried":
                raise ValueError(
                    f"{sharded} 'train.optimizer_state' is 'carried', which sends whole state: use 'kept' or 'reset', "
                    "or 'inside' 'ddp'"
                )
            if train.optimizer.name == "MuonWithAdamW":
                raise ValueError(
                    f"{sharded} 'train.optimizer.name' is 'MuonWithAdamW', which orthogonalizes whole matrices: use "
                    "another optimizer, or 'inside' 'ddp'"
                )
            if train.activation_scale == "width":
                raise ValueError(
                    f"{sharded} 'train.activation_scale' is 'width', which scales whole weights in the forward pass: "
                    "use 'folded' or 'none', or 'inside' 'ddp'"
                )
            if train.compile is not None:
                raise ValueError(f"{sharded} 'train.compile' is '{train.compile}': leave it out, or use 'ddp'")
            if train.autocast == "float16":
                raise ValueError(
                    f"{sharded} 'train.autocast' is 'float16', whose scaler needs whole gradients: use 'bfloat16', or "
                    "'inside' 'ddp'"
                )
        return self

    @property
    def chooses_merge_scale(self) -> bool:
        """Whether the coordinator chooses the scale of merged updates in some round."""
        return self.method_spec.needs_groups and self.recipe.has_auto_scale

    @model_validator(mode="after")
    def _can_choose_the_merge_scale(self) -> "Config":
        if not self.chooses_merge_scale:
            return self
        key, value, why = "", "", ""
        if self.store_is_sharded:
            key, value, why = "pool.store", "sharded", "no process holds the network that it would evaluate"
        elif self.data.shard == "own":
            key, value, why = "data.shard", "own", "no process has the training data of all workers"
        if key:
            raise ValueError(
                f"'recipe.merge_scale' is 'auto', which the coordinator chooses by the loss of the full network on "
                f"training data, but '{key}' is '{value}', where {why}: give a number, such as 0.5"
            )
        return self

    @model_validator(mode="after")
    def _has_no_common_epoch(self) -> "Config":
        is_own = self.data.shard == "own"
        if not is_own and self.data.skew is None:
            return self
        cause = "'data.shard' 'own'" if is_own else "'data.skew'"
        if is_own and self.data.skew is not None:
            raise ValueError(
                "'data.skew' assigns the samples of a common data set, but 'data.shard' is 'own': leave one of them out"
            )
        if self.train.epochs is not None:
            raise ValueError(
                f"'train.epochs' is {self.train.epochs}, but with {cause} the workers' shards differ in length, so "
                "there is no common epoch: give 'train.rounds'"
            )
        if self.data.shuffle == "global":
            raise ValueError(
                f"'data.shuffle' is 'global', which reassigns samples in every epoch, but with {cause} samples stay "
                "with their workers: use 'local'"
            )
        if is_own and self.train.is_elastic:
            raise ValueError(
                f"'train.min_workers' is {self.train.min_workers}, so workers may get other numbers during the run, "
                "but with 'data.shard' 'own' a worker's number decides which data it reads: use a fixed number of "
                "workers"
            )
        return self

    @model_validator(mode="after")
    def _can_be_elastic(self) -> "Config":
        train = self.train
        if not train.is_elastic or not self.method_spec.needs_groups:
            return self
        if self.partition.strategy == "blocks":
            raise ValueError(
                "strategy 'blocks' scales each block by the share of blocks that a worker holds, so the number of "
                "workers must not change: leave 'train.min_workers' out"
            )
        if train.min_workers is not None and (self.pool.min_returned or 0) > train.min_workers:
            raise ValueError(
                f"'pool.min_returned' is {self.pool.min_returned}, but a round can start with {train.min_workers} "
                "workers (train.min_workers)"
            )
        return self


def first_worker_rank(config: Config) -> int:
    """Return the rank of worker 0 in the torchrun pool: 1 beside a dedicated coordinator, otherwise 0.

    Methods without a coordinator need no such process: all their ranks are workers.
    """
    return int(config.method_spec.has_coordinator and config.pool.coordinator == "dedicated")


def ranks_per_worker(config: Config) -> int:
    """Return the number of processes of each worker.

    Raises:
        ConfigError: It is 'node', and no launcher has started this process on a node.
    """
    ranks = config.pool.ranks_per_worker
    if not isinstance(ranks, int):
        raise ConfigError(
            f"'pool.ranks_per_worker' is '{ranks}', but no launcher tells how many processes a node has "
            "(LOCAL_WORLD_SIZE): start the run with torchrun, or give the number of processes of a worker"
        )
    return ranks


def num_processes(config: Config) -> int:
    """Return the number of processes of the torchrun pool: those of all workers, and a dedicated coordinator."""
    return config.train.workers * ranks_per_worker(config) + first_worker_rank(config)


def worker_of(config: Config, rank: int) -> int:
    """Return the worker to which a rank of the torchrun pool belongs; -1 for a dedicated coordinator."""
    return (rank - first_worker_rank(config)) // ranks_per_worker(config)


def lead_rank(config: Config, worker: int) -> int:
    """Return the first rank of a worker in the torchrun pool, which exchanges its messages with the coordinator."""
    return first_worker_rank(config) + worker * ranks_per_worker(config)


def min_returned(config: Config) -> int:
    """Return how many workers must return a valid result in a round; with fewer, the run ends."""
    train, pool = config.train, config.pool
    if pool.min_returned is not None:
        return pool.min_returned
    if train.is_elastic:
        return train.min_workers or 1
    return -(-train.workers // 2) if pool.spec.replaces_workers else train.workers
