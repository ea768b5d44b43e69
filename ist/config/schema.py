"""The configuration of a run: frozen, typed, complete.

Where it sits: `ist/config/load.py` reads YAML and overrides into these classes; everything
else receives them. A key that is not declared here does not exist.
Not here: torch, ray, or anything that would have to be imported to check a value against
a model or a data set (that is `ist/subnet/job.py`).
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
from ist.config.method import METHOD_NAMES, Baseline, Exchange, Partition
from ist.config.recipe import Recipe

TOTAL_STEPS = "total_steps"
"""Where an argument of a schedule has this value, the run's number of local steps is put."""


FROM_PYTHON = "from-python:"
"""How `model.name` begins where the network was passed to `ist.train`, and cannot be made from its name."""


class Data(Component):
    """The data set."""

    root: str | None = Field(None, description="folder that holds the files; default: where the package puts them")
    shuffle: Literal["local", "global"] = Field(
        "local",
        description="'local': a worker owns a fixed part of the training data; 'global': parts are dealt anew every "
        "epoch, for which every worker's machine must hold all of it",
    )


class Model(Component):
    """The network."""

    weights: str | None = Field(
        None,
        description="a safetensors file with the values to begin with, such as a run's model.safetensors: fine-tuning; "
        "default: random values of the run's seed",
    )


class Train(Section):
    """How the network is trained."""

    workers: PositiveInt = Field(
        description="number of workers, each training one subnet a round; {min: 2, max: 16} for workers that come and "
        "go is short for 'workers: 16' and 'min_workers: 2'"
    )
    min_workers: PositiveInt | None = Field(
        None,
        description="fewest workers with which a round begins, up to 'workers' (needs 'rounds'); default: all of them",
    )
    epochs: PositiveInt | None = Field(None, description="passes over the data; give this or 'rounds'")
    rounds: PositiveInt | None = Field(None, description="number of rounds; give this or 'epochs'")
    local_steps: PositiveInt = Field(description="optimiser steps a worker makes in a round (tau)")
    batch_size: PositiveInt = Field(description="samples of one worker's step")
    loss: str = Field("cross_entropy", description="function of torch.nn.functional, or import path")
    optimizer: Component = Field(description="class of torch.optim and its arguments")
    schedule: Component | None = Field(
        None,
        description="class of torch.optim.lr_scheduler, advanced every local step; an argument "
        f"'{TOTAL_STEPS}' stands for the run's number of steps",
    )
    schedule_unit: Literal["step", "round"] = Field(
        "step", description="whether the schedule's settings change every local step, or stay for a round of the run"
    )
    optimizer_state: Literal["kept", "reset", "carried"] = Field(
        "kept",
        description="IST's: 'kept' by a worker whose neurons are those of the round before, as in a finish of whole "
        "networks, and new for other neurons (no bytes); 'reset' each round; 'carried' with neurons (costs bytes)",
    )
    activation_scale: Literal["none", "width", "folded"] = Field(
        "folded",
        description="'folded': while a subnet trains them, weights that sum over hidden neurons are multiplied by "
        "full width / own width, so that the whole network's outputs have the scale that was trained; 'width': the "
        "same, but activations are multiplied, as in inverted dropout, and with them the weights' steps; 'none': as "
        "published, for class scores, which need be right only up to a factor",
    )
    running_statistics: Literal["reestimate", "carried"] = Field(
        "reestimate",
        description="batch norm's running statistics: re-estimated before each evaluation, or carried with "
        "their neurons (exact only for one worker)",
    )

    @model_validator(mode="before")
    @classmethod
    def _range_of_workers(cls, tree: Any) -> Any:
        workers = tree.get("workers") if isinstance(tree, dict) else None
        if not isinstance(workers, dict):
            return tree
        if set(workers) != {"min", "max"} or tree.get("min_workers") is not None:
            raise ValueError("'workers' is a number, or {min: 2, max: 16} without 'min_workers'")
        return {**tree, "workers": workers["max"], "min_workers": workers["min"]}

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if (self.epochs is None) == (self.rounds is None):
            raise ValueError("give exactly one of 'epochs' and 'rounds'")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"'min_workers' is {self.min_workers}, more than the {self.workers} 'workers'")
        if self.is_elastic and self.rounds is None:
            raise ValueError("how many rounds an epoch has depends on the number of workers: give 'rounds'")
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return self.min_workers is not None and self.min_workers < self.workers


