"""A worker can allocate only as much memory as the configuration allows; the operating system enforces it."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.no_replica import run
from ist.cli.main import main
from ist.config.registry import call
from ist.config.schema import num_processes
from ist.distributed.memory_limit import limited_memory, start_limit, under_limit
from ist.errors import ConfigError, MemoryLimitError
from ist.launch.start import limited_commands
from ist.storage.checkpoint import read_tensors, write_tensors
from tests.conftest import ROOT, Run, config_tree, naming, small_config

MB = 10**6
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's own memory")


def test_more_than_the_limit_is_refused_and_less_is_not() -> None:
    with limited_memory(200 * MB, "200MB", CPU):
        torch.zeros(100 * MB, dtype=torch.uint8)

    with (
        pytest.raises(MemoryLimitError, match=naming("'pool.memory_limit'", "200MB")),
        limited_memory(200 * MB, "200MB", CPU),
    ):
        torch.zeros(10_000 * MB, dtype=torch.uint8)  # more than earlier tests may have left to be freed

    torch.zeros(300 * MB, dtype=torch.uint8)  # the limit ends with the context


def test_a_network_that_is_too_large_is_not_reported_as_a_wrong_argument() -> None:
    with (
        pytest.raises(MemoryLimitError, match=naming("'pool.memory_limit'", "50MB")),
        limited_memory(50 * MB, "50MB", CPU),
    ):
        call(torch.nn.Linear, {"in_features": 100_000, "out_features": 100_000}, "model.args")

    def refused() -> None:
        raise RuntimeError("other")

    with pytest.raises(ConfigError, match=naming("'model.args'", "other")):
        call(refused, {}, "model.args")


def test_without_a_limit_out_of_memory_is_one_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vast.py").write_text(
        "import torch\ndef net():\n    return torch.empty(10**16, dtype=torch.uint8, device='cpu')\n"
    )
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(config_tree(model={"name": "vast:net", "args": {}})))

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ist", "train", str(config)])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(naming("error: ", "memory", "narrower network"), line)


def test_writing_files_is_not_limited(tmp_path: Path) -> None:
    whole = {"weight": torch.zeros(100 * MB, dtype=torch.uint8)}

    with limited_memory(50 * MB, "50MB", CPU):
        write_tensors(tmp_path / "model.safetensors", whole, {})
        with pytest.raises(RuntimeError, match="allocate memory"):
            torch.empty(10_000 * MB, dtype=torch.uint8)  # more than earlier tests may have left to be freed

    assert torch.equal(read_tensors(tmp_path / "model.safetensors")[0]["weight"], whole["weight"])


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="something else"), limited_memory(200 * MB, "200MB", CPU):
        raise RuntimeError("something else")


@pytest.mark.parametrize(("text", "count"), [("300MB", 300 * MB), ("1.5GB", 1500 * MB)])
def test_a_limit_is_a_number_of_bytes(text: str, count: int) -> None:
    assert small_config(pool={"kind": "torchrun", "memory_limit": text}).pool.memory_limit_bytes == count


def test_a_limit_needs_processes_and_a_unit() -> None:
    with pytest.raises(ConfigError, match=naming("'pool.memory_limit' is '300MB'", "'pool.kind' torchrun")):
        small_config(pool={"kind": "inline", "memory_limit": "300MB"})
    with pytest.raises(ConfigError, match="pool.memory_limit"):
        small_config(pool={"kind": "torchrun", "memory_limit": "300"})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pool": {"kind": "ray", "message_buffers": 2}}, ["pool.message_buffers", "2", "pool.kind", "torchrun"]),
        ({"pool": {"backend": "nccl", "message_buffers": 2}}, ["pool.message_buffers", "2", "pool.backend", "gloo"]),
        ({"pool": {"message_buffers": 2}, "method": "ddp"}, ["pool.message_buffers", "2", "ddp", "coordinator"]),
    ],
)
def test_few_message_buffers_are_refused_where_no_coordinator_can_use_them_again(
    changes: dict[str, object], named: list[str]
) -> None:
    with pytest.raises(ConfigError, match=naming(*named)):
        small_config(**{**changes, "pool": {"kind": "torchrun", **changes["pool"]}})  # type: ignore[dict-item]


def test_a_process_starts_under_its_limit_and_keeps_the_lower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import resource; print(*resource.getrlimit(resource.RLIMIT_DATA))"
    command = under_limit([sys.executable, "-c", script], 123 * 2**20 + 5)

    soft, hard = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert (int(soft), int(hard)) == (123 * 2**20, resource.RLIM_INFINITY)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    lower = start_limit(0) + 100 * MB
    monkeypatch.setenv("IST_MEMORY_LIMIT", "100MB")
    resource.setrlimit(resource.RLIMIT_DATA, (lower, before[1]))
    try:
        with limited_memory(10**12, "1000GB", CPU):
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] == lower
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_too_little_memory_to_start_is_refused_by_the_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def starved() -> None:
        raise MemoryError

    monkeypatch.setattr("ist.cli.main.app", starved)
    monkeypatch.setenv("IST_MEMORY_LIMIT", "50MB")

    with pytest.raises(SystemExit):
        main()

    assert re.search(naming("'pool.memory_limit'", "50MB", "at its start"), capsys.readouterr().err)


@pytest.mark.parametrize("coordinator", ["dedicated", "trains"])
def test_only_workers_that_do_not_coordinate_start_under_the_limit(coordinator: str) -> None:
    pool = {"kind": "torchrun", "device": "cpu", "coordinator": coordinator, "memory_limit": "300MB"}
    config = small_config(pool=pool)
    environments: list[dict[str, str]] = [{} for _ in range(num_processes(config))]

    commands = limited_commands(config, ["ist", "process"], environments)

    assert commands[0] == ["ist", "process"]
    assert environments[0] == {}
    for command, environment in zip(commands[1:], environments[1:], strict=True):
        assert command[-2:] == ["ist", "process"]
        assert command[0] == "/bin/sh"
        assert environment["IST_MEMORY_LIMIT"] == "300MB"


@pytest.mark.system
@pytest.mark.timeout(400)
def test_a_worker_of_a_large_network_runs_in_the_memory_of_its_share_from_its_first_second(tmp_path: Path) -> None:
    model = {"layers": 2, "dtype": "float32", "width": 4096, "hidden": 11008}

    found = run(model, workers=4, optimizer="SGD", folder=tmp_path, is_checked=False)

    assert found["rounds"] == 3
    assert found["parameters"] > 350 * 10**6
    assert found["limit_bytes"] < 2 * found["network_bytes"]  # weights and gradient of the full network do not fit
    predicted = sum(found["predicted"]["worker"].values())
    assert predicted == pytest.approx(found["memory_bytes"], rel=0.1)


@pytest.mark.system
def test_a_width_that_data_parallel_training_cannot_hold_trains_by_ist(ist_command: Run, tmp_path: Path) -> None:
    wide = [
        "--set", "model.args.widths=[64, 2048, 2048, 10]", "--set", "pool.memory_limit=50MB", "--set", "train.rounds=2",
    ]  # fmt: skip
    config = str(ROOT / "configs" / "quickstart.yaml")

    refused = ist_command("train", config, "--method", "ddp", *wide, "--run-dir", str(tmp_path / "ddp"))
    trained = ist_command("train", config, *wide, "--run-dir", str(tmp_path / "ist"))

    assert refused.returncode == 1
    assert re.search(naming("'pool.memory_limit'", "50MB"), refused.stderr)
    assert "--resume" not in refused.stderr  # the resumed run would fail again
    assert trained.returncode == 0
    assert json.loads((tmp_path / "ist" / "result.json").read_text())["rounds"] == 2
