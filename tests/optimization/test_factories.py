"""Optimizers made by a user's function of named parameters: as in a plain loop, in every place that makes one."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import ist
from ist.errors import ConfigError, ModelError
from ist.runs.recorder import RunRecorder
from ist.runs.rehearsal import rehearse
from tests import optimizers
from tests.conftest import assert_same, clone, data, job_for, naming, plain_loop
from tests.networks import NETWORKS, seeded
from tests.runs.test_resume import PowerCutError
from tests.training.test_one_worker import run

Named = Mapping[str, nn.Parameter]
FUNCTION = "tests.optimizers:no_decay_on_biases"


def network() -> nn.Module:
    return seeded(NETWORKS["no batch norm"])


def named_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def train(model: nn.Module | None = None, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "rounds": 2, "local_steps": 2, "progress": False}
    return ist.train(model or network(), data(), **{**settings, **options}).model


@pytest.mark.parametrize("state", ["carried", "kept"])
@pytest.mark.parametrize("is_scheduled", [True, False])
def test_one_worker_with_a_function_is_a_plain_loop_with_it(is_scheduled: bool, state: str) -> None:
    ours, plain = network(), network()
    rates = {"max_lr": [0.02, 0.03, 0.04], "total_steps": 10}
    job = job_for(
        ours,
        train__workers=1,
        train__rounds=3,
        train__optimizer={"name": FUNCTION, "args": {"lr": 0.02}},
        train__optimizer_state=state,
        train__schedule={"name": "OneCycleLR", "args": rates} if is_scheduled else None,
    )

    run(job)
    optimizer = optimizers.no_decay_on_biases(named_of(plain), lr=0.02)
    plain_loop(plain, job, optimizer, lr_scheduler.OneCycleLR(optimizer, **rates) if is_scheduled else None)

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))


def test_a_function_gets_the_parameters_of_each_subnet_by_their_names_in_the_full_network() -> None:
    seen: list[dict[str, tuple[int, ...]]] = []

    def make(named: Named) -> torch.optim.Optimizer:
        seen.append({name: tuple(parameter.shape) for name, parameter in named.items()})
        return torch.optim.SGD(named.values(), lr=0.1)

    model = network()
    train(model, optimizer=make)

    full = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert all(list(shapes) == list(full) for shapes in seen)
    assert full in seen
    assert {shapes["linear_2.weight"] for shapes in seen[-4:]} == {tuple(size // 2 for size in full["linear_2.weight"])}


def test_python_and_configuration_name_the_same_function() -> None:
    models = [
        train(optimizer=optimizers.no_decay_on_biases),
        train(optimizer=FUNCTION),
        train(optimizer=ist.Optimizer(name=FUNCTION, args={"lr": 0.01})),
        train(optimizer=lambda named: optimizers.no_decay_on_biases(named)),
    ]

    for model in models[1:]:
        assert_same(clone(model.state_dict()), clone(models[0].state_dict()))


def test_a_class_is_the_same_as_its_name() -> None:
    class Mine(torch.optim.AdamW):
        """A class that no import path reaches."""

    by_name = train(optimizer="AdamW")

    for cls in (torch.optim.AdamW, Mine):
        assert_same(clone(train(optimizer=cls).state_dict()), clone(by_name.state_dict()))
    assert_same(clone(train(optimizer=torch.optim.SGD).state_dict()), clone(train(optimizer="SGD").state_dict()))


def test_a_partial_of_a_class_is_the_class_with_these_arguments() -> None:
    args = {"lr": 0.02, "weight_decay": 0.5}
    by_name = train(optimizer=ist.Optimizer(name="AdamW", args=args))

    by_partial = train(optimizer=partial(torch.optim.AdamW, **args))

    assert_same(clone(by_partial.state_dict()), clone(by_name.state_dict()))


@pytest.mark.parametrize("state", ["carried", "kept"])
def test_an_optimizer_that_knows_the_names_of_its_parameters_is_a_plain_loop_with_it(state: str) -> None:
    """torch names parameters in its groups if it gets pairs (name, parameter)."""
    ours, plain = network(), network()
    job = job_for(
        ours,
        train__workers=1,
        train__rounds=3,
        train__optimizer={"name": f"{__name__}:of_pairs", "groups": [{"max_dims": 1, "args": {"weight_decay": 0.0}}]},
        train__optimizer_state=state,
        train__schedule={"name": "LinearLR"},
    )

    run(job)
    named = named_of(plain)
    vectors, matrices = ([p for p in named.values() if (p.ndim == 1) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": vectors, "weight_decay": 0.0}, {"params": matrices}], lr=0.05)
    plain_loop(plain, job, optimizer, lr_scheduler.LinearLR(optimizer))

    assert_same(clone(ours.state_dict()), clone(plain.state_dict()))
    made = job.task.make_optimizer(named)
    assert [len(group["param_names"]) for group in made.param_groups] == [3, 3]


def of_pairs(named: Named) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named.items(), lr=0.05)


def test_a_split_carries_the_state_of_a_functions_optimizer() -> None:
    options: dict[str, Any] = {"workers": 2, "optimizer_state": "carried"}
    example = data().tensors[0][:2]

    by_function = ist.split(network(), example, optimizer=optimizers.no_decay_on_biases, **options)

    assert by_function.bytes_per_round == ist.split(network(), example, optimizer="AdamW", **options).bytes_per_round


def test_a_resumed_run_with_a_function_is_the_same_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "workers": 1, "rounds": 4, "optimizer": optimizers.no_decay_on_biases, "checkpoint": {"every": 1},
        "schedule": {"name": "StepLR", "args": {"step_size": 3}},
    }  # fmt: skip
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


@pytest.mark.ray
def test_a_function_of_the_script_makes_optimizers_on_ray_as_inline(ray_address: str) -> None:
    options: dict[str, Any] = {
        "optimizer": lambda named: optimizers.no_decay_on_biases(named, lr=0.02),
        "schedule": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.8),
        "optimizer_state": "carried",
    }

    on_ray = train(**options, pool=ist.Pool(kind="ray", ray=ist.Ray(address=ray_address)))

    assert_same(clone(on_ray.state_dict()), clone(train(**options).state_dict()))


def returns_a_list(named: Named) -> Any:
    return [*named.values()]


def of_names(named: Named) -> Any:
    return torch.optim.SGD(named, lr=0.1)  # type: ignore[arg-type]  # the mistake: a mapping, not its values


def lbfgs(named: Named) -> Any:
    return torch.optim.LBFGS(named.values())


def of_another_network(named: Named) -> Any:
    return torch.optim.SGD([*named.values(), *network().parameters()], lr=0.1)


def for_a_name_that_is_not_there(named: Named) -> Any:
    return torch.optim.SGD([named["head.weight"]], lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (returns_a_list, ["returns a list", "torch.optim.Optimizer"]),
        (of_names, ["TypeError", "test_factories.py", "mapping of names to parameters"]),
        (lbfgs, ["LBFGS", "several times"]),
        (of_another_network, ["parameter group 0", "it was not given", "named.values()"]),
        (for_a_name_that_is_not_there, ["KeyError", "'head.weight'", "test_factories.py"]),
    ],
)
def test_a_function_that_makes_no_optimizer_of_its_parameters_is_refused_by_name(make: Any, message: list[str]) -> None:
    for given, where in ((make, "optimizer is "), (f"{__name__}:{make.__name__}", "'train.optimizer.name'")):
        with pytest.raises(ConfigError, match=naming(where, make.__name__, *message)) as raised:
            train(optimizer=given)
        assert "\n" not in str(raised.value)


def test_parameters_that_nothing_trains_are_warned_of_by_name() -> None:
    def weights(named: Named) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for name, p in named.items() if not name.endswith("bias")], lr=0.1)

    model, before = network(), network()
    with pytest.warns(UserWarning, match=naming("'linear_1.bias', 'linear_2.bias'", "requires_grad_(False)")) as said:
        train(model, optimizer=weights)

    assert len(said) == 1
    assert torch.equal(model.linear_1.bias, before.linear_1.bias)
    assert not torch.equal(model.linear_1.weight, before.linear_1.weight)


def test_state_of_a_functions_optimizer_that_cannot_be_carried_is_refused_by_name() -> None:
    def adafactor(named: Named) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(named.values())

    with pytest.raises(ConfigError, match=naming("'carried'", "adafactor stores 'row_var'", "'reset'")) as raised:
        train(optimizer=adafactor, optimizer_state="carried")
    assert "from-python" not in str(raised.value)


def by_size(named: Named) -> torch.optim.Optimizer:
    return optimizers.GroupBySize(named.values(), lr=0.1)


def test_groups_that_depend_on_sizes_are_refused_with_a_schedule_and_warned_of_without() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))

    with pytest.raises(ModelError, match=naming("'0.weight' and '0.bias'", "by name")):
        rehearse(
            job_for(model(), train__optimizer={"name": f"{__name__}:by_size"}, train__schedule={"name": "LinearLR"})
        )
    with pytest.warns(UserWarning, match=naming("by_size", "'0.weight'", "lr 0.1", "0.2", "not on sizes")):
        train(model(), optimizer=by_size)
