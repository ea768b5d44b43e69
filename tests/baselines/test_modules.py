"""The methods that IST is compared with train users' modules without changing their modes, hooks and tensors."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ist.baselines.ddp import DataParallel
from ist.distributed.process_group import Membership
from ist.errors import ModelError
from ist.loops.part import completed
from ist.monitoring.meter import Meter
from ist.network.modes import modes_of
from ist.runs.opening.process import implementation
from ist.training.rounds import evaluate_full_network
from tests.conftest import data, job_for, naming
from tests.networks import Router, seeded


@pytest.fixture
def alone() -> Iterator[Membership]:
    """A process group of one rank: this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Membership(0, 1, torch.device("cpu"), "gloo")
    dist.destroy_process_group()


def test_ddp_refuses_a_forward_that_changes_a_dtype(alone: Membership) -> None:
    job = job_for(seeded(Router), method="ddp", train__workers=1, pool={"kind": "torchrun", "device": "cpu"})

    with pytest.raises(ModelError, match=naming("'router.weight'", "torch.bfloat16", "torch.float32", "method 'ddp'")):
        DataParallel(job, alone, job.task.build(), {}, Meter())


class Odd(nn.Module):
    """A network with a frozen norm, a parameter that gets other memory in the forward, and a hook that freezes a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.norm.running_mean.fill_(0.3)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data = self.scale.data.clone()
        return self.last(self.norm(self.first(x)).relu()) * self.scale


@pytest.mark.parametrize("method", ["ddp", "local_sgd", "diloco"])
def test_a_baseline_trains_modules_as_the_user_has_set_them(method: str, alone: Membership) -> None:
    model = seeded(Odd)
    mask = torch.ones(5, 1)
    mask[0] = 0
    model.last.weight.register_hook(lambda gradient: gradient * mask)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    job = job_for(model, test=data(20), method=method, train__workers=1, pool={"kind": "torchrun", "device": "cpu"})
    trained = implementation(job.config)(job, alone, job.task.build(), {}, Meter())

    for round_number in range(2):
        completed(trained.train_round(round_number))
        evaluate_full_network(job, trained.model, alone.device)

    after = trained.checkpoint_state()
    assert torch.equal(after["norm.running_mean"], before["norm.running_mean"])
    assert torch.equal(after["last.weight"][0], before["last.weight"][0])
    assert not torch.equal(after["last.weight"][1], before["last.weight"][1])
    assert not torch.equal(after["scale"], before["scale"])
    assert modes_of(trained.model) == dict.fromkeys(modes_of(model), True) | {"norm": False}
