"""The control of the federated literature: the small network that fits into a worker's share, trained by every worker.

    python -m benchmarks.fitting configs/crime_mlp.yaml [--set data.root=.data/crime]

prints the command that trains it by local SGD. `benchmarks/dial.py` compares the two.

A worker of IST holds a share of a network, with its gradients and the optimizer's state. With the same memory it could
hold a full network of the same kind that is narrower. Trained by local SGD, with as many steps and as many exchanges,
that network costs a worker the same memory, about the same arithmetic and the same bytes as the share; so it is what
the share of the large network has to beat.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.held import held
from ist.config.load import load_config
from ist.config.schema import Config
from ist.data.registry import Splits
from ist.loops.local_loop import TaskLoop
from ist.optimization.factory import optimizer_factory
from ist.runs.build import build_job, build_network
from ist.subnet.job import Job, assignments, slot_of

Arguments = Mapping[str, Any]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Family:
    """The networks of a kind, by size.

    Attributes:
        size: Returns the size of the network with the given arguments.
        resized: Returns the arguments of the network of another size.
        step: Returns the number of which every size is a multiple.
    """

    size: Callable[[Arguments], int]
    resized: Callable[[Arguments, int], dict[str, Any]]
    step: Callable[[Arguments], int] = lambda _: 1


def _by(key: str, *others: str, multiple_of: Callable[[Arguments], int] = lambda _: 1) -> Family:
    """Return a family whose size is one argument; `others` are scaled with it."""

    def resized(arguments: Arguments, size: int) -> dict[str, Any]:
        scaled = {name: max(1, round(arguments[name] * size / arguments[key])) for name in others}
        return {**arguments, key: size, **scaled}

    return Family(lambda arguments: int(arguments[key]), resized, multiple_of)


def _resized_mlp(arguments: Arguments, size: int) -> dict[str, Any]:
    first, *hidden, last = arguments["widths"]
    return {**arguments, "widths": [first, *(max(1, round(width * size / hidden[0])) for width in hidden), last]}


FAMILIES = {
    "mlp": Family(lambda arguments: int(arguments["widths"][1]), _resized_mlp),
    "wide": _by("hidden"),
    "decoder": _by("width", "ffn", multiple_of=lambda arguments: int(arguments["heads"])),
    "preact_resnet": _by("width"),
    "torch_geometric.nn.models:GCN": _by("hidden_channels"),
    "torch_geometric.nn.models:GraphSAGE": _by("hidden_channels"),
    "transformers:LlamaForCausalLM": _by(
        "hidden_size", "intermediate_size", multiple_of=lambda arguments: 2 * int(arguments["num_attention_heads"])
    ),
}
"""By `model.name`: the networks among which the small one is chosen."""


def with_arguments(config: Config, arguments: Arguments) -> Config:
    """Return a configuration whose network has other arguments."""
    return config.model_copy(update={"model": config.model.model_copy(update={"args": dict(arguments)})})


def num_parameters(config: Config) -> int:
    """Return the number of parameters of a configuration's network."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_network(config).parameters())


def state_bytes(config: Config, parameters: float) -> int:
    """Return the bytes of that many float32 parameters with their gradients and the state of the optimizer."""
    probe = nn.Parameter(torch.zeros(1000))
    probe.grad = torch.ones_like(probe)
    optimizer = optimizer_factory(config.train.optimizer)({"probe": probe})
    optimizer.step()
    values = optimizer.state[probe].values()
    like_parameter = [value for value in values if getattr(value, "shape", None) == probe.shape]
    return round(4 * parameters * (2 + len(like_parameter)))


def resized(config: Config, factor: float) -> dict[str, Any]:
    """Return the arguments of the configuration's network at another width, relative to its own."""
    family, arguments = FAMILIES[config.model.name], config.model.args
    step = family.step(arguments)
    return family.resized(arguments, step * max(1, round(family.size(arguments) * factor / step)))


def fitting(config: Config, budget: int) -> dict[str, Any]:
    """Return the arguments of the widest network of the same kind that a worker can train within a budget.

    Args:
        config: The configuration of the large network.
        budget: The bytes of weights, gradients and optimizer state; see `state_bytes`.

    Raises:
        ValueError: The smallest network of the kind does not fit.
    """
    family, arguments = FAMILIES[config.model.name], config.model.args
    step = family.step(arguments)

    def fits(multiple: int) -> bool:
        resized = with_arguments(config, family.resized(arguments, multiple * step))
        return state_bytes(config, num_parameters(resized)) <= budget

    if not fits(1):
        raise ValueError(f"no '{config.model.name}' fits into {budget} bytes: the narrowest one is larger")
    fit, too_wide = 1, family.size(arguments) // step + 1
    while too_wide - fit > 1:
        middle = (fit + too_wide) // 2
        fit, too_wide = (middle, too_wide) if fits(middle) else (fit, middle)
    return family.resized(arguments, fit * step)


def run_flops(job: Job) -> int:
    """Return the floating-point operations of a worker's steps in a run, as torch counts them for matrix products.

    It is the sum over all rounds, of the worker with the largest share of each.
    """
    schedule = job.schedule
    if not job.config.method_spec.needs_groups:
        return schedule.total_steps * step_flops(job, job.task.build_copy())
    shares = assignments(job)
    known: dict[float, int] = {}
    total = 0
    for number in range(schedule.num_rounds):
        fraction = shares.held_fraction(number)
        if fraction not in known:
            neurons = max(shares.of(number), key=lambda held: sum(map(len, held)))
            known[fraction] = step_flops(job, job.split.module(neurons, CPU))
        total += len(schedule.steps(number)) * known[fraction]
    return total


def step_flops(job: Job, module: nn.Module) -> int:
    """Return the floating-point operations of a step on a worker's first batch."""
    loop = TaskLoop(job, slot_of(job, 0), CPU)
    rows = job.schedule.sampler.batch(0, 0)
    for tensor in module.parameters():
        nn.init.zeros_(tensor)
    with FlopCounterMode(display=False) as counter:
        loop.step.loss(module, loop.read(rows), lambda: loop.numbers(rows)).backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def small_network(config: Config, splits: Splits | None = None) -> dict[str, Any]:
    """Return the arguments of the small network that fits into the memory of a worker's share.

    Args:
        config: The configuration, with the stages in which workers hold the largest share.
        splits: The data, if they are already loaded.
    """
    job = build_job(config, splits)
    parameters = sum(parameter.numel() for parameter in job.split.template.parameters())
    return fitting(config, state_bytes(config, held(job).fraction * parameters))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for ist train")
    asked = parser.parse_args(arguments)
    # The control is for runs in which no worker ever holds the full network.
    config = load_config(asked.config, ["recipe.stages=[]", *asked.set])
    overrides = [*asked.set, "recipe.stages=[{keep: 1}]", f"model.args={json.dumps(small_network(config))}"]
    print(" ".join([f"ist train {asked.config}", *(f"--set '{override}'" for override in overrides)]))


if __name__ == "__main__":
    main()
