"""A copy of a network shares nothing with it, and attachments that cannot be copied are refused by name."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import ist
from ist.errors import ModelError
from ist.network.copies import copied, on_meta
from tests.conftest import data
from tests.networks import seeded


def train(model: nn.Module, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"workers": 2, "local_steps": 3, "rounds": 2, "batch_size": 10, "progress": False}
    return ist.train(model, data(60), **settings | options).model


def plain() -> Any:
    return seeded(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)))


class Holding(nn.Module):
    """Refers to itself through functions of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)
        self.gain, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.activation = lambda x: x.relu() * self.gain
        self.steps: list[Any] = [lambda x, me=self: x + me.shift, functools.partial(lambda me, x: me.last(x), self)]
        inner = lambda x: self.first(x)  # noqa: E731
        self.chain = {"first": functools.partial(lambda x, through: through(x), through=self.first), "inner": inner}

    def forward(self, x: Tensor) -> Tensor:
        x = (self.chain["first"](x) + self.chain["inner"](x)) / 2
        return self.steps[1](self.steps[0](self.activation(x)))


def test_functions_that_refer_to_the_network_refer_to_the_copy_in_a_copy() -> None:
    model, inputs = seeded(Holding), torch.randn(3, 12)
    expected = model(inputs)

    made = copied(model)
    made(inputs).sum().backward()
    moved = on_meta(model)

    assert torch.equal(made(inputs), expected)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in made.parameters())
    assert moved(inputs.to("meta")).is_meta
    with torch.no_grad():
        made.gain.mul_(2)
    assert torch.equal(model(inputs), expected)  # the functions of the network are unchanged


def test_a_network_that_refers_to_itself_through_a_lambda_trains_as_one_that_does_not() -> None:
    class Lambda(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)
            self.hidden = lambda x: self.first(x).relu()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.hidden(x))

    class Method(Lambda):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    options = {"recipe": {"average": {"kind": "ema"}}, "test_data": data(20)}
    found, expected = (train(seeded(kind), **options).state_dict() for kind in (Lambda, Method))

    for name in expected:
        assert torch.equal(found[name], expected[name]), name


GLOBAL = plain()


def global_hook(*call: Any) -> Tensor:
    return call[-1] * GLOBAL[0].bias


def made_with(parts: Any) -> Callable[..., None]:
    return lambda *_: keeping(parts=parts)


def keeping(*_: Any, parts: Any = None) -> None:
    """Do nothing; the test needs only its arguments."""


@pytest.mark.parametrize(
    ("hook", "used"),
    [
        (lambda _: global_hook, "the network"),
        (lambda model: functools.partial(keeping, parts=(lambda: model,)), "the network"),
        (lambda model: made_with([model[2].weight]), r"'2\.weight'"),
    ],
    ids=["a global variable", "within a tuple", "within a list"],
)
def test_a_hook_that_would_still_use_the_original_is_refused(hook: Callable[[Any], Any], used: str) -> None:
    model = GLOBAL
    handle = model[0].register_forward_hook(hook(model))

    with pytest.raises(ModelError, match=rf"'0\._forward_hooks' .*'.*'.* {used} .*method"):
        train(model)
    handle.remove()


class Shared:
    """Returns itself instead of a copy."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def __deepcopy__(self, memo: Any) -> "Shared":
        return self


def test_a_forward_that_uses_the_original_through_another_object_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)
            self.shared = Shared(self.last)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared.part(self.first(x).relu())

    with pytest.raises(ModelError, match=r"copy .*'last\.weight'.*original"):
        train(Odd(), workers=1)


def test_an_attribute_that_cannot_be_copied_is_named() -> None:
    model = plain()
    model[2].guard = threading.Lock()

    with pytest.raises(ModelError, match=r"'2\.guard' .*lock.*cannot pickle '_thread\.lock' obj"):
        train(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.filterwarnings("ignore:operator aten")  # some of them have no rules, which does not matter here
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: nn.utils.weight_norm(layer),
        lambda layer: nn.utils.spectral_norm(layer),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.spectral_norm(layer),
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
    ],
    ids=["weight norm, old", "spectral norm, old", "weight norm", "spectral norm", "pruning"],
)
def test_a_layer_whose_weight_is_computed_in_a_hook_is_trained(change: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(change(nn.Linear(12, 8)), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    train(model)

    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


class Marked(nn.Parameter):
    """A user's parameter class."""


def test_a_parameter_keeps_its_class_and_its_attributes_in_a_submodel() -> None:
    seen = []

    class Reading(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((type(self.weight), self.weight.scale))
            return super().forward(x) * self.weight.scale

    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), Reading(8, 5))
    model[2].weight = Marked(model[2].weight.data)
    model[2].weight.scale = 0.5

    trained = train(model, test_data=data(20))

    assert set(seen) == {(Marked, 0.5)}
    assert trained[2].weight.scale == 0.5


def hooked(register: str) -> nn.Module:
    model = plain()
    mask = torch.ones(5, 1)
    mask[0] = 0
    getattr(model[2].weight, register)(lambda gradient: gradient * mask)
    return model


def attached() -> nn.Module:
    model = plain()
    model[2].weight.mask = [torch.ones(5, 8)]
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: hooked("register_hook"),
            r"'2\.weight' .*\(register_hook: hooked\..*\.py:\d+.*train\.optimizer\.name",
        ),
        (
            lambda: hooked("register_post_accumulate_grad_hook"),
            r"'2\.weight' .*\(register_post_accumulate_grad_hook: hooked\.",
        ),
        (attached, r"'2\.weight' .*'mask'.*register_buffer"),
    ],
    ids=["hook", "post-accumulate hook", "tensor"],
)
def test_attachments_of_a_parameter_that_cannot_be_cut_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        train(build())


def test_a_hook_on_a_frozen_parameter_is_allowed() -> None:
    model = hooked("register_hook")
    model[2].weight.requires_grad_(False)

    train(model)
