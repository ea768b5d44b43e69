"""Sections of the configuration about how a run is executed: processes and links, checkpoints, monitoring.

Where it sits: `ist/config/schema.py` has these sections in `Config`; `ist/launch/lab_hosts.py` creates links with the
rates of a `Link`.
Not here: what is trained and by which method (`schema.py`, `partition.py`, `recipe.py`, `methods.py`). Imports neither
torch nor ray.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from ist.config.base import (
    Component,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
)
from ist.config.methods import POOLS, PoolSpec
from ist.errors import ConfigError

LEAST_MBIT, MOST_MBIT = 10, 10_000
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(mbit|gbit)")


@dataclass(frozen=True)
class Link:
    """The rates of a host's link, from the host's view.

    Attributes:
        up_mbit: Rate at which the host sends, in Mbit/s (10^6 bits), including Ethernet, IP and TCP headers; 10 to
            10,000.
        down_mbit: Rate at which it receives, in the same unit.
    """

    up_mbit: float
    down_mbit: float

    def __str__(self) -> str:
        """Return the text that `parse_link` reads back."""
        up, down = _rate_text(self.up_mbit), _rate_text(self.down_mbit)
        return up if up == down else f"{up}/{down}"


def parse_link(text: str, least_mbit: float = LEAST_MBIT) -> Link:
    """Parse a link: `100mbit` in both directions, or `20mbit/100mbit` up/down; `1gbit` is 1000 Mbit/s.

    Args:
        text: The user's text.
        least_mbit: Slowest allowed rate; default: the slowest rate that simulated hosts support.

    Raises:
        ConfigError: The text has another form, or the rate is below `least_mbit` or above 10 Gbit/s.
    """
    rates = []
    parts = text.split("/")
    for part in parts:
        match = _RATE.fullmatch(part)
        if match is None or len(parts) > 2:
            raise ConfigError(
                f"'{text}' is not a link rate: expected '100mbit', '1gbit', or up/down such as '20mbit/100mbit'"
            )
        mbit = float(match[1]) * (1000 if match[2] == "gbit" else 1)
        if not least_mbit <= mbit <= MOST_MBIT:
            raise ConfigError(f"link rate '{part}' is out of range: expected {_rate_text(least_mbit)} to 10gbit")
        rates.append(mbit)
    return Link(rates[0], rates[-1])


def checked_link(text: str) -> str:
    """Return a link in its canonical notation; the validator of `pool.link`.

    Raises:
        ValueError: The text is not a link, or its rate is out of range.
    """
    try:
        return str(parse_link(text))
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _rate_text(mbit: float) -> str:
    return f"{mbit / 1000:.15g}gbit" if mbit >= 1000 else f"{mbit:.15g}mbit"


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
        "fsspec's configuration. A URL needs room for one checkpoint in the folder of temporary files (TMPDIR)",
    )

    def is_due(self, rounds_done: int) -> bool:
        """Return whether to save after this many rounds; the caller saves the last round in any case."""
        return rounds_done % self.every == 0


class Loader(Section):
    """How a worker reads its batches: by itself, or ahead of time in loader processes (torch.utils.data.DataLoader).

    Example:
        >>> ist.Loader(workers=4, pin_memory=True).prefetch
        2
    """

    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0,
        description="loader processes of each worker; they stay during the whole run, and the samples of each step are "
        "the same for any number of them. 'pool.memory_limit' limits each of them as it limits the worker. 0: the "
        "worker reads its batches itself",
    )
    prefetch: PositiveInt = Field(default=2, description="batches that each loader process reads ahead")
    pin_memory: bool = Field(
        default=False, description="copy batches for a GPU to pinned memory first; no effect on a CPU"
    )
    timeout_s: Seconds | None = Field(
        default=None, description="seconds to wait for a batch of a loader process; default: no limit"
    )
    start_method: Literal["fork", "spawn", "forkserver"] | None = Field(
        default=None,
        description="how loader processes are started; all but 'fork' need data that can be pickled. Default: Python's",
    )


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
    num_cpus: NonNegativeFloat = Field(default=1.0, description="CPUs that Ray reserves for each actor of a worker")
    num_gpus: NonNegativeFloat = Field(default=0.0, description="GPUs that Ray reserves for each actor of a worker")
    resources: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description="custom resources that Ray reserves for each actor of a worker, such as {spot: 1}",
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
    store: Literal["coordinator", "sharded"] = Field(
        default="coordinator",
        description="where the full network is stored. 'coordinator': in one process, of rank 0 or of Ray's driver; "
        "'sharded': n owners have 1/n of the rows of every tensor each, so that no process holds the network and no "
        "link carries all subnets. Under torchrun every rank is an owner; on ray the owners are actors, as many as "
        "workers",
    )
    store_replicas: Annotated[int, Field(ge=1, le=2)] = Field(
        default=1,
        description="ray with store 'sharded': copies of every owner's rows. 1: if an owner is lost, all rows are "
        "restored from the last checkpoint, and the rounds since then are trained again; 2: another owner has a copy "
        "of its rows after every round, so that only the running round is repeated",
    )
    evaluation: Literal["layers", "whole"] | None = Field(
        default=None,
        description="with store 'sharded': what rank 0 holds of the network when it evaluates it. 'layers': one tensor "
        "at a time, which it fetches from the owners whenever the forward uses it, so that no process holds the "
        "network; every batch then costs the bytes of the network, so use few large batches. 'whole': rank 0 gathers "
        "the network for each evaluation, and rank 0 keeps that memory. Default: 'layers'; a GPU needs 'whole'",
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
        "GPU's memory; on a CPU, in addition to interpreter, libraries and data (Linux: RLIMIT_DATA, which counts what "
        "is allocated, touched or not). Workers that 'ist train' starts have it before Python starts; other ranks have "
        "it from their first round. A dedicated coordinator is not limited. Default: no limit",
    )
    message_buffers: Annotated[int, Field(gt=0, le=1024)] | None = Field(
        default=None,
        description="torchrun: the most messages that the coordinator holds at once, for a network whose messages need "
        "much of its memory. It then sends the subnets one after the other, and receives results in the order of "
        "workers, so a worker with a slow link delays the others. Not with nccl, and not with store 'sharded', which "
        "sends small pieces. Default: one for each worker",
    )
    ranks_per_worker: Annotated[int, Field(gt=0, le=1024)] | Literal["node"] = Field(
        default=1,
        description="torchrun, ray: processes that train one subnet together, each on its part of the worker's batch, "
        "such as one for each GPU of a node; the first one communicates with the coordinator. Under torchrun, worker w "
        "has consecutive ranks, and a run needs 'train.workers' times as many processes; 'node': as many as the "
        "launcher has started on each node (LOCAL_WORLD_SIZE). On ray, a worker has as many actors, on one node, each "
        "with the resources of 'pool.ray'",
    )
    inside: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="torchrun, ray: how the ranks of a worker train its subnet. 'ddp': each holds all of it, and "
        "gradients are averaged (PyTorch's DistributedDataParallel); 'fsdp': parameters, gradients and optimizer state "
        "are sharded among them (PyTorch's fully_shard)",
    )
    link: Annotated[str, AfterValidator(checked_link)] | None = Field(
        default=None,
        description="torchrun: run every process (all ranks of a worker) on its own simulated host on this machine, "
        "with a link of this rate: "
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
    """What receives every round's numbers.

    Example:
        >>> stopping = {"name": "early_stopping", "args": {"patience": 5}}
        >>> watch = ist.Watch(metrics_port=9464, callbacks=["wandb", stopping])
        >>> watch.metrics_host, [callback.name for callback in watch.callbacks]
        ('127.0.0.1', ['wandb', 'early_stopping'])
    """

    tensorboard: bool = Field(
        default=False, description="write TensorBoard event files to tensorboard/ in the run folder"
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        default=None, description="serve metrics for Prometheus on this port during the run; 0 picks a free port"
    )
    metrics_host: str = Field(default="127.0.0.1", description="address on which metrics are served")
    callbacks: list[Component] = Field(
        default_factory=list,
        description="callbacks of the run: early_stopping, mlflow, profiler, ray_tune, wandb, or import paths of "
        "subclasses of ist.Callback; each is a name, or {name: ..., args: {...}}",
    )

    @field_validator("callbacks", mode="before")
    @classmethod
    def _names_are_callbacks(cls, callbacks: Any) -> Any:
        if not isinstance(callbacks, list | tuple):
            return callbacks
        return [{"name": given} if isinstance(given, str) else given for given in callbacks]
