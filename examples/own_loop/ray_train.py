"""Train with `ist.join` in the worker function of a Ray Train `TorchTrainer`.

python examples/own_loop/ray_train.py [FOLDER]      # for Ray Train's results; default: ~/ray_results

On two cores: accuracy 89.9%, as by `torchrun_ist.py`, in one minute, most of it for starting Ray.

Ray Train places the workers and forms the process group; `ist.join` uses it. Every worker is one of the run's, and
needs the same run secret, as on any cluster (README.md, Security). `pip install 'ray[train]' scikit-learn`.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ist


def train_worker(config: dict[str, Any]) -> None:
    """Train as one worker; the last report has the accuracy."""
    torch.manual_seed(0)
    digits = load_digits()
    images, classes = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target).long()
    train = TensorDataset(images[:1400], classes[:1400])
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    run = ist.join(
        model, example=images[:2], local_steps=20, rounds=config["rounds"], progress=False,
        optimizer=lambda named: torch.optim.AdamW(named.values(), lr=config["lr"]),
    )  # fmt: skip
    sampler = DistributedSampler(train, run.num_workers, run.worker)
    loader = DataLoader(train, batch_size=32, sampler=sampler)

    for part in run:
        for inputs, targets in part.take(loader):
            loss = nn.functional.cross_entropy(part.model(inputs), targets)
            loss.backward()
            part.optimizer.step()
            part.optimizer.zero_grad()
            part.log(loss, len(inputs))
        ray.train.report({"round": part.round, "loss": part.loss_sum / part.samples})

    if not run.is_coordinator:  # rank 0 has the trained network
        ray.train.report({})
        return
    accuracy = float((model(images[1400:]).argmax(dim=1) == classes[1400:]).float().mean())
    with TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "model.pt")
        ray.train.report({"accuracy": accuracy}, checkpoint=Checkpoint.from_directory(folder))


def main(storage: str | None = None) -> None:
    """Train with two workers, and print the accuracy that rank 0 reported with its checkpoint."""
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"rounds": 22, "lr": 1e-3},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=storage),
    )
    metrics = trainer.fit().metrics
    assert metrics is not None
    print(f"accuracy {metrics['accuracy']:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
