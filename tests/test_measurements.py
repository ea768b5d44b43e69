"""The table of measured numbers; each entry is sent, recorded, exported and shown."""

import json
import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest
from torch import Tensor

import ist.baselines.ddp
import ist.baselines.local_sgd
import ist.baselines.ranks
import ist.training.worker
from ist.baselines.ranks import RankRound, report_round
from ist.distributed.process_group import Membership
from ist.errors import RunFolderError
from ist.loops.part import completed
from ist.measurements import (
    MEASUREMENTS,
    Axis,
    Family,
    Measurement,
    Sample,
    check_round,
    check_worker,
    combined,
    worker_slots,
)
from ist.monitoring.exporters import scalars
from ist.monitoring.meter import Meter
from ist.monitoring.meter import worker_numbers as measured_by_workers
from ist.pools import torchrun
from ist.report.plots import axes_of_curves, phase_plot
from ist.report.table import table_columns, table_rows
from ist.runs.build import build_job
from ist.runs.execute import execute
from ist.storage.run_folder import create_run_folder
from ist.tensors import TensorSpec
from ist.transport.message import HEADER_BYTES, Header, Message, layout_of
from tests.conftest import ROOT, a_record, job_for, naming, round_numbers, small_config, worker_numbers
from tests.monitoring.test_watch import exporter_for
from tests.networks import NETWORKS, seeded
from tests.pools.test_ranks import Ranks, by_ranks

# The fields of a message's header in order, 8 bytes each. Another order would be another format.
HEADER = (
    "fingerprint", "round_number", "worker", "steps", "samples", "loss_sum", "compute_s", "cpu_s", "memory_bytes",
    "aside_s", "reuses_frozen", "non_finite", "inside_bytes", "process_memory_bytes",
)  # fmt: skip


def test_every_number_has_its_own_name_and_its_own_slot_within_the_header() -> None:
    names = [measured.name for measured in MEASUREMENTS]
    slots = [slot for slot, _ in worker_slots()]
    reserved = [HEADER.index(name) for name in ("fingerprint", "round_number", "worker", "reuses_frozen", "non_finite")]

    assert len(set(names)) == len(names)
    assert len({*slots, *reserved}) == len(slots) + len(reserved)
    assert max(slots) < HEADER_BYTES // 8
    for measured in MEASUREMENTS:
        assert (measured.slot is not None) == (measured.source == "worker"), measured.name
        assert measured.combine is None or measured.source == "worker", measured.name
        assert measured.meaning.endswith("."), measured.name


def test_the_bytes_of_a_header_are_frozen() -> None:
    layout = layout_of({"a": TensorSpec((3,), torch.float32)})
    numbers = worker_numbers(
        steps=4,
        samples=10,
        loss_sum=0.1,
        compute_s=2.5,
        cpu_s=1 / 3,
        memory_bytes=2**40 + 1,
        aside_s=0.25,
        inside_bytes=2**41,
        process_memory_bytes=2**41 + 1,
    )
    message = Message(layout)
    message.flat.fill_(255)  # bytes of an earlier message in the same buffer

    message.write_header(Header(7, 2, numbers, reuses_frozen=True))

    values = (layout.fingerprint, 7, 2, 4, 10, 0.1, 2.5, 1 / 3, 2**40 + 1, 0.25, 1, 0, 2**41, 2**41 + 1)
    assert len(values) == len(HEADER)
    assert bytes(message.flat[:HEADER_BYTES].tolist()) == struct.pack("<14d", *values) + bytes(HEADER_BYTES - 112)
    back = message.read_header(7, 2)
    assert back == Header(7, 2, numbers, reuses_frozen=True)
    assert {name: type(value) for name, value in back.numbers.items()} == {m.name: m.kind for _, m in worker_slots()}


@pytest.mark.parametrize("parallel", [True, False])
def test_the_numbers_of_workers_are_combined_to_those_of_the_round(parallel: bool) -> None:
    one = worker_numbers(steps=2, samples=5, compute_s=1.0, memory_bytes=70, aside_s=0.5, process_memory_bytes=700)
    other = worker_numbers(steps=3, samples=6, compute_s=4.0, memory_bytes=40, aside_s=1.0, process_memory_bytes=400)

    assert combined([one, other], parallel) == {
        "steps": 3, "samples": 11, "compute_s": 2.5, "memory_bytes": 70, "aside_s": 1.0 if parallel else 1.5,
        "inside_bytes": 0,
        "process_memory_bytes": 700,
    }  # fmt: skip


def test_a_number_that_is_missing_or_not_in_the_table_is_an_error_that_names_it() -> None:
    numbers = worker_numbers()

    with pytest.raises(AssertionError, match=naming("['cpu_s'] of a worker", "ist/measurements.py")):
        check_worker({name: value for name, value in numbers.items() if name != "cpu_s"})
    with pytest.raises(AssertionError, match=naming("['volts'] of a worker", "ist/measurements.py")):
        Header(0, 0, {**numbers, "volts": 3.0})
    with pytest.raises(AssertionError, match=naming("['volts'] of a round", "ist/measurements.py")):
        check_round(round_numbers([numbers], volts=3.0))


