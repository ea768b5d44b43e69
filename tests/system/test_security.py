"""Strangers at the ports of a run, ranks without its secret, and public interfaces: with real processes and
networks."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ist.distributed.secret import new_secret
from ist.errors import LabError
from ist.launch.lab_hosts import Host, hosts, run_everywhere, why_not
from tests.conftest import ROOT, assert_same, config_tree, naming
from tests.system.test_network import inline_run, weights

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
namespaces = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

IST = [sys.executable, "-m", "ist"]
PORT = "29511"
# What a stranger may see of a rank whose place it took: gloo's own headers and a challenge, no subnet.
FEW_BYTES = 1000

# Rank 1 is late for the first group: a stranger has four seconds to take its place. A peer has fewer seconds to prove
# itself than in a run, where a slow machine must not be taken for a stranger.
IMPATIENT = """
import sys, time
from ist.cli.main import main
from ist.distributed import process_group as group
group._PROOF_TIMEOUT_S = 10.0
first, delays = group._init_group, [float(sys.argv.pop(1))]
def late(*arguments):
    time.sleep(delays.pop() if delays else 0)
    first(*arguments)
group._init_group = late
main()
"""

Sockets = Callable[[], set[tuple[str, int]]]


@dataclass
class Stranger:
    """What a stranger tried and got."""

    targets: set[tuple[str, int]] = field(default_factory=set)
    connected: int = 0
    received: int = 0


@contextmanager
def stranger(prefix: list[str], find: Sockets, *options: str) -> Iterator[Stranger]:
    """Attack every socket that `find` finds, while the body runs; it is called as often as possible."""
    seen = Stranger()
    command = [*prefix, sys.executable, str(ROOT / "tests" / "system" / "stranger.py"), *options]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        ThreadPoolExecutor(1) as executor,
    ):
        assert process.stdin is not None
        ended: list[bool] = []

        def look() -> None:
            while not ended:
                for address, port in find() - seen.targets:
                    seen.targets.add((address, port))
                    print(address, port, file=process.stdin, flush=True)
                time.sleep(0.005)

        looking = executor.submit(look)
        try:
            yield seen
        finally:
            ended.append(True)
            looking.result()
            out, _ = process.communicate(timeout=60)
        said = json.loads(out)
        seen.connected, seen.received = said["connected"], said["received"]


def listening_under(parents: list[psutil.Process]) -> set[tuple[str, int]]:
    """Where the processes that these started listen: no others of this machine, such as the tests' own Ray."""
    found = set()
    for parent in parents:
        with suppress(psutil.Error):  # it may end while it is looked at, and so may each of its children
            for child in parent.children(recursive=True):
                with suppress(psutil.Error):
                    sockets = child.net_connections("tcp")
                    found |= {
                        (entry.laddr.ip, entry.laddr.port) for entry in sockets if entry.status == psutil.CONN_LISTEN
                    }
    return found


def listening_on(where: list[Host]) -> set[tuple[str, int]]:
    """Where anything on these hosts can be reached from another."""
    found = set()
    for host in where:
        lines = subprocess.run(host.command(["ss", "-ltnH"]), capture_output=True, text=True, check=True).stdout
        for line in lines.splitlines():
            address, _, port = line.split()[3].rpartition(":")
            if not address.startswith("127.") and address != "[::1]":
                found.add((host.address if address in ("*", "0.0.0.0", "[::]") else address, int(port)))
    return found


def written(tmp_path: Path, **changes: Any) -> Path:
    config = tmp_path / "job.yaml"
    tree = config_tree(**{"pool": {"kind": "torchrun", "device": "cpu"}, "train__workers": 2, **changes})
    config.write_text(yaml.safe_dump(tree))
    return config


def assert_undisturbed(config: Path, tmp_path: Path) -> None:
    alone = yaml.safe_load(config.read_text()) | {"pool": {"kind": "inline", "device": "cpu"}}
    assert_same(weights(tmp_path / "run"), weights(inline_run(alone, tmp_path)))


def ranks(where: list[Host], **variables: str) -> list[dict[str, str]]:
    shared = {"WORLD_SIZE": str(len(where)), "MASTER_ADDR": where[0].address, "MASTER_PORT": PORT, "LOCAL_RANK": "0"}
    secret = {"IST_SECRET": new_secret()}
    return [{**shared, **secret, **variables, "RANK": str(rank)} for rank in range(len(where))]


def test_a_run_on_one_machine_listens_to_the_loopback_only_and_strangers_there_change_nothing(tmp_path: Path) -> None:
    config = written(tmp_path, train__rounds=100)

    command = [*IST, "train", str(config), "--run-dir", str(tmp_path / "run")]
    runs: list[psutil.Process] = []

    with (
        stranger([], lambda: listening_under(runs)) as seen,
        psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run,
    ):
        runs.append(run)
        _, stderr = run.communicate(timeout=200)

    assert run.returncode == 0, stderr
    # Each rank's gloo, and no rendezvous; a group that a stranger got into is formed again, on two other ports.
    assert len(seen.targets) in (2, 4, 6), stderr
    assert stderr.count("forming the group again") == len(seen.targets) - 2
    assert {address for address, _ in seen.targets} == {"127.0.0.1"}
    assert seen.received < FEW_BYTES
    assert_undisturbed(config, tmp_path)


