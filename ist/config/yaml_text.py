"""Read and write YAML: the scalar rules of YAML 1.2, plain values only, and limits on size.

Where it sits: `ist/config/load.py` and the command line parse configurations and values here.
Law: any text gives plain values (mappings, lists, text, numbers, true/false, null) of bounded size, or one
`ConfigError` that names the source and the position.
Not here: the meaning of keys (`ist/config/schema.py`).

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` is false and `1:30` is ninety.
"""

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ist.errors import ConfigError, first_line

MAX_BYTES = 256 * 1024
"""Largest configuration file in bytes; parsing one of this size takes seconds."""

MAX_DEPTH = 40
"""Largest nesting depth of lists and mappings."""

MAX_VALUES = 50_000
"""Largest number of values in a text; an alias (`*name`) counts as all the values that it repeats."""

MAX_DIGITS = 100
"""Largest number of digits in a whole number."""

_TAG = "tag:yaml.org,2002:"
_SHOWN = 40

_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
}
_PATTERNS = {tag: re.compile(rf"^(?:{pattern})\Z") for tag, (pattern, _) in _SCALARS.items()}


class _Loader(yaml.SafeLoader):
    """Composes a bounded tree of nodes and converts it to plain values."""

    # These override class attributes of PyYAML: only the tags registered below are known.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}  # values and levels of each finished node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node; refuse a text that is nested too deeply or, with aliases expanded, too large."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConstructorError(None, None, f"more than {MAX_DEPTH} levels of lists and mappings", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None
        if node not in self._sizes and isinstance(node, yaml.CollectionNode):
            if node.end_mark is None:  # PyYAML sets it when the node is finished
                raise ConstructorError(None, None, "an alias inside the value that it refers to", mark)
            children = [one for item in node.value for one in (item if isinstance(item, tuple) else (item,))]
            sizes = [self._sizes[child] for child in children]
            self._sizes[node] = 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
        size, levels = self._sizes.setdefault(node, (1, 1))
        if levels + self._depth > MAX_DEPTH or size > MAX_VALUES:
            what = f"{MAX_VALUES:,} values" if size > MAX_VALUES else f"{MAX_DEPTH} levels of lists and mappings"
            raise ConstructorError(None, None, f"more than {what} with aliases expanded", mark)
        return node


def _map(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    """Build a mapping; refuse a duplicate key (PyYAML silently keeps the last one)."""
    found: dict[str, Any] = {}
    for key_node, value_node in _typed(node, yaml.MappingNode).value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConstructorError(None, None, "a key must be a plain scalar", key_node.start_mark)
        key = key_node.value
        if key == "<<":
            raise ConstructorError(
                None, None, "merge keys (<<) are not in YAML 1.2: write the keys out", key_node.start_mark
            )
        value = loader.construct_object(key_node, deep=True)
        if value in found:
            raise ConstructorError(None, None, f"duplicate key {_short(key)}", key_node.start_mark)
        found[value] = loader.construct_object(value_node, deep=True)
    return found


def _seq(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(item, deep=True) for item in _typed(node, yaml.SequenceNode).value]


def _str(_loader: _Loader, node: yaml.ScalarNode) -> str:
    text: str = _typed(node, yaml.ScalarNode).value
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConstructorError(None, None, "text contains a NUL or half of a surrogate pair", node.start_mark)
    return text


def _int(_loader: _Loader, node: yaml.ScalarNode) -> int:
    text = _matching(node, "int", "a whole number")
    if len(text) > MAX_DIGITS:
        raise ConstructorError(None, None, f"a number of {len(text):,} digits: at most {MAX_DIGITS}", node.start_mark)
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _float(_loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(inf|nan)", r"\1", _matching(node, "float", "a number").lower()))


def _bool(_loader: _Loader, node: yaml.ScalarNode) -> bool:
    return _matching(node, "bool", "true or false").lower() == "true"


def _null(_loader: _Loader, node: yaml.ScalarNode) -> None:
    _matching(node, "null", "null")


def _unknown(_loader: _Loader, node: yaml.Node) -> None:
    raise ConstructorError(
        None, None, f"tag {_short(node.tag.replace(_TAG, '!!'))} is not in YAML 1.2's core schema", node.start_mark
    )


def _matching(node: yaml.Node, tag: str, what: str) -> str:
    text: str = _typed(node, yaml.ScalarNode).value
    if not _PATTERNS[tag].match(text):
        raise ConstructorError(None, None, f"{_short(text)} is not {what}", node.start_mark)
    return text


def _typed(node: yaml.Node, kind: type[yaml.Node]) -> yaml.Node:
    if not isinstance(node, kind):
        raise ConstructorError(
            None, None, f"tag {_short(node.tag.replace(_TAG, '!!'))} does not match this value", node.start_mark
        )
    return node


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


for _name, (_, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _PATTERNS[_name], list(_first))
_Loader.yaml_implicit_resolvers[""] = _Loader.yaml_implicit_resolvers.pop("\0")
_CONSTRUCTORS: dict[str, Any] = {
    "map": _map, "seq": _seq, "str": _str, "int": _int, "float": _float, "bool": _bool, "null": _null,
}  # fmt: skip
for _name, _construct in _CONSTRUCTORS.items():
    _Loader.add_constructor(_TAG + _name, _construct)
_Loader.add_constructor(None, _unknown)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read back as another type."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Returns:
        Mappings, lists, text, numbers, booleans and None. Aliases refer to the same object.

    Raises:
        ConfigError: The text is not YAML or is too large; the message names `source`, line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML's scanner calls chr() and int()
        raise ConfigError(f"{source}: not valid YAML: {first_line(error)}") from error


def dump_yaml(tree: Any) -> str:
    """Return plain values as YAML that `parse_yaml` reads back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read_text(path: Path) -> str:
    """Read a configuration file, or a shell's `/dev/stdin` or `<(...)`.

    Raises:
        ConfigError: The file is missing, not a regular file, larger than `MAX_BYTES`, or not UTF-8.
    """
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind) and path.parts[:2] != (os.sep, "dev"):  # opening a pipe would block
            raise ConfigError(f"{path}: is {'a folder' if stat.S_ISDIR(kind) else 'not a file'}: give a YAML file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such configuration file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES // 1024} KiB, the limit for a configuration")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
