"""The arguments of `ist.train`: sections as objects, as mappings, and as keywords of earlier versions."""

import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import ist
from ist.config.schema import Config, Train
from ist.errors import ConfigError
from ist.runs.arguments import SECTIONS, Keywords, TrainKeys, train_config
from tests.conftest import data

MODEL = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))


def config_of(**arguments: Any) -> Config:
    """The configuration that `ist.train` would use for these arguments."""
    bound = inspect.signature(ist.train).bind(MODEL, data(), **{"workers": 2, "rounds": 3, **arguments})
    bound.apply_defaults()
    return train_config(bound.arguments)


OBJECTS: dict[str, Any] = {
    "optimizer": ist.Optimizer(name="AdamW", args={"lr": 0.01}),
    "schedule": ist.Schedule(name="StepLR", args={"step_size": 2}),
    "skew": ist.Skew(alpha=0.3),
    "partition": ist.Partition(strategy="rolling", keep=0.5),
    "exchange": ist.Exchange(up="int8", values="deltas"),
    "loader": ist.Loader(workers=2),
    "recipe": ist.Recipe(stages=[ist.Stage(), ist.Stage(rounds=1, keep=1)], average=ist.Average(kind="ema")),
    "evaluate": ist.Evaluate(every=2),
    "checkpoint": ist.Checkpoint(every=3),
    "pool": ist.Pool(kind="ray", ray=ist.Ray(num_cpus=2)),
    "watch": ist.Watch(tensorboard=True),
}
MAPPINGS: dict[str, Any] = {
    "optimizer": {"name": "AdamW", "args": {"lr": 0.01}},
    "schedule": {"name": "StepLR", "args": {"step_size": 2}},
    "skew": {"alpha": 0.3},
    "partition": {"strategy": "rolling", "keep": 0.5},
    "exchange": {"up": "int8", "values": "deltas"},
    "loader": {"workers": 2},
    "recipe": {"stages": [{}, {"rounds": 1, "keep": 1}], "average": {"kind": "ema"}},
    "evaluate": {"every": 2},
    "checkpoint": {"every": 3},
    "pool": {"kind": "ray", "ray": {"num_cpus": 2}},
    "watch": {"tensorboard": True},
}
EARLIER: dict[str, dict[str, Any]] = {
    "optimizer": {"optimizer": "AdamW", "optimizer_args": {"lr": 0.01}},
    "schedule": {"schedule": "StepLR", "schedule_args": {"step_size": 2}},
    "skew": {"data_options": {"skew": {"alpha": 0.3}}},
    "loader": {"data_options": {"loader": {"workers": 2}}},
    "evaluate": {"evaluate_options": {"every": 2}},
    "checkpoint": {"checkpoint_options": {"every": 3}},
    "pool": {"pool": "ray", "pool_options": {"ray": {"num_cpus": 2}}},
    "watch": {"watch_options": {"tensorboard": True}},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_the_same_as_object_mapping_and_earlier_keyword(name: str) -> None:
    typed = config_of(**{name: OBJECTS[name]})

    assert typed != config_of()
    assert config_of(**{name: MAPPINGS[name]}) == typed
    assert config_of(**EARLIER.get(name, {name: MAPPINGS[name]})) == typed
    assert typed.model_dump() == config_of(**{name: MAPPINGS[name]}).model_dump()


def test_further_keys_of_train_and_data_are_keywords_with_the_effect_of_earlier_options() -> None:
    keys = {
        "min_workers": 1, "schedule_unit": "round", "optimizer_state": "carried", "activation_scale": "none",
        "running_statistics": "carried",
    }  # fmt: skip

    config = config_of(**keys, shuffle="global")

    assert config == config_of(train_options=keys, data_options={"shuffle": "global"})
    assert {key: getattr(config.train, key) for key in keys} == keys
    assert config_of(workers={"min": 1, "max": 2}).train.min_workers == 1


def test_every_key_of_train_is_an_argument_and_every_section_has_its_type() -> None:
    named = inspect.signature(ist.train).parameters.keys()
    hints = get_type_hints(ist.train)

    assert set(Train.model_fields) == (set(Train.model_fields) & named) | TrainKeys.__annotations__.keys()
    assert not Keywords.__annotations__.keys() & named
    chosen = {key: kind for key, kind in get_type_hints(TrainKeys).items() if get_origin(kind) is Literal}
    assert {key: Train.model_fields[key].annotation for key in chosen} == chosen
    assert len(chosen) == 4
    assert {name: kind for name, kind in SECTIONS.items() if kind not in get_args(hints[name])} == {}
    assert set(Config.model_fields) - named <= {"name", "method", "label", "train", "baseline", "compare", "output"}


def test_keys_that_a_section_omits_have_the_defaults_of_python() -> None:
    config = config_of(evaluate=ist.Evaluate(every=2), pool=ist.Pool(threads=2), test_data=data())

    assert (config.evaluate.metric, config.pool.kind) == ("accuracy", "inline")
    assert config_of().train.optimizer.args == {"lr": 0.1}
    assert config_of(optimizer=ist.Optimizer(name="SGD")).train.optimizer.args == {}
    assert config_of(optimizer_args={}).train.optimizer.args == {}


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    config = config_of(
        workers=np.int64(2),
        optimizer={"name": "SGD", "args": {"lr": torch.tensor(0.5)}},
        pool=ist.Pool(threads=np.int64(3)),
    )

    assert (config.train.workers, config.train.optimizer.args, config.pool.threads) == (2, {"lr": 0.5}, 3)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_of_the_wrong_type_is_refused_by_name(name: str) -> None:
    other = ist.Outer() if name != "recipe" else ist.Stage()
    for value in (3, ["x"], other, SECTIONS[name]):
        with pytest.raises(ConfigError, match=rf"^{name} is .*ist\.{SECTIONS[name].__name__}\b"):
            config_of(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"batchsize": 4}, TypeError, "'batchsize'.*'batch_size'"),
        ({"zzzz": 4}, TypeError, "'zzzz'$"),
        ({"evaluate": ist.Evaluate(), "evaluate_options": {"every": 2}}, ConfigError, "evaluate and evaluate_options"),
        ({"pool": {"threads": 2}, "pool_options": {"kind": "ray"}}, ConfigError, "pool and pool_options"),
        ({"optimizer": ist.Optimizer(name="SGD"), "optimizer_args": {"lr": 1}}, ConfigError, "optimizer_args"),
        ({"schedule_args": {"step_size": 2}}, ConfigError, "'train.schedule'.*exactly one of 'name'"),
        ({"partition": {"strategi": "rolling"}}, ConfigError, "'partition.strategi'.*'strategy'"),
        ({"pool": "mpi"}, ConfigError, "'pool.kind' is 'mpi'.*'inline', 'torchrun' or 'ray'"),
        ({"watch_options": 3}, ConfigError, "watch_options is 3"),
        ({"optimizer_state": "lost"}, ConfigError, "'train.optimizer_state' is 'lost'.*'kept', 'reset' or 'carried'"),
    ],
)
def test_an_invalid_argument_is_refused_with_its_name_and_allowed_values(
    arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        config_of(**arguments)
