"""The split of a network among workers: the object that `ist.split` returns and `ist inspect` prints.

Where it sits: `ist/api.py` and `ist/cli/` create it from a split model or a job (`ist/runs/build.py`).
Not here: computing the numbers (`ist/runs/inspection.py`), training.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ist.data.shards.unequal import SkewedSampler
from ist.distributed.device import compute_device
from ist.errors import ConfigError
from ist.monitoring.display import PlainConsole, format_bytes, format_ratio, memory_tables
from ist.monitoring.meter import resident_bytes
from ist.network.compiled import plain_name
from ist.rng import Indices
from ist.runs.inspection import Inspection, RoundBytes, Shape, Share, SplitGroup, TensorShares, inspect_split
from ist.subnet.assignments import Assignments
from ist.subnet.cut import extract, positions
from ist.subnet.job import Job, assignments
from ist.subnet.split_model import SplitModel
from ist.tensors import named_tensors
from ist.training.memory_budget import count_step, memory_budgets


@dataclass(frozen=True, repr=False)
class Split:
    """The split of a network among workers. `ist.split` returns it; `print` shows the output of `ist inspect`.

    Attributes:
        inspection: All numbers, by name; `ist inspect --json` uses the same names.
        network: The network's groups and tensors.
        held: The neurons of each worker in each round.
        values: Returns the network's current tensors by name.

    Example:
        >>> from torch import nn, randn
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> split = ist.split(model, randn(2, 8), workers=4)
        >>> split.module(worker=1)
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
        >>> held = split.neurons(worker=1)["0"]
        >>> bool((split.module(worker=1)[0].weight == model[0].weight[held]).all())
        True
    """

    inspection: Inspection
    network: SplitModel
    held: Assignments
    values: Callable[[], Mapping[str, Tensor]]

    @property
    def groups(self) -> tuple[SplitGroup, ...]:
        """The neuron groups that are split, with the number of neurons of each worker."""
        return self.inspection.groups

    @property
    def shares(self) -> tuple[Share, ...]:
        """Each worker's parameters, and the bytes of its messages."""
        return self.inspection.shares

    @property
    def tensors(self) -> tuple[TensorShares, ...]:
        """Each worker's part of every tensor."""
        return self.inspection.tensors

    @property
    def bytes_per_round(self) -> RoundBytes:
        """Bytes of all messages of a round, and of data-parallel training for the same number of steps."""
        return self.inspection.bytes_per_round

    def neurons(self, worker: int, round_number: int = 0) -> dict[str, Indices]:
        """Return the neurons of a worker in a round: for each group's name, their indices (int64, sorted).

        Raises:
            ConfigError: The worker or the round does not exist.
        """
        neurons = self._held(worker, round_number)
        return {group.name: held for group, held in zip(self.network.groups, neurons, strict=True)}

    def module(self, worker: int, round_number: int = 0) -> nn.Module:
        """Return the subnet module that a worker trains in a round, on the CPU, with copies of the current values.

        During training, a worker also applies the scale of `train.activation_scale`.

        Raises:
            ConfigError: The worker or the round does not exist.
        """
        neurons = self._held(worker, round_number)
        module = self.network.module(neurons, torch.device("cpu"))
        cut = positions(self.network.groups, self.network.all_specs, neurons)
        whole = {name: tensor for name, tensor in self.values().items() if name in cut}
        extract(whole, cut, into={name: t.data for name, t in named_tensors(module).items() if name in whole})
        return module

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as `ist inspect --json` prints them."""
        return asdict(self.inspection)

    def print(self, console: Console) -> None:
        """Print groups, tensors, shares and bytes as tables."""
        print_inspection(self.inspection, console)

    def __str__(self) -> str:
        console = PlainConsole(file=io.StringIO())
        with console.capture() as captured:
            self.print(console)
        return captured.get().rstrip()

    def __repr__(self) -> str:
        found = self.inspection
        return f"<ist.Split of {found.model}: {len(found.groups)} groups, {found.workers} workers>"

    def _held(self, worker: int, round_number: int) -> Sequence[Indices]:
        for name, number, count in (
            ("worker", worker, self.inspection.workers),
            ("round_number", round_number, self.inspection.rounds),
        ):
            if not 0 <= number < count:
                raise ConfigError(f"{name} is {number}: give a number from 0 to {count - 1}")
        return self.held.of(round_number)[worker]


_MOST_CLASSES = 10


def split_of(job: Job, with_memory: bool = False) -> Split:
    """Return the split of a run's network, with the initial values.

    Args:
        job: The run.
        with_memory: Whether to predict the memory of its processes, which runs a step without values.
    """
    held = assignments(job)
    sampler = job.schedule.sampler
    inspection = inspect_split(job.config, job.split, job.schedule, held, sampler.steps_per_epoch)
    if isinstance(sampler, SkewedSampler):
        inspection = replace(inspection, samples_by_class=sampler.samples_by_class)
    if with_memory:
        held_bytes, device = resident_bytes(), compute_device(job.config.pool)
        memory = memory_budgets(job, count_step(job, device, with_activations=True))
        inspection = replace(inspection, memory=memory, held_bytes=held_bytes)
    return Split(inspection, job.split, held, lambda: values_of(job.task.build()))


def values_of(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's tensors by name, on the CPU and contiguous, for `extract`."""
    tensors = named_tensors(network).items()  # names in a compiled network have a prefix, which is removed below
    return {plain_name(name): tensor.detach().cpu().contiguous() for name, tensor in tensors}


