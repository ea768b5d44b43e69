"""A network whose constructor notes how much of it has memory, for tests of processes that must not hold it."""

import torch
from torch import Tensor, nn

from ist.models.mlp import MLP

NOTED: list[int] = []
"""Bytes of the parameters with values in each network that was built."""


class Noted(nn.Module):
    """A network with rotary frequencies, which are not in its `state_dict`."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.body = MLP(widths)
        self.register_buffer("frequencies", 1 / 10_000 ** (torch.arange(0, 64) / 64), persistent=False)
        NOTED.append(sum(parameter.nbytes for parameter in self.parameters() if not parameter.is_meta))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        scores: Tensor = self.body(x + self.get_buffer("frequencies"))
        return scores
