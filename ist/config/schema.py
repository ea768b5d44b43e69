"""The configuration of a run as frozen, typed classes: `Config` and its sections.

Where it sits: `ist/config/load.py` reads YAML and overrides into these classes; all other rooms receive them. A key
exists only if it is declared here or in a section that is imported here.
Not here: the sections `partition`, `exchange` and `baseline` (`ist/config/partition.py`) and `recipe`
(`ist/config/recipe.py`), and checks of a value against a model or a data set (`ist/subnet/job.py`). Imports neither
torch nor ray.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from ist.config.base import (
    Component,
    FolderName,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
)
from ist.config.link_rate import checked_link
from ist.config.methods import METHODS, POOLS, Baseline, MethodSpec, PoolSpec, method_spec
from ist.config.partition import Exchange, Partition
from ist.config.recipe import Recipe

TOTAL_STEPS = "total_steps"
"""An argument of a schedule with this value is replaced by the run's number of local steps."""


FROM_PYTHON = "from-python:"
"""Prefix of `model.name` if the network was passed to `ist.train`: such a network cannot be built from its name."""


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


class Model(Component):
    """The network."""

    weights: str | None = Field(
        default=None,
        description="safetensors file with the initial weights (fine-tuning), such as a run's model.safetensors; "
        "default: random weights from the run's seed",
    )


class Optimizer(Component):
    """A class of torch.optim, or another optimizer by its import path, and its arguments.

    Example:
        >>> ist.Optimizer(name="AdamW", args={"lr": 3e-4, "weight_decay": 0.1}).args["lr"]
        0.0003
    """


class Schedule(Component):
    """A class of torch.optim.lr_scheduler, and its arguments.

    Example:
        >>> schedule = ist.Schedule(name="OneCycleLR", args={"max_lr": 0.1, "total_steps": "total_steps"})
        >>> schedule.args["total_steps"]  # stands for the run's number of steps
        'total_steps'
    """


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
    loss: str = Field(default="cross_entropy", description="function of torch.nn.functional, or import path")
    optimizer: Optimizer = Field(description="class of torch.optim and its arguments")
    schedule: Schedule | None = Field(
        default=None,
        description="class of torch.optim.lr_scheduler, advanced every local step; the argument value "
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
        default=16, description="training batches from which batch norm's running statistics are re-estimated"
    )


class Checkpoint(Section):
    """When and where the run is saved.

    Example:
        >>> [done for done in range(1, 11) if ist.Checkpoint(every=4).is_due(done)]
        [4, 8]
    """

    every: PositiveInt = Field(default=1, description="rounds between checkpoints; the last round is always saved")
    keep: PositiveInt = Field(default=2, description="number of checkpoints to keep; older ones are deleted")
    storage: str | None = Field(
        default=None,
        description="folder or fsspec URL, such as s3://bucket/runs; checkpoints are written there, in a folder named "
        "after the run folder; default: the run folder. Keep keys and passwords out of the URL: use the environment or "
        "fsspec's configuration",
    )

    def is_due(self, rounds_done: int) -> bool:
        """Return whether to save after this many rounds; the caller saves the last round in any case."""
        return rounds_done % self.every == 0


class Ray(Section):
    """Where and how Ray runs the workers (pool.kind ray).

    Example:
        >>> ist.Ray(address="auto", num_gpus=1).placement
        'SPREAD'
    """

    address: Annotated[str, Field(pattern=r"^(auto|[^/]+:\d+)$")] | None = Field(
        default=None,
        description="'auto' or host:port of a running cluster; default: start one on this machine for this run",
    )
    num_cpus: NonNegativeFloat = Field(default=1.0, description="CPUs that Ray reserves for a worker")
    num_gpus: NonNegativeFloat = Field(default=0.0, description="GPUs that Ray reserves for a worker")
    resources: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="custom resources that Ray reserves for a worker, such as {spot: 1}"
    )
    placement: Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"] = Field(
        default="SPREAD", description="placement strategy: spread workers over many nodes, or pack them on few"
    )
    start_timeout_s: Seconds = Field(default=300.0, description="seconds to wait until enough workers have started")

    @field_validator("resources")
    @classmethod
    def _are_custom(cls, resources: dict[str, float]) -> dict[str, float]:
        if {"CPU", "GPU", "memory", "object_store_memory"} & set(resources):
            raise ValueError(f"{resources} must name custom resources: set CPUs and GPUs by 'num_cpus' and 'num_gpus'")
        return resources


