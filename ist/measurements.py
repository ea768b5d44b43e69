"""All numbers that a run measures, in one table: how each is sent, combined, recorded and shown.

Where it sits: below all rooms that measure, send or show numbers. These read `MEASUREMENTS`: the message header
(`ist/transport/message.py`), the report of a round (`ist/training/rounds.py`, `ist/baselines/ranks.py`), the record
(`ist/runs/recorder.py`), the check of records (`ist/storage/run_files.py`), TensorBoard and Prometheus
(`ist/monitoring/exporters.py`), reports (`ist/report/`) and
`docs/measurements.md`. To add a number, add an entry here and the line that measures it: for a worker's number that is
in `worker_numbers` of `ist/monitoring/meter.py`. Then run `python docs/measurements.py` to update the documentation.
Law: a round's number with `combine` depends only on the workers' numbers of the same name. The formula of any other
number of a round is where the round's report is made.
Not here: measuring.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Fault = Literal["lost", "late", "rejected"]
FAULTS: tuple[str, ...] = get_args(Fault)
"""Why a worker's result may be missing from a round; see `Lost` in `ist/transport/interfaces.py`."""

Numbers = Mapping[str, float]
"""Name of a measurement to its value."""

Combine = Literal["sum", "mean", "max", "elapsed"]
"""How the workers' numbers give the round's number. `elapsed` is for seconds by the round's own clock: the maximum if
workers run in parallel, otherwise the sum."""


@dataclass(frozen=True)
class Family:
    """A metric family of Prometheus.

    Attributes:
        name: Its name; Prometheus appends `_total` to a counter's name.
        kind: A counter never decreases in a run; a gauge may.
        help: Its description, a sentence.
        label: The label that distinguishes its samples, if there are several.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    label: str = ""


@dataclass(frozen=True)
class Sample:
    """A measurement's sample in Prometheus: its metric family, and the value of the family's label."""

    family: Family
    label: str = ""


@dataclass(frozen=True)
class Axis:
    """The axis of a plot of the test metric against a measurement: its title and its scale."""

    title: str
    scale: Literal["linear", "log"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number that a run measures.

    Attributes:
        name: Its key in metrics.jsonl, and in `Numbers`.
        unit: Its unit: `s`, `bytes`, or what it counts; empty if it has none.
        meaning: What it means, as a sentence.
        kind: int or float.
        source: What measures it: each `worker`; the `method`, for a round; the `recorder`, for the run and its own
            process; or the `evaluation`, in rounds that have one.
        slot: The slot of 8 bytes in a message's header in which a worker sends it, from 0; None for other sources. The
            slots 0, 1, 2, 10 and 11 hold other fields of the header (`ist/transport/message.py`).
        combine: How the workers' values give the round's value; None: the round has none, formulas use the values.
        recorded: Whether metrics.jsonl has it.
        by_worker: Whether metrics.jsonl also has the value of each worker, as the list `NAME_by_worker`.
        is_list: Whether its value is a list with an entry for each worker.
        required: Whether every version has written it in every record, so that a record without it is damaged.
        over_rounds: How the run's value in result.json is computed: `total`, the sum of all rounds (in metrics.jsonl it
            is the sum so far); `peak`, the maximum; `latest`, the last value. None: result.json does not have it.
        tensorboard: Its tag in TensorBoard; empty: it is not written there.
        prometheus: Its sample in Prometheus; None: it is not exported.
        phase: Its name in the plot of the phases of a round; empty: it is not a phase.
        axis: The axis of the plot of the test metric against it, in a report; None: there is no plot.
        column: Its title in the table that compares runs; empty: it has no column, or a column with its own format
            (`sent_bytes`, and the test metrics).
    """

    name: str
    unit: str
    meaning: str
    kind: type[int] | type[float]
    source: Literal["worker", "method", "recorder", "evaluation"]
    slot: int | None = None
    combine: Combine | None = None
    recorded: bool = True
    by_worker: bool = False
    is_list: bool = False
    required: bool = False
    over_rounds: Literal["total", "peak", "latest"] | None = None
    tensorboard: str = ""
    prometheus: Sample | None = None
    phase: str = ""
    axis: Axis | None = None
    column: str = ""


