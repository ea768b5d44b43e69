"""A loss that would give gradients to other tensors than trained ones is refused before the run starts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ist
from ist.errors import ModelError
from tests.conftest import data, naming
from tests.networks import seeded


def train(model: nn.Module, loss: Any = "cross_entropy", **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "local_steps": 3, "rounds": 2, "batch_size": 10, "progress": False}
    return ist.train(model, data(60), loss=loss, **settings | options).model


def plain() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)))


def by_closure(model: nn.Module) -> Any:
    return lambda outputs, targets: (
        functional.cross_entropy(outputs, targets) + sum(p.square().sum() for p in model.parameters())
    )


def by_list(model: nn.Module) -> Any:
    weights = [model[0].weight]  # type: ignore[index]
    return lambda outputs, targets: functional.cross_entropy(outputs, targets) + weights[0].square().sum()


class Penalised(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets) + self.network[0].weight.square().sum()


class Trainer:
    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets) + self.network[2].bias.square().sum()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (by_closure, ["the loss (by_closure.", "the network", "weight decay"]),
        (Penalised, ["the loss (Penalised)", "the network", "weight decay"]),
        (by_list, ["'0.weight'", "passed in", "weight decay"]),
        (lambda model: Trainer(model).loss, ["'2.bias'", "passed in", "weight decay"]),
    ],
    ids=["closure", "module", "list", "method"],
)
def test_a_penalty_on_the_network_that_was_passed_in_is_refused(make: Callable[[Any], Any], parts: list[str]) -> None:
    model = plain()

    with pytest.raises(ModelError, match=naming(*parts)):
        train(model, make(model))

    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tensor", "kind"), [(nn.Parameter(torch.ones(1)), "Parameter"), (torch.ones(1, requires_grad=True), "Tensor")]
)
def test_a_loss_with_weights_of_its_own_is_refused(tensor: Tensor, kind: str) -> None:
    with pytest.raises(ModelError, match=naming(f"a {kind} of shape (1,)", "detach it")):
        train(plain(), lambda outputs, targets: functional.cross_entropy(outputs * tensor, targets))

    assert tensor.grad is None


def test_a_loss_may_create_tensors_that_it_differentiates() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        scale = torch.ones(1, requires_grad=True)
        return functional.cross_entropy(outputs * scale, targets)

    train(plain(), loss)


class Bent(nn.Module):
    """Computes a penalty on its weights in the forward, and its inputs require gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        inputs = x.detach().requires_grad_()
        hidden = self.first(inputs).relu()
        penalty = self.first.weight.square().sum() * 0
        return {"logits": self.last(hidden) + inputs.sum() * 0, "penalty": penalty}


def test_inputs_with_gradients_and_penalties_from_the_forward_are_accepted() -> None:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs["logits"], targets) + outputs["penalty"]

    train(seeded(Bent), loss, workers=1)


class OwnLoss(nn.Sequential):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)


def test_a_method_of_the_network_as_its_loss_is_warned_of() -> None:
    model = OwnLoss(*plain())

    with pytest.warns(UserWarning, match=naming("'OwnLoss.loss'", "a method of the network")):
        train(model, model.loss)


def test_a_module_in_a_plain_list_is_named_in_a_warning() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.last = [nn.Linear(12, 8)], nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.hidden[0](x))

    with pytest.warns(UserWarning, match=naming("a parameter of shape (8", "nn.ModuleList", "nn.ParameterList")):
        train(seeded(Listed), workers=1)