class Evaluate(Section):
    """How the whole network is evaluated."""

    every: PositiveInt = Field(1, description="rounds between evaluations; the last round is always evaluated")
    batch_size: PositiveInt = Field(1024, description="samples of one evaluation batch")
    metric: str = Field(
        "accuracy",
        description="what to report beside the loss: accuracy, bits_per_byte, precision (at 1, 3 and 5), rmse, none, "
        "or the import path of an ist.evaluation.metrics.Metric",
    )
    statistics_batches: PositiveInt = Field(
        16, description="training batches for re-estimating batch norm's running statistics"
    )


class Checkpoint(Section):
    """When the run is saved."""

    every: PositiveInt = Field(1, description="rounds between checkpoints; the last round is always saved")
    keep: PositiveInt = Field(2, description="how many of the newest checkpoints to keep")
    storage: str | None = Field(
        None,
        description="folder or fsspec URL, such as s3://bucket/runs, under which checkpoints are kept, in a folder "
        "named after the run folder; default: in the run folder. Keys and passwords belong into the environment or "
        "fsspec's configuration, not into the URL",
    )

    def is_due(self, rounds_done: int) -> bool:
        """Return whether the run is saved after so many rounds, its last one aside."""
        return rounds_done % self.every == 0


class Ray(Section):
    """Where and how Ray runs the workers (pool.kind ray)."""

    address: Annotated[str, Field(pattern=r"^(auto|[^/]+:\d+)$")] | None = Field(
        None, description="'auto' or host:port of a running cluster; default: a cluster on this machine for this run"
    )
    num_cpus: NonNegativeFloat = Field(1.0, description="CPUs that Ray reserves for a worker")
    num_gpus: NonNegativeFloat = Field(0.0, description="GPUs that Ray reserves for a worker")
    resources: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="custom resources that Ray reserves for a worker, such as {spot: 1}"
    )
    placement: Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"] = Field(
        "SPREAD", description="strategy of the placement group: over many nodes, or on few"
    )
    start_timeout_s: Seconds = Field(300.0, description="seconds to wait until enough workers are there")

    @field_validator("resources")
    @classmethod
    def _are_custom(cls, resources: dict[str, float]) -> dict[str, float]:
        if {"CPU", "GPU", "memory", "object_store_memory"} & set(resources):
            raise ValueError(f"{resources} is for resources of your own: processors go into 'num_cpus' and 'num_gpus'")
        return resources


class Pool(Section):
    """Who carries subnets to workers."""

    kind: Literal["inline", "torchrun", "ray"] = Field(
        "torchrun",
        description="'inline': all workers in this process; 'torchrun': processes; 'ray': actors, which come and go",
    )
    coordinator: Literal["trains", "dedicated"] = Field(
        "trains",
        description="whether rank 0 is a worker too, whose subnet crosses no link, or only coordinates, in a process "
        "of its own",
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto", description="auto: nccl where every process has its own GPU, else gloo"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where workers compute")
    threads: Annotated[int, Field(gt=0, le=1024)] = Field(1, description="torch threads of each process")
    timeout_s: Seconds = Field(600.0, description="seconds to wait for a peer before giving it up")
    min_returned: PositiveInt | None = Field(
        None,
        description="fewest workers whose part of a round is taken, or the run ends; default: train.min_workers of a "
        "range, else all, or half of them on ray. Under torchrun it spares those alone whose part is refused",
    )
    round_attempts: PositiveInt = Field(
        3,
        description="ray: how often a round is begun anew with new workers where too few came back, the first included",
    )
    round_deadline_s: Seconds | None = Field(
        None,
        description="ray: a worker that is not back after so many seconds is left out of the round; default: none. The "
        "next round waits for it, or for who takes its place, unless train.workers is a range",
    )
    allow_insecure: bool = Field(
        False, description="torchrun: may listen on a public network interface, where anybody can connect"
    )
    memory_limit: Annotated[str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?(MB|GB)$")] | None = Field(
        None,
        description="torchrun: what a worker's process may allocate, such as 300MB or 1.5GB: of its GPU, else beyond "
        "interpreter, libraries and data, enforced by Linux; a dedicated coordinator is not limited; default: no limit",
    )
    link: Annotated[str, AfterValidator(checked_link)] | None = Field(
        None,
        description="torchrun: every process runs on a host of its own, made on this machine, on a link of this rate: "
        "100mbit, 1gbit, or up/down as the host sees it, such as 20mbit/100mbit; default: no such hosts",
    )
    ray: Ray = Field(default_factory=Ray, description="where and how Ray runs the workers")

    @property
    def memory_limit_bytes(self) -> int | None:
        """The limit in bytes, if there is one."""
        if self.memory_limit is None:
            return None
        return int(float(self.memory_limit[:-2]) * {"MB": 10**6, "GB": 10**9}[self.memory_limit[-2:]])