def print_inspection(found: Inspection, console: Console) -> None:
    """Print the numbers of a split as tables."""
    some_frozen = found.trained_parameters < found.parameters
    frozen = f" ({found.trained_parameters:,} of them trained)" if some_frozen else ""
    epoch = f", {_counted(found.steps_per_epoch, 'step')} an epoch" if found.steps_per_epoch is not None else ""
    console.print(
        f"{found.model}: {found.parameters:,} parameters, {format_bytes(found.parameter_bytes)}{frozen}; "
        f"{_counted(found.workers, 'worker')}, {_counted(found.local_steps, 'local step')} a round, "
        f"{_counted(found.rounds, 'round')}{epoch}"
    )
    console.print(_group_table(found))
    for group in found.left_whole:
        console.print(f"Not split{' (a residual stream)' if group.residual else ''}: {group.title}")
    for operator, where in found.unknown_operators.items():
        console.print(f"No rule for operator {operator} in {where}: its inputs are not split")
    for cause in found.kept_whole_by:
        console.print(f"Neurons are not split because of {cause}")
    for name in found.unreached:
        console.print(f"Not reached by the example, so not split: {name}")
    console.print(_tensor_table(found))
    shares = Table("worker", "parameters", "sent to it", "sent back", title="A round, by worker", title_justify="left")
    for share in found.shares:
        shares.add_row(
            str(share.worker), f"{share.parameters:,}",
            format_bytes(share.sent_bytes), format_bytes(share.returned_bytes),
        )  # fmt: skip
    console.print(shares)
    if found.samples_by_class is not None:
        console.print(_class_table(found.samples_by_class))
    if found.rest is not None:
        most = max(share.frozen_bytes for share in found.shares)
        console.print(
            f"A worker computes the full network: it also holds all other neurons, frozen and encoded as {found.rest} "
            f"({format_bytes(most)}, sent in every round), and trains its own."
        )
    elif some_frozen:
        most = max(share.frozen_bytes for share in found.shares)
        console.print(
            f"Frozen parameters are sent to a worker in its first round (at most {format_bytes(most)}), and again when "
            "its part changes; the worker does not return them."
        )
    if found.memory is not None:
        parts = {name: budget.parts for name, budget in found.memory.items()}
        for table in memory_tables("Memory of a process in MB", parts):
            console.print(table)
        for note in dict.fromkeys(note for budget in found.memory.values() for note in budget.notes):
            console.print(f"{note[:1].upper()}{note[1:]}.")
        if found.held_bytes is not None:
            libraries = format_bytes(found.held_bytes)
            console.print(f"Interpreter, libraries and data take {libraries} more in each process, as in this one.")
    total = found.bytes_per_round
    console.print(f"A round sends {format_bytes(total.ist)} in all; data-parallel training sends ", end="")
    ratio = f": {format_ratio(total.ratio)} times more" if total.ratio else ""
    console.print(f"{format_bytes(total.ddp)} for the same steps{ratio}.")
    if total.inside:
        console.print(f"The ranks of each worker send each other {format_bytes(total.inside)} more (pool.inside).")
    if len(found.stages) > 1:
        for number, stage in enumerate(found.stages, start=1):
            part = stage.steps / sum(other.steps for other in found.stages)
            held = "the full network" if stage.whole else "its share"
            length = f"{_counted(stage.rounds, 'round')} of {_counted(stage.local_steps, 'step')}, {part:.0%} of all"
            console.print(f"Stage {number}: {length}; a worker holds {held}.")
    console.print(f"The run sends {format_bytes(found.bytes_of_run)} in {_counted(found.rounds, 'round')}.")


def _group_table(found: Inspection) -> Table:
    groups = Table("group", "each worker", "trained in", "lives in", title="Neuron groups", title_justify="left")
    for group in found.groups:
        places = dict.fromkeys(f"{s.tensor}[{':, ' * s.dim}*]" for s in group.slots)
        counts = _span([group.trained_in.fewest, group.trained_in.most])
        shown = ", ".join(places or group.modules)
        noun = "subnet" if counts == "1" else "subnets"
        groups.add_row(group.title, _span(group.neurons_per_worker), f"{counts} {noun}", shown)
    return groups


def _class_table(samples_by_class: Sequence[Sequence[int]]) -> Table:
    """Return each worker's samples of each class (data.skew); of many classes, only how many the worker has."""
    table = Table("worker", "samples", title="Samples of each class, by worker", title_justify="left")
    few = len(samples_by_class[0]) <= _MOST_CLASSES
    for column in map(str, range(len(samples_by_class[0]))) if few else ["classes"]:
        table.add_column(column)
    for worker, counts in enumerate(samples_by_class):
        shown = counts if few else [sum(count > 0 for count in counts)]
        table.add_row(*(f"{number:,}" for number in (worker, sum(counts), *shown)))
    return table


def _tensor_table(found: Inspection) -> Table:
    tensors = Table("tensor", "whole", "worker 0", "part", "merged by", title="Tensors", title_justify="left")
    for tensor in found.tensors:
        whole, share = tensor.shape, tensor.shapes_per_worker[0]
        part = math.prod(share) / max(1, math.prod(whole)) if share is not None else 0.0
        merged = ("mean" if tensor.shared else "owner") if tensor.travels else "stays: re-estimated"
        merged = "frozen" if tensor.frozen else merged
        tensors.add_row(tensor.name, _shape(whole), "none" if share is None else _shape(share), f"{part:.2%}", merged)
    return tensors


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _span(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _shape(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "scalar"
