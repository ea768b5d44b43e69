"""Make many runs in one set of processes, because starting processes would dominate a study of many short runs.

Each finished run is a line of `results/NAME_runs.jsonl` and is not repeated: delete the file, or a line, to repeat it.
A run equals one of `ist train` or `ist compare`, in separate processes over gloo, where rank 0 is a worker too. Only
its memory differs: the processes have made other runs before, so it is a lower bound, unless the run is made alone.
memory_bytes is that of the largest worker other than rank 0, which also coordinates and evaluates.

    torchrun --nproc-per-node N -m benchmarks.session QUEUE RUNS     # the command that `Session.run` starts
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, add_run, finished_runs
from ist.config.load import config_for_method, load_config
from ist.config.schema import Config
from ist.distributed.environment import is_rank_zero
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.runs.loading.load import load_data
from ist.runs.open import FollowerPart
from ist.subnet.job import Job

REPORTED = (
    "metrics", "test_loss", "loss", "sent_bytes", "train_s", "virtual_s", "coordinator_memory_bytes", "rounds",
    "samples", "parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run of a study.

    Attributes:
        key: The unique name of the run.
        config: The name of a file in configs/.
        label: Its entry in `ist compare`.
        overrides: Overrides in the form of `--set`.
    """

    key: str
    config: str
    label: str
    overrides: tuple[str, ...] = ()

    def load(self) -> Config:
        """Return the run's configuration; the overrides take precedence over the changes of the label."""
        path = ROOT / "configs" / f"{self.config}.yaml"
        config = config_for_method(load_config(path), self.label)
        given = {**config.compare.overrides.get(self.label, {})}
        changes = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        common = ["pool.coordinator=trains", "pool.kind=torchrun", "checkpoint.every=1000000", "evaluate.every=1000000"]
        method = [f"method={config.method}", f"label={json.dumps(self.label)}"]
        return load_config(path, [*method, *changes, *common, *self.overrides])


class Session:
    """The finished runs of a study, and the processes that make further runs.

    Args:
        name: The name of the study.
        workers: The number of processes.
    """

    def __init__(self, name: str, workers: int = 4) -> None:
        self._path = RESULTS / f"{name}_runs.jsonl"
        self._workers = workers

    def run(self, runs: Iterable[Run], alone: bool = False) -> dict[str, Any]:
        """Make the missing runs, and return the results of all runs by key; None for a failed run.

        Args:
            runs: The runs.
            alone: Whether to start new processes for each run.
        """
        runs = list(runs)
        for _ in runs:
            found = self.found()
            missing = [run for run in runs if run.key not in found]
            if not missing:
                break
            self._launch(missing[:1] if alone else missing)
            after = self.found()
            if not any(run.key in after for run in missing):  # the first missing run made the processes fail
                add_run(self._path, missing[0].key, None)
        found = self.found()
        return {run.key: found[run.key] for run in runs}

    def found(self) -> dict[str, Any]:
        """Return the results of all finished runs."""
        return finished_runs(self._path)

    def _launch(self, runs: Sequence[Run]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            queue = Path(scratch) / "queue.json"
            queue.write_text(json.dumps([asdict(run) for run in runs]))
            command = [
                sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self._workers),
                "--master-addr", "127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
                "-m", "benchmarks.session", str(queue), str(self._path),
            ]  # fmt: skip
            subprocess.run(command, check=False, cwd=ROOT)


def made(job: Job) -> dict[str, Any] | None:
    """Make a run in this process; return its results, or None on a rank other than 0."""
    part = execute(job, progress=False)
    if isinstance(part, FollowerPart) or not is_rank_zero():
        return None
    result: Mapping[str, Any] = part.recorder.result()
    reported = {key: result[key] for key in REPORTED}
    others = part.recorder.history[-1]["memory_bytes_by_worker"][1:]
    reported["memory_bytes"] = max(others, default=result["memory_bytes"])
    return reported


def main() -> None:
    """Make the runs of a queue, as one of the processes."""
    import ctypes

    import torch

    torch.set_num_threads(1)

    @cache
    def loaded(data: str) -> Any:
        return load_data(configs[data])

    configs: dict[str, Config] = {}
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        run = Run(**{**entry, "overrides": tuple(entry["overrides"])})
        config = run.load()
        data = config.data.model_dump_json()
        configs[data] = config
        job = build_job(config, loaded(data))
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        started = time.perf_counter()
        reported = made(job)
        if reported is not None:
            add_run(Path(sys.argv[2]), run.key, reported)
            shown = {**reported["metrics"], "test_loss": reported["test_loss"], "MB": reported["sent_bytes"] / 1e6}
            shown |= {
                "train_s": reported["train_s"],
                "virtual_s": reported["virtual_s"],
                "all_s": time.perf_counter() - started,
            }
            numbers = {name: f"{value:.5g}" for name, value in shown.items() if not name.startswith("best_")}
            print(f"{run.key}: {numbers}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
