"""The arguments of `ist.train`, `ist.join` and `ist.split`: check them, and turn them into a configuration.

Where it sits: `ist/api.py` calls this before it uses the network.
Law: a section gives the same configuration as an object, as a mapping of its keys, and as keywords of earlier versions.
Not here: the meaning of keys (`ist/config/schema.py`), whether the network can be split (`ist/runs/build.py`).
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ist.config.base import Section, plain, python_numbers
from ist.config.load import validate
from ist.config.partition import Exchange, Partition
from ist.config.recipe import Recipe
from ist.config.runtime import Checkpoint, Loader, Pool, Watch
from ist.config.schema import FROM_PYTHON, Config, Evaluate, Optimizer, Schedule, Skew
from ist.data.batched import BatchedDataset, Collated
from ist.data.batches import fetch, is_stream, length
from ist.data.loading.given import taken_apart
from ist.data.loading.loader import LoaderSettings
from ist.data.nested import tensors_in
from ist.distributed.environment import is_launched, ranks_of_node
from ist.errors import ConfigError, DataError, ISTError, first_line
from ist.network.compiled import original
from ist.optimization.factory import MakeOptimizer, of_class
from ist.optimization.schedulers import MakeScheduler
from ist.runs.loading.load import is_function

SECTIONS: dict[str, type[Section]] = {
    "optimizer": Optimizer,
    "schedule": Schedule,
    "skew": Skew,
    "partition": Partition,
    "exchange": Exchange,
    "loader": Loader,
    "recipe": Recipe,
    "evaluate": Evaluate,
    "checkpoint": Checkpoint,
    "pool": Pool,
    "watch": Watch,
}
"""Arguments that are sections of a configuration, and their classes."""

_SHORT = {"optimizer": "name", "schedule": "name", "pool": "kind"}
"""Sections that may be given as a string, and the key that the string sets."""

_EARLIER = {
    "optimizer": "optimizer_args",
    "schedule": "schedule_args",
    "evaluate": "evaluate_options",
    "checkpoint": "checkpoint_options",
    "pool": "pool_options",
    "watch": "watch_options",
}
"""By section, the keyword of earlier versions that holds its other keys."""


class LoopKeys(TypedDict, total=False):
    """Keys of the section `train` that few runs set, and that hold for a loop of the user's own as well."""

    min_workers: int | None
    logged: list[str]
    schedule_unit: Literal["step", "round"]
    optimizer_state: Literal["kept", "reset", "carried"]
    activation_scale: Literal["none", "width", "folded"]
    running_statistics: Literal["reestimate", "carried"]


class TrainKeys(LoopKeys, total=False):
    """Keys of the section `train` that few runs set; `ist keys` explains them."""

    accumulate: int
    autocast: Literal["bfloat16", "float16"] | None
    clip_grad_norm: float | None
    compile: str | None


class Keywords(TrainKeys, total=False):
    """All further keywords: keys of `train`, and mappings of earlier versions, which sections have replaced."""

    optimizer_args: Mapping[str, Any] | None
    schedule_args: Mapping[str, Any] | None
    data_options: Mapping[str, Any] | None
    train_options: Mapping[str, Any] | None
    evaluate_options: Mapping[str, Any] | None
    pool_options: Mapping[str, Any] | None
    checkpoint_options: Mapping[str, Any] | None
    watch_options: Mapping[str, Any] | None


@dataclass(frozen=True)
class GivenData:
    """The arguments of `ist.train` about data, with data sets in place of loaders.

    Attributes:
        given: All arguments; `data` and `test_data` are data sets, with their collate functions.
        loader: How batches of the training data are read; None: as the configuration says.
        test_loader: How batches of the test data are read; None: like those of the training data.
    """

    given: Mapping[str, Any]
    loader: LoaderSettings | None = None
    test_loader: LoaderSettings | None = None


