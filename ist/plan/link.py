"""A host's link to all others, and how it is written: `100mbit`, `1gbit`, `20mbit/100mbit` (up/down)."""

import re
from dataclasses import dataclass

from ist.errors import ConfigError

_PART = re.compile(r"(\d+(?:\.\d+)?)(k|m|g)bit")
_MBIT = {"k": 1e-3, "m": 1.0, "g": 1e3}


@dataclass(frozen=True)
class Link:
    """Rates of a link that carries both directions at the same time.

    Attributes:
        up_mbit: From the host, in Mbit/s of frames on the wire.
        down_mbit: To the host, in Mbit/s.
    """

    up_mbit: float
    down_mbit: float

    @classmethod
    def parse(cls, text: str) -> "Link":
        """Read `100mbit` (both ways) or `20mbit/100mbit` (up/down).

        Raises:
            ConfigError: It is written otherwise, or a rate is 0.
        """
        parts = [_PART.fullmatch(part) for part in text.strip().lower().split("/")]
        rates = [float(part[1]) * _MBIT[part[2]] for part in parts if part is not None]
        if len(rates) != len(parts) or len(rates) > 2 or min(rates) <= 0:
            raise ConfigError(
                f"link '{text}': expected a rate such as 100mbit, 1gbit, or 20mbit/100mbit (up/down), above 0"
            )
        return cls(rates[0], rates[-1])

    def __str__(self) -> str:
        if self.up_mbit == self.down_mbit:
            return f"{self.up_mbit:g}mbit"
        return f"{self.up_mbit:g}mbit/{self.down_mbit:g}mbit"
