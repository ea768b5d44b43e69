"""What a link is, and how it is written: `100mbit`, `1gbit`, `20mbit/100mbit`.

Where it sits: `ist/config/schema.py` checks `pool.link` here; `ist/launch/lab_hosts.py` makes links of it.
Not here: the kernel.
"""

import re
from dataclasses import dataclass

from ist.errors import ConfigError

LEAST_MBIT, MOST_MBIT = 10, 10_000
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(mbit|gbit)")


@dataclass(frozen=True)
class Link:
    """The rates of a host's link, as the host sees it.

    Attributes:
        up_mbit: What the host can send, in Mbit/s (10^6 bits), Ethernet, IP and TCP headers included; 10 to 10,000.
        down_mbit: What it can receive.
    """

    up_mbit: float
    down_mbit: float

    def __str__(self) -> str:
        """Return the text that `parse_link` reads back."""
        up, down = _rate_text(self.up_mbit), _rate_text(self.down_mbit)
        return up if up == down else f"{up}/{down}"


def parse_link(text: str, least_mbit: float = LEAST_MBIT) -> Link:
    """Read a link: `100mbit` both ways, or `20mbit/100mbit` up and down as a host sees it; `gbit` for thousands.

    Args:
        text: What the user wrote.
        least_mbit: The slowest rate that makes sense; by default the slowest that the lab makes.

    Raises:
        ConfigError: It is something else, or slower than that or faster than 10 Gbit/s.
    """
    rates = []
    parts = text.split("/")
    for part in parts:
        match = _RATE.fullmatch(part)
        if match is None or len(parts) > 2:
            raise ConfigError(
                f"a link is '100mbit', '1gbit', or up/down as a host sees it, such as '20mbit/100mbit', not '{text}'"
            )
        mbit = float(match[1]) * (1000 if match[2] == "gbit" else 1)
        if not least_mbit <= mbit <= MOST_MBIT:
            raise ConfigError(f"a link of '{part}' cannot be made: from {_rate_text(least_mbit)} to 10gbit")
        rates.append(mbit)
    return Link(rates[0], rates[-1])


def checked_link(text: str) -> str:
    """Return the one spelling of a link, for a configuration.

    Raises:
        ValueError: It is none.
    """
    try:
        return str(parse_link(text))
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _rate_text(mbit: float) -> str:
    return f"{mbit / 1000:.15g}gbit" if mbit >= 1000 else f"{mbit:.15g}mbit"