def given_data(given: Mapping[str, Any]) -> GivenData:
    """Take loaders among the arguments of `ist.train` apart, and give data sets their collate function.

    Args:
        given: All arguments by name.

    Raises:
        ConfigError: A loader and another argument contradict each other.
        DataError: A loader has an argument that a run cannot honour.
    """
    found = dict(given)
    loaders: dict[str, LoaderSettings] = {}
    for name in ("data", "test_data"):
        if isinstance(given[name], DataLoader):
            apart = taken_apart(given[name], name, is_training=name == "data")
            found[name], loaders[name] = apart.dataset, apart.settings
            _take_batch_size(found, name, apart.batch_size)
            if given["collate_fn"] is not None and isinstance(apart.dataset, Collated):
                raise ConfigError(f"collate_fn is given, but {name} is a DataLoader with a collate_fn: leave one out")
        if given["collate_fn"] is not None and found[name] is not None:
            if not callable(given["collate_fn"]):
                raise ConfigError(f"collate_fn is {given['collate_fn']!r}: give a function of a list of items")
            if isinstance(found[name], BatchedDataset):
                raise ConfigError(
                    f"collate_fn is given, but {name} is a BatchedDataset, which makes its own batches: leave it out"
                )
            if is_function(found[name]):
                found[name] = partial(_collated, found[name], given["collate_fn"])
            else:
                found[name] = Collated(found[name], given["collate_fn"])
    if "data" in loaders:
        if given["loader"] is not None:
            raise ConfigError("loader is given, but data is a DataLoader with its own settings: leave one out")
        settings = loaders["data"]
        keys = {key: getattr(settings, key) for key in Loader.model_fields}
        found["loader"] = Loader(**{**keys, "timeout_s": settings.timeout_s or None})
    return GivenData(found, loaders.get("data"), loaders.get("test_data"))


def _collated(load: Callable[[int], Any], collate: Callable[[list[Any]], Any], worker: int) -> Dataset[Any]:
    """Return a worker's own data set with a collate function."""
    return Collated(load(worker), collate)


def _take_batch_size(found: dict[str, Any], name: str, size: int) -> None:
    """Set the batch size of training or evaluation to that of a loader.

    Raises:
        ConfigError: It is given as well, with another value.
    """
    if name == "data":
        key, given = "batch_size", found["batch_size"]
        found["batch_size"] = size
    else:
        section = _section("evaluate", found["evaluate"], found["keywords"])
        key, given = "evaluate.batch_size", section.get("batch_size")
        if given is None:
            found["evaluate"] = {**section, "batch_size": size}
            found["keywords"] = {**found["keywords"], "evaluate_options": None}
    if given not in (None, size):
        raise ConfigError(f"{key} is {given}, but {name} is a DataLoader with batch_size={size}: leave one out")


def train_config(given: Mapping[str, Any]) -> Config:
    """Return the configuration that the arguments of `ist.train` describe.

    Args:
        given: All arguments by name; those of `Keywords` in a mapping under "keywords".

    Raises:
        ConfigError: An argument is invalid.
        DataError: `data` or `test_data` is not a data set.
        TypeError: An argument of that name does not exist.
    """
    _check_keywords("train", given, tuple(Keywords.__annotations__))
    _check_classes(given)
    if given["loop"] is not None:
        return _own_loop_config(given)
    if given["data"] is None:
        raise DataError("data is missing: give a data set, or loop=, a training loop of your own with its own data")
    has_step = given["step"] is not None
    for name in ("example", "statistics"):
        if given[name] is not None and not (name == "example" and has_step):
            raise ConfigError(f"{name} is for a loop of your own: give loop= as well, or leave it out")
    if not is_function(given["data"]):
        _check_data(given["data"], "data", of_pairs=not has_step)
    elif given["shard"] != "own":
        raise ConfigError(
            f"data is a function, but shard is {given['shard']!r}: give shard='own' if it returns the data set of a "
            "worker, or pass a data set"
        )
    if given["test_data"] is not None:
        _check_data(given["test_data"], "test_data", of_pairs=not has_step)
    metric = "none" if has_step else _metric(given["test_data"])
    return _config(given, _data_name(given["data"]), metric, "ist.train")


def _data_name(data: Any) -> str:
    return type(data.items if isinstance(data, Collated) else data).__name__


def _own_loop_config(given: Mapping[str, Any]) -> Config:
    """Return the configuration of `ist.train` with a loop of the user's own.

    Raises:
        ConfigError: An argument is for the built-in loop.
        DataError: `example` or `test_data` is wrong.
    """
    if not callable(given["loop"]):
        raise ConfigError(f"loop is {given['loop']!r}: give a function that makes the steps of an ist.Part")
    for name, default in _OF_BUILT_IN_LOOP.items():
        if given[name] != default:
            raise ConfigError(
                f"{name} is for the built-in loop: leave it out, because your loop reads the data and makes the steps"
            )
    _refuse_built_in(given["keywords"])
    _check_example(given["example"])
    if given["test_data"] is not None:
        _check_data(given["test_data"], "test_data", of_pairs=True)
    return _config(given, "own loop", _metric(given["test_data"]), "ist.train")


