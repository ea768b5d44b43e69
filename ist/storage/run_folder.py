"""A run on disk: the resolved configuration, metrics, checkpoints, the result.

    config.yaml        the configuration with all keys, and a digest of them
    changes.jsonl      one JSON object for each change of the configuration when the run was resumed
    metrics.jsonl      one JSON object per round
    checkpoints/       the newest checkpoints (safetensors, a file or a folder each); during the run also the state of
                       workers
    tensorboard/       event files, with watch.tensorboard
    model.safetensors  state_dict of the trained network, at the end
    result.json        final numbers, at the end
    run.lock           names the process that is writing here

With `checkpoint.storage`, checkpoints are written there, in a folder with the run folder's name and a copy of
config.yaml.

Where it sits: the command line, `ist/runs/open.py` and `ist/runs/recorder.py` write a run through `RunFolder`; reports
read it.
Not here: opening an existing folder in order to resume it (`ist/storage/reopen.py`), computing the numbers
(`ist/runs/recorder.py`), showing them (`ist/report/page.py`).
"""

import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ist.config.load import dump_config, parse_config, validate
from ist.config.schema import Config
from ist.config.yaml_text import parse_yaml, read_text
from ist.errors import CheckpointError, RunFolderError
from ist.network.lazy_tensor import with_values
from ist.redact import holds_secret, redacted
from ist.storage.backend import LocalStorage, Storage, is_url, refuse_link, run_storage, sweep, write_atomically
from ist.storage.checkpoint import (
    Progress,
    delete_worker_states,
    latest_checkpoint,
    load_newest,
    save_checkpoint,
    stream_tensors,
    sweep_shards,
)
from ist.storage.run_files import Lines, parse_records, parse_result
from ist.storage.run_lock import LOCK, sole_writer
from ist.storage.same_run import CHANGEABLE, Change, allowed_changes, is_in, run_changes
from ist.storage.saved_config import ConfigChange, changes_text, config_change, is_edited, parse_changes, saved_text
from ist.storage.shards.read import SavedTensors, open_file
from ist.tensors import specs_of

_log = logging.getLogger(__name__)

Record = Mapping[str, Any]

CONFIG = "config.yaml"
_CHANGES = "changes.jsonl"


