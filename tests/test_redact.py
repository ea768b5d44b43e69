"""Passwords in URLs: never shown, and stored only in files that only their owner can read."""

import stat
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from ist.config.load import load_config, validate
from ist.config.runtime import Checkpoint
from ist.errors import ISTError
from ist.redact import redacted
from ist.report.page import write_report
from ist.storage.backend import open_storage
from ist.storage.reopen import open_or_create
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.subnet.job import assignments, slot_of
from ist.training.worker_state import CheckpointLocation, WorkerState
from tests.conftest import Run, config_tree, job_for, small_config
from tests.networks import NETWORKS, seeded
from tests.runs.test_resume import KEPT, run

PASSWORD = "pw/9+SECRET"
URL = f"guarded://AKIAKEY:{PASSWORD}@bucket/runs"


class Guarded(MemoryFileSystem):
    """A storage that removes user and password from paths, and quotes them in its errors."""

    protocol = "guarded"
    refuses = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.rpartition("@")[2].strip("/")

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:  # type: ignore[override]
        if self.refuses:
            raise PermissionError(f"Invalid bucket name 'AKIAKEY:{PASSWORD}@bucket' ({PASSWORD})")
        super().pipe_file(path, value, **options)


fsspec.register_implementation("guarded", Guarded)


@pytest.fixture(autouse=True)
def empty_store() -> Any:
    yield
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/runs", "s3://bucket/runs"),
        ("s3://KEY:SE/CR+ET@bucket/runs", "s3://***@bucket/runs"),
        ("sftp://me@host/kept", "sftp://***@host/kept"),
        ("simplecache::ftp://me:p@ss@host/kept", "simplecache::ftp://***@host/kept"),
        ("abfs://box/x?sig=abc%2F&sv=2", "abfs://box/x?sig=***&sv=2"),
        ("'a' is 's3://K:P@b/c' and 'd' is 's3://K:P@e'", "'a' is 's3://***@b/c' and 'd' is 's3://***@e'"),
        ("mail me@host or see http://host/page", "mail me@host or see http://host/page"),
    ],
)
def test_credentials_before_the_at_sign_of_a_url_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_a_password_that_appears_alone_is_hidden_too() -> None:
    message = "no bucket 'KEY:s%2Fx@b': KEY, s/x, s%2Fx"

    assert redacted(message, "s3://KEY:s%2Fx@b/runs") == "no bucket '***@b': KEY, ***, ***"


def misspelt(tmp_path: Path) -> object:
    path = tmp_path / "job.yaml"
    path.write_text("name: x\n")
    return load_config(path, [f"checkpoint.storage{URL}"])


REFUSALS: dict[str, Callable[[Path], object]] = {
    "an unknown protocol": lambda p: create_run_folder(small_config(checkpoint={"storage": URL.replace("guarded", "gopher")}), p / "run"),
    "a storage that refuses": lambda _: open_storage(URL, "run").write("round-1", b""),
    "a URL that is not text": lambda _: validate(config_tree(checkpoint={"storage": [URL]}), "job.yaml"),
    "a URL for a section": lambda _: validate(config_tree(checkpoint=URL), "job.yaml"),
    "an override without =": misspelt,
    "an unknown key": lambda _: validate(config_tree(checkpoint={"store": URL, "every": URL}), "job.yaml"),
    "another run": lambda p: open_or_create(small_config(data__args={"url": "s3://x/y"}), create_run_folder(small_config(data__args={"url": URL}, checkpoint={"storage": URL}), p / "run").path),
    "a storage that holds a run": lambda p: [create_run_folder(small_config(checkpoint={"storage": URL}), p / name / "run") for name in "ab"],
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSALS)
def test_an_error_shows_no_password_nor_does_its_traceback(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guarded, "refuses", why == "a storage that refuses")

    with pytest.raises(ISTError) as caught:
        REFUSALS[why](tmp_path)

    shown = str(caught.value) + "".join(
        line for line in traceback.format_exception(caught.value) if not line.lstrip().startswith("File ")
    )
    assert PASSWORD not in shown
    assert "***" in shown or why == "another run"


def test_only_the_owner_can_read_a_runs_password_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(checkpoint={"every": 1, "storage": URL}), tmp_path / "run")
    assert stat.S_IMODE(folder.config_path.stat().st_mode) == 0o600

    run(RunFolder(folder.path), resume=False)
    page = write_report([RunFolder(folder.path)], tmp_path / "report.html").read_text()

    assert PASSWORD in folder.config_path.read_text()  # resuming needs it
    assert RunFolder(folder.path).rewind()[1].rounds_done == 4
    stored = {path: MemoryFileSystem.store[path].getvalue() for path in MemoryFileSystem.store}
    assert any(path.endswith("run/config.yaml") for path in stored)
    shown = [page.encode(), *stored.values()]
    shown += [path.read_bytes() for path in folder.path.rglob("*") if path.is_file() and path != folder.config_path]
    assert not any(PASSWORD.encode() in text for text in shown)
    assert "guarded://***@bucket/runs" in page
    moved, resume = open_or_create(small_config(checkpoint={"every": 1, "storage": URL}), tmp_path / "new" / "run")
    assert resume
    assert stat.S_IMODE(moved.config_path.stat().st_mode) == 0o600


def test_a_configuration_without_a_password_has_the_usual_file_mode(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    (tmp_path / "any").touch()

    assert folder.config_path.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_worker_that_finds_nothing_shows_no_password(caplog: pytest.LogCaptureFixture) -> None:
    job = job_for(seeded(NETWORKS["no batch norm"]), **KEPT, train__rounds=5)

    WorkerState(
        job, slot_of(job, 0), assignments(job), CheckpointLocation("/nowhere", Checkpoint(storage=URL))
    ).restore(1)

    assert "guarded://***@bucket/runs" in caplog.text
    assert PASSWORD not in caplog.text


def test_the_command_shows_no_password(tmp_path: Path, ist_command: Run) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree()))

    done = ist_command("train", path, "--set", f"checkpoint.storage={URL}", "--set", f"nosuch={URL}")

    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert PASSWORD not in done.stdout + done.stderr
