"""What is to be learned: inputs of unit norm, and a number for each."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ist.data.crime import read_crime
from ist.errors import ConfigError
from ist.theory.kernels import infinite_ntk, least_eigenvalue

SPHERE = "sphere"
"""The name, in place of a file, of inputs drawn uniformly from the sphere."""

Scaling = Literal["raw", "standardised"]

_LEAST_EIGENVALUE = 1e-9


@dataclass(frozen=True)
class Problem:
    """A regression problem that the theory covers.

    Attributes:
        inputs: (n, d), float64, every row of norm 1, no two of them parallel.
        targets: (n,), float64.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        norms = self.inputs.norm(dim=1)
        if not torch.allclose(norms, torch.ones_like(norms)):
            worst = int((norms - 1).abs().argmax())
            raise ConfigError(f"inputs must have norm 1, but input {worst} has {norms[worst]:g}")
        cosines = (self.inputs @ self.inputs.T).fill_diagonal_(0)
        if cosines.max() > 1 - 1e-12:
            one, other = divmod(int(cosines.argmax()), len(cosines))
            raise ConfigError(
                f"inputs {one} and {other} are parallel (the same after scaling to norm 1): the least eigenvalue "
                "lambda_0 of the kernel is 0, and no "
                "theorem holds. Leave one of them out"
            )
        if least_eigenvalue(infinite_ntk(self.inputs)) < _LEAST_EIGENVALUE:
            raise ConfigError("the least eigenvalue lambda_0 of the kernel is 0: inputs are too much alike")

    @property
    def num_samples(self) -> int:
        """The number n of samples."""
        return len(self.inputs)


@lru_cache(maxsize=4)
def load_problem(data: Path | str | None, samples: int, scaling: Scaling = "raw") -> Problem:
    """Load the first samples of Communities and Crime, or draw others; points of one process share them.

    Args:
        data: See `ist.data.crime.read_crime`; or 'sphere'.
        samples: How many.
        scaling: 'raw' leaves the columns in [0, 1]; 'standardised' gives each mean 0 and deviation 1 over the whole
            file. Rows are scaled to norm 1 afterwards.

    Raises:
        ConfigError: There are not so many rows, or two inputs are parallel.
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

    Such inputs are nearly orthogonal where `inputs` exceeds `samples`: lambda_0 is as large as it can be, and the
    theorems' hypotheses are met by networks that can be trained here.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, inputs, dtype=torch.float64, generator=generator)
    targets = torch.rand(samples, dtype=torch.float64, generator=generator) * 2 - 1
    return Problem(drawn / drawn.norm(dim=1, keepdim=True), targets)
