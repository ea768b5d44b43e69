"""Faults at every phase of a round: the run ends as one in which just that worker's part was left out of that round."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from torch import Tensor

from ist.loops.part import completed
from ist.monitoring.meter import MemoryGauge, Meter
from ist.pools.inline import InlinePool
from ist.pools.ray_pool import RayPool
from ist.runs.build import build_job
from ist.runs.recorder import RunRecorder
from ist.storage.checkpoint import Progress, read_tensors
from ist.subnet.job import Job
from ist.training.coordinator import Coordinator
from ist.training.rounds import run_rounds
from ist.transport.interfaces import Lost, Subnet
from tests.conftest import ROOT, Run, assert_same, clone, config_tree, node, returned, small_config, wait_for
from tests.system.faults import Fault, FaultyPool

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_address")]

ROUNDS, WORKERS = 8, 3
SETTINGS: dict[str, Any] = {
    "model__args": {"widths": [64, 96, 60, 10]},
    "train__workers": WORKERS,
    "train__rounds": ROUNDS,
    "train__local_steps": 20,
    "evaluate": {"every": ROUNDS},
}
Ended = tuple[dict[str, Tensor], list[dict[str, Any]]]
Schedule = frozenset[tuple[int, int]]


class LeavingOut(InlinePool):
    """The inline pool, without what certain workers do in certain rounds."""

    def __init__(self, job: Job, meter: Meter, schedule: Schedule) -> None:
        super().__init__(job, torch.device("cpu"), meter)
        self.schedule = schedule

    def submit(self, round_number: int, subnet: Subnet) -> None:
        self.round_number = round_number
        super().submit(round_number, subnet)

    def results(self) -> Generator[Subnet | Lost]:
        round_number = self.round_number
        for result in returned(super().results()):
            gone = (round_number, result.worker) in self.schedule
            yield Lost(result.worker, "left out") if gone else result


def run(pool_of: Any, job: Job, on_save: Any = None) -> Ended:
    model, meter = job.task.build(), Meter()
    pool = pool_of(job, meter)
    recorder = RunRecorder(job, None, [], Progress(), meter, MemoryGauge(torch.device("cpu")))
    if on_save:
        recorder.save = lambda *_: on_save(pool)  # type: ignore[method-assign]
    try:
        completed(run_rounds(job, Coordinator(job, pool, model, meter), recorder, 0, torch.device("cpu")))
    finally:
        pool.close()
    return clone(model.state_dict()), recorder.history


@lru_cache
def leaving_out(schedule: Schedule) -> Ended:
    job = build_job(small_config(**{**SETTINGS, "pool": {"kind": "inline", "min_returned": 1}}))
    return run(lambda job, meter: LeavingOut(job, meter, schedule), job)


def on_ray(faults: Sequence[Fault], **pool: Any) -> Ended:
    job = build_job(small_config(**{**SETTINGS, "checkpoint": {"every": 1}, "pool": {"kind": "ray", **pool}}))
    return run(
        lambda job, meter: FaultyPool(job, meter, f"chaos-{os.urandom(3).hex()}", faults),
        job,
        lambda pool: pool.strike("while checkpointing"),
    )


def left_out(history: Sequence[dict[str, Any]]) -> dict[tuple[int, int], str]:
    return {(r["round"], lost["worker"]): lost["kind"] for r in history for lost in r.get("lost", [])}


def assert_only_that_is_missing(ended: Ended, expected: dict[tuple[int, int], str]) -> None:
    weights, history = ended
    assert left_out(history) == expected
    assert_same(weights, leaving_out(frozenset(expected))[0])
    undisturbed = leaving_out(frozenset())[1][-1]["accuracy"]
    assert undisturbed > 0.9
    # 360 test digits: two standard errors at 94 % are 2.5 points.
    assert abs(history[-1]["accuracy"] - undisturbed) < 0.03


@pytest.mark.parametrize("phase", ["before send", "while training", "while sending back"])
def test_a_worker_killed_in_a_round_loses_that_rounds_slices_and_no_more(phase: str) -> None:
    assert_only_that_is_missing(on_ray([Fault(2, 1, phase)]), {(2, 1): "lost"})


@pytest.mark.parametrize("phase", ["while merging", "while checkpointing"])
def test_a_worker_killed_when_its_part_is_home_loses_nothing(phase: str) -> None:
    assert_only_that_is_missing(on_ray([Fault(2, 1, phase)]), {})


@pytest.mark.parametrize("what", ["nan", "shape", "stale"])
def test_a_worker_that_returns_invalid_results_is_left_out_of_that_round(what: str) -> None:
    assert_only_that_is_missing(on_ray([Fault(3, 2, "while sending back", what)]), {(3, 2): "rejected"})


def test_a_worker_whose_code_fails_is_left_out_and_stays() -> None:
    ended = on_ray([Fault(1, 0, "while training", "raise")])

    assert_only_that_is_missing(ended, {(1, 0): "lost"})
    (lost,) = ended[1][1]["lost"]
    assert "a memory module was pulled out" in lost["reason"]


def test_a_worker_whose_code_fails_twice_in_a_row_is_replaced() -> None:
    rounds = [1, 2, 4]
    ended = on_ray([Fault(round_number, 0, "while training", "raise") for round_number in rounds])

    assert_only_that_is_missing(ended, {(round_number, 0): "lost" for round_number in rounds})
    first, second, third = (ended[1][r]["lost"][0]["reason"].split()[0] for r in rounds)
    assert first == second != third


def test_several_workers_may_go_in_one_round_and_one_more_than_once() -> None:
    faults = [Fault(1, 0, "while training"), Fault(3, 0, "before send"), Fault(5, 2, "while sending back")]

    assert_only_that_is_missing(on_ray(faults), {(1, 0): "lost", (3, 0): "lost", (5, 2): "lost"})


def test_a_round_that_loses_all_workers_is_repeated_with_new_ones() -> None:
    weights, history = on_ray([Fault(2, worker, "while training") for worker in range(WORKERS)])

    # Two lost workers of three are too few; the third may be told to stop before it dies.
    assert len(history) == ROUNDS
    assert {(round_number, kind) for (round_number, _), kind in left_out(history).items()} == {(2, "lost")}
    assert len(history[2]["lost"]) >= 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert history[-1]["accuracy"] > 0.85  # an eighth of a short run was trained by one worker of three


@pytest.mark.parametrize("what", ["slow", "freeze"])
def test_a_straggler_past_the_deadline_is_left_out_and_told_so(what: str) -> None:
    weights, history = on_ray([Fault(2, 1, "while training", what)], round_deadline_s=6.0)

    # On a busy machine others may miss a deadline too; whatever was left out is all that is missing.
    schedule = left_out(history)
    assert schedule.get((2, 1)) == "late"
    assert len(schedule) <= 3
    assert_same(weights, leaving_out(frozenset(schedule))[0])


def test_a_slow_worker_gets_a_smaller_share_where_shares_follow_speed() -> None:
    settings = {
        **SETTINGS,
        "partition__balance": "speed",
        "train__rounds": 3,
        "evaluate": {"every": 3},
        "pool": {"kind": "ray"},
    }
    job = build_job(small_config(**settings))
    faults = [Fault(0, 1, "while training", "slow")]

    _, history = run(lambda job, meter: FaultyPool(job, meter, f"slow-{os.urandom(3).hex()}", faults), job)

    even, uneven = history[0]["bytes_to_worker"], history[1]["bytes_to_worker"]
    assert max(even) == min(even)
    assert uneven[1] < 0.5 * min(uneven[0], uneven[2])


class EnoughError(Exception):
    """What was to be seen has been seen."""


def test_a_run_goes_on_where_workers_die_faster_than_they_start() -> None:
    """One of four dies, also while it starts, more often than one starts; when five have died, training continues."""
    stop, killed_in, now, began = threading.Event(), [], [0], time.monotonic()

    class Hail(RayPool):
        def gather(self, round_number: int) -> tuple[str, ...]:
            names = super().gather(round_number)
            now[0] = round_number
            if not killer.is_alive() and not killed_in:
                killer.start()
            if len(killed_in) == 5 and round_number > killed_in[-1] + 5:
                raise EnoughError
            return names

    def kill_now_and_then() -> None:
        random, pause = np.random.default_rng(7), 0.6 * (time.monotonic() - began)
        while len(killed_in) < 5 and not stop.wait(pause):
            ours = psutil.Process().children(recursive=True)
            workers = [process for process in ours if "RayWorker" in process.name()]
            if workers:
                workers[random.integers(len(workers))].kill()
                killed_in.append(now[0])

    killer = threading.Thread(target=kill_now_and_then)
    settings = {**SETTINGS, "train__workers": 4, "train__rounds": 100000, "evaluate": {"every": 100000}}
    job = build_job(small_config(**{**settings, "pool": {"kind": "ray"}}))
    try:
        with pytest.raises(EnoughError):
            run(lambda job, meter: Hail(job, meter, f"hail-{os.urandom(3).hex()}"), job)
    finally:
        stop.set()
        killer.join()

    assert len(killed_in) == 5


DRIVER = """
import os, signal, sys
import ist.storage.backend, ist.training.coordinator, ist.pools.ray_pool as pool, ist.subnet.cut

