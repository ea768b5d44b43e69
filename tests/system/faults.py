"""Faults as data: what goes wrong with which worker, in which round, at which phase.

The actor and the pool below do to themselves what a fault says, for real: SIGKILL, SIGSTOP, damaged bytes.
"""

import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

import ist.training.worker
from ist.monitoring.meter import Meter
from ist.pools.ray_actor import RayWorker
from ist.pools.ray_pool import RayPool
from ist.pools.ray_workers.actors import Call
from ist.subnet.assignments import WorkerSlot
from ist.subnet.job import Job
from ist.transport.codec import MessageBuffers, MessageLayouts
from ist.transport.interfaces import Lost, Subnet
from ist.transport.message import HEADER_BYTES


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        phase: 'before send', 'while training', 'while sending back', 'while merging' or 'while checkpointing'.
        what: 'kill', 'freeze' (SIGSTOP), 'slow', 'raise', 'nan', 'shape' or 'stale'.
    """

    round: int
    worker: int
    phase: str
    what: str = "kill"


SLOW_S = 15.0


class FaultyWorker(RayWorker):
    """An actor with faults; set `faults` in a subclass."""

    faults: Sequence[Fault] = ()
    struck: str = ""
    last: Any = None

    def _is_new(self, fault: Fault) -> bool:
        """Faults strike once: not those who take over from a victim in the same round."""
        path = Path(self.struck) / f"{fault.round}-{fault.worker}-{fault.phase}"
        if path.exists():
            return False
        path.touch()
        return True

    def pid(self) -> int:
        return os.getpid()

    def train(self, ticket: int, round_number: int, slot: WorkerSlot, received: Any, *beside: Any) -> Any:
        mine = [f for f in self.faults if (f.round, f.worker) == (round_number, slot.worker)]
        now = {f.phase: f.what for f in mine if self._is_new(f)}
        fetch = ist.data.loading.loader.fetch
        calls = 0

        def faulty_fetch(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:  # one local step is made, the second begins
                _happen(now["while training"])
            return fetch(*arguments)

        if "while training" in now:
            ist.data.loading.loader.fetch = faulty_fetch
        try:
            trained = super().train(ticket, round_number, slot, received, *beside)
        finally:
            ist.data.loading.loader.fetch = fetch
        before, self.last = self.last, trained.copy()
        match now.get("while sending back"):
            case None:
                return trained
            case "nan":
                damaged = torch.from_numpy(trained.copy())
                damaged[HEADER_BYTES : HEADER_BYTES + 4].view(torch.float32)[0] = float("nan")
                return damaged.numpy()
            case "shape":
                return trained[:-64].copy()
            case "stale":
                return before
            case what:
                _happen(what)
        return trained


def _happen(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "slow":
        time.sleep(SLOW_S)
    elif what == "raise":
        raise RuntimeError("a memory module was pulled out")


class FaultyPool(RayPool):
    """The Ray pool with faults that the driver's side brings about."""

    def __init__(self, job: Job, meter: Meter, label: str, faults: Sequence[Fault]) -> None:
        fields = {"faults": tuple(faults), "struck": tempfile.mkdtemp(dir=os.environ["IST_TESTS"])}
        super().__init__(job, meter, label, type("FaultyWorker", (FaultyWorker,), fields))
        self._faults = faults
        self._round = -1

    def gather(self, round_number: int) -> tuple[str, ...]:
        self._round = round_number
        return super().gather(round_number)

    def buffers(self, worker: int, layouts: MessageLayouts) -> MessageBuffers:
        if worker == 0:
            self.strike("before send")
        return super().buffers(worker, layouts)

    def _result(self, call: Call[Subnet]) -> Subnet | Lost:
        result = super()._result(call)
        self.strike("while merging", call.sent.worker)
        return result

    def strike(self, phase: str, worker: int | None = None) -> None:
        """Kill the workers whom a fault of this round and phase names."""
        for fault in self._faults:
            if (fault.round, fault.phase) == (self._round, phase) and worker in (None, fault.worker):
                pid = ray.get(self._round_members[fault.worker].actor.pid.remote())
                os.kill(pid, signal.SIGKILL)
