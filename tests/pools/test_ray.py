"""The Ray pool: weights and bytes as in the inline pool, and clear errors if workers or the cluster are missing."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from torch import nn
from torch.utils.data import TensorDataset

import ist
from ist.errors import ConfigError, PoolError, WorkerLostError
from ist.monitoring.meter import Meter
from ist.pools.ray_pool import RayPool
from ist.runs.execute import execute
from ist.runs.open import check_method
from ist.storage.run_folder import create_run_folder
from tests.conftest import ROOT, Run, assert_same, config_tree, data, naming, run_group, small_config, wait_for
from tests.networks import NETWORKS, seeded
from tests.pools.scenario import SCENARIOS, job, rounds_without_waiting, run
from tests.pools.test_conformance import message_bytes, outcome
from tests.runs.test_resume import KEPT, PowerCutError
from tests.runs.test_resume import run as run_folder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_address")]


@pytest.mark.parametrize("name", SCENARIOS)
def test_ray_and_inline_end_with_identical_weights_and_the_bytes_of_the_formula(tmp_path: Path, name: str) -> None:
    (tmp_path / "inline").mkdir()
    (tmp_path / "ray").mkdir()

    run(name, tmp_path / "inline")
    run(name, tmp_path / "ray", pool__kind="ray")

    expected, history = outcome(tmp_path / "inline", name)
    found, found_history = outcome(tmp_path / "ray", name)
    assert_same(found, expected)
    made, _ = job(name, pool__kind="ray")
    for record, reference in zip(found_history, history, strict=True):
        assert [record[key] for key in ("loss", "accuracy", "samples", "steps")] == [
            reference[key] for key in ("loss", "accuracy", "samples", "steps")
        ]
        expected_bytes = message_bytes(made, record["round"])
        assert record["bytes_to_worker"] == [sent for sent, _ in expected_bytes]
        assert record["bytes_from_worker"] == [returned for _, returned in expected_bytes]


def train(name: str, **changes: Any) -> list[dict[str, Any]]:
    made, _ = job(name, **changes)
    part = execute(made, progress=False)
    return part.recorder.history


def test_a_worker_can_be_given_its_next_subnet_while_the_results_of_others_are_awaited() -> None:
    made, model = job("batch norm, reset", pool__kind="ray")
    pool = RayPool(made, Meter(), f"next-{os.getpid()}")
    try:
        returned = rounds_without_waiting(pool, made, model, 3)
    finally:
        pool.close()

    assert sorted(returned) == [(worker, number) for worker in range(3) for number in range(3)]


def test_a_cluster_without_free_resources_ends_the_run_and_names_them() -> None:
    with pytest.raises(WorkerLostError) as caught:
        train("batch norm, reset", pool={"kind": "ray", "ray": {"resources": {"moonbeam": 1}, "start_timeout_s": 1}})

    text = str(caught.value)
    assert re.search(naming("0 of 3 Ray workers", "round 0", "1 s (pool.ray.start_timeout_s)"), text)
    assert "'moonbeam': 1.0" in text
    assert "(train.workers: {min: 1, max: 3})" in text


def test_new_actors_restore_the_worker_state_of_earlier_ones(tmp_path: Path) -> None:
    config = small_config(**KEPT, checkpoint={"every": 1}, pool={"kind": "ray"})
    whole, broken = (create_run_folder(config, tmp_path / name) for name in ("whole", "broken"))

    with pytest.raises(PowerCutError):
        run_folder(broken, resume=False, stop_after=2)

    assert_same(run_folder(broken, resume=True), run_folder(whole, resume=False))


def test_workers_that_all_fail_in_a_round_end_the_run_with_the_first_cause() -> None:
    """The network fails in the workers' processes: no worker trains anything, so the run must end."""
    with pytest.raises(WorkerLostError, match=naming("worker ", "round 0", "only here (scenario.py, line ")):
        train("batch norm, reset", network="fails elsewhere", pool__kind="ray")


