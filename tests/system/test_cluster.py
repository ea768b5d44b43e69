"""docker/compose.yaml as a user would run it: a cluster in containers, a worker killed while it trains, and torchrun.

No image registry is needed: the base image is made by debootstrap, with a wheelhouse that pip fills on this machine.
Both are kept in /var/cache/ist-cluster-test, as are the image's layers if this test has to run a Docker daemon of its
own.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement

from tests.conftest import LONG_LIVED, ROOT, wait_for

CACHE = Path("/var/cache/ist-cluster-test")
RELEASE, PYTHON = "bookworm", "3.11"
EXTRAS = ("", "data", "report", "ray", "watch")
PROJECT = f"ist-test-{os.getpid()}"
IMAGE = "ist-cluster:test"
WORKERS = 3
ROUNDS = 600
LOOK_FOR_TOKENS = "find /root /tmp /home /var -name '*auth_token*' 2>/dev/null || true"


def missing() -> str:
    """What this machine lacks for these tests."""
    if os.getuid() != 0:
        return "not root"
    tools = [tool for tool in ("docker", "debootstrap") if shutil.which(tool) is None]
    if not tools and not compose_command():
        tools = ["docker-compose"]
    if not tools and not (shutil.which("dockerd") or "DOCKER_HOST" in os.environ or Path("/run/docker.sock").exists()):
        tools = ["Docker daemon"]
    return f"no {' and no '.join(tools)}" if tools else ""


def compose_command() -> list[str]:
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    return ["docker", "compose"] if plugin.returncode == 0 else []


LACKING = missing()
pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(LACKING), reason=f"the cluster in containers: {LACKING}"),
]


@dataclass
class Cluster:
    """The compose project of this test."""

    env: dict[str, str]
    runs: Path
    dashboard: int

    def docker(self, *arguments: str, check: bool = True, timeout: float = 1800) -> str:
        return command(["docker", *arguments], self.env, check, timeout)

    def compose(self, *arguments: str, timeout: float = 1800) -> str:
        words = [*compose_command(), "-p", PROJECT, "-f", "docker/compose.yaml", *arguments]
        return command(words, self.env, True, timeout)

    def containers(self, service: str = "") -> list[str]:
        labels = [f"label=com.docker.compose.project={PROJECT}"]
        if service:
            labels.append(f"label=com.docker.compose.service={service}")
        return self.docker("ps", "-aq", *(word for label in labels for word in ("--filter", label))).split()

    def inspected(self, container: str) -> dict[str, Any]:
        return json.loads(self.docker("inspect", container))[0]

    def ended_well(self, service: str, seconds: float) -> None:
        (container,) = self.containers(service)
        code = self.docker("wait", container, timeout=seconds).strip()
        assert code == "0", self.docker("logs", "--tail", "60", container)

    def rounds(self, run: str) -> list[dict[str, Any]]:
        path = self.runs / run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def down(self) -> None:
        self.compose("--profile", "torchrun", "down", "--volumes", "--remove-orphans", "--timeout", "3")


def command(words: list[str], env: dict[str, str], check: bool, timeout: float) -> str:
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0 or not check, f"{' '.join(words)}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def docker_env() -> Iterator[dict[str, str]]:
    """The environment for Docker's commands: with the daemon that answers, or one that lasts as long as these tests."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    if subprocess.run(["docker", "info"], env=env, capture_output=True, check=False).returncode == 0:
        yield env
        return
    own = CACHE / "docker"
    own.mkdir(parents=True, exist_ok=True)
    state = Path("/run") / PROJECT
    state.mkdir()
    env["DOCKER_HOST"] = f"unix://{state}/docker.sock"
    words = [
        "dockerd",
        "--host",
        env["DOCKER_HOST"],
        "--data-root",
        str(own / "data"),
        "--exec-root",
        str(state / "exec"),
    ]
    with (own / "log").open("w") as log:
        daemon = psutil.Popen([*words, "--pidfile", str(state / "pid")], stdout=log, stderr=log)
    LONG_LIVED.append(daemon)
    try:
        answers = ["docker", "info"]
        wait_for(
            lambda: subprocess.run(answers, env=env, capture_output=True, check=False).returncode == 0, 90, "dockerd"
        )
        yield env
    finally:
        daemon.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            daemon.wait(60)
        LONG_LIVED.remove(daemon)
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(docker_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The image, built; and afterwards nothing left of what was started from it."""
    runs = tmp_path_factory.mktemp("runs")
    os.chown(runs, 10001, 10001)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {
        **docker_env,
        "BASE_IMAGE": base_image(docker_env),
        "IST_IMAGE": IMAGE,
        "IST_RUNS": str(runs),
        "IST_DASHBOARD_PORT": str(port),
        "IST_TRAIN_ARGS": f"--set train.rounds={ROUNDS}",
    }
    made = Cluster(env, runs, port)
    try:
        made.compose("build")
        yield made
    finally:
        made.down()
        assert not made.containers()


def base_image(env: dict[str, str]) -> str:
    """Make what stands for python:slim here: Debian with Python, and the wheels that the image is to install."""
    wanted = requirements()
    key = hashlib.sha256("\n".join([RELEASE, PYTHON, *wanted, (ROOT / "constraints.txt").read_text()]).encode())
    wheels = CACHE / f"wheels-{key.hexdigest()[:16]}"
    tag = f"ist-cluster-base:{RELEASE}-{key.hexdigest()[:16]}"
    if command(["docker", "images", "-q", tag], env, True, 60).strip():
        return tag
    system = CACHE / f"{RELEASE}.tar"
    with ThreadPoolExecutor(2) as executor:  # both wait for other machines most of the time
        made = [executor.submit(make_system, system, env), executor.submit(make_wheels, wheels, wanted, env)]
        for one in made:
            one.result()
    plain = f"ist-cluster-base:{RELEASE}"
    command(["docker", "import", str(system), plain], env, True, 600)
    recipe = f"FROM {plain}\nCOPY *.whl /opt/wheelhouse/\nCOPY pip.conf /etc/pip.conf\n"
    (wheels / "Dockerfile").write_text(recipe)
    (wheels / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /opt/wheelhouse\n")
    command(["docker", "build", "-t", tag, str(wheels)], env, True, 1200)
    return tag


def requirements() -> list[str]:
    """What the image installs, but for `ist` itself: a change of anything else in pyproject.toml makes no new base."""
    wanted = [Requirement(text) for text in importlib.metadata.requires("ist") or []]
    names = [
        f"{one.name}{'[' + ','.join(sorted(one.extras)) + ']' if one.extras else ''}{one.specifier}"
        for one in wanted
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in EXTRAS)
    ]
    return [*names, "setuptools>=77", "wheel"]


def make_system(archive: Path, env: dict[str, str]) -> None:
    if archive.exists():
        return
    root = CACHE / f"root-{os.getpid()}"
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        packages = "--include=python3,python3-venv,python3-pip"
        command(["debootstrap", "--variant=minbase", packages, RELEASE, str(root)], env, True, 1200)
        shutil.rmtree(root / "var" / "cache" / "apt")
        unfinished = archive.with_suffix(".part")
        with tarfile.open(unfinished, "w") as tar:
            tar.add(root, ".")
        unfinished.rename(archive)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def make_wheels(folder: Path, wanted: Sequence[str], env: dict[str, str]) -> None:
    """Download wheels, but for those that are here already for other requirements."""
    if folder.exists():
        return
    unfinished = folder.with_suffix(".part")
    for old in sorted(CACHE.glob("wheels-*")):
        if old == unfinished:
            continue
        if unfinished.exists():
            shutil.rmtree(old)
        else:
            old.rename(unfinished)
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(unfinished), "-c", "constraints.txt"]
    command([*words, "--python-version", PYTHON, "--only-binary", ":all:", *wanted], env, True, 1200)
    unfinished.rename(folder)


@pytest.fixture(scope="module")
def trained(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster on which a run has just ended, in whose middle a worker was killed."""
    try:
        cluster.compose("up", "--detach", "--scale", f"worker={WORKERS}", timeout=600)
        (train,) = cluster.containers("train")

        def all_there() -> bool:
            assert cluster.inspected(train)["State"]["Status"] in ("created", "running"), cluster.docker("logs", train)
            return any(done["workers"] == WORKERS for done in cluster.rounds("cluster"))

        wait_for(all_there, 300, f"a round of {WORKERS} workers")
        cluster.docker("kill", cluster.containers("worker")[0])
        cluster.ended_well("train", 600)
        yield cluster
    finally:
        cluster.down()


def test_training_outlives_a_killed_worker_and_leaves_a_report(trained: Cluster) -> None:
    rounds = trained.rounds("cluster")
    most = max(index for index, done in enumerate(rounds) if done["workers"] == WORKERS)

    assert [done["round"] for done in rounds] == list(range(ROUNDS))
    assert most < ROUNDS - 2, "the worker was killed after the last round"
    assert {done["workers"] for done in rounds[most + 1 :]} == {WORKERS - 1}
    assert "</html>" in (trained.runs / "cluster" / "report.html").read_text()
    assert json.loads((trained.runs / "cluster" / "result.json").read_text())["accuracy"] > 0.95


def test_containers_have_no_rights_and_publish_only_the_dashboard_on_loopback(trained: Cluster) -> None:
    published = []
    for container in trained.containers():
        told = trained.inspected(container)
        host = told["HostConfig"]
        assert told["Config"]["User"] == "10001:10001"
        assert host["ReadonlyRootfs"]
        assert not host["Privileged"]
        assert host["CapDrop"] == ["ALL"]
        assert "no-new-privileges:true" in host["SecurityOpt"]
        assert host["Memory"] > 0
        assert host["NanoCpus"] > 0
        for bound in told["NetworkSettings"]["Ports"].values():
            published += [(where["HostIp"], where["HostPort"]) for where in bound or []]

    assert published == [("127.0.0.1", str(trained.dashboard))]
    (head,) = trained.containers("head")
    assert trained.docker("exec", head, "id", "-u").strip() == "10001"
    assert "CapEff:\t0000000000000000" in trained.docker("exec", head, "cat", "/proc/1/status")
    assert "Read-only file system" in trained.docker("exec", head, "touch", "/opt/ist/x", check=False)


def test_secrets_are_files_that_only_their_owner_reads(trained: Cluster) -> None:
    for service in ("head", "worker"):
        found = trained.containers(service)
        container = next(one for one in found if trained.inspected(one)["State"]["Running"])
        look = f"stat -c '%n %a %u' /secrets /secrets/*; {LOOK_FOR_TOKENS}"
        said = trained.docker("exec", container, "sh", "-c", look).split("\n")
        assert said == ["/secrets 700 10001", "/secrets/ray-token 600 10001", "/secrets/run-secret 600 10001", ""]


def test_nobody_joins_the_cluster_without_its_token(trained: Cluster) -> None:
    (head,) = trained.containers("head")
    join = "import ray; ray.init('ray-head:6379', log_to_driver=False); print('nodes', len(ray.nodes()))"
    wrong = {
        "another token": ["-e", f"RAY_AUTH_TOKEN={'0' * 64}"],
        "no token": ["-e", "RAY_AUTH_TOKEN_PATH=/tmp/none"],
        "no authentication": ["-e", "RAY_AUTH_MODE=disabled"],
    }

    assert re.search(r"^nodes \d", trained.docker("exec", head, "python", "-c", join), flags=re.MULTILINE)
    for what, options in wrong.items():
        said = trained.docker("exec", *options, head, "timeout", "60", "python", "-c", join, check=False)
        assert not re.search(r"^nodes \d", said, flags=re.MULTILINE), what
        assert re.search("[Aa]uth", said), what
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{trained.dashboard}/api/jobs/", timeout=20)
    refused.value.close()
    assert refused.value.code == 401


def test_the_torchrun_profile_trains_the_same_configuration_without_ray(cluster: Cluster) -> None:
    cluster.down()
    cluster.env["IST_TRAIN_ARGS"] = "--set train.rounds=100"
    try:
        cluster.compose("--profile", "torchrun", "up", "--detach", "torchrun-0", "torchrun-1", timeout=600)
        for service in ("torchrun-1", "torchrun-0"):
            cluster.ended_well(service, 900)

        assert not cluster.containers("head") + cluster.containers("worker")
        rounds = cluster.rounds("cluster-torchrun")
        assert len(rounds) == 100
        assert {done["workers"] for done in rounds} == {4}
        assert "</html>" in (cluster.runs / "cluster-torchrun" / "report.html").read_text()
    finally:
        cluster.down()
