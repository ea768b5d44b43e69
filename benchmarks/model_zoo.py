"""The architectures that IST can split, compared with Torch-Pruning's dependency graph on the same architectures.

    python -m benchmarks.model_zoo [--only NAME ...] [--without-torch-pruning]

Claim: IST splits at least 95 % of the architectures in `benchmarks/zoo/` (of transformers, timm, torch-geometric and
PyTorch; tiny, built from code, without downloaded weights) unchanged, splits none wrongly, and handles more than
Torch-Pruning.

A network *works* if groups are found and two checks pass. For 2 workers (the first share, the last, and one neuron of
each group) and for 3 (uneven shares), the outputs and gradients of the submodel equal those of the masked full network
in float64. And subnets that are written back untouched do not change the network, bit for bit. A network is *refused*
if IST does not train it, with a reason. The first check also runs at the start of each training, so a network that
fails it is refused and never trained wrongly. If only a part of a network can be split, the rest is not split and is
named.

Needs `make zoo`, which installs the packages that provide the networks.
"""

import argparse
import logging
import sys
import time
import warnings
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.common import write_result
from benchmarks.zoo import ENTRIES, Entry
from ist.checks.verify import verify_cuts
from ist.config.load import validate
from ist.errors import ISTError
from ist.neurons.group import Group
from ist.runs.build import make_job
from ist.subnet.cut import cut_specs, extract, reassemble
from ist.subnet.job import Job, assignments


def job_of(entry: Entry, workers: int, shared: list[str]) -> Job:
    """Build the job of training a network of the zoo; its data are never read."""
    config = validate(
        {
            "name": "zoo",
            "model": {"name": "zoo"},
            "data": {"name": "zoo"},
            "train": {
                "workers": workers,
                "rounds": 1,
                "local_steps": 1,
                "batch_size": 1,
                "optimizer": {"name": "SGD", "args": {"lr": 0.1}},
            },
            "partition": {"exclude": shared},
            "pool": {"kind": "inline", "device": "cpu"},
        },
        "model_zoo",
    )
    args, named = entry.inputs()
    network = entry.build()
    data = TensorDataset(torch.zeros(8, 1), torch.zeros(8))
    return make_job(config, network, lambda: network, data, None, nn.functional.cross_entropy, named or args)


def check_round_trip(job: Job) -> None:
    """Cut all subnets, write them back untouched, and compare.

    Raises:
        ISTError: A tensor has changed.
    """
    state = {
        name: tensor.contiguous()
        for name, tensor in job.task.build_copy().state_dict().items()
        if name in job.split.specs
    }
    before = {name: tensor.clone() for name, tensor in state.items()}
    cuts = assignments(job).cuts(0)
    parts: list[tuple[int, dict[str, Tensor]]] = []
    for worker, cut in enumerate(cuts):
        part = {
            name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in cut_specs(job.split.specs, cut).items()
        }
        extract(state, cut, into=part)
        parts.append((worker, part))
    reassemble(state, cuts, parts, assignments(job).exclusive(0))
    changed = [name for name in state if not torch.equal(state[name], before[name])]
    if changed:
        raise ISTError(f"a round trip changes {', '.join(changed)}")


def split_share(job: Job, groups: tuple[Group, ...]) -> float:
    """Return the fraction of the parameters' entries that are split among workers."""
    split = total = 0.0
    for name, parameter in job.split.template.named_parameters():
        shared = 1.0
        for dim, size in enumerate(parameter.shape):
            covered = sum(g.size * s.block for g in groups for s in g.slots if (s.tensor, s.dim) == (name, dim))
            shared *= 1 - covered / max(1, size)
        split += parameter.numel() * (1 - shared)
        total += parameter.numel()
    return split / total


def our_result(entry: Entry) -> dict[str, Any]:
    """Find, cut and check a network."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            job = job_of(entry, 2, [])
        except ISTError as error:
            return {"status": "refused", "reason": str(error)}
        try:
            checks = [job]
            small = [group.name for group in job.split.found.groups if group.size < 3]
            if len(small) < len(job.split.groups):
                checks.append(job_of(entry, 3, small))
            for checked in checks:
                verify_cuts(checked)
                check_round_trip(checked)
        except ISTError as error:
            return {"status": "refused", "reason": str(error)}
    split = {group.name for group in job.split.groups}
    return {
        "status": "works",
        "groups": len(job.split.groups),
        "kinds": dict(Counter(group.kind.split(",")[0] for group in job.split.groups)),
        "share": split_share(job, job.split.groups),
        "left_whole": [g.name for g in job.split.found.groups if g.name not in split and not g.residual],
        "residual": [g.name for g in job.split.found.groups if g.residual],
        "unknown": dict(job.split.found.unknown),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Check every network, print a table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(ENTRIES), choices=list(ENTRIES), metavar="NAME")
    parser.add_argument("--without-torch-pruning", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.only:
        results[name] = {"package": ENTRIES[name].package, **our_result(ENTRIES[name])}
        if not arguments.without_torch_pruning:
            from benchmarks.zoo.torch_pruning import torch_pruning_result

            theirs = torch_pruning_result(ENTRIES[name])
            results[name]["torch_pruning"] = {"status": theirs.status, "reason": theirs.reason}
        print(f"{name}: {results[name]['status']}", file=sys.stderr, flush=True)
    console = Console(width=150)
    console.print(table_of(results))
    console.print(summary_of(results))
    if len(arguments.only) == len(ENTRIES) and not arguments.without_torch_pruning:
        write_result("model_zoo", {"networks": results})


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    """Return the table of results."""
    table = Table("network", "package", "IST", "groups", "split", "not split, or why refused", "Torch-Pruning")
    for name, result in results.items():
        works = result["status"] == "works"
        rest = ", ".join(result["left_whole"][:2]) + (", ..." if len(result["left_whole"]) > 2 else "") if works else ""
        table.add_row(
            name, result["package"], result["status"], str(result["groups"]) if works else "",
            f"{result['share']:.0%}" if works else "", rest if works else result["reason"][:90],
            result.get("torch_pruning", {}).get("status", ""),
        )  # fmt: skip
    return table


def summary_of(results: dict[str, dict[str, Any]]) -> str:
    """Return the numbers of networks by result."""
    ours = Counter(result["status"] for result in results.values())
    theirs = Counter(result["torch_pruning"]["status"] for result in results.values() if "torch_pruning" in result)
    parts = [f"IST: {ours['works']} of {len(results)} work ({ours['works'] / len(results):.1%})"]
    parts.append(f"{ours['refused']} refused")
    if theirs:
        parts.append(f"Torch-Pruning: {theirs['works']} work, {theirs['wrong']} wrong, {theirs['fails']} fail")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
