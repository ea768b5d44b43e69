"""A run on disk: the resolved configuration, metrics, checkpoints, the result.

    config.yaml        the configuration, every key written out
    metrics.jsonl      one JSON object a round
    checkpoints/       safetensors, the newest few; until the end also what workers keep, written by themselves
    tensorboard/       event files, with watch.tensorboard
    model.safetensors  the trained network's state_dict, at the end
    result.json        final numbers, at the end
    run.lock           while a process writes here: which one

With `checkpoint.storage`, checkpoints are there, in a folder of the run folder's name, with a copy of config.yaml.

Not here: what the numbers mean (`ist/runs/recorder.py`), what they look like (`ist/report/`).
"""

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

from ist.config.load import dump_config, load_config, validate
from ist.config.schema import Config
from ist.config.yaml_text import parse_yaml
from ist.errors import CheckpointError, RunFolderError
from ist.redact import holds_secret, redacted
from ist.storage.backend import LocalStorage, Storage, is_url, refuse_link, run_storage, sweep, write_atomically
from ist.storage.checkpoint import Progress, forget_kept, latest_checkpoint, load_newest, save_checkpoint, write_tensors
from ist.storage.run_files import Lines, parse_records, parse_result
from ist.storage.run_lock import LOCK, sole_writer
from ist.storage.same_run import Change, other_run, other_settings

_log = logging.getLogger(__name__)

Record = Mapping[str, Any]

_CONFIG = "config.yaml"


