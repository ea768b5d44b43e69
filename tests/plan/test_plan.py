"""Plans: bytes and memory by formulas, seconds by a model of links, and the command."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _should_compress

from ist.cli import main as cli
from ist.config.methods import (
    METHODS,
    Baseline,
    ParameterSize,
    int8_bytes,
    planned_methods,
    powersgd_bytes,
    ring_bytes,
    trained_sizes,
)  # fmt: skip
from ist.config.runtime import Link
from ist.errors import ConfigError
from ist.plan import measure
from ist.plan.buckets import buckets
from ist.plan.measure import StepCost, WholeCost, measure_coordinator, measure_subnet, measure_whole
from ist.plan.predict import ACKNOWLEDGED_PAYLOAD, FRAME_PAYLOAD, collective_seconds, ist_seconds, transfer_s
from ist.plan.request import Hosts, parse_request
from ist.runs.build import build_job
from ist.runs.split import split_of
from ist.subnet.job import assignments, remote_workers, with_workers
from ist.transport.traffic import message_bytes
from tests.baselines.program import Mixed
from tests.conftest import config_tree, job_for, naming, small_config
from tests.networks import seeded

CPU = torch.device("cpu")
COLLECTIVES = {name: spec.collective for name, spec in METHODS.items() if spec.collective is not None}
SIZES = [ParameterSize(shape) for shape in ((100, 50), (3, 2), (16, 3, 3, 3), (10,))]
ONE_WAY_S, BOTH_WAYS_S = (8 / payload / 100 for payload in (FRAME_PAYLOAD, ACKNOWLEDGED_PAYLOAD))
"""Seconds of a million bytes over 100 Mbit/s in one direction, and with the same amount in the other direction."""


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_MOST", 3)


def whole(shapes: Any = ((500, 500),), left_s: Any = (0.0,), step_s: float = 0.01, pass_s: float = 0.0) -> WholeCost:
    return WholeCost(StepCost(step_s, 10**6, 0, 0), [ParameterSize(shape) for shape in shapes], left_s, pass_s)


def near(hosts: float = 100, cores: int | None = None) -> Hosts:
    return Hosts(Link(hosts, hosts), cores, hop_s=0.0)


def test_every_method_can_be_planned() -> None:
    assert planned_methods() == tuple(METHODS)
    assert planned_methods()[0] == "ist"


def test_a_rank_of_a_ring_of_four_sends_one_and_a_half_times_the_payload() -> None:
    assert ring_bytes(1000, 4) == 1500
    assert ring_bytes(1000, 1) == 0


def test_bytes_of_every_method_by_hand() -> None:
    parameters = 4 * (5000 + 6 + 432 + 10)
    low_rank = 4 * (100 + 50) + 4 * 6 + 4 * (16 + 27) + 4 * 10
    quantised = (5000 + 6 + 432 + 10) * (1 + 4 / 1024)

    found = {name: c.rank_bytes(SIZES, num_workers=2, local_steps=10) for name, c in COLLECTIVES.items()}

    assert found == {
        "ddp": 10 * parameters,
        "ddp_fp16": 5 * parameters,
        "ddp_bf16": 5 * parameters,
        "powersgd": 10 * low_rank,
        "local_sgd": parameters,
        "diloco": parameters,
        "diloco_int8": quantised,
    }
    assert int8_bytes(SIZES) == quantised


def test_bytes_follow_the_dtypes_of_the_parameters_where_nothing_is_cast() -> None:
    """Local SGD and DiLoCo average one vector, of the widest dtype; casts to 16 and 8 bits are the same for all."""
    mixed = [ParameterSize((4, 4), 8), ParameterSize((10,), 2)]

    found = {name: c.rank_bytes(mixed, num_workers=2, local_steps=10) for name, c in COLLECTIVES.items()}

    whole = 10 * (16 * 8 + 10 * 2)
    assert found == {
        "ddp": whole,
        "ddp_fp16": 10 * 26 * 2,
        "ddp_bf16": 10 * 26 * 2,
        "powersgd": whole,
        "local_sgd": 26 * 8,
        "diloco": 26 * 8,
        "diloco_int8": 26 * (1 + 4 / 1024),
    }


def test_inspect_counts_the_gradients_of_a_network_of_two_dtypes_as_plan_does() -> None:
    model = seeded(Mixed)
    job = job_for(model, train__workers=2)

    shown = split_of(job).inspection.bytes_per_round

    assert shown.ddp == 2 * job.config.train.local_steps * sum(parameter.nbytes for parameter in model.parameters())


def test_powersgds_first_steps_send_whole_gradients() -> None:
    whole, low_rank = (COLLECTIVES[name].rank_bytes for name in ("ddp", "powersgd"))

    assert low_rank(SIZES, 2, 10, whole_steps=2) == whole(SIZES, 2, 2) + low_rank(SIZES, 2, 8)


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("shape", [(100, 50), (3, 2), (4, 4), (16, 3, 3, 3), (1, 1000), (10,)])
def test_powersgd_compresses_what_torchs_hook_compresses(shape: tuple[int, ...], rank: int) -> None:
    rows, columns = shape[0], torch.zeros(shape).view(shape[0], -1).shape[1]
    pays, before, after = _should_compress(rows, columns, min(rank, rows, columns), 2)

    assert powersgd_bytes([ParameterSize(shape)], Baseline(powersgd_rank=rank)) == 4 * (after if pays else before)


def test_a_plan_for_fewer_workers_has_the_rounds_of_their_longer_epochs() -> None:
    job = build_job(small_config(train__workers=4, train__rounds=None, train__epochs=2))

    fewer = with_workers(job, 2)

    steps = 2 * fewer.schedule.sampler.steps_per_epoch
    assert steps > 2 * job.schedule.sampler.steps_per_epoch
    assert fewer.schedule.total_steps == steps


@pytest.mark.parametrize("coordinator", ["trains", "dedicated"])
def test_bytes_are_those_that_inspect_shows(coordinator: str) -> None:
    job = build_job(small_config(pool={"kind": "torchrun", "device": "cpu", "coordinator": coordinator}))
    shown = split_of(job).inspection.bytes_per_round

    sent = sum(
        sum(message_bytes(job.config, job.split, job.schedule, assignments(job), worker))
        for worker in remote_workers(job.config)
    )
    all_reduced = 4 * COLLECTIVES["ddp"].rank_bytes(
        trained_sizes(job.split.template.parameters()), 4, job.config.train.local_steps
    )

    assert sent == shown.ist
    assert all_reduced == shown.ddp


def test_buckets_are_closed_as_data_parallel_training_closes_them() -> None:
    mega = 1 << 20

    assert buckets([mega / 2, mega, 20 * mega, 4 * mega, 2 * mega, 1]) == [range(2), range(2, 5), range(5, 6)]
    assert buckets([100.0, 100.0]) == [range(2)]


def test_a_link_slower_than_the_lab_makes_can_be_planned() -> None:
    assert parse_request("2mbit/0.5mbit").hosts.link == Link(2, 0.5)
    with pytest.raises(ConfigError, match=naming("'0mbit'", "0.001mbit to 10gbit")):
        parse_request("0mbit")


def test_a_link_carries_payload_in_frames() -> None:
    assert transfer_s(1448 * 1000, rate_mbit=1514 * 8 / 1000) == pytest.approx(1)


def test_an_exchange_once_a_round_follows_the_local_steps() -> None:
    compute_s, exchange_s = collective_seconds(COLLECTIVES["local_sgd"], whole(), 4, local_steps=10, hosts=near())

    assert compute_s == pytest.approx(0.1)
    assert exchange_s == pytest.approx(1.5 * BOTH_WAYS_S)


def test_an_exchange_every_step_hides_behind_what_is_left_of_the_backward_pass() -> None:
    late, early = whole(), whole(left_s=(0.05,))

    _, late_s = collective_seconds(COLLECTIVES["ddp"], late, 2, local_steps=10, hosts=near())
    _, early_s = collective_seconds(COLLECTIVES["ddp"], early, 2, local_steps=10, hosts=near())

    assert late_s == pytest.approx(10 * BOTH_WAYS_S)
    assert early_s == pytest.approx(10 * (BOTH_WAYS_S - 0.05))


def test_a_bucket_waits_for_the_one_before() -> None:
    two = whole(shapes=((1000, 500), (500, 500)), left_s=(0.1, 0.0))

    _, exchange_s = collective_seconds(COLLECTIVES["ddp"], two, 2, local_steps=1, hosts=near())

    assert exchange_s == pytest.approx(3 * BOTH_WAYS_S - 0.1)


def test_memory_passes_and_hops_take_their_time() -> None:
    alone = collective_seconds(COLLECTIVES["diloco"], whole(), 4, 10, near())[1]

    hops = collective_seconds(COLLECTIVES["diloco"], whole(), 4, 10, replace(near(), hop_s=0.5))[1]
    passes = collective_seconds(COLLECTIVES["diloco"], whole(pass_s=1.0), 4, 10, near())[1]

    assert hops - alone == pytest.approx(6 * 0.5)
    assert passes - alone == pytest.approx(COLLECTIVES["diloco"].passes)


def test_the_coordinators_link_carries_all_messages_and_a_workers_its_own() -> None:
    messages = [(10**6, 2 * 10**6)] * 3
    wide_up = Hosts(Link(up_mbit=300, down_mbit=100), hop_s=0.0)

    compute_s, symmetric_s = ist_seconds(messages, 0.01, 3, 10, near())
    _, asymmetric_s = ist_seconds(messages, 0.01, 3, 10, wide_up)

    assert compute_s == pytest.approx(0.1)
    assert symmetric_s == pytest.approx((3 + 6) * ONE_WAY_S)
    assert asymmetric_s == pytest.approx((1 + 6) * ONE_WAY_S)


def test_workers_share_cores_and_the_coordinators_own_begins_early() -> None:
    messages = [(10**6, 10**6)] * 4

    dedicated, _ = ist_seconds(messages, 1.0, 4, 10, near(cores=2))
    trains, _ = ist_seconds(messages, 1.0, 5, 10, near(cores=2))

    assert dedicated == pytest.approx(10 * 4 / 2)
    assert trains == pytest.approx(10 * (4 + 1 - 4 * ONE_WAY_S / 10) / 2)
    assert collective_seconds(COLLECTIVES["ddp"], whole(), 8, 10, near(cores=2))[0] == pytest.approx(8 / 2 * 10 * 0.01)


@pytest.mark.parametrize("method", COLLECTIVES)
def test_seconds_fall_with_the_rate_and_rise_with_the_parameters(method: str) -> None:
    larger = whole(shapes=((800, 800),))

    slow, fast = (sum(collective_seconds(COLLECTIVES[method], whole(), 8, 5, near(rate))) for rate in (10, 1000))

    assert slow > fast > 5 * 0.01
    assert sum(collective_seconds(COLLECTIVES[method], larger, 8, 5, near(10))) > slow


def test_measured_steps_know_the_order_of_gradients_and_what_memory_holds() -> None:
    job = build_job(small_config())
    parameters = 4 * sum(p.numel() for p in job.split.template.parameters())
    before = torch.get_rng_state()

    found = measure_whole(job, CPU)

    assert torch.equal(torch.get_rng_state(), before)
    assert found.step.parameter_bytes == found.step.optimizer_bytes == parameters  # momentum
    assert set(found.sizes[:2]) == {ParameterSize((10, 20)), ParameterSize((10,))}
    assert list(found.left_s) == sorted(found.left_s, reverse=True)
    assert found.step.activation_bytes >= 4 * 16 * (24 + 20)
    assert min(found.step.step_s, found.pass_s) > 0


def test_a_workers_part_is_measured_as_small_as_it_is() -> None:
    job = build_job(small_config())
    submodel = job.split.module(assignments(job).of(0)[0], torch.device("meta"))

    found = measure_subnet(job, 0, CPU)
    coordinator = measure_coordinator(job, CPU)

    assert found.parameter_bytes == 4 * sum(p.numel() for p in submodel.parameters())
    assert found.optimizer_bytes == found.parameter_bytes
    assert min(found.step_s, coordinator.cut_s, coordinator.merge_s) > 0


def test_carried_optimizer_state_is_part_of_the_message() -> None:
    job = build_job(small_config(train__optimizer_state="carried"))

    assert measure_subnet(job, 0, CPU).optimizer_bytes == 0


@pytest.fixture
def plan(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def run(*arguments: str | Path, **changes: Any) -> tuple[int, str, str]:
        config = tmp_path / "job.yaml"
        config.write_text(yaml.safe_dump(config_tree(**changes)))
        monkeypatch.setattr(sys, "argv", ["ist", "plan", str(config), *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capfd.readouterr()

    return run


def test_the_command_prints_json_that_agrees_with_the_formulas(plan: Any) -> None:
    code, out, _ = plan("--link", "20mbit/100mbit", "--workers", "4,2", "--methods", "ist,ddp", "--json")
    found = json.loads(out)

    shown = split_of(build_job(small_config())).inspection.bytes_per_round
    rows = {(row["workers"], row["method"]): row for row in found["predictions"]}
    assert code == 0
    assert found["link"] == {"up_mbit": 20, "down_mbit": 100}
    assert found["simulation"] is None
    assert list(rows) == [(4, "ist"), (4, "ddp"), (2, "ist"), (2, "ddp")]
    assert (rows[4, "ist"]["sent_bytes"], rows[4, "ddp"]["sent_bytes"]) == (shown.ist, shown.ddp)
    for row in rows.values():
        phases = row["compute_s"] + row["exchange_s"] + row["coordinate_s"]
        assert row["round_s"] == pytest.approx(phases)
        assert row["memory_bytes"] > 0


@pytest.mark.system
def test_a_page_shows_how_far_the_simulation_goes_and_why_it_ends(plan: Any, tmp_path: Path) -> None:
    code, out, _ = plan("--link", "100mbit", "--methods", "ist", "--report", tmp_path / "plan.html")

    text = (tmp_path / "plan.html").read_text()
    assert code == 0
    assert "4 workers, rounds of 3 steps" in out
    assert re.search(naming("ist: ", "32 workers"), out.replace("\n", " "))
    assert re.search(naming("24 neurons", "32 workers"), text)
    assert text.count("<svg") == 1
    outside = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>#]+)", text)
    assert outside == []


def test_overrides_of_a_method_count_for_it_alone(plan: Any) -> None:
    overrides = {"methods": ["ist", "ddp"], "overrides": {"ddp": {"train.local_steps": 7}}}

    _, out, _ = plan("--link", "1gbit", "--methods", "ist,ddp", "--json", compare=overrides)

    steps = {row["method"]: row["local_steps"] for row in json.loads(out)["predictions"]}
    assert steps == {"ist": 3, "ddp": 7}


BAD: dict[str, tuple[Any, ...]] = {
    "a link without a unit": ({}, ["--link", "100"], "'100'", "'100mbit'"),
    "no worker": ({}, ["--workers", "2,0"], "--workers '2,0'", "2,4,8"),
    "a misspelt method": ({}, ["--methods", "dpp"], "--methods", "'dpp'", "'ddp'"),
    "more workers than neurons": ({}, ["--workers", "2,21"], "'linear_2'", "20", "21", "train.workers"),
    "more workers than samples": ({}, ["--methods", "ddp", "--workers", "5000"], "5000", "train.workers"),
    "capacities for another number of workers": (
        {"partition": {"capacities": [2, 1, 1, 1]}}, ["--workers", "2,4"], "'partition.capacities'", "4", "train.workers",
    ),
    "a batch of one for a batch norm": (
        {}, ["--methods", "ddp", "--workers", "1000"], "1000", "train.workers", "batch of 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_explained(plan: Any, case: str) -> None:
    changes, arguments, *parts = BAD[case]

    code, out, err = plan(*(["--link", "1gbit"] if "--link" not in arguments else []), *arguments, **changes)

    assert (code, out) == (2, "")
    assert re.search(naming(*parts), err)
