"""Rounds with a varying number of workers, and workers of different speeds."""

import math
from collections.abc import Generator, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from ist.config.load import dump_config, parse_yaml, validate
from ist.config.schema import min_returned
from ist.errors import ConfigError
from ist.loops.part import completed
from ist.monitoring.meter import Meter
from ist.pools.inline import InlinePool
from ist.pools.torchrun import for_world_size
from ist.subnet.job import assignments, for_workers, slot_of
from ist.training.coordinator import Coordinator
from ist.training.speed_balance import SMALLEST, SpeedBalance, rebalanced
from ist.training.worker import Worker
from ist.transport.interfaces import Lost, Subnet
from tests.conftest import assert_same, clone, job_for, naming, returned, small_config
from tests.networks import NETWORKS, seeded


class ChangingPool(InlinePool):
    """The inline pool with a given number of workers in each round, and with simulated compute times."""

    def __init__(
        self, job: object, meter: Meter, num_workers: Mapping[int, int], seconds: Mapping[str, float] = {}
    ) -> None:
        super().__init__(job, torch.device("cpu"), meter)  # type: ignore[arg-type]
        self.num_workers, self.seconds = num_workers, seconds
        self.shapes: list[list[tuple[int, ...]]] = []

    def gather(self, round_number: int) -> tuple[str, ...]:
        return super().gather(round_number)[: self.num_workers.get(round_number, 99)]

    def submit(self, round_number: int, subnet: Subnet) -> None:
        self.round_number = round_number
        super().submit(round_number, subnet)

    def results(self) -> Generator[Subnet | Lost]:
        shapes, round_number = [], self.round_number
        for result in returned(super().results()):
            assert isinstance(result, Subnet)
            shapes.append(tuple(result.buffers.up.tensors["linear_1.bias"].shape))
            header = result.buffers.up.read_header(round_number, result.worker)
            took = self.seconds.get(f"worker {result.worker}", 1.0)
            result.buffers.up.write_header(
                replace(header, numbers={**header.numbers, "compute_s": took * shapes[-1][0] ** 2})
            )
            yield result
        self.shapes.append(shapes)


def changing(
    num_workers: Mapping[int, int], seconds: Mapping[str, float] = {}, **changes: object
) -> tuple[Coordinator, ChangingPool]:
    model = seeded(NETWORKS["no batch norm"])
    job, meter = job_for(model, **changes), Meter()
    pool = ChangingPool(job, meter, num_workers, seconds)
    return Coordinator(job, pool, model, meter), pool


def test_full_width_rounds_do_not_change_shares() -> None:
    stages = [{}, {"rounds": 3, "keep": 1}]
    made, pool = changing({}, {"worker 0": 9.0}, partition__balance="speed", recipe__stages=stages, train__rounds=6)
    for round_number in range(3):
        completed(made.train_round(round_number))
    assert made._balance
    names = pool.gather(3)
    measured, workers = made._balance.capacities(names), set()

    for round_number in range(3, 6):
        completed(made.train_round(round_number))
        workers.add(tuple(id(host._worker) for host in pool._hosts))

    assert measured
    assert measured[0] < measured[1]
    assert made._balance.capacities(names) == measured
    whole = tuple(made.model.state_dict()["linear_1.bias"].shape)
    assert all(shapes == [whole] * 4 for shapes in pool.shapes[3:])
    assert len(workers) == 1  # so their optimizers continue


def test_the_next_partition_uses_the_available_workers() -> None:
    made, pool = changing({0: 4, 1: 2, 2: 3}, train__workers={"min": 2, "max": 4})

    reports = [completed(made.train_round(round_number)) for round_number in range(3)]

    assert [report.numbers["workers"] for report in reports] == [4, 2, 3]
    assert pool.shapes == [[(4,)] * 4, [(8,)] * 2, [(6,), (5,), (5,)]]
    # 100 samples in batches of 16: shards of 25, 50 and 34 or 33, in 2, 4 and 3 steps an epoch; three steps each.
    assert [report.numbers["samples"] for report in reports] == [100 + 4 * 13, 2 * 38 - 0, 100]


