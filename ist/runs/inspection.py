"""What a split costs, in numbers and as text: groups, each worker's share of every tensor, and the bytes of a round.

Where it sits: `ist/runs/split.py` makes it, `ist inspect` prints it. Every number follows from the configuration, the
split network and the schedule alone; nothing is trained.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ist.config.methods import WHOLE_GRADIENTS, trained_sizes
from ist.config.schema import FROM_PYTHON, Config
from ist.neurons.group import Group, Slot
from ist.optimization.schedule import Schedule
from ist.subnet.assignments import Assignments
from ist.subnet.job import remote_workers
from ist.subnet.partition import coverage, is_full_width
from ist.subnet.split_model import ShapeKeys, SplitModel
from ist.tensors import TensorSpec, tensor_specs
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.frozen_parameters import frozen_bytes, message_bytes
from ist.transport.message import HEADER_BYTES

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StageLength:
    """A part of the run in which rounds are alike.

    Attributes:
        rounds: How many rounds it has.
        local_steps: Steps of a worker in its longest round.
        steps: Steps of a worker in all of them.
        whole: Whether every worker holds the whole network.
    """

    rounds: int
    local_steps: int
    steps: int
    whole: bool


@dataclass(frozen=True)
class TrainedIn:
    """In how many subnets of the run the neurons of a group are trained: (round, worker) pairs.

    Attributes:
        fewest: For the neuron that is trained least.
        most: For the neuron that is trained most.
    """

    fewest: int
    most: int


@dataclass(frozen=True)
class SplitGroup:
    """A neuron group that is split.

    Attributes:
        name: Its name, as `partition.exclude` takes it.
        title: What a person would call it.
        neurons: How many neurons it has.
        kind: What they are.
        neurons_per_worker: How many of them each worker holds.
        trained_in: In how many subnets of the run they are trained.
        slots: Where in the tensors they are.
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
class WholeGroup:
    """A neuron group that could be split and is not; `residual`: it is a residual stream."""

    name: str
    title: str
    residual: bool


@dataclass(frozen=True)
class TensorShares:
    """Each worker's part of a tensor.

    Attributes:
        name: Its name in the network's `state_dict`.
        shape: The whole tensor's shape.
        shapes_per_worker: The shape of each worker's part; None: it holds none.
        travels: Whether it goes to workers at all.
        frozen: Whether it is a parameter that is not trained.
        shared: Whether an entry may have two holders, so that it is averaged.
    """

    name: str
    shape: Shape
    shapes_per_worker: tuple[Shape | None, ...]
    travels: bool
    frozen: bool
    shared: bool


@dataclass(frozen=True)
class Share:
    """What a worker holds, and the bytes of its messages in a full round after the first.

    Attributes:
        worker: Which worker, from 0.
        parameters: How many numbers it holds.
        trained_parameters: Those of them that are trained.
        frozen_bytes: The message with its frozen parameters, in its first round.
        sent_bytes: The messages to it.
        returned_bytes: The message from it.
    """

    worker: int
    parameters: int
    trained_parameters: int
    frozen_bytes: int
    sent_bytes: int
    returned_bytes: int


@dataclass(frozen=True)
class RoundBytes:
    """Bytes of all messages of a round, both ways, over all links.

    Attributes:
        ist: Of a full round after the first, of the stage that is neither warm-up nor finish.
        ddp: Of data-parallel training in as many steps: its ring all-reduce sends 2 (n - 1) times the gradient a step.
        ratio: How many times more that is; None where IST sends nothing.
    """

    ist: int
    ddp: int
    ratio: float | None


@dataclass(frozen=True)
class Inspection:
    """What `ist inspect` shows; `ist inspect --json` prints these names.

    Attributes:
        model: The network's name.
        parameters: How many numbers it has.
        trained_parameters: Those of them that are trained.
        parameter_bytes: Their size.
        workers: How many subnets a round has.
        local_steps: Steps of a worker in a round.
        rounds: Length of the run.
        stages: Its parts in which rounds are alike, in order.
        steps_per_epoch: Steps of a worker in a pass over the data; None without data.
        strategy: How neurons are assigned.
        groups: Neuron groups that are split.
        left_whole: Neuron groups that could be split and are not.
        unknown_operators: Operators without a rule, and where they are: what reaches them is not split.
        kept_whole_by: What else keeps neurons whole.
        unreached: Parameters that the example does not reach.
        tensors: Each worker's part of every tensor.
        shares: What each worker holds and exchanges.
        header_bytes: Bytes of a message that are no weights.
        bytes_per_round: What a round sends.
        bytes_of_run: What the run sends, its stages considered, where no worker is lost.
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
    left_whole: tuple[WholeGroup, ...]
    unknown_operators: Mapping[str, str]
    kept_whole_by: tuple[str, ...]
    unreached: tuple[str, ...]
    tensors: tuple[TensorShares, ...]
    shares: tuple[Share, ...]
    header_bytes: int
    bytes_per_round: RoundBytes
    bytes_of_run: int


def inspect_split(
    config: Config, split: SplitModel, schedule: Schedule, held: Assignments, steps_per_epoch: int | None
) -> Inspection:
    """Return what a run splits and what that costs.

    Args:
        config: Every key of the configuration.
        split: The network and its groups.
        schedule: The rounds of the run.
        held: Who holds which neurons in each round.
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
        left_whole=_whole_groups(split),
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
        header_bytes=HEADER_BYTES,
        bytes_per_round=RoundBytes(ist, ddp, ddp / ist if ist else None),
        bytes_of_run=run_bytes(config, split, schedule, held),
    )


def run_bytes(config: Config, split: SplitModel, schedule: Schedule, held: Assignments) -> int:
    """Return what all messages of an IST run will have, its stages considered, where no worker is lost."""
    exchange, keys = config.exchange, ShapeKeys(split)
    known: dict[tuple[int, Hashable, bool], int] = {}
    total = 0
    for round_number in range(schedule.num_rounds):
        for worker in remote_workers(config):
            neurons = held.of(round_number)[worker]
            if split.frozen_specs:
                before = held.of(round_number - 1)[worker] if round_number > 0 else None
                total += frozen_bytes(split, exchange, neurons, before)
            key = (worker, keys.of(neurons), round_number > 0)
            if key not in known:
                layouts = message_layouts(split, exchange, split.cut(neurons))
                known[key] = down_bytes(split, layouts, round_number) + layouts.up.nbytes
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
    """Describe a worker's share; `plan` has the specs of its tensors."""
    neurons = held.of(schedule.main_round)[worker]
    return Share(
        worker,
        parameters=sum(math.prod(plan[name].shape) for name in parameters if name in plan),
        trained_parameters=sum(math.prod(plan[name].shape) for name in trained if name in plan),
        frozen_bytes=frozen_bytes(split, config.exchange, neurons, None),
        sent_bytes=message_bytes(split, schedule, config.exchange, held, worker)[0],
        returned_bytes=message_layouts(split, config.exchange, split.cut(neurons)).up.nbytes,
    )


def _stages(schedule: Schedule, held: Assignments) -> tuple[StageLength, ...]:
    """Describe the parts of the run in which rounds are alike, in order."""
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


def _whole_groups(split: SplitModel) -> tuple[WholeGroup, ...]:
    """Describe the groups that could be split and are not."""
    names = {group.name for group in split.groups}
    return tuple(
        WholeGroup(group.name, title(group), group.residual) for group in split.found.groups if group.name not in names
    )


def title(group: Group) -> str:
    """Return what a person would call a group: 'layer 3 attention: 12 heads, 64 wide'."""
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