class Pool(Section):
    """How workers run and how subnets reach them.

    Example:
        >>> pool = ist.Pool(kind="ray", round_deadline_s=60, ray=ist.Ray(num_cpus=2))
        >>> pool.ray.num_cpus
        2.0
    """

    kind: Literal["inline", "torchrun", "ray"] = Field(
        default="torchrun",
        description="'inline': all workers in this process; 'torchrun': one process per worker; 'ray': Ray actors, "
        "which may join and leave",
    )
    coordinator: Literal["trains", "dedicated"] = Field(
        default="trains",
        description="'trains': rank 0 coordinates and is also a worker, whose subnet crosses no link; 'dedicated': "
        "rank 0 only coordinates, in its own process",
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto", description="'auto': nccl if every process has its own GPU, else gloo"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="device on which workers train")
    threads: Annotated[int, Field(gt=0, le=1024)] = Field(default=1, description="torch threads per process")
    timeout_s: Seconds = Field(default=600.0, description="seconds to wait for a peer before the run fails")
    min_returned: PositiveInt | None = Field(
        default=None,
        description="fewest workers that must return a valid result in a round; with fewer, the run ends. Default: the "
        "minimum if train.workers is a range, else all workers, or half of them on ray. Under torchrun only an invalid "
        "result is tolerated, not a lost worker",
    )
    round_attempts: PositiveInt = Field(
        default=3,
        description="ray: number of attempts at a round, including the first, if too few workers return; each retry "
        "uses new workers",
    )
    round_deadline_s: Seconds | None = Field(
        default=None,
        description="ray: a worker that has not returned after this many seconds is left out of the round; default: no "
        "deadline. The next round waits for this worker or its replacement, unless train.workers is a range",
    )
    allow_insecure: bool = Field(
        default=False, description="torchrun: allow listening on a public network interface, where anybody can connect"
    )
    memory_limit: Annotated[str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?(MB|GB)$")] | None = Field(
        default=None,
        description="torchrun: memory that a worker's process may allocate, such as 300MB or 1.5GB: on a GPU, of the "
        "GPU's memory; on a CPU, in addition to interpreter, libraries and data (enforced by Linux). A dedicated "
        "coordinator is not limited. Default: no limit",
    )
    link: Annotated[str, AfterValidator(checked_link)] | None = Field(
        default=None,
        description="torchrun: run every process on its own simulated host on this machine, with a link of this rate: "
        "100mbit, 1gbit, or up/down from the host's view, such as 20mbit/100mbit; default: no simulated hosts",
    )
    ray: Ray = Field(default_factory=Ray, description="where and how Ray runs the workers")

    @property
    def spec(self) -> PoolSpec:
        """What the pool can do."""
        return POOLS[self.kind]

    @property
    def memory_limit_bytes(self) -> int | None:
        """The memory limit in bytes, or None without a limit."""
        if self.memory_limit is None:
            return None
        return int(float(self.memory_limit[:-2]) * {"MB": 10**6, "GB": 10**9}[self.memory_limit[-2:]])


class Watch(Section):
    """Observers that receive every round's numbers.

    Example:
        >>> ist.Watch(metrics_port=9464).metrics_host
        '127.0.0.1'
    """

    tensorboard: bool = Field(
        default=False, description="write TensorBoard event files to tensorboard/ in the run folder"
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        default=None, description="serve metrics for Prometheus on this port during the run; 0 picks a free port"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address on which metrics are served")


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
    watch: Watch = Field(default_factory=Watch, description="observers that receive every round's numbers")
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
        if self.pool.min_returned is not None and self.pool.min_returned > self.train.workers:
            raise ValueError(
                f"'pool.min_returned' is {self.pool.min_returned}, more than the {self.train.workers} workers "
                "(train.workers)"
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


def num_processes(config: Config) -> int:
    """Return the number of processes of the torchrun pool: one per worker, plus a dedicated coordinator if configured.

    Methods without a coordinator need no such process: all their ranks are workers.
    """
    dedicated = config.method_spec.has_coordinator and config.pool.coordinator == "dedicated"
    return config.train.workers + (1 if dedicated else 0)


def min_returned(config: Config) -> int:
    """Return how many workers must return a valid result in a round; with fewer, the run ends."""
    train, pool = config.train, config.pool
    if pool.min_returned is not None:
        return pool.min_returned
    if train.is_elastic:
        return train.min_workers or 1
    return -(-train.workers // 2) if pool.spec.replaces_workers else train.workers