_PHASES = Family("ist_phase_seconds", "counter", "Seconds by phase; for workers the mean.", "phase")
_MEMORY = Family("ist_memory_peak_bytes", "gauge", "Peak memory; for workers the maximum.", "process")
_PROCESS_MEMORY = Family(
    "ist_process_memory_peak_bytes",
    "gauge",
    "Peak memory since the process started; for workers the maximum.",
    "process",
)

MEASUREMENTS: tuple[Measurement, ...] = (
    Measurement(
        name="workers", unit="workers", kind=int, source="method",
        meaning="Workers of the round, including those that were lost.",
        tensorboard="workers/in_round",
        prometheus=Sample(Family("ist_workers", "gauge", "Workers of the last round.")),
    ),
    Measurement(
        name="steps", unit="steps", kind=int, source="worker", slot=3, combine="max",
        meaning="Local steps of a worker in the round.",
    ),
    Measurement(
        name="epoch", unit="epochs", kind=float, source="recorder",
        meaning=(
            "Passes of all workers together over the training data so far; missing if workers have data of their own, "
            "or a loop of their own."
        ),
    ),
    Measurement(
        name="loss", unit="", kind=float, source="method", required=True, over_rounds="latest",
        meaning="Mean training loss over the samples of the round.",
        tensorboard="loss/train",
        prometheus=Sample(Family("ist_train_loss", "gauge", "Mean training loss of the last round.")),
    ),
    Measurement(
        name="loss_sum", unit="", kind=float, source="worker", slot=5, recorded=False,
        meaning="Sum of the training losses of a worker's samples in the round.",
    ),
    Measurement(
        name="sent_bytes", unit="bytes", kind=int, source="recorder", required=True, over_rounds="total",
        meaning="Payload bytes sent by all processes.",
        tensorboard="bytes/sent", axis=Axis("bytes sent by all processes", "log"),
    ),
    Measurement(
        name="train_s", unit="s", kind=float, source="recorder", required=True, over_rounds="total",
        meaning="Wall-clock seconds of training, without evaluation and saving.",
        axis=Axis("seconds of training", "log"), column="seconds",
    ),
    Measurement(
        name="virtual_s", unit="s", kind=float, source="method", over_rounds="total",
        meaning=(
            "Normalized compute time, as if every worker had its own core: the longest CPU time of a worker's local "
            "steps, plus the seconds of the round in which no worker computed."
        ),
        axis=Axis("seconds of training, normalized compute time", "log"), column="on own cores",
    ),
    Measurement(
        name="samples", unit="samples", kind=int, source="worker", slot=4, combine="sum", required=True,
        over_rounds="total",
        meaning="Training samples that all workers together have used.",
        prometheus=Sample(Family("ist_samples", "counter", "Samples of all workers together.")),
        axis=Axis("samples used by all workers", "linear"),
    ),
    Measurement(
        name="evaluate_bytes", unit="bytes", kind=int, source="recorder", over_rounds="total",
        meaning=(
            "Bytes so far that rank 0 has fetched from other ranks to evaluate a network in shards (`pool.store: "
            "sharded`), which are not in `sent_bytes`: with `pool.evaluation: layers`, the network for every batch."
        ),
        prometheus=Sample(
            Family("ist_evaluate_bytes", "counter", "Bytes fetched from other ranks to evaluate a network in shards.")
        ),
    ),
    Measurement(
        name="evaluate_s", unit="s", kind=float, source="recorder", over_rounds="total",
        meaning="Wall-clock seconds of evaluation.",
        prometheus=Sample(_PHASES, "evaluate"),
    ),
    Measurement(
        name="compute_s", unit="s", kind=float, source="worker", slot=6, combine="mean", required=True,
        meaning="Wall-clock seconds of a worker's local steps in the round, mean of the workers.",
        tensorboard="seconds/compute", prometheus=Sample(_PHASES, "compute"), phase="local steps",
    ),
    Measurement(
        name="cpu_s", unit="s", kind=float, source="worker", slot=7, recorded=False,
        meaning=(
            "CPU seconds of a worker's local steps: those of the thread that trains; on a GPU the same as `compute_s`."
        ),
    ),
    Measurement(
        name="exchange_s", unit="s", kind=float, source="method", required=True,
        meaning=(
            "Seconds of the round in which subnets or gradients were sent; with IST the seconds in which no worker "
            "computed."
        ),
        tensorboard="seconds/exchange", prometheus=Sample(_PHASES, "exchange"), phase="exchange",
    ),
    Measurement(
        name="cut_s", unit="s", kind=float, source="method", required=True,
        meaning="Seconds of the round in which subnets were extracted from the network.",
        tensorboard="seconds/cut", prometheus=Sample(_PHASES, "cut"), phase="cut",
    ),
    Measurement(
        name="merge_s", unit="s", kind=float, source="method", required=True,
        meaning="Seconds of the round in which subnets were merged into the network.",
        tensorboard="seconds/merge", prometheus=Sample(_PHASES, "merge"), phase="merge",
    ),
    Measurement(
        name="idle_s", unit="s", kind=float, source="method", required=True,
        meaning="Seconds of the round in which a worker waited for slower workers, mean of the workers.",
        tensorboard="seconds/idle", prometheus=Sample(_PHASES, "idle"), phase="waiting for slower workers",
    ),
    Measurement(
        name="aside_s", unit="s", kind=float, source="worker", slot=9, combine="elapsed", recorded=False,
        meaning="Wall-clock seconds of a worker outside training: saving its state, checking its network.",
    ),
    Measurement(
        name="bytes_to_worker", unit="bytes", kind=int, source="recorder", is_list=True,
        meaning="Bytes sent to each worker in the round; with all-reduce, bytes sent by each rank.",
    ),
    Measurement(
        name="bytes_from_worker", unit="bytes", kind=int, source="recorder", is_list=True,
        meaning="Bytes that each worker returned in the round.",
    ),
    Measurement(
        name="inside_bytes", unit="bytes", kind=int, source="worker", slot=12, combine="sum", over_rounds="total",
        meaning=(
            "Bytes that the ranks of all workers sent to other ranks of their worker (`pool.inside`), by formula "
            "(`ist/loops/inside.py`); `sent_bytes` does not count them. 0 if a worker is one process."
        ),
        tensorboard="bytes/inside",
    ),
    Measurement(
        name="memory_bytes", unit="bytes", kind=int, source="worker", slot=8, combine="max", by_worker=True,
        required=True, over_rounds="peak",
        meaning=(
            "Peak memory of a worker so far, above what its process held before the first round, maximum of the "
            "workers."
        ),
        tensorboard="memory/worker_bytes", prometheus=Sample(_MEMORY, "worker"), column="memory a worker",
    ),
    Measurement(
        name="process_memory_bytes", unit="bytes", kind=int, source="worker", slot=13, combine="max", by_worker=True,
        over_rounds="peak",
        meaning=(
            "Peak resident memory of a worker's process since it started, with interpreter, libraries and data, "
            "maximum of the workers."
        ),
        tensorboard="memory/worker_process_bytes", prometheus=Sample(_PROCESS_MEMORY, "worker"),
    ),
    Measurement(
        name="coordinator_memory_bytes", unit="bytes", kind=int, source="recorder", over_rounds="peak",
        meaning=(
            "Peak memory so far of the process that records, merges and evaluates, above what it held before the first "
            "round."
        ),
        tensorboard="memory/coordinator_bytes", prometheus=Sample(_MEMORY, "coordinator"),
    ),
    Measurement(
        name="held_fraction", unit="fraction", kind=float, source="recorder", over_rounds="peak",
        meaning=(
            "Largest fraction of the network's parameters that a worker held in the round, from 0 to 1; with the "
            "frozen rest (`partition.rest`), plus its encoded bytes relative to the bytes of all parameters. A run "
            "that an older version began has none."
        ),
        column="most held by a worker",
    ),
    Measurement(
        name="merge_scale", unit="", kind=float, source="recorder",
        meaning="The factor of the round's merged update that the coordinator chose (`recipe.merge_scale: auto`).",
        tensorboard="merge/scale",
    ),
    Measurement(
        name="coordinator_process_memory_bytes", unit="bytes", kind=int, source="recorder", over_rounds="peak",
        meaning="Peak resident memory of that process since it started, with interpreter, libraries and data.",
        tensorboard="memory/coordinator_process_bytes", prometheus=Sample(_PROCESS_MEMORY, "coordinator"),
    ),
    Measurement(
        name="test_loss", unit="", kind=float, source="evaluation", over_rounds="latest",
        meaning="Mean loss of the full network on the test data.",
        tensorboard="loss/test",
        prometheus=Sample(Family("ist_test_loss", "gauge", "Loss of the full network on the test data.")),
    ),
    Measurement(
        name="accuracy", unit="", kind=float, source="evaluation", over_rounds="latest",
        meaning="Accuracy of the full network on the test data, from 0 to 1, if it is the metric.",
        prometheus=Sample(
            Family("ist_test_accuracy", "gauge", "Accuracy of the full network on the test data, from 0 to 1.")
        ),
    ),
)  # fmt: skip


