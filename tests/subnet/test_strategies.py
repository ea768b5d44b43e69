"""Training with every strategy that assigns neurons, and with whole blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ist
from ist.checks.verify import verify_cuts
from ist.errors import ConfigError, ModelError
from ist.models.mlp import MLP
from ist.subnet.job import assignments
from ist.subnet.residual_blocks import scaled_blocks
from tests.conftest import clone, data, naming
from tests.networks import seeded
from tests.neurons.networks import rand, stack
from tests.neurons.test_neurons import job_of

STRATEGIES: dict[str, dict[str, Any]] = {
    "capacities": {"capacities": [1.0, 2.0, 5.0]},
    "categorical": {"strategy": "categorical"},
    "bernoulli": {"strategy": "bernoulli", "keep": 0.6},
    "rolling": {"strategy": "rolling", "capacities": [1.0, 0.5, 0.25], "keep": 0.5},
    "nested": {"strategy": "nested", "capacities": [1.0, 0.5, 0.25]},
}


def train(model: nn.Module, partition: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return ist.train(
        model, data(300), workers=3, local_steps=5, rounds=12, batch_size=20, test_data=data(100, seed=1),
        optimizer_args={"lr": 0.05, "momentum": 0.9}, partition=partition, progress=False, **options,
    ).history  # fmt: skip


@pytest.mark.parametrize("partition", STRATEGIES.values(), ids=STRATEGIES.keys())
@pytest.mark.parametrize("state", ["reset", "carried"])
def test_every_strategy_learns(partition: dict[str, Any], state: str) -> None:
    history = train(seeded(lambda: MLP([12, 24, 20, 5])), partition, train_options={"optimizer_state": state})

    assert history[-1]["accuracy"] > history[0]["accuracy"]
    assert history[-1]["test_loss"] < 0.9 * history[0]["test_loss"]


def test_unequal_capacities_send_unequal_bytes() -> None:
    history = train(
        seeded(lambda: MLP([12, 24, 20, 5])), STRATEGIES["capacities"], pool_options={"coordinator": "dedicated"}
    )

    sent = history[0]["bytes_to_worker"]
    assert sent[0] < sent[1] < sent[2]


def test_whole_blocks_are_assigned_and_scaled_when_the_full_network_is_evaluated() -> None:
    model = seeded(stack)
    before = clone(dict(model.named_parameters()))

    history = train(
        model, {"strategy": "blocks", "blocks": ["1.*"], "min_depth": 3}, pool_options={"coordinator": "dedicated"}
    )

    assert history[-1]["accuracy"] > max(0.55, history[0]["accuracy"])
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    full = sum(p.numel() for p in model.parameters()) * 4
    assert 0 < history[0]["bytes_to_worker"][0] < full
    inputs, targets = data(100, seed=1).tensors
    with scaled_blocks(model.eval(), {f"1.{block}": 3 / 5 for block in range(5)}), torch.no_grad():
        accuracy = float((model(inputs).argmax(1) == targets).float().mean())
    assert accuracy == pytest.approx(history[-1]["accuracy"])


def test_a_module_that_is_not_a_residual_block_is_refused_as_one() -> None:
    model = seeded(lambda: nn.Sequential(*[nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3)]))

    with pytest.raises(ModelError, match=naming("'partition.blocks'", "residual blocks")):
        train(model, {"strategy": "blocks", "blocks": ["?"]})


@pytest.mark.parametrize(
    ("partition", "parts"),
    [
        ({"exclude": ["no.such*"]}, ["'partition.exclude'", "'no.such*'", "linear_1"]),
        (
            {"strategy": "blocks", "blocks": ["layer9.*"]},
            ["'partition.blocks'", "'layer9.*'", "0 modules", "at least two"],
        ),
        ({"sizes": {"none.*": {"a": "b"}}}, ["'partition.sizes'", "'none.*'"]),
        ({"sizes": {"linear_1": {"heads": "weight"}}}, ["'linear_1'", "'heads'"]),
        ({"sizes": {"linear_1": {"in_features": "nothing"}}}, ["'linear_1'", "'nothing'"]),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(partition: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        train(seeded(lambda: MLP([12, 24, 20, 5])), partition)

    assert all(part in str(caught.value) for part in parts)


def test_an_excluded_group_is_shared() -> None:
    model = seeded(lambda: MLP([12, 24, 20, 5]))
    job = job_of(model, rand(2, 12), partition__exclude=["linear_1"])

    assert [group.name for group in job.split.groups] == ["linear_2"]
    assert job.split.submodel_plan(assignments(job).of(0)[0]).specs["linear_1.weight"].shape == (24, 12)


class Declared(nn.Module):
    """Computes its hidden units in a Python loop, whose length cannot be seen in any call of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.up, self.down = nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        return self.down(torch.stack([hidden[..., n].relu() for n in range(int(str(self.width)))], dim=-1))


def test_a_size_that_is_not_found_can_be_declared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loop = Declared()

        def forward(self, x: Tensor) -> Tensor:
            return self.loop(x)

    with pytest.raises(ModelError, match=naming("'loop'", "docs/groups.md")):
        job_of(seeded(Model), rand(2, 5, 20))
    sizes = {"loop": {"width": "up.weight"}}
    job = job_of(seeded(Model), rand(2, 5, 20), partition__sizes=sizes)

    assert [(group.name, group.size) for group in job.split.groups] == [("loop", 12)]
    verify_cuts(job)


def test_inputs_may_be_mappings_and_outputs_may_have_logits() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP([12, 24, 5])

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x * scale[:, None]), "scale": scale}

    class Items(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            x, target = super().__getitem__(index)
            return {"x": x, "scale": torch.tensor(1.0)}, target

    inputs = Items(*data(200).tensors)
    history = ist.train(
        seeded(Model), inputs, workers=2, local_steps=5, rounds=6, batch_size=20, test_data=inputs, progress=False
    ).history

    assert history[-1]["accuracy"] > 0.5