phase, at = sys.argv[1], int(sys.argv[2])
now = {"round": -1, "results": 0}

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def noting(function):
    def gather(self, round_number):
        now.update(round=round_number, results=0)
        return function(self, round_number)
    return gather

def before(function, of, count=1):
    calls = {}
    def wrapped(*arguments, **named):
        calls[now["round"]] = calls.get(now["round"], 0) + 1
        if phase == of and now["round"] == at and calls[at] == count:
            die()
        return function(*arguments, **named)
    return wrapped

pool.RayPool.gather = noting(pool.RayPool.gather)
pool.RayPool.buffers = before(pool.RayPool.buffers, "before send", 2)
pool.RayPool._result = before(pool.RayPool._result, "while training")
pool.as_tensor = before(pool.as_tensor, "while sending back")
ist.subnet.cut.write_part = before(ist.subnet.cut.write_part, "while merging", 4)
ist.storage.backend.write_atomically  # renames what it has written, as LocalStorage.writing does
from pathlib import Path
Path.replace = before(Path.replace, "while checkpointing")
sys.argv[:] = ["ist", *sys.argv[3:]]
from ist.cli.main import main
main()
"""


def test_a_driver_killed_at_every_phase_goes_on_to_the_same_weights_bit_for_bit(
    ray_address: str, tmp_path: Path, ist_command: Run
) -> None:
    path, folder = tmp_path / "job.yaml", tmp_path / "run"
    tree = config_tree(
        **{**SETTINGS, "checkpoint": {"every": 1}, "pool": {"kind": "ray", "ray": {"address": ray_address}}}
    )
    path.write_text(yaml.safe_dump(tree))
    arguments = ["train", str(path), "--run-dir", str(folder), "--auto-resume"]
    phases = ["before send", "while training", "while sending back", "while merging", "while checkpointing"]

    for at, phase in enumerate(phases, 1):
        command = [sys.executable, "-c", DRIVER, phase, str(at), *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == -signal.SIGKILL, f"{phase}: {done.stderr}"
    done = ist_command(*arguments)

    assert done.returncode == 0, done.stderr
    assert_same(read_tensors(folder / "model.safetensors")[0], leaving_out(frozenset())[0])
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == ROUNDS


def test_workers_of_a_node_that_joins_train_and_those_of_a_node_that_is_lost_do_not(
    ray_address: str, tmp_path: Path
) -> None:
    """Seats are a resource of the two nodes that come: one for the run to begin with, two that come and are killed."""
    path, folder = tmp_path / "job.yaml", tmp_path / "run"
    elastic = {"train__workers": {"min": 1, "max": 3}, "train__rounds": 100000}
    settings = {"kind": "ray", "ray": {"address": ray_address, "resources": {"seat": 1}}}
    path.write_text(yaml.safe_dump(config_tree(**{**SETTINGS, **elastic, "pool": settings, "evaluate": {"every": 50}})))
    command = [sys.executable, "-m", "ist", "train", str(path), "--run-dir", str(folder)]
    metrics = folder / "metrics.jsonl"

    def last() -> dict[str, Any]:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return yaml.safe_load(lines[-1]) if lines else {"workers": 0, "round": -1}

    first = ["--address", ray_address, "--num-cpus=1", '--resources={"seat": 1}']
    second = ["--address", ray_address, "--num-cpus=2", '--resources={"seat": 2}']
    with node(*first), subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: last()["workers"] == 1, 60, "training with one worker")
            with node(*second) as (joined, _):
                wait_for(lambda: last()["workers"] == 3, 60, "three workers")
                family = [joined, *joined.children(recursive=True)]
                for member in family:
                    member.kill()
                psutil.wait_procs(family, timeout=10)
                wait_for(lambda: last()["workers"] == 1, 90, "one worker again")
            done = last()["round"]
            wait_for(lambda: last()["round"] > done + 5, 30, "more rounds")
            assert process.poll() is None
        finally:
            process.kill()
