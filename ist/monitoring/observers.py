"""The callbacks of a run: create the configured ones, and call all of them.

Where it sits: `ist/runs/open.py` creates and starts them in the process that records the run, `ist/runs/recorder.py`
passes every event on.
Not here: the methods of a callback (`ist/monitoring/callback.py`), what the built-in ones do
(`ist/monitoring/display.py`; `ist/monitoring/exporters.py`, which is imported only if configured; `ist/callbacks/`).
"""

import copy
import difflib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from ist.config.base import plain
from ist.config.registry import call, resolve
from ist.config.schema import Config
from ist.distributed.environment import is_rank_zero
from ist.errors import CallbackError, ConfigError, ISTError, error_with_line, is_out_of_memory
from ist.measurements import MEASUREMENTS
from ist.monitoring.callback import Callback, RunStart, Stop
from ist.monitoring.display import Display, Progress
from ist.monitoring.metrics_server import check_port
from ist.redact import redacted
from ist.storage.run_folder import RunFolder
from ist.subnet.job import Job

_log = logging.getLogger(__name__)

CALLBACKS = {
    "early_stopping": "ist.callbacks:EarlyStopping",
    "mlflow": "ist.callbacks:MLflow",
    "profiler": "ist.callbacks:Profiler",
    "ray_tune": "ist.callbacks:RayTune",
    "wandb": "ist.callbacks:WandB",
}
"""Short names in `watch.callbacks`."""

_EVENTS = [name for name in vars(Callback) if name.startswith("on_")]


def check_callbacks(config: Config, given: Sequence[Callback] = ()) -> None:
    """Check, before anything starts, that the configured and the given callbacks can be used.

    Raises:
        ConfigError: A package is missing, a callback is not one or has other methods, its arguments are not valid, or
            `watch.metrics_host` is not an address of this machine.
        PoolError: The port is in use.
    """
    watch = config.watch
    for package, wanted, key in (
        ("tensorboard", watch.tensorboard, "'watch.tensorboard' is true"),
        ("prometheus_client", watch.metrics_port is not None, f"'watch.metrics_port' is {watch.metrics_port}"),
    ):
        if wanted and find_spec(package) is None:
            raise ConfigError(f"{key}, but {package} is not installed: pip install 'ist[watch]'")
    if not isinstance(given, list | tuple):
        raise ConfigError(f"callbacks is {given!r}: give a list of objects of subclasses of ist.Callback")
    for number, callback in enumerate(given):
        _check_callback(callback, f"callbacks[{number}]", "an object of a subclass of ist.Callback")
    if is_rank_zero():  # other processes have no callbacks, and may lack their packages
        _configured(config)
        if watch.metrics_port is not None:
            check_port(watch.metrics_host, watch.metrics_port)


def make_callbacks(config: Config, given: Sequence[Callback] = (), progress: Progress = False) -> list[Callback]:
    """Create the callbacks of a run; only in the process that records the run.

    Args:
        config: The configuration of the run.
        given: Callbacks that the user's program has created.
        progress: How to show progress.

    Raises:
        ConfigError: A package is missing, or a configured callback cannot be created.
    """
    watch = config.watch
    callbacks: list[Callback] = []
    if watch.tensorboard or watch.metrics_port is not None:
        from ist.monitoring.exporters import Prometheus, TensorBoard

        if watch.tensorboard:
            callbacks.append(TensorBoard())
        if watch.metrics_port is not None:
            callbacks.append(Prometheus(watch.metrics_host, watch.metrics_port, announces=bool(progress)))
    return [*callbacks, *given, *_configured(config), Display(progress)]


def run_start(config: Config, job: Job, folder: RunFolder | None, first_round: int) -> RunStart:
    """Return what callbacks receive about a run when it starts.

    Args:
        config: The configuration, with the configured number of workers.
        job: The run.
        folder: The run folder, after `RunFolder.rewind`.
        first_round: The first round to run.
    """
    parameters = list(job.split.template.parameters())
    numbers = [m.name for m in MEASUREMENTS if m.recorded and not m.is_list and m.source != "evaluation"]
    if not config.chooses_merge_scale:
        numbers.remove("merge_scale")
    if job.task.is_evaluated:
        metrics = job.task.metric.names if job.task.metric else ()
        numbers += dict.fromkeys(["test_loss", *metrics])
    return RunStart(
        name=folder.path.resolve().name if folder else config.name,
        config=_without_passwords(plain(config.model_dump())),
        run_dir=folder.path if folder else None,
        num_rounds=job.schedule.num_rounds,
        first_round=first_round,
        parameters=sum(parameter.numel() for parameter in parameters),
        trained_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        numbers=tuple(numbers),
        history=tuple(folder.records()) if folder else (),
        more_numbers=job.task.evaluation is not None,
    )


