"""Optimizers as a user writes them, for the tests; a configuration names them `tests.optimizers:NAME`."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def by_dims(params: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups, as in many recipes: matrices decay, vectors have their own rate and do not."""
    given = list(params)
    return [
        {"params": [parameter for parameter in given if parameter.ndim < 2], "weight_decay": 0.0, "lr": 0.02},
        {"params": [parameter for parameter in given if parameter.ndim >= 2], "weight_decay": 0.01},
    ]


class GroupedSGD(torch.optim.SGD):
    """SGD that makes two groups of its parameters."""

    def __init__(self, params: Iterable[nn.Parameter], **args: Any) -> None:
        super().__init__(by_dims(params), **args)


class GroupedAdamW(torch.optim.AdamW):
    """AdamW that makes two groups of its parameters."""

    def __init__(self, params: Iterable[nn.Parameter], **args: Any) -> None:
        super().__init__(by_dims(params), **args)


class GroupForEach(torch.optim.SGD):
    """SGD with a group for each parameter, whose rates fall with depth."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__([{"params": [p], "lr": lr * 0.9**depth} for depth, p in enumerate(params)], lr=lr)


class GroupBySize(torch.optim.SGD):
    """SGD whose groups depend on sizes, which differ between a network and its subnets."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        given = list(params)
        large, small = ([p for p in given if (p.numel() > 100) == wanted] for wanted in (True, False))
        super().__init__([{"params": large, "lr": 2 * lr}, {"params": small}], lr=lr)


class Accumulating(torch.optim.SGD):
    """SGD that steps once in `every` calls, on the sum of their gradients."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, every: int) -> None:
        super().__init__(params, lr=lr)
        self.every, self.calls = every, 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % self.every == 0:
            super().zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure) if self.calls % self.every == 0 else None


class OwnRate(torch.optim.SGD):
    """SGD whose rate falls with every step: it counts in its parameter groups."""

    def step(self, closure: Any = None) -> Any:
        done = super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.9
        return done


class History(torch.optim.SGD):
    """SGD that remembers in a list."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, lr=lr)
        self.seen: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.seen.append(1.0)
        return super().step(closure)


class MomentumForMatrices(torch.optim.SGD):
    """SGD that keeps state for matrices alone."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        given = list(params)
        groups = [{"params": [p for p in given if (p.ndim >= 2) == wanted]} for wanted in (True, False)]
        super().__init__([{**groups[0], "momentum": 0.9}, {**groups[1], "momentum": 0.0}], lr=lr)


def no_decay_on_biases(named: Mapping[str, nn.Parameter], lr: float = 0.01) -> torch.optim.Optimizer:
    """AdamW with groups by name: biases and norms do not decay, the output has its own rate."""
    plain = [parameter for name, parameter in named.items() if name.endswith("bias") or "norm" in name]
    output = [named[name] for name in ("output.weight",) if name in named]
    rest = [p for p in named.values() if not any(p is other for other in (*plain, *output))]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": output, "lr": lr / 2}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.1)


def like_the_class(named: Mapping[str, nn.Parameter], name: str, args: Mapping[str, Any]) -> torch.optim.Optimizer:
    """A class of torch.optim, made by a function."""
    made: torch.optim.Optimizer = getattr(torch.optim, name)(named.values(), **args)
    return made
