"""Parse a run's records and its result, and check their keys and types.

Where it sits: `ist/storage/run_folder.py` reads the files and parses their contents here.
Law: the returned values have the keys and types that other rooms rely on; anything else is one error that names the
file, the line and the key.
Not here: opening and writing files (`ist/storage/run_folder.py`, `ist/runs/recorder.py`).
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from ist.config.base import NonNegativeFloat, NonNegativeInt
from ist.errors import RunFolderError
from ist.measurements import MEASUREMENTS, Measurement

Number = int | float
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Written(BaseModel):
    """A mapping that a run has written; unknown keys come from a newer version or are the user's metrics."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Lost(_Written):
    worker: NonNegativeInt
    reason: str
    kind: str = "lost"


class _Record(_Written):
    """A line of metrics.jsonl, without the measured numbers; some records lack keys that have a default."""

    round: NonNegativeInt
    workers: NonNegativeInt = 0
    steps: NonNegativeInt = 0
    metric: str | None = None
    lost: list[_Lost] = []
    logged: dict[str, Number | None] = {}

    @model_validator(mode="after")
    def _metric_is_a_number(self) -> "_Record":
        value = (self.model_extra or {}).get(self.metric or "", 0)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"'{self.metric}' is not a number")
        return self


class _Result(_Written):
    """The contents of result.json, without the measured numbers that some versions did not write."""

    name: str
    method: str
    seed: int
    workers: NonNegativeInt
    rounds: NonNegativeInt
    loss: Finite
    sent_bytes: NonNegativeFloat
    train_s: Finite
    memory_bytes: NonNegativeFloat
    label: str = ""
    parameters: NonNegativeFloat = 0
    remote_workers: NonNegativeInt = 0
    metric: str | None = None
    metrics: dict[str, Number] = {}
    best_accuracy: Number | None = None
    faults: dict[str, int] = {}
    block_scales: dict[str, Number] = {}
    stopped_early: str = ""
    link: str = ""
    wire_bytes: NonNegativeFloat = 0
    wire_bytes_by_host: list[NonNegativeFloat] = []
    memory_budget: dict[str, dict[str, NonNegativeInt]] = {}


@dataclass(frozen=True)
class Lines:
    """The contents of metrics.jsonl.

    Attributes:
        texts: Its lines, without a damaged end.
        records: The parsed lines.
        cut: Whether the file had a damaged end, which a crash can leave: half a line, or zeros.
    """

    texts: Sequence[bytes]
    records: Sequence[dict[str, Any]]
    cut: bool


def parse_records(raw: bytes, where: str) -> Lines:
    """Parse metrics.jsonl.

    Args:
        raw: Its contents.
        where: The file's path, for messages.

    Raises:
        RunFolderError: A line before a damaged end is not a record, or rounds are not in order.
    """
    lines = raw.split(b"\n")
    if not lines[-1]:
        del lines[-1]
    trees = [_tree(line) for line in lines]
    whole = len(trees)
    while whole and trees[whole - 1] is None:
        whole -= 1
    records: list[dict[str, Any]] = []
    for number, tree in enumerate(trees[:whole], start=1):
        line = f"{where}: line {number}"
        if tree is None:
            raise RunFolderError(f"{line} is damaged: it is not JSON")
        _check(_record_model(MEASUREMENTS), tree, line)
        if records and tree["round"] <= records[-1]["round"]:
            raise RunFolderError(
                f"{line} is of round {tree['round']}, but the line before is of round {records[-1]['round']}: two "
                "processes have written into the file, or it was altered"
            )
        records.append(tree)
    return Lines(lines[:whole], records, whole < len(lines))


def parse_result(raw: bytes, where: str) -> dict[str, Any]:
    """Parse result.json; arguments as in `parse_records`.

    Raises:
        RunFolderError: The file is damaged.
    """
    tree = _tree(raw)
    if tree is None:
        raise RunFolderError(f"{where} is damaged: it is not JSON")
    _check(_result_model(MEASUREMENTS), tree, where)
    result: dict[str, Any] = tree
    return result


@functools.cache
def _record_model(table: tuple[Measurement, ...]) -> type[_Record]:
    """A line of metrics.jsonl with the numbers of a table."""
    fields = {m.name: _field(m, m.required) for m in table if m.recorded and m.name not in _Record.model_fields}
    lists = {f"{measured.name}_by_worker": _LIST for measured in table if measured.by_worker}
    return create_model("RoundRecord", __base__=_Record, **fields, **lists)


@functools.cache
def _result_model(table: tuple[Measurement, ...]) -> type[_Result]:
    """The contents of result.json, with the numbers of a table."""
    fields = {m.name: _field(m, False) for m in table if m.over_rounds and m.name not in _Result.model_fields}
    return create_model("RunResult", __base__=_Result, **fields)


_LIST: Any = (list[Number], [])


def _field(measured: Measurement, required: bool) -> Any:
    """A field of a pydantic model: its type, and its default if it may be missing."""
    if measured.is_list:
        return _LIST
    if measured.source == "evaluation":
        return Number | None, None
    return NonNegativeFloat if measured.kind is int else Finite, ... if required else 0


def _tree(text: bytes) -> Any:
    """Parse a JSON text; None if it is not valid."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


def _check(model: type[BaseModel], tree: Any, where: str) -> None:
    if not isinstance(tree, Mapping):
        raise RunFolderError(f"{where} is damaged: it is not a mapping of names to values")
    try:
        model.model_validate(tree)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"] if part not in ("int", "float"))
        if detail["type"] == "missing":
            raise RunFolderError(f"{where} is damaged: it has no '{key}'") from error
        message = detail["msg"].removeprefix("Value error, ")
        raise RunFolderError(f"{where} is damaged: {f'{key!r}: ' if key else ''}{message}") from error
