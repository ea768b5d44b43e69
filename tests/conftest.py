"""What the tests share: small jobs, a quiet torch, one Ray cluster, and no leftover child processes."""

import atexit
import contextlib
import copy
import functools
import json
import os
import random
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ist.config.load import validate
from ist.config.schema import Config
from ist.data.shards.unequal import OwnData
from ist.loops.part import Part
from ist.measurements import MEASUREMENTS, Numbers, combined, nothing_measured
from ist.runs.build import make_job, step_function
from ist.subnet.job import Job
from tests.sizes import longer_than_the_guide

ROOT = Path(__file__).parent.parent

# Read when Ray is imported, here and in every process that tests start; some of these import this file too.
if "IST_TESTS" not in os.environ:
    private = tempfile.mkdtemp(prefix="ist-tests-")
    atexit.register(shutil.rmtree, private)
    os.environ["IST_TESTS"] = private
    os.environ["IST_SECRET"] = secrets.token_hex(32)  # not the user's own
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(private) / "ray-token")
    Path(private, "ray-token").write_text(secrets.token_hex(32))
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # else Ray warns of it, and warnings are errors

# A shell that starts the tests in the background has them ignore interrupts, and with them all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONG_LIVED: list[psutil.Process] = []
"""Processes of the test session: they and what they start are nobody's leftovers."""

Tree = dict[str, Any]


def naming(*parts: str) -> str:
    """Return a pattern for `match=`: a message that names all of these, in any order.

    Tests pin the key, the value and the remedy of a message this way, not its wording.
    """
    return "(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)


LONGEST = [
    ROOT / "tests" / name
    for name in (
        "test_configs_and_docs.py", "pools/test_conformance.py", "runs/test_resume.py", "baselines/test_methods.py",
        "test_own_loop.py", "launch/test_signals.py", "launch/test_launch.py", "callbacks/test_shipped.py",
        "pools/test_inside.py", "pools/test_sharded.py", "pools/test_processes.py", "neurons/test_packages.py",
    )
]  # fmt: skip
"""The files whose quick tests take longest; they come first: when they come last, only one core is busy at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {path: place for place, path in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = list(longer_than_the_guide(ROOT))
    if lines:
        terminalreporter.section("longer than the guide", sep="-")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "IST_LAUNCHED", "TORCHELASTIC_ERROR_FILE",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_leftover_children() -> Iterator[None]:
    before = set(psutil.pids())
    yield
    if before.issuperset(psutil.pids()):
        return  # the parents of all processes, which take longer to read, do not matter then
    ours = {child.pid for root in LONG_LIVED for child in [root, *root.children(recursive=True)]}
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before | ours]
    _, alive = psutil.wait_procs(left, timeout=5)
    for child in alive:
        child.kill()
    assert not alive, f"left running: {alive}"


def config_tree(**changes: Any) -> Tree:
    """A small valid configuration; `changes` are dotted keys with `__` for the dot."""
    tree: Tree = {
        "name": "small",
        "seed": 3,
        "model": {"name": "mlp", "args": {"widths": [64, 24, 20, 10]}},
        "data": {"name": "digits"},
        "train": {
            "workers": 4,
            "rounds": 4,
            "local_steps": 3,
            "batch_size": 16,
            "optimizer": {"name": "SGD", "args": {"lr": 0.1, "momentum": 0.9}},
        },
        "checkpoint": {"every": 2},
        "pool": {"kind": "inline", "device": "cpu"},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = copy.deepcopy(value) if isinstance(value, dict) else value  # a later change may reach into it
    return tree


def small_config(**changes: Any) -> Config:
    return validate(config_tree(**changes), "test")


def data(size: int = 100, features: int = 12, classes: int = 5, seed: int = 0) -> TensorDataset:
    """Random inputs whose class is decided by a random linear map: learnable."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, features, generator=generator)
    teacher = torch.randn(features, classes, generator=torch.Generator().manual_seed(99))
    return TensorDataset(inputs, (inputs @ teacher).argmax(dim=1))


