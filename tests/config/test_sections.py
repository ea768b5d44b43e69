"""Sections made in Python: a mistake names the section, the key, the value and what is right."""

import ast
import re
from typing import Any

import numpy as np
import pytest

from ist.config.base import Component, Section, describe_keys
from ist.config.partition import Exchange, Partition
from ist.config.recipe import Recipe, Stage
from ist.config.runtime import Pool
from ist.errors import ConfigError
from tests.conftest import ROOT

MISTAKES: dict[str, tuple[type[Section], dict[str, Any], tuple[str, ...]]] = {
    "an unknown key": (Partition, {"strategi": "rolling"}, ("ist.Partition", "'strategi'", "'strategy'")),
    "an unknown key of a section inside": (
        Recipe, {"outer": {"momentun": 0.9}}, ("ist.Recipe", "'outer.momentun'", "'momentum'"),
    ),
    "a key of a section inside": (Recipe, {"momentum": 0.9}, ("ist.Recipe", "'momentum'", "'outer.momentum'")),
    "a key that nothing has": (Exchange, {"zzz": 1}, ("ist.Exchange", "'zzz'", "down, error_feedback, rest, up, values")),
    "an argument beside args": (Component, {"name": "SGD", "lr": 0.1}, ("'lr'", "'args.lr'")),
    "an unknown choice": (Partition, {"strategy": "even"}, ("ist.Partition", "'strategy'", "'even'", "'disjoint'")),
    "a wrong type, in a list": (Recipe, {"stages": [{}, {"rounds": "3"}]}, ("ist.Recipe", "'stages.1.rounds'", "'3'")),
    "a section of another kind": (Recipe, {"outer": Stage()}, ("ist.Recipe", "'outer'", "lr, momentum")),
    "a value out of range": (Pool, {"threads": 0}, ("ist.Pool", "'threads'", "0", "greater than 0")),
    "keys that do not go together": (Exchange, {"error_feedback": True}, ("ist.Exchange", "'error_feedback'", "'up'")),
    "what is required": (Component, {}, ("ist.Component", "'name'", "required")),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_in_a_section_names_section_key_and_remedy(what: str) -> None:
    section, values, named = MISTAKES[what]

    with pytest.raises(ConfigError) as caught:
        section(**values)

    assert [name for name in named if name not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_mistake_in_a_section_has_a_line_and_passwords_are_left_out() -> None:
    with pytest.raises(ConfigError) as caught:
        Pool(threads=0, device="ftp://me:opensesame@host/x", kidn="ray")

    assert re.findall(r"ist\.Pool: [^']*'(\w+)'", str(caught.value)) == ["device", "threads", "kidn"]
    assert "opensesame" not in str(caught.value)
    assert caught.value.__cause__ is None, "pydantic's own text quotes the password"


def test_numbers_of_numpy_are_numbers_also_inside() -> None:
    pool = Pool(threads=np.int64(2), timeout_s=np.float32(2.5))
    partition = Partition(capacities=np.array([1.0, 2.0]))
    recipe = Recipe(stages=[{}, {"rounds": np.int64(3), "keep": 1}])

    assert (pool.threads, type(pool.threads), pool.timeout_s) == (2, int, 2.5)
    assert partition.capacities == [1.0, 2.0]
    assert recipe.stages == [Stage(), Stage(rounds=3, keep=1)]


def test_defaults_are_keywords_which_type_checkers_read() -> None:
    """Without it editors, and mypy without pydantic's plugin, take every key of a section for required."""
    calls = [
        (path.name, ast.unparse(node))
        for path in (ROOT / "ist" / "config").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Field"
    ]

    assert len(calls) > 60
    assert [call for call in calls if not re.match(r"Field\((\w+=|\))", call[1])] == []


def test_help_explains_every_key_of_a_section_as_ist_keys_does() -> None:
    shown = " ".join((Recipe.__doc__ or "").split())

    for key, kind, default, meaning in describe_keys(Recipe):
        assert " ".join(f"{key} ({kind}; {default}): {meaning}".split()) in shown
    assert shown.count("Keys:") == 1
