"""A command that a signal ends: its exit code, its error line, and that it leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ist.errors import ConfigError, InterruptedRunError, PoolError
from ist.launch.signals import Stopped, exit_code, signal_of, stop_signals
from tests.conftest import ROOT, config_tree, naming, wait_for
from tests.pools.test_processes import children_of

many_processes = pytest.mark.system


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGQUIT, 131), (signal.SIGTERM, 143)]
)
def test_a_signal_is_raised_in_the_command_and_determines_its_exit_code(
    request: pytest.FixtureRequest, number: signal.Signals, code: int
) -> None:
    inherited = signal.getsignal(number)  # nohup and shells ignore some of them for what they start
    before = inherited if number == signal.SIGINT and inherited is not signal.SIG_IGN else signal.SIG_DFL
    signal.signal(number, before)
    request.addfinalizer(lambda: signal.signal(number, inherited))

    with stop_signals() as received:
        with pytest.raises(Stopped):
            signal.raise_signal(number)
        assert exit_code(InterruptedRunError(""), received) == code
        assert exit_code(PoolError(""), received) == 1
        assert exit_code(ConfigError(""), received) == 2

    assert signal.getsignal(number) == before
    assert signal_of(code) == signal_of(-number) == number
    assert signal_of(1) is signal_of(2) is signal_of(0) is None


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_child_has_the_former_signal_handlers() -> None:
    with stop_signals() as received:
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.1)

    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert received == []


def test_another_thread_does_not_change_signal_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[Any] = []

    def command() -> None:
        with stop_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()

    assert found == [before]


NATIVE = """
import datetime
import torch.distributed as dist
from ist.launch.signals import stop_signals
store = dist.HashStore()
with stop_signals():
    print("ready", flush=True)
    store.wait(["never"], datetime.timedelta(seconds=50))
"""


@pytest.mark.procs
def test_a_process_in_native_code_ends_too() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", NATIVE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        _, err = process.communicate(timeout=30)

    assert process.returncode == 143
    assert re.fullmatch("error: .*SIGTERM\n", err)
    assert time.monotonic() - sent < 6


@contextmanager
def running(tmp_path: Path, pool: str, rounds: int = 5000, **changes: Any) -> Iterator["subprocess.Popen[str]"]:
    """A run that has made some rounds; its temporary files go to tmp_path/tmp, its metrics to tmp_path/run."""
    config, run = tmp_path / "job.yaml", tmp_path / "run"
    options = {"pool": {"kind": pool, "device": "cpu"}, "train__workers": 2}
    config.write_text(yaml.safe_dump(config_tree(**{**options, "train__rounds": rounds, **changes})))
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-m", "ist", "train", str(config), "--run-dir", str(run)]
    metrics = run / "metrics.jsonl"
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, 60, "round 3")
            yield process
        finally:
            process.kill()


def left_in(folder: Path) -> list[str]:
    """Temporary files, except caches that torch shares among all its processes."""
    return [entry.name for entry in folder.iterdir() if not entry.name.startswith("torchinductor")]


def end(process: "subprocess.Popen[str]", number: signal.Signals, tmp_path: Path) -> str:
    """Send a signal; check the exit code and that there is one error line; return that line."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert not any(child.is_running() for child in started)
    assert left_in(tmp_path / "tmp") == []
    return error.removeprefix("error: ")


@pytest.mark.procs
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=many_processes),
        pytest.param(signal.SIGQUIT, marks=many_processes),
    ],
)
def test_a_run_in_one_process_reports_the_signal_and_how_to_resume(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, "inline") as process:
        error = end(process, number, tmp_path)

    assert re.search(naming(number.name, f"ist train --resume {tmp_path / 'run'}"), error)


@many_processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_run_in_processes_reports_the_signal_and_how_to_resume(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, "torchrun") as process:
        error = end(process, number, tmp_path)

    what = "interrupted" if number == signal.SIGINT else number.name
    assert re.search(naming(what, f"ist train --resume {tmp_path / 'run'}"), error)


@many_processes
def test_a_comparison_reports_the_signal_that_ended_it(tmp_path: Path) -> None:
    config, run = tmp_path / "job.yaml", tmp_path / "both"
    options = {"pool": {"kind": "torchrun", "device": "cpu"}, "train__workers": 2, "train__rounds": 5000}
    config.write_text(yaml.safe_dump(config_tree(**options)))
    (tmp_path / "tmp").mkdir()
    metrics = run / "ist" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "ist", "compare", str(config), "--run-dir", str(run)],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, 60, "round 3")
        error = end(process, signal.SIGTERM, tmp_path)

    assert re.search(naming("SIGTERM", f"ist train --resume {run / 'ist'}"), error)


@many_processes
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_a_signal_ends_is_named(tmp_path: Path, victim: int) -> None:
    with running(tmp_path, "torchrun") as process:
        children_of(psutil.Process(process.pid))[victim].send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)

    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1
    assert re.search(naming(f"rank {victim} (worker {victim})", "SIGTERM", "ist train --resume"), error)
    assert left_in(tmp_path / "tmp") == []


@many_processes
@pytest.mark.parametrize("victim", [0, 1])
def test_a_paused_rank_is_named_soon_after_the_timeout(tmp_path: Path, victim: int) -> None:
    with running(tmp_path, "torchrun", pool__timeout_s=5) as process:
        children_of(psutil.Process(process.pid))[victim].send_signal(signal.SIGSTOP)
        paused = time.monotonic()
        _, err = process.communicate(timeout=60)

    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1
    assert re.search(naming(f"rank {victim} (worker {victim})", "SIGSTOP"), error)
    assert time.monotonic() - paused < 15


@many_processes
def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, "torchrun") as process:
        ranks = children_of(psutil.Process(process.pid))
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=5)

    assert len(ranks) == 2
    assert alive == []


@many_processes
def test_a_run_outlives_its_terminal_if_hangups_are_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # like nohup; child processes inherit it
    try:
        with running(tmp_path, "torchrun", rounds=200) as process:
            for target in [psutil.Process(process.pid), *children_of(psutil.Process(process.pid))]:
                target.send_signal(signal.SIGHUP)
            _, err = process.communicate(timeout=100)
    finally:
        signal.signal(signal.SIGHUP, before)

    assert process.returncode == 0, err
    assert (tmp_path / "run" / "result.json").exists()
    assert left_in(tmp_path / "tmp") == []
