"""Configuration: YAML 1.2 scalars, overrides, and errors that name the file, the key, the value and the remedy."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ist.config.base import describe_keys
from ist.config.load import config_for_method, dump_config, load_config, validate
from ist.config.schema import Config
from ist.config.yaml_text import parse_yaml
from ist.errors import ConfigError
from tests.conftest import config_tree, naming, small_config


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree(**changes)))
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("-2E5", -2e5), ("1.", 1.0), (".5", 0.5), ("12", 12), ("-7", -7), ("0x1F", 31), ("0o17", 15),
        ("010", 10), ("true", True), ("False", False), ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("null", None),
        ("~", None), ("", None), (".inf", float("inf")), ("1_000", "1_000"), ("2020-01-01", "2020-01-01"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text, "test")

    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False), st.integers(), st.text("0189abcefxyz -+_.:~", max_size=6))
def test_what_is_dumped_is_read_back(number: float, whole: int, text: str) -> None:
    args = {"number": number, "whole": whole, "text": text, "flag": True, "nothing": None, text: [text]}
    config = small_config(name="1e3", model__args=args)

    assert parse_yaml(dump_config(config), "test") == config.model_dump()


def test_a_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))

    assert load_config(again) == config


def test_overrides_reach_any_key_and_the_last_one_wins(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path), ["train.optimizer.args.lr=1e-3", "train.local_steps=7", "train.local_steps=8", "name=x"]
    )

    assert config.train.optimizer.args == {"lr": 1e-3, "momentum": 0.9}
    assert (config.train.local_steps, config.name) == (8, "x")


BAD: dict[str, tuple[Any, ...]] = {
    "unknown key": ({"train__local_step": 3}, "'train.local_step'", "'local_steps'"),
    "an optimizer's argument in the wrong place": (
        {"train__optimizer": {"name": "SGD", "lr": 0.1}}, "'train.optimizer.lr'", "'train.optimizer.args.lr'",
    ),
    "an optimizer's argument at the top": ({"lr": 0.1}, "'lr'", "'train.optimizer.args.lr'"),
    "a name for a section": ({"train__optimizer": "SGD"}, "'train.optimizer' is 'SGD'", "mapping", "name, args"),
    "unknown section": ({"modle": 3}, "'modle'", "'model'"),
    "wrong type": ({"train__local_steps": "many"}, "'train.local_steps' is 'many' (a string)", "integer"),
    "number as text": ({"train__batch_size": "32"}, "'train.batch_size' is '32' (a string)"),
    "negative steps": ({"train__local_steps": -1}, "'train.local_steps' is -1", "greater than 0"),
    "zero steps": ({"train__local_steps": 0}, "'train.local_steps' is 0"),
    "no workers": ({"train__workers": 0}, "'train.workers' is 0"),
    "two lengths": ({"train__epochs": 3}, "'train'", "one of 'epochs' and 'rounds'"),
    "unknown choice": ({"pool__kind": "mpi"}, "'pool.kind' is 'mpi'", "'inline', 'torchrun' or 'ray'"),
    "section is a number": ({"train": 3}, "'train' is 3 (a whole number)"),
    "a bad override": (
        {"compare": {"methods": ["ist"], "overrides": {"ist": {"train.loacl_steps": 3}}}},
        "compare.overrides.ist", "'train.loacl_steps'",
    ),
    "no such strategy": ({"partition__strategy": "even"}, "'partition.strategy' is 'even'", "'disjoint', "),
    "keep is zero": ({"partition": {"strategy": "rolling", "keep": 0.0}}, "'partition.keep' is 0.0", "greater than 0"),
    "error feedback without rounding": (
        {"exchange": {"error_feedback": True, "values": "deltas"}},
        "'exchange'", "'error_feedback'", "'up' is exact", "'values' is deltas", "int8",
    ),
    "no such shuffle": ({"data__shuffle": "none"}, "'data.shuffle' is 'none'", "'local' or 'global'"),
    "an unknown coding": ({"exchange": {"up": "int9"}}, "'exchange.up' is 'int9'", "'exact', 'bfloat16'"),
    "too early for PowerSGD": ({"baseline": {"powersgd_start": 1}}, "'baseline.powersgd_start' is 1", "equal to 2"),
    "error feedback whose residuals never last": (
        {"exchange": {"error_feedback": True, "values": "deltas", "up": "int8"}, "partition": {"balance": "speed"}},
        "'exchange.error_feedback' is true", "'partition.balance' speed",
    ),
    "a method twice": ({"compare": {"methods": ["ddp", "ddp"]}}, "'compare.methods'", "'ddp'", "label", "'method'"),
    "a label that takes the report's name": ({"compare": {"methods": ["report.html"]}}, "'report.html'", "label"),
    "overrides for an unknown label": (
        {"compare": {"overrides": {"pwersgd": {"train.epochs": 1}}}},
        "'compare.overrides'", "'pwersgd'", "compare.methods", "(ist, ddp,", "'method'",
    ),
    "a label that cannot name a folder": ({"compare": {"methods": ["../ist"]}}, "'compare.methods.0' is '../ist'", "pattern"),
    "keep is too large": ({"partition": {"strategy": "rolling", "keep": 1.5}}, "'partition.keep' is 1.5", "equal to 1"),
    "keep is not a number": ({"partition": {"strategy": "rolling", "keep": float("nan")}}, "'partition.keep' is nan"),
    "a capacity of zero": ({"partition__capacities": [1, 0, 1, 1]}, "'partition.capacities.1' is 0", "greater than 0"),
    "an infinite capacity": ({"partition__capacities": [1, 1, 1, float("inf")]}, "'partition.capacities.3' is inf", "finite"),
    "too few capacities": (
        {"partition__capacities": [1, 2]}, "'partition.capacities' is [1.0, 2.0]", "'train.workers' is 4",
    ),
    "an empty pattern": ({"partition__exclude": [""]}, "'partition.exclude.0' is ''", "at least 1"),
    "bernoulli without a probability": (
        {"partition__strategy": "bernoulli"}, "'partition'", "'bernoulli'", "'keep'", "probability", "0.5",
    ),
    "nested without a size": (
        {"partition__strategy": "nested"}, "'partition'", "'nested'", "'capacities' None", "'keep'", "0.5",
    ),
    "nested with equal capacities": (
        {"partition": {"strategy": "nested", "capacities": [2, 2, 2, 2]}}, "'capacities' [2.0, 2.0, 2.0, 2.0]", "'keep'"
    ),
    "blocks without blocks": ({"partition__strategy": "blocks"}, "'partition'", "'blocks'", "['layer3.*']"),
    "a range without a maximum": ({"train__workers": {"min": 2}}, "'workers'", "{min: 2, max: 16}"),
    "a reversed range": ({"train__workers": {"min": 5, "max": 4}}, "'min_workers' is 5", "4 'workers'"),
    "a range from zero": ({"train__workers": {"min": 0, "max": 4}}, "'train.min_workers' is 0"),
    "a range of workers for epochs": (
        {"train__workers": {"min": 2, "max": 4}, "train__rounds": None, "train__epochs": 3}, "epoch", "give 'rounds'",
    ),
    "capacities for a range of workers": (
        {"train__workers": {"min": 2, "max": 4}, "partition__capacities": [1, 1, 1, 2]},
        "'partition.capacities'", "train.min_workers", "'partition.balance' speed",
    ),
    "blocks for a range of workers": (
        {"train__workers": {"min": 2, "max": 4}, "partition": {"strategy": "blocks", "blocks": ["a.*"]}},
        "'blocks'", "'train.min_workers'",
    ),
    "capacities given and measured": (
        {"partition": {"balance": "speed", "capacities": [1, 1, 1, 2]}}, "'capacities'", "'balance'",
    ),
    "speed under torchrun": (
        {"partition__balance": "speed", "pool": {"kind": "torchrun"}}, "'partition.balance'", "'pool.kind'", "ray",
    ),
    "a deadline under torchrun": (
        {"pool": {"kind": "torchrun", "round_deadline_s": 3}}, "'pool.round_deadline_s'", "'pool.kind' ray", "torchrun",
    ),
    "Ray's keys for another pool": ({"pool__ray": {"num_cpus": 2}}, "'pool.ray'", "'pool.kind' ray", "inline"),
    "an address of Ray's client": (
        {"pool": {"kind": "ray", "ray": {"address": "ray://head:10001"}}},
        "'pool.ray.address' is 'ray://head:10001'", "pattern",
    ),
    "processors as resources": (
        {"pool": {"kind": "ray", "ray": {"resources": {"CPU": 1}}}},
        "'pool.ray.resources'", "{'CPU': 1.0}", "'num_cpus'", "'num_gpus'",
    ),
    "a GPU that Ray does not reserve": (
        {"pool": {"kind": "ray", "device": "cuda"}}, "'pool.device' is 'cuda'", "'pool.ray.num_gpus' is 0", "1",
    ),
    "more to return than there are": ({"pool__min_returned": 5}, "'pool.min_returned' is 5", "4", "train.workers"),
    "more to return than a round starts with": (
        {"train__workers": {"min": 2, "max": 4}, "pool__min_returned": 3},
        "'pool.min_returned' is 3", "2", "train.min_workers",
    ),
    "a bad name": ({"name": "a/b"}, "'name' is 'a/b'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_value_is_named_with_file_key_and_remedy(tmp_path: Path, case: str) -> None:
    changes, *parts = BAD[case]
    path = written(tmp_path, **changes)

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(caught.value).startswith(f"{path}: ")
    assert re.search(naming(*parts), str(caught.value))


USED = {
    "keep": (0.5, "disjoint or bernoulli or rolling or nested"),
    "coverage": ("balanced", "disjoint"),
    "capacities": ([1.0, 2.0, 3.0, 4.0], "disjoint or categorical or bernoulli or rolling or nested"),
    "residual": (True, "disjoint or categorical or bernoulli or rolling or nested"),
    "blocks": (["layer3.*"], "blocks"),
    "min_depth": (2, "blocks"),
}
NEEDED: dict[str, dict[str, Any]] = {"bernoulli": {"keep": 0.3}, "nested": {"keep": 0.3}, "blocks": {"blocks": ["a.*"]}}


@pytest.mark.parametrize("key", USED)
@pytest.mark.parametrize("strategy", ["disjoint", "categorical", "bernoulli", "rolling", "nested", "blocks"])
def test_a_key_that_the_strategy_does_not_use_is_an_error(strategy: str, key: str) -> None:
    value, users = USED[key]
    partition = {"strategy": strategy, **NEEDED.get(strategy, {}), key: value}

    if strategy in users.split(" or "):
        assert getattr(small_config(partition=partition).partition, key) == value
        return

    with pytest.raises(
        ConfigError,
        match=naming(f"test: 'partition.{key}'", f"'{strategy}'", repr(value), f"'partition.strategy' to {users}"),
    ):
        small_config(partition=partition)


@pytest.mark.parametrize("strategy", ["disjoint", "categorical", "bernoulli", "rolling", "nested", "blocks"])
def test_every_strategy_is_read_back_from_what_was_dumped(strategy: str) -> None:
    config = small_config(partition={"strategy": strategy, **NEEDED.get(strategy, {}), "exclude": ["0"]})

    assert validate(parse_yaml(dump_config(config), "test"), "test") == config


def test_a_method_that_assigns_no_neurons_may_have_any_number_of_workers() -> None:
    config = small_config(partition__capacities=[1, 2, 3, 4], compare={"overrides": {"ddp": {"train.workers": 2}}})

    assert config_for_method(config, "ddp").train.workers == 2


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    tree = config_tree()
    del tree["train"]["optimizer"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))

    with pytest.raises(ConfigError, match=naming("'train.optimizer'", "required")):
        load_config(tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: [1, 2", ["job.yaml:1:", "YAML"]),
        ("a: 1\na: 2\n", ["job.yaml:2:1:", "'a'", "duplicate"]),
        ("- a\n", ["job.yaml:", "mapping", "list"]),
        ("", ["job.yaml:", "mapping", "nothing"]),
        ("[a]: 1", ["job.yaml:1:1:", "key"]),
        ("a: !!python/object:os.system {}", ["job.yaml:1:4:", "YAML"]),
    ],
)
def test_malformed_yaml_is_an_error_with_a_position(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=naming(*parts)):
        load_config(path)


def test_a_missing_file_and_a_malformed_override_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=naming("nothing.yaml")):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match=naming("--set train.workers", "dotted.key=value")):
        load_config(written(tmp_path), ["train.workers"])


def test_a_new_length_replaces_the_old_one(tmp_path: Path) -> None:
    config = load_config(written(tmp_path), ["train.epochs=3"])

    assert (config.train.epochs, config.train.rounds) == (3, None)


def test_a_key_at_the_wrong_level_gets_the_right_level_as_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=naming("'local_steps'", "'train.local_steps'")):
        load_config(written(tmp_path), ["local_steps=3"])


def test_a_method_gets_its_overrides_and_only_its_own(tmp_path: Path) -> None:
    overrides = {"ddp": {"train.epochs": 2, "train.optimizer.args.lr": 0.2}}
    config = load_config(written(tmp_path, compare__overrides=overrides))

    ddp, ist = config_for_method(config, "ddp"), config_for_method(config, "ist")

    assert (ddp.train.epochs, ddp.train.rounds, ddp.train.optimizer.args["lr"]) == (2, None, 0.2)
    assert (ist.train.epochs, ist.train.rounds, ist.train.optimizer.args["lr"]) == (None, 4, 0.1)


def test_a_label_stands_for_the_method_that_its_overrides_name() -> None:
    overrides = {"rank4": {"method": "powersgd", "baseline.powersgd_rank": 4}}
    config = small_config(compare={"methods": ["rank4", "powersgd"], "overrides": overrides})

    rank4, powersgd = config_for_method(config, "rank4"), config_for_method(config, "powersgd")

    assert (rank4.method, rank4.label, rank4.baseline.powersgd_rank) == ("powersgd", "rank4", 4)
    assert (powersgd.method, powersgd.label, powersgd.baseline.powersgd_rank) == ("powersgd", "powersgd", 1)


def test_every_key_is_explained() -> None:
    rows = list(describe_keys(Config))

    assert len(rows) > 35
    assert all(meaning for _, _, _, meaning in rows)
    assert {"train.local_steps", "pool.kind", "model.args"} <= {key for key, *_ in rows}


def test_keys_of_what_may_be_left_out_and_of_lists_say_so() -> None:
    rows = {key: (kind, default) for key, kind, default, _ in describe_keys(Config)}

    assert rows["train.schedule"] == ("mapping or null", "default None")
    assert rows["train.schedule.name"] == ("text or null", "default None")
    assert rows["data.skew.alpha"] == ("number", "required if data.skew is given")
    assert rows["train.optimizer.name"] == ("text", "required")
    assert rows["recipe.stages"] == ("list", "default []")
    assert rows["recipe.stages.N.rounds"] == ("whole number or null", "default None")
    assert "recipe.stages.rounds" not in rows
    assert "train.optimizer" not in rows


def test_an_override_reaches_an_entry_of_a_list_by_its_number(tmp_path: Path) -> None:
    path = written(tmp_path, recipe={"stages": [{"rounds": 1}, {}]}, model__args={"widths": [64, 24, 20, 10]})

    config = load_config(path, ["recipe.stages.0.rounds=3", "recipe.stages.1.outer.lr=0.5", "model.args.widths.1=30"])

    assert [stage.rounds for stage in config.recipe.stages] == [3, None]
    assert config.recipe.outer_of(config.recipe.stages[1]).lr == 0.5
    assert config.model.args["widths"] == [64, 30, 20, 10]


@pytest.mark.parametrize("place", ["2", "-1", "x", "N", "", "9" * 400])
def test_an_override_of_an_entry_that_is_not_there_is_an_error(tmp_path: Path, place: str) -> None:
    path = written(tmp_path, recipe={"stages": [{"rounds": 1}, {}]})

    with pytest.raises(ConfigError, match=naming("'recipe.stages'", "list of 2")) as caught:
        load_config(path, [f"recipe.stages.{place}.rounds=3"])
    assert len(str(caught.value)) < 1000


def test_every_key_that_is_explained_can_be_set(tmp_path: Path) -> None:
    path = written(tmp_path, recipe={"stages": [{"rounds": 1}, {}]})

    for key in (key.replace(".N.", ".0.") for key, *_ in describe_keys(Config)):
        message = ""
        try:
            load_config(path, [f"{key}=[]"])
        except ConfigError as error:
            message = str(error)
        assert f"unknown key '{key}'" not in message
        assert "is a list of" not in message


def test_the_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config: Config = load_config(written(tmp_path))

    with pytest.raises(Exception, match="frozen"):
        config.seed = 4  # type: ignore[misc]
