"""One worker of `benchmarks/peers.py`: it trains by torchft's DiLoCo or by hivemind, and writes notes of what it did.

    python -m benchmarks.peers_worker torchft|hivemind CONFIG FOLDER

It is started once on each host with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Network, data, batches, initial
weights, schedule and evaluation are those of IST for CONFIG: a resolved configuration with method 'ddp', so that each
worker has the full network; its rounds are the outer steps. The worker writes FOLDER/RANK.json and FOLDER/RANK.npy.

Both libraries continue alone if they find no peers to average with. So each worker records after each outer step over
how many workers it averaged, and its weights; the caller compares them.
"""

import json
import logging
import multiprocessing
import os
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ist.config.load import load_config
from ist.data.batches import fetch
from ist.data.loading.loader import worker_data
from ist.data.nested import call_model
from ist.loops.local_loop import TaskLoop
from ist.loops.part import LocalSteps, completed
from ist.optimization.step_settings import apply_settings, matching_groups
from ist.runs.build import build_job
from ist.subnet.job import Job, slot_of
from ist.training.rounds import evaluate_full_network

TIMEOUT = timedelta(seconds=120)
LIGHTHOUSE_PORT = 29512
MATCHMAKING_S = 3.0  # hivemind's advice: 3 to 5 s for small local runs, 10 to 15 s over the internet
CPU = torch.device("cpu")


@dataclass
class Notes:
    """The record of what a worker did.

    Attributes:
        averaged_over: For each outer step, the number of averaged workers, including this one; 0 if it did not average.
        weights: All weights after each outer step.
        local_steps: The optimizer steps of this worker.
        discarded_steps: Steps whose gradient was discarded because the worker loaded the state of another one.
        train_s: Seconds from the common start to the end of the last outer step.
        accuracy: The accuracy of rank 0's network on the test images.
    """

    averaged_over: list[int] = field(default_factory=list)
    weights: list[NDArray[np.float32]] = field(default_factory=list)
    local_steps: int = 0
    discarded_steps: int = 0
    train_s: float = 0.0
    accuracy: float | None = None

    def outer_step(self, averaged_over: int, model: nn.Module) -> None:
        """Record an outer step that has just ended."""
        self.averaged_over.append(averaged_over)
        self.weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy())

    def write(self, folder: Path, rank: int) -> None:
        """Write the record to FOLDER/RANK.json and FOLDER/RANK.npy."""
        np.save(folder / f"{rank}.npy", np.stack(self.weights))
        values = {name: value for name, value in vars(self).items() if name != "weights"}
        Path(folder, f"{rank}.json").write_text(json.dumps(values))


@dataclass(frozen=True)
class Place:
    """The rank of this worker, and how to reach the others.

    Attributes:
        rank: The rank of this worker.
        size: The number of workers.
        leader: The address of rank 0.
        address: The address of this worker.
        store: The store that all workers share.
    """

    rank: int
    size: int
    leader: str
    address: str
    store: TCPStore

    def meet(self, occasion: str) -> None:
        """Wait until all workers have reached the same point."""
        if self.store.add(occasion, 1) == self.size:
            self.store.set(f"all at {occasion}", "")
        self.store.wait([f"all at {occasion}"])

    def leave(self) -> None:
        """Leave the group; rank 0 waits for all others, because it hosts the store."""
        gone = self.store.add("gone", 1)
        while self.rank == 0 and gone < self.size:
            time.sleep(0.05)
            gone = self.store.add("gone", 0)


def find_place() -> Place:
    rank, size, leader = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing: it asks the routing table
        probe.connect((leader, 9))
        address = str(probe.getsockname()[0])
    port = int(os.environ["MASTER_PORT"])
    store = TCPStore(leader, port, is_master=rank == 0, timeout=TIMEOUT, wait_for_workers=False)
    return Place(rank, size, leader, address, store)


def train_with_torchft(job: Job, model: nn.Module, place: Place, notes: Notes) -> None:
    """Train by DiLoCo: local steps, then an outer step of Nesterov momentum along the mean change.

    Reference: Douillard et al., arXiv 2311.08105, for the outer optimizer.
    """
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import DiLoCo

    lighthouse = None
    if place.rank == 0:
        lighthouse = LighthouseServer(bind=f"[::]:{LIGHTHOUSE_PORT}", min_replicas=place.size)
    own_store = TCPStore(place.address, 0, is_master=True, wait_for_workers=False)
    place.meet("the lighthouse")
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=model.load_state_dict,
        state_dict=model.state_dict,
        min_replica_size=place.size,  # with less, an isolated worker would continue alone
        use_async_quorum=False,  # DiLoCo requires it
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr=place.address,
        store_port=own_store.port,
        lighthouse_addr=f"http://{place.leader}:{LIGHTHOUSE_PORT}",
        replica_id=f"worker_{place.rank}",
        hostname=place.address,
        init_sync=False,  # all workers have the same weights, because they use the same seed
    )
    named = dict(model.named_parameters())
    inner = job.task.make_optimizer(named)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    slot = slot_of(job, place.rank)
    local = LocalSteps(job.schedule, job.config.seed, slot, CPU, TaskLoop(job, slot, CPU))
    place.meet("the start")
    started = time.perf_counter()
    with DiLoCo(manager, [model], inner, outer, sync_every=job.config.train.local_steps):
        for number in range(job.schedule.num_rounds):
            committed = manager.current_step()
            completed(local.of_round(number, model, named, inner))  # the last one makes the outer step
            notes.local_steps += len(job.schedule.steps(number))
            notes.outer_step(manager.num_participants() if manager.current_step() > committed else 0, model)
    notes.train_s = time.perf_counter() - started
    place.meet("the end")
    manager.shutdown()
    if lighthouse:
        lighthouse.shutdown()


