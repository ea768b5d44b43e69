"""Run a submodel on the example, and learn which sizes its forward computes wrongly.

The trace knows every call with sizes that the full network makes on the example, and which neurons each size counts.
A submodel on the same example must make the same calls with the number of neurons that it holds. If changing its
attributes does not achieve that, every such call of the module gets a replaced size. The module's attributes then
keep the values of the full network, and so does everything computed from them (`C // self.n_head`). If the forward
compares attributes with shapes, the attributes are changed as well.

Where it sits: `ist/neurons/splittable.py` runs the trials; `ist/subnet/call_sizes.py` applies the result in training.
Not here: applying the result in training (`ist/subnet/call_sizes.py`).
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from ist.errors import ModelError
from ist.neurons.attribute_sizes import Location, Origin, number_at, takes_sizes, with_sizes
from ist.neurons.find import Neurons, ResizedCall, conflicting_sizes
from ist.neurons.tracing.call_sites import Call, CallSite, CallSize, ModuleStack
from ist.neurons.tracing.code_location import users_line
from ist.rng import Indices

_Key = tuple[str, CallSite, int, Location]


class SubnetTrial:
    """A series of submodel runs, and the size mismatches that they showed.

    Args:
        neurons: The neurons of the network.
        resized: Paths of the modules whose calls get replaced sizes.
        with_attributes: Whether the attributes that these modules use change as well.

    Attributes:
        neurons: The neurons of the network, without the attributes that keep their value.
        mismatched: Paths of the other modules that passed a wrong size to a call.
    """

    def __init__(self, neurons: Neurons, resized: frozenset[str] = frozenset(), with_attributes: bool = False) -> None:
        origins = {size.origin for size in neurons.sizes if size.user in resized and not with_attributes}
        self.neurons = replace(neurons, sizes=tuple(size for size in neurons.sizes if size.origin not in origins))
        self.resized = resized
        self.mismatched: set[str] = set()
        self.calls: dict[Call, list[CallSize]] = defaultdict(list)
        self._at_other_turns: dict[Call, Call] = {}
        for size in neurons.calls:
            self.calls[size.call].append(size)
            # If the network takes random branches, a call may come at another turn of its module.
            if size.call.turn > 0 and size.call._replace(turn=0) not in self.calls:
                self._at_other_turns.setdefault(size.call._replace(turn=0), size.call)
        self._choices: dict[_Key, set[str]] = defaultdict(set)
        self._sizes: dict[_Key, CallSize] = {}
        self._shares: dict[tuple[_Key, int], Fraction] = {}
        self._runs = 0

    def note_conflicts(self, held: Mapping[str, Indices], declared: Iterable[Origin]) -> None:
        """Record the modules that use an attribute which would need two values at once.

        Args:
            held: For each group that is split, by name, the neurons that the submodel holds.
            declared: Attributes whose value the configuration gives.
        """
        origins = conflicting_sizes(self.neurons.sizes, held) - set(declared)
        self.mismatched |= {size.user for size in self.neurons.sizes if size.origin in origins}

    @contextmanager
    def watching(self, submodel: nn.Module, held: Mapping[str, Indices]) -> Iterator[None]:
        """Observe one run of a submodel, and correct the sizes of its calls.

        Args:
            submodel: The submodel.
            held: For each group that is split, by name, the neurons that it holds.
        """
        self._runs += 1
        stack = ModuleStack()
        with stack.watching(submodel), _CorrectSizes(self, stack, held):
            yield

    def corrected(self, call: Call, args: Any, kwargs: Any, held: Mapping[str, Indices], where: str) -> Any:
        """Return the arguments that a call should have, and record how they differ from the given ones.

        Raises:
            ModelError: The full network did not make this call.
        """
        is_resized = call.path in self.resized
        if is_resized and call.site not in self.neurons.sites[call.path]:
            raise ModelError(f"the full network does not reach {where}")
        values: dict[Location, int] = {}
        known = call if call in self.calls else self._at_other_turns.get(call._replace(turn=0), call)
        for size in self.calls.get(known, ()):
            given, expected = number_at(args, kwargs, size.location), size.in_submodel(held)
            if given < 0:
                continue
            key = (call.path, call.site, call.visit, size.location)
            if is_resized:
                self._note(key, size, given, expected)
            elif given != expected and (expected != size.size or size.in_shape):
                self.mismatched.add(call.path)
            if given != expected and (expected != size.size or size.in_shape):
                values[size.location] = expected
        return with_sizes(args, kwargs, values) if values else (args, kwargs)

    def _note(self, key: _Key, size: CallSize, given: int, expected: int) -> None:
        self._sizes.setdefault(key, size)
        share = self._shares.setdefault((key, self._runs), Fraction(expected, size.size or 1))
        if given == expected:
            choice = "as computed" if expected != size.size else "any"
        else:
            choice = "in proportion" if given == size.size else "inferred"
        if share != Fraction(expected, size.size or 1):
            choice = "inferred"
        self._choices[key].add(choice)

    def result(self) -> Neurons:
        """Return the neurons of the network, with the calls whose sizes a submodel replaces.

        Raises:
            ModelError: A size cannot be changed to that of a submodel.
        """
        resized: dict[str, list[ResizedCall]] = {path: [] for path in sorted(self.resized)}
        for key, choices in self._choices.items():
            size, left = self._sizes[key], choices - {"any"}
            if left and left != {"as computed"}:
                if left != {"in proportion"} and not size.in_shape:
                    raise ModelError(
                        f"a size in {size.where} is computed from several others and cannot be changed in a submodel"
                    )
                resized[key[0]].append(ResizedCall(size, left != {"in proportion"}))
        sites = {path: self.neurons.sites[path] for path in resized}
        made = {path: tuple(calls) for path, calls in resized.items()}
        return replace(self.neurons, calls=(), sites=sites, resized=made)


class _CorrectSizes(TorchFunctionMode):
    """Replaces wrong sizes in the arguments of calls."""

    def __init__(self, trial: SubnetTrial, stack: ModuleStack, held: Mapping[str, Indices]) -> None:
        super().__init__()
        self._trial = trial
        self._stack = stack
        self._held = held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function."""
        kwargs = kwargs or {}
        if takes_sizes(func):
            call = self._stack.call(sys._getframe(1))
            args, kwargs = self._trial.corrected(call, args, kwargs, self._held, users_line())
        return func(*args, **kwargs)


def related_modules(neurons: Neurons, paths: set[str]) -> frozenset[str]:
    """Return modules with all that must be treated alike: the same part of other layers, users of the same attributes.

    Args:
        neurons: The neurons of the network.
        paths: Paths of some modules.
    """
    patterns = {_pattern(path) for path in paths}
    reached = paths | {path for path in neurons.sites if _pattern(path) in patterns}
    while True:
        origins: set[Origin] = {size.origin for size in neurons.sizes if size.user in reached}
        further = {size.user for size in neurons.sizes if size.origin in origins}
        if further <= reached:
            return frozenset(reached)
        reached |= further


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)
