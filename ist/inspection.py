"""What `ist inspect` shows: groups, each worker's share of every tensor, and the bytes of a round.

Every number follows from the job alone; nothing is trained.
"""

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from ist.display import format_bytes, format_ratio
from ist.groups import Group, tensor_specs
from ist.job import Job
from ist.partition import share_sizes
from ist.pool.wire import HEADER_BYTES


def inspect_job(job: Job) -> dict[str, Any]:
    """Return what a job splits and what that costs, as plain values for JSON.

    Bytes are those of one full round after the first. Data-parallel training makes the same number of steps
    in it, and its ring all-reduce sends 2 (n - 1) times the gradient a step, over all workers.
    """
    config, workers = job.config, job.config.train.workers
    whole = tensor_specs(job.template, with_statistics=True)
    shares = [job.narrow_specs(worker) for worker in range(workers)]
    parameters = {name: parameter.numel() for name, parameter in job.template.named_parameters()}
    layouts = [job.layout(worker) for worker in range(workers)]
    out = [layout.end_of(job.sent_names(1)) for layout in layouts]
    back = [layout.nbytes for layout in layouts]
    remote = range(1 if config.pool.coordinator == "trains" and config.pool.kind == "torchrun" else 0, workers)
    gradient = sum(whole[name].nbytes for name in parameters)
    ist_bytes = sum(out[worker] + back[worker] for worker in remote)
    ddp_bytes = 2 * (workers - 1) * gradient * config.train.local_steps
    return {
        "model": config.model.name,
        "parameters": sum(parameters.values()),
        "parameter_bytes": gradient,
        "workers": workers,
        "local_steps": config.train.local_steps,
        "rounds": job.num_rounds,
        "steps_per_epoch": job.dealing.steps_per_epoch,
        "groups": [_describe_group(group, workers) for group in job.groups],
        "tensors": [
            {
                "name": name,
                "shape": list(spec.shape),
                "shapes_per_worker": [list(share[name].shape) for share in shares],
                "travels": name in job.specs,
                "shared": name not in job.exclusive,
            }
            for name, spec in whole.items()
        ],
        "shares": [
            {
                "worker": worker,
                "parameters": sum(math.prod(shares[worker][name].shape) for name in parameters),
                "sent_bytes": out[worker],
                "returned_bytes": back[worker],
            }
            for worker in range(workers)
        ],
        "header_bytes": HEADER_BYTES,
        "bytes_per_round": {
            "ist": ist_bytes,
            "ddp": ddp_bytes,
            "ratio": ddp_bytes / ist_bytes if ist_bytes else None,
        },
    }


def _describe_group(group: Group, workers: int) -> dict[str, Any]:
    return {
        "name": group.name,
        "neurons": group.size,
        "neurons_per_worker": share_sizes(group.size, workers),
        "slots": [asdict(slot) for slot in group.slots],
    }


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """Print what `inspect_job` returns, for a person."""
    console.print(
        f"{found['model']}: {found['parameters']:,} parameters, {format_bytes(found['parameter_bytes'])}; "
        f"{found['workers']} workers, {found['local_steps']} local steps a round, {found['rounds']} rounds"
    )
    groups = Table("group", "neurons", "each worker", "lives in", title="Neuron groups", title_justify="left")
    for group in found["groups"]:
        places = ", ".join(f"{s['tensor']}[{':, ' * s['dim']}*]" for s in group["slots"])
        groups.add_row(group["name"], str(group["neurons"]), _span(group["neurons_per_worker"]), places)
    console.print(groups)
    tensors = Table("tensor", "whole", "worker 0", "part", "merged by", title="Tensors", title_justify="left")
    for tensor in found["tensors"]:
        whole, share = tensor["shape"], tensor["shapes_per_worker"][0]
        part = math.prod(share) / max(1, math.prod(whole))
        merged = ("mean" if tensor["shared"] else "owner") if tensor["travels"] else "stays: re-estimated"
        tensors.add_row(tensor["name"], _shape(whole), _shape(share), f"{part:.2%}", merged)
    console.print(tensors)
    shares = Table("worker", "parameters", "sent to it", "sent back", title="A round, by worker", title_justify="left")
    for share in found["shares"]:
        shares.add_row(
            str(share["worker"]), f"{share['parameters']:,}",
            format_bytes(share["sent_bytes"]), format_bytes(share["returned_bytes"]),
        )  # fmt: skip
    console.print(shares)
    total = found["bytes_per_round"]
    console.print(f"A round sends {format_bytes(total['ist'])} in all; data-parallel training sends ", end="")
    ratio = f": {format_ratio(total['ratio'])} times more" if total["ratio"] else ""
    console.print(f"{format_bytes(total['ddp'])} for the same steps{ratio}.")


def _span(sizes: list[int]) -> str:
    return str(sizes[0]) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
