"""Starting and ending ranks, and which of several ranks' errors is reported as the cause."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import psutil
import pytest

from ist.distributed.environment import LAUNCHER, is_launched, is_rank_zero, is_repeated_elsewhere, is_started_by_ist
from ist.errors import ConfigError, DivergedError, ISTError, PoolError, WorkerLostError
from ist.launch import ranks
from ist.launch import start as launching
from ist.launch.ranks import Death, run_ranks
from tests.conftest import ROOT, Run, naming, small_config, wait_for

DIVERGED = (1, "DivergedError: worker 0 returned a loss of nan")
LOST_ZERO = (1, "PoolError: worker 1 lost the coordinator")
NO_ERROR = (1, None)


def cause(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *ends: Any, was_terminated: tuple[int, ...] = (), **death: Any
) -> ISTError:
    """The reported error if ranks end in this order, each as (rank, return code, the error that it recorded)."""

    def run(_commands: Any, environments: Any) -> list[Death]:
        for rank, _, text in ends:
            if text is not None:
                message = {"message": text, "extraInfo": {"timestamp": "1", "py_callstack": ""}}
                file = environments[rank]["TORCHELASTIC_ERROR_FILE"]
                Path(file).write_text(json.dumps({"message": message}))
        paused = death.get("paused")
        return [Death(rank, code, rank in was_terminated, rank == paused) for rank, code, _ in ends]

    monkeypatch.setattr(launching, "run_ranks", run)
    with pytest.raises(ISTError) as raised:
        launching.launch(small_config(train__workers=3, pool__kind="torchrun"), folder, resume=False)
    return raised.value


def test_a_lost_peer_is_reported_only_if_no_rank_knows_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cause(monkeypatch, tmp_path, (1, *LOST_ZERO), (0, *DIVERGED))
    assert isinstance(found, DivergedError)
    assert re.search(
        naming("worker 0 returned a loss of nan", "[rank 0 (worker 0)]", f"ist train --resume {tmp_path}"), str(found)
    )

    # The launcher terminated rank 0, which had recorded its error, because rank 1 had exited.
    found = cause(monkeypatch, tmp_path, (1, *LOST_ZERO), (0, -signal.SIGTERM, DIVERGED[1]), was_terminated=(0,))
    assert isinstance(found, DivergedError)

    assert "worker 1 lost the coordinator" in str(cause(monkeypatch, tmp_path, (1, *LOST_ZERO)))

    found = cause(monkeypatch, tmp_path, (1, *LOST_ZERO), (0, 1, "ValueError: Expected more than 1 value per channel"))
    assert str(found).startswith("ValueError: Expected more than 1 value per channel [rank 0 (worker 0)]")


def test_among_ranks_that_lost_a_peer_rank_zeros_error_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cause(monkeypatch, tmp_path, (1, *LOST_ZERO), (0, 1, "WorkerLostError: rank 2: no answer"))

    assert str(found).startswith("rank 2: no answer [rank 0 (worker 0)]")


@pytest.mark.parametrize(("code", "error"), [(-15, None), (143, None), (143, "InterruptedRunError: ended by SIGTERM")])
def test_a_rank_that_a_signal_ended_is_named_whatever_others_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: str | None
) -> None:
    found = cause(monkeypatch, tmp_path, (0, *LOST_ZERO), (2, code, error), (1, -15, None), was_terminated=(1,))

    assert isinstance(found, WorkerLostError)
    assert re.match(naming("rank 2 (worker 2)", "SIGTERM", f"ist train --resume {tmp_path}"), str(found))


def test_a_rank_that_the_launcher_killed_is_not_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cause(monkeypatch, tmp_path, (1, *LOST_ZERO), (2, -9, None), (0, -15, None), was_terminated=(0, 2))
    assert str(found).startswith("worker 1 lost the coordinator [rank 1 (worker 1)]")

    found = cause(monkeypatch, tmp_path, (1, *LOST_ZERO), (2, -15, None), was_terminated=(2,), paused=2)
    assert re.match(naming("rank 2 (worker 2)", "SIGSTOP", "pool.timeout_s"), str(found))

    found = cause(monkeypatch, tmp_path, (0, *NO_ERROR), (1, -15, None), was_terminated=(1,))
    assert re.match(naming("rank 0 (worker 0)", "code 1"), str(found))


def test_an_error_that_was_half_written_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "half").write_text('{"message": {"mess')

    assert launching._recorded(tmp_path / "half") == (None, "")


def shell(line: str) -> list[str]:
    return ["sh", "-c", line]


def test_ranks_that_succeed_are_not_reported() -> None:
    assert run_ranks([shell("exit 0")] * 2, [dict(os.environ)] * 2) == []


def test_the_first_to_fail_comes_first_and_a_paused_one_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_GRACE_S", 1.0)
    lines = ["exit 0", "trap '' TERM; sleep 60", "kill -STOP $$; sleep 60", "sleep 0.3; kill -TERM $$"]
    started = time.monotonic()

    deaths = run_ranks([shell(line) for line in lines], [dict(os.environ)] * 4)

    first, *others = deaths
    assert first == Death(3, -signal.SIGTERM, was_terminated=False, was_paused=False)
    found = {(death.rank, death.was_terminated, death.was_paused) for death in others}
    assert found == {(1, True, False), (2, True, True)}
    assert time.monotonic() - started < 5  # one second for others to fail, one second before SIGKILL


def test_a_command_that_cannot_be_started_is_one_error_and_ends_the_others() -> None:
    with pytest.raises(PoolError, match=naming("rank 1", "/nowhere")):
        run_ranks([shell("sleep 60"), ["/nowhere"]], [dict(os.environ)] * 2)


CHILD = """
import os, sys, time
from ist.distributed.environment import end_with_launcher
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
environment = {**os.environ, "IST_LAUNCHED": str(os.getpid())} if sys.argv[2] == "ist" else None
subprocess.run([sys.executable, "-c", sys.argv[1]], env=environment)
"""


@pytest.mark.procs
@pytest.mark.parametrize("launcher", ["ist", "torchrun"])
def test_a_rank_ends_with_the_process_that_launched_it(launcher: str, tmp_path: Path) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "IST_STORE": "x"}
    environment = {**os.environ, **ranks, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error")}
    if launcher == "torchrun":
        environment["TORCHELASTIC_RUN_ID"] = "a run"
    command = [sys.executable, "-c", PARENT, CHILD, launcher]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()

    wait_for(lambda: not psutil.pid_exists(child), 5, "the end of the rank")


@pytest.mark.procs
def test_a_rank_that_was_started_by_hand_outlives_its_shell() -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-c", PARENT, CHILD, "nobody"]
    with subprocess.Popen(command, env={**os.environ, **ranks}, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()

        with pytest.raises(psutil.TimeoutExpired):
            child.wait(1.5)  # it polls every half a second
        child.kill()


@pytest.mark.parametrize(
    "left_over",
    [{"RANK": "3"}, {"LOCAL_RANK": "3"}, {"WORLD_SIZE": "4"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, {}],
)
def test_single_variables_of_a_launcher_do_not_make_a_rank(
    left_over: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)

    assert not is_launched()
    assert is_rank_zero()
    assert not is_repeated_elsewhere()


@pytest.mark.parametrize(
    ("left_over", "wrong"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4"}, "MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host"}, "MASTER_PORT"),
        ({"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1"}, "RANK is 4 and WORLD_SIZE is 4"),
        ({"RANK": "x", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "1"}, "RANK is 'x'"),
    ],
)
def test_incomplete_variables_of_a_launcher_are_refused_by_name(
    left_over: dict[str, str], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError, match=naming(wrong, "unset RANK WORLD_SIZE")):
        is_launched()


ALL = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "left_over",
    [{"LOCAL_RANK": "3"}, {"RANK": "3"}, {"RANK": "3", "LOCAL_RANK": "3", "SLURM_PROCID": "3"}, ALL,
     {**ALL, LAUNCHER: "1", "TORCHELASTIC_ERROR_FILE": "/tmp/nowhere/error.json"}],
)  # fmt: skip
def test_an_error_is_printed_whatever_variables_the_shell_has_kept(left_over: dict[str, str], ist_command: Run) -> None:
    done = ist_command("train", "nosuch.yaml", env=left_over)

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nosuch.yaml: ")


def test_only_the_first_rank_of_torchrun_or_slurm_prints_a_common_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ALL.items():
        monkeypatch.setenv(name, value)
    assert is_launched()
    assert not is_repeated_elsewhere()

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert not is_repeated_elsewhere()  # a shell inside a rank
    monkeypatch.setattr(os, "getsid", lambda _: os.getpid())
    assert is_repeated_elsewhere()

    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert is_repeated_elsewhere()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not is_repeated_elsewhere()


def test_a_rank_belongs_to_ist_only_if_its_parent_process_launched_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "x")
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    assert is_started_by_ist()
    monkeypatch.setenv(LAUNCHER, "1")
    assert not is_started_by_ist()


def test_a_job_for_ray_takes_the_whole_package_along() -> None:
    """A pattern without a slash at its beginning also leaves out folders of that name inside `ist`."""
    (line,) = re.findall("^EXCLUDED = (.*)$", (ROOT / "launch" / "ray_job.py").read_text(), re.MULTILINE)
    anywhere = [pattern for pattern in ast.literal_eval(line) if not pattern.startswith("/")]
    names = {part for path in (ROOT / "ist").rglob("*.py") for part in path.relative_to(ROOT).parts}

    assert len(anywhere) > 2
    assert not [name for name in names if any(fnmatch(name, pattern) for pattern in anywhere)]
