"""The rate of a network link and its notation: `100mbit`, `1gbit`, `20mbit/100mbit`.

Where it sits: `ist/config/schema.py` checks `pool.link` here; `ist/launch/lab_hosts.py` creates links with these rates.
Not here: anything that configures the network.
"""

import re
from dataclasses import dataclass

from ist.errors import ConfigError

LEAST_MBIT, MOST_MBIT = 10, 10_000
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(mbit|gbit)")


@dataclass(frozen=True)
class Link:
    """The rates of a host's link, from the host's view.

    Attributes:
        up_mbit: Rate at which the host sends, in Mbit/s (10^6 bits), including Ethernet, IP and TCP headers; 10 to
            10,000.
        down_mbit: Rate at which it receives, in the same unit.
    """

    up_mbit: float
    down_mbit: float

    def __str__(self) -> str:
        """Return the text that `parse_link` reads back."""
        up, down = _rate_text(self.up_mbit), _rate_text(self.down_mbit)
        return up if up == down else f"{up}/{down}"


def parse_link(text: str, least_mbit: float = LEAST_MBIT) -> Link:
    """Parse a link: `100mbit` in both directions, or `20mbit/100mbit` up/down; `1gbit` is 1000 Mbit/s.

    Args:
        text: The user's text.
        least_mbit: Slowest allowed rate; default: the slowest rate that simulated hosts support.

    Raises:
        ConfigError: The text has another form, or the rate is below `least_mbit` or above 10 Gbit/s.
    """
    rates = []
    parts = text.split("/")
    for part in parts:
        match = _RATE.fullmatch(part)
        if match is None or len(parts) > 2:
            raise ConfigError(
                f"'{text}' is not a link rate: expected '100mbit', '1gbit', or up/down such as '20mbit/100mbit'"
            )
        mbit = float(match[1]) * (1000 if match[2] == "gbit" else 1)
        if not least_mbit <= mbit <= MOST_MBIT:
            raise ConfigError(f"link rate '{part}' is out of range: expected {_rate_text(least_mbit)} to 10gbit")
        rates.append(mbit)
    return Link(rates[0], rates[-1])


def checked_link(text: str) -> str:
    """Return a link in its canonical notation; the validator of `pool.link`.

    Raises:
        ValueError: The text is not a link, or its rate is out of range.
    """
    try:
        return str(parse_link(text))
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _rate_text(mbit: float) -> str:
    return f"{mbit / 1000:.15g}gbit" if mbit >= 1000 else f"{mbit:.15g}mbit"
