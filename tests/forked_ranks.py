"""Start a program as the ranks of a group on this machine: forks of one process that has loaded torch and `ist`.

    python -m tests.forked_ranks NUMBER PROGRAM [ARGUMENT ...] [-- NUMBER PROGRAM [ARGUMENT ...] ...]
    python -m tests.forked_ranks    (serves the requests of its standard input, as `run_forked_ranks` in conftest.py writes them)

The program finds what torchrun tells its ranks, and joins a real process group. Under torchrun every rank loads torch
for itself, which takes several seconds where ranks share two cores. Groups run one after the other.
Not here: what ranks do (`tests/baselines/program.py`, `tests/pools/scenario.py`).
"""

import itertools
import json
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

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
    groups = [list(group) for ends, group in itertools.groupby(words, lambda word: word == "--") if not ends]
    return 0 if all(run_all(int(number), program, arguments) for number, program, *arguments in groups) else 1


def serve() -> None:
    """Run the groups of each request, a line of JSON, in a fork; print its process id, and its exit code when it ends."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _answer(json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _answer(request: Mapping[str, Any]) -> None:
    """Run groups in this process, a leader of its own process group, and end it."""
    code = 1
    try:
        os.setsid()
        for number, path in enumerate((os.devnull, request["out"], request["err"])):
            os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(request["environment"])
        code = main(request["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else serve())
