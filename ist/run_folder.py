"""A run on disk: the resolved configuration, metrics, checkpoints, the result.

    config.yaml        the configuration, every key written out
    metrics.jsonl      one JSON object a round
    checkpoints/       safetensors, the newest few
    model.safetensors  the trained network's state_dict, at the end
    result.json        final numbers, at the end

Not here: what the numbers mean (`ist/recorder.py`), what they look like (`ist/report/`).
"""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from ist.checkpoint import (
    Progress,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
    write_tensors,
)
from ist.config import Config
from ist.config_file import dump_config, load_config
from ist.errors import RunFolderError

Record = Mapping[str, Any]


class RunFolder:
    """One run's folder.

    Args:
        path: An existing run folder; see `create_run_folder`.

    Raises:
        RunFolderError: It is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not self.config_path.is_file():
            raise RunFolderError(f"{path}: is no run folder (it has no config.yaml)")

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    def load_config(self) -> Config:
        """Return the run's configuration."""
        return load_config(self.config_path)

    def append_record(self, record: Record) -> None:
        """Add a round to metrics.jsonl.

        Raises:
            RunFolderError: The disk is full or not writable.
        """
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be written: {error.strerror or error}") from error

    def records(self) -> list[dict[str, Any]]:
        """Return the rounds in metrics.jsonl.

        Raises:
            RunFolderError: A line is not JSON.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunFolderError(f"{path}: holds a line that is not JSON: {error}") from error

    def rewind(self) -> tuple[dict[str, Tensor], Progress]:
        """Go back to the newest checkpoint: return it, and drop later rounds from metrics.jsonl.

        Without a checkpoint that is the beginning: no tensors.

        Raises:
            CheckpointError: The newest checkpoint is truncated or altered.
            RunFolderError: The folder is not writable.
        """
        newest = latest_checkpoint(self.path / "checkpoints")
        tensors, progress = load_checkpoint(newest) if newest else ({}, Progress())
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # By number of lines, not by content: a crash may have left half a line at the end.
        kept = "".join(line + "\n" for line in lines[: progress.rounds_done])
        self._write("metrics.jsonl", kept.encode())
        return tensors, progress

    def has_checkpoint(self) -> bool:
        """Return whether there is anything to go on from."""
        return latest_checkpoint(self.path / "checkpoints") is not None

    def check_checkpoint(self) -> None:
        """Verify the newest checkpoint, if there is one.

        Raises:
            CheckpointError: It is truncated or altered.
        """
        newest = latest_checkpoint(self.path / "checkpoints")
        if newest:
            load_checkpoint(newest)

    def save_checkpoint(self, tensors: Mapping[str, Tensor], progress: Progress, keep: int) -> None:
        """Save a checkpoint.

        Raises:
            RunFolderError: The disk is full or not writable.
        """
        save_checkpoint(self.path / "checkpoints", tensors, progress, keep)

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

    def result(self) -> dict[str, Any]:
        """Return the final numbers.

        Raises:
            RunFolderError: The run has not finished.
        """
        path = self.path / "result.json"
        try:
            loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunFolderError(
                f"{self.path}: has no result.json: the run has not finished. Go on with: ist train --resume {self.path}"
            ) from error
        except ValueError as error:
            raise RunFolderError(f"{path}: is not JSON: {error}") from error
        return loaded

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
        RunFolderError: The folder exists and is not empty, or the disk is full or not writable.
    """
    folder = path or new_folder(config.output, config.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RunFolderError(
                f"{folder}: is not empty: give a new folder, or go on with: ist train --resume {folder}"
            )
        write_atomically(folder / "config.yaml", dump_config(config).encode())
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be made or written: {error.strerror or error}") from error
    return RunFolder(folder)


def new_folder(output: str, name: str) -> Path:
    """Return the path of a folder that does not exist yet, under `output`."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    candidates: Sequence[str] = [f"{name}-{stamp}", *(f"{name}-{stamp}-{number}" for number in range(2, 100))]
    for candidate in candidates:
        path = Path(output) / candidate
        if not os.path.lexists(path):
            return path
    raise RunFolderError(f"{output}: holds {len(candidates)} runs of this second already")
