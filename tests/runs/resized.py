"""A program for ranks: train a run of each method up to a round, with as many workers as ranks.

python -m tests.forked_ranks 3 tests/runs/resized.py FOLDER 2 -- 2 tests/runs/resized.py FOLDER 4
"""

import logging
import os
import sys
from pathlib import Path

from ist.distributed.environment import is_rank_zero
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.runs.preflight import resumed_folder
from ist.storage.run_folder import RunFolder, create_run_folder
from tests.conftest import small_config

FIRST = 2
"""The rounds of the runs before they are resumed for the first time."""


def main(out: Path, rounds: int) -> None:
    """Train each run up to so many rounds, and write what its baseline has logged."""
    for method in ("ist", "local_sgd", "ddp"):
        path = out / method
        config = small_config(
            method=method,
            train__workers=int(os.environ["WORLD_SIZE"]),
            train__rounds=rounds,
            checkpoint={"every": 5},
            pool={"kind": "torchrun", "device": "cpu"},
        )
        job = build_job(config)
        folder: RunFolder | None = None
        if is_rank_zero():
            logging.getLogger("ist.baselines").addHandler(logging.FileHandler(out / f"{method} to {rounds}.txt"))
            folder = create_run_folder(config, path) if rounds == FIRST else resumed_folder(job, config, path)
        execute(job, folder, resume=rounds > FIRST, progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
