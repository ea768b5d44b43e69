"""The coordinator's own step with what a round has changed: Nesterov momentum, for each weight by its own rounds.

Where it sits: the coordinator notes the network before a round's merge and lets this move it afterwards.
In IST a weight between two hidden layers is trained in one round of n on average. Its momentum neither decays nor moves
it in the others: an entry's outer step is taken when the entry was trained.
Law: where every entry is trained in every round, it is the step of `torch.optim.SGD(..., nesterov=True)`, with which
DiLoCo (`ist/baselines/local_sgd.py`) moves whole networks, up to rounding: PyTorch multiplies and adds at once, so that
one code for both would change the last bits of one of them.

Reference: Douillard et al., arXiv 2311.08105 (DiLoCo's outer Nesterov step), here entry by entry.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ist.config.recipe import Outer
from ist.subnet.cut import Cut, fill_part

PREFIX = "outer/"
"""How the names of its tensors begin in a checkpoint."""


class OuterOptimizer:
    """Momentum of the merged change.

    Args:
        parameters: The whole network's trained parameters by name, which are moved in place.
        state: What a checkpoint holds of it, by name; empty at the beginning.
    """

    def __init__(self, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._momentum = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self._before = {name: tensor.clone() for name, tensor in parameters.items()}
        for name, tensor in state.items():
            self._momentum[name.removeprefix(PREFIX)].copy_(tensor)

    def begin(self) -> None:
        """Note the network before a round is merged."""
        for name, tensor in self._parameters.items():
            self._before[name].copy_(tensor)

    def step(self, settings: Outer, cuts: Sequence[Cut], returned: Iterable[int]) -> None:
        """Move the network on from where a round's merge has left it.

        Args:
            settings: Learning rate and momentum.
            cuts: Every worker's positions.
            returned: The workers whose part was merged; what no other held stays as it is.
        """
        returned = tuple(returned)
        for name, tensor in self._parameters.items():
            change = tensor - self._before[name]
            trained = change != 0  # also what came back of an attempt at the round that lost too many workers
            for worker in returned:
                if name in cuts[worker]:
                    fill_part(trained, cuts[worker][name], True)
            momentum = self._momentum[name]
            momentum.copy_(torch.where(trained, settings.momentum * momentum + change, momentum))
            moved = self._before[name] + settings.lr * (change + settings.momentum * momentum)
            tensor.copy_(torch.where(trained, moved, tensor))

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Return the momentum by name."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self._momentum.items()}
