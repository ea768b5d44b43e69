"""Shares that follow the speed of the workers, so that all workers of a round finish at the same time.

Where it sits: the coordinator reports how long each worker's local steps took, and reads the shares of the next round,
which become the `capacities` of its team.
Not here: turning shares into neurons (`ist/subnet/partition.py`).

Reference: AdapTrain (unequal shares, so that workers finish together); the rule below is our own.
"""

import math
from collections.abc import Mapping, Sequence

TOLERANCE = 0.1
"""Shares change only if at least one would change by more than this fraction of itself, because timings are noisy."""

SMALLEST = 0.02
"""Minimum share, as a fraction of the largest: a worker that was slow once can then show that it is fast again."""


class SpeedBalance:
    """The shares of workers, by name; equal until measurements differ."""

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}

    def capacities(self, names: Sequence[str]) -> tuple[float, ...] | None:
        """Return a positive number for each worker; its share is proportional to it. None if no worker was measured.

        A worker without a measurement gets the mean of the others.
        """
        known = [self._shares[name] for name in names if name in self._shares]
        if not known:
            return None
        mean = math.fsum(known) / len(known)
        return tuple(self._shares.get(name, mean) for name in names)

    def note(self, seconds: Mapping[str, float]) -> None:
        """Update the shares from the seconds that each worker's local steps took in a round, by worker name."""
        mean = math.fsum(self._shares.values()) / len(self._shares) if self._shares else 1.0
        before = {name: self._shares.get(name, mean) for name in seconds}
        after = rebalanced(before, seconds)
        moved = any(abs(after[name] / before[name] - 1) > TOLERANCE for name in seconds)
        self._shares.update(after if moved else before)


def rebalanced(shares: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
    """Return shares with which the times of the given workers differ less.

    A share s that took t becomes s * sqrt(mean t / t), scaled so that the sum of the shares stays the same. The time of
    a submodel grows like s (first and last layers) up to s squared (inner layers). The exponent 1/2 is the fastest
    one that converges for both: it is exact in one step for the square, while the exponent 1 would oscillate forever.

    Args:
        shares: By worker, positive.
        seconds: By worker: the time of its local steps with that share.
    """
    mean = math.fsum(seconds.values()) / len(seconds)
    wanted = {name: shares[name] * math.sqrt(mean / max(took, 1e-9)) for name, took in seconds.items()}
    least = SMALLEST * max(wanted.values())
    wanted = {name: max(share, least) for name, share in wanted.items()}
    scale = math.fsum(shares[name] for name in seconds) / math.fsum(wanted.values())
    return {name: share * scale for name, share in wanted.items()}
