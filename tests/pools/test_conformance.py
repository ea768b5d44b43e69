"""Identities 5 and 6 on every pool: the same weights, and the bytes of the formula."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ist.runs.split import split_of
from ist.storage.checkpoint import read_tensors
from ist.subnet.job import Job, assignments
from ist.subnet.partition import sizes_vary
from ist.transport.endpoints import down_bytes, message_layouts
from ist.transport.frozen_parameters import frozen_bytes
from tests.conftest import assert_same, run_forked_ranks
from tests.pools.scenario import SCENARIOS, WORKERS, job, run

Outcome = tuple[dict[str, Tensor], list[dict[str, Any]]]


def outcome(folder: Path, name: str) -> Outcome:
    slug = name.replace(" ", "-").replace(",", "")
    return read_tensors(folder / f"{slug}.safetensors")[0], json.loads((folder / f"{slug}.json").read_text())


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inline")
    for name in SCENARIOS:
        run(name, folder)
    return folder


QUICK_DEDICATED = (
    "batch norm, reset", "carried Adam, uneven", "varying shares", "quantized, error feedback", "kept state, full width, global shuffle",
    "frozen, quantized", "own data", "by a step function, in parts, clipped",
)  # fmt: skip
"""One scenario for every kind of message: a dedicated coordinator changes the numbers of ranks, but no message."""

BY_RANKS = [("trains", name) for name in SCENARIOS] + [
    pytest.param("dedicated", name, marks=[] if name in QUICK_DEDICATED else pytest.mark.system) for name in SCENARIOS
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of ranks, in a folder for each kind of coordinator."""
    folder, program = tmp_path_factory.mktemp("ranks"), "tests/pools/scenario.py"
    for coordinator in ("trains", "dedicated"):
        (folder / coordinator).mkdir()
    run_forked_ranks(
        (WORKERS, program, folder / "trains", "trains"),
        (WORKERS + 1, program, folder / "dedicated", "dedicated", "cpu", *QUICK_DEDICATED),
    )
    return folder


@pytest.fixture(scope="module")
def others_dedicated(ranks: Path) -> None:
    rest = [name for name in SCENARIOS if name not in QUICK_DEDICATED]
    run_forked_ranks((WORKERS + 1, "tests/pools/scenario.py", ranks / "dedicated", "dedicated", "cpu", *rest))


@pytest.fixture
def torchrun(request: pytest.FixtureRequest, ranks: Path, coordinator: str, name: str) -> Outcome:
    """The outcome of a scenario on ranks."""
    if coordinator == "dedicated" and name not in QUICK_DEDICATED:
        request.getfixturevalue("others_dedicated")
    return outcome(ranks / coordinator, name)


@pytest.mark.procs
@pytest.mark.parametrize(("coordinator", "name"), BY_RANKS)
def test_torchrun_and_inline_end_with_identical_weights(
    inline: Path, torchrun: Outcome, coordinator: str, name: str
) -> None:
    expected, history = outcome(inline, name)
    found, found_history = torchrun

    assert_same(found, expected)
    keys = ("loss", "accuracy", "samples", "steps", *(("sent_bytes",) if coordinator == "trains" else ()))
    for key in keys:
        assert [record[key] for record in found_history] == [record[key] for record in history]
    assert [record.get("logged") for record in found_history] == [record.get("logged") for record in history]


@pytest.mark.procs
@pytest.mark.parametrize(("coordinator", "name"), BY_RANKS)
def test_the_bytes_counted_are_the_bytes_of_the_formula(torchrun: Outcome, coordinator: str, name: str) -> None:
    _, history = torchrun
    made, _ = job(name, pool__kind="torchrun", pool__coordinator=coordinator)

    partition = made.config.partition
    varies = sizes_vary(partition) or partition.strategy == "blocks" or bool(made.config.recipe.stages)

    first = 1 if coordinator == "trains" else 0  # worker 0 is then rank 0: its subnet crosses no link
    for record in history:
        expected = message_bytes(made, record["round"])
        assert record["bytes_to_worker"][first:] == [sent for sent, _ in expected[first:]]
        assert record["bytes_from_worker"][first:] == [returned for _, returned in expected[first:]]
        assert sum(record["bytes_to_worker"][:first]) == 0
    for before, after in pairwise(history):
        grown = after["sent_bytes"] - before["sent_bytes"]
        assert grown == sum(map(sum, message_bytes(made, after["round"])[first:]))
        assert varies or grown == split_of(made).inspection.bytes_per_round.ist


def message_bytes(made: Job, round_number: int) -> list[tuple[int, int]]:
    """The bytes to and from each worker in a round."""
    split, exchange, held = made.split, made.config.exchange, assignments(made)
    all_layouts = [message_layouts(split, exchange, cut) for cut in held.cuts(round_number)]
    before = held.of(round_number - 1) if round_number else [None] * WORKERS
    beside = [frozen_bytes(split, exchange, *both) for both in zip(held.of(round_number), before, strict=True)]
    return [
        (down_bytes(made.split, layouts, round_number) + b, layouts.up.nbytes)
        for layouts, b in zip(all_layouts, beside, strict=True)
    ]


@pytest.mark.parametrize("name", SCENARIOS)
def test_inline_counts_what_the_same_job_would_send_as_processes(inline: Path, name: str) -> None:
    _, history = outcome(inline, name)
    made, _ = job(name)

    # Worker 0 would be rank 0: its subnet crosses no link.
    assert history[1]["sent_bytes"] - history[0]["sent_bytes"] == sum(map(sum, message_bytes(made, 1)[1:]))
    assert history[1]["bytes_to_worker"] == [0, *(sent for sent, _ in message_bytes(made, 1)[1:])]


def test_inline_counts_every_worker_if_the_coordinator_is_dedicated(tmp_path: Path) -> None:
    name = "batch norm, reset"
    run(name, tmp_path, pool__coordinator="dedicated")
    _, history = outcome(tmp_path, name)

    assert history[1]["sent_bytes"] - history[0]["sent_bytes"] == sum(map(sum, message_bytes(job(name)[0], 1)))


def test_the_formula_is_the_papers_plus_headers_and_padding() -> None:
    """Per direction: |W_inner| / n + |W_first| + |W_last| + hidden vectors + n * shared, of 4 bytes each."""
    made, _ = job("batch norm, reset", pool__coordinator="dedicated")
    shapes = {"first": 16 * 12, "inner": 8 * 16, "last": 5 * 8, "hidden vectors": 3 * (16 + 8), "shared": 5}
    values = shapes["first"] + shapes["last"] + shapes["hidden vectors"] + WORKERS * shapes["shared"]
    # 3 workers do not divide 16 and 8: the inner blocks are 6x3, 5x3 and 5x2.
    values += 6 * 3 + 5 * 3 + 5 * 2
    num_tensors = 10

    found = split_of(made).inspection.bytes_per_round.ist / 2 - WORKERS * 64

    assert 0 <= found - 4 * values < WORKERS * num_tensors * 64


def test_wide_layers_travel_with_under_one_percent_of_overhead() -> None:
    from ist.runs.build import build_job
    from tests.conftest import small_config

    made = build_job(
        small_config(model__args={"widths": [64, 1024, 1024, 10]}, train__workers=4, pool__coordinator="dedicated")
    )
    inner, ends, vectors, shared = 1024 * 1024, 64 * 1024 + 10 * 1024, 6 * 1024, 10

    found = split_of(made).inspection.bytes_per_round.ist

    values = 2 * (inner / 4 + ends + vectors + 4 * shared)
    assert 1 <= found / (4 * values) < 1.01