class HivemindLog(logging.Handler):
    """Reads the log of hivemind, which is the only source for the number of averaged workers."""

    def __init__(self) -> None:
        super().__init__()
        self.averaged_over: list[int] = []
        self.out_of_sync = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Read a message."""
        text = record.getMessage()
        if averaged := re.fullmatch(r"Averaged parameters with (\d+) peers", text):
            self.averaged_over.append(int(averaged[1]))
        self.out_of_sync += text == "Peer is out of sync"


def train_with_hivemind(job: Job, model: nn.Module, place: Place, notes: Notes) -> None:
    """Train by hivemind: local steps; the weights are averaged whenever all workers together reach a sample count.

    Averaging ends before the next step begins (`delay_state_averaging` is off), so that weights can be compared. The
    number of steps of each worker is not fixed: hivemind counts the samples that workers report from time to time.
    """
    multiprocessing.set_start_method("fork")  # hivemind's processes inherit locks and pipes
    import hivemind

    log = HivemindLog()
    logging.getLogger("hivemind").addHandler(log)
    initial_peers = None if place.rank == 0 else [place.store.get("peer").decode()]
    dht = hivemind.DHT(initial_peers=initial_peers, host_maddrs=[f"/ip4/{place.address}/tcp/0"], start=True)
    if place.rank == 0:
        place.store.set("peer", str(dht.get_visible_maddrs()[0]))
    named = dict(model.named_parameters())
    inner = job.task.make_optimizer(named)
    groups = matching_groups(inner, named, job.schedule.group_of)
    sampler = job.schedule.sampler
    assert sampler.steps_per_epoch is not None
    samples_per_step = sampler.num_samples / sampler.steps_per_epoch
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="peers",
        optimizer=inner,
        target_batch_size=round(samples_per_step * job.config.train.local_steps),
        use_local_updates=True,
        delay_state_averaging=False,
        matchmaking_time=MATCHMAKING_S,
        averaging_timeout=TIMEOUT.total_seconds(),
        next_chunk_timeout=TIMEOUT.total_seconds(),  # otherwise the mean skips the part of a slow peer
        averager_opts={"target_group_size": place.size, "min_group_size": place.size, "request_timeout": 1.0},
        # An outer step takes a few seconds here, and the progress of the others must be known more often than that.
        tracker_opts={"min_refresh_period": 0.1, "default_refresh_period": 0.2, "max_refresh_period": 0.5},
        verbose=True,
    )
    shard = worker_data(job.task.train_data, job.schedule.sampler, place.rank)
    place.meet("the start")
    started = time.perf_counter()
    while optimizer.local_epoch < job.schedule.num_rounds:
        epoch = optimizer.local_epoch
        log.averaged_over.clear()
        apply_settings(inner, groups, job.schedule.settings[min(notes.local_steps, job.schedule.total_steps - 1)])
        inputs, targets = fetch(shard, job.schedule.sampler.batch(place.rank, notes.local_steps), CPU)
        inner.zero_grad(set_to_none=True)
        job.task.loss(call_model(model, inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step(batch_size=len(targets))
        notes.local_steps += 1
        for _ in range(epoch, optimizer.local_epoch):
            notes.outer_step(log.averaged_over.pop() if log.averaged_over else 0, model)
    notes.train_s = time.perf_counter() - started
    notes.discarded_steps = log.out_of_sync
    place.meet("the end")
    optimizer.shutdown()
    dht.shutdown()


def main() -> None:
    system, config, folder = sys.argv[1:]
    torch.set_num_threads(1)
    job = build_job(load_config(Path(config)))
    place, notes, model = find_place(), Notes(), job.task.build()
    train = {"torchft": train_with_torchft, "hivemind": train_with_hivemind}[system]
    train(job, model, place, notes)
    if place.rank == 0:
        notes.accuracy = evaluate_full_network(job, model, CPU).values["accuracy"]
    notes.write(Path(folder), place.rank)
    place.leave()


if __name__ == "__main__":
    main()
