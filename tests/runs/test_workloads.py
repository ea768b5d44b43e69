"""The published results of the workloads are the measured ones, at the learning rates of the configurations."""

import json
import re

import pytest

from benchmarks.workloads import REFERENCE, WORKLOADS, markdown, memory
from ist.config.load import config_for_method, load_config
from ist.monitoring.display import format_bytes, format_metric, format_ratio
from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"
MEASURED = json.loads((RESULTS / "workloads.json").read_text())["workloads"]


def test_all_workloads_were_measured_and_the_page_has_their_table() -> None:
    assert list(MEASURED) == list(WORKLOADS)
    dial = json.loads((RESULTS / "dial.json").read_text())["workloads"]
    assert markdown(MEASURED, dial) in (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_configuration_has_the_best_learning_rates_and_states_their_result(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    config, entry = load_config(path), MEASURED[name]
    result = re.search(r"# Result:(.*?)# Command:", path.read_text(), re.DOTALL)

    rates = {label: config_for_method(config, label).train.optimizer.args["lr"] for label in config.compare.methods}
    words = " ".join(result.group(1).replace("#", " ").split()) if result else ""
    ours, theirs = entry["rows"]["ist"], entry["rows"][REFERENCE]

    assert rates == entry["rates"]
    for row in (ours, theirs):
        assert format_metric(entry["metric"], row["mean"]).replace("%", " %") in words
    assert format_bytes(ours["sent_bytes"]) in words
    assert f"{format_ratio(theirs['sent_bytes'] / ours['sent_bytes'])} times as much" in words


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_short_measurement_of_a_method_retains_its_stages(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")

    for label, run in memory(name, []).items():
        own = config_for_method(config, label).recipe.stages
        assert [stage.keep for stage in run.load().recipe.stages] == [stage.keep for stage in own]