_OF_BUILT_IN_LOOP = {
    "data": None,
    "epochs": None,
    "batch_size": None,
    "shuffle": "local",
    "shard": "assigned",
    "skew": None,
    "loader": None,
    "step": None,
}
"""Arguments of `ist.train` that only the built-in loop uses, and their defaults."""


def join_config(given: Mapping[str, Any]) -> Config:
    """Return the configuration that the arguments of `ist.join` describe.

    Args:
        given: All arguments by name; those of `LoopKeys` in a mapping under "keywords".

    Raises:
        ConfigError: An argument is invalid.
        DataError: `example` contains no tensor.
        TypeError: An argument of that name does not exist.
    """
    _refuse_built_in(given["keywords"])
    _check_keywords("join", given, tuple(LoopKeys.__annotations__))
    given = {**_NO_DATA, **given}
    _check_classes(given)
    _check_example(given["example"])
    config = _config(given, "own loop", "none", "ist.join")
    if config.pool.spec.replaces_workers:
        raise ConfigError(
            f"pool.kind is '{config.pool.kind}', whose workers are processes of its own: use "
            "ist.train(model, loop=function, pool='ray'), which runs your loop there"
        )
    if config.pool.spec.in_process and config.train.workers > 1:
        raise ConfigError(
            f"pool.kind is 'inline' and workers is {config.train.workers}, but each process of ist.join is one worker: "
            "use ist.train(model, loop=function, pool='inline') to train all of them in this process"
        )
    if "threads" in config.pool.model_fields_set:
        return config
    pool = config.pool.model_copy(update={"threads": torch.get_num_threads()})  # the script's own choice
    return config.model_copy(update={"pool": pool})


def _refuse_built_in(keywords: Mapping[str, Any]) -> None:
    """Refuse keys of the section `train` that only the built-in loop uses.

    Raises:
        ConfigError: There is one.
    """
    built_in = TrainKeys.__annotations__.keys() - LoopKeys.__annotations__.keys()
    if found := sorted(built_in & keywords.keys()):
        raise ConfigError(f"{found[0]} is for the built-in loop: leave it out, and do this in your own loop")


_NO_DATA = {
    "epochs": None,
    "batch_size": 1,
    "loss": "cross_entropy",
    "step": None,
    "schedule": None,
    "shuffle": "local",
    "shard": "assigned",
    "skew": None,
    "collate_fn": None,
    "loader": None,
    "evaluate": None,
    "checkpoint": None,
    "watch": None,
}
"""Arguments of `ist.train` that do not affect the split, with fixed values."""


def split_config(given: Mapping[str, Any]) -> Config:
    """Return the configuration that the arguments of `ist.split` describe.

    Args:
        given: All arguments by name; those of `TrainKeys` in a mapping under "keywords".

    Raises:
        ConfigError: An argument is invalid.
        DataError: `example` contains no tensor.
        TypeError: An argument of that name does not exist.
    """
    _check_keywords("split", given, tuple(TrainKeys.__annotations__))
    given = {**_NO_DATA, **given}
    _check_classes(given)
    _check_example(given["example"])
    return _config(given, "example", "none", "ist.split")


def _check_example(example: Any) -> None:
    """Check the inputs of a batch.

    Raises:
        DataError: They contain no tensor.
    """
    if next(tensors_in(example), None) is None:
        raise DataError(
            f"example is a {type(example).__name__} without a tensor: give the inputs of a batch of two samples, as "
            "the network accepts them"
        )


