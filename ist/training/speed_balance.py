"""Shares that follow the speed of workers, so that those of a round finish together.

Where it sits: the coordinator notes how long each worker's local steps took, and asks for the shares of the
next round, which become the `capacities` of its team.
Not here: turning shares into neurons (`ist/subnet/partition.py`).

Reference: AdapTrain (unequal shares so that rounds finish together); the rule below is our own.
"""

import math
from collections.abc import Mapping, Sequence

TOLERANCE = 0.1
"""Shares stay as they are while none would change by more than this part of itself: timings are noisy."""

SMALLEST = 0.02
"""No share falls below this part of the largest: a worker that was slow once can then show that it is no longer."""


class SpeedBalance:
    """The shares of workers that are known by name; equal until something else is measured."""

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}

    def capacities(self, names: Sequence[str]) -> tuple[float, ...] | None:
        """Return a positive number for each worker, to which its share is to be proportional.

        A worker that has not been measured gets the mean of those that have. None: nobody has been.
        """
        known = [self._shares[name] for name in names if name in self._shares]
        if not known:
            return None
        mean = math.fsum(known) / len(known)
        return tuple(self._shares.get(name, mean) for name in names)

    def note(self, seconds: Mapping[str, float]) -> None:
        """Take note of how long the local steps of a round took, by name of the worker."""
        mean = math.fsum(self._shares.values()) / len(self._shares) if self._shares else 1.0
        before = {name: self._shares.get(name, mean) for name in seconds}
        after = rebalanced(before, seconds)
        moved = any(abs(after[name] / before[name] - 1) > TOLERANCE for name in seconds)
        self._shares.update(after if moved else before)


def rebalanced(shares: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
    """Return shares with which the given workers would take more nearly the same time.

    A share s that took t becomes s * sqrt(mean t / t), scaled so that the shares' sum stays. The time of a narrow
    network grows with s (first and last layers) to s squared (inner ones): of the exponents that converge for both, a
    half is the fastest, exact in one step for the square, while 1 would swing for ever.

    Args:
        shares: By worker, positive.
        seconds: By worker; what its local steps took with that share.
    """
    mean = math.fsum(seconds.values()) / len(seconds)
    wanted = {name: shares[name] * math.sqrt(mean / max(took, 1e-9)) for name, took in seconds.items()}
    least = SMALLEST * max(wanted.values())
    wanted = {name: max(share, least) for name, share in wanted.items()}
    scale = math.fsum(shares[name] for name in seconds) / math.fsum(wanted.values())
    return {name: share * scale for name, share in wanted.items()}
