"""Workers of several ranks: the weights are those of workers with one rank and the same batch."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ist
from ist.config.schema import lead_rank, num_processes, worker_of
from ist.data.fingerprint import data_fingerprint
from ist.distributed.environment import ranks_of_node
from ist.distributed.worker_group import WorkerGroup
from ist.pools.torchrun import for_world_size
from ist.runs.open import check_method
from ist.runs.rehearsal import rehearse
from ist.runs.split import split_of
from ist.storage.checkpoint import read_tensors
from tests.conftest import data, job_for, naming, run_forked_ranks, small_config
from tests.networks import NETWORKS, seeded
from tests.pools.inside_program import RANKS, SCENARIOS, plain, run, samples

PROGRAM = "tests/pools/inside_program.py"


def outcome(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    return read_tensors(folder / f"{name}.safetensors")[0], json.loads((folder / f"{name}.json").read_text())


def assert_equal_to_one_rank(folder: Path, inside: str) -> None:
    for name in SCENARIOS:
        run(name, folder, kind="inline", device="cpu")
        expected, history = outcome(folder, name)
        found, records = outcome(folder / inside, name)
        for key, tensor in expected.items():
            # Sums of float64 in another order.
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-11, msg=f"{name}, {inside}, {key}")
        for record, same in zip(records, history, strict=True):
            for key in ("workers", "steps", "samples", "sent_bytes", "loss", "accuracy", "logged"):
                if same.get(key) is not None:
                    assert record[key] == pytest.approx(same[key], rel=1e-6), f"{name}, {inside}, {key}"
            assert same["inside_bytes"] == 0


@pytest.mark.procs
def test_two_workers_of_two_ranks_train_as_two_workers_with_the_whole_batch(tmp_path: Path) -> None:
    run_forked_ranks((4, PROGRAM, tmp_path, "built_in", "ddp"))

    assert_equal_to_one_rank(tmp_path, "ddp")
    # In each of three steps, a rank sends half of the gradients (float64) to be summed, and half of the sums; before,
    # the first rank passes the message on.
    split = ist.split(plain().double(), samples().tensors[0][:2], workers=2, local_steps=3)
    expected = sum(3 * 2 * share.parameters * 8 + share.sent_bytes for share in split.shares)
    (record, *_) = outcome(tmp_path / "ddp", "uneven parts, clipped")[1]
    assert record["inside_bytes"] == expected
    for kind in ("torchrun", "ray"):
        made = job_for(seeded(plain).double(), samples(), train__workers=2, pool={**RANKS, "kind": kind})
        assert split_of(made).bytes_per_round.inside == expected


@pytest.mark.system
def test_sharded_ranks_and_own_loops_train_as_with_the_whole_batch_and_fail_together(tmp_path: Path) -> None:
    run_forked_ranks(
        *((4, PROGRAM, tmp_path, *what) for what in (["built_in", "fsdp"], ["own_loop"], ["resumed"], ["left"]))
    )

    assert_equal_to_one_rank(tmp_path, "fsdp")
    left = [json.loads((tmp_path / f"left-{rank}").read_text()) for rank in range(4)]
    assert max(when for when, _ in left) - min(when for when, _ in left) < 10
    assert "of the user's own" in left[3][1]
    assert "failed" in left[0][1]


def test_ranks_of_a_worker_are_consecutive() -> None:
    for coordinator, processes, workers, leads in (
        ("trains", 6, [0, 0, 0, 1, 1, 1], [0, 3]),
        ("dedicated", 7, [-1, 0, 0, 0, 1, 1, 1], [1, 4]),
    ):
        pool = {"kind": "torchrun", "coordinator": coordinator, "ranks_per_worker": 3}
        config = small_config(train__workers=2, pool=pool)

        assert num_processes(config) == processes
        assert [worker_of(config, rank) for rank in range(processes)] == workers
        assert [lead_rank(config, worker) for worker in range(2)] == leads


def test_the_ranks_of_a_node_are_those_that_the_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    with pytest.raises(ist.ConfigError, match=naming("'node'", "LOCAL_WORLD_SIZE", "torchrun")):
        ranks_of_node()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks_of_node() == 4
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # nodes of 4 and of 8
    with pytest.raises(ist.ConfigError, match=naming("4", "12", "2 nodes", "--nproc-per-node")):
        ranks_of_node()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pool": {"kind": "inline", "ranks_per_worker": 2}}, ("pool.ranks_per_worker", "2", "torchrun", "inline")),
        ({"pool": {"kind": "inline", "inside": "fsdp"}}, ("pool.inside", "fsdp", "torchrun or ray", "inline")),
        ({"pool": {"kind": "ray", "ranks_per_worker": "node"}}, ("pool.ranks_per_worker", "'node'", "ray", "number")),
        (
            {"pool": {"kind": "ray", "ranks_per_worker": 2, "store": "sharded"}},
            ("pool.ranks_per_worker", "pool.store", "'coordinator'"),
        ),
        (
            {"pool": {**RANKS, "ranks_per_worker": "node", "coordinator": "dedicated"}},
            ("'node'", "dedicated", "trains"),
        ),
        ({"pool": {**RANKS, "store": "sharded"}}, ("pool.ranks_per_worker", "pool.store", "sharded", "'coordinator'")),
        ({"train__optimizer_state": "carried"}, ("'fsdp'", "train.optimizer_state", "carried", "'ddp'")),
        ({"train__activation_scale": "width"}, ("'fsdp'", "train.activation_scale", "'folded'")),
        ({"train__compile": "inductor"}, ("'fsdp'", "train.compile", "'ddp'")),
        (
            {"train__autocast": "float16", "pool": {**RANKS, "device": "cuda", "inside": "fsdp"}},
            ("float16", "bfloat16"),
        ),
        ({"train__optimizer": {"name": "MuonWithAdamW", "args": {}}}, ("'fsdp'", "MuonWithAdamW", "'ddp'")),
    ],
)
def test_settings_that_several_ranks_cannot_honour_are_refused(changes: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(ist.ConfigError, match=naming(*named)):
        small_config(**{"pool": {**RANKS, "inside": "fsdp"}, **changes})


def test_a_number_of_processes_that_gives_no_whole_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    job = job_for(seeded(plain), pool=RANKS, train__workers={"min": 1, "max": 4})
    with pytest.raises(ist.ConfigError, match=naming("5 processes", "pool.ranks_per_worker is 2", "start 8 processes")):
        for_world_size(job)
    with pytest.raises(ist.ConfigError, match=naming("5 processes", "pool.ranks_per_worker is 2", "start 2 for each")):
        ist.join(plain(), example=data().tensors[0][:2], rounds=1, pool={"ranks_per_worker": 2})

    monkeypatch.setenv("WORLD_SIZE", "6")
    assert for_world_size(job).config.train.workers == 3


def test_a_method_whose_ranks_are_all_workers_is_refused() -> None:
    with pytest.raises(ist.ConfigError, match=naming("pool.ranks_per_worker", "2", "'ddp'", "train.workers")):
        check_method(small_config(method="ddp", pool=RANKS))


def test_ranks_of_a_worker_that_have_loaded_different_data_of_its_own_are_refused() -> None:
    mine, other = (data_fingerprint(data(seed=seed), 0) for seed in (1, 2))
    group: Any = SimpleNamespace(lead=2, gather=lambda numbers: [numbers, other.to_numbers()])

    with pytest.raises(ist.DataError, match=naming("rank 3", "rank 2", "worker 1", "pool.ranks_per_worker")):
        WorkerGroup.check_data(group, 1, mine)


def test_the_ranks_of_a_node_need_a_launcher() -> None:
    with pytest.raises(ist.ConfigError, match=naming("pool.ranks_per_worker", "'node'", "torchrun")):
        num_processes(small_config(pool={**RANKS, "ranks_per_worker": "node"}))


class PartlyUsed(nn.Module):
    """A network with a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.unused = plain(), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_networks_and_batches_that_several_ranks_cannot_train_are_refused() -> None:
    with pytest.raises(ist.ModelError, match=naming("batch norm", "'norm_1'", "pool.ranks_per_worker", "LayerNorm")):
        job_for(seeded(NETWORKS["two hidden layers, batch norm"]), pool=RANKS)
    with pytest.raises(ist.ConfigError, match=naming("pool.ranks_per_worker", "train.accumulate", "6 in all")):
        job_for(seeded(plain), pool=RANKS, train__batch_size=5, train__accumulate=3)
    with pytest.raises(
        ist.ModelError, match=naming("'unused.weight'", "pool.ranks_per_worker", "requires_grad_(False)")
    ):
        rehearse(job_for(PartlyUsed(), pool=RANKS))


class FSDPModule(nn.Linear):
    """Bears the name of the class to which `fully_shard` adds a module."""


@pytest.mark.parametrize(
    ("wrapped", "named"),
    [
        (nn.DataParallel(plain()), ("DataParallel", "model.module", "inside='ddp'")),
        (nn.Sequential(FSDPModule(12, 6), nn.ReLU(), nn.Linear(6, 5)), ("'0'", "before fully_shard", "inside='fsdp'")),
    ],
)
def test_a_wrapped_network_is_refused_with_the_way_to_do_it(wrapped: nn.Module, named: tuple[str, ...]) -> None:
    inputs, _ = data().tensors
    for attempt in (
        lambda: ist.train(wrapped, data(), workers=2, rounds=1, progress=False),
        lambda: ist.join(wrapped, example=inputs[:2], workers=1, rounds=1),
        lambda: ist.split(wrapped, inputs[:2], workers=2),
    ):
        with pytest.raises(ist.ModelError, match=naming(*named, "ranks_per_worker")):
            attempt()