class RunFolder:
    """One run's folder.

    Args:
        path: An existing run folder; see `create_run_folder`.

    Raises:
        RunFolderError: It is none, or a file of it is a symbolic link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config_text = ""
        for name in (_CONFIG, "metrics.jsonl", "model.safetensors", "result.json", "tensorboard", LOCK):
            refuse_link(path / name)
        if not self.config_path.is_file():
            raise RunFolderError(f"{path}: is no run folder (it has no config.yaml)")

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / _CONFIG

    @property
    def metrics_path(self) -> Path:
        """The records of its rounds."""
        return self.path / "metrics.jsonl"

    def load_config(self) -> Config:
        """Return the run's configuration."""
        return load_config(self.config_path, is_saved=True)

    @cached_property
    def storage(self) -> Storage:
        """Where the run's checkpoints are."""
        return _storage_of(self.load_config(), self.path)

    def append_record(self, record: Record) -> None:
        """Add a round to metrics.jsonl.

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
        """Return the rounds in metrics.jsonl.

        Raises:
            RunFolderError: The file is damaged.
        """
        lines = self._lines()
        if lines.cut:
            raise RunFolderError(f"{self.metrics_path}: line {len(lines.texts) + 1} is damaged: it is not JSON")
        return list(lines.records)

    def finished_records(self) -> list[dict[str, Any]]:
        """Return the rounds of a run that has finished: up to its last, if there are any.

        The first rounds are missing, or all, where the run went on from checkpoints alone.

        Raises:
            RunFolderError: The run has not finished, or the file is damaged, or ends too early.
        """
        records, rounds = self.records(), self.result()["rounds"]
        if not records:
            _log.warning("%s: holds no records of the run's %d rounds: it has no curve", self.metrics_path, rounds)
        elif (last := records[-1]["round"] + 1) != rounds:
            raise RunFolderError(f"{self.metrics_path} is damaged: it ends with round {last}, and the run had {rounds}")
        return records

    def sweep(self) -> None:
        """Delete what saves that were killed have left; nobody else may be writing."""
        for place in (LocalStorage(self.path.resolve()), self.storage):
            sweep(place)

    def begin(self) -> None:
        """Check that a run which is about to begin has not begun in another process meanwhile.

        Raises:
            RunFolderError: It has.
        """
        self._note_config()
        if self.is_finished() or self._lines().texts or self.has_checkpoint():
            raise RunFolderError(
                f"{self.path}: another process has begun this run meanwhile: go on with: ist train --resume {self.path}"
            )

    def rewind(self) -> tuple[dict[str, Tensor], Progress]:
        """Go back to the newest checkpoint that is whole: return it, and drop what is of later rounds.

        Without a checkpoint that is the beginning: no tensors. Records of earlier rounds may be missing, where
        only the checkpoints outlived the machine. A damaged end of metrics.jsonl is dropped, with a warning.

        Raises:
            CheckpointError: There are checkpoints and all are damaged, or there must be one and is none.
            RunFolderError: The configuration is another one than when the run was saved, or metrics.jsonl is damaged
                before its end, or the folder is not writable.
        """
        self._note_config()
        lines = self._lines_to_go_on()
        newest = load_newest(self.storage)
        if newest is None:
            self._check_never_saved(len(lines.records))
        tensors, progress = newest or ({}, Progress())
        for change in self._changed_since(progress):
            _log.warning(
                "%s: '%s' was %s when the run was saved, and is %s now",
                self.config_path,
                change.key,
                change.old,
                change.new,
            )
        if lines.cut:
            _log.warning(
                "%s: the end, after %d whole lines, is damaged, as a crash leaves it: it is dropped",
                self.metrics_path, len(lines.texts),
            )  # fmt: skip
        numbered = zip(lines.texts, lines.records, strict=True)
        kept = [text for text, record in numbered if record["round"] < progress.rounds_done]
        self._write("metrics.jsonl", b"".join(text + b"\n" for text in kept))
        with suppress(RunFolderError):  # of no use any more, and no harm
            forget_kept(self.storage, after=progress.rounds_done)
        return tensors, progress

    def has_checkpoint(self) -> bool:
        """Return whether there is anything to go on from."""
        return latest_checkpoint(self.storage) is not None

    def check_checkpoint(self) -> None:
        """Find the newest checkpoint that is whole, if there are any; those that are damaged are set aside.

        Raises:
            CheckpointError: There are checkpoints and all are damaged, or there must be one and is none.
            RunFolderError: The configuration is another one than when the run was saved, or metrics.jsonl is damaged
                before its end.
        """
        lines = self._lines_to_go_on()
        newest = load_newest(self.storage)
        if newest is None:
            self._check_never_saved(len(lines.records))
        else:
            self._changed_since(newest[1])

    def _note_config(self) -> None:
        """Note with which configuration the run goes on, whatever becomes of the file meanwhile."""
        self._config_text = redacted(dump_config(self.load_config()))

    def _changed_since(self, progress: Progress) -> list[Change]:
        """Return which settings have changed since a checkpoint was saved; earlier versions did not note them.

        Raises:
            RunFolderError: One of them makes it another run.
        """
        if not progress.config:
            return []
        where = f"{self.storage.where()}: the configuration that the newest checkpoint notes"
        saved, now = validate(parse_yaml(progress.config, where), where), self.load_config()
        if changes := other_run(saved, now):
            told = "; ".join(f"'{change.key}' was {change.old}, is {change.new}" for change in changes)
            raise RunFolderError(
                f"{self.config_path}: was changed since the run was saved: {told}. Put back what it was, or begin a "
                "new run with the new configuration"
            )
        return other_settings(saved, now)

    def _check_never_saved(self, num_records: int) -> None:
        """Refuse to start over where checkpoints were kept elsewhere and are not found there."""
        config = self.load_config().checkpoint
        if config.storage is not None and num_records > config.every:
            raise CheckpointError(
                f"{self.storage.where()}: holds no checkpoint, but {self.path} has {num_records} rounds behind it: is "
                f"the storage (checkpoint.storage) complete? To start over, delete {self.metrics_path}"
            )

    def _lines(self) -> Lines:
        try:
            return parse_records(self._read("metrics.jsonl"), str(self.metrics_path))
        except FileNotFoundError:
            return Lines([], [], cut=False)

    def _lines_to_go_on(self) -> Lines:
        try:
            return self._lines()
        except RunFolderError as error:
            raise RunFolderError(
                f"{error}. To go on without the records of earlier rounds, move the file away"
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
            RunFolderError: The disk is full or not writable, or the storage refuses; earlier ones are untouched.
        """
        save_checkpoint(self.storage, tensors, replace(progress, config=self._config_text), keep)

    def finish(self, model_state: Mapping[str, Tensor], result: Record) -> None:
        """Write the trained network and the final numbers.

        Raises:
            RunFolderError: The disk is full or not writable.
        """
        path = self.path / "model.safetensors"
        try:
            write_tensors(path, model_state, {})
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error
        self._write("result.json", json.dumps(result, indent=2).encode())
        with suppress(RunFolderError):  # of no use any more, and no harm
            forget_kept(self.storage)

    def result(self) -> dict[str, Any]:
        """Return the final numbers.

        Raises:
            RunFolderError: The run has not finished, or the file is damaged.
        """
        try:
            raw = self._read("result.json")
        except FileNotFoundError as error:
            raise RunFolderError(
                f"{self.path}: has no result.json: the run has not finished. Go on with: ist train --resume {self.path}"
            ) from error
        try:
            return parse_result(raw, str(self.path / "result.json"))
        except RunFolderError as error:
            raise RunFolderError(
                f"{error}. Delete it, and have it written anew with: ist train --resume {self.path}"
            ) from error

    def add_to_result(self, values: Record) -> None:
        """Write more numbers into result.json.

        Raises:
            RunFolderError: The run has not finished, or the disk is full or not writable.
        """
        self._write("result.json", json.dumps(self.result() | dict(values), indent=2).encode())

    def is_finished(self) -> bool:
        """Return whether the run has written its result."""
        return (self.path / "result.json").exists()

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self.path / name, data)
        except OSError as error:
            raise RunFolderError(f"{self.path / name}: cannot be written: {error.strerror or error}") from error


