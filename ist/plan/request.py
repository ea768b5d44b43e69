"""The request for a plan, and its options on the command line.

Where it sits: `ist/cli/main.py` parses a request here; `predict.py` answers it.
Not here: predictions (`predict.py`).
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from ist.config.methods import planned_methods
from ist.config.runtime import Link, parse_link
from ist.errors import ConfigError

LEAST_MBIT = 0.001
"""The slowest link that can be planned."""

HOP_S = 0.0003
"""Default one-way latency between two hosts in seconds: about that of gloo in `benchmarks/plan_check.py`."""


@dataclass(frozen=True)
class Hosts:
    """The hosts of a planned run.

    Attributes:
        link: Link of every host, including the coordinator's.
        cores: Number of cores that all processes share; None: each worker has its own core.
        hop_s: Seconds that a small message takes from one host to another.
    """

    link: Link
    cores: int | None = None
    hop_s: float = HOP_S

    def crowding(self, num_workers: float) -> float:
        """Return the factor by which computation slows down if this many workers compute at the same time."""
        return 1.0 if self.cores is None else max(1.0, num_workers / self.cores)


@dataclass(frozen=True)
class Request:
    """A request for a plan.

    Attributes:
        hosts: The hosts.
        methods: Names of the methods to plan.
        workers: Numbers of workers; empty: the configured number.
        simulate: Whether to extend the plan to many workers and several links.
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
    """Parse the options of the command line; None selects the default.

    Raises:
        ConfigError: The link, a number or a method is not valid.
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
            hint = f"did you mean '{near[0]}'?" if near else f"known methods: {', '.join(known)}"
            raise ConfigError(f"--methods: '{name}' cannot be planned: {hint}")
    return tuple(dict.fromkeys(names))
