"""The exceptions of this package, and helpers for their messages.

Where it sits: every room raises these; only `ist/cli/main.py` prints them and sets exit codes.
Law: every class takes exactly one string, so that an error can be sent to another process and created again there. The
string says what was found, where, what was expected, and what to do.
Not here: exit codes (`ist/launch/signals.py`).
"""

import re
import traceback
from pathlib import Path


class ISTError(Exception):
    """Base class of all errors that this package raises deliberately.

    Example:
        >>> try:
        ...     ist.Partition(strategi="rolling")
        ... except ist.ISTError as error:
        ...     print(type(error).__name__)
        ConfigError
    """


class ConfigError(ISTError):
    """A configuration, an override or a command line is not valid.

    Example:
        >>> ist.Partition(strategi="rolling")
        Traceback (most recent call last):
            ...
        ist.errors.ConfigError: ist.Partition: unknown key 'strategi'. Did you mean 'strategy'?
    """


class DataError(ISTError):
    """A data set is missing, malformed, or too small for the number of workers.

    Example:
        >>> import torch
        >>> ist.train(torch.nn.Linear(2, 2), torch.zeros(8, 2), workers=1, rounds=1)
        Traceback (most recent call last):
            ...
        ist.errors.DataError: data is a Tensor: pass a data set, such as TensorDataset(inputs, targets)
    """


class ModelError(ISTError):
    """The hidden neurons of a network cannot be split.

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
    """Worker processes could not be started, or a peer could not be reached.

    Example:
        >>> try:
        ...     raise ist.PoolError("rank 2 was lost")
        ... except ist.PoolError as error:
        ...     print("start again with resume=True:", error)
        start again with resume=True: rank 2 was lost
    """


class WorkerLostError(PoolError):
    """A worker was lost, and too few workers remain.

    Example:
        >>> try:
        ...     raise ist.WorkerLostError("round 7: 1 of 4 workers came back, and pool.min_returned is 2")
        ... except ist.PoolError as error:
        ...     print("resume with resume=True:", error)
        resume with resume=True: round 7: 1 of 4 workers came back, and pool.min_returned is 2
    """


class StartFailedError(PoolError):
    """Rank 0 has found a mistake before the run; this is another rank."""


class AbandonedRoundError(ISTError):
    """The coordinator continued a round without this worker."""


class InterruptedRunError(ISTError):
    """The user or the system ended the run."""


class MemoryLimitError(ISTError):
    """A process needs more memory than it may allocate."""


class LoopError(ISTError):
    """A training loop of the user's own does not do what a round needs, or raises an exception.

    Example:
        >>> import torch
        >>> def loop(part: ist.Part) -> None:
        ...     pass  # makes no step
        >>> ist.train(torch.nn.Linear(2, 1), loop=loop, example=torch.ones(4, 2), workers=1, rounds=1, progress=False)
        Traceback (most recent call last):
            ...
        ist.errors.LoopError: worker 0 made no optimizer step in round 0: ...
    """


class DivergedError(ISTError):
    """A worker returned a non-finite loss or weight.

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
    """A run folder cannot be created, written or read.

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


class CallbackError(ISTError):
    """A callback has raised an error, or has returned a value that is not allowed.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> class Broken(ist.Callback):
        ...     def on_round(self, record):
        ...         return record["los"]
        >>> data = TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
        >>> settings = {"loss": "mse_loss", "workers": 1, "rounds": 1, "progress": False}
        >>> try:
        ...     ist.train(torch.nn.Linear(2, 1), data, callbacks=[Broken()], **settings)
        ... except ist.CallbackError as error:
        ...     print(error)
        callback Broken: on_round raises KeyError: 'los' ...
    """


class LabError(ISTError):
    """Simulated hosts could not be created, or a command on one of them failed."""


class CheckpointError(RunFolderError):
    """A checkpoint is missing, truncated or altered.

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
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def error_with_line(error: BaseException) -> str:
    """Return an error's class, its first line, and the line of user code (not torch's, not ours) that raised it."""
    own = Path(__file__).parent
    lines = [
        f" ({Path(frame.filename).name}, line {frame.lineno})"
        for frame in traceback.extract_tb(error.__traceback__)
        if own not in Path(frame.filename).parents and "torch" not in Path(frame.filename).parts
    ]
    return f"{type(error).__name__}: {first_line(error)}{lines[-1] if lines else ''}"


_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc")
"""Messages of torch and the C++ library if the operating system refuses an allocation."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that an allocation failed."""
    is_memory_error = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_memory_error or any(text in str(error) for text in _OUT_OF_MEMORY)


def printable(text: str) -> str:
    """Remove escape sequences and other control characters, which a terminal would interpret, from a text.

    Newlines and tabs stay. Lone surrogates, which represent non-UTF-8 bytes of a file name, become `?`.
    """
    return _CONTROLS.sub("", _ESCAPES.sub("", text)).encode(errors="replace").decode()


_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
