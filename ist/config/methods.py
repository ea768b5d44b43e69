"""The methods of training and the pools of workers, as data: the only file that decides by their names.

A method is one entry of `METHODS` and one class; its own settings are keys of `Baseline`. All other files ask what a
method or a pool *can do* (`MethodSpec.needs_groups`, `PoolSpec.replaces_workers`), never for its name.

Where it sits: the configuration, the command line and `ist plan` read it without torch; `ist/runs/open.py` imports the
class that an entry names.
Not here: the methods themselves (`ist/training/coordinator.py`, `ist/baselines/`), seconds (`ist/plan/predict.py`).

Shape letters: n workers, B bytes that are all-reduced, P bytes of the trained parameters.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from ist.config.base import PositiveFloat, PositiveInt, Section
from ist.config.recipe import Outer


class DilocoOuter(Outer):
    """The outer optimizer of DiLoCo, with the learning rate and momentum of its paper."""

    lr: PositiveFloat = Field(default=0.7, description="learning rate: factor of the mean update of all ranks")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="Nesterov momentum on this update")


class Baseline(Section):
    """Settings of the baselines; `MethodSpec.keys` says which method uses which key."""

    powersgd_rank: PositiveInt = Field(default=1, description="rank of the approximation of a gradient matrix")
    powersgd_start: Annotated[int, Field(ge=2)] = Field(
        default=2, description="number of first steps whose gradients are not compressed (PyTorch needs 2)"
    )
    outer: DilocoOuter = Field(default_factory=DilocoOuter, description="the outer optimizer of DiLoCo")


RENAMED = {"baseline.outer_lr": "baseline.outer.lr", "baseline.outer_momentum": "baseline.outer.momentum"}
"""Keys of earlier versions and their new names; `ist/config/load.py` reads both."""


class ParameterSize(NamedTuple):
    """The size of a trained parameter: its shape, and the bytes of one of its numbers."""

    shape: tuple[int, ...]
    item_bytes: int = 4

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numbers * self.item_bytes


Sizes = Sequence[ParameterSize]
"""The sizes of the trained parameters, in the order in which their gradients are ready."""

Formula = Callable[[Sizes, Baseline], float]
"""Bytes as a function of the trained parameters and the settings."""

SCALE_BYTES = 4
"""A scale of a block is a float32."""

BLOCK = 1024
"""Numbers that share a scale if a vector is averaged with a few bits per number."""

MIN_COMPRESSION_RATE = 2
"""powerSGD_hook's default: a matrix is compressed if that makes it smaller by more than this factor."""


def ring_bytes(payload: float, num_workers: int) -> float:
    """Return the bytes that one rank sends, and receives, in a ring all-reduce of `payload` bytes."""
    return 2 * (num_workers - 1) / num_workers * payload


@dataclass(frozen=True)
class Collective:
    """How a method with equal ranks all-reduces.

    Attributes:
        every: 'step': in every step, during the backward pass; 'round': once per round, after the last step.
        payload: B, the bytes that one exchange all-reduces.
        memory: Bytes that a worker holds besides parameters, gradients, optimizer state and activations.
        passes: Estimated number of passes over P bytes of memory in one exchange, such as to divide a sum.
        calls: Number of consecutive all-reduces of one bucket or one exchange.
    """

    every: Literal["step", "round"]
    payload: Formula
    memory: Formula
    passes: int
    calls: int = 1

    def exchanges(self, local_steps: int) -> int:
        """Return the number of exchanges in a round."""
        return local_steps if self.every == "step" else 1

    def rank_bytes(
        self,
        sizes: Sizes,
        num_workers: int,
        local_steps: int,
        settings: Baseline | None = None,
        whole_steps: int = 0,
    ) -> float:
        """Return the bytes that one rank sends in a round.

        Args:
            sizes: Sizes of the trained parameters.
            num_workers: Number of ranks.
            local_steps: Steps of the round.
            settings: Settings of the method; None: the defaults.
            whole_steps: Steps of the round that all-reduce uncompressed gradients, such as PowerSGD's first steps.
        """
        compressed = (self.exchanges(local_steps) - whole_steps) * self.payload(sizes, settings or Baseline())
        return ring_bytes(compressed + whole_steps * parameter_bytes(sizes), num_workers)


