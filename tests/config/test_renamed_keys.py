"""A key that was renamed is read under its old name too; a warning names the new one."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ist.config.base import describe_keys
from ist.config.load import config_for_method, dump_config, load_config, validate
from ist.config.methods import RENAMED
from ist.config.schema import Config
from ist.errors import ConfigError
from ist.storage.checkpoint import Progress
from ist.storage.reopen import open_or_create
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.storage.same_run import allowed_changes, run_changes
from tests.conftest import config_tree, small_config

DILOCO = {"method": "diloco", "pool": {"kind": "torchrun", "device": "cpu"}}
OLD = {"powersgd_rank": 1, "powersgd_start": 2, "outer_lr": 0.5, "outer_momentum": 0.8}
"""The section `baseline` as the version before wrote it into run folders."""

NEW = {"outer": {"lr": 0.5, "momentum": 0.8}}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree(**changes)))
    return path


def as_the_version_before(config: Config) -> str:
    """A resolved configuration with the keys that it had there."""
    tree = config.model_dump()
    outer = tree["baseline"].pop("outer")
    tree["baseline"] |= {"outer_lr": outer["lr"], "outer_momentum": outer["momentum"]}
    return yaml.safe_dump(tree)


def test_every_renamed_key_is_one_no_more_and_its_new_name_is() -> None:
    keys = {key for key, *_ in describe_keys(Config)}

    assert not RENAMED.keys() & keys
    assert set(RENAMED.values()) <= keys


def test_an_old_key_of_a_file_is_read_and_named_with_its_new_one(tmp_path: Path) -> None:
    path = written(tmp_path, **DILOCO, baseline={"outer_lr": 0.5})

    with pytest.warns(FutureWarning, match=r"job\.yaml: 'baseline\.outer_lr' .* 'baseline\.outer\.lr'"):
        config = load_config(path)

    assert (config.baseline.outer.lr, config.baseline.outer.momentum) == (0.5, 0.9)
    assert "outer_lr" not in dump_config(config)


@pytest.mark.parametrize("override", ["baseline.outer_momentum=0.1", "baseline={outer_momentum: 0.1}"])
def test_an_old_key_of_an_override_wins_over_the_file_and_is_named(tmp_path: Path, override: str) -> None:
    path = written(tmp_path, **DILOCO, baseline={"outer": {"momentum": 0.3}})

    with pytest.warns(
        FutureWarning, match=r"--set baseline.* 'baseline\.outer_momentum' .* 'baseline\.outer\.momentum'"
    ):
        config = load_config(path, [override])

    assert config.baseline.outer.momentum == 0.1


def test_an_old_key_of_a_methods_overrides_is_read_and_named(tmp_path: Path) -> None:
    compare = {"methods": ["ist", "diloco"], "overrides": {"diloco": {"baseline.outer_lr": 0.5}}}
    path = written(tmp_path, baseline={"outer": {"lr": 0.3}}, compare=compare)

    with pytest.warns(
        FutureWarning, match=r"compare\.overrides\.diloco: 'baseline\.outer_lr' .* 'baseline\.outer\.lr'"
    ):
        config = load_config(path)

    assert config.baseline.outer.lr == 0.3
    assert config_for_method(config, "diloco").baseline.outer.lr == 0.5


def test_a_key_under_both_names_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, baseline={"outer_lr": 0.5, "outer": {"lr": 0.5}})

    with pytest.raises(ConfigError, match=r"job\.yaml: 'baseline\.outer_lr' .* 'baseline\.outer\.lr'"):
        load_config(path)


def test_a_wrong_value_of_an_old_key_is_an_error_of_the_new_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'baseline\.outer\.momentum' is 2"):
        load_config(written(tmp_path, baseline={"outer_momentum": 2}))
    with pytest.raises(ConfigError, match=r"'baseline\.outer' is 3"):
        load_config(written(tmp_path, baseline={"outer_lr": 0.5, "outer": 3}))


@pytest.mark.parametrize("method", ["diloco", "ist"])
def test_a_run_folder_of_the_version_before_is_the_same_run_and_nobody_is_warned(tmp_path: Path, method: str) -> None:
    config = small_config(method=method, pool=DILOCO["pool"], baseline=NEW)
    folder = create_run_folder(config, tmp_path / "run")
    old = as_the_version_before(config)
    assert yaml.safe_load(old)["baseline"] == OLD
    folder.config_path.write_text(old)

    saved = RunFolder(folder.path).load_config()
    again, goes_on = open_or_create(config, folder.path)

    assert saved == config
    assert goes_on
    assert (run_changes(saved, config), allowed_changes(saved, config)) == ([], [])
    assert again._changed_since(Progress(rounds_done=1, config=old)) == []
    assert validate(yaml.safe_load(old), "test") == config
