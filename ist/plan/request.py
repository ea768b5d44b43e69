"""What a plan is asked for, and how the command line spells it."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from ist.config.link_rate import Link, parse_link
from ist.config.methods import planned_methods
from ist.errors import ConfigError

LEAST_MBIT = 0.001
"""The slowest link that can be planned."""

HOP_S = 0.0003
"""Seconds from one host's program to another's: about what gloo takes between hosts of `benchmarks/plan_check.py`."""


@dataclass(frozen=True)
class Hosts:
    """Where a run would take place.

    Attributes:
        link: Every host's link, the coordinator's included.
        cores: Cores that all processes share; None: each worker has its own.
        hop_s: Seconds that a small message takes from one host to another.
    """

    link: Link
    cores: int | None = None
    hop_s: float = HOP_S

    def crowding(self, num_workers: float) -> float:
        """Return how many times longer workers compute when so many do at once."""
        return 1.0 if self.cores is None else max(1.0, num_workers / self.cores)


@dataclass(frozen=True)
class Request:
    """What to plan.

    Attributes:
        hosts: Where.
        methods: Names of methods that can be planned.
        workers: Numbers of workers; empty: as configured.
        simulate: Whether to go on to many workers and several links.
    """

    hosts: Hosts
    methods: tuple[str, ...] = field(default_factory=planned_methods)
    workers: tuple[int, ...] = ()
    simulate: bool = False


def parse_request(
    link: str,
    workers: str | None = None,
    methods: str | None = None,
    cores: int | None = None,
    latency_ms: float | None = None,
    simulate: bool = False,
) -> Request:
    """Read what the command line asks for; None: the default.

    Raises:
        ConfigError: The link, a number or a method is not as it should be.
    """
    hosts = Hosts(parse_link(link, LEAST_MBIT), cores, HOP_S if latency_ms is None else latency_ms / 1000)
    return Request(hosts, _parse_methods(methods), _parse_workers(workers), simulate)


def _parse_workers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
        shown = text if len(text) < 100 else f"{text[:100]}..."
        raise ConfigError(f"--workers '{shown}': expected numbers of workers from 1, such as 2,4,8")
    return tuple(dict.fromkeys(map(int, parts)))


def _parse_methods(text: str | None) -> tuple[str, ...]:
    known = planned_methods()
    names: Sequence[str] = known if text is None else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"--methods: '{name}' cannot be planned: {hint}")
    return tuple(dict.fromkeys(names))