def create_run_folder(config: Config, path: Path | None = None) -> RunFolder:
    """Make the folder of a new run and write its configuration.

    Args:
        config: The resolved configuration.
        path: Where; default: a new folder under `config.output`, named after the run and the time.

    Raises:
        ConfigError: `checkpoint.storage` is not understood, or a package for it is missing.
        RunFolderError: The folder exists and is not empty, or the storage holds a run of that name, or one of the two
            is not writable, or another process writes into the folder.
    """
    path = path or new_folder(config.output, config.name)
    storage = _storage_of(config, path)
    with _made_and_held(path):
        _refuse_contents(path)
        if config.checkpoint.storage is not None and storage.names():
            raise RunFolderError(
                f"{storage.where()}: holds a run already (checkpoint.storage): give the run folder another name, or go "
                f"on with: ist train --auto-resume --run-dir {path}"
            )
        return _written(config, path)


def open_or_create(config: Config, path: Path) -> tuple[RunFolder, bool]:
    """Open the folder of a run, or make it: what a job needs that is started again and again until it is done.

    Where the folder is gone and `checkpoint.storage` still has the run, it goes on from there.

    Args:
        config: The resolved configuration; of a run that is there, its keys that may change take the place of the old.
        path: The folder.

    Returns:
        The folder, and whether the run in it is to be resumed.

    Raises:
        ConfigError: `checkpoint.storage` is not understood, or a package for it is missing.
        RunFolderError: The folder or the storage holds another run, or something else, or is not writable, or another
            process writes into the folder.
    """
    storage = _storage_of(config, path)
    with _made_and_held(path):
        return _open_or_written(config, path, storage)


def _open_or_written(config: Config, path: Path, storage: Storage) -> tuple[RunFolder, bool]:
    file = path / _CONFIG
    refuse_link(file)
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        torn = dump_config(_with_absolute_storage(config)).startswith(text.rstrip("\0"))
        inside = set(path.iterdir()) - {path / LOCK}
        if text and not (torn and inside == {file}):
            _refuse_moved(path, config)
            _refuse_foreign(storage, config)
            return _written(config, path), True
        torn_files = {file, *path.glob(f".{_CONFIG}.*.tmp")}  # a crash while the folder was made
        if inside <= torn_files:
            for left in torn_files:
                left.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read or written: {error.strerror or error}") from error
    _refuse_contents(path)
    _refuse_foreign(storage, config)
    return _written(config, path), latest_checkpoint(storage) is not None


