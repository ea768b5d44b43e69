"""One list of methods and one of pools: an entry and a class are all that a new method needs."""

import ast
import inspect
import json
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from torch import Tensor, nn

from ist.baselines.ranks import RankRound, summarise
from ist.cli import main as cli
from ist.config.base import describe_keys
from ist.config.methods import (
    METHODS,
    POOLS,
    Baseline,
    Collective,
    MethodSpec,
    Sizes,
    method_spec,
    parameter_bytes,
)
from ist.config.registry import resolve
from ist.config.runtime import Pool
from ist.config.schema import Config
from ist.errors import ConfigError
from ist.loops.local_loop import TaskLoop
from ist.loops.part import LocalSteps, Part
from ist.measurements import nothing_measured
from ist.monitoring.meter import Meter
from ist.plan.predict import make_plan
from ist.plan.request import parse_request
from ist.runs.open import check_method
from ist.subnet.job import Job, slot_of
from ist.training.rounds import RoundReport
from tests.conftest import ROOT, config_tree, naming, small_config

CPU = torch.device("cpu")
NAMES = METHODS.keys() | POOLS.keys()


class Alone:
    """A toy baseline: one worker trains the full network on its own data, in this process, and reports its measurements.

    It is all of an implementation; `TOY` is its entry.
    """

    def __init__(
        self, job: Job, membership: None, model: nn.Module, state: Mapping[str, Tensor], meter: Meter, worker: int = 0
    ) -> None:
        assert membership is None
        assert not state
        self.job, self.model, self.meter, self._worker = job, model, meter, worker
        slot = slot_of(job, worker)
        self._local = LocalSteps(job.schedule, job.config.seed, slot, CPU, TaskLoop(job, slot, CPU))
        self._named = dict(model.named_parameters())
        self._optimizer = job.task.make_optimizer(self._named)

    def train_round(self, round_number: int) -> Generator[Part, None, RoundReport]:
        part = yield from self._local.of_round(round_number, self.model, self._named, self._optimizer)
        done = {"steps": part.steps_made, "samples": part.samples, "loss_sum": part.loss_sum, "memory_bytes": 1}
        measured = nothing_measured() | done
        return summarise([RankRound(measured, finite=True, sent_bytes=0.0, transfers_s=())])

    def checkpoint_state(self) -> Mapping[str, Tensor]:
        return self.model.state_dict()

    def bytes_sent(self) -> int:
        return self.meter.sent.total()

    def close(self) -> None:
        pass


def tenth(sizes: Sizes, _settings: Baseline) -> float:
    return parameter_bytes(sizes) / 10


