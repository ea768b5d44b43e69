"""The regression problems of the theory: inputs of norm 1, and a number for each.

Where it sits: all experiments on [MRN] take their data from here.
Not here: reading the file (`ist/data/crime.py`).
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ist.data.crime import read_crime
from ist.errors import ConfigError
from ist.theory.quantities.kernels import infinite_ntk, least_eigenvalue

SPHERE = "sphere"
"""Used instead of a file name for inputs that are drawn uniformly from the sphere."""

Scaling = Literal["raw", "standardised"]

_LEAST_EIGENVALUE = 1e-9


@dataclass(frozen=True)
class Problem:
    """A regression problem that the theory covers.

    Attributes:
        inputs: (n, d), float64, rows of norm 1, of which no two are parallel.
        targets: (n,), float64.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        norms = self.inputs.norm(dim=1)
        if not torch.allclose(norms, torch.ones_like(norms)):
            worst = int((norms - 1).abs().argmax())
            raise ConfigError(f"input {worst} has norm {norms[worst]:g}: expected norm 1")
        cosines = (self.inputs @ self.inputs.T).fill_diagonal_(0)
        if cosines.max() > 1 - 1e-12:
            one, other = divmod(int(cosines.argmax()), len(cosines))
            raise ConfigError(
                f"inputs {one} and {other} are parallel (the same after scaling to norm 1), so the least eigenvalue "
                "lambda_0 of the kernel is 0 and no theorem applies. Remove one of them"
            )
        if least_eigenvalue(infinite_ntk(self.inputs)) < _LEAST_EIGENVALUE:
            raise ConfigError("the least eigenvalue lambda_0 of the kernel is 0, because inputs are too similar")

    @property
    def num_samples(self) -> int:
        """The number n of samples."""
        return len(self.inputs)


@lru_cache(maxsize=4)
def load_problem(data: Path | str | None, samples: int, scaling: Scaling = "raw") -> Problem:
    """Load the first samples of Communities and Crime, or draw inputs from the sphere; the result is cached.

    Args:
        data: See `ist.data.crime.read_crime`; or 'sphere'.
        samples: The number of samples.
        scaling: 'raw' leaves the columns in [0, 1]; 'standardised' gives each column mean 0 and deviation 1 over the
            full file. Afterwards rows are scaled to norm 1.

    Raises:
        ConfigError: There are fewer rows, or two inputs are parallel.
        DataError: The file is missing or malformed.
    """
    if data == SPHERE:
        return sphere(samples, 2 * samples)
    inputs, targets = read_crime(None if data is None else Path(data))
    if samples > len(inputs):
        raise ConfigError(f"'samples' is {samples}, but the data set has {len(inputs)} rows")
    if scaling == "standardised":
        inputs = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0).clamp_min(1e-12)
    inputs = inputs[:samples]
    return Problem(inputs / inputs.norm(dim=1, keepdim=True), targets[:samples])


def sphere(samples: int, inputs: int, seed: int = 0) -> Problem:
    """Draw inputs uniformly from the unit sphere, and targets uniformly from [-1, 1].

    Such inputs are nearly orthogonal if `inputs` exceeds `samples`. Then lambda_0 is nearly as large as possible, and
    networks of moderate width meet the hypotheses of the theorems.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, inputs, dtype=torch.float64, generator=generator)
    targets = torch.rand(samples, dtype=torch.float64, generator=generator) * 2 - 1
    return Problem(drawn / drawn.norm(dim=1, keepdim=True), targets)
