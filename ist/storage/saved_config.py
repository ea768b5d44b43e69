"""The configuration of a run in its folder: config.yaml with a digest, and changes.jsonl.

The last line of config.yaml is a comment with a digest of the keys that say what is trained. If the digest does not
match the text, somebody has edited the file. Files of earlier versions have no digest.

    changes.jsonl    one JSON object for each change of the configuration by `ist train --resume RUN --set KEY=VALUE`:
                     the first round of the new configuration, the changed keys, the configuration before

Where it sits: `ist/storage/run_folder.py` writes and checks both files through these functions.
Law: `is_edited(saved_text(config))` is False, for every configuration.
Not here: which keys may change (`ist/storage/same_run.py`), opening files (`ist/storage/run_folder.py`).
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ist.config.base import NonNegativeInt
from ist.config.load import dump_config
from ist.config.schema import Config
from ist.config.yaml_text import parse_yaml
from ist.errors import RunFolderError
from ist.redact import redacted
from ist.storage.same_run import NOT_COMPARED, Change

_DIGEST = re.compile(r"^# sha256:([0-9a-f]{64})\b", re.MULTILINE)


class ChangedKey(BaseModel):
    """A key with its old and its new value, as text."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    key: str
    old: str
    new: str


class ConfigChange(BaseModel):
    """A line of changes.jsonl.

    Attributes:
        round: The first round with the new configuration, from 0.
        changes: The changed keys.
        config: The configuration before, as YAML without passwords.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    round: NonNegativeInt
    changes: list[ChangedKey]
    config: str


def config_change(round_number: int, changes: Iterable[Change], before: str) -> ConfigChange:
    """Return the line of changes.jsonl for a change that takes effect in a round; `before` is the old YAML text."""
    keys = [ChangedKey(key=change.key, old=change.old, new=change.new) for change in changes]
    return ConfigChange(round=round_number, changes=keys, config=before)


def changes_text(changes: Iterable[ConfigChange]) -> str:
    """Return the contents of changes.jsonl."""
    return "".join(f"{json.dumps(change.model_dump())}\n" for change in changes)


def parse_changes(raw: bytes, where: str) -> list[ConfigChange]:
    """Parse changes.jsonl.

    Args:
        raw: Its contents.
        where: The file's path, for messages.

    Raises:
        RunFolderError: A line is not a change.
    """
    found = []
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            found.append(ConfigChange.model_validate_json(line))
        except ValidationError as error:
            detail = error.errors()[0]
            key = ".".join(map(str, detail["loc"]))
            raise RunFolderError(
                f"{where}: line {number} is damaged: {f'{key!r}: ' if key else ''}{detail['msg']}. To resume without "
                "the record of earlier changes, move the file away"
            ) from error
    return found


def saved_text(config: Config) -> str:
    """Return the contents of config.yaml."""
    text = dump_config(config)
    return f"{text}# sha256:{_digest(text)} To change a key of this run: ist train --resume RUN --set KEY=VALUE\n"


@functools.lru_cache(maxsize=4)  # parsing takes a hundredth of a second, and a resumed run asks several times
def is_edited(text: str) -> bool | None:
    """Return whether config.yaml was edited in keys that say what is trained; None if it has no digest."""
    found = _DIGEST.findall(text)
    return found[-1] != _digest(text) if found else None


def _digest(text: str) -> str:
    """Return a digest of the keys that say what is trained; the layout of the text does not matter."""
    tree = _without(parse_yaml(redacted(text), "config.yaml"), NOT_COMPARED)
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()


def _without(tree: Any, keys: Mapping[str, Any]) -> Any:
    """Return a tree of mappings without some keys; a set names the keys of a section."""
    if not isinstance(tree, Mapping):
        return tree
    return {
        key: {name: entry for name, entry in value.items() if name not in keys[key]}
        if isinstance(keys.get(key), set) and isinstance(value, Mapping)
        else value
        for key, value in tree.items()
        if keys.get(key) is not True
    }
