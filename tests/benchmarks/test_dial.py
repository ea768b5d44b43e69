"""The dial and its control: the small network that fits into a worker's share."""

import json
import shlex
from pathlib import Path

import pytest

from benchmarks import common, dial, fitting, session
from ist.config.load import load_config
from ist.runs.build import build_job
from tests.conftest import ROOT, small_config


@pytest.mark.parametrize("name", ["crime_mlp", "kjv_decoder", "wordnet_hypernyms", "fashion_mnist_loft"])
@pytest.mark.parametrize("part", [0.4])
def test_the_small_network_is_the_widest_one_that_fits(name: str, part: float) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    family = fitting.FAMILIES[config.model.name]
    budget = fitting.state_bytes(config, part * fitting.num_parameters(config))

    small = fitting.fitting(config, budget)
    wider = family.resized(config.model.args, family.size(small) + family.step(config.model.args))

    needed = [
        fitting.state_bytes(config, fitting.num_parameters(fitting.with_arguments(config, arguments)))
        for arguments in (small, wider)
    ]
    assert needed[0] <= budget < needed[1]


def test_no_network_fits_into_a_tiny_budget() -> None:
    with pytest.raises(ValueError, match=r"mlp.*100 bytes"):
        fitting.fitting(small_config(), 100)


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_parameter"),
    [
        ({"name": "SGD", "args": {"lr": 0.1}}, 8),
        ({"name": "SGD", "args": {"lr": 0.1, "momentum": 0.9}}, 12),
        ({"name": "AdamW", "args": {"lr": 0.1}}, 16),
    ],
    ids=str,
)
def test_the_state_of_a_worker_is_weights_gradients_and_optimizer_state(
    optimizer: dict[str, object], bytes_per_parameter: int
) -> None:
    assert fitting.state_bytes(small_config(train__optimizer=optimizer), 1000) == 1000 * bytes_per_parameter


def test_the_arithmetic_of_a_run_is_that_of_its_matrix_products() -> None:
    def step(first: int, second: int) -> int:  # forward, and backward for weights and inputs, but not those of the data
        return 2 * 16 * (2 * 64 * first + 3 * first * second + 3 * second * 10)

    narrow, full = step(6, 5), step(24, 20)
    stages = {"recipe": {"stages": [{}, {"rounds": 1, "keep": 1}]}}

    assert fitting.run_flops(build_job(small_config())) == 12 * narrow
    assert fitting.run_flops(build_job(small_config(**stages))) == 9 * narrow + 3 * full
    assert fitting.run_flops(build_job(small_config(method="ddp", pool={"kind": "torchrun"}))) == 12 * full


def test_every_point_of_the_dial_is_a_valid_run_and_no_trial_holds_more_than_half_of_a_group() -> None:
    points = dial.dial()

    configs = [dial.configuration("quickstart", point, []) for point in (*points, *dial.TRIALS)]

    assert [(p.keep, p.share) for p in points] == [
        (0.0, 0.0), *((keep, share) for keep in (0.5, 0.75, 1.0) for share in (0.25, 0.5, 0.75, 1.0))
    ]  # fmt: skip
    held = [max((stage.keep or 0.25 for stage in config.recipe.stages), default=0.25) for config in configs]
    assert held[: len(points)] == [0.25, *(keep for keep in (0.5, 0.75, 1.0) for _ in range(4))]
    assert max(held[len(points) :]) == 0.5


def test_the_command_of_the_small_network_trains_one_that_every_worker_holds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = ROOT / "configs" / "quickstart.yaml"

    fitting.main([str(path), "--set", "train.workers=2"])

    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["ist", "train", str(path)]
    config = load_config(path, words[4::2])
    assert config.model.args["widths"] == [64, 256, 256, 10]  # half of 512 neurons of each layer
    assert [stage.keep for stage in config.recipe.stages] == [1]
    assert config.train.workers == 2


def test_data_parallel_training_has_the_length_and_the_rate_of_the_configuration_or_of_the_dial() -> None:
    point = dial.Point("small", "ddp")

    as_configured = dial.run_of("wordnet_gcn", point, [], 1.0, 0, tune=False).load()
    as_long = dial.run_of("speech_mlp", point, [], 1.0, 0, tune=False)

    assert (as_configured.train.epochs, as_configured.train.optimizer.args["lr"]) == (24, 0.01)
    assert as_long.overrides[0] == "train.epochs=24"
    assert "train.optimizer.args.lr=0.1" in as_long.overrides


def test_workers_that_hold_residual_blocks_hold_their_own_ones_or_all() -> None:
    points = dial.points_of("fashion_mnist_resist")

    assert {point.keep for point in points} == {0, 1}
    assert dial.trials("fashion_mnist_resist") == []


def test_a_workload_meets_its_goal_if_a_point_with_at_most_halves_is_close_to_data_parallel_training() -> None:
    def measured(keep: float | None, mean: float) -> dict[str, object]:
        return {"keep": keep, "mean": mean, "values": [mean]}

    points = {dial.TUNED: measured(None, 0.8), dial.NARROW: measured(0, 0.7), "keep 1 for 1": measured(1, 0.9)}
    missed = {"cora_gcn": {"metric": "accuracy", "points": points}}
    met = {"cora_gcn": {"metric": "accuracy", "points": {**points, "trial: short": measured(None, 0.796)}}}

    assert dial.overview(missed).endswith("| own shares throughout: +10.00 points (1) | missed |")
    assert dial.overview(met).endswith("| short: +0.40 points (1) | met |")


def test_the_pages_have_the_tables_of_the_measured_points() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "dial.json").read_text())["workloads"]

    assert dial.markdown(measured) in (ROOT / "benchmarks" / "README.md").read_text()
    assert dial.overview(measured) in (ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.system
def test_a_small_network_costs_its_workers_what_a_share_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dial, common, session):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    asked = ["--quick", "--parts", "dial,controls", "--points", "own shares;memory of 1/4, local SGD"]

    dial.main(asked)
    made = (tmp_path / "dial_quick_runs.jsonl").read_text()
    dial.main(asked)

    assert (tmp_path / "dial_quick_runs.jsonl").read_text() == made  # finished runs are not repeated
    rows = json.loads((tmp_path / "dial_quick.json").read_text())["workloads"]["quickstart"]["points"]
    share, small = rows[dial.NARROW], rows["small network in the memory of 1/4, local SGD"]
    for cost in ("sent_bytes", "state_bytes", "flops"):  # the width is a whole number, so not all of the share is used
        assert 0.97 * share[cost] <= small[cost] <= share[cost], cost
    assert share["held"]["steps"] == 1
    assert share["held"]["fraction"] < 0.25
    assert "<svg" in (tmp_path / "dial_quick_quickstart.svg").read_text()
