"""Replace the sizes in some calls of a submodel's forward.

A forward may take a size from the shape of its input, as in `y.view(B, T, C)`. Such a module computes all its
integers as in the full network. In calls where such an integer counts neurons, it is replaced by the number of
neurons that the submodel holds.

Where it sits: `ist/neurons/trial.py` finds the calls; `ist/subnet/module.py` applies this to submodels.
Not here: whether the submodel computes the right values (`ist/checks/verify.py`).
"""

import sys
from collections import Counter
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from ist.errors import ModelError
from ist.neurons.attribute_sizes import Location, number_at, takes_sizes, with_sizes
from ist.neurons.tracing.call_sites import CallSite, Resize, Resizes, site_of
from ist.neurons.tracing.code_location import users_line


def resize_calls(module: nn.Module, resizes: Resizes) -> None:
    """Make a module replace the sizes in some calls of its forward, in place.

    Args:
        module: A module of a submodel, whose integer attributes are those of the full network.
        resizes: For every call with sizes in its forward, the replacements.
    """
    base = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Resizing(resizes, self.training):
            return _run(base.forward, self, args, kwargs)

    module.__class__ = type(f"Resized{base.__name__}", (base,), {"forward": forward})


def _run(forward: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return forward(module, *args, **kwargs)


_FORWARD = _run.__code__
"""The code at which the frames of a module's own call end."""


class _Resizing(TorchFunctionMode):
    """Replaces the sizes of calls while a forward runs, except in calls of the modules inside it."""

    def __init__(self, resizes: Resizes, is_training: bool) -> None:
        super().__init__()
        self._resizes = resizes
        self._is_training = is_training
        self._visits: Counter[CallSite] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, with replaced sizes if necessary."""
        kwargs = kwargs or {}
        if takes_sizes(func):
            site, is_own = site_of(sys._getframe(1), _FORWARD)
            if is_own:
                values = self._values(site, args, kwargs)
                if values:
                    args, kwargs = with_sizes(args, kwargs, values)
        return func(*args, **kwargs)

    def _values(self, site: CallSite, args: Any, kwargs: Any) -> dict[Location, int]:
        visits = self._resizes.get(site)
        if visits is None:
            if self._is_training:
                raise ModelError(
                    f"a submodel is about to run {users_line()}, which the example did not reach, so the size that it "
                    "needs there is unknown. Share the neurons of this module (partition.exclude)"
                )
            return {}
        number = 0
        if len(visits) > 1:
            number = self._visits[site]
            self._visits[site] += 1
            if number >= len(visits):
                raise ModelError(
                    f"a submodel runs {users_line()} {number + 1} times, but the full network ran it {len(visits)} "
                    "times on the example, so the size that a submodel needs there is unknown. Share the neurons of "
                    "this module (partition.exclude)"
                )
        return {
            resize.location: _resized(resize, number_at(args, kwargs, resize.location)) for resize in visits[number]
        }


def _resized(resize: Resize, number: int) -> int:
    if resize.submodel is None:
        return -1
    value, rest = divmod(number * resize.submodel, resize.full)
    if rest or (number != resize.full and not resize.in_proportion):
        raise ModelError(
            f"{users_line()}: the size {number} cannot be changed to that of a submodel: it is {resize.full} on the "
            f"example, where this submodel holds {resize.submodel}. Share the neurons of this module "
            "(partition.exclude)"
        )
    return value