def _config(given: Mapping[str, Any], data_name: str, metric: str, source: str) -> Config:
    """Combine arguments of the right types into a configuration; `source` names the function in messages.

    Raises:
        ConfigError: A value is not allowed.
    """
    keywords = given["keywords"]
    sections = {name: _section(name, given[name], keywords) for name in SECTIONS}
    if given["optimizer"] in ("SGD", torch.optim.SGD) and keywords.get("optimizer_args") is None:
        sections["optimizer"]["args"] = {"lr": 0.1}
    loss, step = given["loss"], given["step"]
    tree = {
        "name": "api",
        "seed": given["seed"],
        "model": {"name": FROM_PYTHON + type(original(given["model"])).__name__, **_weights(given)},
        "data": {
            "name": data_name,
            "shuffle": given["shuffle"],
            "shard": given["shard"],
            "skew": sections.pop("skew") or None,
            "loader": sections.pop("loader"),
            "collate": None if given["collate_fn"] is None else plain(given["collate_fn"]),
            **(keywords.get("data_options") or {}),
        },
        "train": {
            **{key: given[key] for key in ("workers", "rounds", "epochs", "local_steps")},
            "batch_size": 32 if given["batch_size"] is None else given["batch_size"],
            "loss": loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__),
            "step": step if isinstance(step, str | None) else FROM_PYTHON + plain(step),
            "optimizer": sections.pop("optimizer"),
            "schedule": sections.pop("schedule") or None,
            **{key: keywords[key] for key in TrainKeys.__annotations__ if key in keywords},
            **(keywords.get("train_options") or {}),
        },
        **sections,
        "evaluate": {"metric": metric, **sections["evaluate"]},
        "pool": {"kind": "torchrun" if is_launched() else "inline", **sections["pool"]},
    }
    if is_launched() and tree["pool"].get("ranks_per_worker") == "node":
        tree["pool"]["ranks_per_worker"] = ranks_of_node()
    return validate(python_numbers(tree), source)


def _weights(given: Mapping[str, Any]) -> dict[str, str]:
    return {} if given["weights"] is None else {"weights": str(given["weights"])}


