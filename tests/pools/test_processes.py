"""Runs with real processes: torchrun, ist's own launcher, ports, killed processes and resumption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ist.storage.checkpoint import read_tensors
from tests.conftest import ROOT, Run, assert_same, config_tree, naming, run_group, torchrun, wait_for

many_processes = pytest.mark.system  # ten seconds for every start of a few processes on two cores

PROCESSES: dict[str, Any] = {
    "pool": {"kind": "torchrun", "device": "cpu"},
    "train__workers": 2,
    "evaluate": {"every": 1},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree(output=str(tmp_path / "runs"), **{**PROCESSES, **changes})))
    return path


def weights(run: Path) -> Any:
    return read_tensors(run / "model.safetensors")[0]


@many_processes
def test_torchrun_and_the_own_launcher_give_the_same_run(tmp_path: Path, ist_command: Run) -> None:
    config = written(tmp_path)

    own = ist_command("train", config, "--run-dir", tmp_path / "own")
    theirs = torchrun(["-m", "ist", "train", str(config), "--run-dir", str(tmp_path / "theirs")], 2, 100)

    assert own.returncode == 0, own.stderr
    assert theirs.returncode == 0, theirs.stderr
    assert_same(weights(tmp_path / "own"), weights(tmp_path / "theirs"))
    assert theirs.stdout.count("accuracy") == 1
    assert "round 4/4" in theirs.stderr


@many_processes
def test_a_wrong_number_of_processes_says_both_numbers(tmp_path: Path) -> None:
    done = torchrun(["-m", "ist", "train", str(written(tmp_path))], 3, 100)

    assert done.returncode != 0
    assert "3 processes were started (WORLD_SIZE), but train.workers is 2" in done.stderr
    assert "start 2 processes, or give --workers 3" in done.stderr


def children_of(parent: psutil.Process) -> list[psutil.Process]:
    """The ranks of a run, by rank."""
    ranks = {}
    for child in parent.children(recursive=True):
        try:
            if "process" in child.cmdline():
                ranks[int(child.environ()["RANK"])] = child
        except (psutil.NoSuchProcess, KeyError):
            continue
    return [ranks[rank] for rank in sorted(ranks)]


@many_processes
@pytest.mark.parametrize(
    ("victim", "store"), [(0, {}), (1, {}), (1, {"pool__store": "sharded"})], ids=["rank 0", "rank 1", "an owner"]
)
def test_a_killed_process_ends_the_run_in_seconds_by_name_and_the_run_can_be_resumed(
    tmp_path: Path, ist_command: Run, victim: int, store: dict[str, str]
) -> None:
    config = written(tmp_path, train__rounds=300, checkpoint={"every": 10}, **store)
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "ist", "train", str(config), "--run-dir", str(run)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 15, 60, "round 15")
        children_of(psutil.Process(process.pid))[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=60)

    assert time.monotonic() - killed < 20
    assert process.returncode == 1
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(rf"rank {victim} \(worker {victim}\).*SIGKILL", error)
    assert f"ist train --resume {run}" in error
    assert "Traceback" not in err

    resumed = ist_command("train", "--resume", run)
    star = ["--set", "pool.store=coordinator", "--pool", "inline"]
    whole = ist_command("train", config, "--run-dir", tmp_path / "whole", *star)
    assert resumed.returncode == 0, resumed.stderr
    assert whole.returncode == 0, whole.stderr
    assert_same(weights(run), weights(tmp_path / "whole"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 300


@many_processes
def test_an_interrupt_ends_all_processes_and_reports_how_to_resume(tmp_path: Path) -> None:
    config = written(tmp_path, train__rounds=5000)
    run, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "ist", "train", str(config), "--run-dir", str(run)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, 60, "round 3")
        ranks = children_of(psutil.Process(process.pid))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert re.search(rf"error: interrupted.*ist train --resume {run}", err)
    assert not any(rank.is_running() for rank in ranks)


@many_processes
def test_divergence_in_processes_is_one_error_that_names_the_worker(tmp_path: Path, ist_command: Run) -> None:
    config = written(tmp_path, train__optimizer={"name": "SGD", "args": {"lr": 1e30}})

    done = ist_command("train", config)

    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "worker 0 returned" in error
    assert "Traceback" not in done.stderr


@many_processes
def test_compare_runs_every_method_and_writes_a_report(tmp_path: Path, ist_command: Run) -> None:
    config = written(tmp_path, pool={"kind": "torchrun", "device": "cpu", "coordinator": "dedicated"})

    done = ist_command("compare", config, "--run-dir", tmp_path / "both")

    assert done.returncode == 0, done.stderr
    assert "ist" in done.stdout
    assert "ddp" in done.stdout
    assert "<svg" in (tmp_path / "both" / "report.html").read_text()
    results = {m: json.loads((tmp_path / "both" / m / "result.json").read_text()) for m in ("ist", "ddp")}
    assert results["ist"]["samples"] == results["ddp"]["samples"]
    # 2 ranks: a ring all-reduce sends the gradient once from each, every step
    assert results["ddp"]["sent_bytes"] == 2 * 4 * results["ddp"]["parameters"] * 12


@many_processes
def test_data_parallel_is_large_batch_training_and_resumes_bit_for_bit(tmp_path: Path, ist_command: Run) -> None:
    config = written(tmp_path, method="ddp", train__optimizer={"name": "Adam", "args": {"lr": 0.01}}, train__rounds=6)
    whole = ist_command("train", config, "--run-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    # A run that was cut off after its fourth round is a folder without what came later.
    import shutil

    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    (cut / "result.json").unlink()
    (cut / "model.safetensors").unlink()
    (cut / "checkpoints" / "round-00000006.safetensors").unlink()
    resumed = ist_command("train", "--resume", cut)

    assert resumed.returncode == 0, resumed.stderr
    assert_same(weights(cut), weights(tmp_path / "whole"))


@many_processes
@pytest.mark.parametrize(("name", "percent"), [("own_network", 95), ("graph_network", 90)])
def test_an_example_runs_alone_and_under_torchrun(tmp_path: Path, name: str, percent: float) -> None:
    example = str(ROOT / "examples" / f"{name}.py")

    alone = run_group([sys.executable, example], tmp_path, {**os.environ, "OMP_NUM_THREADS": "1"}, 100)
    together = torchrun([example], 4, 100, cwd=tmp_path)

    for done in (alone, together):
        assert done.returncode == 0, done.stderr
        accuracy = float(done.stdout.split()[1].rstrip("%"))
        assert accuracy > percent
    assert alone.stdout.split()[1] == together.stdout.split()[1]


@many_processes
def test_a_network_of_transformers_ends_alike_in_one_process_and_in_many(tmp_path: Path, ist_command: Run) -> None:
    short = ["train.epochs=null", "train.rounds=2", "train.local_steps=2", "evaluate.every=2", f"output={tmp_path}"]
    options = [word for setting in short for word in ("--set", setting)]
    for name, pool in (("alone", "inline"), ("together", "torchrun")):
        done = ist_command(
            "train", ROOT / "configs" / "gpt2_text.yaml", *options, "--pool", pool, "--set", f"name={name}"
        )
        assert done.returncode == 0, done.stderr

    alone, together = (next(tmp_path.glob(f"{name}-*")) for name in ("alone", "together"))
    assert_same(weights(alone), weights(together))


def test_the_command_finds_a_file_of_the_current_folder_and_warns_of_a_renamed_key_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net(hidden):\n    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))\n"
    )
    config = tmp_path / "job.yaml"
    changes = {"model": {"name": "mine:net", "args": {"hidden": 8}}, "baseline": {"outer_lr": 0.5}}
    config.write_text(yaml.safe_dump(config_tree(**changes)))

    command = [str(Path(sys.executable).with_name("ist")), "inspect", "job.yaml", "--json"]
    done = run_group(command, tmp_path, dict(os.environ), 100)

    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: ")
    assert re.search(naming("baseline.outer_lr", "baseline.outer.lr"), line)


@many_processes
@pytest.mark.parametrize("damaged", ["train", "test"])
def test_every_rank_and_the_launcher_report_the_cause_of_a_failure(
    tmp_path: Path, ist_command: Run, damaged: str
) -> None:
    """One worker reads a bad sample, or the coordinator does when it evaluates; the other rank only loses a peer."""
    loader = {"name": "tests.network.test_failures:load", "args": {"damaged": damaged}}
    config = written(tmp_path, data=loader, model={"name": "mlp", "args": {"widths": [12, 9, 8, 5]}}, train__rounds=40)

    own = ist_command("train", config)
    theirs = torchrun(["-m", "ist", "train", str(config)], 2, 100)

    cause = r"round \d+.*: the loss of sample 77 fails \(its target is 11, where classes are 0 to 4\)"
    (error,) = [line for line in own.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(cause, error)
    assert own.returncode == 2
    assert "Traceback" not in own.stderr
    errors = [line for line in theirs.stderr.splitlines() if line.startswith("error: ")]
    assert any(re.match(r"error: rank \d failed: DataError: .*" + cause, line) for line in errors)
    assert all(re.search(cause, line) for line in errors)
    assert len(errors) == 2
