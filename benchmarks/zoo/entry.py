"""The entry of one architecture in the zoo: how to build it, and its inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
BATCH = 2


@dataclass(frozen=True)
class Entry:
    """An architecture: `network(*args, **kwargs)` runs, with `network = build()` and `args, kwargs = inputs()`.

    Both may be called under `torch.device("meta")`, unless `on_meta` is false: then the network's package needs values
    to build it.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    package: str
    family: str
    on_meta: bool = True


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder that builds the same network every time, without changing the global random state.

    Parameters with a constant initial value get random values. Otherwise a gain of zero, a layer scale of 1e-6 or
    biases of zero would hide wrong cuts of the branch to which they belong.
    """

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            network = make()
            for parameter in network.parameters():
                if not parameter.is_meta and parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                    parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        return network

    return build


def drawn(make: Callable[[], Inputs]) -> Callable[[], Inputs]:
    """Return a function that draws the same inputs every time, without changing the global random state."""

    def draw() -> Inputs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return make()

    return draw


def images(size: int, channels: int = 3) -> Callable[[], Inputs]:
    """Draw a batch of square images, passed by position."""
    return drawn(lambda: ((torch.randn(BATCH, channels, size, size),), {}))


def values(*shape: int) -> Callable[[], Inputs]:
    """Draw a batch of normal values of this shape, passed by position."""
    return drawn(lambda: ((torch.randn(BATCH, *shape),), {}))


def tokens(vocabulary: int, length: int) -> Tensor:
    """Draw a batch of token numbers without the lowest ones, which are often special."""
    return torch.randint(5, vocabulary, (BATCH, length))