class Watch(Section):
    """Who else is told about every round."""

    tensorboard: bool = Field(False, description="write TensorBoard event files to the run folder's tensorboard/")
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="serve metrics for Prometheus on this port while the run lasts; 0 picks a free one"
    )
    metrics_host: str = Field("127.0.0.1", description="address on which metrics are served")


class Compare(Section):
    """What `ist compare` runs."""

    methods: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]+$", max_length=100)]] = Field(
        default_factory=lambda: ["ist", "ddp"],
        min_length=1,
        description="what to run, in order: methods, or labels of your own whose overrides set 'method'",
    )
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="for each of them: dotted keys of this file and the values that it gets, such as {powersgd_rank4: "
        "{method: powersgd, baseline.powersgd_rank: 4}}",
    )

    @field_validator("methods")
    @classmethod
    def _name_folders(cls, methods: list[str]) -> list[str]:
        if twice := [name for name in dict.fromkeys(methods) if methods.count(name) > 1]:
            raise ValueError(f"'{twice[0]}' stands twice: give one of them a label, with 'method' in compare.overrides")
        if taken := {".", "..", "report.html"} & set(methods):
            raise ValueError(f"'{taken.pop()}' cannot be a label: run folders are named after labels")
        return methods

    @field_validator("overrides")
    @classmethod
    def _are_for_something(
        cls, overrides: dict[str, dict[str, Any]], info: ValidationInfo
    ) -> dict[str, dict[str, Any]]:
        known = [*info.data.get("methods", []), *METHOD_NAMES]
        for label, changes in overrides.items():
            if label not in known and "method" not in changes and ":" not in label:
                raise ValueError(
                    f"'{label}' is neither in compare.methods nor a method ({', '.join(METHOD_NAMES)}), and sets no "
                    "'method' of its own"
                )
        return overrides


