"""Every number that a run measures, in one table: how it travels, is combined, recorded and shown.

Where it sits: on the ground. `MEASUREMENTS` is read by the message header (`ist/transport/message.py`), the report of a
round (`ist/training/rounds.py`, `ist/baselines/ranks.py`), the record (`ist/runs/recorder.py`), the check of records
(`ist/storage/run_files.py`), TensorBoard and Prometheus (`ist/monitoring/exporters.py`), reports (`ist/report/`) and
`docs/measurements.md`. A new number is an entry here and the line that measures it: for a worker's number that is in
`worker_numbers` of `ist/monitoring/meter.py`. Then `python docs/measurements.py` brings the documentation up to date.
Law: where a number needs more than its workers' values of the same name, the formula is written out where the number
is made; here it has no `combine`.
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
"""How the numbers of workers make the number of a round; `elapsed` is for seconds on the round's own clock: those of
the slowest worker where workers run in parallel, else their sum."""


@dataclass(frozen=True)
class Family:
    """A metric as Prometheus knows it.

    Attributes:
        name: Its name; the samples of a counter have `_total` behind it.
        kind: A counter only grows over a run.
        help: What it says, as a sentence.
        label: The label by which its samples differ, if there are several.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    label: str = ""


@dataclass(frozen=True)
class Sample:
    """Where a measurement appears in Prometheus: a metric, and the value of the metric's label."""

    family: Family
    label: str = ""


@dataclass(frozen=True)
class Axis:
    """A plot of the test metric against a measurement: what its axis says, and how it is spaced."""

    title: str
    scale: Literal["linear", "log"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A number that a run measures.

    Attributes:
        name: Its key in metrics.jsonl, and in `Numbers`.
        unit: Its unit: `s`, `bytes`, or what is counted; empty where it has none.
        meaning: What it is, as a sentence.
        kind: int or float.
        source: Who measures it: each `worker`; the `method`, of a round as a whole; the `recorder`, about the run and
            its own process; or the `evaluation`, in rounds that have one.
        slot: Which 8 bytes of a message's header carry it from a worker, counted from 0; None for other sources. The
            slots 0, 1, 2 and 10 are taken by what says whose message it is.
        combine: How the workers' values make the round's; None: they only enter formulas.
        recorded: Whether metrics.jsonl has it.
        by_worker: Whether metrics.jsonl also has the workers' own values, as the list `NAME_by_worker`.
        is_list: Whether it is a list itself, with an entry for each worker.
        required: Whether every version has written it in every record, so that a record without it is damaged.
        over_rounds: How the run's own number comes about, which result.json has: `total`, the sum of the rounds (in
            metrics.jsonl it is the sum so far); `peak`, the greatest; `latest`, the last one. None: it has none.
        tensorboard: Its tag in TensorBoard; empty: it is not there.
        prometheus: Its place in Prometheus; None: it is not there.
        phase: Its name in the plot of where the seconds went; empty: it is no phase of a round.
        axis: The plot of the test metric against it, in a report; None: there is none.
        column: Its title in the table that compares runs; empty: it is not there, or it has a column with a format of
            its own (`sent_bytes`, and what is evaluated).
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


_PHASES = Family("ist_phase_seconds", "counter", "Seconds by phase; those of workers are their mean.", "phase")
_MEMORY = Family("ist_memory_peak_bytes", "gauge", "Peak memory, of workers that of the largest.", "process")

