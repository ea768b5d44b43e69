"""Random draws that two networks of different width share, so that their outputs can be compared.

A submodel draws fewer random numbers than the full network. Here the n-th draw of a run has fixed values: one
value per position along dims that have the same size in all runs, and one value for all positions along dims whose
size differs. Draws at different positions are independent and identically distributed, so the submodel may use
the values that the full network draws for the neurons that it holds.

Where it sits: `ist/checks/verify.py` compares networks under `with_same_draws`; `ist/neurons/trace.py` uses
`fixed_draws`, so that a network takes the same random branches in every run.
Not here: dropout, which is switched off instead (`ist/neurons/trace.py`).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ist.errors import ModelError
from ist.neurons.tracing.code_location import users_line
from ist.neurons.tracing.labels import Shape

Result = TypeVar("Result")


@dataclass(frozen=True)
class Draw:
    """One call of a random operator: its name, the shape that it drew, and the line of the network's code."""

    operator: str
    shape: Shape
    line: str


@dataclass
class Draws:
    """The draws of one run.

    Attributes:
        seed: The values follow from it and from the index of the draw.
        equal: For the index of a draw, the dims along which all positions have the same value.
        made: The draws of torch's operators so far.
        others: Whether Python's or NumPy's generator was used as well.
    """

    seed: int
    equal: dict[int, set[int]] = field(default_factory=dict)
    made: list[Draw] = field(default_factory=list)
    others: bool = False

    def uniform(self, operator: str, shape: Sequence[int]) -> Tensor:
        """Return the values of the next draw: float64, greater than 0 and less than 1, of the given shape."""
        number = len(self.made)
        self.made.append(Draw(operator, tuple(shape), users_line()))
        equal = self.equal.get(number, set())
        drawn = [1 if dim in equal else size for dim, size in enumerate(shape)]
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        return torch.rand(drawn, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6).expand(tuple(shape))


