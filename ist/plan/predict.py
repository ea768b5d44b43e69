"""Predict seconds of a round from bytes, links and measured steps; the full plan, and its simulation to many workers.

The model, for full-duplex links of rate R (`Hosts`):

- A method that all-reduces every step: the step, plus the part of the exchange that is not finished when the backward
  pass ends. Buckets are exchanged one after the other, each once its last gradient is ready, as in
  DistributedDataParallel.
- A method that all-reduces once per round: local steps + the exchange.
- IST: cut + messages to workers + local steps of the subnets + messages back + merge. The coordinator's link carries
  the messages of all workers, a worker's link its own messages; the slowest link determines the time. A worker on the
  coordinator's host (`pool.coordinator: trains`) starts while the other workers' messages are still being sent.

Where it sits: `ist plan` calls `make_plan`.
Not here: the bytes that are sent (`ist/config/methods.py`), measuring steps (`measure.py`).

Shape letters: n workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ist.config.load import config_for_method
from ist.config.methods import Baseline, Collective, Sizes, ring_bytes
from ist.config.runtime import Link
from ist.config.schema import Config
from ist.distributed.device import compute_device
from ist.errors import ConfigError, ISTError, first_line
from ist.monitoring.meter import resident_bytes
from ist.plan.buckets import buckets
from ist.plan.measure import CoordinatorCost, StepCost, WholeCost, measure_coordinator, measure_subnet, measure_whole
from ist.plan.request import Hosts, Request
from ist.runs.build import build_job
from ist.subnet.job import Job, assignments, remote_workers, with_workers
from ist.subnet.partition import check_workers
from ist.training.memory_budget import CountedStep, MemoryBudget, count_step, memory_budgets
from ist.transport.traffic import message_bytes

FRAME_PAYLOAD = 1448 / 1514
"""Fraction of payload in a full Ethernet frame with TCP timestamps."""

ACKNOWLEDGED_PAYLOAD = 1448 / (1514 + 66 / 2)
"""The same if both directions are full: an acknowledgement of 66 bytes for every two frames of the other direction."""

SIMULATED_RATES_MBIT = (10.0, 100.0, 1000.0)
SIMULATED_WORKERS = tuple(2**power for power in range(1, 11))

Plan = dict[str, Any]
"""The result of `make_plan`: plain values for JSON."""


@dataclass(frozen=True)
class Prediction:
    """A predicted round of one method.

    Attributes:
        method: Name of the method.
        workers: n.
        local_steps: Steps of each worker.
        batch_size: Samples in one step of a worker.
        sent_bytes: Payload that all processes send.
        link_bytes: Payload in the busiest direction of the busiest link.
        memory_bytes: Memory of a worker, without interpreter, libraries and data: the sum of `memory`.
        memory: Bytes by part; see `ist.training.memory_budget`.
        coordinator_memory_bytes: The same of IST's coordinator: the full network and all messages, including the part
            of its own worker; None for other methods.
        coordinator_memory: Bytes by part; None for other methods.
        memory_notes: What is not counted, as sentences.
        compute_s: Seconds of local steps.
        exchange_s: Seconds by which the exchange extends the round.
        coordinate_s: Seconds of cutting and merging.
        round_s: Seconds of the round.
        epoch_s: Seconds of the rounds, or the part of a round, in which a worker sees every sample once.
    """

    method: str
    workers: int
    local_steps: int
    batch_size: int
    sent_bytes: int
    link_bytes: int
    memory_bytes: int
    memory: Mapping[str, int]
    coordinator_memory_bytes: int | None
    coordinator_memory: Mapping[str, int] | None
    memory_notes: tuple[str, ...]
    compute_s: float
    exchange_s: float
    coordinate_s: float
    round_s: float
    epoch_s: float


@dataclass(frozen=True)
class Parts:
    """The costs of a round of IST with one number of workers.

    Attributes:
        messages: (bytes to it, bytes from it) for every worker.
        step: Cost of a step of the worker with the largest subnet.
        coordinator: Cost of cutting and merging.
        counted: Memory of a step of the largest worker.
    """

    messages: Sequence[tuple[int, int]]
    step: StepCost
    coordinator: CoordinatorCost
    counted: CountedStep


def transfer_s(nbytes: float, rate_mbit: float, payload: float = FRAME_PAYLOAD) -> float:
    """Return the seconds in which a link sends this many bytes; `payload` is the fraction of payload in a frame."""
    return nbytes * 8 / (rate_mbit * 1e6 * payload)


def collective_seconds(
    collective: Collective,
    whole: WholeCost,
    num_workers: int,
    local_steps: int,
    hosts: Hosts,
    settings: Baseline | None = None,
) -> tuple[float, float]:
    """Return (compute, exchange) seconds of a round of a method that all-reduces; see the header of this module."""
    settings = settings or Baseline()
    crowding = hosts.crowding(num_workers)
    rate = min(hosts.link.up_mbit, hosts.link.down_mbit)
    hops_s = collective.calls * 2 * (num_workers - 1) * hosts.hop_s

    def exchange_s(sizes: Sizes) -> float:
        sent = ring_bytes(collective.payload(sizes, settings), num_workers)
        return hops_s + transfer_s(sent, rate, ACKNOWLEDGED_PAYLOAD)

    if collective.every == "round":
        exposed_s = exchange_s(whole.sizes)
    else:
        exposed_s = -float("inf")  # counted from the end of the backward pass
        for bucket in buckets([size.nbytes for size in whole.sizes]):
            ready_s = -whole.left_s[bucket[-1]] * crowding
            exposed_s = max(exposed_s, ready_s) + exchange_s([whole.sizes[number] for number in bucket])
    passes_s = collective.passes * whole.pass_s * crowding if num_workers > 1 else 0.0
    times = collective.exchanges(local_steps)
    return local_steps * whole.step.step_s * crowding, times * (max(0.0, exposed_s) + passes_s)


def ist_seconds(
    messages: Sequence[tuple[int, int]], step_s: float, num_workers: int, local_steps: int, hosts: Hosts
) -> tuple[float, float]:
    """Return (compute, exchange) seconds of a round of IST, without cutting and merging.

    Args:
        messages: (bytes to it, bytes from it) for every worker behind a link.
        step_s: Seconds of a step of the slowest worker, alone on its core.
        num_workers: n, including the worker on the coordinator's host.
        local_steps: Steps of the round.
        hosts: The hosts.
    """
    alone_s = local_steps * step_s
    if not messages:
        return alone_s * hosts.crowding(num_workers), 0.0
    link, out, back = hosts.link, [m[0] for m in messages], [m[1] for m in messages]
    out_s = hosts.hop_s + max(transfer_s(sum(out), link.up_mbit), transfer_s(max(out), link.down_mbit))
    back_s = hosts.hop_s + max(transfer_s(sum(back), link.down_mbit), transfer_s(max(back), link.up_mbit))
    # Workers on the coordinator's host start at once, with all cores.
    started = (num_workers - len(messages)) * max(0.0, 1 - out_s / alone_s)
    return alone_s * hosts.crowding(len(messages) + started), out_s + back_s


def at_workers(job: Job, num_workers: int) -> Job:
    """Return the same job with another number of workers.

    Raises:
        ConfigError: The configuration has one capacity per worker.
        DataError: There are fewer samples than workers.
        ModelError: A group has fewer neurons than workers.
    """
    config = job.config
    if config.method_spec.needs_groups:
        if config.partition.capacities is not None and num_workers != config.train.workers:
            raise ConfigError(
                f"'partition.capacities' is for {config.train.workers} workers (train.workers), not {num_workers}: "
                "leave it out of the plan (--set partition.capacities=null)"
            )
        check_workers(job.split.groups, num_workers, config.partition)
    return with_workers(job, num_workers)


class Planner:
    """Predicts rounds of one configuration; caches its measurements.

    Args:
        config: The configuration, with the largest requested number of workers.
        methods: The methods to plan, each with its `compare.overrides`.

    Raises:
        ISTError: The configuration cannot be run.
    """

    def __init__(self, config: Config, methods: Sequence[str]) -> None:
        configs = {method: config_for_method(config, method) for method in methods}
        for method, configured in configs.items():
            if not configured.method_spec.can_be_planned:
                raise ConfigError(f"method '{method}' cannot be planned: it has no formula for the bytes that it sends")
            if configured.data.shard == "own":
                raise ConfigError(
                    "'data.shard' is 'own', but 'ist plan' predicts workers with equally many samples: plan with --set "
                    "data.shard=assigned"
                )
            if configured.data.skew is not None:
                raise ConfigError(
                    "'data.skew' is set, but 'ist plan' predicts workers with equally many samples: plan with --set "
                    "data.skew=null"
                )
        self.jobs = {method: build_job(configured) for method, configured in configs.items()}
        self.device = compute_device(config.pool)
        self._whole: dict[str, tuple[WholeCost, CountedStep]] = {}
        self._parts: dict[int, Parts] = {}

    def predict(self, method: str, num_workers: int, hosts: Hosts) -> Prediction:
        """Predict a full round after the first rounds of a run.

        Raises:
            ISTError: The job cannot have this many workers, or a step fails.
        """
        job = at_workers(self.jobs[method], num_workers)
        collective = job.config.method_spec.collective
        return self._by_messages(job, hosts) if collective is None else self._collective(collective, job, hosts)

    def whole(self, job: Job) -> tuple[WholeCost, CountedStep]:
        """Return the cost of a step of the full network and its memory; measured once for jobs with the same step."""
        config = job.config
        optimizer = config.train.optimizer.model_dump()
        optimizer["args"].pop("lr", None)
        parts = (config.model, config.data, config.train.loss, optimizer)
        key = f"{parts} {len(job.schedule.sampler.batch(0, 0))}"
        if key not in self._whole:
            counted = count_step(job, self.device, with_activations=True)
            self._whole[key] = measure_whole(job, self.device), counted
        return self._whole[key]

    def parts(self, job: Job) -> Parts:
        """Return the costs of a round of IST."""
        workers = job.config.train.workers
        if workers not in self._parts:
            held = assignments(job)
            split, schedule = job.split, job.schedule
            messages = [message_bytes(job.config, split, schedule, held, worker) for worker in range(workers)]
            largest = max(range(workers), key=lambda worker: messages[worker][1])
            step = measure_subnet(job, largest, self.device)
            counted = count_step(job, self.device, with_activations=True)
            self._parts[workers] = Parts(messages, step, measure_coordinator(job, self.device), counted)
        return self._parts[workers]

    def _collective(self, collective: Collective, job: Job, hosts: Hosts) -> Prediction:
        workers, steps, settings = job.config.train.workers, job.config.train.local_steps, job.config.baseline
        whole, counted = self.whole(job)
        compute_s, exchange_s = collective_seconds(collective, whole, workers, steps, hosts, settings)
        sent = collective.rank_bytes(whole.sizes, workers, steps, settings)
        budgets = memory_budgets(job, counted)
        return _prediction(job, round(workers * sent), round(sent), budgets, compute_s, exchange_s)

    def _by_messages(self, job: Job, hosts: Hosts) -> Prediction:
        workers, steps = job.config.train.workers, job.config.train.local_steps
        parts = self.parts(job)
        messages, step = parts.messages, parts.step
        remote = [messages[worker] for worker in remote_workers(job.config)]
        sent = [sum(message[way] for message in remote) for way in (0, 1)]
        is_sharded = job.config.store_is_sharded
        if is_sharded:  # every link carries one worker's pieces, and as much of its own shard, in both directions
            most = max(down for down, _ in remote), max(up for _, up in remote)
            link = [sum(most)]
            _, exchange_s = ist_seconds([most], step.step_s, workers, steps, hosts)
            compute_s = steps * step.step_s * hosts.crowding(workers)
        else:
            link = sent
            compute_s, exchange_s = ist_seconds(remote, step.step_s, workers, steps, hosts)
        coordinate_s = parts.coordinator.cut_s + parts.coordinator.merge_s
        budgets = memory_budgets(job, parts.counted)
        return _prediction(job, sum(sent), max(link), budgets, compute_s, exchange_s, coordinate_s)


def _prediction(
    job: Job,
    sent_bytes: int,
    link_bytes: int,
    budgets: Mapping[str, MemoryBudget],
    compute_s: float,
    exchange_s: float,
    coordinate_s: float = 0.0,
) -> Prediction:
    steps = job.config.train.local_steps
    round_s = compute_s + exchange_s + coordinate_s
    epoch_steps = job.schedule.sampler.steps_per_epoch
    assert epoch_steps is not None
    coordinator = budgets.get("coordinator")
    return Prediction(
        method=job.config.method,
        workers=job.config.train.workers,
        local_steps=steps,
        batch_size=len(job.schedule.sampler.batch(0, 0)),
        sent_bytes=sent_bytes,
        link_bytes=link_bytes,
        memory_bytes=budgets["worker"].nbytes,
        memory=budgets["worker"].parts,
        coordinator_memory_bytes=coordinator.nbytes if coordinator else None,
        coordinator_memory=coordinator.parts if coordinator else None,
        memory_notes=tuple(dict.fromkeys(note for budget in budgets.values() for note in budget.notes)),
        compute_s=compute_s,
        exchange_s=exchange_s,
        coordinate_s=coordinate_s,
        round_s=round_s,
        epoch_s=round_s / steps * epoch_steps,
    )


def make_plan(config: Config, request: Request) -> Plan:
    """Predict a configuration's rounds, as plain values for JSON.

    Args:
        config: The configuration, with the largest number of `request.workers`.
        request: The request.

    Raises:
        ISTError: The configuration cannot be run with one of these numbers of workers.
    """
    hosts, methods = request.hosts, request.methods
    threads = torch.get_num_threads()
    torch.set_num_threads(config.pool.threads)
    try:
        planner = Planner(config, methods)
        held_bytes = resident_bytes()
        predictions = [
            planner.predict(method, number, hosts)
            for number in request.workers or (config.train.workers,)
            for method in methods
        ]
        simulation = _simulate(planner, methods, hosts) if request.simulate else None
    finally:
        torch.set_num_threads(threads)
    job = next(iter(planner.jobs.values()))
    parameters = [parameter.numel() for parameter in job.split.template.parameters() if parameter.requires_grad]
    return {
        "name": config.name,
        "model": config.model.name,
        "data": config.data.name,
        "parameters": sum(parameters),
        "link": asdict(hosts.link),
        "cores": hosts.cores,
        "hop_s": hosts.hop_s,
        "measured_on": {"device": str(planner.device), "threads": config.pool.threads},
        "held_bytes": held_bytes,
        "predictions": [asdict(prediction) for prediction in predictions],
        "simulation": simulation,
    }


def _simulate(planner: Planner, methods: Sequence[str], hosts: Hosts) -> dict[str, Any]:
    """Predict for increasing numbers of workers; `ends` gives each method's first impossible number and the reason."""
    places = [replace(hosts, link=Link(rate, rate)) for rate in SIMULATED_RATES_MBIT]
    points: list[dict[str, Any]] = []
    ends: dict[str, dict[str, Any]] = {}
    for workers in SIMULATED_WORKERS:
        for method in [name for name in methods if name not in ends]:
            try:
                found = [planner.predict(method, workers, place) for place in places]
            except ISTError as error:
                ends[method] = {"workers": workers, "reason": first_line(error)}
                continue
            points += [{"rate_mbit": p.link.up_mbit, **asdict(f)} for p, f in zip(places, found, strict=True)]
    return {"rates_mbit": list(SIMULATED_RATES_MBIT), "points": points, "ends": ends}
