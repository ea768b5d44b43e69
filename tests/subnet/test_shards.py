"""Shards of a network: every row has one owner, and a worker's pieces of all shards are its part of the network."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ist.errors import ConfigError
from ist.subnet.cut import cut_specs, extract
from ist.subnet.job import assignments
from ist.subnet.stores.shards import owned_rows, rows_within, shard_of, shard_shape
from tests.conftest import job_for, naming, small_config, whole_state
from tests.networks import NETWORKS, seeded


@given(st.integers(0, 40), st.integers(1, 9))
def test_rows_are_divided_as_torch_chunk_divides_them(rows: int, owners: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(owners)] if rows else []

    owned = [list(owned_rows(rows, owner, owners)) for owner in range(owners)]

    assert owned == chunks + [[]] * (owners - len(chunks))


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("owners", [1, 2, 5])
def test_the_pieces_of_all_shards_are_a_workers_part(build: Callable[[], nn.Module], owners: int) -> None:
    model = seeded(build)
    job = job_for(model, train__workers=3, train__running_statistics="carried")
    state = whole_state(job, model)
    specs = job.split.specs
    pieces_of: dict[tuple[str, int], list[torch.Tensor]] = {}

    for owner in range(owners):
        shard = shard_of(job.split, owner, owners)
        rows = {
            name: state[name][owned_rows(len(state[name]), owner, owners)].contiguous() if spec.shape else state[name]
            for name, spec in specs.items()
        }
        assert {name: tuple(rows[name].shape) for name in specs if specs[name].shape} == {
            name: spec.shape for name, spec in shard.specs.items() if specs[name].shape
        }
        for worker, neurons in enumerate(assignments(job).of(1)):
            cut = shard.cut(neurons)
            into = {n: torch.empty(s.shape, dtype=s.dtype) for n, s in cut_specs(shard.specs, cut).items()}
            extract(rows, cut, into)
            for name, part in into.items():
                pieces_of.setdefault((name, worker), []).append(part)

    for worker, cut in enumerate(assignments(job).cuts(1)):
        expected = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in cut_specs(specs, cut).items()}
        extract(state, cut, expected)
        for name, part in expected.items():
            if part.numel():
                pieces = pieces_of[name, worker]
                assert torch.equal(torch.cat(pieces) if part.ndim else pieces[0], part)
            if part.ndim:
                lengths = [rows_within(specs[name], cut[name], owner, owners) for owner in range(owners)]
                assert [row for rows in lengths for row in range(rows.start, rows.stop)] == list(range(len(part)))


def test_a_number_without_dims_belongs_to_rank_0() -> None:
    assert [shard_shape((), owner, 3) for owner in range(3)] == [(), (0,), (0,)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pool": {"kind": "inline", "store": "sharded"}}, ["pool.store", "torchrun", "ray"]),
        ({"pool": {"kind": "torchrun", "store": "sharded", "store_replicas": 2}}, ["pool.store_replicas", "ray"]),
        ({"pool": {"kind": "ray", "store_replicas": 2}}, ["pool.store_replicas", "pool.store", "sharded"]),
        (
            {"pool": {"kind": "ray", "store": "sharded", "store_replicas": 2}, "train__workers": 1},
            ["pool.store_replicas", "train.workers", "2"],
        ),
        (
            {"pool": {"kind": "ray", "store": "sharded"}, "partition__balance": "speed"},
            ["pool.store", "partition.balance", "speed"],
        ),
        ({"pool": {"kind": "torchrun", "evaluation": "layers"}}, ["pool.evaluation", "pool.store"]),
        (
            {"pool": {"kind": "torchrun", "store": "sharded", "message_buffers": 2}},
            ["pool.message_buffers", "2", "pool.store", "sharded"],
        ),
        (
            {"pool": {"kind": "torchrun", "store": "sharded", "coordinator": "dedicated"}},
            ["pool.store", "pool.coordinator", "trains"],
        ),
        (
            {"pool": {"kind": "torchrun", "store": "sharded"}, "method": "local_sgd"},
            ["pool.store", "local_sgd", "coordinator"],
        ),
    ],
)
def test_a_sharded_store_is_refused_where_no_process_can_own_a_shard(
    changes: dict[str, object], named: list[str]
) -> None:
    with pytest.raises(ConfigError, match=naming(*named)):
        small_config(**changes)