@dataclass(frozen=True)
class MethodSpec:
    """A method of training.

    Attributes:
        name: Its name in `method` and `compare.methods`.
        title: A short description.
        implementation: Import path of its class. With a coordinator, it is created from (job, pool, model, meter,
            state); else each rank creates one from (job, membership, model, state, meter), and all ranks call
            `train_round` together.
        options: Further keyword arguments of the class.
        needs_groups: Whether it splits the network by groups of neurons.
        has_coordinator: Whether one process coordinates workers by messages; else all ranks are equal workers.
        pools: Pools on which it can run.
        fixed_workers: Why the number of workers must not change; None: it may change.
        collective: How its ranks all-reduce, for `ist plan`; None: they do not, or it is unknown.
        keys: Configuration keys or sections that only this method uses.
    """

    name: str
    title: str
    implementation: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_groups: bool = False
    has_coordinator: bool = False
    pools: tuple[str, ...] = ("torchrun",)
    fixed_workers: str | None = None
    collective: Collective | None = None
    keys: tuple[str, ...] = ()

    @property
    def can_be_planned(self) -> bool:
        """Whether `ist plan` knows its bytes: by formula, or by the messages of its subnets."""
        return self.collective is not None or self.needs_groups


def trained_sizes(parameters: Iterable[Any]) -> list[ParameterSize]:
    """Return the sizes of those of PyTorch's parameters that are trained."""
    return [ParameterSize(tuple(p.shape), p.element_size()) for p in parameters if p.requires_grad]


def parameter_bytes(sizes: Sizes, _settings: Baseline | None = None) -> float:
    """Return P."""
    return sum(size.nbytes for size in sizes)


def _numbers(sizes: Sizes) -> int:
    return sum(size.numbers for size in sizes)


def _vector_bytes(sizes: Sizes, _settings: Baseline) -> float:
    """Bytes of all parameters as one vector, of the widest dtype among them."""
    return _numbers(sizes) * max((size.item_bytes for size in sizes), default=0)


def _half(sizes: Sizes, _settings: Baseline) -> float:
    return 2 * _numbers(sizes)


def powersgd_bytes(sizes: Sizes, settings: Baseline) -> float:
    """Return the bytes that PowerSGD all-reduces in a step after its first steps.

    Reference: Vogels et al., arXiv 1905.13727; torch.distributed's `powerSGD_hook`.
    """
    return sum(_factor_bytes(size, settings.powersgd_rank) or size.nbytes for size in sizes)


def _factor_bytes(size: ParameterSize, rank: int) -> float:
    """Bytes of a matrix's two factors; 0 if it is not compressed, such as every vector."""
    if len(size.shape) < 2:
        return 0.0
    rows, columns = size.shape[0], math.prod(size.shape[1:])
    entries = (rows + columns) * min(rank, rows, columns)
    return size.item_bytes * entries if entries * MIN_COMPRESSION_RATE < rows * columns else 0.0


def _powersgd_memory(sizes: Sizes, settings: Baseline) -> float:
    factors = sum(_factor_bytes(size, settings.powersgd_rank) for size in sizes)
    return 2 * parameter_bytes(sizes) + factors  # the error that is fed back, the gradient before it was compressed


def int8_bytes(sizes: Sizes, _settings: Baseline | None = None) -> float:
    """Return the bytes of all parameters as int8, in blocks with a scale each; padding is left out."""
    return _numbers(sizes) * (1 + SCALE_BYTES / BLOCK)


def _nothing(_sizes: Sizes, _settings: Baseline) -> float:
    return 0.0


def _outer_state(sizes: Sizes, settings: Baseline) -> float:
    # The outer copy, its momentum, the change that is all-reduced.
    return 2 * parameter_bytes(sizes) + _vector_bytes(sizes, settings)


def _int8_state(sizes: Sizes, settings: Baseline) -> float:
    return _outer_state(sizes, settings) + 2 * int8_bytes(sizes)  # both ends hold int8 copies


WHOLE_GRADIENTS = Collective("step", parameter_bytes, _nothing, passes=2)  # gradients are views of the buckets
"""Data-parallel training as it is, against which `ist inspect` holds IST."""

_DDP = "ist.baselines.ddp:DataParallel"
_LOCAL = "ist.baselines.local_sgd:LocalTraining"
_OUTER = ("baseline.outer.lr", "baseline.outer.momentum")

METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec(
            "ist", "independent subnet training", "ist.training.coordinator:Coordinator",
            needs_groups=True, has_coordinator=True, pools=("inline", "torchrun", "ray"),
            keys=("partition", "exchange", "recipe.stages", "recipe.outer", "recipe.merge_scale"),
        ),
        MethodSpec(
            "ddp", "data-parallel training", _DDP, {"compression": "none"},
            collective=WHOLE_GRADIENTS,
        ),
        MethodSpec(
            "ddp_fp16", "data-parallel training with gradients in float16", _DDP, {"compression": "float16"},
            collective=Collective("step", _half, _half, passes=3),
        ),
        MethodSpec(
            "ddp_bf16", "data-parallel training with gradients in bfloat16", _DDP, {"compression": "bfloat16"},
            collective=Collective("step", _half, _half, passes=3),
        ),
        MethodSpec(
            "powersgd", "data-parallel training with low-rank gradients", _DDP, {"compression": "low_rank"},
            fixed_workers="whose errors it keeps",
            collective=Collective("step", powersgd_bytes, _powersgd_memory, passes=6, calls=3),
            keys=("baseline.powersgd_rank", "baseline.powersgd_start"),
        ),
        MethodSpec(
            "local_sgd", "local training of full networks, averaged every round", _LOCAL,
            {"has_outer_optimizer": False},
            collective=Collective("round", _vector_bytes, _vector_bytes, passes=4),
        ),
        MethodSpec(
            "diloco", "local SGD with an outer Nesterov step", _LOCAL, {"has_outer_optimizer": True},
            collective=Collective("round", _vector_bytes, _outer_state, passes=7), keys=_OUTER,
        ),
        MethodSpec(
            "diloco_int8", "DiLoCo with changes in int8", _LOCAL, {"has_outer_optimizer": True, "bits": 8},
            # An all-to-all of shards and an all-gather of their means send what a ring would.
            collective=Collective("round", int8_bytes, _int8_state, passes=12), keys=_OUTER,
        ),
    )
}  # fmt: skip
"""Methods by name, in the order of tables and messages; any other name is an import path."""


def method_spec(name: str) -> MethodSpec:
    """Return the entry of a method.

    A user's own method, given by an import path, has equal ranks and cannot be planned. An unknown name is treated
    alike; `ist/runs/open.py` refuses it when it imports the class.
    """
    return METHODS.get(name) or MethodSpec(name, "an import path", name)


def planned_methods() -> tuple[str, ...]:
    """Return the names of the methods that `ist plan` can plan."""
    return tuple(spec.name for spec in METHODS.values() if spec.can_be_planned)


def users_of(key: str) -> list[str]:
    """Return the names of the methods that use a configuration key."""
    return [spec.name for spec in METHODS.values() if key in spec.keys]


@dataclass(frozen=True)
class PoolSpec:
    """A pool of workers.

    Attributes:
        name: Its name in `pool.kind`.
        in_process: Whether all workers are in this process.
        is_launched: Whether a launcher starts the workers as a group of processes, one of which is this process.
        replaces_workers: Whether lost workers are replaced, so that a round can be repeated or continue without them.
        measures_speed: Whether shares can follow the measured speed of workers.
        reserves_processors: Whether a worker can use only the processors that are reserved for it.
        owns_shards: Whether its processes can own shards of the network, so that none holds the whole.
        groups_processes: Whether a worker can be several processes.
        package: A package that it needs; None: none.
        keys: Keys of the section `pool` that only this pool uses, and the reason.
    """

    name: str
    in_process: bool = False
    is_launched: bool = False
    replaces_workers: bool = False
    measures_speed: bool = False
    reserves_processors: bool = False
    owns_shards: bool = False
    groups_processes: bool = False
    package: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def coordinator_may_train(self) -> bool:
        """Whether the coordinating process can also be a worker."""
        return self.in_process or self.is_launched


POOLS: dict[str, PoolSpec] = {
    spec.name: spec
    for spec in (
        PoolSpec("inline", in_process=True, measures_speed=True),
        PoolSpec(
            "torchrun", is_launched=True, owns_shards=True, groups_processes=True,
            keys={
                "memory_limit": "only its workers are separate processes that this machine can limit",
                "message_buffers": "only its coordinator can use the memory of a message again for another worker",
                "link": "only its processes can run on simulated hosts",
            },
        ),
        PoolSpec(
            "ray", replaces_workers=True, measures_speed=True, reserves_processors=True, owns_shards=True,
            groups_processes=True, package="ray",
            keys={
                "store_replicas": "no other pool can replace a lost owner of a shard",
                "round_deadline_s": "no other pool can continue a round without a worker",
                "ray": "leave it out, or use that pool",
            },
        ),
    )
}  # fmt: skip
"""Pools by name."""