@namespaces
def test_strangers_at_the_ports_of_torchrun_on_two_machines_change_nothing(tmp_path: Path) -> None:
    config = written(tmp_path, train__rounds=100)
    command = [str(ROOT / "launch" / "torchrun.sh"), str(config), "--run-dir", str(tmp_path / "run")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    with hosts(3) as (first, second, third):
        shared = {"HEAD": f"{first.address}:29500", "NODES": "2", "PER_NODE": "1", "PATH": path}
        secret = {"IST_SECRET": new_secret()}
        environments = [{**shared, **secret, "LOCAL_ADDR": host.address} for host in (first, second)]
        with stranger(third.command([]), lambda: listening_on([first, second])) as seen:
            run_everywhere([first, second], command, environments, timeout_s=200)

    assert len(seen.targets) >= 3  # torchrun's store and two gloos
    assert seen.connected > 0
    assert seen.received < FEW_BYTES
    assert_undisturbed(config, tmp_path)


@namespaces
def test_strangers_at_ranks_without_torchrun_change_nothing_and_the_store_is_at_one_address(tmp_path: Path) -> None:
    config = written(tmp_path, train__rounds=100)
    command = [*IST, "train", str(config), "--run-dir", str(tmp_path / "run")]

    with hosts(3) as (first, second, third):
        # A second address, at which nothing may listen.
        subprocess.run(first.command(["ip", "address", "add", "10.78.0.1/24", "dev", "veth0"]), check=True)
        with stranger(third.command([]), lambda: listening_on([first, second])) as seen:
            run_everywhere([first, second], command, ranks([first, second]), timeout_s=200)

        assert (first.address, int(PORT)) in seen.targets
        assert {address for address, _ in seen.targets} == {first.address, second.address}
    assert seen.received < FEW_BYTES
    assert_undisturbed(config, tmp_path)


@namespaces
def test_a_stranger_that_takes_a_ranks_place_gets_nothing_and_the_group_forms_again(tmp_path: Path) -> None:
    config = written(tmp_path)
    arguments = ["train", str(config), "--run-dir", str(tmp_path / "run")]

    with hosts(3) as (first, second, third), ThreadPoolExecutor(2) as executor:
        environments = ranks([first, second])
        # Of two ranks the one at the lower address waits for the other to connect: rank 0.
        with stranger(third.command([]), lambda: listening_on([first]), "--once") as seen:
            in_time, late = ([sys.executable, "-c", IMPATIENT, delay, *arguments] for delay in ("0", "4"))
            leading = executor.submit(run_everywhere, [first], in_time, environments[:1], 200)
            following = executor.submit(run_everywhere, [second], late, environments[1:], 200)
            (said,) = leading.result()
            following.result()

    assert re.search(naming("rank 0", "does not prove the run secret", "the group again"), said)
    assert 0 < seen.received < FEW_BYTES
    assert_undisturbed(config, tmp_path)


@namespaces
@pytest.mark.parametrize("method", ["ist", "ddp"])
def test_a_rank_with_another_secret_ends_the_run_on_both_sides_before_it_gets_anything(
    tmp_path: Path, method: str
) -> None:
    config = written(tmp_path, method=method)
    command = [*IST, "train", str(config), "--run-dir", str(tmp_path / "run")]

    with hosts(2) as where, ThreadPoolExecutor(2) as executor:
        environments = ranks(where)
        environments[1]["IST_SECRET"] = new_secret()
        started = time.monotonic()
        ends = [
            executor.submit(run_everywhere, [host], command, [environment], 200)
            for host, environment in zip(where, environments, strict=True)
        ]
        said = [str(end.exception()) for end in ends]

    for text, (rank, other) in zip(said, ((0, 1), (1, 0)), strict=True):
        assert re.search(naming("error: ", f"rank {rank} and rank {other}", "secret", "IST_SECRET_FILE"), text)
        assert "Traceback" not in text
    assert time.monotonic() - started < 60
    assert not (tmp_path / "run" / "model.safetensors").exists()


@namespaces
def test_a_public_address_is_refused_unless_insecurity_is_allowed(tmp_path: Path) -> None:
    config = written(tmp_path)
    command = [*IST, "train", str(config), "--run-dir", str(tmp_path / "run")]

    with hosts(2) as made:
        where = [replace(host, address=f"11.0.0.{number}") for number, host in enumerate(made, 1)]
        for host in where:
            subprocess.run(host.command(["ip", "address", "flush", "dev", "veth0"]), check=True)
            subprocess.run(host.command(["ip", "address", "add", f"{host.address}/24", "dev", "veth0"]), check=True)
        with stranger([], lambda: listening_on(where)) as seen, pytest.raises(LabError) as refused:
            run_everywhere(where, command, ranks(where), timeout_s=100)
        said = str(refused.value)

        assert re.search(naming("error: gloo", "veth0 (11.0.0.1)", "GLOO_SOCKET_IFNAME", "--allow-insecure"), said)
        assert seen.targets == set()

        allowed = [*command[:-1], str(tmp_path / "run"), "--set", "pool.allow_insecure=true"]
        (tmp_path / "run").exists() and (tmp_path / "run").rename(tmp_path / "refused")
        run_everywhere(where, allowed, ranks(where), timeout_s=100)
    assert_undisturbed(config, tmp_path)