def _section(name: str, value: Any, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a section that are given, in its own argument or in the keyword of earlier versions.

    Raises:
        ConfigError: The argument has another type, or both arguments have keys.
    """
    kind, short, earlier = SECTIONS[name], _SHORT.get(name), _EARLIER.get(name, "")
    if name in _KINDS and callable(value):
        found: dict[str, Any] = {"name": _name_of(name, value)}
    elif value is None or (name == "pool" and value == "auto"):
        found = {}
    elif isinstance(value, str) and short is not None:
        found = {short: value}
    elif isinstance(value, Mapping):
        found = dict(value)
    elif isinstance(value, kind):
        found = {key: getattr(value, key) for key in kind.model_fields if key in value.model_fields_set}
    else:
        text = f"its {short}, " if short else ""
        raise ConfigError(
            f"{name} is {value!r} (a {type(value).__name__}): give {text}ist.{kind.__name__}(...) or a mapping of its "
            "keys to values"
        )
    more = keywords.get(earlier)
    if not more:
        return found
    if not isinstance(value, str | None):
        raise ConfigError(
            f"{name} and {earlier} both set keys of one section: move all keys to {name}, remove {earlier}"
        )
    return {**found, "args": dict(more)} if earlier.endswith("_args") else {**found, **more}


def _check_keywords(function: str, given: Mapping[str, Any], further: Sequence[str]) -> None:
    """Check that keywords exist, and that those of earlier versions are mappings.

    Args:
        function: The name of the called function.
        given: Its arguments.
        further: The names that it accepts as `keywords`.

    Raises:
        ConfigError: A keyword of earlier versions is not a mapping.
        TypeError: A keyword does not exist; the message is like Python's own.
    """
    known = [*(name for name in given if name != "keywords"), *further]
    for name, value in given["keywords"].items():
        if name not in further:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f". Did you mean '{near[0]}'?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'{hint}")
        if name not in TrainKeys.__annotations__ and not isinstance(value, Mapping | None):
            raise ConfigError(f"{name} is {value!r} (a {type(value).__name__}): give a mapping of keys to values")


def _check_classes(given: Mapping[str, Any]) -> None:
    """Check that model and loss are not classes, and that optimizer and schedule can be made later.

    Raises:
        ConfigError: One of them is a class, `model` is not a module, or optimizer or schedule is an object.
    """
    if not isinstance(given["model"], nn.Module):
        raise ConfigError(f"model is {given['model']!r}: give a torch.nn.Module")
    for name in _KINDS:
        _check_made_later(name, given[name])
    if isinstance(given["loss"], type):
        name = given["loss"].__name__
        raise ConfigError(f"loss is the class {name}: give a function, such as {name}()")
    step = given["step"]
    if isinstance(step, type) or not (step is None or isinstance(step, str) or callable(step)):
        raise ConfigError(f"step is {step!r}: give a function of (network, batch), or its import path")


def _check_made_later(name: str, value: Any) -> None:
    """Check that an optimizer or a schedule is neither an object nor a class of something else.

    Raises:
        ConfigError: It is.
    """
    kind, module, section = _KINDS[name], _MODULES[name].__name__, f"ist.{SECTIONS[name].__name__}"
    if isinstance(value, type) and not issubclass(value, kind):
        raise ConfigError(
            f"{name} is the class {value.__name__}: give a class of {module}, its name, or {section}(...)"
        )
    if isinstance(value, kind):
        cls, given = type(value).__name__, "named.values()" if name == "optimizer" else "optimizer"
        raise ConfigError(
            f"{name} is a {cls} object, but every subnet needs its own: give the class, {section}(name='{cls}', "
            f"args={{...}}), or a function such as lambda {given.partition('.')[0]}: {cls}({given}, ...)"
        )


_KINDS: dict[str, type] = {"optimizer": torch.optim.Optimizer, "schedule": torch.optim.lr_scheduler.LRScheduler}
_MODULES = {"optimizer": torch.optim, "schedule": torch.optim.lr_scheduler}


def optimizer_function(value: Any) -> MakeOptimizer | None:
    """Return the function that makes optimizers if one was given, or a class that the configuration cannot name."""
    if not callable(value) or _is_torchs("optimizer", value):
        return None
    called = value.func if isinstance(value, partial) else value  # such as partial(torch.optim.AdamW, lr=0.01)
    return of_class(value) if isinstance(called, type) else value


def scheduler_function(value: Any) -> MakeScheduler | None:
    """Return the function that makes the scheduler if one was given, or a class that the configuration cannot name."""
    return value if callable(value) and not _is_torchs("schedule", value) else None


def _is_torchs(name: str, value: Any) -> bool:
    """Return whether a value is a class of torch, which its name describes completely."""
    return isinstance(value, type) and getattr(_MODULES[name], value.__name__, None) is value


def _name_of(name: str, function: Any) -> str:
    """Return the name of a class or function for the configuration."""
    return str(function.__name__) if _is_torchs(name, function) else f"{FROM_PYTHON}{plain(function)}"


def _check_data(data: Any, name: str, of_pairs: bool) -> None:
    """Check that an argument is a data set, and with `of_pairs` that its items are pairs.

    Raises:
        DataError: It is a sequence of tensors, is empty, or its items are not pairs; a list of other items is allowed.
    """
    if isinstance(data, tuple | Tensor) or (isinstance(data, list) and any(isinstance(item, Tensor) for item in data)):
        raise DataError(f"{name} is a {type(data).__name__}: pass a data set, such as TensorDataset(inputs, targets)")
    if name == "data" and is_stream(data):
        return
    if length(data) == 0:
        raise DataError("the data set is empty" if name == "data" else "the test data set is empty")
    if isinstance(data, BatchedDataset | Collated):
        return
    try:
        item = data[0]
    except ISTError:
        raise
    except Exception as error:  # a data set may raise anything
        raise DataError(
            f"item 0 of {type(data).__name__} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error
    if of_pairs and (not isinstance(item, tuple | list) or len(item) != 2):
        raise DataError(
            f"an item of {type(data).__name__} is a {type(item).__name__}, not a pair (input, target): give "
            "collate_fn=, a function that makes a pair (inputs, targets) of a list of such items; or step="
        )


def _metric(test_data: Dataset[Any] | None) -> str:
    """Return the default metric: accuracy if the targets are class numbers."""
    if test_data is None:
        return "none"
    if isinstance(test_data, BatchedDataset):
        return "none"  # the targets of a batch are unknown: the caller names a metric in `evaluate`
    if isinstance(test_data, Collated):
        targets = fetch(test_data, np.zeros(1, dtype=np.int64), torch.device("cpu"))[1]
        target = targets[0] if isinstance(targets, Tensor) and targets.ndim else None
    else:
        target = test_data[0][1]
    is_class = isinstance(target, int) or (
        isinstance(target, Tensor) and target.ndim == 0 and not target.is_floating_point()
    )
    return "accuracy" if is_class else "none"
