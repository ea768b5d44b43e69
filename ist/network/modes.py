"""Training and evaluation mode, module by module: they are the user's.

A network may hold some of its modules in evaluation mode: a frozen batch norm, a dropout that is switched off. It is
trained so, evaluated as a whole, and comes back as it was.

Where it sits: `ist/runs/build.py` reads the modes once, for all copies of the network; `ist/evaluation/evaluate.py` and
`ist/api.py` put them back.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

Modes = Mapping[str, bool]
"""For the path of every module, whether it is in training mode."""


def modes_of(network: nn.Module) -> dict[str, bool]:
    """Return the mode of every module of a network."""
    return {path: module.training for path, module in network.named_modules()}


def set_modes(network: nn.Module, modes: Modes) -> None:
    """Give every module of a network the mode that `modes_of` returned for it; modules that are new since keep theirs.

    A module that does more than note its mode (one that merges an adapter's weights for evaluation) is told by its
    own `train`.
    """
    # Outer modules first: their `train` reaches the inner ones, which then get their own mode.
    for path, module in network.named_modules():
        if module.training != modes.get(path, module.training):
            module.train(modes[path])
    for path, module in network.named_modules():
        module.training = modes.get(path, module.training)


def settle_modes(network: nn.Module) -> dict[str, bool]:
    """Put a network into the modes in which it is trained, and return them.

    They are the modes that it has; but where the network's own `train` puts modules into evaluation mode, they are in
    that mode, as they would be in a loop that calls `train` first.

    Args:
        network: Any network. One that is in evaluation mode itself is left as it is.
    """
    own = modes_of(network)
    if network.training:
        network.train()
        own = {path: own[path] and mode for path, mode in modes_of(network).items()}
        set_modes(network, own)
    return own


@contextmanager
def kept_modes(network: nn.Module) -> Iterator[None]:
    """Let modes change inside of the `with` block only."""
    modes = modes_of(network)
    try:
        yield
    finally:
        set_modes(network, modes)
