"""Muon on matrices with AdamW on the rest: as two optimizers of torch in a plain loop, and the same in every worker."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import ist
from ist.checks.optimizer_trial import try_steps
from ist.errors import ConfigError
from ist.optimization.factory import optimizer_factory
from ist.optimization.muon import ADAMW_FOR, muon_with_adamw, uses_muon
from ist.optimization.optimizers import named_state, restore_named_state, without_changed_settings
from ist.runs.recorder import RunRecorder
from tests.conftest import assert_same, clone, data, job_for, naming, plain_loop
from tests.networks import NETWORKS, seeded
from tests.runs.test_resume import PowerCutError
from tests.training.test_one_worker import run

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")

ARGS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.05, "momentum": 0.9, "adamw": {"lr": 0.01, "betas": (0.8, 0.95)}}
SPEC = {"name": "MuonWithAdamW", "args": ARGS}


def network() -> nn.Module:
    """Its matrices are `linear_1`, `linear_2` and `output`; by its name, `output` uses AdamW."""
    return seeded(NETWORKS["two hidden layers, batch norm"])


class Both:
    """Two optimizers, as a plain loop uses them."""

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        matrices = [named.pop(name) for name in ("linear_1.weight", "linear_2.weight")]
        muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        self.both = [muon, torch.optim.AdamW(named.values(), lr=0.01, weight_decay=0.05, betas=(0.8, 0.95))]

    def zero_grad(self) -> None:
        for optimizer in self.both:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.both:
            optimizer.step()


class Falling:
    """A scheduler for each of two optimizers."""

    def __init__(self, optimizers: Both) -> None:
        self.both = [lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in optimizers.both]

    def step(self) -> None:
        for scheduler in self.both:
            scheduler.step()


@pytest.mark.parametrize("state", ["carried", "kept"])
@pytest.mark.parametrize("is_scheduled", [True, False])
def test_one_worker_is_a_plain_loop_with_two_optimizers(is_scheduled: bool, state: str) -> None:
    ours, plain = network(), network()
    job = job_for(
        ours,
        train__workers=1,
        train__rounds=3,
        train__optimizer=SPEC,
        train__optimizer_state=state,
        train__running_statistics="carried",
        train__schedule={"name": "ExponentialLR", "args": {"gamma": 0.8}} if is_scheduled else None,
    )

    run(job)
    both: Any = Both(plain)
    plain_loop(plain, job, both, Falling(both) if is_scheduled else None)

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))


def train(**options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "rounds": 2, "local_steps": 2, "progress": False, "optimizer": SPEC}
    return ist.train(network(), data(), **{**settings, **options}).model


def test_state_that_is_carried_is_that_of_each_part() -> None:
    job = job_for(network(), train__optimizer=SPEC, train__optimizer_state="carried")

    keys = {
        name: {full.split("@")[0] for full in job.split.state_specs if full.endswith(f"@{name}")}
        for name in job.split.state_slots
    }

    for name, parameter in network().named_parameters():
        is_muon = name in ("linear_1.weight", "linear_2.weight")
        assert keys[name] == ({"momentum_buffer"} if is_muon else {"step", "exp_avg", "exp_avg_sq"}), parameter


def test_nothing_is_kept_outside_the_state_and_the_groups() -> None:
    job = job_for(network(), train__optimizer={**SPEC, "groups": [{"max_dims": 1, "args": {"weight_decay": 0.0}}]})
    named = dict(network().named_parameters())
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)

    found = try_steps(job, named)

    assert (dict(found.outside), found.period) == ({}, 1)


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"workers": 1, "rounds": 4, "checkpoint": {"every": 1}}
    uninterrupted = train(**options)
    save = RunRecorder.save

    def stop_after_two(self: Any, rounds_done: int, state: Any) -> None:
        save(self, rounds_done, state)
        if rounds_done == 2:
            raise PowerCutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecorder, "save", stop_after_two)
        with pytest.raises(PowerCutError):
            train(**options, run_dir=tmp_path / "run")
    resumed = train(**options, run_dir=tmp_path / "run", resume=True)

    assert_same(clone(resumed.state_dict()), clone(uninterrupted.state_dict()))


@pytest.mark.parametrize(
    ("spec", "changed", "key", "expected"),
    [
        (SPEC, {"args": {**ARGS, "adamw": {"lr": 0.5}}}, "train.optimizer.args.adamw.lr", {0.02, 0.5}),
        ({**SPEC, "groups": [{"match": ["*.bias"], "args": {"lr": 0.3}}]},
         {"groups": [{"match": ["*.bias"], "args": {"lr": 0.5}}]}, "train.optimizer.groups.0.args.lr", {0.02, 0.01, 0.5}),
        ({"name": "tests.optimizers:no_decay_on_biases", "args": {"lr": 0.2}},
         {"args": {"lr": 0.4}}, "train.optimizer.args.lr", {0.4, 0.2}),
    ],
    ids=["of AdamW", "of a group", "of a function"],
)  # fmt: skip
def test_a_rate_that_is_changed_for_a_resumed_run_is_not_restored(
    spec: dict[str, Any], changed: dict[str, Any], key: str, expected: set[float]
) -> None:
    named = dict(network().named_parameters())
    before, after = ist.Optimizer(**spec), ist.Optimizer(**{**spec, **changed})
    state = named_state(optimizer_factory(before)(named), named)

    made = optimizer_factory(after)(named)
    restore_named_state(made, named, without_changed_settings(state, [key], after))

    assert {group["lr"] for group in made.param_groups} == expected
    restore_named_state(made, named, without_changed_settings(state, [], after))
    assert {group["lr"] for group in made.param_groups} != expected


def test_groups_reach_both_parts() -> None:
    groups = [{"max_dims": 1, "args": {"weight_decay": 0.0}}, {"match": ["linear_2.*"], "args": {"lr": 0.5}}]
    job = job_for(network(), train__optimizer={**SPEC, "groups": groups})
    named = dict(network().named_parameters())

    made = job.task.make_optimizer(named)

    names = {id(parameter): name for name, parameter in named.items()}
    found = [
        ([names[id(p)] for p in group["params"]], group["lr"], group["weight_decay"]) for group in made.param_groups
    ]
    assert found[:2] == [(["linear_2.weight"], 0.5, 0.05), (["linear_1.weight"], 0.02, 0.05)]
    assert found[3] == (["output.weight"], 0.01, 0.05)
    assert found[2][1:] == (0.01, 0.0)
    before = clone(named)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    made.step()
    # One step of Muon moves the entries of a matrix by about 0.2 of its learning rate.
    moved = (named["linear_2.weight"] - 0.975 * before["linear_2.weight"]).square().mean().sqrt()
    assert 0.05 < moved < 0.15


@pytest.mark.parametrize(("adjust", "ratio"), [("match_rms_adamw", 1.0), ("original", math.sqrt(4))])
def test_the_size_of_a_narrower_matrixs_update_is_as_documented(adjust: str, ratio: float) -> None:
    moved = []
    for size in (64, 16):
        matrix = nn.Parameter(torch.zeros(size, size))
        matrix.grad = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
        muon_with_adamw({"hidden": matrix}, lr=1.0, weight_decay=0.0, adjust_lr_fn=adjust).step()
        moved.append(float(matrix.detach().square().mean().sqrt()))

    # Newton-Schulz leaves singular values between 0.7 and 1.2, with another mean for another size.
    assert moved[1] / moved[0] == pytest.approx(ratio, rel=0.1)
    assert adjust == "original" or moved[0] == pytest.approx(0.2, rel=0.2)


def test_it_learns_with_several_workers() -> None:
    spec = ist.Optimizer(name="MuonWithAdamW", args={"lr": 0.1, "adamw": {"lr": 0.01}})

    history = ist.train(
        network(), data(1000), workers=3, rounds=11, local_steps=10, optimizer=spec, progress=False
    ).history

    assert history[-1]["loss"] < 0.75 * history[0]["loss"]


@pytest.mark.parametrize(
    ("name", "dims", "expected"),
    [
        ("layers.3.mlp.up_proj.weight", 2, True), ("transformer.h.0.attn.c_attn.weight", 2, True),
        ("bert.encoder.layer.0.output.dense.weight", 2, True), ("decoder.multihead_attn.out_proj.weight", 2, True),
        ("model.embed_tokens.weight", 2, False), ("transformer.wte.weight", 2, False), ("lm_head.weight", 2, False),
        ("output.weight", 2, False), ("classifier.weight", 2, False), ("conv1.weight", 4, False), ("norm.weight", 1, False),
    ],
)  # fmt: skip
def test_hidden_matrices_use_muon(name: str, dims: int, expected: bool) -> None:
    assert uses_muon(name, dims, ADAMW_FOR) is expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"adamw_for": ["outptu.*"]}, ["'train.optimizer.args.adamw_for'", "'outptu.*'", "'linear_1.weight'"]),
        ({"adamw_for": "output.*"}, ["'train.optimizer.args.adamw_for'", "'output.*'", "list"]),
        ({"adamw_for": ["*"]}, ["no parameter would use Muon", "'*'", "'AdamW'"]),
        ({"momentun": 0.9}, ["'train.optimizer.args'", "muon_with_adamw", "'momentun'"]),
        ({"adamw": {"lrr": 0.1}}, ["'train.optimizer.args'", "'lrr'"]),
        ({"lr": -1.0}, ["'train.optimizer.args'", "-1.0"]),
        ({"adjust_lr_fn": "none"}, ["'train.optimizer.args'", "none"]),
    ],
)
def test_wrong_arguments_are_refused_by_name(args: dict[str, Any], message: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*message)) as raised:
        train(optimizer={"name": "MuonWithAdamW", "args": args})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"max_dims": 1, "args": {"momentum": 0.5}}, ["groups.0.args'", "'momentum'"]),
        ({"max_dims": 1, "args": {"muon_or_adamw": "muon"}}, ["groups.0.args'", "'muon_or_adamw'"]),
        ({"match": ["linear_1.*"], "args": {"lr": -1.0}}, ["groups.0.args'", "-1.0"]),
    ],
)
def test_wrong_groups_are_refused_by_name(group: dict[str, Any], message: list[str]) -> None:
    with pytest.raises(ConfigError, match=naming(*message)):
        train(optimizer={**SPEC, "groups": [group]})


def test_a_network_whose_names_say_nothing_is_warned_of_unless_they_are_given() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))

    options: dict[str, Any] = {"workers": 2, "rounds": 1, "local_steps": 1, "progress": False}
    with pytest.warns(UserWarning, match=naming("'0.weight', '2.weight', '4.weight'", "adamw_for")):
        ist.train(model(), data(), optimizer="MuonWithAdamW", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in ([], ["4.*"]):
            spec = ist.Optimizer(name="MuonWithAdamW", args={"adamw_for": given})
            ist.train(model(), data(), optimizer=spec, **options)


def test_a_torch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")

    with pytest.raises(ConfigError, match=naming("'MuonWithAdamW'", "torch.optim.Muon", torch.__version__)):
        train()


def test_muon_alone_names_what_trains_other_parameters_too() -> None:
    with pytest.raises(ConfigError, match=naming("'Muon'", "1 dims", "'MuonWithAdamW'")):
        train(optimizer="Muon")
