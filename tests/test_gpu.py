"""The CUDA path: run where a GPU is at hand."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ist.checkpoint import read_tensors
from ist.subnet import cut_specs, extract, reassemble
from tests.conftest import ROOT, clone, config_tree, job_for, run_group, whole_state
from tests.networks import NETWORKS, seeded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("network", NETWORKS)
def test_cutting_and_merging_on_the_gpu_gives_the_bits_of_the_cpu(network: str) -> None:
    model = seeded(NETWORKS[network])
    job = job_for(model)
    on_cpu = clone(whole_state(job, model))
    on_gpu = {name: tensor.cuda() for name, tensor in on_cpu.items()}
    cuts = job.cuts(1)
    trained: dict[str, list[Any]] = {"cpu": [], "cuda": []}
    for device, state in (("cpu", on_cpu), ("cuda", on_gpu)):
        for worker, cut in enumerate(cuts):
            specs = cut_specs(job.specs, cut)
            part = {name: torch.empty(s.shape, dtype=s.dtype, device=device) for name, s in specs.items()}
            extract(state, cut, part)
            for tensor in part.values():
                tensor += worker
            trained[device].append((worker, part))
        reassemble(state, cuts, trained[device], job.exclusive(0))

    for name, tensor in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), tensor, rtol=0, atol=1e-6)


def run(tmp_path: Path, name: str, processes: int, **changes: Any) -> dict[str, torch.Tensor]:
    config = tmp_path / f"{name}.yaml"
    config.write_text(yaml.safe_dump(config_tree(train__workers=processes, **changes)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "ist", "train", str(config), "--run-dir", str(tmp_path / name)]
    done = run_group(command, ROOT, dict(os.environ), 110)
    assert done.returncode == 0, done.stderr
    return read_tensors(tmp_path / name / "model.safetensors")[0]


@pytest.mark.parametrize(("backend", "processes"), [("nccl", 1), ("gloo", 2), ("auto", 2)])
def test_processes_on_a_gpu_train_as_processes_on_the_cpu(tmp_path: Path, backend: str, processes: int) -> None:
    gpu = run(tmp_path, "gpu", processes, pool={"kind": "torchrun", "device": "cuda", "backend": backend})
    cpu = run(tmp_path, "cpu", processes, pool={"kind": "torchrun", "device": "cpu"})

    for name, tensor in cpu.items():
        # Sums in another order; a dozen steps of a small network keep the difference small.
        torch.testing.assert_close(gpu[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_data_parallel_trains_on_the_gpu(tmp_path: Path) -> None:
    weights = run(tmp_path, "ddp", 2, method="ddp", pool={"kind": "torchrun", "device": "cuda", "backend": "gloo"})

    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