def worker_slots() -> list[tuple[int, Measurement]]:
    """Return each number that workers measure, with its slot in a message's header."""
    return [(measured.slot, measured) for measured in MEASUREMENTS if measured.slot is not None]


def over_rounds(how: Literal["total", "peak", "latest"]) -> list[str]:
    """Return the names of the numbers whose value for the run is computed in this way."""
    return [measured.name for measured in MEASUREMENTS if measured.over_rounds == how]


def nothing_measured() -> dict[str, float]:
    """Return a worker's numbers before it has measured anything: all are 0."""
    return {measured.name: measured.kind(0) for _, measured in worker_slots()}


def check_worker(numbers: Numbers) -> None:
    """Assert that these are exactly the numbers that a worker measures."""
    _check(numbers, {measured.name for _, measured in worker_slots()}, "worker")


def check_round(numbers: Numbers) -> None:
    """Assert that these are exactly the numbers that a method reports for a round."""
    names = {m.name for m in MEASUREMENTS if m.source == "method" or (m.source == "worker" and m.combine)}
    _check(numbers, names, "round")


def combined(workers: Sequence[Numbers], parallel: bool) -> dict[str, float]:
    """Return the round's numbers that depend only on its workers' numbers of the same names.

    Args:
        workers: The numbers of each worker; at least one.
        parallel: Whether the workers computed at the same time.
    """
    ways: dict[Combine, Callable[[Sequence[float]], float]] = {
        "sum": sum,
        "mean": lambda values: sum(values) / len(values),
        "max": max,
        "elapsed": max if parallel else sum,
    }
    return {
        measured.name: ways[measured.combine]([numbers[measured.name] for numbers in workers])
        for measured in MEASUREMENTS
        if measured.combine is not None
    }


def _check(numbers: Numbers, expected: set[str], whose: str) -> None:
    missing, unknown = sorted(expected - numbers.keys()), sorted(numbers.keys() - expected)
    assert not missing, f"{missing} of a {whose} are missing: measure them, see ist/measurements.py"
    assert not unknown, f"{unknown} of a {whose} are not in the table: add them to ist/measurements.py"