class RunFolder:
    """The folder of one run.

    Args:
        path: An existing run folder; see `create_run_folder`.

    Attributes:
        changed: After `rewind`: keys that say what is trained, and that have changed since the checkpoint was saved.

    Raises:
        RunFolderError: It is not a run folder, or a file in it is a symbolic link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config_text = ""
        self._parsed: tuple[str, Config] | None = None
        self.changed: tuple[str, ...] = ()
        for name in (CONFIG, _CHANGES, "metrics.jsonl", "model.safetensors", "result.json", "tensorboard", LOCK):
            refuse_link(path / name)
        if not self.config_path.is_file():
            raise RunFolderError(f"{path}: is not a run folder, because it has no config.yaml")

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG

    @property
    def metrics_path(self) -> Path:
        """The file with one record per round."""
        return self.path / "metrics.jsonl"

    def load_config(self) -> Config:
        """Return the run's configuration; the file is parsed again only if it has changed."""
        text = read_text(self.config_path)
        if self._parsed is None or self._parsed[0] != text:
            self._parsed = text, parse_config(text, str(self.config_path), is_saved=True)
        return self._parsed[1]

    @cached_property
    def storage(self) -> Storage:
        """The storage of the run's checkpoints."""
        return storage_of(self.load_config(), self.path)

    def append_record(self, record: Record) -> None:
        """Append the record of a round to metrics.jsonl.

        Raises:
            RunFolderError: The disk is full or not writable.
        """
        path = self.metrics_path
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error

    def records(self) -> list[dict[str, Any]]:
        """Return the records in metrics.jsonl.

        Raises:
            RunFolderError: The file is damaged.
        """
        lines = self._lines()
        if lines.cut:
            raise RunFolderError(f"{self.metrics_path}: line {len(lines.texts) + 1} is damaged: it is not JSON")
        return list(lines.records)

    def finished_records(self) -> list[dict[str, Any]]:
        """Return the records of a finished run.

        Records of the first rounds, or all of them, are missing if the run was resumed from checkpoints alone.

        Raises:
            RunFolderError: The run has not finished, or the file is damaged or ends too early.
        """
        records, rounds = self.records(), self.result()["rounds"]
        if not records:
            _log.warning("%s: no records of the run's %d rounds: the report has no curve", self.metrics_path, rounds)
        elif (last := records[-1]["round"] + 1) != rounds:
            raise RunFolderError(
                f"{self.metrics_path} is damaged: its last record is of round {last}, but the run had {rounds} rounds"
            )
        return records

    def sweep(self) -> None:
        """Delete temporary files of killed processes; no other process may be writing into the folder."""
        for storage in (LocalStorage(self.path.resolve()), self.storage):
            sweep(storage)
        sweep_shards(self.storage)

    def begin(self) -> None:
        """Check that no other process has started this run in the meantime.

        Raises:
            RunFolderError: Another process has started it.
        """
        self._keep_config()
        if self.is_finished() or self._lines().texts or self.has_checkpoint():
            raise RunFolderError(
                f"{self.path}: another process has started this run in the meantime. Resume with: ist train --resume "
                f"{self.path}"
            )

    def rewind(self, lazily: bool = False) -> tuple[Mapping[str, Tensor], Progress]:
        """Return the newest intact checkpoint, and delete records of later rounds, and the result of an early end.

        Without a checkpoint, there are no tensors and no completed rounds. Records of earlier rounds may be missing if
        only the checkpoints survived. A damaged end of metrics.jsonl is deleted, with a warning.

        Args:
            lazily: Whether to read each tensor only when it is asked for.

        Raises:
            CheckpointError: All checkpoints are damaged, or a checkpoint must exist and does not.
            RunFolderError: The configuration has changed since the run was saved, metrics.jsonl is damaged before its
                end, or the folder is not writable.
        """
        self._keep_config()
        lines = self._lines_for_resume()
        newest = load_newest(self.storage, lazily)
        if newest is None:
            self._check_never_saved(len(lines.records))
        tensors, progress = newest or ({}, Progress())
        for change in self._changed_since(progress):
            _log.warning(
                "%s: '%s' has changed since the run was saved, from %s to %s",
                self.config_path,
                change.key,
                change.old,
                change.new,
            )
        self._record_changes(progress)
        if lines.cut:
            _log.warning(
                "%s: deleted the damaged end after %d intact lines, which a crash can leave",
                self.metrics_path, len(lines.texts),
            )  # fmt: skip
        numbered = zip(lines.texts, lines.records, strict=True)
        earlier = [text for text, record in numbered if record["round"] < progress.rounds_done]
        self._write("metrics.jsonl", b"".join(text + b"\n" for text in earlier))
        if self.stopped_early():  # the run continues
            (self.path / "result.json").unlink()
        with suppress(RunFolderError):  # these files are no longer needed, and harmless
            delete_worker_states(self.storage, after=progress.rounds_done)
        return tensors, progress

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint from which to resume."""
        return latest_checkpoint(self.storage) is not None

    def check_checkpoint(self) -> None:
        """Check that the run can be resumed from an intact checkpoint, if it has any; rename damaged ones.

        Raises:
            CheckpointError: All checkpoints are damaged, or a checkpoint must exist and does not.
            RunFolderError: The configuration has changed since the run was saved, or metrics.jsonl is damaged before
                its end.
        """
        lines = self._lines_for_resume()
        newest = load_newest(self.storage, lazily=True)
        if newest is None:
            self._check_never_saved(len(lines.records))
        self._changed_since(newest[1] if newest else Progress())

    def _keep_config(self) -> None:
        """Remember the configuration of this run, in case the file changes during the run."""
        self._config_text = redacted(dump_config(self.load_config()))

    def _changed_since(self, progress: Progress) -> list[Change]:
        """Return settings that have changed since a checkpoint was saved; earlier versions did not save settings.

        Raises:
            RunFolderError: config.yaml was edited in keys that say what is trained.
        """
        saved, now = self.config_of(progress), self.load_config()
        edited = is_edited(self._read(CONFIG).decode())
        changes = run_changes(saved, now) if saved else []
        if edited is not False and changes:
            raise RunFolderError(self.edited_text(changes))
        if edited and not saved:
            raise RunFolderError(self.edited_text([]))
        return [*changes, *allowed_changes(saved, now)] if saved else []

    def config_of(self, progress: Progress) -> Config | None:
        """Return the configuration with which a checkpoint was saved; None if it has none."""
        if not progress.config:
            return None
        return _saved_config(progress.config, f"{self.storage.where()}: the configuration in the newest checkpoint")

    def edited_text(self, changes: Sequence[Change]) -> str:
        """Return the message for a config.yaml that was edited; `changes` may be empty if they are unknown."""
        listed = "; ".join(f"'{change.key}' was {change.old}, is {change.new}" for change in changes)
        able = [change.key for change in changes if is_in(change.key, CHANGEABLE)]
        example = f"{able[0]}=..." if able else "train.rounds=..."
        return (
            f"{self.config_path}: has changed since the run was saved{f': {listed}' if listed else ''}. Restore the "
            f"old values, or start a new run with the new configuration. To change a key of this run, give it to: ist "
            f"train --resume {self.path} --set {example}"
        )

    def is_edited(self) -> bool:
        """Return whether config.yaml was edited in keys that say what is trained; False if that is unknown."""
        return is_edited(self._read(CONFIG).decode()) is True

    def _record_changes(self, progress: Progress) -> None:
        """Write into changes.jsonl what has changed since a checkpoint was saved, from the round after it on."""
        saved, known = self.config_of(progress), self.config_changes()
        changes = run_changes(saved, self.load_config()) if saved else []
        self.changed = tuple(change.key for change in changes)
        entries = [entry for entry in known if entry.round < progress.rounds_done]  # later rounds are trained again
        if changes:
            entries.append(config_change(progress.rounds_done, changes, progress.config))
        if entries != known:
            self._write(_CHANGES, changes_text(entries).encode())

    def config_changes(self) -> list[ConfigChange]:
        """Return the changes of the run's configuration, in order.

        Raises:
            RunFolderError: changes.jsonl is damaged.
        """
        try:
            return parse_changes(self._read(_CHANGES), str(self.path / _CHANGES))
        except FileNotFoundError:
            return []

    def _check_never_saved(self, num_records: int) -> None:
        """Refuse to start from the first round if `checkpoint.storage` must have a checkpoint and has none."""
        config = self.load_config().checkpoint
        if config.storage is not None and num_records > config.every:
            raise CheckpointError(
                f"{self.storage.where()}: has no checkpoint, but {self.path} has records of {num_records} rounds: is "
                f"the storage (checkpoint.storage) complete? To start from the first round, delete {self.metrics_path}"
            )

    def _lines(self) -> Lines:
        try:
            return parse_records(self._read("metrics.jsonl"), str(self.metrics_path))
        except FileNotFoundError:
            return Lines([], [], cut=False)

    def _lines_for_resume(self) -> Lines:
        try:
            return self._lines()
        except RunFolderError as error:
            raise RunFolderError(
                f"{error}. To resume without the records of earlier rounds, move the file away"
            ) from error

    def _read(self, name: str) -> bytes:
        path = self.path / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read: {error.strerror or error}") from error

    def save_checkpoint(self, tensors: Mapping[str, Tensor], progress: Progress, keep: int) -> None:
        """Save a checkpoint.

        Raises:
            RunFolderError: The disk is full or not writable, or the storage fails; earlier checkpoints are unchanged.
        """
        save_checkpoint(self.storage, tensors, replace(progress, config=self._config_text), keep)

    def finish(self, model_state: Mapping[str, Tensor], result: Record) -> None:
        """Write the trained network and the final numbers.

        Raises:
            RunFolderError: The disk is full or not writable.
        """
        path = self.path / "model.safetensors"
        try:
            stream_tensors(path, specs_of(model_state), lambda name: with_values(model_state[name]), {})
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error
        self._write("result.json", json.dumps(result, indent=2).encode())
        if not self.stopped_early():
            with suppress(RunFolderError):  # these files are no longer needed, and harmless
                delete_worker_states(self.storage)

    def trained(self) -> SavedTensors:
        """Open the tensors of the trained network, which `finish` has written; none is read yet.

        Raises:
            CheckpointError: There is no such file.
            RunFolderError: It cannot be read.
        """
        return open_file(LocalStorage(self.path.resolve()), "model.safetensors")[0]

    def result(self) -> dict[str, Any]:
        """Return the final numbers.

        Raises:
            RunFolderError: The run has not finished, or the file is damaged.
        """
        try:
            raw = self._read("result.json")
        except FileNotFoundError as error:
            raise RunFolderError(
                f"{self.path}: the run has not finished (no result.json). Resume with: ist train --resume {self.path}"
            ) from error
        try:
            return parse_result(raw, str(self.path / "result.json"))
        except RunFolderError as error:
            raise RunFolderError(
                f"{error}. Delete the file, and write it again by: ist train --resume {self.path}"
            ) from error

    def add_to_result(self, values: Record) -> None:
        """Add numbers to result.json.

        Raises:
            RunFolderError: The run has not finished, or the disk is full or not writable.
        """
        self._write("result.json", json.dumps(self.result() | dict(values), indent=2).encode())

    def is_finished(self) -> bool:
        """Return whether the run has written its result."""
        return (self.path / "result.json").exists()

    def stopped_early(self) -> bool:
        """Return whether a callback has ended the run before its last round, so that it can be resumed.

        Raises:
            RunFolderError: result.json is damaged.
        """
        return self.is_finished() and "stopped_early" in self.result()

    def reopen_result(self) -> None:
        """Delete the final numbers of a run that is extended: it has not finished any more.

        Raises:
            RunFolderError: The folder is not writable.
        """
        path = self.path / "result.json"
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be deleted: {error.strerror or error}") from error

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self.path / name, data)
        except OSError as error:
            raise RunFolderError(f"{self.path / name}: cannot be written: {error.strerror or error}") from error


@functools.lru_cache(maxsize=2)  # a resumed run asks several times
def _saved_config(text: str, where: str) -> Config:
    return validate(parse_yaml(text, where), where)


def create_run_folder(config: Config, path: Path | None = None) -> RunFolder:
    """Create the folder of a new run and write its configuration.

    Args:
        config: The resolved configuration.
        path: The folder; default: a new folder under `config.output`, named after the run and the time.

    Raises:
        ConfigError: `checkpoint.storage` cannot be opened, or a package for it is missing.
        RunFolderError: The folder exists and is not empty, the storage already has a run of that name, one of the two
            is not writable, or another process is writing into the folder.
    """
    path = path or new_folder(config.output, config.name)
    storage = storage_of(config, path)
    with created_and_locked(path):
        refuse_contents(path)
        if config.checkpoint.storage is not None and storage.names():
            raise RunFolderError(
                f"{storage.where()}: already contains a run (checkpoint.storage): give the run folder another name, or "
                f"resume with: ist train --auto-resume --run-dir {path}"
            )
        return write_config(config, path)


@contextmanager
def created_and_locked(path: Path) -> Iterator[None]:
    """Create a folder if it is missing, and lock it within the context; after an error, delete a new folder."""
    missing = not os.path.lexists(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be created or written: {error.strerror or error}") from error
    try:
        with sole_writer(path):
            yield
    except BaseException:
        if missing:
            with suppress(OSError):
                path.rmdir()
        raise


def write_config(config: Config, path: Path) -> RunFolder:
    """Write the configuration into the folder, and into the storage of checkpoints.

    Raises:
        RunFolderError: One of the two is not writable.
    """
    config = with_absolute_storage(config)
    text = saved_text(config)
    try:
        write_atomically(path / CONFIG, text.encode(), private=holds_secret(text))
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be created or written: {error.strerror or error}") from error
    if config.checkpoint.storage is not None:  # this also checks, before training, that the storage is writable
        storage_of(config, path).write(CONFIG, redacted(text).encode())
    return RunFolder(path)


def refuse_contents(path: Path) -> None:
    """Refuse a folder that is not empty.

    Raises:
        RunFolderError: It contains files.
    """
    try:
        empty = not set(path.iterdir()) - {path / LOCK}
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be created or written: {error.strerror or error}") from error
    if not empty:
        raise RunFolderError(f"{path}: is not empty: give a new folder, or resume with: ist train --resume {path}")


def storage_of(config: Config, path: Path) -> Storage:
    """Return the storage of the checkpoints of a run folder."""
    return run_storage(config.checkpoint.storage, path)


def with_absolute_storage(config: Config) -> Config:
    """Make a relative storage folder absolute, because a run may be resumed from another working directory."""
    storage = config.checkpoint.storage
    if storage is None or is_url(storage):
        return config
    checkpoint = config.checkpoint.model_copy(update={"storage": str(Path(storage).absolute())})
    return config.model_copy(update={"checkpoint": checkpoint})


def new_folder(output: str, name: str) -> Path:
    """Return the path of a new folder under `output`."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    candidates: Sequence[str] = [f"{name}-{stamp}", *(f"{name}-{stamp}-{number}" for number in range(2, 100))]
    for candidate in candidates:
        path = Path(output) / candidate
        if not os.path.lexists(path):
            return path
    raise RunFolderError(f"{output}: already contains {len(candidates)} runs of this second")
