"""Half an hour of training on Ray while a random worker is killed every 20 seconds.

    python -m benchmarks.soak [--minutes 30] [--every 20]

Claims: no round is lost, each kill loses at most one worker's part of one round, each worker is replaced, and memory
does not grow.
"""

import argparse
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

import ist
from benchmarks.common import write_result
from ist.config.load import validate
from ist.loops.part import completed
from ist.runs.build import build_job
from ist.runs.open import CoordinatorPart, open_run
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.training.rounds import run_rounds

WORKERS = 3
ACTOR = "ray::RayWorker"
SAMPLE_EVERY_S = 5.0


def actors() -> list[psutil.Process]:
    """Return the worker processes of the cluster that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(ACTOR):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Killer(threading.Thread):
    """Kills a random worker at regular intervals, and samples memory."""

    def __init__(self, every_s: float) -> None:
        super().__init__(daemon=True)
        self._every_s = every_s
        self._over = threading.Event()
        self._random = random.Random(0)
        self.kills = 0
        self.samples: list[dict[str, float]] = []
        self._began = time.monotonic()

    def run(self) -> None:
        """Kill and sample until `stop`."""
        last_kill = time.monotonic()
        while not self._over.wait(SAMPLE_EVERY_S):
            self.samples.append(self._sample())
            victims = actors()
            if time.monotonic() - last_kill >= self._every_s and victims:
                os.kill(self._random.choice(victims).pid, signal.SIGKILL)
                last_kill = time.monotonic()
                self.kills += 1

    def stop(self) -> None:
        """Stop the thread, and wait for its end."""
        self._over.set()
        self.join()

    def _sample(self) -> dict[str, float]:
        driver = psutil.Process()
        cluster = 0
        for process in driver.children(recursive=True):
            try:
                if any(name in " ".join(process.cmdline()[:1]) for name in ("gcs_server", "raylet")):
                    cluster += process.memory_info().rss - process.memory_info().shared
            except psutil.Error:
                continue
        memory = driver.memory_info()
        return {
            "minute": (time.monotonic() - self._began) / 60,
            "driver_bytes": memory.rss - memory.shared,
            "store_bytes": memory.shared,
            "cluster_bytes": cluster,
            "open_files": driver.num_fds(),
        }


def soak(minutes: float, every_s: float) -> dict[str, Any]:
    """Train for so long, with a kill every so often, and return what happened."""
    with tempfile.TemporaryDirectory() as temporary:
        config = validate(
            {
                "name": "soak",
                "model": {"name": "mlp", "args": {"widths": [64, 512, 512, 10]}},
                "data": {"name": "digits"},
                "train": {
                    "workers": WORKERS,
                    "rounds": 1_000_000,
                    "local_steps": 50,
                    "batch_size": 32,
                    "optimizer": {"name": "SGD", "args": {"lr": 0.05}},
                },
                "evaluate": {"every": 20},
                "checkpoint": {"every": 20},
                "pool": {"kind": "ray", "min_returned": 1},
            },
            "soak",
        )
        folder = create_run_folder(config, Path(temporary) / "soak")
        killer = Killer(every_s)
        try:
            with open_run(build_job(config), folder, resume=False, callbacks=[TimeLimit(minutes)]) as part:
                assert isinstance(part, CoordinatorPart)
                killer.start()
                completed(run_rounds(part.job, part.method, part.recorder, 0, part.device))
        finally:
            killer.stop()
        return outcome(folder, killer)


class TimeLimit(ist.Callback):
    """Ends the run after some minutes."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes

    def on_start(self, run: ist.RunStart) -> None:  # noqa: ARG002
        """Note when the run ends."""
        self._end = time.monotonic() + self._minutes * 60

    def on_round(self, record: Mapping[str, Any]) -> ist.Stop | None:  # noqa: ARG002
        """End the run when the time is up."""
        return ist.Stop("the time is up") if time.monotonic() > self._end else None


def outcome(folder: RunFolder, killer: Killer) -> dict[str, Any]:
    """Count the lost parts, and summarize memory."""
    records = folder.records()
    lost = [entry for record in records for entry in record.get("lost", [])]
    accuracies = [record["accuracy"] for record in records if record.get("accuracy") is not None]
    return {
        "minutes": killer.samples[-1]["minute"],
        "kills": killer.kills,
        "rounds_completed": len(records),
        "rounds_begun": records[-1]["round"] + 1,
        "rounds_with_a_loss": sum(bool(record.get("lost")) for record in records),
        "parts_lost": len(lost),
        "parts_trained": sum(record["workers"] for record in records) - len(lost),
        "accuracy": accuracies[-1],
        "memory": {key: growth(killer.samples, key) for key in ("driver_bytes", "store_bytes", "cluster_bytes")}
        | {"open_files": growth(killer.samples, "open_files")},
        "samples": killer.samples[:: max(1, len(killer.samples) // 60)],
    }


def growth(samples: Sequence[Mapping[str, float]], key: str) -> dict[str, float]:
    """Return the means of the second and of the last quarter; the first is skipped as warm-up."""
    quarter = max(1, len(samples) // 4)
    second = statistics.fmean(sample[key] for sample in samples[quarter : 2 * quarter] or samples)
    last = statistics.fmean(sample[key] for sample in samples[-quarter:])
    return {"second_quarter": second, "last_quarter": last, "ratio": last / second if second else 1.0}


def main() -> None:
    """Run the soak and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between kills")
    arguments = parser.parse_args()
    found = soak(arguments.minutes, arguments.every)
    table = Table("what", "measured")
    for key in (
        "minutes",
        "kills",
        "rounds_completed",
        "rounds_with_a_loss",
        "parts_trained",
        "parts_lost",
        "accuracy",
    ):
        table.add_row(key.replace("_", " "), f"{found[key]:.4g}" if isinstance(found[key], float) else str(found[key]))
    for key, ratio in found["memory"].items():
        table.add_row(f"{key.replace('_', ' ')}: last quarter / second", f"{ratio['ratio']:.3f}")
    Console().print(table)
    print(write_result("soak", found))


if __name__ == "__main__":
    main()
