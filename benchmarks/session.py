"""Many runs in one set of processes: what a study of many short runs would else spend on starting them.

Each finished run is a line of `results/NAME_runs.jsonl`, and is not made again: delete the file, or a line, to have it
made anew. A run is the same as `ist train` or `ist compare` would make it, in real processes over gloo, where rank 0 is
a worker too. Only its memory is read from processes that have run others before, and is therefore a lower bound, unless
it is run alone; memory_bytes is that of the largest worker beside rank 0, which coordinates and evaluates too.

    torchrun --nproc-per-node N -m benchmarks.session QUEUE RUNS     # what `Session.run` starts
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

KEPT = (
    "metrics", "test_loss", "loss", "sent_bytes", "train_s", "virtual_s", "coordinator_memory_bytes", "rounds",
    "samples", "parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run of a study.

    Attributes:
        key: What it is called; it is made once.
        config: Name of a file in configs/.
        label: The entry of `ist compare` that it is.
        overrides: As `--set` takes them.
    """

    key: str
    config: str
    label: str
    overrides: tuple[str, ...] = ()

    def load(self) -> Config:
        """Return the run's configuration: what is overridden counts more than what the label changes."""
        path = ROOT / "configs" / f"{self.config}.yaml"
        config = config_for_method(load_config(path), self.label)
        given = {**config.compare.overrides.get(self.label, {})}
        changes = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        common = ["pool.coordinator=trains", "pool.kind=torchrun", "checkpoint.every=1000000", "evaluate.every=1000000"]
        method = [f"method={config.method}", f"label={json.dumps(self.label)}"]
        return load_config(path, [*method, *changes, *common, *self.overrides])


class Session:
    """Finished runs of a study, and the processes that make more.

    Args:
        name: Of the study.
        workers: Processes.
    """

    def __init__(self, name: str, workers: int = 4) -> None:
        self._path = RESULTS / f"{name}_runs.jsonl"
        self._workers = workers

    def run(self, runs: Iterable[Run], alone: bool = False) -> dict[str, Any]:
        """Make those that are not there, and return the results of all by key; None for one that failed.

        Args:
            runs: The runs.
            alone: Start new processes for each.
        """
        runs = list(runs)
        for _ in runs:
            found = self.found()
            missing = [run for run in runs if run.key not in found]
            if not missing:
                break
            self._launch(missing[:1] if alone else missing)
            after = self.found()
            if not any(run.key in after for run in missing):  # the first one ended the processes
                add_run(self._path, missing[0].key, None)
        found = self.found()
        return {run.key: found[run.key] for run in runs}

    def found(self) -> dict[str, Any]:
        """Return the results that are there."""
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


def main() -> None:
    """Make the runs of a queue; every process does."""
    import ctypes

    import torch

    from ist.distributed.environment import is_rank_zero
    from ist.runs.build import build_job, load_data
    from ist.runs.open import Following, open_run
    from ist.training.rounds import follow_rounds, run_rounds

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
        with open_run(job, None, resume=False, progress=False) as part:
            if isinstance(part, Following):
                follow_rounds(part.job, part.follower, part.first_round)
            else:
                run_rounds(part.job, part.method, part.recorder, part.first_round, part.device)
        if is_rank_zero():
            assert not isinstance(part, Following)
            result: Mapping[str, Any] = part.recorder.result()
            kept = {key: result[key] for key in KEPT}
            others = part.recorder.history[-1]["memory_bytes_by_worker"][1:]
            kept["memory_bytes"] = max(others, default=result["memory_bytes"])
            add_run(Path(sys.argv[2]), run.key, kept)
            shown = {**kept["metrics"], "test_loss": kept["test_loss"], "MB": kept["sent_bytes"] / 1e6}
            shown |= {
                "train_s": kept["train_s"],
                "virtual_s": kept["virtual_s"],
                "all_s": time.perf_counter() - started,
            }
            numbers = {name: f"{value:.5g}" for name, value in shown.items() if not name.startswith("best_")}
            print(f"{run.key}: {numbers}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