@contextmanager
def fixed_draws(draws: Draws) -> Iterator[None]:
    """Make all randomness a function of `draws.seed`: torch's operators, and Python's and NumPy's generators."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(draws.seed)
        np.random.seed(draws.seed)
        with torch.random.fork_rng(devices=[]), _Drawing(draws):
            torch.manual_seed(draws.seed)
            before = _others()
            yield
            draws.others = before != _others()
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _others() -> tuple[Any, ...]:
    """Return the state of Python's and NumPy's generators, which changes with every draw."""
    numpy: Any = np.random.get_state(legacy=False)
    return random.getstate(), numpy["state"]["pos"], numpy["has_gauss"]


def with_same_draws(seed: int, runs: Sequence[Callable[[], Result]]) -> tuple[list[Result], bool]:
    """Return the results of several runs that all draw the same random values.

    Args:
        seed: Determines the values of the draws.
        runs: Functions that may be called several times; the same draws give the same result.

    Returns:
        The results, and whether anything was drawn at random.

    Raises:
        ModelError: The runs make different draws.
    """
    equal: dict[int, set[int]] = {}
    while True:
        results, made, is_random = [], [], False
        for run in runs:
            draws = Draws(seed, equal)
            with fixed_draws(draws):
                results.append(run())
            made.append(draws.made)
            is_random = is_random or draws.others
        found = {number: dims for number, dims in _differing_dims(made).items() if not dims <= equal.get(number, set())}
        if not found:
            _check_alike(made)
            return results, bool(made[0]) or is_random
        equal = equal | {number: dims | equal.get(number, set()) for number, dims in found.items()}


def _differing_dims(made: Sequence[Sequence[Draw]]) -> dict[int, set[int]]:
    differing: dict[int, set[int]] = {}
    for number, same in enumerate(zip(*made, strict=False)):
        shapes = [draw.shape for draw in same]
        if len({len(shape) for shape in shapes}) == 1:
            dims = {dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1}
            if dims:
                differing[number] = dims
    return differing


def _check_alike(made: Sequence[Sequence[Draw]]) -> None:
    for other in made[1:]:
        for mine, theirs in zip(made[0], other, strict=False):
            if mine.operator != theirs.operator or len(mine.shape) != len(theirs.shape):
                raise ModelError(
                    f"the submodel and the full network make different random draws: {mine.operator} of shape "
                    f"{mine.shape} at {mine.line}, {theirs.operator} of shape {theirs.shape} at {theirs.line}"
                )
        if len(made[0]) != len(other):
            longer = max(made[0], other, key=len)
            last = longer[min(len(made[0]), len(other))]
            raise ModelError(
                f"the submodel makes {len(made[0])} random draws and the full network {len(other)}: the first that "
                f"only one of them makes is {last.operator} at {last.line}"
            )


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces the results of random operators by shared draws."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        name = str(func.overloadpacket.__name__)
        value = _VALUES.get(name.removesuffix("_").removesuffix("_like"))
        if value is None:
            return func(*args, **(kwargs or {}))
        schema = func._schema.arguments
        given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        given |= dict(zip([argument.name for argument in schema], args, strict=False)) | (kwargs or {})
        result = func(*args, **(kwargs or {}))  # for its shape, dtype and device
        first = result[0] if isinstance(result, tuple) else result
        if first.is_meta:
            return result
        drawn = value(self._draws, name, given, first)
        first.copy_(drawn)
        return result


_Value = Callable[[Draws, str, dict[str, Any], Tensor], Any]


def _uniform(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    low, high = given.get("from", 0.0), given.get("to", 1.0)
    return low + (high - low) * draws.uniform(name, like.shape)


def _standard_normal(draws: Draws, name: str, like: Tensor) -> Tensor:
    return torch.erfinv(2 * draws.uniform(name, like.shape) - 1) * 2**0.5


def _normal(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    mean, std = given.get("mean", 0.0), given.get("std", 1.0)
    return mean + std * _standard_normal(draws, name, like)


def _log_normal(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    return (given["mean"] + given["std"] * _standard_normal(draws, name, like)).exp()


def _exponential(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    return -draws.uniform(name, like.shape).log() / given["lambd"]


def _cauchy(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    return given["median"] + given["sigma"] * torch.tan(torch.pi * (draws.uniform(name, like.shape) - 0.5))


def _geometric(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    return (draws.uniform(name, like.shape).log() / torch.log1p(torch.tensor(-given["p"], dtype=torch.float64))).ceil()


def _bernoulli(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    chance = given.get("p")
    return (draws.uniform(name, like.shape) < (given["self"] if chance is None else chance)).double()


def _integers(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    low = given.get("low", given.get("from")) or 0
    high = given.get("high", given.get("to"))
    high = 2 if like.dtype == torch.bool else low + 2**7 if high is None else high
    return low + (draws.uniform(name, like.shape) * (high - low)).floor()


def _permutation(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:  # noqa: ARG001 (as above)
    return draws.uniform(name, like.shape).argsort(stable=True)


def _multinomial(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    chances = given["self"].double()
    if given["replacement"]:
        bounds = (chances / chances.sum(-1, keepdim=True)).cumsum(-1)
        drawn = torch.searchsorted(bounds.contiguous(), draws.uniform(name, like.shape).contiguous())
        return drawn.clamp(max=chances.shape[-1] - 1)
    keys = chances.log() - (-draws.uniform(name, chances.shape).log()).log()
    return keys.topk(given["num_samples"], dim=-1).indices


def _poisson(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    return (given["self"] + draws.uniform(name, like.shape)).floor()


def _binomial(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    count: Tensor = given["count"]
    return torch.minimum((count * given["prob"] + draws.uniform(name, like.shape)).floor(), count.double())


def _gamma(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    return given["self"] * (0.5 + draws.uniform(name, like.shape))


def _dirichlet(draws: Draws, name: str, given: dict[str, Any], like: Tensor) -> Any:
    parts = _gamma(draws, name, given, like)
    return parts / parts.sum(-1, keepdim=True)


_VALUES: dict[str, _Value] = {
    "rand": _uniform, "uniform": _uniform, "randn": lambda draws, name, _, like: _standard_normal(draws, name, like),
    "normal": _normal, "log_normal": _log_normal, "exponential": _exponential, "cauchy": _cauchy,
    "geometric": _geometric, "bernoulli": _bernoulli, "randint": _integers, "random": _integers,
    "randperm": _permutation, "multinomial": _multinomial, "poisson": _poisson, "binomial": _binomial,
    "_standard_gamma": _gamma, "_sample_dirichlet": _dirichlet,
}  # fmt: skip
"""For each random operator, without the suffixes of its variants (`_`, `_like`), the function that makes its values."""
