"""Which subnetwork holds which neuron: the random masks of Algorithm 1.

Not here: the partitions of real runs (`ist/subnet/partition.py`), whose 'categorical' and 'bernoulli' are the same
laws.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ist.errors import ConfigError
from ist.rng import Purpose, uniform

Mask = NDArray[np.bool_]
"""(p, m): whether subnetwork l holds neuron r."""

Draw = Callable[[int, int], Mask]
"""Draws the mask of (seed, round)."""


@dataclass(frozen=True)
class Law:
    """The law of the masks: p subnetworks of m neurons.

    Attributes:
        width: m.
        subnetworks: p.
        xi: Every subnetwork holds every neuron with this probability, independently (Bernoulli). None: every neuron
            is in exactly one subnetwork, any with the same probability (categorical).
    """

    width: int
    subnetworks: int
    xi: float | None

    def __post_init__(self) -> None:
        if self.subnetworks < 1:
            raise ConfigError(f"'p' is {self.subnetworks}: at least one subnetwork is needed")
        if self.width < self.subnetworks:
            raise ConfigError(f"'m' is {self.width}, fewer neurons than the {self.subnetworks} subnetworks ('p')")
        if self.xi is not None and not 0 < self.xi <= 1:
            raise ConfigError(f"'xi' is {self.xi}: a probability above 0 and at most 1 is needed")

    @property
    def probability(self) -> float:
        """The probability that a subnetwork holds a neuron: xi, or 1/p."""
        return 1 / self.subnetworks if self.xi is None else self.xi

    @property
    def theta(self) -> float:
        """The probability that a neuron is trained in a round: 1 - (1 - xi)^p, or 1."""
        return 1.0 if self.xi is None else 1 - (1 - self.xi) ** self.subnetworks

    def draw(self, seed: int, round_number: int) -> Mask:
        """Draw a mask.

        The same numbers decide for every xi, so that a larger xi adds neurons to subnetworks and takes none away:
        differences between runs are those of their settings.
        """
        numbers = self.width if self.xi is None else self.width * self.subnetworks
        drawn = uniform(numbers, seed, Purpose.PARTITION, round_number)
        if self.xi is None:
            owners = np.floor(drawn * self.subnetworks).astype(np.int64)
            mask: Mask = np.arange(self.subnetworks)[:, None] == owners
            return mask
        return drawn.reshape(self.subnetworks, self.width) < self.xi
