"""Training and evaluation mode of each module, as the user has set them.

A network may have some of its modules in evaluation mode: a frozen batch norm, a dropout that is switched off. It
trains in these modes. Evaluation puts all modules into evaluation mode and restores their modes afterwards.

Where it sits: `ist/runs/build.py` reads the modes once, for all copies of the network; `ist/evaluation/evaluate.py`
and `ist/api.py` restore them.
Not here: evaluation itself (`ist/evaluation/evaluate.py`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

Modes = Mapping[str, bool]
"""For the path of each module, whether it is in training mode."""


def modes_of(network: nn.Module) -> dict[str, bool]:
    """Return the mode of every module of a network."""
    return {path: module.training for path, module in network.named_modules()}


def set_modes(network: nn.Module, modes: Modes) -> None:
    """Give each module of a network the mode that `modes_of` returned for it; other modules keep theirs.

    The modules' own `train` is called, because it may do more than set the mode (merge an adapter's weights, say).
    """
    # Outer modules first: their `train` also changes the inner ones, which get their own mode afterwards.
    for path, module in network.named_modules():
        if module.training != modes.get(path, module.training):
            module.train(modes[path])
    for path, module in network.named_modules():
        module.training = modes.get(path, module.training)


def enter_training_modes(network: nn.Module) -> dict[str, bool]:
    """Put a network into the modes in which it trains, and return them.

    These are its current modes, except that modules which the network's own `train` puts into evaluation mode are in
    that mode, as in a loop that calls `train` first.

    Args:
        network: Any network. If it is in evaluation mode itself, its modes do not change.
    """
    own = modes_of(network)
    if network.training:
        network.train()
        own = {path: own[path] and mode for path, mode in modes_of(network).items()}
        set_modes(network, own)
    return own


@contextmanager
def preserve_modes(network: nn.Module) -> Iterator[None]:
    """Restore the modes of a network when the `with` block ends."""
    modes = modes_of(network)
    try:
        yield
    finally:
        set_modes(network, modes)
