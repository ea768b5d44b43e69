"""Identity 7: a resumed run is the same run; also checkpoints of worker state."""

import functools
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ist
from ist.config.load import dump_config
from ist.config.runtime import Checkpoint
from ist.errors import CheckpointError, RunFolderError
from ist.optimization.optimizers import named_state
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.runs.open import CoordinatorPart
from ist.storage.backend import LocalStorage
from ist.storage.checkpoint import load_checkpoint, read_tensors, save_checkpoint, save_worker_state
from ist.storage.run_folder import RunFolder, create_run_folder
from ist.subnet.job import Job, assignments, slot_of, with_workers
from ist.training.worker_state import CheckpointLocation, WorkerState
from tests.conftest import assert_same, data, job_for, naming, small_config
from tests.networks import NETWORKS, seeded


class PowerCutError(Exception):
    pass


def run(
    folder: RunFolder, resume: bool, stop_after: int | None = None, copies: Path | None = None
) -> dict[str, torch.Tensor]:
    """Run the configuration of a folder; raise after the training of a round, or copy the folder in every round."""

    def opened(part: CoordinatorPart) -> None:
        note = part.recorder.round_done

        def trained(round_number: int, *rest: Any) -> None:
            if round_number == stop_after:
                raise PowerCutError
            if copies:
                shutil.copytree(folder.path, copies / f"stopped in round {round_number}")
            note(round_number, *rest)

        part.recorder.round_done = trained  # type: ignore[method-assign]

    execute(build_job(folder.load_config()), folder, resume, progress=False, opened=opened)
    return read_tensors(folder.path / "model.safetensors")[0]


