"""The CUDA path: run where a GPU is at hand. Processes share it over gloo, as NCCL wants one for each."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ist.config.load import dump_config
from ist.distributed.memory_limit import limited_memory
from ist.errors import MemoryLimitError
from ist.runs.execute import execute
from ist.storage.checkpoint import read_tensors
from ist.storage.run_folder import create_run_folder
from ist.subnet.cut import cut_specs, extract, on_device, reassemble
from ist.subnet.job import assignments
from tests.baselines.program import RESUMED, RUNS
from tests.baselines.program import WORKERS as RANKS
from tests.conftest import ROOT, Run, assert_same, clone, config_tree, job_for, run_torchrun, small_config, whole_state
from tests.networks import NETWORKS, seeded
from tests.pools import inside_program
from tests.pools.scenario import SCENARIOS, WORKERS, run
from tests.pools.test_conformance import outcome
from tests.runs.test_resume import VARIANTS, PowerCutError
from tests.runs.test_resume import run as run_folder
from tests.test_configs_and_docs import CONFIGS, loaded, train_a_round

pytestmark = [
    pytest.mark.gpu, pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]  # fmt: skip

MB = 10**6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_local_steps_in_half_precision_learn(dtype: str) -> None:
    job = job_for(seeded(NETWORKS["no batch norm"]), train__rounds=20, train__autocast=dtype, pool__device="cuda")

    part = execute(job, progress=False)

    losses = [record["loss"] for record in part.recorder.history]  # type: ignore[union-attr]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("network", NETWORKS)
def test_cutting_and_merging_on_the_gpu_gives_the_bits_of_the_cpu(network: str) -> None:
    model = seeded(NETWORKS[network])
    job = job_for(model)
    on_cpu = clone(whole_state(job, model))
    on_gpu = {name: tensor.cuda() for name, tensor in on_cpu.items()}
    cuts = assignments(job).cuts(1)
    trained: dict[str, list[Any]] = {"cpu": [], "cuda": []}
    for device, state in (("cpu", on_cpu), ("cuda", on_gpu)):
        there = on_device(cuts, torch.device(device))
        for worker, cut in enumerate(there):
            specs = cut_specs(job.split.specs, cut)
            part = {name: torch.empty(s.shape, dtype=s.dtype, device=device) for name, s in specs.items()}
            extract(state, cut, part)
            for tensor in part.values():
                tensor += worker
            trained[device].append((worker, part))
        reassemble(state, there, trained[device], assignments(job).exclusive(0))

    for name, tensor in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), tensor, rtol=0, atol=1e-6)


def draws(name: str) -> bool:
    """Whether a scenario's training draws random numbers."""
    return SCENARIOS[name]["network"] in ("dropout", "attention")


