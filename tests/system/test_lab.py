"""The network lab with real links: their rates, their counters, and that nothing of them stays behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ist.config.runtime import Link
from ist.config.schema import Config
from ist.errors import LabError
from ist.launch import lab_run
from ist.launch.lab_hosts import Host, hosts, why_not
from ist.launch.lab_run import launch_on_hosts
from ist.launch.start import launch
from ist.storage.run_folder import create_run_folder
from tests.conftest import ROOT, Run, config_tree, naming, run_group, small_config, wait_for
from tests.pools.inside_program import RANKS

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(400),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]

# Frames of 1,514 bytes carry 1,448 bytes of payload each.
FRAMES = 1514 / 1448

SERVER = """
import socket, sys, time
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    started, buffer, size = time.monotonic(), bytearray(1 << 20), 0
    while got := connection.recv_into(buffer):
        size += got
    print(started, time.monotonic(), size)
"""
CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    for _ in range(int(sys.argv[3]) // 50_000):
        connection.sendall(bytes(50_000))
"""

# Makes two hosts, starts something on one, says what there is, and waits for its end.
MAKER = """
import json, os, subprocess, sys, time
from ist.launch.lab_hosts import hosts
from ist.config.runtime import Link
with hosts(2, Link(10, 10)) as where:
    sleep = subprocess.Popen(where[0].command(["sleep", "1000"]))
    time.sleep(0.5)
    pids = [host.pid for host in where]
    print(json.dumps({"namespaces": [os.stat(f"/proc/{pid}/ns/net").st_ino for pid in pids], "sleep": sleep.pid}), flush=True)
    if sys.argv[1:]:
        raise ValueError("as wanted")
    time.sleep(1000)
"""


def transfer(senders: Sequence[Host], receiver: Host, size: int) -> float:
    """Send bytes from each sender at the same time, and return the rate of all payload together in Mbit/s."""
    places = [(receiver.address, str(5000 + number)) for number in range(len(senders))]
    servers = [
        subprocess.Popen(receiver.command([sys.executable, "-c", SERVER, *place]), stdout=subprocess.PIPE, text=True)
        for place in places
    ]
    for server in servers:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
    clients = [
        subprocess.Popen(sender.command([sys.executable, "-c", CLIENT, *place, str(size)]))
        for sender, place in zip(senders, places, strict=True)
    ]
    assert [client.wait() for client in clients] == [0] * len(clients)
    said = [[float(number) for number in server.communicate()[0].split()] for server in servers]
    assert [got for _, _, got in said] == [size] * len(said)
    return len(said) * size * 8 / 1e6 / (max(ended for _, ended, _ in said) - min(started for started, _, _ in said))


def namespaces_in_use() -> set[int]:
    """Network namespaces in which any process of this machine is."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found.add((process / "ns" / "net").stat().st_ino)
    return found


def interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


@pytest.mark.parametrize(("rate_mbit", "least"), [(10, 0.9), (100, 0.9), (1000, 0.7)])
def test_a_link_has_its_rate(rate_mbit: int, least: float) -> None:
    with hosts(2, Link(rate_mbit, rate_mbit)) as (first, second):
        measured = transfer([first], second, rate_mbit * 250_000)

    # Two seconds. At most what frames carry, and 12 milliseconds' worth that the two buckets let through at once; at
    # least what a machine manages whose two cores have other things to do.
    assert least < measured / rate_mbit < 1.01 / FRAMES


@pytest.mark.parametrize("link", [Link(20, 200), Link(200, 20)])
def test_the_slower_of_one_hosts_way_up_and_anothers_way_down_counts(link: Link) -> None:
    with hosts(2, link) as (first, second):
        measured = transfer([first], second, 5_000_000)

    assert 0.9 < measured / 20 < 1.01 / FRAMES


def test_two_senders_share_a_way_down_and_each_has_its_way_up() -> None:
    with hosts(3, Link(20, 200)) as (receiver, *senders):
        slow_up = transfer(senders, receiver, 10_000_000)
    with hosts(3, Link(200, 20)) as (receiver, *senders):
        slow_down = transfer(senders, receiver, 5_000_000)

    # The second begins a little later.
    assert 0.7 < slow_up / 40 < 1.01 / FRAMES
    assert 0.9 < slow_down / 20 < 1.01 / FRAMES


def test_the_wire_carries_every_frames_headers_and_counters_are_the_interfaces_own() -> None:
    size = 5_000_000
    shown = "mount -t sysfs sysfs /sys && cat /sys/class/net/veth0/statistics/rx_bytes"

    with hosts(2, Link(100, 100)) as (first, second):
        before = first.wire_bytes()
        transfer([first], second, size)
        wire = first.wire_bytes() - before
        least = second.counters()["rx"]
        in_sys = int(subprocess.check_output(second.command(["unshare", "--mount", "sh", "-c", shown])))
        most = second.counters()["rx"]
        sent = first.counters()["tx"]

    assert FRAMES <= wire / size < FRAMES + 0.01
    assert size < sent <= wire + before
    assert least <= in_sys <= most


def test_a_host_without_a_rate_counts_no_wire_bytes() -> None:
    with hosts(1) as (host,), pytest.raises(LabError, match=naming("host 0", "without a rate")):
        host.wire_bytes()


def test_an_exception_leaves_nothing_behind() -> None:
    before = interfaces()

    done = subprocess.run([sys.executable, "-c", MAKER, "fail"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert "ValueError: as wanted" in done.stderr
    made = json.loads(done.stdout)
    wait_for(lambda: not namespaces_in_use() & set(made["namespaces"]), 10, "the namespaces' end")
    wait_for(lambda: not psutil.pid_exists(made["sleep"]), 10, "the end of what ran on a host")
    assert interfaces() == before


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing_behind(ended_by: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAKER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        made = json.loads(process.stdout.readline())
        assert set(made["namespaces"]) <= namespaces_in_use()
        process.send_signal(ended_by)
        process.wait(timeout=20)

    wait_for(lambda: not namespaces_in_use() & set(made["namespaces"]), 10, "the namespaces' end")
    wait_for(lambda: not psutil.pid_exists(made["sleep"]), 10, "the end of what ran on a host")


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "job.yaml"
    linked = {"pool": {"kind": "torchrun", "device": "cpu"}, "train__workers": 2, "output": str(folder / "runs")}
    network = {"model__args": {"widths": [64, 200, 200, 10]}}
    path.write_text(yaml.safe_dump(config_tree(**{**linked, **network, **changes})))
    return path


def assert_counted(run: Path, link: str) -> None:
    """A run's result says its link, and what crossed it is what was sent, up to framing."""
    result = json.loads((run / "result.json").read_text())
    # Data-parallel ranks begin with the weights of rank 0: each of the others gets them.
    sent = result["sent_bytes"] + (4 * result["parameters"] if result["method"] == "ddp" else 0)
    assert result["link"] == link
    # Headers are 4.6 % of a full frame, and an acknowledgement of 66 bytes answers one or two; small messages fill no
    # frame. Processes greet each other with some kilobytes.
    assert result["sent_bytes"] < result["wire_bytes"] < 1.12 * sent + 40_000