VARIANTS: dict[str, dict[str, Any]] = {
    "reset": {},
    "carried Adam": {
        "train__optimizer": {"name": "Adam", "args": {"lr": 0.01}},
        "train__optimizer_state": "carried",
        "train__schedule": {"name": "CosineAnnealingLR", "args": {"T_max": "total_steps"}},
    },
    "dropout": {"model__args": {"widths": [64, 24, 20, 10], "dropout": 0.3}},
    "random items": {"data": {"name": "tests.augmented:load"}},
    "kept, the rest absent and then frozen": {
        "partition__strategy": "nested", "partition__keep": 0.5, "recipe__stages": [{"rounds": 2}, {"rest": "frozen"}],
    },
    "carried statistics": {"train__running_statistics": "carried"},
    "error feedback": {
        "exchange": {"down": "int8", "up": "int3", "values": "deltas", "error_feedback": True},
    },
    "stages": {
        "train__activation_scale": "folded",
        "recipe": {
            "stages": [{"rounds": 1, "keep": 1}, {}, {"rounds": 2, "keep": 1, "lr_scale": 0.5, "local_steps": 2}]
        },
    },
    "kept state": {
        "train__optimizer": {"name": "Adam", "args": {"lr": 0.01}},
        "train__optimizer_state": "kept",
        "recipe": {"stages": [{}, {"rounds": 4, "keep": 1}]},
        "checkpoint": {"every": 1},
    },
    "kept state, saved every second round": {
        "train__optimizer_state": "kept",
        "recipe": {"stages": [{"keep": 1}]},
        "checkpoint": {"every": 2, "keep": 1},
    },
    "kept state and error feedback": {
        "train__optimizer_state": "kept",
        "exchange": {"down": "int8", "up": "int4", "values": "deltas", "error_feedback": True},
        "recipe": {"stages": [{}, {"rounds": 3, "keep": 1}]},
        "checkpoint": {"every": 1},
    },
    "a global shuffle": {"data__shuffle": "global"},
    "outer momentum": {"recipe": {"outer": {"lr": 0.9, "momentum": 0.5}}, "train__optimizer_state": "carried"},
    "outer momentum in a full-width phase": {"recipe": {"stages": [{}, {"rounds": 3, "keep": 1, "outer": {"lr": 0.7, "momentum": 0.9}}]}},
    "exponential average": {"recipe": {"average": {"kind": "ema", "decay": 0.6}}},
    "average of the last rounds": {"recipe": {"average": {"kind": "swa", "start": 0.4}}},
    "a chosen scale of updates": {"recipe": {"merge_scale": {"own": "auto"}, "outer": {"lr": 0.9, "momentum": 0.5}}},
    "all of a recipe": {
        "partition": {"coverage": "balanced", "keep": 0.5},
        "recipe": {
            "stages": [{}, {"rounds": 2, "keep": 1}], "outer": {"momentum": 0.5}, "average": {"kind": "ema"},
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """Return a function that runs a variant once, and copies the run folder as a power cut in each round leaves it."""

    @functools.cache
    def made(variant: str) -> RunFolder:
        folder = tmp_path_factory.mktemp("variant")
        whole = create_run_folder(small_config(**VARIANTS[variant], train__rounds=5), folder / "whole")
        run(whole, resume=False, copies=folder)
        return whole

    return made


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_anywhere_and_resumed_ends_in_the_same_weights(
    whole_run: Callable[[str], RunFolder], variant: str, stop_after: int
) -> None:
    whole = whole_run(variant)
    broken = RunFolder(whole.path.with_name(f"stopped in round {stop_after}"))
    assert len(broken.records()) == stop_after

    found = run(broken, resume=True)

    assert_same(found, read_tensors(whole.path / "model.safetensors")[0])
    stable = ("round", "loss", "accuracy", "samples", "sent_bytes")
    records = [[{key: record[key] for key in stable} for record in f.records()] for f in (whole, broken)]
    assert records[0] == records[1]
    assert broken.result()["rounds"] == 5


KEPT: dict[str, Any] = {"train__optimizer_state": "kept", "recipe": {"stages": [{"keep": 1}]}}


def test_worker_state_is_stored_beside_the_checkpoints_until_the_run_is_done(tmp_path: Path) -> None:
    folder = create_run_folder(
        small_config(**KEPT, train__rounds=6, checkpoint={"every": 1, "keep": 2}), tmp_path / "run"
    )
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=4)

    names = {path.name for path in (folder.path / "checkpoints").glob("worker-*")}
    # Files for the checkpoint that the power cut prevented, and for both existing checkpoints.
    assert names == {f"worker-{w:04d}.round-{done:08d}.safetensors" for w in range(4) for done in (3, 4, 5)}

    _, progress = folder.rewind()
    # Files of workers that are absent in the next round go too: such a worker must not load them later.
    names = {path.name for path in (folder.path / "checkpoints").glob("worker-*")}
    assert progress.rounds_done == 4
    assert names == {f"worker-{w:04d}.round-{done:08d}.safetensors" for w in range(4) for done in (3, 4)}

    run(folder, resume=True)
    assert not list((folder.path / "checkpoints").glob("worker-*"))
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == [
        f"round-{done:08d}.safetensors" for done in (5, 6)
    ]


def test_a_worker_without_its_saved_state_warns_and_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small_config(**KEPT, train__rounds=5, checkpoint={"every": 1})
    whole, broken = (create_run_folder(config, tmp_path / name) for name in ("whole", "broken"))
    expected = run(whole, resume=False)
    with pytest.raises(PowerCutError):
        run(broken, resume=False, stop_after=3)
    (broken.path / "checkpoints" / "worker-0002.round-00000003.safetensors").unlink()

    found = run(broken, resume=True)

    (message,) = (text for text in caplog.messages if "no saved state" in text)
    assert re.search(naming("worker 2", "before round 4", str(broken.path), "fresh state"), message)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def test_worker_state_is_restored_after_a_change_of_checkpoint_every(tmp_path: Path) -> None:
    config = small_config(**KEPT, train__rounds=5, checkpoint={"every": 2})
    whole, broken = (create_run_folder(config, tmp_path / name) for name in ("whole", "broken"))
    expected = run(whole, resume=False)
    with pytest.raises(PowerCutError):
        run(broken, resume=False, stop_after=3)
    broken.config_path.write_text(dump_config(small_config(**KEPT, train__rounds=5, checkpoint={"every": 3})))

    assert_same(run(broken, resume=True), expected)


def kept_job(**changes: Any) -> tuple[Job, Mapping[str, nn.Parameter]]:
    """A job whose workers hold the full network, and the network's parameters."""
    model = seeded(NETWORKS["no batch norm"])
    job = job_for(model, **{**KEPT, "train__rounds": 5, **changes})
    return job, dict(model.named_parameters())


def stepped(job: Job, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer after one step."""
    optimizer = job.task.make_optimizer(named)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_a_worker_restores_only_state_of_the_same_neurons_and_number_of_workers(tmp_path: Path) -> None:
    job, named = kept_job()
    location = CheckpointLocation(str(tmp_path), Checkpoint(), run_id="a")
    optimizer = stepped(job, named)
    WorkerState(job, slot_of(job, 0), assignments(job), location).store(optimizer, named, {}, 0)

    def taken_by(
        other: Job, worker: int = 0, round_number: int = 1, location: CheckpointLocation = location
    ) -> dict[str, Tensor]:
        state = WorkerState(other, slot_of(other, worker), assignments(other), location)
        state.restore(round_number)
        return named_state(state.optimizer(named, round_number), named)

    assert_same(taken_by(job), named_state(optimizer, named))
    # State is restored only from the incarnation whose checkpoint the run resumes.
    assert_same(
        taken_by(job, location=replace(location, run_id="b", first_round=1, previous_run_id="a")),
        named_state(optimizer, named),
    )
    assert taken_by(job, location=replace(location, run_id="b", first_round=1, previous_run_id="c")) == {}
    assert taken_by(job, location=replace(location, run_id="b")) == {}
    assert taken_by(job, worker=1) == {}
    assert taken_by(job, round_number=2) == {}
    assert taken_by(with_workers(job, 3)) == {}
    assert taken_by(kept_job(recipe={})[0]) == {}  # with a new partition every round, no round uses earlier state


def test_an_unreachable_checkpoint_location_is_a_warning_that_costs_only_the_worker_state(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job, named = kept_job()
    state = WorkerState(
        job,
        slot_of(job, 0),
        assignments(job),
        CheckpointLocation("/nowhere", Checkpoint(storage="nosuch://bucket")),
    )

    assert state.restore(1) == {}
    state.store(stepped(job, named), named, {}, 1)

    assert re.search(naming("worker 0", "before round 2", "nosuch://bucket", "fresh state"), caplog.text)
    assert "worker 0 cannot save its state" in caplog.text


def test_a_location_is_sent_without_the_password_in_its_url() -> None:
    location = CheckpointLocation("/runs/first", Checkpoint(storage="s3://me:secret@bucket/runs"), "b", 7, "a")

    assert "secret" not in location.to_text()
    assert CheckpointLocation.from_text(location.to_text(), location.checkpoint) == location
    folder = CheckpointLocation("/runs/first", Checkpoint(storage="/checkpoints", every=3))
    assert CheckpointLocation.from_text(folder.to_text(), Checkpoint()) == folder


def test_saving_worker_state_deletes_only_files_of_older_and_abandoned_rounds(tmp_path: Path) -> None:
    storage, tensors = LocalStorage(tmp_path), {"weight": torch.ones(2)}
    for rounds_done in (1, 2, 3, 97, 98, 99):
        (tmp_path / f"worker-0000.round-{rounds_done:08d}.safetensors").touch()
    (tmp_path / "worker-0001.round-00000001.safetensors").touch()

    save_worker_state(storage, 0, 4, tensors, "all", keep=2)

    left = {"worker-0001.round-00000001"} | {f"worker-0000.round-0000000{n}" for n in (2, 3, 4)}
    assert {path.stem for path in tmp_path.iterdir()} == left


def test_saving_worker_state_does_not_count_as_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ist.training.worker_state.save_worker_state", lambda *_: time.sleep(0.2))
    folder = create_run_folder(small_config(**KEPT, train__rounds=2, checkpoint={"every": 1}), tmp_path / "run")

    run(folder, resume=False)

    first, _ = folder.records()
    assert first["exchange_s"] < 0.2
    assert first["train_s"] < 0.8  # four workers, one after the other


def test_a_worker_that_cannot_save_its_state_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RunFolderError("no room")

    monkeypatch.setattr("ist.training.worker_state.save_worker_state", refuse)
    folder = create_run_folder(small_config(**KEPT, checkpoint={"every": 1}), tmp_path / "run")

    run(folder, resume=False)

    assert len([text for text in caplog.messages if "worker 1" in text and "no room" in text]) == 1


def test_half_a_line_that_a_crash_left_does_not_hurt(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=3)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "los')

    run(folder, resume=True)

    assert [record["round"] for record in folder.records()] == [0, 1, 2, 3]


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=3)
    newest = next((folder.path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-4])

    with pytest.raises(CheckpointError, match="round-00000002.safetensors"):
        run(folder, resume=True)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    with pytest.raises(PowerCutError):
        run(folder, resume=False, stop_after=3)
    other = small_config(model__args={"widths": [64, 28, 20, 10]})
    tensors, progress = load_checkpoint(folder.storage, "round-00000002.safetensors")
    save_checkpoint(folder.storage, tensors, replace(progress, config=""), keep=1)  # as an earlier version saved it
    folder.config_path.write_text(dump_config(other))

    with pytest.raises(CheckpointError, match=naming("checkpoint", "'linear_")):
        run(folder, resume=True)


def test_the_result_loads_into_the_plain_network(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from ist.models.mlp import MLP

    folder = create_run_folder(small_config(), tmp_path / "run")
    run(folder, resume=False)
    model = MLP([64, 24, 20, 10])

    model.load_state_dict(load_file(folder.path / "model.safetensors"))

    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())


def test_resuming_with_other_arguments_is_refused_with_the_differing_keys(tmp_path: Path) -> None:
    def trained(**changes: Any) -> int:
        settings = {"optimizer_args": {"lr": 0.1, "betas": (0.8, 0.9)}, "resume": True, **changes}
        model = seeded(NETWORKS["no batch norm"])
        found = ist.train(
            model, data(), workers=2, local_steps=2, rounds=2, optimizer="Adam", run_dir=tmp_path / "run",
            progress=False, **settings,
        )  # fmt: skip
        return len(found.history)

    assert trained(resume=False) == 2
    assert trained() == 2  # it is done, and the same run, tuples and all
    with pytest.raises(RunFolderError, match=naming("run: ", "'seed' is 0", "5")):
        trained(seed=5)
    with pytest.raises(RunFolderError, match=naming("'recipe.outer.momentum' is 0.0", "0.5")):
        trained(recipe={"outer": {"momentum": 0.5}})