def test_workers_join_when_resources_become_free() -> None:
    settings = {"kind": "ray", "ray": {"num_cpus": 4}}
    made, _ = job("batch norm, reset", pool=settings, train__workers={"min": 1, "max": 3})
    pool = RayPool(made, Meter(), "room")

    try:
        at_first = pool.gather(0)
        wait_for(lambda: len(pool.gather(0)) > 1, 60, "a second worker")
        ray.wait(pool._members[2].starting, timeout=1)
        in_the_end = pool.gather(0)
    finally:
        pool.close()

    assert 1 <= len(at_first) <= 2
    assert in_the_end == ("worker-0", "worker-1")  # four CPUs each, of ten


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_gets_a_signal_reports_it_and_how_to_resume(
    tmp_path: Path, ray_address: str, number: signal.Signals
) -> None:
    path, folder = tmp_path / "job.yaml", tmp_path / "run"
    pool = {"kind": "ray", "ray": {"address": ray_address}}
    path.write_text(yaml.safe_dump(config_tree(train__workers=2, train__rounds=100000, pool=pool)))
    command = [sys.executable, "-m", "ist", "train", str(path), "--run-dir", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for((folder / "metrics.jsonl").exists, 60, "a round")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 128 + number
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    what = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    assert re.fullmatch(rf"error: {what}.*ist train --resume {folder}", error)
    assert "SIGTERM received" not in err  # Ray's own handler would print a C++ stack


def test_a_driver_that_ray_ends_reports_it_and_leaves_no_process(tmp_path: Path) -> None:
    path, folder = tmp_path / "job.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(config_tree(train__workers=2, train__rounds=100000, pool={"kind": "ray"})))
    command = [sys.executable, "-m", "ist", "train", str(path), "--run-dir", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for((folder / "metrics.jsonl").exists, 60, "a round")
        family = psutil.Process(process.pid).children(recursive=True)
        (raylet,) = [member for member in family if member.name() == "raylet"]

        raylet.kill()
        _, err = process.communicate(timeout=60)

    assert process.returncode == 1
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(naming("Ray cluster was lost", "GCS or raylet"), error)
    assert error.endswith(f"ist train --resume {folder}")
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive


def test_the_runs_own_cluster_leaves_no_folder(tmp_path: Path, ist_command: Run) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree(train__workers=2, pool={"kind": "ray"})))

    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # it contains sockets, whose paths must be short
        done = ist_command("train", path, "--run-dir", tmp_path / "run", env={"RAY_TMPDIR": short})

        assert done.returncode == 0, done.stderr
        assert not list(Path(short).glob("ray/session_2*"))
        assert list(Path(short).glob("ray"))


def test_an_address_without_a_cluster_is_an_error(tmp_path: Path, ist_command: Run) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree(pool={"kind": "ray"})))

    done = ist_command("train", path, "--address", "127.0.0.1:9", "--run-dir", tmp_path / "run")

    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "127.0.0.1:9 (pool.ray.address)" in error
    assert "Traceback" not in done.stderr


def test_a_client_without_the_clusters_token_gets_an_error_that_names_the_remedy(
    tmp_path: Path, ist_command: Run, ray_address: str
) -> None:
    path, token = tmp_path / "job.yaml", tmp_path / "token"
    path.write_text(yaml.safe_dump(config_tree(pool={"kind": "ray"})))
    token.write_text("0" * 64)

    done = ist_command(
        "train", path, "--address", ray_address, "--run-dir", tmp_path / "run", env={"RAY_AUTH_TOKEN_PATH": str(token)}
    )

    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(naming(f"{ray_address} (pool.ray.address)", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH"), error)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_other_methods_do_not_run_on_ray() -> None:
    with pytest.raises(ConfigError, match=naming("'ddp'", "pool.kind 'torchrun'", "'ray'")):
        check_method(small_config(method="ddp", pool={"kind": "ray"}))


def test_a_submitted_job_trains_on_the_cluster_and_resumes_when_submitted_again(
    tmp_path: Path,
) -> None:
    path, folder = tmp_path / "job.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(config_tree(train__workers=2)))
    environment = {**os.environ, "RAY_API_SERVER_ADDRESS": f"http://{ray._private.worker.get_dashboard_url()}"}
    command = [sys.executable, str(ROOT / "launch" / "ray_job.py"), str(path), "--run-dir", str(folder)]

    done = run_group(command, tmp_path, environment, 100)
    again = run_group(command, tmp_path, environment, 100)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 4/4" in done.stdout
    assert again.returncode == 0, again.stdout + again.stderr
    assert "finished" in again.stdout


def test_the_python_interface_trains_a_users_own_network_on_the_cluster() -> None:
    alone, together = seeded(NETWORKS["no batch norm"]), seeded(NETWORKS["no batch norm"])
    settings: dict[str, Any] = {"workers": 2, "local_steps": 3, "rounds": 2, "progress": False}
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    ist.train(alone, data(), loss=loss, pool="inline", **settings)
    result = ist.train(together, data(), loss=loss, pool="ray", **settings)

    assert result.model is together
    assert len(result.history) == 2
    assert_same(together.state_dict(), alone.state_dict())


class Locked(TensorDataset):
    """A data set that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__(*data().tensors)
        self.lock = threading.Lock()


def test_data_that_cannot_be_sent_are_refused_with_the_cause() -> None:
    with pytest.raises(PoolError, match=naming("network, data or loss", "lock", "in a module")):
        ist.train(
            seeded(NETWORKS["no batch norm"]), Locked(), workers=2, local_steps=1, rounds=1, pool="ray", progress=False
        )