TOY = MethodSpec(
    "alone",
    "one worker alone",
    f"{__name__}:Alone",
    options={"worker": 1},
    pools=("inline",),
    collective=Collective("round", payload=tenth, memory=tenth, passes=1),
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(METHODS, TOY.name, TOY)
    return TOY.name


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config_tree(output=str(tmp_path / "runs"), train__rounds=2)))
    return path


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["ist", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0


def test_a_method_is_compared_once_it_has_an_entry_and_a_class(
    toy: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "compared"

    run_command(monkeypatch, "compare", config_file, "--methods", f"ist,{toy}", "--run-dir", runs)

    results = {name: json.loads((runs / name / "result.json").read_text()) for name in ("ist", toy)}
    assert results[toy]["method"] == toy
    assert results["ist"]["sent_bytes"] > results[toy]["sent_bytes"] == 0
    assert "remote_workers" in results["ist"].keys() - results[toy].keys()  # it has no coordinator
    assert toy in (runs / "report.html").read_text()
    assert toy in capsys.readouterr().out


def test_its_run_is_one_of_the_worker_that_its_options_name(
    toy: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for worker in (1, 2):
        monkeypatch.setitem(METHODS, toy, MethodSpec(**{**vars(TOY), "options": {"worker": worker}}))
        run_command(monkeypatch, "train", config_file, "--method", toy, "--run-dir", tmp_path / str(worker))
        losses.append(json.loads((tmp_path / str(worker) / "result.json").read_text())["loss"])

    assert losses[0] != losses[1]


def test_it_is_planned_by_its_formula(toy: str) -> None:
    found = make_plan(small_config(), parse_request("100mbit", methods=f"ddp,{toy}", workers="4"))

    every_step, once = found["predictions"]
    assert [every_step["method"], once["method"]] == ["ddp", toy]
    assert once["sent_bytes"] == round(every_step["sent_bytes"] / 10 / 3) > 0  # 3 local steps


def test_it_is_refused_where_it_cannot_run(toy: str) -> None:
    with pytest.raises(ConfigError, match=naming(f"method '{toy}'", "pool.kind 'inline'", "'torchrun'")):
        check_method(small_config(method=toy, pool={"kind": "torchrun"}))


def test_a_users_own_method_is_an_import_path_and_cannot_be_planned() -> None:
    own = f"{__name__}:Alone"

    spec = method_spec(own)

    assert (spec.implementation, spec.pools, spec.needs_groups) == (own, ("torchrun",), False)
    check_method(small_config(method=own, pool={"kind": "torchrun"}))
    with pytest.raises(ConfigError, match=naming(f"'{own}'", "planned")):
        parse_request("100mbit", methods=own)


def make_of_two(job: Job, model: nn.Module) -> None:
    raise AssertionError(f"made of {job} and {model}")


def test_a_users_own_method_with_other_arguments_is_refused_before_anything_starts() -> None:
    own = f"{__name__}:make_of_two"

    with pytest.raises(ConfigError, match=naming(f"'method' is '{own}'", "(job, membership, model, state, meter)")):
        check_method(small_config(method=own, pool={"kind": "torchrun"}))


@pytest.mark.parametrize("spec", METHODS.values(), ids=lambda spec: spec.name)
def test_every_entry_names_a_class_that_takes_its_options_and_keys_and_pools_that_exist(spec: MethodSpec) -> None:
    made = resolve(spec.name, "method", {spec.name: spec.implementation})

    inspect.signature(made).bind(*[None] * 5, **spec.options)
    keys = [key for key, *_ in describe_keys(Config)]
    assert all(any(key == own or key.startswith(f"{own}.") for key in keys) for own in spec.keys), spec.keys
    assert set(spec.pools) <= POOLS.keys()
    assert spec.can_be_planned


def test_every_setting_of_the_baselines_is_some_methods_and_is_explained_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(monkeypatch, "keys")
    lines = capsys.readouterr().out.splitlines()

    for key, *_ in describe_keys(Config):
        if key.startswith("baseline."):
            users = [spec.name for spec in METHODS.values() if key in spec.keys]
            assert users, f"{key}: put it into MethodSpec.keys of the methods that use it"
            number = next(number for number, line in enumerate(lines) if line.startswith(f"{key} "))
            assert lines[number + 1].strip().startswith(f"{', '.join(users)}: ")


def test_every_pool_has_an_entry_and_keys_that_exist() -> None:
    assert get_args(Pool.model_fields["kind"].annotation) == tuple(POOLS)
    assert all(spec.keys.keys() <= Pool.model_fields.keys() for spec in POOLS.values())


def test_no_code_outside_the_registry_asks_what_a_method_or_a_pool_is_called() -> None:
    """It asks what the method or the pool can: `config.method_spec.needs_groups`, `config.pool.spec.replaces_workers`."""
    asked = []
    for path in sorted((ROOT / "ist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                if any(text in NAMES for text in texts):
                    asked.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")

    assert asked == []


def test_no_code_outside_the_registry_has_a_list_of_methods() -> None:
    """Two names of methods beside each other are a list; these two are what `ist compare` compares by default."""
    lists = []
    for path in sorted((ROOT / "ist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict | ast.List | ast.Tuple | ast.Set):
                parts = node.keys if isinstance(node, ast.Dict) else node.elts
                named = {part.value for part in parts if isinstance(part, ast.Constant)} & METHODS.keys()
                lists += [f"{path.stem}: {', '.join(sorted(named))}"] if len(named) > 1 else []

    assert lists == ["schema: ddp, ist"]


def test_the_search_finds_a_name_wherever_it_is_compared() -> None:
    """So that the two tests above can fail."""
    for code in ("config.method == 'ist'", "'ray' != kind", "x in ('ddp', other)", "not a or b.kind in {'inline'}"):
        compares = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Compare)]
        assert any(isinstance(p, ast.Constant) and p.value in NAMES for node in compares for p in ast.walk(node)), code
