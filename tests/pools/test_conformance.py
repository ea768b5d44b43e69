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
from ist.transport.traffic import round_bytes
from tests.conftest import assert_same, run_forked_ranks
from tests.pools.scenario import FEW_BUFFERS, SCENARIOS, WORKERS, job, run

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


QUICK_DEDICATED = ("batch norm, reset", "own data", "by a step function, in parts, clipped", *FEW_BUFFERS)
"""One scenario for every kind of message: a dedicated coordinator changes the numbers of ranks, but no message."""

QUICK_SHARDED = (
    "batch norm, reset", "carried Adam, uneven", "overlapping shares", "quantized, error feedback",
    "stages, outer momentum, averaged", "scaled updates", "frozen, quantized", "frozen rest, frozen parameters",
)  # fmt: skip
"""One scenario for every kind of tensor in the store, and of arithmetic on it."""

QUICK = {"trains": tuple(SCENARIOS), "dedicated": QUICK_DEDICATED, "sharded": QUICK_SHARDED}
REFUSED = {("sharded", name) for name in SCENARIOS if name.startswith("chosen scale")}
BY_RANKS = [
    pytest.param(kind, name, marks=[] if name in quick else pytest.mark.system)
    for kind, quick in QUICK.items()
    for name in SCENARIOS
    if (kind, name) not in REFUSED
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of ranks, in a folder for each kind of coordinator, and one for a sharded store."""
    folder, program = tmp_path_factory.mktemp("ranks"), "tests/pools/scenario.py"
    for kind in QUICK:
        (folder / kind).mkdir()
    run_forked_ranks(*((num_ranks(kind), program, folder / kind, kind, "cpu", *names) for kind, names in QUICK.items()))
    return folder


def num_ranks(kind: str) -> int:
    return WORKERS + (kind == "dedicated")


@pytest.fixture(scope="module")
def others(ranks: Path) -> None:
    for kind, quick in QUICK.items():
        if rest := [name for name in SCENARIOS if name not in quick and (kind, name) not in REFUSED]:
            run_forked_ranks((num_ranks(kind), "tests/pools/scenario.py", ranks / kind, kind, "cpu", *rest))


@pytest.fixture
def torchrun(request: pytest.FixtureRequest, ranks: Path, coordinator: str, name: str) -> Outcome:
    """The outcome of a scenario on ranks."""
    if name not in QUICK[coordinator]:
        request.getfixturevalue("others")
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
    for key in (*keys, "logged", "merge_scale"):
        assert [record.get(key) for record in found_history] == [record.get(key) for record in history]


@pytest.mark.procs
@pytest.mark.parametrize(("coordinator", "name"), BY_RANKS)
def test_the_bytes_counted_are_the_bytes_of_the_formula(torchrun: Outcome, coordinator: str, name: str) -> None:
    _, history = torchrun
    where = {"store": "sharded"} if coordinator == "sharded" else {"coordinator": coordinator}
    made, _ = job(name, pool={"kind": "torchrun", "device": "cpu", **where})

    partition = made.config.partition
    varies = sizes_vary(partition) or partition.strategy == "blocks" or bool(made.config.recipe.stages)
    varies |= coordinator == "sharded"  # the padding of pieces depends on the neurons

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
    held = assignments(made)
    before = held.of(round_number - 1) if round_number else [None] * WORKERS
    rest = held.has_rest(round_number), round_number > 0 and held.has_rest(round_number - 1)
    return [
        round_bytes(made.config, made.split, worker, neurons, earlier, round_number, *rest)
        for worker, (neurons, earlier) in enumerate(zip(held.of(round_number), before, strict=True))
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
