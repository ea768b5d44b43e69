"""Compare two configurations: which keys may change when a run is resumed, and which make it a different run.

Where it sits: `ist/storage/run_folder.py` compares when it opens an existing folder and when it resumes from a
checkpoint.
Not here: the configuration that a checkpoint stores (`ist/storage/checkpoint.py`), comparing ranks
(`ist/runs/open.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ist.config.base import plain
from ist.config.schema import Config
from ist.redact import redacted

NOT_COMPARED: dict[str, Any] = {
    "output": True,
    "label": True,
    "checkpoint": True,
    "watch": True,
    "pool": True,
    "compare": True,
    "data": {"root", "loader"},
}
"""Keys that may change when a run is resumed: they say where and how it is run and named, not what is trained."""


@dataclass(frozen=True)
class Change:
    """A key with different values in two configurations; the values are text without passwords."""

    key: str
    old: str
    new: str


def run_changes(old: Config, new: Config) -> list[Change]:
    """Return changed keys that make the new configuration a different run, in the order of the new one."""
    trees = [dict(flat(plain(config.model_dump(exclude=NOT_COMPARED)))) for config in (old, new)]
    return list(_changes(*trees))


def allowed_changes(old: Config, new: Config) -> list[Change]:
    """Return changed keys that may change when a run is resumed."""
    trees = [dict(flat(plain(config.model_dump()))) for config in (old, new)]
    refused = {change.key for change in run_changes(old, new)}
    return [change for change in _changes(*trees) if change.key not in refused]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for key in dict.fromkeys([*new, *old]):
        before, now = (redacted(repr(tree[key])) if key in tree else "not set" for tree in (old, new))
        if before != now:
            yield Change(key, before, now)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
