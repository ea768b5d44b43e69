"""One writer at a time, no files left behind, and no symbolic link followed out of a run folder."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem

import ist
from ist.errors import RunFolderError
from ist.storage import run_lock
from ist.storage.backend import LocalStorage, open_storage, write_atomically
from ist.storage.checkpoint import Progress, load_newest, save_checkpoint, save_worker_state
from ist.storage.reopen import open_or_create
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.storage.run_lock import sole_writer
from tests.conftest import ROOT, Run, config_tree, data, naming, small_config, wait_for
from tests.networks import NETWORKS, seeded
from tests.runs.test_resume import PowerCutError, run

TENSORS = {"weight": torch.ones(2)}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_S", 0.1)


HOLDER = """
import sys, time
from pathlib import Path
from ist.storage.run_lock import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.procs
@pytest.mark.usefixtures("impatient")
def test_a_second_writer_is_refused_by_the_name_of_the_first_until_that_is_killed(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder.path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        owner = json.loads((folder.path / "run.lock").read_text())
        assert (owner["pid"], owner["host"]) == (holder.pid, socket.gethostname())
        refused = naming(f"{folder.path}: ", f"process {holder.pid}", owner["host"], owner["since"][:10])

        for resume in (False, True):
            with pytest.raises(RunFolderError, match=refused):
                run(folder, resume)
        with pytest.raises(RunFolderError, match=refused):
            open_or_create(small_config(), folder.path)
        with pytest.raises(RunFolderError, match=refused):
            create_run_folder(small_config(), folder.path)
        holder.send_signal(signal.SIGKILL)

    run(folder, resume=True)

    assert [record["round"] for record in folder.records()] == [0, 1, 2, 3]
    assert not (folder.path / "run.lock").exists()


@pytest.mark.usefixtures("impatient")
def test_a_program_cannot_use_a_folder_into_which_another_run_writes(tmp_path: Path) -> None:
    def trained(resume: bool) -> int:
        model = seeded(NETWORKS["no batch norm"])
        found = ist.train(
            model, data(), workers=2, local_steps=2, rounds=2, run_dir=tmp_path / "run", progress=False, resume=resume
        )
        return len(found.history)

    (tmp_path / "run").mkdir()
    refused = naming(f"{tmp_path / 'run'}: ", "this process")
    with sole_writer(tmp_path / "run"), pytest.raises(RunFolderError, match=refused):
        trained(resume=False)
    assert trained(resume=False) == 2
    with sole_writer(tmp_path / "run"), pytest.raises(RunFolderError, match=refused):
        trained(resume=True)


def test_a_waiting_process_gets_the_lock_although_its_file_was_deleted(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "run.lock", os.O_RDWR | os.O_CREAT)
    (tmp_path / "run.lock").unlink()  # as the earlier holder does after the next one has opened it

    assert not run_lock._is_there(tmp_path / "run.lock", descriptor)
    with sole_writer(tmp_path):
        assert not run_lock._is_there(tmp_path / "run.lock", descriptor)
    os.close(descriptor)


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)

    with sole_writer(tmp_path):
        pass

    assert re.search(naming(f"{tmp_path}/run.lock: ", "No locks available"), caplog.text)


def test_a_run_that_another_process_has_started_in_the_meantime_is_not_started_again(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(checkpoint={"every": 1}), tmp_path / "run")
    with pytest.raises(PowerCutError):
        run(RunFolder(folder.path), resume=False, stop_after=1)

    with pytest.raises(RunFolderError, match=naming(f"{folder.path}: ", f"ist train --resume {folder.path}")):
        run(folder, resume=False)


