"""What can go wrong, as exceptions a caller can tell apart.

Every class takes exactly one string, so that an error survives pickling and a
trip through another process. The string says what was found, where, what was
expected, and what to do. Only `ist/cli/main.py` prints them and sets exit codes.
"""

import re
import traceback
from pathlib import Path


class ISTError(Exception):
    """Base of every error that this package raises on purpose.

    Example:
        >>> try:
        ...     ist.Partition(strategi="rolling")
        ... except ist.ISTError as error:
        ...     print(type(error).__name__)
        ConfigError
    """


class ConfigError(ISTError):
    """A configuration, an override or a command line that cannot be run as it stands.

    Example:
        >>> ist.Partition(strategi="rolling")
        Traceback (most recent call last):
            ...
        ist.errors.ConfigError: ist.Partition: unknown key 'strategi'. Did you mean 'strategy'?
    """


class DataError(ISTError):
    """A data set that is missing, malformed, or too small for the number of workers.

    Example:
        >>> import torch
        >>> ist.train(torch.nn.Linear(2, 2), torch.zeros(8, 2), workers=1, rounds=1)
        Traceback (most recent call last):
            ...
        ist.errors.DataError: data is a Tensor: pass a data set, such as TensorDataset(inputs, targets)
    """


class ModelError(ISTError):
    """A network whose hidden neurons cannot be split.

    Example:
        >>> from torch import nn, randn
        >>> from torch.utils.data import TensorDataset
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))  # three hidden neurons
        >>> data = TensorDataset(randn(8, 2), randn(8, 1))
        >>> try:
        ...     ist.train(model, data, loss="mse_loss", workers=4, rounds=1)
        ... except ist.ModelError as error:
        ...     print(error)
        group '0' has 3 neurons, ... 4 workers ...
    """


class PoolError(ISTError):
    """Worker processes that could not be started or joined.

    Example:
        >>> try:
        ...     raise ist.PoolError("rank 2 was lost")
        ... except ist.PoolError as error:
        ...     print("start again with resume=True:", error)
        start again with resume=True: rank 2 was lost
    """


class WorkerLostError(PoolError):
    """A worker that was lost while fewer than the required number remained.

    Example:
        >>> try:
        ...     raise ist.WorkerLostError("round 7: 1 of 4 workers came back, and pool.min_returned is 2")
        ... except ist.PoolError as error:
        ...     print("go on with resume=True:", error)
        go on with resume=True: round 7: 1 of 4 workers came back, and pool.min_returned is 2
    """


class AbandonedRoundError(ISTError):
    """A worker was told that its round goes on without it."""


class InterruptedRunError(ISTError):
    """A run that the user, or the system, told to end."""


class MemoryLimitError(ISTError):
    """A worker that needs more memory than it was given."""


class DivergedError(ISTError):
    """A worker returned a loss or a weight that is not finite.

    Example:
        >>> from torch import nn, ones
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(ones(8, 2), ones(8, 1))
        >>> sgd = ist.Optimizer(name="SGD", args={"lr": 1e30})
        >>> try:
        ...     ist.train(nn.Linear(2, 1), data, loss="mse_loss", workers=1, rounds=1, optimizer=sgd, progress=False)
        ... except ist.DivergedError as error:
        ...     print("diverged:", error)
        diverged: worker 0 ... round 0...
    """


class RunFolderError(ISTError):
    """A run folder that cannot be created, written or read.

    Example:
        >>> from torch import nn, ones
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(ones(8, 2), ones(8, 1))
        >>> try:
        ...     ist.train(nn.Linear(2, 1), data, loss="mse_loss", workers=1, rounds=1, run_dir="/dev/null/run")
        ... except ist.RunFolderError as error:
        ...     print(error)
        /dev/null/run: ...
    """


class LabError(ISTError):
    """Hosts that could not be made, or a command on one of them that failed."""


class CheckpointError(RunFolderError):
    """A checkpoint that is missing, truncated or altered.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn, ones
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(ones(8, 2), ones(8, 1))
        >>> settings = {"loss": "mse_loss", "workers": 1, "rounds": 1, "progress": False}
        >>> with TemporaryDirectory() as folder:
        ...     _ = ist.train(nn.Linear(2, 1), data, run_dir=folder, **settings)
        ...     for path in Path(folder, "checkpoints").glob("*.safetensors"):
        ...         _ = path.write_bytes(b"")
        ...     try:
        ...         _ = ist.train(nn.Linear(2, 1), data, run_dir=folder, resume=True, **settings)
        ...     except ist.CheckpointError as error:
        ...         print("damaged:", error)
        damaged: ...round-00000001.safetensors...
    """


def first_line(error: BaseException) -> str:
    """Return what an error says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def said_at(error: BaseException) -> str:
    """Return the class of an error, what it says, and the line of the code outside of torch that raised it."""
    own = Path(__file__).parent
    lines = [
        f" ({Path(frame.filename).name}, line {frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)
        if own not in Path(frame.filename).parents and "torch" not in Path(frame.filename).parts
    ]
    return f"{type(error).__name__}: {first_line(error)}{lines[-1] if lines else ''}"


_REFUSED = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc")
"""What torch and the C++ library say when the operating system gives no more memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is no more memory."""
    refused = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return refused or any(said in str(error) for said in _REFUSED)


def printable(text: str) -> str:
    """Return a text without what would steer a terminal: escape sequences and other control characters.

    Line ends and tabs stay. Half surrogate pairs, which stand for bytes of a name that are not UTF-8, become `?`.
    """
    return _CONTROLS.sub("", _ESCAPES.sub("", text)).encode(errors="replace").decode()


_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
