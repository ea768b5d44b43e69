"""Turn what the round loop reports into records: for the run folder, the display and the caller.

Not here: computing any of it (`ist/coordinator.py`), drawing it (`ist/display.py`, `ist/report/`).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ist.checkpoint import Progress
from ist.coordinator import RoundReport, Seconds
from ist.display import Display
from ist.evaluate import Metrics
from ist.job import Job
from ist.meter import MemoryGauge, Meter
from ist.run_folder import RunFolder

COUNTERS = ("samples", "sent_bytes", "train_s", "evaluate_s")


class RunRecorder:
    """Collects a run's records; a `Recorder`.

    Args:
        job: The run.
        folder: Where to write them, if anywhere.
        display: Where to show them.
        before: Where a resumed run stood.
        meter: Counts the bytes of this process.
        gauge: Measures the memory of this process.

    Attributes:
        history: One record a round, in order; counters (samples, bytes, seconds) run from the run's beginning.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder | None,
        display: Display,
        before: Progress,
        meter: Meter,
        gauge: MemoryGauge,
    ) -> None:
        self._job = job
        self._folder = folder
        self._display = display
        self._meter = meter
        self._gauge = gauge
        self._seen = [[0] * job.config.train.workers for _ in range(2)]
        self._totals = {counter: before.totals.get(counter, 0) for counter in COUNTERS}
        self._bytes_before = self._totals["sent_bytes"]
        self.history: list[dict[str, Any]] = folder.records() if folder else []

    def round_done(
        self,
        round_number: int,
        report: RoundReport,
        metrics: Metrics | None,
        seconds: Seconds,
        sent_bytes: int,
    ) -> None:
        """Note a round.

        Raises:
            RunFolderError: It cannot be written.
        """
        totals = self._totals
        totals["samples"] += report.samples
        totals["train_s"] += seconds.train
        totals["evaluate_s"] += seconds.evaluate
        totals["sent_bytes"] = self._bytes_before + sent_bytes
        record: dict[str, Any] = {
            "round": round_number,
            "workers": report.workers,
            "steps": report.steps,
            "epoch": totals["samples"] / self._job.dealing.num_samples,
            "loss": report.loss,
            **totals,
            "compute_s": report.compute_s,
            "exchange_s": report.exchange_s,
            "idle_s": report.idle_s,
            "cut_s": report.cut_s,
            "merge_s": report.merge_s,
            # Of this round alone: what this process sent to each worker and got from it (what each rank sent, where
            # they all-reduce).
            "bytes_to_worker": self._since_last_round(self._meter.sent, 0),
            "bytes_from_worker": self._since_last_round(self._meter.received, 1),
            "memory_bytes": max(report.memory_bytes),
            "memory_bytes_by_worker": list(report.memory_bytes),
            "coordinator_memory_bytes": self._gauge.peak_bytes(),
        }
        if metrics:
            record |= {"test_loss": metrics.loss, "accuracy": metrics.accuracy}
        if report.lost:
            record["lost"] = [{"worker": lost.worker, "kind": lost.kind, "reason": lost.reason} for lost in report.lost]
        self.history.append(record)
        if self._folder:
            self._folder.append_record(record)
        self._display.show(record)

    def _since_last_round(self, counter: Counter[int], which: int) -> list[int]:
        counts = [counter[worker] for worker in range(self._job.config.train.workers)]
        before, self._seen[which] = self._seen[which], counts
        return [now - then for now, then in zip(counts, before, strict=True)]

    def save(self, rounds_done: int, state: Mapping[str, Tensor]) -> None:
        """Save a checkpoint, if there is a run folder.

        Raises:
            RunFolderError: It cannot be written.
        """
        if self._folder:
            self._folder.save_checkpoint(
                state, Progress(rounds_done, dict(self._totals)), self._job.config.checkpoint.keep
            )

    def finish(self, model: nn.Module) -> None:
        """Write the trained network and the final numbers, if there is a run folder.

        Raises:
            RunFolderError: They cannot be written.
        """
        if self._folder:
            self._folder.finish(model.state_dict(), self.result())

    def result(self) -> dict[str, Any]:
        """Return the run's final numbers."""
        config, history = self._job.config, self.history
        evaluated = [record for record in history if record.get("test_loss") is not None]
        accuracies = [r["accuracy"] for r in evaluated if r["accuracy"] is not None]
        return {
            "name": config.name,
            "method": config.method,
            "seed": config.seed,
            "workers": config.train.workers,
            "rounds": len(history),
            "loss": history[-1]["loss"],
            "test_loss": evaluated[-1]["test_loss"] if evaluated else None,
            "accuracy": accuracies[-1] if accuracies else None,
            "best_accuracy": max(accuracies, default=None),
            **self._totals,
            "memory_bytes": max(record["memory_bytes"] for record in history),
            **({"block_scales": self._job.block_scales} if self._job.block_scales else {}),
            "parameters": sum(parameter.numel() for parameter in self._job.template.parameters()),
        }
