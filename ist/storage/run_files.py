"""Read a run's records and its result, and find out whether they are what a run writes.

Where it sits: `ist/storage/run_folder.py` reads the files and asks here what is in them.
Law: what is returned has the keys and types that the rest of the package relies on; whatever has not is one error that
names the file, the line and the key.
Not here: opening files; writing them (`ist/storage/run_folder.py`, `ist/runs/recorder.py`).
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
    """Something that a run has written: further keys are of a newer version, or a metric of the user's."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Lost(_Written):
    worker: NonNegativeInt
    reason: str
    kind: str = "lost"


class _Record(_Written):
    """A line of metrics.jsonl, but for the measured numbers; what has a default is missing in some records."""

    round: NonNegativeInt
    workers: NonNegativeInt = 0
    steps: NonNegativeInt = 0
    metric: str | None = None
    lost: list[_Lost] = []

    @model_validator(mode="after")
    def _metric_is_a_number(self) -> "_Record":
        value = (self.model_extra or {}).get(self.metric or "", 0)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"'{self.metric}' is no number")
        return self


class _Result(_Written):
    """What result.json holds, but for the measured numbers that some versions did not write."""

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
    link: str = ""
    wire_bytes: NonNegativeFloat = 0


@dataclass(frozen=True)
class Lines:
    """What metrics.jsonl holds.

    Attributes:
        texts: Its lines as they are, but for a damaged end.
        records: What they say.
        cut: Whether there was a damaged end, as a crash leaves it: half a line, or zeros.
    """

    texts: Sequence[bytes]
    records: Sequence[dict[str, Any]]
    cut: bool


def parse_records(raw: bytes, where: str) -> Lines:
    """Read metrics.jsonl.

    Args:
        raw: What is in it.
        where: The file, for people.

    Raises:
        RunFolderError: A line before the damaged end is no record, or rounds are not in order.
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
                f"{line} is of round {tree['round']}, and the one before of round {records[-1]['round']}: two "
                "processes have written into it, or it was altered"
            )
        records.append(tree)
    return Lines(lines[:whole], records, whole < len(lines))


def parse_result(raw: bytes, where: str) -> dict[str, Any]:
    """Read result.json; arguments as of `parse_records`.

    Raises:
        RunFolderError: It is not what a run writes.
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
    """What result.json holds, with the numbers of a table."""
    fields = {m.name: _field(m, False) for m in table if m.over_rounds and m.name not in _Result.model_fields}
    return create_model("RunResult", __base__=_Result, **fields)


_LIST: Any = (list[Number], [])


def _field(measured: Measurement, required: bool) -> Any:
    """A field of a pydantic model: its type, and its default where it may be missing."""
    if measured.is_list:
        return _LIST
    if measured.source == "evaluation":
        return Number | None, None
    return NonNegativeFloat if measured.kind is int else Finite, ... if required else 0


def _tree(text: bytes) -> Any:
    """What a JSON text says; None where it is none."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


def _check(model: type[BaseModel], tree: Any, where: str) -> None:
    if not isinstance(tree, Mapping):
        raise RunFolderError(f"{where} is damaged: it is no mapping of names to values")
    try:
        model.model_validate(tree)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"] if part not in ("int", "float"))
        if detail["type"] == "missing":
            raise RunFolderError(f"{where} is damaged: it has no '{key}'") from error
        message = detail["msg"].removeprefix("Value error, ")
        raise RunFolderError(f"{where} is damaged: {f'{key!r}: ' if key else ''}{message}") from error
