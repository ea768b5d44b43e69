"""Which of several processes' errors is told as the cause."""

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ist import launch as launching
from ist.errors import DivergedError, ISTError
from tests.conftest import small_config


def failure(folder: Path, rank: int, message: str, timestamp: int, exit_code: int = 1) -> ProcessFailure:
    file = folder / f"{rank}.json"
    recorded = {"message": message, "extraInfo": {"timestamp": str(timestamp), "py_callstack": ""}}
    file.write_text(json.dumps({"message": recorded}))
    return ProcessFailure(rank, 1000 + rank, exit_code, str(file))


def test_a_lost_peer_is_told_only_if_nobody_knows_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {
        0: failure(tmp_path, 0, "DivergedError: worker 0 returned a loss of nan", 101),
        1: failure(tmp_path, 1, "PoolError: worker 1 lost the coordinator", 100),
    }

    def fail(*_: object) -> None:
        raise ChildFailedError("ist", failures)

    monkeypatch.setattr(launching, "elastic_launch", lambda *_: fail)
    job = small_config(train__workers=2, pool__kind="torchrun")

    with pytest.raises(DivergedError, match=r"worker 0 returned a loss of nan \[rank 0 \(worker 0\)\] Go on"):
        launching.launch(job, tmp_path, resume=False)

    # The agent ended rank 0, which had told its error, because rank 1 had left.
    failures[0] = failure(tmp_path, 0, "DivergedError: worker 0 returned a loss of nan", 101, exit_code=-15)
    with pytest.raises(DivergedError, match="worker 0 returned a loss of nan"):
        launching.launch(job, tmp_path, resume=False)

    del failures[0]
    with pytest.raises(ISTError, match="worker 1 lost the coordinator"):
        launching.launch(job, tmp_path, resume=False)

    failures[0] = failure(tmp_path, 0, "ValueError: Expected more than 1 value per channel", 101)
    with pytest.raises(ISTError, match=r"ValueError: Expected more than 1 value per channel \[rank 0 \(worker 0\)\]"):
        launching.launch(job, tmp_path, resume=False)