ENERGY = Measurement(
    name="energy_j", unit="J", kind=float, source="worker", slot=14, combine="sum", by_worker=True, over_rounds="total",
    meaning="Energy that all workers together have used.",
    tensorboard="energy/joules",
    prometheus=Sample(Family("ist_energy_joules", "counter", "Energy of all workers together.")),
    axis=Axis("joules of all workers", "log"), column="energy",
)  # fmt: skip
STUCK = Measurement(
    name="stuck_s", unit="s", kind=float, source="worker", slot=15, combine="elapsed", over_rounds="latest",
    meaning="Seconds of the round in which a worker waited for its data.", phase="waiting for data",
    prometheus=Sample(Family("ist_stuck_seconds", "counter", "Seconds of waiting for data.")),
)  # fmt: skip


@pytest.fixture
def energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add two numbers: their entries in the table, and the line that measures them."""
    table = (*MEASUREMENTS, ENERGY, STUCK)

    def measure(**others: Any) -> dict[str, float]:
        return {**measured_by_workers(**others), "energy_j": 2.5, "stuck_s": 0.25}

    for name, module in list(sys.modules.items()):
        for attribute, value in (("MEASUREMENTS", table), ("worker_numbers", measure)):
            if name.startswith("ist.") and hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, value)


@pytest.mark.usefixtures("energy")
def test_a_new_number_is_recorded_and_shown_everywhere_by_one_entry_in_the_table(tmp_path: Path) -> None:
    config = small_config()
    folder = create_run_folder(config, tmp_path / "run")
    execute(build_job(config), folder, progress=False)
    records, result = folder.records(), folder.result()
    exporter = exporter_for(history=records)

    assert [record["energy_j"] for record in records] == [10.0, 20.0, 30.0, 40.0]
    assert records[0]["energy_j_by_worker"] == [2.5] * 4
    assert (result["energy_j"], result["stuck_s"]) == (40.0, 1.0)
    assert scalars(records[1])["energy/joules"] == 20.0
    served = generate_latest(exporter.registry).decode().splitlines()
    assert {"ist_energy_joules_total 40.0", "ist_stuck_seconds_total 4.0"} <= set(served)
    assert "waiting for data" in phase_plot({"run": records})
    assert ("energy_j", "joules of all workers", "log") in axes_of_curves()
    assert dict(zip(table_columns([result]), table_rows([result])[0], strict=True))["energy"] == "40.0"


@pytest.mark.usefixtures("energy")
def test_a_new_number_is_checked_when_a_run_is_read_and_may_be_missing_in_older_runs(tmp_path: Path) -> None:
    folder = create_run_folder(small_config(), tmp_path / "run")
    metrics = folder.path / "metrics.jsonl"

    metrics.write_text(json.dumps(a_record(0)) + "\n")
    assert "energy_j" not in folder.records()[0]
    exporter_for(first_round=1, history=folder.records())
    metrics.write_text(json.dumps(a_record(0, energy_j="much")) + "\n")
    with pytest.raises(RunFolderError, match=naming("line 1", "'energy_j'")):
        folder.records()


@pytest.mark.usefixtures("energy")
def test_a_new_number_is_sent_by_ranks_that_train_subnets(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, model = Ranks(), seeded(NETWORKS["no batch norm"])
    monkeypatch.setattr(torchrun, "dist", ranks)
    job = job_for(model, train__workers=3, pool__kind="torchrun")
    coordinator, _ = by_ranks(ranks, job, model, spare=1)

    report = completed(coordinator.train_round(0))

    assert report.numbers["energy_j"] == 7.5
    assert [of_worker["energy_j"] for of_worker in report.by_worker] == [2.5] * 3


@pytest.mark.usefixtures("energy")
def test_a_new_number_is_exchanged_by_ranks_that_train_the_full_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(slots: list[Tensor], own: Tensor) -> None:
        rows.append(own)
        for slot, row in zip(slots, rows if len(rows) == 2 else [own, own], strict=True):
            slot.copy_(row)

    rows: list[Tensor] = []
    monkeypatch.setattr(ist.baselines.ranks.dist, "all_gather", gather)
    job = job_for(seeded(NETWORKS["no batch norm"]), train__workers=2)
    for rank, joules in enumerate((1.0, 4.0)):
        numbers = worker_numbers(steps=3, samples=5, energy_j=joules)
        own = RankRound(numbers, finite=True, sent_bytes=64.0 + rank, transfers_s=[0.5, 0.25])
        meter = Meter()
        report = report_round(job, Membership(rank, 2, torch.device("cpu"), "gloo"), meter, own, 0)

    assert report.numbers["energy_j"] == 5.0
    assert (report.numbers["samples"], report.numbers["exchange_s"]) == (10, 0.75)
    assert [of_rank["energy_j"] for of_rank in report.by_worker] == [1.0, 4.0]
    assert dict(meter.sent) == {0: 64, 1: 65}


@pytest.mark.usefixtures("energy")
def test_the_documentation_lists_a_new_number_and_the_dashboard_shows_it() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "measurements.py"))
    assert "| `energy_j` | J | total | Energy that all workers together have used. |" in written["page"]()
    before = json.loads((ROOT / "docker" / "grafana-dashboard.json").read_text())
    panels = written["dashboard"](before)["panels"]
    assert len(panels) == len(before["panels"]) + 2
    assert "rate(ist_energy_joules_total[" in panels[-2]["targets"][0]["expr"]
    assert panels[-1]["targets"][0]["expr"].startswith("rate(ist_stuck_seconds_total[")


def test_the_documentation_is_up_to_date() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "measurements.py"))

    assert (ROOT / "docs" / "measurements.md").read_text() == written["page"](), "run: python docs/measurements.py"
