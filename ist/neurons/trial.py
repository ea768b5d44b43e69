"""Try a narrow network out, and learn which sizes its forward computes wrongly.

Every call with sizes that the whole network made on the example is known, and how many neurons each size
counts. A narrow network on the same example must make the same calls with the numbers that are held. Where its
attributes alone do not bring that about, all calls of a module are made with given sizes. Its attributes then stay as
in the whole network, and so does everything that it computes from them (`C // self.n_head`); or they are narrowed as
well, if its forward compares them with shapes.

Where it sits: `ist/neurons/splittable.py` tries networks out; `ist/subnet/call_sizes.py` does in training what was
found here.
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
from ist.neurons.find import Found, ResizedCall, of_two_values
from ist.neurons.tracing.call_sites import Call, CallSize, Running, Site
from ist.neurons.tracing.code_location import users_line
from ist.rng import Indices

_Key = tuple[str, Site, int, Location]


class Trial:
    """Some runs of narrow networks, and what they showed.

    Args:
        found: What is known of the network.
        resized: Paths of the modules whose calls are made with given sizes.
        with_attributes: Whether the attributes that these modules use are narrowed as well.

    Attributes:
        found: What is known of the network, without the attributes that stay whole.
        mismatched: Paths of the other modules that gave a wrong size to a call.
    """

    def __init__(self, found: Found, resized: frozenset[str] = frozenset(), with_attributes: bool = False) -> None:
        origins = {size.origin for size in found.sizes if size.user in resized and not with_attributes}
        self.found = replace(found, sizes=tuple(size for size in found.sizes if size.origin not in origins))
        self.resized = resized
        self.mismatched: set[str] = set()
        self.calls: dict[Call, list[CallSize]] = defaultdict(list)
        self._at_other_turns: dict[Call, Call] = {}
        for size in found.calls:
            self.calls[size.call].append(size)
            # A run in which chance chose other branches may make a call at another turn of its module.
            if size.call.turn > 0 and size.call._replace(turn=0) not in self.calls:
                self._at_other_turns.setdefault(size.call._replace(turn=0), size.call)
        self._choices: dict[_Key, set[str]] = defaultdict(set)
        self._sizes: dict[_Key, CallSize] = {}
        self._shares: dict[tuple[_Key, int], Fraction] = {}
        self._runs = 0

    def note_conflicts(self, held: Mapping[str, Indices], declared: Iterable[Origin]) -> None:
        """Note the modules that use an attribute which would need two values at once.

        Args:
            held: For each group that is split, by name, the neurons that are held.
            declared: Attributes whose value is given by the configuration.
        """
        origins = of_two_values(self.found.sizes, held) - set(declared)
        self.mismatched |= {size.user for size in self.found.sizes if size.origin in origins}

    @contextmanager
    def watching(self, narrow: nn.Module, held: Mapping[str, Indices]) -> Iterator[None]:
        """Watch a narrow network run, and correct its sizes.

        Args:
            narrow: The network.
            held: For each group that is split, by name, the neurons that it holds.
        """
        self._runs += 1
        running = Running()
        with running.watching(narrow), _Correcting(self, running, held):
            yield

    def corrected(self, call: Call, args: Any, kwargs: Any, held: Mapping[str, Indices], where: str) -> Any:
        """Return the arguments that a call should have, and note how they differ from those that it has.

        Raises:
            ModelError: The whole network did not make this call.
        """
        is_resized = call.path in self.resized
        if is_resized and call.site not in self.found.sites[call.path]:
            raise ModelError(f"{where} is not reached by the whole network")
        values: dict[Location, int] = {}
        known = call if call in self.calls else self._at_other_turns.get(call._replace(turn=0), call)
        for size in self.calls.get(known, ()):
            given, wanted = number_at(args, kwargs, size.location), size.narrow(held)
            if given < 0:
                continue
            key = (call.path, call.site, call.visit, size.location)
            if is_resized:
                self._note(key, size, given, wanted)
            elif given != wanted and (wanted != size.size or size.in_shape):
                self.mismatched.add(call.path)
            if given != wanted and (wanted != size.size or size.in_shape):
                values[size.location] = wanted
        return with_sizes(args, kwargs, values) if values else (args, kwargs)

    def _note(self, key: _Key, size: CallSize, given: int, wanted: int) -> None:
        self._sizes.setdefault(key, size)
        share = self._shares.setdefault((key, self._runs), Fraction(wanted, size.size or 1))
        if given == wanted:
            choice = "as computed" if wanted != size.size else "any"
        else:
            choice = "in proportion" if given == size.size else "inferred"
        if share != Fraction(wanted, size.size or 1):
            choice = "inferred"
        self._choices[key].add(choice)

    def result(self) -> Found:
        """Return what is known of the network, with the calls that are made with other sizes.

        Raises:
            ModelError: A size cannot be narrowed.
        """
        resized: dict[str, list[ResizedCall]] = {path: [] for path in sorted(self.resized)}
        for key, choices in self._choices.items():
            size, left = self._sizes[key], choices - {"any"}
            if left and left != {"as computed"}:
                if left != {"in proportion"} and not size.in_shape:
                    raise ModelError(f"a size in {size.where} is computed from several others and cannot be narrowed")
                resized[key[0]].append(ResizedCall(size, left != {"in proportion"}))
        sites = {path: self.found.sites[path] for path in resized}
        made = {path: tuple(calls) for path, calls in resized.items()}
        return replace(self.found, calls=(), sites=sites, resized=made)


class _Correcting(TorchFunctionMode):
    """Lets calls have the sizes that they should have."""

    def __init__(self, trial: Trial, running: Running, held: Mapping[str, Indices]) -> None:
        super().__init__()
        self._trial = trial
        self._running = running
        self._held = held

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function."""
        kwargs = kwargs or {}
        if takes_sizes(func):
            call = self._running.call(sys._getframe(1))
            args, kwargs = self._trial.corrected(call, args, kwargs, self._held, users_line())
        return func(*args, **kwargs)


def spread(found: Found, paths: set[str]) -> frozenset[str]:
    """Return modules and all that must be treated like them: those of other layers, and users of the same attributes.

    Args:
        found: What is known of the network.
        paths: Some modules.
    """
    patterns = {_pattern(path) for path in paths}
    reached = paths | {path for path in found.sites if _pattern(path) in patterns}
    while True:
        origins: set[Origin] = {size.origin for size in found.sizes if size.user in reached}
        further = {size.user for size in found.sizes if size.origin in origins}
        if further <= reached:
            return frozenset(reached)
        reached |= further


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)
