"""The numbers of a split: groups, each worker's share of every tensor, and the bytes of a round and of the run.

Where it sits: `ist/runs/split.py` computes an `Inspection` and prints it for `ist inspect`. Every number follows from
the configuration, the split model and the schedule; nothing is trained.
Not here: printing (`ist/runs/split.py`), the split itself (`ist/runs/build.py`).
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ist.config.methods import WHOLE_GRADIENTS, trained_sizes
from ist.config.schema import FROM_PYTHON, Config
from ist.loops.inside import ddp_bytes, fsdp_bytes
from ist.neurons.group import Group, Slot
from ist.optimization.schedule import Schedule
from ist.subnet.assignments import Assignments
from ist.subnet.job import remote_workers
from ist.subnet.partition import coverage, is_full_width
from ist.subnet.split_model import ShapeKeys, SplitModel
from ist.tensors import TensorSpec, tensor_specs
from ist.training.memory_budget import MemoryBudget
from ist.transport.frozen_parameters import frozen_bytes
from ist.transport.message import header_bytes
from ist.transport.traffic import message_bytes, round_bytes, stores_for

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StageLength:
    """A stage of the run.

    Attributes:
        rounds: Number of rounds.
        local_steps: Steps of a worker in the longest round of the stage.
        steps: Steps of a worker in all its rounds.
        whole: Whether every worker holds the full network (a full-width phase).
    """

    rounds: int
    local_steps: int
    steps: int
    whole: bool


@dataclass(frozen=True)
class TrainedIn:
    """In how many subnets of the run, as (round, worker) pairs, the neurons of a group are trained.

    Attributes:
        fewest: The number for the neuron that is trained least.
        most: The number for the neuron that is trained most.
    """

    fewest: int
    most: int


@dataclass(frozen=True)
class SplitGroup:
    """A neuron group that is split.

    Attributes:
        name: The group's name, as in `partition.exclude`.
        title: A readable name.
        neurons: Number of neurons.
        kind: The kind of neurons.
        neurons_per_worker: Number of neurons of each worker.
        trained_in: In how many subnets of the run the neurons are trained.
        slots: The positions of the neurons in tensors.
        modules: Paths of modules that are assigned as neurons.
    """

    name: str
    title: str
    neurons: int
    kind: str
    neurons_per_worker: tuple[int, ...]
    trained_in: TrainedIn
    slots: tuple[Slot, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class UnsplitGroup:
    """A neuron group that could be split but is not; `residual`: whether it is a residual stream."""

    name: str
    title: str
    residual: bool


@dataclass(frozen=True)
class TensorShares:
    """Each worker's part of a tensor.

    Attributes:
        name: The tensor's name in the network's `state_dict`.
        shape: The shape of the full tensor.
        shapes_per_worker: The shape of each worker's part; None: the worker has no part.
        travels: Whether the tensor is sent to workers.
        frozen: Whether it is a parameter that is not trained.
        shared: Whether two workers may hold the same entry, so that the merge averages it.
    """

    name: str
    shape: Shape
    shapes_per_worker: tuple[Shape | None, ...]
    travels: bool
    frozen: bool
    shared: bool


@dataclass(frozen=True)
class Share:
    """The size of a worker's subnet, and the bytes of its messages in a full round after the first.

    Attributes:
        worker: The worker's number, from 0.
        parameters: Number of parameters (single numbers) in its subnet.
        trained_parameters: Number of those that are trained.
        frozen_bytes: Bytes of the message with its frozen parameters, in its first round; and with the frozen rest of
            the network, in every round.
        sent_bytes: Bytes of the messages to the worker.
        returned_bytes: Bytes of the message from the worker.
    """

    worker: int
    parameters: int
    trained_parameters: int
    frozen_bytes: int
    sent_bytes: int
    returned_bytes: int


@dataclass(frozen=True)
class RoundBytes:
    """Bytes of all messages of a round, in both directions, over all links.

    Attributes:
        ist: Bytes of a full round after the first, in the stage that is neither warm-up nor full-width phase.
        ddp: Bytes of data-parallel training for the same number of steps: a ring all-reduce sends 2 (n - 1) times the
            gradient in each step.
        ratio: `ddp` / `ist`; None if IST sends nothing.
        inside: Bytes that the ranks of all workers send to other ranks of their worker, which `ist` does not count; at
            most so many with `pool.inside` fsdp. None if the number of ranks depends on the launcher.
    """

    ist: int
    ddp: int
    ratio: float | None
    inside: int | None = 0


@dataclass(frozen=True)
class Inspection:
    """What `ist inspect` shows; `ist inspect --json` prints these names.

    Attributes:
        model: The network's name.
        parameters: Number of parameters (single numbers).
        trained_parameters: Number of those that are trained.
        parameter_bytes: Bytes of all parameters.
        workers: Number of subnets in a round.
        local_steps: Steps of a worker in a round.
        rounds: Number of rounds of the run.
        stages: The stages of the run, in order.
        steps_per_epoch: Steps of a worker in a pass over the data; None without data.
        strategy: The strategy that assigns neurons to workers.
        groups: Neuron groups that are split.
        left_whole: Neuron groups that could be split but are not.
        unknown_operators: Operators without a rule, and their places: neurons that reach them are not split.
        kept_whole_by: Other reasons why neurons are not split.
        unreached: Parameters that the example does not reach.
        tensors: Each worker's part of every tensor.
        shares: The size and the messages of each worker's subnet.
        header_bytes: Bytes of a message's header.
        bytes_per_round: Bytes of a round.
        bytes_of_run: Bytes of the run, including all stages, if no worker is lost.
        samples_by_class: With `data.skew`, the number of each worker's samples of each class, in the order of class
            numbers; else None.
        memory: The predicted memory of a worker, and of the coordinator; None if it was not predicted.
        held_bytes: Memory that this process held after the split was made: interpreter, libraries and data; None if it
            was not measured.
        rest: The encoding of the frozen rest of the network that workers hold; None if they lack it.
    """

    model: str
    parameters: int
    trained_parameters: int
    parameter_bytes: int
    workers: int
    local_steps: int
    rounds: int
    stages: tuple[StageLength, ...]
    steps_per_epoch: int | None
    strategy: str
    groups: tuple[SplitGroup, ...]
    left_whole: tuple[UnsplitGroup, ...]
    unknown_operators: Mapping[str, str]
    kept_whole_by: tuple[str, ...]
    unreached: tuple[str, ...]
    tensors: tuple[TensorShares, ...]
    shares: tuple[Share, ...]
    header_bytes: int
    bytes_per_round: RoundBytes
    bytes_of_run: int
    samples_by_class: tuple[tuple[int, ...], ...] | None = None
    memory: Mapping[str, MemoryBudget] | None = None
    held_bytes: int | None = None
    rest: str | None = None


def inspect_split(
    config: Config, split: SplitModel, schedule: Schedule, held: Assignments, steps_per_epoch: int | None
) -> Inspection:
    """Return the numbers of a run's split.

    Args:
        config: The configuration.
        split: The network and its groups.
        schedule: The rounds of the run.
        held: The neurons of each worker in each round.
        steps_per_epoch: Steps of a worker in a pass over the data; None without data.
    """
    workers, main = config.train.workers, schedule.main_round
    whole = tensor_specs(split.template, with_statistics=True)
    parameters = {name: parameter.numel() for name, parameter in split.template.named_parameters()}
    trained = [name for name, parameter in split.template.named_parameters() if parameter.requires_grad]
    plans = [split.submodel_plan(neurons).specs for neurons in held.of(main)]
    exclusive = held.exclusive(main)
    shares = tuple(
        _share(config, split, schedule, held, worker, [*parameters], trained, plan) for worker, plan in enumerate(plans)
    )
    local_steps = len(schedule.steps(main))
    ist = sum(shares[worker].sent_bytes + shares[worker].returned_bytes for worker in remote_workers(config))
    ddp = round(workers * WHOLE_GRADIENTS.rank_bytes(trained_sizes(split.template.parameters()), workers, local_steps))
    return Inspection(
        model=config.model.name.removeprefix(FROM_PYTHON),
        parameters=sum(parameters.values()),
        trained_parameters=sum(parameters[name] for name in trained),
        parameter_bytes=sum(whole[name].nbytes for name in parameters),
        workers=workers,
        local_steps=local_steps,
        rounds=schedule.num_rounds,
        stages=_stages(schedule, held),
        steps_per_epoch=steps_per_epoch,
        strategy=config.partition.strategy,
        groups=_groups(config, split, schedule, held),
        left_whole=_unsplit_groups(split),
        unknown_operators=dict(split.found.unknown),
        kept_whole_by=tuple(split.found.causes),
        unreached=tuple(split.found.unreached),
        tensors=tuple(
            TensorShares(
                name,
                tuple(spec.shape),
                tuple(tuple(plan[name].shape) if name in plan else None for plan in plans),
                travels=name in split.specs or name in split.frozen_specs,
                frozen=name in split.frozen_specs,
                shared=name not in exclusive,
            )
            for name, spec in whole.items()
        ),
        shares=shares,
        header_bytes=header_bytes(split.num_logged),
        bytes_per_round=RoundBytes(
            ist, ddp, ddp / ist if ist else None, _inside_bytes(config, local_steps, shares, plans, parameters, trained)
        ),
        bytes_of_run=run_bytes(config, split, schedule, held),
        rest=config.exchange.rest if held.has_rest(main) else None,
    )


def _inside_bytes(
    config: Config,
    steps: int,
    shares: Sequence[Share],
    plans: Sequence[Mapping[str, TensorSpec]],
    parameters: Iterable[str],
    trained: Iterable[str],
) -> int | None:
    """Return the bytes that the ranks of all workers send to other ranks of their worker in a round."""
    ranks, total = config.pool.ranks_per_worker, 0
    if ranks == 1 or not isinstance(ranks, int):
        return 0 if ranks == 1 else None
    for share, plan in zip(shares, plans, strict=True):
        held, learnt = (sum(plan[name].nbytes for name in names if name in plan) for names in (parameters, trained))
        total += (ranks - 1) * share.sent_bytes
        if config.pool.inside == "fsdp":
            passes, may_be_gloo = steps * config.train.accumulate, config.pool.backend != "nccl"
            total += fsdp_bytes(ranks, passes, held, held, learnt, may_be_gloo)
        else:
            total += ddp_bytes(ranks, steps, learnt)
    return total


def run_bytes(config: Config, split: SplitModel, schedule: Schedule, held: Assignments) -> int:
    """Return the bytes of all messages of an IST run, including all stages, if no worker is lost."""
    keys = ShapeKeys(split)
    known: dict[tuple[Hashable, ...], int] = {}
    total = 0
    for round_number in range(schedule.num_rounds):
        for worker in remote_workers(config):
            neurons = held.of(round_number)[worker]
            before = held.of(round_number - 1)[worker] if round_number > 0 else None
            rest = held.has_rest(round_number, neurons), before is not None and held.has_rest(round_number - 1, before)
            if split.frozen_specs or config.store_is_sharded:  # the neurons' numbers count
                total += sum(round_bytes(config, split, worker, neurons, before, round_number, *rest))
                continue
            key = (worker, keys.of(neurons), round_number > 0, *rest)
            if key not in known:
                known[key] = sum(round_bytes(config, split, worker, neurons, before, round_number, *rest))
            total += known[key]
    return total


def _share(
    config: Config,
    split: SplitModel,
    schedule: Schedule,
    held: Assignments,
    worker: int,
    parameters: Sequence[str],
    trained: Sequence[str],
    plan: Mapping[str, TensorSpec],
) -> Share:
    """Describe a worker's share; `plan` contains the specs of its tensors."""
    neurons = held.of(schedule.main_round)[worker]
    sent, returned = message_bytes(config, split, schedule, held, worker)
    return Share(
        worker,
        parameters=sum(math.prod(plan[name].shape) for name in parameters if name in plan),
        trained_parameters=sum(math.prod(plan[name].shape) for name in trained if name in plan),
        frozen_bytes=sum(
            frozen_bytes(store, config.exchange, neurons, None, held.has_rest(schedule.main_round, neurons))
            for store in stores_for(config, split, worker)
        ),
        sent_bytes=sent,
        returned_bytes=returned,
    )


