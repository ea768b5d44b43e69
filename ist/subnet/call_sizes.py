"""Let modules of a narrow network make some calls with other sizes than their forward computes.

A forward may take a size from the shape of what it is given, as in `y.view(B, T, C)`. Such a module computes all
its integers as in the whole network, and where one of them says how many neurons there are, the call is made with
the number that is held instead.

Where it sits: `ist/neurons/trial.py` finds which calls need this; `ist/subnet/module.py` puts it into narrow modules.
Not here: whether what comes out is right (`ist/checks/verify.py`).
"""

import sys
from collections import Counter
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from ist.errors import ModelError
from ist.neurons.attribute_sizes import Location, number_at, takes_sizes, with_sizes
from ist.neurons.tracing.call_sites import Resize, Resizes, Site, site_of
from ist.neurons.tracing.code_location import users_line


def resize_calls(module: nn.Module, resizes: Resizes) -> None:
    """Let a module make some calls of its forward with other sizes, in place.

    Args:
        module: A module of a narrow network, whose integer attributes are those of the whole network.
        resizes: For every call with sizes that its forward makes, what becomes of these.
    """
    base = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Resizing(resizes, self.training):
            return _run(base.forward, self, args, kwargs)

    module.__class__ = type(f"Resized{base.__name__}", (base,), {"forward": forward})


def _run(forward: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return forward(module, *args, **kwargs)


_FORWARD = _run.__code__
"""What the frames of a forward end in, seen from a call that it makes itself."""


class _Resizing(TorchFunctionMode):
    """Changes the sizes of calls while a forward runs; calls of the modules inside it are left alone."""

    def __init__(self, resizes: Resizes, is_training: bool) -> None:
        super().__init__()
        self._resizes = resizes
        self._is_training = is_training
        self._visits: Counter[Site] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, with other sizes if need be."""
        kwargs = kwargs or {}
        if takes_sizes(func):
            site, is_own = site_of(sys._getframe(1), _FORWARD)
            if is_own:
                values = self._values(site, args, kwargs)
                if values:
                    args, kwargs = with_sizes(args, kwargs, values)
        return func(*args, **kwargs)

    def _values(self, site: Site, args: Any, kwargs: Any) -> dict[Location, int]:
        visits = self._resizes.get(site)
        if visits is None:
            if self._is_training:
                raise ModelError(
                    f"a narrow network was about to run {users_line()}, which the example did not reach: a size there "
                    "cannot be narrowed. Share the neurons of this module (partition.exclude)"
                )
            return {}
        number = 0
        if len(visits) > 1:
            number = self._visits[site]
            self._visits[site] += 1
            if number >= len(visits):
                raise ModelError(
                    f"a narrow network runs {users_line()} {number + 1} times, where the whole one did {len(visits)} "
                    "times on the example: its sizes cannot be narrowed. Share the neurons of this module "
                    "(partition.exclude)"
                )
        return {
            resize.location: _resized(resize, number_at(args, kwargs, resize.location)) for resize in visits[number]
        }


def _resized(resize: Resize, number: int) -> int:
    if resize.narrow is None:
        return -1
    value, rest = divmod(number * resize.narrow, resize.whole)
    if rest or (number != resize.whole and not resize.in_proportion):
        raise ModelError(
            f"{users_line()}: the size {number} cannot be narrowed: it was {resize.whole} on the example, of which a "
            f"narrow network holds {resize.narrow}. Share the neurons of this module (partition.exclude)"
        )
    return value