def test_methods_are_compared_on_links(tmp_path: Path, ist_command: Run) -> None:
    config = written(tmp_path)

    done = ist_command("compare", config, "--link", "20mbit/100mbit", "--run-dir", tmp_path / "both", timeout=280)

    assert done.returncode == 0, done.stderr
    assert "links: 20mbit/100mbit" in done.stdout
    assert re.search("ist: .* 2 processes.* 20mbit/100mbit", done.stderr)
    page = (tmp_path / "both" / "report.html").read_text()
    assert "<th>on the wire</th>" in page
    assert "20mbit/100mbit" in page
    for method in ("ist", "ddp"):
        assert_counted(tmp_path / "both" / method, "20mbit/100mbit")
    ddp = json.loads((tmp_path / "both" / "ddp" / "result.json").read_text())
    # Each rank sends half of it, at 20 Mbit/s.
    assert ddp["train_s"] > ddp["sent_bytes"] / 2 * 8 / 20e6


@pytest.mark.parametrize("inside", ["ddp", "fsdp"])
def test_ranks_of_a_worker_share_a_host_whose_link_carries_only_subnets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    inside_bytes: list[int] = []

    def counted_inside(config: Config, folder: Path, resume: bool, where: Sequence[Host]) -> None:
        launch(config, folder, resume, where)
        for host in dict.fromkeys(where):
            lines = Path(f"/proc/{host.pid}/net/dev").read_text().splitlines()
            (loopback,) = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
            inside_bytes.append(int(loopback[8]))

    monkeypatch.setattr(lab_run, "launch", counted_inside)
    config = small_config(
        model={"name": "tests.pools.inside_program:for_digits"}, train__workers=2, train__rounds=2,
        train__local_steps=20, pool={**RANKS, "inside": inside, "link": "1gbit"},
    )  # fmt: skip
    folder = create_run_folder(config, tmp_path / "run")

    launch_on_hosts(config, folder, resume=False)

    assert_counted(folder.path, "1gbit")
    result = json.loads((folder.path / "result.json").read_text())
    assert len(inside_bytes) == 2
    # The ranks of a worker also greet each other, and add up their losses; small messages have large headers.
    assert result["inside_bytes"] < sum(inside_bytes) < 1.08 * result["inside_bytes"] + 40_000
    assert result["inside_bytes"] > 10 * result["wire_bytes"]


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """The ranks of a run, by rank."""
    found = {}
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess, KeyError):
            if "process" in child.cmdline():
                found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[psutil.Popen]:
    """A run on links that has passed its third round."""
    config = written(
        tmp_path, train__rounds=100_000, evaluate={"every": 1000}, model__args={"widths": [64, 24, 20, 10]}
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [
        sys.executable,
        "-m",
        "ist",
        "train",
        str(config),
        "--link",
        "10mbit",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    with psutil.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, 200, "round 3")
        yield process


def test_a_killed_rank_is_named(running: psutil.Popen) -> None:
    ranks_of(running)[1].send_signal(signal.SIGKILL)
    _, err = running.communicate(timeout=60)

    assert running.returncode == 1
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(naming("rank 1 (worker 1)", "SIGKILL"), error)


def test_a_link_that_goes_down_ends_the_run_soon_and_names_the_worker_behind_it(tmp_path: Path) -> None:
    pool = {"kind": "torchrun", "device": "cpu", "timeout_s": 6}
    config = written(tmp_path, train__rounds=100_000, evaluate={"every": 1000}, pool=pool)
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [sys.executable, "-m", "ist", "train", str(config), "--link", "100mbit", "--run-dir", str(metrics.parent)]
    with psutil.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, 200, "round 3")
        enter = ["nsenter", "--target", str(ranks_of(process)[1].pid), "--net"]
        subprocess.run([*enter, "ip", "link", "set", "veth0", "down"], check=True)
        went_down = time.monotonic()
        _, err = process.communicate(timeout=60)

    assert time.monotonic() - went_down < 6 + 15
    assert process.returncode == 1
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "worker 1" in error
    assert "pool.timeout_s" in error
    assert f"ist train --resume {metrics.parent}" in error