def _stages(schedule: Schedule, held: Assignments) -> tuple[StageLength, ...]:
    """Describe the stages of the run, in order."""
    described = []
    for _, rounds in groupby(range(schedule.num_rounds), key=lambda number: schedule.spans[number].stage):
        numbers = list(rounds)
        steps = [len(schedule.steps(number)) for number in numbers]
        whole = is_full_width(held.partition(numbers[0]))
        described.append(StageLength(len(steps), max(steps), sum(steps), whole))
    return tuple(described)


def _groups(config: Config, split: SplitModel, schedule: Schedule, held: Assignments) -> tuple[SplitGroup, ...]:
    """Describe the groups that are split."""
    shares = held.of(schedule.main_round)
    partitions = [held.partition(round_number) for round_number in range(schedule.num_rounds)]
    counts = coverage(split.groups, config.train.workers, config.seed, partitions)
    return tuple(
        SplitGroup(
            group.name,
            title(group),
            group.size,
            group.kind,
            neurons_per_worker=tuple(len(share[number]) for share in shares),
            trained_in=TrainedIn(int(count.min()), int(count.max())),
            slots=tuple(slot for slot in group.slots if slot.tensor in split.all_specs),
            modules=tuple(group.modules),
        )
        for number, (group, count) in enumerate(zip(split.groups, counts, strict=True))
    )


