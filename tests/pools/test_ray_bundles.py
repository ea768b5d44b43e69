"""Workers of several Ray actors: they train as the same ranks under torchrun, and are replaced together."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ist.monitoring.meter import Meter
from ist.pools.ray_actor import RayWorker
from ist.pools.ray_pool import RayPool
from ist.runs.execute import execute
from ist.storage.run_folder import RunFolder, create_run_folder
from tests.conftest import assert_same, run_forked_ranks, wait_for
from tests.pools.inside_program import StopAfter, scenario
from tests.pools.test_inside import PROGRAM, outcome
from tests.system.test_chaos import LeavingOut, left_out
from tests.system.test_chaos import run as run_on

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_address")]

BUNDLES = {"kind": "ray", "device": "cpu", "ranks_per_worker": 2}


def test_workers_of_two_actors_train_bit_for_bit_as_workers_of_two_ranks_also_resumed(tmp_path: Path) -> None:
    name = "kept state, frozen, step"
    run_forked_ranks((4, PROGRAM, tmp_path, "built_in", "ddp"))
    made, model = scenario(name, checkpoint={"every": 1}, pool=BUNDLES)
    folder = create_run_folder(made.config, tmp_path / "run")

    begun = execute(made, folder, False, False, callbacks=[StopAfter(3)]).recorder.history
    for parameter in model.parameters():
        parameter.data.zero_()  # it comes back from the checkpoint
    resumed = execute(made, RunFolder(folder.path), True, False).recorder.history

    expected, history = outcome(tmp_path / "ddp", name)
    assert_same(model.state_dict(), expected)
    for record, same in zip(resumed, history, strict=True):
        for key in ("loss", "logged", "samples", "steps"):
            assert record[key] == same[key], key
    assert [record["inside_bytes"] for record in begun] == [record["inside_bytes"] for record in history[:3]]


class Faulty(RayWorker):
    """An actor whose worker loses it, or waits for it, in the second step of some rounds."""

    faults: Mapping[tuple[int, int, int], str] = {}
    calls = 0

    def train(self, ticket: int, round_number: int, slot: Any, *messages: Any) -> Any:
        assert self._group is not None
        self.calls, self.now = 0, (round_number, slot.worker, self._group.rank)
        return super().train(ticket, round_number, slot, *messages)

    def _is_over(self, ticket: int) -> bool:
        self.calls += 1
        match self.faults.get(self.now) if self.calls == 2 else None:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise RuntimeError("a memory module was pulled out")
            case "slow":
                time.sleep(DEADLINE_S + 3)
        return super()._is_over(ticket)


DEADLINE_S = 6.0


class Together(RayPool):
    """A pool that waits for both workers, and notes the names of their first actors."""

    def gather(self, round_number: int) -> tuple[str, ...]:
        found: list[tuple[str, ...]] = []
        wait_for(lambda: len((found := [super(Together, self).gather(round_number)])[0]) == 2, 100, "both workers")
        self.seen = [*getattr(self, "seen", []), [self.process(worker) for worker in range(2)]]
        return found[0] if found else ("worker-0", "worker-1")


def test_a_lost_actor_costs_its_worker_the_round_and_a_late_one_stays() -> None:
    faults = {(1, 1, 1): "kill", (2, 0, 0): "raise", (3, 1, 1): "slow"}
    settings = {"train__rounds": 5, "train__local_steps": 3}
    changed = {"inside": "fsdp", "min_returned": 1, "round_deadline_s": DEADLINE_S}
    made, _ = scenario("uneven parts, clipped", **settings, train__workers={"min": 1, "max": 2}, pool=BUNDLES | changed)
    pools: list[Together] = []

    def pool_of(job: Any, meter: Meter) -> Together:
        worker = type("Faulty", (Faulty,), {"faults": faults})
        pools.append(Together(job, meter, f"bundles-{os.urandom(3).hex()}", worker))
        return pools[0]

    weights, history = run_on(pool_of, made)

    assert left_out(history) == {(1, 1): "lost", (2, 0): "lost", (3, 1): "late"}
    assert "died" in history[1]["lost"][0]["reason"] or "SIGKILL" in history[1]["lost"][0]["reason"]
    assert "a memory module was pulled out" in history[2]["lost"][0]["reason"]
    failed, died = (list(dict.fromkeys(names)) for names in zip(*pools[0].seen, strict=True))
    assert [pools[0].seen[round_number] for round_number in (0, 2, 4)] == [
        [failed[0], died[0]], [failed[0], died[1]], [failed[1], died[1]],
    ]  # fmt: skip  # a late worker stays
    inline, _ = scenario("uneven parts, clipped", **settings, pool={"kind": "inline", "min_returned": 1})
    expected, _ = run_on(lambda job, meter: LeavingOut(job, meter, frozenset(left_out(history))), inline)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-11)  # sums of float64 in another order
