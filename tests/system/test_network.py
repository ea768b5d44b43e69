"""Identity 6 against the operating system: what the meter counts is what the interfaces count, up to framing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from benchmarks.overhead import exchange
from ist.launch.lab_hosts import Host, hosts, run_everywhere, run_ranks, why_not
from ist.storage.checkpoint import read_tensors
from tests.conftest import ROOT, assert_same, config_tree

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(400),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

# Ethernet, IP and TCP headers are 66 bytes of at most 1,514, acknowledgements 66 bytes for every one or two frames;
# the kernel may hand larger pieces to a veth. Rendezvous and start-up are a few hundred kilobytes.
FRAMING = 1.09


def train(where: list[Host], tmp_path: Path, **changes: Any) -> list[dict[str, Any]]:
    tree = config_tree(
        pool={"kind": "torchrun", "device": "cpu", "coordinator": "dedicated"},
        model__args={"widths": [64, 1200, 1200, 10]},
        train__workers=len(where) if changes.get("method") == "ddp" else len(where) - 1,
        **changes,
    )
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "ist", "train", str(config), "--run-dir", str(tmp_path / "run")]
    run_ranks(where, command, timeout_s=300)
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    return read_tensors(run / "model.safetensors")[0]


def inline_run(tree: dict[str, Any], tmp_path: Path) -> Path:
    config, run = tmp_path / "alone.yaml", tmp_path / "alone"
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "ist", "train", str(config), "--run-dir", str(run)]
    subprocess.run(command, check=True, capture_output=True)
    return run


def test_the_meter_counts_what_the_coordinators_interface_counts(tmp_path: Path) -> None:
    with hosts(4) as where:
        before = where[0].counters()
        counted = train(where, tmp_path, train__rounds=12)[-1]["sent_bytes"]
        after = where[0].counters()

    crossed = sum(after.values()) - sum(before.values())
    assert counted > 20e6
    assert 1 <= crossed / counted < FRAMING


def test_the_meter_counts_what_all_interfaces_count_under_data_parallel(tmp_path: Path) -> None:
    with hosts(3) as where:
        before = [host.counters()["tx"] for host in where]
        counted = train(where, tmp_path, method="ddp", train__rounds=3)[-1]["sent_bytes"]
        after = [host.counters()["tx"] for host in where]

    crossed = sum(after) - sum(before)
    assert counted > 100e6
    assert 1 <= crossed / counted < FRAMING


def test_training_over_several_hosts_ends_in_the_weights_of_one_process(tmp_path: Path) -> None:
    with hosts(3) as where:
        train(where, tmp_path, train__rounds=3)
    alone = yaml.safe_load((tmp_path / "job.yaml").read_text()) | {"pool": {"kind": "inline", "device": "cpu"}}

    assert_same(weights(tmp_path / "run"), weights(inline_run(alone, tmp_path)))


def test_the_launcher_for_several_machines_trains_on_two(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(config_tree(pool={"kind": "torchrun", "device": "cpu"}, train__workers=4)))
    command = [str(ROOT / "launch" / "torchrun.sh"), str(config), "--run-dir", str(tmp_path / "run")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    with hosts(2) as where:
        shared = {"HEAD": f"{where[0].address}:29500", "NODES": "2", "PER_NODE": "2", "PATH": path}
        environments = [{**shared, "LOCAL_ADDR": host.address} for host in where]
        run_everywhere(where, command, environments, timeout_s=200)

    assert (tmp_path / "run" / "result.json").exists()
    alone = yaml.safe_load(config.read_text()) | {"pool": {"kind": "inline", "device": "cpu"}}
    assert_same(weights(tmp_path / "run"), weights(inline_run(alone, tmp_path)))


def test_exchange_fills_a_slow_link(tmp_path: Path) -> None:  # noqa: ARG001
    assert exchange(width=1500, rounds=5)["line_rate_share"] > 0.9
