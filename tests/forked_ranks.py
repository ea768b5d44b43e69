"""Start a program as the ranks of a group on this machine: forks of one process that has loaded torch and `ist`.

    python -m tests.forked_ranks NUMBER PROGRAM [ARGUMENT ...] [-- NUMBER PROGRAM [ARGUMENT ...] ...]

The program finds what torchrun tells its ranks, and joins a real process group. Under torchrun every rank loads torch
for itself, which takes several seconds where ranks share two cores. Groups run one after the other.
Not here: what ranks do (`tests/baselines/program.py`, `tests/pools/scenario.py`).
"""

import itertools
import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch
import torch._dynamo  # the first optimizer step would load it, in every rank
import torch.distributed as dist

import ist.runs.open  # noqa: F401 (loaded once, for all ranks)
from tests.conftest import free_port


def run(rank: int, number: int, port: int, program: str, arguments: Sequence[str]) -> None:
    """Run the program as a rank."""
    of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in of_rank.items()}
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
    if dist.is_initialized():  # a fork does not run what is registered for the exit
        dist.destroy_process_group()


def run_all(number: int, program: str, arguments: Sequence[str]) -> bool:
    """Run a program as all ranks of a group, and return whether they end well; the first to fail ends the others."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    ranks: list[BaseProcess] = [
        fork.Process(target=run, args=(rank, number, port, program, arguments)) for rank in range(number)
    ]
    for rank in ranks:
        rank.start()
    running = ranks
    while running:
        wait([rank.sentinel for rank in running])
        running = [rank for rank in running if rank.is_alive()]
        if any(rank.exitcode for rank in ranks):
            for rank in running:
                rank.kill()
    return all(rank.exitcode == 0 for rank in ranks)


def main(words: Sequence[str]) -> int:
    """Run the groups, up to one that fails."""
    torch.set_num_threads(1)
    groups = [list(group) for ends, group in itertools.groupby(words, lambda word: word == "--") if not ends]
    return 0 if all(run_all(int(number), program, arguments) for number, program, *arguments in groups) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
