"""What `ist inspect` shows: groups, each worker's share of every tensor, and the bytes of a round.

Every number follows from the job alone; nothing is trained.
"""

import math
from collections.abc import Hashable
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from ist.config.methods import ring_bytes
from ist.monitoring.display import format_bytes, format_ratio
from ist.neurons.group import Group
from ist.subnet.job import Job, assignments, remote_workers
from ist.subnet.partition import coverage, holds_everything
from ist.subnet.split_model import ShapeKeys
from ist.tensors import tensor_specs
from ist.transport.endpoints import down_bytes, route_of
from ist.transport.frozen_parameters import frozen_bytes, message_bytes
from ist.transport.message import HEADER_BYTES


def inspect_job(job: Job) -> dict[str, Any]:
    """Return what a job splits and what that costs, as plain values for JSON.

    Bytes of a round are those of a full one after the first, of the stage that is neither warm-up nor finish.
    Data-parallel training makes as many steps in it, and its ring all-reduce sends 2 (n - 1) times the gradient a step,
    over all workers.
    """
    config, workers = job.config, job.config.train.workers
    whole = tensor_specs(job.split.template, with_statistics=True)
    main = job.schedule.main_round
    split, exchange, held = job.split, config.exchange, assignments(job)
    shares = [split.plan(neurons).specs for neurons in held.of(main)]
    parameters = {name: parameter.numel() for name, parameter in job.split.template.named_parameters()}
    exclusive = held.exclusive(main)
    routes = [route_of(split, exchange, split.cut(neurons)) for neurons in held.of(main)]
    out = [message_bytes(job, held, worker)[0] for worker in range(workers)]
    back = [route.up.nbytes for route in routes]
    trained = [name for name, parameter in job.split.template.named_parameters() if parameter.requires_grad]
    gradient = sum(whole[name].nbytes for name in trained)
    ist_bytes = sum(out[worker] + back[worker] for worker in remote_workers(job))
    local_steps = len(job.schedule.steps(main))
    ddp_bytes = round(workers * local_steps * ring_bytes(gradient, workers))
    return {
        "model": config.model.name,
        "parameters": sum(parameters.values()),
        "trained_parameters": sum(parameters[name] for name in trained),
        "parameter_bytes": sum(whole[name].nbytes for name in parameters),
        "workers": workers,
        "local_steps": local_steps,
        "rounds": job.schedule.num_rounds,
        "stages": _describe_stages(job),
        "steps_per_epoch": job.schedule.dealing.steps_per_epoch,
        "strategy": config.partition.strategy,
        "groups": _describe_groups(job),
        "left_whole": _describe_whole(job),
        "unknown_operators": dict(job.split.found.unknown),
        "kept_whole_by": list(job.split.found.causes),
        "unreached": list(job.split.found.unreached),
        "tensors": [
            {
                "name": name,
                "shape": list(spec.shape),
                "shapes_per_worker": [list(share[name].shape) if name in share else None for share in shares],
                "travels": name in job.split.specs or name in job.split.frozen_specs,
                "frozen": name in job.split.frozen_specs,
                "shared": name not in exclusive,
            }
            for name, spec in whole.items()
        ],
        "shares": [
            {
                "worker": worker,
                "parameters": sum(math.prod(share[name].shape) for name in parameters if name in share),
                "trained_parameters": sum(math.prod(share[name].shape) for name in trained if name in share),
                "frozen_bytes": frozen_bytes(split, exchange, held.of(main)[worker], None),
                "sent_bytes": out[worker],
                "returned_bytes": back[worker],
            }
            for worker, share in enumerate(shares)
        ],
        "header_bytes": HEADER_BYTES,
        "bytes_per_round": {
            "ist": ist_bytes,
            "ddp": ddp_bytes,
            "ratio": ddp_bytes / ist_bytes if ist_bytes else None,
        },
        "bytes_of_run": run_bytes(job),
    }


def run_bytes(job: Job) -> int:
    """Return what all messages of an IST run will have, its stages considered, where no worker is lost."""
    split, exchange, held, keys = job.split, job.config.exchange, assignments(job), ShapeKeys(job.split)
    known: dict[tuple[int, Hashable, bool], int] = {}
    total = 0
    for round_number in range(job.schedule.num_rounds):
        for worker in remote_workers(job):
            neurons = held.of(round_number)[worker]
            if split.frozen_specs:
                before = held.of(round_number - 1)[worker] if round_number > 0 else None
                total += frozen_bytes(split, exchange, neurons, before)
            key = (worker, keys.of(neurons), round_number > 0)
            if key not in known:
                route = route_of(split, exchange, split.cut(neurons))
                known[key] = down_bytes(split, route, round_number) + route.up.nbytes
            total += known[key]
    return total


def _describe_stages(job: Job) -> list[dict[str, Any]]:
    """Describe the parts of the run in which rounds are alike, in order."""
    described, held = [], assignments(job)
    for _, rounds in groupby(range(job.schedule.num_rounds), key=lambda number: job.schedule.spans[number].stage):
        numbers = list(rounds)
        steps = [len(job.schedule.steps(number)) for number in numbers]
        described.append(
            {
                "rounds": len(steps),
                "local_steps": max(steps),
                "steps": sum(steps),
                "whole": holds_everything(held.partition(numbers[0])),
            }
        )
    return described