def assert_near(name: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """As near as sums in another order leave it, of which rounding to few bits makes more."""
    tolerance = 0.05 if any(key.startswith("exchange") for key in SCENARIOS[name]) else 1e-3
    # Before batch norm a bias has no gradient but rounding errors, of which Adam makes whole steps; means move with it.
    adrift = re.compile(r"linear_\d+\.bias|.*\.running_mean" if "train__optimizer" in SCENARIOS[name] else r"(?!)")
    for key, tensor in expected.items():
        if not adrift.fullmatch(key):
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {device: tmp_path_factory.mktemp(device) for device in ("cpu", "cuda")}
    for name in SCENARIOS:
        for device, folder in folders.items():
            run(name, folder, pool={"kind": "inline", "device": device})
    return folders


@pytest.fixture(scope="module", params=["trains", "dedicated"])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    program = [str(ROOT / "tests/pools/scenario.py"), str(folder), request.param, "cuda"]
    run_torchrun(program, WORKERS + (request.param == "dedicated"), timeout=280)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_processes_and_inline_end_with_identical_weights(inline: dict[str, Path], processes: Path, name: str) -> None:
    expected, history = outcome(inline["cuda"], name)
    found, found_history = outcome(processes, name)

    assert_same(found, expected)
    for key in ("loss", "accuracy", "samples", "steps"):
        assert [record[key] for record in found_history] == [record[key] for record in history]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_address")
# Actors take their time to start; how shares are cut and merged is the same for all pools.
@pytest.mark.parametrize(
    "name", ["batch norm, reset", "quantized, error feedback", "kept state, full width, global shuffle"]
)
def test_actors_that_share_a_gpu_end_with_weights_of_inline(inline: dict[str, Path], tmp_path: Path, name: str) -> None:
    run(name, tmp_path, pool={"kind": "ray", "device": "cuda", "ray": {"num_gpus": 0.25}})

    # Ray's coordinator merges on the CPU.
    assert_near(name, outcome(tmp_path, name)[0], outcome(inline["cuda"], name)[0])


# Not with dropout, which attention has too: a GPU draws other random numbers.
@pytest.mark.parametrize("name", [name for name in SCENARIOS if not draws(name)])
def test_a_run_on_the_gpu_ends_near_the_one_on_the_cpu(inline: dict[str, Path], name: str) -> None:
    assert_near(name, outcome(inline["cuda"], name)[0], outcome(inline["cpu"], name)[0])


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {device: tmp_path_factory.mktemp(device) for device in ("cpu", "cuda")}
    for device, folder in folders.items():
        # PowerSGD on the CPU wants to see no GPU.
        visible = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        run_torchrun([str(ROOT / "tests/baselines/program.py"), str(folder), device], RANKS, timeout=280, **visible)
    return folders


@pytest.mark.parametrize("name", RUNS)
def test_every_method_on_the_gpu_ends_near_the_one_on_the_cpu(methods: dict[str, Path], name: str) -> None:
    expected, found = (read_tensors(methods[device] / f"{name}.safetensors")[0] for device in ("cpu", "cuda"))
    told = [json.loads((methods[device] / f"{name}.json").read_text()) for device in ("cpu", "cuda")]

    tolerance = {"ddp_fp16": 2e-3, "ddp_bf16": 2e-2, "diloco": 5e-3}.get(name, 1e-2 if "int8" in name else 1e-3)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
    assert [record["sent_bytes"] for record in told[0]] == [record["sent_bytes"] for record in told[1]]
    assert told[1][-1]["memory_bytes"] > 0


@pytest.mark.parametrize("name", RESUMED)
def test_a_method_that_was_stopped_on_the_gpu_goes_on_as_the_same_run(methods: dict[str, Path], name: str) -> None:
    whole, resumed = (read_tensors(methods["cuda"] / f"{name}{how}.safetensors")[0] for how in ("", ", resumed"))

    assert_same(resumed, whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_on_the_gpu_and_resumed_ends_in_the_same_weights(tmp_path: Path, variant: str) -> None:
    config = small_config(**VARIANTS[variant], train__rounds=5, pool={"kind": "inline", "device": "cuda"})
    whole, broken = (create_run_folder(config, tmp_path / name) for name in ("whole", "broken"))

    with pytest.raises(PowerCutError):
        run_folder(broken, resume=False, stop_after=3)

    assert_same(run_folder(broken, resume=True), run_folder(whole, resume=False))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch_geometric's own
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_trains_on_the_gpu(path: Path) -> None:
    config, splits = loaded(path)

    on_cpu, on_gpu = (train_a_round(config, splits, device) for device in ("cpu", "cuda"))

    assert math.isfinite(on_gpu["test_loss"])
    # Of few steps with other random numbers of dropout, and convolutions in fewer bits.
    assert on_gpu["test_loss"] == pytest.approx(on_cpu["test_loss"], rel=0.1)


def test_processes_of_a_backend_train_as_on_the_cpu(tmp_path: Path) -> None:
    weights = {}
    for name, processes, pool in (
        ("nccl", 1, {"device": "cuda", "backend": "nccl"}),
        ("cpu of one", 1, {"device": "cpu"}),
        ("auto", 2, {"device": "auto", "backend": "auto"}),
        ("cpu of two", 2, {"device": "cpu"}),
    ):
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(config_tree(train__workers=processes, pool={"kind": "torchrun", **pool})))
        run_torchrun(["-m", "ist", "train", str(config), "--run-dir", str(tmp_path / name)], processes, timeout=280)
        weights[name] = read_tensors(tmp_path / name / "model.safetensors")[0]

    for gpu, cpu in (("nccl", "cpu of one"), ("auto", "cpu of two")):
        for name, tensor in weights[cpu].items():
            # Sums in another order; a dozen steps of a small network keep the difference small.
            torch.testing.assert_close(weights[gpu][name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_more_of_the_gpu_than_the_limit_is_refused() -> None:
    gpu = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    with limited_memory(200 * MB, "200MB", gpu):
        torch.zeros(100 * MB, dtype=torch.uint8, device=gpu)

    with (
        pytest.raises(MemoryLimitError, match=r"'pool.memory_limit' \(200MB\)"),
        limited_memory(200 * MB, "200MB", gpu),
    ):
        torch.zeros(300 * MB, dtype=torch.uint8, device=gpu)

    torch.zeros(300 * MB, dtype=torch.uint8, device=gpu)  # the limit went with the context


def test_a_width_that_the_gpu_has_no_room_for_in_data_parallel_training_trains_by_ist(
    ist_command: Run, tmp_path: Path
) -> None:
    changes = {"model__args": {"widths": [64, 4096, 4096, 10]}, "train__rounds": 2}
    place = {"kind": "torchrun", "device": "cuda", "memory_limit": "150MB"}
    codes = {}
    for method in ("ddp", "ist"):
        pool = {**place, "coordinator": "trains" if method == "ddp" else "dedicated"}
        config = tmp_path / f"{method}.yaml"
        config.write_text(dump_config(small_config(**changes, method=method, pool=pool)))
        codes[method] = ist_command("train", config, "--run-dir", tmp_path / method, timeout=200)

    assert codes["ddp"].returncode == 1
    assert "a worker needs more memory than 'pool.memory_limit' (150MB) gives it" in codes["ddp"].stderr
    assert codes["ist"].returncode == 0, codes["ist"].stderr
    assert json.loads((tmp_path / "ist" / "result.json").read_text())["memory_bytes"] < 150 * MB


@pytest.mark.parametrize("inside", ["ddp", "fsdp"])
def test_workers_of_two_ranks_on_the_gpu_train_as_with_the_whole_batch(tmp_path: Path, inside: str) -> None:
    if inside == "fsdp" and torch.cuda.device_count() < 4:
        pytest.skip("sharded parameters on GPUs need NCCL, and so a GPU for each of four ranks")
    run_torchrun([str(ROOT / inside_program.__file__), str(tmp_path), "cuda", inside], 4, timeout=280)

    for name in inside_program.SCENARIOS:
        inside_program.run(name, tmp_path, kind="inline", device="cpu")
        expected, found = (read_tensors(folder / f"{name}.safetensors")[0] for folder in (tmp_path, tmp_path / inside))
        for key, tensor in expected.items():
            # Sums of float64 in another order, by other kernels.
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-8, msg=f"{name}, {key}")
