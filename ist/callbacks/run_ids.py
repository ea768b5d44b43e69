"""The id that a tracking service gives to a run, kept in the run folder so that a resumed run continues there.

Where it sits: `ist/callbacks/wandb.py` and `ist/callbacks/mlflow.py` keep their ids here.
"""

from collections.abc import Callable

from ist.errors import RunFolderError
from ist.monitoring.callback import RunStart
from ist.storage.backend import write_atomically


def kept_id(run: RunStart, file: str, make: Callable[[], str]) -> str:
    """Return the id in a file of the run folder if the run is resumed and has one; otherwise a new one.

    Args:
        run: The run.
        file: Name of the file, to which a new id is written.
        make: Makes a new id.

    Raises:
        RunFolderError: The file cannot be read or written.
    """
    if run.run_dir is None:
        return make()
    path = run.run_dir / file
    try:
        if run.first_round and path.is_file():
            return path.read_text(encoding="utf-8").strip()
        made = make()
        write_atomically(path, f"{made}\n".encode())
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path}: cannot be read or written: {error}") from error
    return made