def _describe_groups(job: Job) -> list[dict[str, Any]]:
    """Describe the groups that are split; `trained_in` counts (round, worker) pairs of the whole run, by neuron."""
    config = job.config
    held = assignments(job)
    shares = held.of(job.schedule.main_round)
    partitions = [held.partition(round_number) for round_number in range(job.schedule.num_rounds)]
    counts = coverage(job.split.groups, config.train.workers, config.seed, partitions)
    return [
        {
            "name": group.name,
            "title": title(group),
            "neurons": group.size,
            "kind": group.kind,
            "neurons_per_worker": [len(share[number]) for share in shares],
            "trained_in": {"fewest": int(count.min()), "most": int(count.max())},
            "slots": [asdict(slot) for slot in group.slots if slot.tensor in job.split.everything],
            "modules": list(group.modules),
        }
        for number, (group, count) in enumerate(zip(job.split.groups, counts, strict=True))
    ]


def _describe_whole(job: Job) -> list[dict[str, Any]]:
    """Describe the groups that could be split and are not."""
    split = {group.name for group in job.split.groups}
    return [
        {"name": group.name, "title": title(group), "residual": group.residual}
        for group in job.split.found.groups
        if group.name not in split
    ]


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


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """Print what `inspect_job` returns, for a person."""
    some_frozen = found["trained_parameters"] < found["parameters"]
    frozen = f" ({found['trained_parameters']:,} of them trained)" if some_frozen else ""
    console.print(
        f"{found['model']}: {found['parameters']:,} parameters, {format_bytes(found['parameter_bytes'])}{frozen}; "
        f"{found['workers']} workers, {found['local_steps']} local steps a round, {found['rounds']} rounds, "
        f"{found['steps_per_epoch']} steps an epoch"
    )
    console.print(_group_table(found))
    for group in found["left_whole"]:
        console.print(f"Left whole{' (a residual stream)' if group['residual'] else ''}: {group['title']}")
    for operator, where in found["unknown_operators"].items():
        console.print(f"No rule for operator {operator} in {where}: what reaches it is not split")
    for cause in found["kept_whole_by"]:
        console.print(f"Neurons are kept whole by {cause}")
    for name in found["unreached"]:
        console.print(f"Not reached by the example, so whole: {name}")
    console.print(_tensor_table(found))
    shares = Table("worker", "parameters", "sent to it", "sent back", title="A round, by worker", title_justify="left")
    for share in found["shares"]:
        shares.add_row(
            str(share["worker"]), f"{share['parameters']:,}",
            format_bytes(share["sent_bytes"]), format_bytes(share["returned_bytes"]),
        )  # fmt: skip
    console.print(shares)
    if some_frozen:
        most = max(share["frozen_bytes"] for share in found["shares"])
        console.print(
            f"Frozen parameters go to a worker in its first round ({format_bytes(most)} at most), and again when its "
            "part changes; they do not come back."
        )
    total = found["bytes_per_round"]
    console.print(f"A round sends {format_bytes(total['ist'])} in all; data-parallel training sends ", end="")
    ratio = f": {format_ratio(total['ratio'])} times more" if total["ratio"] else ""
    console.print(f"{format_bytes(total['ddp'])} for the same steps{ratio}.")
    if len(found["stages"]) > 1:
        for number, stage in enumerate(found["stages"], start=1):
            part = stage["steps"] / sum(other["steps"] for other in found["stages"])
            held = "the whole network" if stage["whole"] else "its share"
            length = f"{stage['rounds']} rounds of {stage['local_steps']} steps, {part:.0%} of all"
            console.print(f"Stage {number}: {length}; a worker holds {held}.")
    console.print(f"The run sends {format_bytes(found['bytes_of_run'])} in {found['rounds']} rounds.")


def _group_table(found: dict[str, Any]) -> Table:
    groups = Table("group", "each worker", "trained in", "lives in", title="Neuron groups", title_justify="left")
    for group in found["groups"]:
        places = dict.fromkeys(f"{s['tensor']}[{':, ' * s['dim']}*]" for s in group["slots"])
        counts = _span([group["trained_in"]["fewest"], group["trained_in"]["most"]])
        shown = ", ".join(places or group["modules"])
        groups.add_row(group["title"], _span(group["neurons_per_worker"]), f"{counts} subnets", shown)
    return groups


def _tensor_table(found: dict[str, Any]) -> Table:
    tensors = Table("tensor", "whole", "worker 0", "part", "merged by", title="Tensors", title_justify="left")
    for tensor in found["tensors"]:
        whole, share = tensor["shape"], tensor["shapes_per_worker"][0]
        part = math.prod(share) / max(1, math.prod(whole)) if share is not None else 0.0
        merged = ("mean" if tensor["shared"] else "owner") if tensor["travels"] else "stays: re-estimated"
        merged = "frozen" if tensor["frozen"] else merged
        tensors.add_row(
            tensor["name"], _shape(whole), "none" if share is None else _shape(share), f"{part:.2%}", merged
        )
    return tensors


def _span(sizes: list[int]) -> str:
    return str(sizes[0]) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
