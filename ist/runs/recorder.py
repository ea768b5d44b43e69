"""The recorder: it turns the report of each round into a record for the run folder, the callbacks and the caller.

Where it sits: `ist/runs/open.py` creates it on the coordinator; `ist/training/rounds.py` calls it after each round.
Not here: measuring (`ist/training/coordinator.py`, `ist/baselines/ranks.py`), showing records (`ist/monitoring/`,
`ist/report/`).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ist.errors import CheckpointError
from ist.evaluation.evaluate import Metrics
from ist.measurements import FAULTS, MEASUREMENTS, over_rounds
from ist.monitoring import observers
from ist.monitoring.callback import Callback
from ist.monitoring.meter import MemoryGauge, Meter, process_peak_bytes
from ist.storage.checkpoint import Progress
from ist.storage.run_folder import RunFolder
from ist.subnet.job import Job, assignments, remote_workers
from ist.training.memory_budget import count_step, memory_budgets
from ist.training.rounds import RoundReport, Seconds


class RunRecorder:
    """Collects a run's records; a `Recorder`.

    Args:
        job: The run.
        folder: The run folder to write to; None writes nothing.
        callbacks: They receive every event, and may end the run.
        before: The progress entry of the resumed checkpoint; empty for a new run.
        meter: Counts the bytes of this process.
        gauge: Measures the memory of this process.
        run_id: The id of this incarnation of the run, for checkpoints.
        announce: Tells the other ranks, after every round but the last, whether a callback ends the run; None: there
            are no ranks to tell.

    Attributes:
        history: One record a round, in order; counters (samples, bytes, seconds) start at the first round of the run.
            Early rounds are missing if the run was resumed without its metrics.jsonl.
        stopped_early: The reason why a callback has ended the run; None if none has.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder | None,
        callbacks: Sequence[Callback],
        before: Progress,
        meter: Meter,
        gauge: MemoryGauge,
        run_id: str = "",
        announce: Callable[[bool], object] | None = None,
    ) -> None:
        self._job = job
        self._metric = job.task.metric
        self._names: tuple[str, ...] = self._metric.names if self._metric else ()
        self._folder = folder
        self._callbacks = callbacks
        self._meter = meter
        self._gauge = gauge
        self._run_id = run_id
        self._announce = announce
        self.stopped_early: str | None = None
        self._seen = [[0] * job.config.train.workers for _ in range(2)]
        self._totals = {name: before.totals.get(name, 0) for name in over_rounds("total")}
        self._faults = {str(kind): before.totals.get(kind, 0) for kind in FAULTS}
        self._rounds_done = before.rounds_done
        self._numbers: dict[str, float] = {}
        self._bytes_before = self._totals["sent_bytes"]
        self._gathered_before = meter.gathered
        self.history: list[dict[str, Any]] = folder.records() if folder else []
        for record in self.history:
            self._note_numbers(record)
        self._numbers |= before.numbers

    def round_done(
        self,
        round_number: int,
        report: RoundReport,
        metrics: Metrics | None,
        seconds: Seconds,
        sent_bytes: int,
    ) -> bool:
        """Record a round; return whether a callback ends the run after it.

        Raises:
            CallbackError: A callback fails.
            RunFolderError: The record cannot be written.
        """
        found: dict[str, Any] = {
            **report.numbers,
            "sent_bytes": self._bytes_before + sent_bytes - self._totals["sent_bytes"],
            "evaluate_bytes": self._meter.gathered - self._gathered_before,
            "train_s": seconds.train,
            "evaluate_s": seconds.evaluate,
            "bytes_to_worker": self._since_last_round(self._meter.sent, 0),
            "bytes_from_worker": self._since_last_round(self._meter.received, 1),
            "coordinator_memory_bytes": self._gauge.peak_bytes(),
            "coordinator_process_memory_bytes": process_peak_bytes(),
        }
        self._gathered_before = self._meter.gathered
        for total in self._totals:
            self._totals[total] += found[total]
        found |= self._totals
        num_samples = self._job.schedule.sampler.num_samples
        if self._job.task.loop is None and num_samples is not None:  # otherwise it is unknown
            found["epoch"] = self._totals["samples"] / num_samples
        # What a worker held in rounds of an older version is unknown, and so is the most of the run.
        if report.held_fraction is not None and (not self._rounds_done or "held_fraction" in self._numbers):
            found["held_fraction"] = report.held_fraction
        if report.merge_scale is not None:
            found["merge_scale"] = report.merge_scale
        record: dict[str, Any] = {"round": round_number}
        for measured in MEASUREMENTS:
            if measured.recorded and measured.source != "evaluation" and measured.name in found:
                record[measured.name] = found[measured.name]
            if measured.by_worker:
                record[f"{measured.name}_by_worker"] = [of_worker[measured.name] for of_worker in report.by_worker]
        if metrics:
            record |= self._evaluation(metrics)
        if report.logged:
            record["logged"] = {k: value if math.isfinite(value) else None for k, value in report.logged.items()}
        if report.lost:
            record["lost"] = [{"worker": lost.worker, "kind": lost.kind, "reason": lost.reason} for lost in report.lost]
        for lost in report.lost:
            self._faults[lost.kind] += 1
        self._rounds_done = round_number + 1
        self._note_numbers(record)
        self.history.append(record)
        if self._folder:
            self._folder.append_record(record)
        stop = observers.round_ended(self._callbacks, record)
        if self._rounds_done == self._job.schedule.num_rounds:
            return False
        if stop is not None:
            self.stopped_early = stop.reason
        if self._announce is not None:
            self._announce(stop is not None)
        return stop is not None

    def evaluated(self, metrics: Metrics) -> None:
        """Receive the evaluation of the trained network, if the run ends after a round that was not evaluated.

        Raises:
            CallbackError: A callback fails.
        """
        record = {**self.history[-1], **self._evaluation(metrics)}
        self._note_numbers(record)
        observers.evaluated(self._callbacks, record)

    def _evaluation(self, metrics: Metrics) -> dict[str, Any]:
        self._names = tuple(metrics.values)
        name = self._names[0] if self._names else None
        return {"test_loss": metrics.loss, "metric": name, "accuracy": None, **metrics.values}

    def _note_numbers(self, record: Mapping[str, Any]) -> None:
        numbers = self._numbers
        names = self._names
        latest = {key: record[key] for key in (*over_rounds("latest"), *names) if record.get(key) is not None}
        numbers |= latest
        for peak in over_rounds("peak"):
            if peak in record:
                numbers[peak] = max(record[peak], numbers.get(peak, 0))
        if self._metric and names[0] in latest:
            best = max if self._metric.higher_is_better else min
            key = f"best_{names[0]}"
            numbers[key] = best(latest[names[0]], numbers.get(key, latest[names[0]]))

    def _since_last_round(self, counter: Counter[int], which: int) -> list[int]:
        counts = [counter[worker] for worker in range(self._job.config.train.workers)]
        before, self._seen[which] = self._seen[which], counts
        return [now - then for now, then in zip(counts, before, strict=True)]

    def progress(self, rounds_done: int) -> Progress:
        """Return the progress entry of a checkpoint."""
        return Progress(rounds_done, {**self._totals, **self._faults}, dict(self._numbers), self._run_id)

    def save(self, rounds_done: int, state: Mapping[str, Tensor]) -> None:
        """Save a checkpoint, if there is a run folder.

        Raises:
            RunFolderError: The checkpoint cannot be written.
        """
        if self._folder:
            self._folder.save_checkpoint(state, self.progress(rounds_done), self._job.config.checkpoint.keep)
            observers.checkpoint_saved(self._callbacks, rounds_done)

    def finish(self, model: nn.Module) -> None:
        """Write the trained network and the final numbers, if there is a run folder, and end the run for callbacks.

        Raises:
            CallbackError: A callback fails.
            RunFolderError: One of them cannot be written.
        """
        result = self.result()
        if self._folder:
            self._folder.finish(model.state_dict(), result)
        observers.run_ended(self._callbacks, result)

    def result(self) -> dict[str, Any]:
        """Return the run's final numbers.

        Raises:
            CheckpointError: The run was resumed after its last round, from a checkpoint that lacks these numbers.
        """
        config, numbers = self._job.config, self._numbers
        process = "coordinator_process_memory_bytes"  # the last checkpoint is later than the last record
        if process in numbers:
            numbers[process] = max(numbers[process], process_peak_bytes())
        required = [m.name for m in MEASUREMENTS if m.required and m.over_rounds in ("latest", "peak")]
        if unknown := [name for name in required if name not in numbers]:
            raise CheckpointError(
                f"'{unknown[0]}' is neither in the progress entry of the last round's checkpoint nor in metrics.jsonl: "
                "delete that checkpoint and resume from the one before"
            )
        names = self._names
        parameters = list(self._job.split.template.parameters())
        return {
            "name": config.name,
            "method": config.method,
            "label": config.label or config.method,
            "seed": config.seed,
            "workers": config.train.workers,
            "rounds": self._rounds_done,
            **dict.fromkeys(m.name for m in MEASUREMENTS if m.source == "evaluation"),
            **{name: numbers[name] for name in (*over_rounds("latest"), *over_rounds("peak")) if name in numbers},
            "metric": names[0] if names else None,
            "metrics": {key: numbers[key] for name in names for key in (name, f"best_{name}") if key in numbers},
            "best_accuracy": numbers.get("best_accuracy"),
            **({"stopped_early": self.stopped_early} if self.stopped_early is not None else {}),
            **self._totals,
            **({"memory_budget": budget} if (budget := self._memory_budget()) else {}),
            **({"remote_workers": len(remote_workers(self._job.config))} if config.method_spec.has_coordinator else {}),
            "faults": dict(self._faults),
            **({"block_scales": scales} if (scales := assignments(self._job).block_scales()) else {}),
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        }

    def _memory_budget(self) -> dict[str, dict[str, int]]:
        """Return the predicted memory of a worker's process and of the coordinator, by part, for a run with a folder.

        Activations are not counted: that would run the user's network and loss again. In a pool whose workers share one
        process, the prediction would not be that of a process.
        """
        if self._folder is None or self._job.config.pool.spec.in_process:
            return {}
        step = count_step(self._job, torch.device("cpu"), with_activations=False)
        return {process: dict(budget.parts) for process, budget in memory_budgets(self._job, step).items()}
