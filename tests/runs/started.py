"""Runs that have finished or were cut off, for tests about what comes next; each is trained once in a test session."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ist.config.load import dump_config, parse_config
from ist.config.schema import Config
from ist.storage.run_folder import RunFolder, create_run_folder
from tests.runs.test_resume import PowerCutError, run


def started(config: Config, path: Path, stop_after: int | None = None) -> RunFolder:
    """A run that has finished, or that was cut off in a round; its checkpoints must be in its folder."""
    shutil.copytree(_trained(dump_config(config), stop_after), path)
    return RunFolder(path)


@functools.cache
def _trained(config: str, stop_after: int | None) -> Path:
    path = Path(tempfile.mkdtemp(dir=os.environ["IST_TESTS"])) / "run"
    folder = create_run_folder(parse_config(config, "the configuration of a test"), path)
    if stop_after is None:
        run(folder, resume=False)
    else:
        with pytest.raises(PowerCutError):
            run(folder, resume=False, stop_after=stop_after)
    return path