def test_a_round_with_fewer_workers_is_the_round_of_a_run_with_that_many() -> None:
    elastic, _ = changing({0: 2}, train__workers={"min": 2, "max": 4})
    fixed, _ = changing({}, train__workers=2)

    completed(elastic.train_round(0))
    completed(fixed.train_round(0))

    assert_same(clone(elastic.model.state_dict()), clone(fixed.model.state_dict()))


def test_shares_follow_the_measured_speed_until_workers_finish_together() -> None:
    made, pool = changing({}, {"worker 0": 9.0}, partition__balance="speed")

    for round_number in range(4):
        completed(made.train_round(round_number))

    assert pool.shapes[0] == [(4,)] * 4
    # Worker 0 takes 9 times as long for the same width, and time grows with its square: a third of the others' width.
    (first,), *others = pool.shapes[-1]
    assert first == 2
    assert {width for (width,) in others} <= {4, 5}


@pytest.mark.parametrize("power", [1, 2])
def test_balanced_shares_converge_if_time_grows_with_the_share_or_with_its_square(power: int) -> None:
    speeds = {"a": 1.0, "b": 3.0, "c": 10.0}
    shares = dict.fromkeys(speeds, 1.0)

    for _ in range(12):
        shares = rebalanced(shares, {name: share**power / speeds[name] for name, share in shares.items()})

    times = [share**power / speeds[name] for name, share in shares.items()]
    assert max(times) / min(times) < 1.01
    assert math.isclose(sum(shares.values()), 3.0)


def test_a_stalled_worker_retains_a_minimum_share_and_can_regain_more() -> None:
    shares = {"a": 1.0, "b": 1.0}
    for _ in range(20):
        shares = rebalanced(shares, {"a": 1.0, "b": 1e9})
    assert np.isclose(shares["b"] / shares["a"], SMALLEST)

    for _ in range(20):
        shares = rebalanced(shares, dict(shares))
    assert np.isclose(shares["b"] / shares["a"], 1.0, rtol=0.01)


def test_timing_noise_changes_no_share_and_a_new_worker_gets_the_mean() -> None:
    balance = SpeedBalance()
    assert balance.capacities(["a", "b"]) is None

    balance.note({"a": 1.0, "b": 1.1})
    assert balance.capacities(["a", "b"]) == (1.0, 1.0)

    balance.note({"a": 1.0, "b": 4.0})
    a, b, c = balance.capacities(["a", "b", "c"]) or ()
    assert a > c > b
    assert math.isclose(c, (a + b) / 2)


def test_a_range_of_workers_is_written_as_two_keys_and_reads_back() -> None:
    config = small_config(train__workers={"min": 2, "max": 4})

    assert (config.train.workers, config.train.min_workers, config.train.is_elastic) == (4, 2, True)
    assert validate(parse_yaml(dump_config(config), "again"), "again") == config


def test_the_default_of_min_returned_depends_on_the_pool_and_the_worker_range() -> None:
    assert min_returned(small_config()) == 4
    assert min_returned(small_config(train__workers={"min": 2, "max": 4})) == 2
    assert min_returned(small_config(train__workers=5, pool={"kind": "ray"})) == 3
    assert min_returned(small_config(pool={"kind": "ray", "min_returned": 1})) == 1


def test_with_a_worker_range_the_number_of_started_processes_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_for(seeded(NETWORKS["no batch norm"]), pool={"kind": "torchrun"}, train__workers={"min": 2, "max": 4})

    for started in (2, 3, 4):
        monkeypatch.setenv("WORLD_SIZE", str(started))
        assert for_world_size(job).config.train.workers == started
    for started in (1, 5):
        monkeypatch.setenv("WORLD_SIZE", str(started))
        with pytest.raises(ConfigError, match=naming(f"{started} processes", "train.workers", "WORLD_SIZE")):
            for_world_size(job)


def test_a_worker_needs_neither_initial_weights_nor_test_data() -> None:
    job = job_for(seeded(NETWORKS["two hidden layers, batch norm"]))

    lean = for_workers(job)

    assert lean.task.test_data is None
    assert Worker(lean, slot_of(lean, 1), torch.device("cpu"), assignments(lean)).module is not None
    with pytest.raises(AssertionError, match="initial weights"):
        lean.task.build()