MEASUREMENTS: tuple[Measurement, ...] = (
    Measurement(
        name="workers", unit="workers", kind=int, source="method",
        meaning="Workers of the round, including those that were left out of the merge.",
        tensorboard="workers/in_round",
        prometheus=Sample(Family("ist_workers", "gauge", "Workers of the last round.")),
    ),
    Measurement(
        name="steps", unit="steps", kind=int, source="worker", slot=3, combine="max",
        meaning="Local steps of a worker in the round.",
    ),
    Measurement(
        name="epoch", unit="epochs", kind=float, source="recorder",
        meaning="How often the workers together have been through the training data so far.",
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
        meaning="Payload bytes that all processes have sent.",
        tensorboard="bytes/sent", axis=Axis("bytes sent by all processes", "log"),
    ),
    Measurement(
        name="train_s", unit="s", kind=float, source="recorder", required=True, over_rounds="total",
        meaning="Wall-clock seconds of training, without evaluation and without saving.",
        axis=Axis("seconds of training", "log"), column="seconds",
    ),
    Measurement(
        name="virtual_s", unit="s", kind=float, source="method", over_rounds="total",
        meaning=(
            "Compute-normalized seconds, as if every worker had a core of its own: the longest CPU time of a worker's "
            "local steps, and the seconds of the round in which no worker computed."
        ),
        axis=Axis("seconds of training, every worker on a core of its own", "log"), column="on own cores",
    ),
    Measurement(
        name="samples", unit="samples", kind=int, source="worker", slot=4, combine="sum", required=True,
        over_rounds="total",
        meaning="Training samples that all workers together have seen.",
        prometheus=Sample(Family("ist_samples", "counter", "Samples of all workers together.")),
        axis=Axis("samples seen by all workers", "linear"),
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
            "Seconds that a worker's local steps take on a core of their own: CPU time of the thread that trains; on a "
            "GPU the same as `compute_s`."
        ),
    ),
    Measurement(
        name="exchange_s", unit="s", kind=float, source="method", required=True,
        meaning=(
            "Seconds of the round in which subnets or gradients were on their way; with IST those in which no worker "
            "computed."
        ),
        tensorboard="seconds/exchange", prometheus=Sample(_PHASES, "exchange"), phase="exchange",
    ),
    Measurement(
        name="cut_s", unit="s", kind=float, source="method", required=True,
        meaning="Seconds of the round that cutting subnets out of the network took.",
        tensorboard="seconds/cut", prometheus=Sample(_PHASES, "cut"), phase="cut",
    ),
    Measurement(
        name="merge_s", unit="s", kind=float, source="method", required=True,
        meaning="Seconds of the round that merging subnets into the network took.",
        tensorboard="seconds/merge", prometheus=Sample(_PHASES, "merge"), phase="merge",
    ),
    Measurement(
        name="idle_s", unit="s", kind=float, source="method", required=True,
        meaning="Seconds of the round that a worker waited for slower ones, mean of the workers.",
        tensorboard="seconds/idle", prometheus=Sample(_PHASES, "idle"), phase="waiting for slower workers",
    ),
    Measurement(
        name="aside_s", unit="s", kind=float, source="worker", slot=9, combine="elapsed", recorded=False,
        meaning="Wall-clock seconds of the round without training: saving a worker's state, checking its network.",
    ),
    Measurement(
        name="bytes_to_worker", unit="bytes", kind=int, source="recorder", is_list=True,
        meaning="Bytes that each worker was sent in the round; where ranks all-reduce, bytes that each rank sent.",
    ),
    Measurement(
        name="bytes_from_worker", unit="bytes", kind=int, source="recorder", is_list=True,
        meaning="Bytes that each worker sent back in the round.",
    ),
    Measurement(
        name="memory_bytes", unit="bytes", kind=int, source="worker", slot=8, combine="max", by_worker=True,
        required=True, over_rounds="peak",
        meaning="Peak memory of a worker so far, of the worker that needs most.",
        tensorboard="memory/worker_bytes", prometheus=Sample(_MEMORY, "worker"), column="memory a worker",
    ),
    Measurement(
        name="coordinator_memory_bytes", unit="bytes", kind=int, source="recorder", over_rounds="peak",
        meaning="Peak memory so far of the process that records, merges and evaluates.",
        tensorboard="memory/coordinator_bytes", prometheus=Sample(_MEMORY, "coordinator"),
    ),
    Measurement(
        name="test_loss", unit="", kind=float, source="evaluation", over_rounds="latest",
        meaning="Mean loss of the whole network over the test data.",
        tensorboard="loss/test",
        prometheus=Sample(Family("ist_test_loss", "gauge", "Loss of the whole network on the test data.")),
    ),
    Measurement(
        name="accuracy", unit="", kind=float, source="evaluation", over_rounds="latest",
        meaning="Accuracy of the whole network on the test data, from 0 to 1, where that is the metric.",
        prometheus=Sample(
            Family("ist_test_accuracy", "gauge", "Accuracy of the whole network on the test data, from 0 to 1.")
        ),
    ),
)  # fmt: skip


def worker_slots() -> list[tuple[int, Measurement]]:
    """Return what each worker measures, with the slot of a message's header that carries it."""
    return [(measured.slot, measured) for measured in MEASUREMENTS if measured.slot is not None]


def over_rounds(how: Literal["total", "peak", "latest"]) -> list[str]:
    """Return the names of what is combined so over the rounds of a run."""
    return [measured.name for measured in MEASUREMENTS if measured.over_rounds == how]


def nothing_measured() -> dict[str, float]:
    """Return a worker's numbers before it has measured any: all are 0."""
    return {measured.name: measured.kind(0) for _, measured in worker_slots()}


def check_worker(numbers: Numbers) -> None:
    """Assert that these are all numbers that a worker measures, and no other."""
    _check(numbers, {measured.name for _, measured in worker_slots()}, "worker")


def check_round(numbers: Numbers) -> None:
    """Assert that these are all numbers of a round that its method knows, and no other."""
    names = {m.name for m in MEASUREMENTS if m.source == "method" or (m.source == "worker" and m.combine)}
    _check(numbers, names, "round")


def combined(workers: Sequence[Numbers], parallel: bool) -> dict[str, float]:
    """Return the numbers of a round that are made of its workers' numbers alone.

    Args:
        workers: What each worker measured; at least one.
        parallel: Whether they worked at the same time.
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
    assert not missing, f"nobody has measured {missing} of a {whose}: see ist/measurements.py"
    assert not unknown, f"{unknown} of a {whose} is not in the table of ist/measurements.py"