@contextmanager
def started(callbacks: Sequence[Callback], run: RunStart) -> Iterator[None]:
    """Start the callbacks, and close them at the end, in reverse order.

    Raises:
        CallbackError: A callback raises an error. If the run itself fails, an error of `close` is only logged.
    """
    with ExitStack() as stack:
        for callback in callbacks:
            with _errors_of(callback, "on_start"):
                callback.on_start(run)
            stack.push(functools.partial(_close, callback))
        yield


def round_ended(callbacks: Sequence[Callback], record: Mapping[str, Any]) -> Stop | None:
    """Pass on the record of a round, and return the first request to end the run.

    Raises:
        CallbackError: A callback raises an error, or returns anything but `Stop` or None.
    """
    stops = [_asked(callback, "on_round", record) for callback in callbacks]
    if "test_loss" in record:
        stops.append(evaluated(callbacks, record))
    return next((stop for stop in stops if stop), None)


def evaluated(callbacks: Sequence[Callback], record: Mapping[str, Any]) -> Stop | None:
    """Pass on a record with the numbers of an evaluation; otherwise like `round_ended`."""
    stops = [_asked(callback, "on_evaluate", record) for callback in callbacks]
    return next((stop for stop in stops if stop), None)


def checkpoint_saved(callbacks: Sequence[Callback], rounds_done: int) -> None:
    """Pass on that a checkpoint was saved.

    Raises:
        CallbackError: A callback raises an error.
    """
    for callback in callbacks:
        with _errors_of(callback, "on_checkpoint"):
            callback.on_checkpoint(rounds_done)


def run_ended(callbacks: Sequence[Callback], result: Mapping[str, Any]) -> None:
    """Pass on the final numbers.

    Raises:
        CallbackError: A callback raises an error.
    """
    for callback in callbacks:
        with _errors_of(callback, "on_end"):
            callback.on_end(copy.deepcopy(dict(result)))


def _asked(callback: Callback, event: str, record: Mapping[str, Any]) -> Stop | None:
    with _errors_of(callback, event, f" in round {record['round']}"):
        answer = getattr(callback, event)(copy.deepcopy(dict(record)))  # a copy: a callback must not change records
    if not isinstance(answer, Stop | None):
        raise CallbackError(
            f"callback {type(callback).__name__}: {event} returns {answer!r} in round {record['round']}: return "
            "ist.Stop('the reason') to end the run, or None"
        )
    return answer


@contextmanager
def _errors_of(callback: Callback, event: str, when: str = "") -> Iterator[None]:
    """Turn an error of a callback into one that names it; errors of this package pass."""
    try:
        yield
    except ISTError:
        raise
    except (Exception, SystemExit) as error:  # a callback may raise anything
        if is_out_of_memory(error):
            raise
        raise CallbackError(
            f"callback {type(callback).__name__}: {event} raises {error_with_line(error)}{when}"
        ) from error


def _close(
    callback: Callback, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
) -> None:
    """Close a callback at the end of a context; if the context failed, its error is the one that is raised."""
    try:
        with _errors_of(callback, "close"):
            callback.close()
    except ISTError as failure:
        if error is None:
            raise
        _log.warning("%s", failure)


def _configured(config: Config) -> list[Callback]:
    """Create the callbacks of `watch.callbacks`.

    Raises:
        ConfigError: A name is unknown, or the object cannot be created or is not a callback.
    """
    made = []
    for number, component in enumerate(config.watch.callbacks):
        key = f"watch.callbacks.{number}"
        found = call(resolve(component.name, f"{key}.name", CALLBACKS), component.args, f"{key}.args")
        _check_callback(found, f"'{key}.name' is '{component.name}', which returns", "a subclass of ist.Callback")
        made.append(found)
    return made


def _check_callback(callback: Any, where: str, expected: str) -> None:
    """Check the class of a callback, and that it has no method whose event does not exist.

    Raises:
        ConfigError: It is not a callback, or has a method such as `on_rounds`.
    """
    if not isinstance(callback, Callback):
        what = f"the class {callback.__name__}" if isinstance(callback, type) else repr(callback)
        raise ConfigError(f"{where} {'is ' if where.endswith(']') else ''}{what}: expected {expected}")
    for name in dir(callback):
        if name.startswith("on_") and name not in _EVENTS:
            near = difflib.get_close_matches(name, _EVENTS, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ConfigError(
                f"callback {type(callback).__name__} has '{name}', which is never called: {hint}Known methods are "
                f"{', '.join(_EVENTS)} and close"
            )


def _without_passwords(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _without_passwords(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_passwords(value) for value in tree]
    return redacted(tree) if isinstance(tree, str) else tree