def job_for(
    model: nn.Module, dataset: Dataset[Any] | None = None, test: Any = None, own: OwnData | None = None, **changes: Any
) -> Job:
    """A job around a network that is at hand."""
    config, loss, train = small_config(**changes), nn.functional.cross_entropy, dataset or (None if own else data())
    return make_job(config, model, lambda: model, train, test, loss, own=own, step=step_function(config.train.step))


def plain_loop(model: nn.Module, job: Any, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
    """What anybody would write; only which samples a step uses comes from the job."""
    inputs, targets = job.task.train_data.tensors
    shard = torch.from_numpy(job.schedule.sampler.shard(0))
    model.train()
    for step in range(job.schedule.total_steps):
        rows = shard[torch.from_numpy(job.schedule.sampler.batch(0, step))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


@contextlib.contextmanager
def generators_left_alone() -> Iterator[None]:
    """See that what runs in the block leaves the process's own generators as they were."""

    def seed() -> None:
        torch.manual_seed(4)
        random.seed(4)

    def drawn() -> tuple[float, float]:
        return torch.rand(1).item(), random.random()

    seed()
    expected = drawn()
    seed()
    yield
    assert drawn() == expected


def whole_state(job: Job, model: nn.Module) -> dict[str, Tensor]:
    tensors = model.state_dict()
    return {name: tensors[name] for name in job.split.model_specs}


def worker_numbers(**changes: float) -> dict[str, float]:
    """What a worker measured: nothing but what is given."""
    assert changes.keys() <= nothing_measured().keys()
    return nothing_measured() | changes


def round_numbers(by_worker: Sequence[Numbers], **changes: float) -> dict[str, float]:
    """What a method measured of a round with these workers; what is not of theirs is 0, or as given."""
    names = (measured.name for measured in MEASUREMENTS if measured.source == "method")
    return dict.fromkeys(names, 0.0) | {"workers": len(by_worker)} | combined(by_worker, parallel=True) | changes


def a_record(round_number: int, **changes: Any) -> dict[str, Any]:
    """A record of a round, with made-up numbers."""
    record = {
        "round": round_number, "workers": 4, "loss": 0.5, "samples": 192 * (round_number + 1), "sent_bytes": 1000,
        "train_s": 0.6, "compute_s": 0.1, "exchange_s": 0.2, "idle_s": 0.3, "cut_s": 0.01, "merge_s": 0.02,
        "evaluate_s": 0.5, "evaluate_bytes": 0, "bytes_to_worker": [100, 100], "bytes_from_worker": [150, 150], "memory_bytes": 300,
        "process_memory_bytes": 3000, "coordinator_memory_bytes": 700, "coordinator_process_memory_bytes": 7000,
        "test_loss": 0.4, "metric": "accuracy", "accuracy": 0.875,
    }  # fmt: skip
    return record | changes


def clone(state: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_same(left: Any, right: Any) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture
def ist_command() -> Run:
    """Run `python -m ist ...` as a user would, and reap whatever it starts."""

    def run(*arguments: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: float = 100) -> Any:
        command = [sys.executable, "-m", "ist", *map(str, arguments)]
        return run_group(command, cwd, {**os.environ, **(env or {})}, timeout)

    return run


def run_group(command: Sequence[str], cwd: Path, env: dict[str, str], timeout: float) -> Done:
    """Run a command in a process group of its own, and kill the group if it takes too long."""
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def torchrun(program: Sequence[str], processes: int, timeout: float, cwd: Path = ROOT, **env: str) -> Done:
    """Run a program, or `-m` a module, as so many processes of torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    return run_group([sys.executable, *launcher, *program], cwd, environment, timeout)


def run_torchrun(program: Sequence[str], processes: int, timeout: float, **env: str) -> None:
    """Run what `torchrun` does, and see that all processes end well."""
    done = torchrun(program, processes, timeout, **env)
    assert done.returncode == 0, done.stderr


def run_forked_ranks(*groups: tuple[object, ...], timeout: float = 100) -> str:
    """Run groups of ranks, one after the other: (number, program, argument, ...); see that all of them end well.

    Returns what they have printed.

    Ranks are forks of a process that has loaded torch, which the tests start once: they start at once, where torchrun
    takes some ten seconds.
    """
    words = [word for group in groups for word in (*map(str, group), "--")][:-1]
    server = rank_server()
    with tempfile.TemporaryDirectory(dir=os.environ["IST_TESTS"]) as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        files, environment = {"out": str(out), "err": str(err)}, {**os.environ, **FOR_RANKS}
        server.ask({"words": words, "environment": environment, **files})
        deadline = time.monotonic() + timeout
        pid = server.answer(deadline)
        try:
            code = server.answer(deadline)
        except BaseException:  # a timeout is one
            os.killpg(pid, signal.SIGKILL)
            server.answer(time.monotonic() + 10)
            raise
        assert code == 0, err.read_text()
        return out.read_text()


FOR_RANKS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class RankServer:
    """The process whose forks are ranks (`tests/forked_ranks.py`); it ends with this one."""

    def __init__(self) -> None:
        self.process = psutil.Popen(
            [sys.executable, "-m", "tests.forked_ranks"], cwd=ROOT, env={**os.environ, **FOR_RANKS},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        LONG_LIVED.append(self.process)
        atexit.register(self.close)

    def ask(self, request: Tree) -> None:
        self.process.stdin.write(json.dumps(request).encode() + b"\n")

    def answer(self, deadline: float) -> int:
        """Wait for the next number that the process prints."""
        readable, *_ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise TimeoutError("the ranks took too long")
        line = self.process.stdout.readline()
        assert line, "the process whose forks are ranks has ended"
        return int(line)

    def close(self) -> None:
        with self.process.stdout:
            self.process.stdin.close()
            self.process.wait(10)


@functools.cache
def rank_server() -> RankServer:
    """Return the one of this process, which starts when it is needed."""
    return RankServer()


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray cluster of one node with room for ten workers, for the whole session; this process is connected to it."""
    import ray

    # Another Ray on this machine may have the agent's usual port.
    ports = ["--port=0", "--dashboard-port=0", f"--dashboard-agent-listen-port={free_port()}"]
    with node("--head", "--num-cpus=10", *ports) as (head, said):
        address = re.search(r"--address='?([\d.]+:\d+)", said)
        assert address, said
        LONG_LIVED.append(head)
        ray.init(address=address[1], log_to_driver=False, logging_level="ERROR")
        yield address[1]
        ray.shutdown()
        LONG_LIVED.remove(head)


@contextlib.contextmanager
def node(*options: str) -> Iterator[tuple[psutil.Process, str]]:
    """Run `ray start --block`, and stop just this node afterwards; give its process and what it said."""
    with tempfile.TemporaryFile("w+") as output:
        command = [str(Path(sys.executable).with_name("ray")), "start", *options, "--block", "--disable-usage-stats"]
        # As from an activated environment: jobs run what `python` is there.
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        process = psutil.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )

        def said() -> str:
            output.seek(0)
            return output.read()

        try:
            wait_for(lambda: "--block" in said() or process.poll() is not None, 110, "ray start")
            assert process.poll() is None, said()
            yield process, said()
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # a test may have killed it
                family = [process, *process.children(recursive=True)]
                process.terminate()
                _, alive = psutil.wait_procs(family, timeout=10)
                for left in alive:
                    left.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until `condition` is true, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s waiting for {what}")


def returned(results: Iterable[Any]) -> Iterator[Any]:
    """A pool's results; the local steps that are this process's turn are made on the way."""
    for result in results:
        if isinstance(result, Part):
            result.run()
        else:
            yield result