class Config(Section):
    """A whole run."""

    name: FolderName = Field(description="name of the run")
    seed: NonNegativeInt = Field(0, description="seed of everything random")
    method: str = Field(
        "ist",
        description="'ist', or what it is compared with: ddp, ddp_fp16, ddp_bf16, powersgd, local_sgd, diloco, "
        "diloco_int8",
    )
    label: str | None = Field(None, description="what tables call the run; default: the method")
    model: Model = Field(description="the network")
    data: Data = Field(description="the data set")
    train: Train = Field(description="how the network is trained")
    partition: Partition = Field(default_factory=Partition, description="how hidden neurons are dealt to workers")
    recipe: Recipe = Field(default_factory=Recipe, description="how a run changes on its way")
    exchange: Exchange = Field(default_factory=Exchange, description="in how many bits IST's slices travel")
    baseline: Baseline = Field(default_factory=Baseline, description="settings of the other methods")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="how the whole network is evaluated")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="when the run is saved")
    pool: Pool = Field(default_factory=Pool, description="who carries subnets to workers")
    watch: Watch = Field(default_factory=Watch, description="who else is told about every round")
    compare: Compare = Field(default_factory=Compare, description="what `ist compare` runs")
    output: str = Field("runs", description="folder in which run folders are made")

    @model_validator(mode="after")
    def _one_capacity_a_worker(self) -> "Config":
        capacities = self.partition.capacities
        if self.method == "ist" and capacities is not None and len(capacities) != self.train.workers:
            raise ValueError(
                f"'partition.capacities' is {capacities}, {len(capacities)} numbers, but 'train.workers' is "
                f"{self.train.workers}: give one number for each worker"
            )
        if capacities is not None and self.train.is_elastic:
            raise ValueError(
                "'partition.capacities' gives every worker a number, but workers come and go (train.min_workers): use "
                "'partition.balance' speed, or a fixed number of workers"
            )
        return self

    @model_validator(mode="after")
    def _covers_every_neuron(self) -> "Config":
        train, partition = self.train, self.partition
        if self.method != "ist":
            return self
        keeps = {"partition.keep": partition.keep}
        keeps |= {f"recipe.stages.{number}.keep": stage.keep for number, stage in enumerate(self.recipe.stages)}
        fewest = train.min_workers or train.workers
        for key, keep in keeps.items():
            if keep is not None and partition.strategy == "disjoint" and keep * fewest < 1 - 1e-9:
                raise ValueError(
                    f"'{key}' is {keep}, but strategy 'disjoint' gives every neuron an owner, and {fewest} workers "
                    f"with {keep} each do not hold them all: give at least {1 / fewest:.3g}, or take strategy 'rolling'"
                )
            if keep not in (None, 1) and key != "partition.keep" and partition.strategy in ("categorical", "blocks"):
                raise ValueError(
                    f"'{key}' is {keep}, but strategy '{partition.strategy}' has no 'keep': only 1, the whole network, "
                    "makes sense there"
                )
        return self

    @property
    def workers_keep(self) -> bool:
        """Whether a worker has something of its own that outlasts a round."""
        return self.method == "ist" and (self.train.optimizer_state == "kept" or self.exchange.error_feedback)

    @model_validator(mode="after")
    def _keeps_what_it_needs(self) -> "Config":
        if self.exchange.error_feedback and self.partition.balance == "speed":
            raise ValueError(
                "'exchange.error_feedback' is true, but what rounding took is forgotten whenever shares change, which "
                "'partition.balance' speed does nearly every round: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_pool(self) -> "Config":
        kind = self.pool.kind
        if self.partition.balance == "speed" and kind == "torchrun" and self.method == "ist":
            raise ValueError("'partition.balance' is 'speed', which needs 'pool.kind' ray (or inline), not torchrun")
        if self.pool.round_deadline_s is not None and kind != "ray":
            raise ValueError(f"'pool.round_deadline_s' is for 'pool.kind' ray, not {kind}: no other pool can go on")
        if self.pool.ray != Ray() and kind != "ray":
            raise ValueError(f"'pool.ray' is set, but 'pool.kind' is {kind}: set it to ray, or leave 'pool.ray' out")
        if self.pool.memory_limit is not None and kind != "torchrun":
            raise ValueError(
                f"'pool.memory_limit' is '{self.pool.memory_limit}', which needs 'pool.kind' torchrun, whose workers "
                f"are processes of their own here, not {kind}"
            )
        if self.pool.link is not None and kind != "torchrun":
            raise ValueError(f"'pool.link' is '{self.pool.link}', which needs 'pool.kind' torchrun, not {kind}")
        if kind == "ray" and self.pool.device == "cuda" and self.pool.ray.num_gpus == 0:
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
        if not train.is_elastic or self.method != "ist":
            return self
        if self.partition.strategy == "blocks":
            raise ValueError(
                "strategy 'blocks' scales each block by the share of them that a worker holds, which must not change: "
                "leave 'train.min_workers' out"
            )
        if train.min_workers is not None and (self.pool.min_returned or 0) > train.min_workers:
            raise ValueError(
                f"'pool.min_returned' is {self.pool.min_returned}, but a round may begin with {train.min_workers} "
                "workers (train.min_workers)"
            )
        return self


def num_processes(config: Config) -> int:
    """Return how many processes the torchrun pool needs: the workers, and a coordinator that only coordinates.

    Data-parallel methods have no coordinator: their ranks are all workers.
    """
    dedicated = config.method == "ist" and config.pool.coordinator == "dedicated"
    return config.train.workers + (1 if dedicated else 0)


def min_returned(config: Config) -> int:
    """Return how many workers must come back from a round, lest the run end."""
    train, pool = config.train, config.pool
    if pool.min_returned is not None:
        return pool.min_returned
    if train.is_elastic:
        return train.min_workers or 1
    return -(-train.workers // 2) if pool.kind == "ray" else train.workers
