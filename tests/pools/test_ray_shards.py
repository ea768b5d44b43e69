"""The full network in shards on Ray: weights as in the inline pool, and no more is lost with an owner than its round."""

import os
import signal
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors

from ist.pools.ray_shards import owners, pool
from ist.pools.ray_shards.owner import RayOwner
from ist.pools.ray_shards.worker import RayShardWorker
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.storage.checkpoint import read_tensors
from ist.storage.run_folder import create_run_folder
from tests.conftest import assert_same, node, small_config, wait_for
from tests.pools.scenario import job, run
from tests.pools.test_conformance import message_bytes, outcome
from tests.system.test_chaos import SETTINGS, leaving_out, left_out

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_address")]

SHARDED = {"kind": "ray", "store": "sharded"}


@pytest.mark.parametrize("name", ["quantized, error feedback", "stages, outer momentum, averaged", "frozen, quantized"])
def test_the_network_in_shards_ends_with_identical_weights_and_the_bytes_of_the_formula(
    tmp_path: Path, name: str
) -> None:
    for kind in ("inline", "ray"):
        (tmp_path / kind).mkdir()

    run(name, tmp_path / "inline")
    run(name, tmp_path / "ray", pool=SHARDED)

    expected, history = outcome(tmp_path / "inline", name)
    found, found_history = outcome(tmp_path / "ray", name)
    assert_same(found, expected)
    made, _ = job(name, pool=SHARDED)
    for record, reference in zip(found_history, history, strict=True):
        for key in ("loss", "accuracy", "samples", "steps"):
            assert record[key] == reference[key]
        expected_bytes = message_bytes(made, record["round"])
        assert record["bytes_to_worker"] == [sent for sent, _ in expected_bytes]
        assert record["bytes_from_worker"] == [returned for _, returned in expected_bytes]


@ray.remote(num_cpus=0)
def nothing() -> None:
    """Do nothing."""


def runs_tasks(node_id: str) -> bool:
    """Whether Ray's scheduler already knows a node, which has just joined."""
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    try:
        ray.get(nothing.options(scheduling_strategy=there).remote(), timeout=30)
    except RayError:
        return False
    return True


def test_owners_are_spread_over_the_nodes(ray_address: str) -> None:
    made, _ = job("frozen, quantized", pool=SHARDED)

    with node("--address", ray_address, "--num-cpus=1"):
        wait_for(lambda: sum(map(runs_tasks, owners._nodes())) == 2, 60, "the second node")
        spread = owners.Owners(made, "spread")
        spread.call("alive")
        living = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)  # by default the first 100 of all
        places = [actor.node_id for actor in living if (actor.name or "").startswith("spread-owner")]
        spread.close()

    assert sorted(map(places.count, set(places))) == [1, 2]


class Mortal:
    """An actor that dies once in some of its calls; `deaths` has (actor, method, round), `struck` is a folder."""

    deaths: frozenset[tuple[int, str, int]] = frozenset()
    struck: str = ""

    def die_if_due(self, *death: Any) -> None:
        path = Path(self.struck) / "-".join(map(str, death))
        if death in self.deaths and not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class MortalOwner(Mortal, RayOwner):
    def __init__(self, job: Any, owner: int, owners: int) -> None:
        super().__init__(job, owner, owners)
        self.number = owner

    def cut(self, round_number: int, *rest: Any) -> Any:
        self.die_if_due(self.number, "cut", round_number)
        return super().cut(round_number, *rest)

    def receive(self, worker: int, piece: Any) -> int:
        self.die_if_due(self.number, "receive", self._number)
        return super().receive(worker, piece)

    def merge(self, *arguments: Any) -> Any:
        self.die_if_due(self.number, "merge", self._number)
        return super().merge(*arguments)


class MortalWorker(Mortal, RayShardWorker):
    def train_pieces(self, ticket: int, round_number: int, slot: Any, *received: Any) -> Any:
        self.die_if_due(slot.worker, "train", round_number)
        return super().train_pieces(ticket, round_number, slot, *received)


def ended(
    monkeypatch: pytest.MonkeyPatch, folder: Path, deaths: set[tuple[int, str, int]], **pool_settings: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Run with actors that die, and return the saved weights and the history."""
    struck = tempfile.mkdtemp(dir=os.environ["IST_TESTS"])
    fields = {"deaths": frozenset(deaths), "struck": struck}
    owner, worker = (type(base.__name__, (base,), fields) for base in (MortalOwner, MortalWorker))
    monkeypatch.setattr(owners, "Owners", partial(owners.Owners, owner_class=owner))
    monkeypatch.setattr(pool, "ShardWorkers", partial(pool.ShardWorkers, worker_class=worker))
    config = small_config(**{**SETTINGS, "checkpoint": {"every": 2}, "pool": {**SHARDED, **pool_settings}})
    made = create_run_folder(config, folder)
    part = execute(build_job(config), made, progress=False)
    assert len(list(Path(struck).iterdir())) == len(deaths)
    return read_tensors(folder / "model.safetensors")[0], part.recorder.history


def test_a_lost_owner_comes_back_from_a_replica_and_a_lost_worker_leaves_its_neurons_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deaths = {(1, "merge", 1), (0, "cut", 3), (1, "train", 5)}

    weights, history = ended(monkeypatch, tmp_path / "run", deaths, store_replicas=2)

    assert left_out(history) == {(5, 1): "lost"}
    assert_same(weights, leaving_out(frozenset({(5, 1)}))[0])


def test_a_lost_owner_without_a_replica_comes_back_from_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights, history = ended(monkeypatch, tmp_path / "run", {(2, "receive", 3)})

    assert left_out(history) == {}
    assert_same(weights, leaving_out(frozenset())[0])
    (warning,) = [record.getMessage() for record in caplog.records if "owner 2" in record.getMessage()]
    assert "after 2 rounds" in warning