def reopen(config: Config, path: Path) -> RunFolder:
    """Open the folder of a run that is to go on, as a program means it that configures the run itself.

    Raises:
        RunFolderError: It holds no run, or another one.
    """
    folder = RunFolder(path)
    _refuse_moved(path, config)
    return folder


@contextmanager
def _made_and_held(path: Path) -> Iterator[None]:
    """Make a folder where it is missing, and keep other processes out of it; unmake it if that comes to nothing."""
    missing = not os.path.lexists(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be made or written: {error.strerror or error}") from error
    try:
        with sole_writer(path):
            yield
    except BaseException:
        if missing:
            with suppress(OSError):
                path.rmdir()
        raise


def _written(config: Config, path: Path) -> RunFolder:
    """Write the configuration: into the folder, and where checkpoints will be."""
    config = _with_absolute_storage(config)
    text = dump_config(config)
    try:
        write_atomically(path / _CONFIG, text.encode(), private=holds_secret(text))
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be made or written: {error.strerror or error}") from error
    if config.checkpoint.storage is not None:  # and so it is found to be writable before anything is trained
        _storage_of(config, path).write(_CONFIG, redacted(text).encode())
    return RunFolder(path)


def _refuse_contents(path: Path) -> None:
    try:
        empty = not set(path.iterdir()) - {path / LOCK}
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be made or written: {error.strerror or error}") from error
    if not empty:
        raise RunFolderError(f"{path}: is not empty: give a new folder, or go on with: ist train --resume {path}")


def _refuse_moved(path: Path, config: Config) -> None:
    """Refuse to go on with another run, or with this one where its checkpoints would not be found."""
    there = load_config(path / _CONFIG, is_saved=True)
    _refuse_other(there, config, str(path))
    before, now = (_storage_of(c, path) for c in (there, config))
    if before.where() != now.where() and latest_checkpoint(before) and not latest_checkpoint(now):
        raise RunFolderError(
            f"{path}: its checkpoints are in {before.where()}, but 'checkpoint.storage' now means {now.where()}: "
            "configure what it was, or move them"
        )


def _refuse_foreign(storage: Storage, config: Config) -> None:
    """Refuse a storage in which there is another run of the same name."""
    if config.checkpoint.storage is None:
        return
    if _CONFIG in storage.names():
        saved = storage.load(_CONFIG)
        text = (saved if isinstance(saved, bytes) else saved.read_bytes()).decode()
        there = storage.where(_CONFIG)
        _refuse_other(validate(parse_yaml(text, there), there), config, storage.where())
    elif latest_checkpoint(storage):
        raise RunFolderError(
            f"{storage.where()}: holds checkpoints but no {_CONFIG}, which would say of what run: put it beside "
            "them, or give another folder"
        )


def _refuse_other(there: Config, config: Config, where: str) -> None:
    """Refuse a place that holds a run which is not the configured one."""
    for change in other_run(there, config):
        raise RunFolderError(
            f"{where}: holds another run: its '{change.key}' is {change.old}, not {change.new}. Give another folder, "
            "or configure what it was"
        )


def _storage_of(config: Config, path: Path) -> Storage:
    return run_storage(config.checkpoint.storage, path)


def _with_absolute_storage(config: Config) -> Config:
    """A run may be resumed from elsewhere: a relative folder would be another one there."""
    storage = config.checkpoint.storage
    if storage is None or is_url(storage):
        return config
    checkpoint = config.checkpoint.model_copy(update={"storage": str(Path(storage).absolute())})
    return config.model_copy(update={"checkpoint": checkpoint})


def new_folder(output: str, name: str) -> Path:
    """Return the path of a folder that does not exist yet, under `output`."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    candidates: Sequence[str] = [f"{name}-{stamp}", *(f"{name}-{stamp}-{number}" for number in range(2, 100))]
    for candidate in candidates:
        path = Path(output) / candidate
        if not os.path.lexists(path):
            return path
    raise RunFolderError(f"{output}: holds {len(candidates)} runs of this second already")