@pytest.mark.system
@pytest.mark.parametrize("pool", ["inline", "torchrun"])
def test_of_two_resumes_at_once_one_trains_and_one_names_it(tmp_path: Path, ist_command: Run, pool: str) -> None:
    path, folder = tmp_path / "job.yaml", tmp_path / "run"
    path.write_text(
        yaml.safe_dump(config_tree(train__rounds=3000, train__workers=2, pool={"kind": pool, "device": "cpu"}))
    )
    command = [sys.executable, "-m", "ist", "train", str(path), "--run-dir", str(folder), "--auto-resume"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as first:
        wait_for(lambda: (folder / "checkpoints").exists(), 60, "a checkpoint")
        owner = json.loads((folder / "run.lock").read_text())["pid"]
        second = ist_command("train", "--resume", folder)
        third = ist_command("train", path, "--run-dir", folder, "--auto-resume")
        assert owner in [process.pid for process in [first, *psutil.Process(first.pid).children(recursive=True)]]
        os.killpg(first.pid, signal.SIGKILL)

    for done in (second, third):
        assert done.returncode == 1
        assert f"error: {folder}: process {owner} on {socket.gethostname()}" in done.stderr
        assert "Traceback" not in done.stderr
    rounds = [record["round"] for record in RunFolder(folder)._lines().records]
    assert rounds == list(range(len(rounds)))
    RunFolder(folder).rewind()


# Temporary files of killed processes


LEFT = (".round-00000007.safetensors.123.tmp", ".worker-0001.round-00000007.safetensors.99.tmp", ".shared-0123abcd")
NOT_OURS = (".round-7.safetensors.123.tmp", "notes.tmp", ".thesis.tex.1.tmp", "round-00000007.safetensors.tmp")


def test_the_next_start_deletes_temporary_files_of_killed_processes_and_nothing_else(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    checkpoints = folder.path / "checkpoints"
    checkpoints.mkdir()
    for name in (*LEFT, *NOT_OURS):
        (checkpoints / name).write_bytes(b"half")
    for name in (".metrics.jsonl.5.tmp", ".model.safetensors.77.tmp", ".result.json.8.tmp", ".mine.1.tmp"):
        (folder.path / name).write_bytes(b"half")

    run(folder, resume=True)

    assert {path.name for path in checkpoints.glob("*tmp")} == set(NOT_OURS)
    assert {path.name for path in folder.path.glob("*tmp")} == {".mine.1.tmp"}


def test_the_next_start_deletes_temporary_files_in_a_storage(tmp_path: Path) -> None:
    place = "memory://swept/runs"
    folder = create_run_folder(small_config(checkpoint={"storage": place}), tmp_path / "run")
    storage = open_storage(place, "run")
    for name in (*LEFT, *NOT_OURS):
        storage.write(name, b"half")

    run(folder, resume=True)

    assert not set(LEFT) & set(storage.names())
    assert set(NOT_OURS) <= set(storage.names())
    MemoryFileSystem.store.clear()


def test_a_worker_deletes_its_own_temporary_files(tmp_path: Path) -> None:
    for worker in (0, 1):
        (tmp_path / f".worker-000{worker}.round-00000007.safetensors.99.tmp").touch()

    save_worker_state(LocalStorage(tmp_path), 0, 8, TENSORS, "all", keep=1)

    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".worker-0001.round-00000007.safetensors.99.tmp", "worker-0000.round-00000008.safetensors",
    ]  # fmt: skip


# Symbolic links


def test_a_folder_of_checkpoints_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (folder.path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    refused = naming(f"{folder.path}/checkpoints: ", "symbolic link", f"{tmp_path}/elsewhere")

    for resume in (False, True):
        with pytest.raises(RunFolderError, match=refused):
            run(folder, resume)
    with pytest.raises(RunFolderError, match=refused):
        save_checkpoint(folder.storage, TENSORS, Progress(1), keep=1)

    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_checkpoint_that_is_a_link_is_refused_and_no_earlier_one_is_used(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "checkpoints")
    for rounds in (1, 2):
        save_checkpoint(storage, TENSORS, Progress(rounds), keep=2)
    newest = tmp_path / "checkpoints" / "round-00000002.safetensors"
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(RunFolderError, match=naming("round-00000002.safetensors: ", "symbolic link")):
        load_newest(storage)

    assert newest.is_symlink()


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "changes.jsonl", "metrics.jsonl", "model.safetensors", "result.json", "tensorboard", "run.lock"],
)
def test_a_file_of_a_run_that_is_a_link_is_refused(tmp_path: Path, name: str) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    (tmp_path / "elsewhere").write_text("mine\n")
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).symlink_to(tmp_path / "elsewhere")
    uses: list[Any] = [lambda: RunFolder(folder.path), lambda: open_or_create(small_config(), folder.path)]

    for use in uses:
        with pytest.raises(RunFolderError, match=naming(f"run/{name}: ", "symbolic link")):
            use()

    assert (tmp_path / "elsewhere").read_text() == "mine\n"


def test_the_run_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    create_run_folder(small_config(), tmp_path / "run")
    (tmp_path / "latest").symlink_to(tmp_path / "run")

    run(RunFolder(tmp_path / "latest"), resume=True)

    assert (tmp_path / "run" / "result.json").exists()


def test_writing_a_temporary_file_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match="symbolic links"):
        write_atomically(tmp_path / "file", b"new")

    assert (tmp_path / "elsewhere").read_text() == "mine"
