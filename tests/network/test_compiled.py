"""A compiled network trains uncompiled, with a warning, or compiled (`train.compile`), and is as before afterwards."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ist
from ist.errors import ConfigError, ModelError
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.runs.opening.process import restored
from tests.conftest import assert_same, data, job_for, naming, plain_loop, small_config
from tests.networks import NETWORKS, seeded

pytestmark = [
    pytest.mark.timeout(60),  # importing the compiler takes seconds
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # of the compiler itself
]


def plain() -> Any:
    return seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)))


def compiled() -> Any:
    return torch.compile(plain(), backend="eager")


def in_part() -> Any:
    model = plain()
    model[0] = torch.compile(model[0], backend="eager")
    return model


def in_place() -> Any:
    model = plain()
    model[2].compile(backend="eager")
    return model


def by_method() -> Any:
    model = plain()
    model[0].forward = torch.compile(model[0].forward, backend="eager")
    return model


def train(model: nn.Module, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "local_steps": 3, "rounds": 2, "batch_size": 10, "progress": False}
    return ist.train(model, data(60), test_data=data(20), **settings | options).model


@pytest.mark.parametrize(
    ("build", "named"),
    [(compiled, "the network"), (in_part, "'0'"), (in_place, "'2'"), (by_method, r"'0\.forward'")],
)
def test_a_compiled_network_trains_as_the_plain_one(build: Callable[[], Any], named: str, tmp_path: Path) -> None:
    model, expected = build(), train(plain()).state_dict()
    before = set(model.state_dict())

    with pytest.warns(UserWarning, match=rf"torch\.compile .*{named}\W"):
        trained = train(model, run_dir=tmp_path / "run")

    assert trained is model
    assert set(model.state_dict()) == before  # everything is compiled again
    assert_same({name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}, expected)
    assert_same(load_file(tmp_path / "run" / "model.safetensors"), expected)


def test_a_module_compiled_in_place_is_compiled_again() -> None:
    model, by_hand = in_place(), by_method()

    with pytest.warns(UserWarning, match=r"torch\.compile"):
        train(model)
    with pytest.warns(UserWarning, match=r"torch\.compile"):
        train(by_hand)

    assert model[2]._compiled_call_impl is not None
    assert hasattr(by_hand[0].forward, "_torchdynamo_orig_callable")


COMPILED: list[int] = []
"""A number for each graph that the backend `counting` compiles."""


def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
    COMPILED.append(len(COMPILED))
    return graph.forward


@pytest.mark.parametrize("build", [plain, compiled, in_part])
def test_submodels_are_compiled_once_for_all_rounds_if_the_run_says_so(build: Callable[[], Any]) -> None:
    torch._dynamo.reset()
    if "counting" not in torch.compiler.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(counting, "counting")
    expected = train(plain(), rounds=4).state_dict()

    counts, trained = [], []
    for rounds in (1, 4):
        COMPILED.clear()
        torch._dynamo.reset()
        trained.append(train(build(), compile="counting", rounds=rounds).state_dict())  # a warning would be an error
        counts.append(len(COMPILED))

    assert counts[0] == counts[1] > 0
    assert_same({name.replace("_orig_mod.", ""): tensor for name, tensor in trained[1].items()}, expected)


def test_one_compiled_worker_makes_the_steps_of_a_compiled_plain_loop_bit_for_bit() -> None:
    ours, theirs = seeded(NETWORKS["two hidden layers, batch norm"]), seeded(NETWORKS["two hidden layers, batch norm"])
    job = job_for(
        ours, train__workers=1, train__compile="aot_eager", train__optimizer_state="carried",
        train__running_statistics="carried",
    )  # fmt: skip

    execute(job, progress=False)
    plain_loop(
        torch.compile(theirs, backend="aot_eager"), job, torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    )

    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.system
@pytest.mark.timeout(300)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_submodels_are_compiled_by_inductor() -> None:
    found = train(plain(), compile="inductor").state_dict()

    for name, tensor in train(plain()).state_dict().items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-5)  # sums in another order


def test_a_backend_that_torch_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=naming("'train.compile' is 'inductr'", "inductor", "aot_eager")):
        train(plain(), compile="inductr")


def for_digits() -> Any:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def compiled_for_digits() -> Any:
    return torch.compile(for_digits(), backend="eager")


@pytest.mark.filterwarnings("ignore:torch.compile")
def test_files_of_compiled_networks_can_be_used_as_weights_and_checkpoints(tmp_path: Path) -> None:
    values = for_digits().state_dict()
    old = {f"_orig_mod.{name}": tensor for name, tensor in values.items()}
    save_file(old, tmp_path / "old.safetensors")
    network = {"name": f"{__name__}:compiled_for_digits", "weights": str(tmp_path / "old.safetensors")}

    job = build_job(small_config(model=network))
    resumed, further = restored(job, {name: tensor + 1 for name, tensor in old.items()} | {"more": torch.ones(1)})

    assert_same(job.task.build().state_dict(), values)
    assert_same(resumed.state_dict(), {name: tensor + 1 for name, tensor in values.items()})
    assert set(further) == {"more"}


def test_a_network_that_is_wrapped_for_parallel_training_is_refused() -> None:
    with pytest.raises(ModelError, match=r"the network\b.*DataParallel.*pass the module"):
        train(nn.DataParallel(plain()))
    with pytest.raises(ModelError, match=r"'0'.*DataParallel.*pass the module"):
        train(nn.Sequential(nn.DataParallel(plain()), nn.ReLU()))