def _unsplit_groups(split: SplitModel) -> tuple[UnsplitGroup, ...]:
    """Describe the groups that could be split but are not."""
    names = {group.name for group in split.groups}
    return tuple(
        UnsplitGroup(group.name, title(group), group.residual)
        for group in split.found.groups
        if group.name not in names
    )


def title(group: Group) -> str:
    """Return a readable name of a group, such as 'layer 3 attention: 12 heads, 64 wide'."""
    what = group.kind if group.kind.startswith("groups") else group.kind.removeprefix("attention ")
    words: list[str] = []
    for part in group.name.split("."):
        if part.isdigit() and words:
            words[-1] = f"{_PLAIN.get(words[-1], words[-1])} {part}"
        else:
            words.append(_PLAIN.get(part, part))
    last = words[-1]
    skipped = {"model", "transformer", "encoder_stack", "net", "backbone"}
    path = " ".join(word for word in words if word not in skipped or word == last)
    return f"{path}: {group.size} {what}"


_PLAIN = {
    "h": "layer", "layers": "layer", "layer": "layer", "blocks": "block", "block": "block", "self_attn": "attention",
    "attn": "attention", "attention": "attention", "mlp": "feed-forward", "ffn": "feed-forward",
    "feed_forward": "feed-forward", "intermediate": "feed-forward",
}  # fmt: skip