def test_an_error_of_a_rank_is_reported_as_its_own(tmp_path: Path, ist_command: Run) -> None:
    config = written(tmp_path, train__optimizer={"name": "SGD", "args": {"lr": 1e30}})

    done = ist_command("train", config, "--link", "100mbit", timeout=140)

    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "worker 0" in error


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_rank_and_no_host(running: psutil.Popen, ended_by: signal.Signals) -> None:
    everything = running.children(recursive=True)
    ranks = ranks_of(running)
    made = {Path(f"/proc/{rank.pid}/ns/net").stat().st_ino for rank in ranks}
    assert len(made) == 2

    running.send_signal(ended_by)
    running.communicate(timeout=60)

    wait_for(lambda: not any(process.is_running() for process in everything), 20, "the end of all processes")
    wait_for(lambda: not namespaces_in_use() & made, 10, "the namespaces' end")
    assert running.returncode == (-ended_by if ended_by == signal.SIGKILL else 128 + ended_by)


def test_a_resumed_run_is_on_its_link_and_does_not_say_what_it_did_not_count(tmp_path: Path, ist_command: Run) -> None:
    config = written(tmp_path, train__rounds=2)
    run = tmp_path / "run"
    first = ist_command("train", config, "--link", "50mbit", "--run-dir", run, timeout=140)
    assert first.returncode == 0, first.stderr
    (run / "result.json").unlink()
    (run / "checkpoints" / "round-00000002.safetensors").unlink()

    resumed = ist_command("train", "--resume", run, timeout=140)

    assert resumed.returncode == 0, resumed.stderr
    assert "50mbit" in resumed.stderr
    result = json.loads((run / "result.json").read_text())
    assert result["link"] == "50mbit"
    assert "wire_bytes" not in result
    assert "on the wire" not in resumed.stdout


# setpriv itself still starts what only root may start; env does not.
NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all", "--", "env"]


@pytest.fixture(scope="module")
def nobody() -> tuple[str, dict[str, str]]:
    """An interpreter that a user without rights may run, and its environment."""
    if os.geteuid() != 0:
        pytest.skip("these tests run without root already")
    packages = Path(yaml.__file__).parent.parent
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{packages}",
        "HOME": "/nonexistent",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    for interpreter in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        done = run_group([*NOBODY, interpreter, "-c", "import torch, ist.cli.main"], Path("/"), environment, 100)
        if done.returncode == 0:
            return interpreter, environment
    pytest.skip("no interpreter that user 65534 may run with this package")


def as_nobody(interpreter: str, environment: dict[str, str], script: str) -> str:
    done = run_group([*NOBODY, interpreter, "-c", script], Path("/"), environment, 100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHY_NOT = "from ist.launch.lab_hosts import why_not; print(why_not())"


def test_methods_are_compared_on_links_without_root(nobody: tuple[str, dict[str, str]]) -> None:
    interpreter, environment = nobody
    reason = as_nobody(interpreter, environment, WHY_NOT)
    if reason != "None":
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o777)
        command = [*NOBODY, interpreter, "-m", "ist", "compare", str(written(folder)), "--link", "100mbit"]

        done = run_group([*command, "--run-dir", str(folder / "both")], Path("/"), environment, 280)

        assert done.returncode == 0, done.stderr
        for method in ("ist", "ddp"):
            assert_counted(folder / "both" / method, "100mbit")
            assert (folder / "both" / method / "result.json").stat().st_uid == 65534


def test_a_kernel_that_permits_no_user_namespaces_is_named_with_the_setting(nobody: tuple[str, dict[str, str]]) -> None:
    interpreter, environment = nobody
    # In a user namespace of its own the limit may be set, and is that of all inside.
    inside = "echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "
    script = f"{inside} {interpreter} -c '{WHY_NOT}'"

    done = run_group(["unshare", "--user", "--map-root-user", "sh", "-c", script], Path("/"), environment, 100)

    assert "CAP_SYS_ADMIN and CAP_NET_ADMIN" in done.stdout
    assert "user.max_user_namespaces is 0" in done.stdout
