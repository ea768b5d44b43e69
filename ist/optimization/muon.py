"""Muon for the hidden matrices of a network and AdamW for all its other parameters, as one optimizer.

Muon orthogonalizes the momentum of a matrix: all singular values of its update are about 1. Embeddings and output
layers are no such matrices, and vectors have no singular values: they use AdamW.

A subnet's matrices are narrower. With `adjust_lr_fn: match_rms_adamw`, the default here, the root mean square of an
update's entries is about 0.2 times the learning rate for every shape, as AdamW's is: an entry changes as much in a
subnet as in the full network, and both parts can use one learning rate. With `original`, torch's default, the entries
grow as the matrix narrows: by sqrt(n) if rows and columns are divided by n. In either case, a weight that is scaled up
while it is trained (`train.activation_scale: folded`) is scaled down afterwards together with its update, as with any
optimizer.

Where it sits: `factory.py` makes it if `train.optimizer.name` is `MuonWithAdamW`.
Not here: Muon itself (`torch.optim.Muon`).
Reference: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon/); J. Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ist.errors import ConfigError

ADAMW_FOR = (
    "*emb*", "*wte*", "*wpe*", "head.*", "*.head.*", "*_head.*", "classifier.*", "*.classifier.*", "output.*",
    "score.*", "fc.*",
)  # fmt: skip
"""Patterns of the usual names of embeddings and output layers."""


def muon_with_adamw(
    named: Mapping[str, nn.Parameter],
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr_fn: str = "match_rms_adamw",
    adamw: Mapping[str, Any] | None = None,
    adamw_for: Sequence[str] = ADAMW_FOR,
) -> "MuonWithAdamW":
    """Make the optimizer: Muon for parameters of two dims, AdamW for all others.

    Args:
        named: The parameters, by their names in the full network.
        lr: Learning rate of both.
        weight_decay: Decoupled weight decay of both.
        momentum: Muon's momentum.
        nesterov: Whether Muon's momentum is Nesterov's.
        ns_steps: Steps of Muon's Newton-Schulz iteration.
        adjust_lr_fn: How Muon's learning rate depends on a matrix's shape: 'match_rms_adamw' or 'original'.
        adamw: Arguments of torch.optim.AdamW, such as `betas`, or another `lr` or `weight_decay` than Muon's.
        adamw_for: Patterns of names of matrices that use AdamW, for embeddings and output layers.

    Raises:
        ConfigError: This torch has no Muon.
    """
    if getattr(torch.optim, "Muon", None) is None:
        raise ConfigError(
            f"'train.optimizer.name' is 'MuonWithAdamW', which needs torch.optim.Muon (torch 2.9 or newer), but this "
            f"is torch {torch.__version__}"
        )
    matrices = [parameter for name, parameter in named.items() if uses_muon(name, parameter.ndim, adamw_for)]
    others = [parameter for name, parameter in named.items() if not uses_muon(name, parameter.ndim, adamw_for)]
    parts: dict[str, torch.optim.Optimizer] = {}
    if matrices:
        parts["muon"] = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
    if others:
        parts["adamw"] = torch.optim.AdamW(others, **{"lr": lr, "weight_decay": weight_decay, **(adamw or {})})
    return MuonWithAdamW(parts)


def uses_muon(name: str, dims: int, adamw_for: Sequence[str]) -> bool:
    """Return whether a parameter uses Muon."""
    return dims == 2 and not any(fnmatchcase(name, pattern) for pattern in adamw_for)


def check_names(args: Mapping[str, Any], dims: Mapping[str, int]) -> None:
    """Check which parameters of a network would use Muon.

    Args:
        args: The arguments of `muon_with_adamw`.
        dims: The number of dims of each trained parameter of the full network, by its name.

    Raises:
        ConfigError: A given pattern matches no parameter, or no parameter would use Muon.
    """
    key, patterns = "train.optimizer.args.adamw_for", args.get("adamw_for", ADAMW_FOR)
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise ConfigError(f"'{key}' is {patterns!r}: expected a list of patterns of parameter names")
    unused = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in dims)]
    if "adamw_for" in args and unused:
        raise ConfigError(f"'{key}' has '{unused[0]}', which matches no trained parameter: names are {_few(dims)}")
    by_muon = [name for name, number in dims.items() if uses_muon(name, number, patterns)]
    if not by_muon:
        raise ConfigError(
            f"'train.optimizer.name' is 'MuonWithAdamW', but no parameter would use Muon, because '{key}' matches all "
            f"with two dims ({', '.join(map(repr, patterns))}), or there are none: use 'AdamW'"
        )
    if "adamw_for" not in args and len(unused) == len(patterns):
        warnings.warn(
            f"'train.optimizer.name' is 'MuonWithAdamW', and no parameter has a usual name of an embedding or an "
            f"output layer, so Muon trains all matrices ({_few(by_muon)}): name those for AdamW in '{key}' ([] for "
            "none)",
            stacklevel=2,
        )


def _few(names: Mapping[str, int] | Sequence[str]) -> str:
    shown = [repr(name) for name in names][:5]
    return ", ".join([*shown, *(["..."] if len(names) > len(shown) else [])])


class MuonWithAdamW(torch.optim.Optimizer):
    """An optimizer that contains one of Muon and one of AdamW; see `muon_with_adamw`.

    Its parameter groups are theirs, and so is its state.

    Args:
        parts: The optimizers, "muon" and "adamw"; one may be missing.
    """

    # In a slot, because they hold nothing of their own: `step` gives them this object's groups and state.
    __slots__ = ("_parts",)
    _parts: dict[str, torch.optim.Optimizer]

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer]) -> None:
        groups = [{**group, PART: name} for name, part in parts.items() for group in part.param_groups]
        super().__init__(groups, {})
        first = next(iter(parts.values()))
        self.defaults = {key: first.defaults[key] for key in ("lr", "weight_decay")}
        self._parts = dict(parts)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make a step of both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group[PART] == name]
            part.step()
        return loss


PART = "muon_or_adamw"
"""The setting of a parameter group that says which of the two trains it."""
