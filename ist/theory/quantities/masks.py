"""The random masks of Algorithm 1: which subnetwork holds which neuron.

Where it sits: `ist/theory/algorithm.py` draws the masks of its rounds here.
Not here: the partitions of real runs (`ist/subnet/partition.py`), whose strategies 'categorical' and 'bernoulli' have
the same distributions.
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
"""Returns the mask for (seed, round)."""


@dataclass(frozen=True)
class Law:
    """The distribution of the masks for p subnetworks of m neurons.

    Attributes:
        width: m.
        subnetworks: p.
        xi: Each subnetwork holds each neuron with this probability, independently (Bernoulli). None: each neuron is in
            exactly one subnetwork, chosen uniformly (categorical).
    """

    width: int
    subnetworks: int
    xi: float | None

    def __post_init__(self) -> None:
        if self.subnetworks < 1:
            raise ConfigError(f"'p' is {self.subnetworks}: expected at least one subnetwork")
        if self.width < self.subnetworks:
            raise ConfigError(
                f"'m' is {self.width}: expected at least one neuron for each of the {self.subnetworks} "
                "subnetworks ('p')"
            )
        if self.xi is not None and not 0 < self.xi <= 1:
            raise ConfigError(f"'xi' is {self.xi}: expected a probability above 0 and at most 1")

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

        All values of xi use the same random numbers, so a larger xi only adds neurons to subnetworks, and differences
        between runs come from their settings.
        """
        numbers = self.width if self.xi is None else self.width * self.subnetworks
        drawn = uniform(numbers, seed, Purpose.PARTITION, round_number)
        if self.xi is None:
            owners = np.floor(drawn * self.subnetworks).astype(np.int64)
            mask: Mask = np.arange(self.subnetworks)[:, None] == owners
            return mask
        return drawn.reshape(self.subnetworks, self.width) < self.xi
