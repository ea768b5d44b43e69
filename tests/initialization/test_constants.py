"""Constants of a network are made without its parameters, with the bits of the network that is really built."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ist.initialization import in_files
from ist.initialization.constants import built_without_parameters, constants
from ist.initialization.in_files import large_tensors_in_files
from ist.network.copies import on_meta
from ist.rng import Purpose, seeded
from ist.tensors import constant_tensors
from tests.conftest import naming


class Frequencies(nn.Module):
    """Rotary frequencies, a mask and a plain tensor: none depends on a parameter or on a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.register_buffer("inverse", 1 / 10_000 ** (torch.arange(0, 6, 2) / 6), persistent=False)
        self.register_buffer("mask", torch.empty(5, 5).fill_(-torch.inf).triu_(1), persistent=False)
        self.scale = torch.tensor([0.25, 4.0])
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]


class TiedBeforeUse(nn.Module):
    """A parameter that two modules get before it has values, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(4, 4))
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.one.weight = weight
        self.two.weight = weight
        self.register_buffer("steps", torch.arange(4), persistent=False)


class FromParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("norm", self.linear.weight.detach().norm(), persistent=False)


class FromValuesBeforeTheyAreAParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.ones(3, 3))
        self.weight = weight
        nn.init.normal_(weight)
        self.register_buffer("largest", weight.detach().amax(), persistent=False)


class FromRandomNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("directions", (torch.randn(3, 2) * 2).t(), persistent=False)


class FromRandomNumbersOfNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("plain", torch.from_numpy(np.random.randn(3)), persistent=False)
        self.register_buffer("seeded", torch.from_numpy(torch.randn(3).numpy() * 2), persistent=False)


class WrittenInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("noise", torch.zeros(2, 3), persistent=False)
        self.get_buffer("noise")[1].uniform_()


class RandomChoice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("chosen", torch.tensor(float(torch.randperm(9)[0])), persistent=False)


class NormedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the newer spelling is torch.nn.utils.parametrizations
            self.linear = nn.utils.weight_norm(nn.Linear(3, 3))


def maker(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with seeded(torch.device("cpu"), 3, Purpose.MODEL):
            return kind()

    return make


WITHOUT = [Frequencies, TiedBeforeUse]
WHOLE = [
    FromParameter, FromValuesBeforeTheyAreAParameter, FromRandomNumbers, FromRandomNumbersOfNumpy, WrittenInPlace,
    RandomChoice, NormedWeight,
]  # fmt: skip


@pytest.mark.parametrize("kind", WITHOUT + WHOLE)
def test_constants_have_the_bits_of_the_network_that_is_really_built(kind: type[nn.Module]) -> None:
    make = maker(kind)
    built = make()

    found = constants(on_meta(built), make)

    assert found.keys() == constant_tensors(built).keys() != set()
    for name, tensor in constant_tensors(built).items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name])


@pytest.mark.parametrize("kind", WITHOUT)
def test_constants_are_made_without_parameters(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    make = maker(kind)
    monkeypatch.setattr("ist.initialization.constants.built_whole", lambda *_: pytest.fail("the network was built"))

    found = constants(on_meta(make()), make)
    network = built_without_parameters(make)

    assert found.keys() == constant_tensors(network).keys()
    assert all(parameter.is_meta for parameter in network.parameters())
    assert len(list(network.parameters())) == len(list(make().parameters()))  # tied ones are


@pytest.mark.parametrize("kind", WHOLE)
def test_a_large_network_that_must_be_built_for_its_constants_is_named_with_its_bytes(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = maker(kind)
    template = on_meta(make())
    monkeypatch.setattr(in_files, "_SMALL_BYTES", 20)

    with pytest.warns(UserWarning, match=naming("full network", "MiB", "persistent buffers")) as caught:
        constants(template, make)

    names = [*constant_tensors(template), "cannot be created"]
    assert any(name in str(caught[0].message) for name in names)


class Wide(nn.Module):
    """Parameters of more than a page, made in several ways, and read by the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(700, 600)
        self.drawn = nn.Parameter(torch.randn(512, 1024))
        self.turned = nn.Parameter(torch.rand(1024, 512).t())
        self.tied = nn.Linear(700, 600)
        self.tied.weight = self.linear.weight
        self.register_buffer("rounded", self.drawn.detach().half())
        nn.init.orthogonal_(self.linear.weight)
        self.drawn.data[3:5] = 1.0


def test_a_network_in_files_is_the_network_and_is_trained_like_it() -> None:
    plain = maker(Wide)()
    with large_tensors_in_files() as files:
        filed = maker(Wide)()

    assert {name for name, tensor in filed.state_dict().items() if files.holds(tensor)} == set(filed.state_dict()) - {
        "linear.bias", "tied.bias"
    }  # fmt: skip
    assert filed.get_parameter("tied.weight") is filed.get_parameter("linear.weight")
    for network in (plain, filed):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        wide = cast(Any, network)
        loss = functional.mse_loss(wide.linear(torch.ones(2, 700)), torch.ones(2, 600)) + wide.drawn.square().sum()
        loss.backward()
        optimizer.step()
    for left, right in zip(plain.state_dict().values(), filed.state_dict().values(), strict=True):
        assert torch.equal(left, right)
        assert left.stride() == right.stride()


def test_a_full_disk_is_an_error_that_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)

    with pytest.raises(in_files.ModelError, match=naming("No space", "TMPDIR")), large_tensors_in_files():
        _: Tensor = torch.empty(2**20)
