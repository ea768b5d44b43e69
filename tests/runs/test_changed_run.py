"""A run that is resumed with another configuration: what may change takes effect, what must not is refused by name."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ist
from ist.config.base import describe_keys
from ist.config.load import dump_config, load_config, overridden_keys
from ist.config.schema import Config
from ist.errors import RunFolderError
from ist.report.page import write_report
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.runs.preflight import resumed_folder
from ist.storage.checkpoint import Progress, load_checkpoint, load_newest, read_tensors, save_checkpoint
from ist.storage.run_folder import RunFolder
from ist.storage.same_run import CHANGEABLE, is_in, refused_changes
from ist.training.average import PREFIX as AVERAGE
from tests.conftest import assert_same, data, naming, run_forked_ranks, small_config
from tests.networks import NETWORKS, seeded
from tests.runs.started import started as copy_of_run
from tests.runs.test_resume import PowerCutError, run

KEPT: dict[str, Any] = {"recipe": {"stages": [{"keep": 1}]}, "checkpoint": {"every": 1}}
"""Every worker trains the full network and keeps its optimizer."""


GROUPED = {"name": "Adam", "args": {"lr": 0.01}, "groups": [{"max_dims": 1, "args": {"lr": 0.02}}]}


def started(path: Path, stop_after: int | None = None, **changes: Any) -> RunFolder:
    """A run that has finished, or that was cut off in a round."""
    return copy_of_run(small_config(**changes), path, stop_after)


def changed(folder: RunFolder, *overrides: str) -> RunFolder:
    """What `ist train --resume RUN --set ...` does before it starts the run."""
    config = load_config(folder.config_path, overrides, is_saved=True)
    return resumed_folder(build_job(config), config, folder.path, overridden_keys(overrides))


def resumed(folder: RunFolder, *overrides: str) -> dict[str, Tensor]:
    return run(changed(folder, *overrides), resume=True)


def losses(folder: RunFolder) -> list[tuple[int, float, int]]:
    return [(record["round"], record["loss"], record["sent_bytes"]) for record in folder.records()]


EXTENDED: dict[str, dict[str, Any]] = {
    "SGD": {},
    "carried Adam": {"train__optimizer": {"name": "Adam", "args": {"lr": 0.01}}, "train__optimizer_state": "carried"},
    "outer momentum and an average": {"recipe": {"outer": {"momentum": 0.5}, "average": {"kind": "ema"}}},
    "a schedule that does not depend on the length": {
        "train__schedule": {"name": "StepLR", "args": {"step_size": 4, "gamma": 0.5}},
    },
}


@pytest.mark.parametrize("variant", EXTENDED)
def test_a_finished_run_that_is_extended_equals_a_run_of_that_length(tmp_path: Path, variant: str) -> None:
    changes = EXTENDED[variant]
    short = started(tmp_path / "short", **changes, train__rounds=3)
    long = started(tmp_path / "long", **changes, train__rounds=5)

    found = resumed(short, "train.rounds=5")

    assert_same(found, read_tensors(long.path / "model.safetensors")[0])
    assert losses(short) == losses(long)
    assert short.result()["rounds"] == 5


def test_a_stopped_run_that_is_extended_keeps_the_state_of_its_workers(tmp_path: Path) -> None:
    feedback = {"down": "int8", "up": "int4", "values": "deltas", "error_feedback": True}
    changes = {**KEPT, "exchange": feedback}
    long = started(tmp_path / "long", **changes, train__rounds=5)
    short = started(tmp_path / "short", stop_after=2, **changes, train__rounds=4)

    assert_same(resumed(short, "train.rounds=5"), read_tensors(long.path / "model.safetensors")[0])


def test_a_finished_run_has_no_state_of_its_workers_and_says_so_when_it_is_extended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = started(tmp_path / "short", **{**KEPT, "checkpoint": {"every": 2}}, train__rounds=3)

    resumed(short, "train.rounds=4")

    assert len([text for text in caplog.messages if "no saved state from before round 4" in text]) == 4


def test_an_extended_run_gives_later_rounds_the_stages_and_the_average_of_its_new_length(tmp_path: Path) -> None:
    """The new length is 10: stages end at 8 instead of 4, and the average starts at 5 instead of 2."""
    recipe = {"stages": [{}, {"share": 0.2, "keep": 1}], "average": {"kind": "swa", "start": 0.5}}
    folder = started(tmp_path / "run", train__rounds=5, recipe=recipe)
    assert int(load_newest(folder.storage)[0][f"{AVERAGE}n_averaged"]) == 3  # type: ignore[index]

    resumed(folder, "train.rounds=10")

    tensors, progress = load_newest(folder.storage)  # type: ignore[misc]
    assert progress.rounds_done == 10
    assert int(tensors[f"{AVERAGE}n_averaged"]) == 5
    sent = [sum(record["bytes_to_worker"]) for record in folder.records()]
    assert [number for number, to_workers in enumerate(sent) if to_workers == max(sent)] == [4, 8, 9]


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({**KEPT, "train__optimizer": {"name": "Adam", "args": {"lr": 0.01}}}, []),
        ({"train__optimizer_state": "carried"}, []),
        ({**KEPT, "train__optimizer": GROUPED}, ["train.optimizer.groups.0.args.lr=0.0"]),
        # A schedule leaves its last settings in the saved optimizers.
        ({**KEPT, "train__schedule": {"name": "StepLR", "args": {"step_size": 2}}}, ["train.schedule=null"]),
    ],
)
def test_a_changed_rate_takes_effect_although_optimizers_keep_their_state(
    tmp_path: Path, changes: dict[str, Any], overrides: list[str]
) -> None:
    folder = started(tmp_path / "run", stop_after=3, **{"checkpoint": {"every": 1}, **changes}, train__rounds=5)
    before, progress = load_newest(folder.storage)  # type: ignore[misc]
    assert progress.rounds_done == 3

    found = resumed(folder, *overrides, "train.optimizer.args.lr=0.0")

    assert_same(found, {name: tensor for name, tensor in before.items() if name in found})


def test_two_runs_with_the_same_change_are_the_same_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {**KEPT, "train__rounds": 5}
    folder = started(tmp_path / "one", stop_after=2, **changes)
    shutil.copytree(folder.path, tmp_path / "two")
    overrides = ["train.workers=2", "train.optimizer.args.lr=0.05"]

    first, second = (resumed(RunFolder(tmp_path / name), *overrides) for name in ("one", "two"))

    assert_same(first, second)
    assert [record["workers"] for record in folder.records()] == [4, 4, 2, 2, 2]
    assert folder.result()["workers"] == 2
    # State of other numbers of workers belongs to other data.
    assert len([text for text in caplog.messages if "no saved state from before round 3" in text]) == 2 * 2


def test_residuals_are_dropped_with_a_warning_if_the_number_of_workers_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exchange = {"down": "int8", "up": "int3", "values": "deltas", "error_feedback": True}
    folder = started(tmp_path / "run", stop_after=2, exchange=exchange, checkpoint={"every": 1})

    found = resumed(folder, "train.workers=5")

    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    assert len([text for text in caplog.messages if "no saved state from before round 3" in text]) == 5


def test_shares_that_follow_speed_start_equal_for_the_new_number_of_workers(tmp_path: Path) -> None:
    folder = started(tmp_path / "run", stop_after=2, partition={"balance": "speed"}, checkpoint={"every": 1})

    resumed(folder, "train.workers=3", "train.rounds=5")

    assert [record["workers"] for record in folder.records()] == [4, 4, 3, 3, 3]


def test_a_change_is_recorded_with_its_first_round_and_shown_in_the_report(tmp_path: Path) -> None:
    folder = started(tmp_path / "run", train__rounds=2)
    before = dump_config(folder.load_config())

    resumed(folder, "train.rounds=3")
    resumed(folder, "train.rounds=4", "train.workers=2")

    first, second = folder.config_changes()
    assert (first.round, [(c.key, c.old, c.new) for c in first.changes]) == (2, [("train.rounds", "2", "3")])
    assert first.config == before
    assert (second.round, {c.key for c in second.changes}) == (3, {"train.rounds", "train.workers"})
    assert folder.load_config() == small_config(train__rounds=4, train__workers=2)
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "from round 3 on: train.rounds is 3, before 2" in page
    assert "from round 4 on: train.workers is 2, before 4; train.rounds is 4, before 3" in page


def test_a_change_whose_rounds_are_lost_is_recorded_once(tmp_path: Path) -> None:
    folder = changed(started(tmp_path / "run", stop_after=2, checkpoint={"every": 2}), "train.rounds=6")
    with pytest.raises(PowerCutError):  # before the next checkpoint
        run(folder, resume=True, stop_after=3)

    resumed(folder, "train.rounds=5")

    (change,) = folder.config_changes()
    assert (change.round, [(c.key, c.old, c.new) for c in change.changes]) == (2, [("train.rounds", "4", "5")])


def test_resuming_without_a_change_records_none(tmp_path: Path) -> None:
    folder = started(tmp_path / "run", stop_after=2, checkpoint={"every": 1})
    text = folder.config_path.read_text()

    resumed(folder, "train.rounds=4")

    assert folder.config_changes() == []
    assert folder.config_path.read_text() == text
    assert not (folder.path / "changes.jsonl").exists()


REFUSED: dict[str, tuple[dict[str, Any], Sequence[str], Sequence[str]]] = {
    "the network": ({}, ["model.args.widths=[64, 24, 28, 10]"], ["'model.args.widths'", "weights of this network"]),
    "the seed": ({}, ["seed=4"], ["'seed' is 3", "4", "random numbers"]),
    "the data": ({}, ["data.shuffle=global"], ["'data.shuffle' is 'local'", "'global'", "trained on these data"]),
    "the steps of a round": ({}, ["train.local_steps=5"], ["'train.local_steps' is 3", "5", "recipe.stages"]),
    "the batch": ({}, ["train.batch_size=8"], ["'train.batch_size' is 16", "8"]),
    "the loss": ({}, ["train.loss=multi_margin_loss"], ["'train.loss'", "it decides what is trained"]),
    "the optimizer": ({}, ["train.optimizer={name: Adagrad}"], ["'train.optimizer.name' is 'SGD'", "state"]),
    "the parameter groups": (
        {"train__optimizer": GROUPED}, ["train.optimizer.groups.0.max_dims=2"], ["'train.optimizer.groups.0.max_dims'"],
    ),
    "the strategy": ({}, ["partition.strategy=rolling"], ["'partition.strategy' is 'disjoint'", "subnets"]),
    "two keys": ({}, ["seed=4", "name=other"], ["'seed' is 3", "'name' is 'small'"]),
    "an outer optimizer": ({}, ["recipe.outer.momentum=0.5"], ["'recipe.outer.momentum' is 0.0", "0.5", "momentum"]),
    "no outer optimizer": (
        {"recipe": {"outer": {"momentum": 0.5}}}, ["recipe.outer.momentum=0"], ["'recipe.outer.momentum' is 0.5"],
    ),
    "an average": ({}, ["recipe.average.kind=ema"], ["'recipe.average.kind' is 'none'", "'ema'"]),
    "workers of an epoch": (
        {"train__rounds": None, "train__epochs": 1}, ["train.workers=2"],
        ["'train.workers' is 4", "2", "'train.epochs' is 1", "train.rounds"],
    ),
    "state of another kind": (
        {"train__optimizer": {"name": "Adam", "args": {"lr": 0.01}}}, ["train.optimizer.args.amsgrad=true"],
        ["'train.optimizer.args'", "'max_exp_avg_sq'", "Adam"],
    ),
    "fewer rounds": ({}, ["train.rounds=1"], ["2 rounds", "only 1", "train.rounds"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_change_is_refused_by_name_before_anything_is_written(tmp_path: Path, case: str) -> None:
    changes, overrides, parts = REFUSED[case]
    folder = started(tmp_path / "run", stop_after=2, **{"checkpoint": {"every": 1}, **changes})
    text = folder.config_path.read_text()

    with pytest.raises(RunFolderError, match=naming(f"{tmp_path / 'run'}: ", *parts)):
        changed(folder, *overrides)

    assert folder.config_path.read_text() == text


def test_a_change_after_the_last_round_is_refused_unless_rounds_are_added(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")

    with pytest.raises(RunFolderError, match=naming(f"{folder.path}: ", "all its 4 rounds", "--set train.rounds=")):
        changed(folder, "train.optimizer.args.lr=0.2")

    assert folder.is_finished()


def test_methods_and_strategies_that_need_a_fixed_number_of_workers_keep_it() -> None:
    blocks = {"partition": {"strategy": "blocks", "blocks": ["a.*"]}}
    for changes, part in (({"method": "powersgd", "pool": {"kind": "torchrun"}}, "powersgd"), (blocks, "blocks")):
        old, new = small_config(**changes), small_config(**changes, train__workers=2)

        (text,) = refused_changes(old, new)

        assert re.search(naming("'train.workers' is 4", "2", part), text)


def test_every_changeable_key_exists() -> None:
    keys = [key for key, *_ in describe_keys(Config)]

    assert [name for name in CHANGEABLE if not any(is_in(key, [name]) or is_in(name, [key]) for key in keys)] == []


def test_a_run_in_epochs_says_if_its_rounds_continue_at_another_step(tmp_path: Path) -> None:
    length = {"train__rounds": None, "train__epochs": 1, "train__workers": 4, "train__local_steps": 4}
    folder = started(tmp_path / "run", **length)  # 23 steps: the last round has three
    steps = [record["steps"] for record in folder.records()]
    assert steps[-1] != 4

    with pytest.warns(UserWarning, match=naming(f"{folder.path}: ", f"round {len(steps) + 1}")):
        resumed(folder, "train.epochs=2")


def test_a_checkpoint_of_an_earlier_version_is_not_changed(tmp_path: Path) -> None:
    folder = started(tmp_path / "run", stop_after=2, checkpoint={"every": 1})
    tensors, progress = load_checkpoint(folder.storage, "round-00000002.safetensors")
    save_checkpoint(folder.storage, tensors, Progress(2, progress.totals, progress.numbers, progress.start), keep=1)

    with pytest.raises(RunFolderError, match=naming(f"{folder.path}: ", "earlier version", "without changes first")):
        changed(folder, "train.rounds=6")

    run(folder, resume=True)  # and without changes it is resumed
    assert folder.result()["rounds"] == 4


def test_the_same_keys_may_change_in_python(tmp_path: Path) -> None:
    def trained(**changes: Any) -> list[dict[str, Any]]:
        settings = {"workers": 2, "rounds": 2, "optimizer": ist.Optimizer(name="SGD", args={"lr": 0.1}), **changes}
        model = seeded(NETWORKS["no batch norm"])
        return ist.train(model, data(), local_steps=2, progress=False, run_dir=tmp_path / "run", **settings).history

    trained()
    slower = ist.Optimizer(name="SGD", args={"lr": 0.05})
    history = trained(rounds=4, workers=3, optimizer=slower, resume=True)

    assert [record["workers"] for record in history] == [2, 2, 3, 3]
    (change,) = RunFolder(tmp_path / "run").config_changes()
    assert {c.key for c in change.changes} == {"train.workers", "train.rounds", "train.optimizer.args.lr"}
    with pytest.raises(RunFolderError, match=naming("'train.batch_size' is 32", "8")):
        trained(rounds=4, workers=3, optimizer=slower, batch_size=8, resume=True)


@pytest.mark.system
def test_ranks_continue_a_run_of_another_number_of_ranks(tmp_path: Path) -> None:
    run_forked_ranks(*((ranks, "tests/runs/resized.py", tmp_path, to) for ranks, to in ((3, 2), (2, 4), (3, 6))))

    for method in ("ist", "local_sgd", "ddp"):
        folder = RunFolder(tmp_path / method)
        assert [record["workers"] for record in folder.records()] == [3, 3, 2, 2, 3, 3]
        assert [change.round for change in folder.config_changes()] == [2, 4]
    logged = [(tmp_path / f"local_sgd to {rounds}.txt").read_text() for rounds in (2, 4, 6)]
    assert logged[0] == ""
    assert re.search(naming("3 ranks", "2 now", "dropped"), logged[1])
    assert re.search(naming("2 ranks", "3 now", "fresh"), logged[2])


def test_a_job_of_a_changed_run_that_was_killed_while_it_changed_is_resumed(tmp_path: Path) -> None:
    """The configuration is written at once; whatever is missing then is added when the run is resumed."""
    folder = started(tmp_path / "run")
    changed(folder, "train.rounds=5")  # and the process dies here

    execute(build_job(folder.load_config()), RunFolder(folder.path), resume=True, progress=False)

    assert folder.result()["rounds"] == 5
    assert [change.round for change in folder.config_changes()] == [4]
