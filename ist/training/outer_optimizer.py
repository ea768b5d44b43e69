"""Outer optimizer: Nesterov momentum on the merged update; a weight's momentum advances only in rounds that trained it.

Where it sits: the coordinator calls `begin` before it merges a round, and `step` after the merge.
With n workers, IST trains a weight between two hidden layers in one of n rounds on average. In the other rounds its
momentum does not decay, and the weight does not move.
Law: if every round trains every entry, this is the step of `torch.optim.SGD(..., nesterov=True)`, up to rounding.
DiLoCo (`ist/baselines/local_sgd.py`) uses that class for full networks. PyTorch fuses multiplication and addition, so
that shared code would change the last bits of one of the two.
Not here: the optimizers of the local steps (`ist/optimization/optimizers.py`).

Reference: Douillard et al., arXiv 2311.08105 (DiLoCo's outer Nesterov step), here entry by entry.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ist.config.recipe import Outer
from ist.subnet.cut import Cut, fill_part

PREFIX = "outer/"
"""Prefix of the momentum's tensors in a checkpoint."""


class OuterOptimizer:
    """Nesterov momentum on the change that a merge makes.

    Args:
        parameters: The full network's trained parameters by name; updated in place.
        state: The momentum from a checkpoint, by name; empty for a new run.
    """

    def __init__(self, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._momentum = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self._before = {name: tensor.clone() for name, tensor in parameters.items()}
        for name, tensor in state.items():
            self._momentum[name.removeprefix(PREFIX)].copy_(tensor)

    def begin(self) -> None:
        """Save the parameters before a round is merged."""
        for name, tensor in self._parameters.items():
            self._before[name].copy_(tensor)

    def step(self, settings: Outer, cuts: Sequence[Cut], returned: Iterable[int]) -> None:
        """Update the network after the merge of a round.

        Args:
            settings: Learning rate and momentum.
            cuts: The positions of every worker's subnet.
            returned: The workers whose results were merged; entries that only other workers hold do not change.
        """
        returned = tuple(returned)
        for name, tensor in self._parameters.items():
            change = tensor - self._before[name]
            trained = change != 0  # includes results of an earlier attempt at the round that lost too many workers
            for worker in returned:
                if name in cuts[worker]:
                    fill_part(trained, cuts[worker][name], True)
            momentum = self._momentum[name]
            momentum.copy_(torch.where(trained, settings.momentum * momentum + change, momentum))
            moved = self._before[name] + settings.lr * (change + settings.momentum * momentum)
            tensor.copy_(torch.where(trained, moved, tensor))

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Return the momentum by name, for a checkpoint."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self._momentum.items()}
