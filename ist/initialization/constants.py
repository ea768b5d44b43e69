"""Make the constants of a network: its tensors that are not in the `state_dict`, such as rotary frequencies.

Every process needs them, because they are not sent. They rarely depend on parameters. So the constructor runs with
parameters on the `meta` device, where they need no memory and their initialization no time. The constants are then
those of the network as it is really built, unless they depend on a parameter or on a random number: torch draws no
random numbers on `meta`. Both are detected, and such a network is really built, with its large tensors in files.

Where it sits: `ist/runs/build.py` calls it in every process.
Law: the constants are those of the network that `make` returns, bit for bit.
Not here: the values of parameters (`ist/subnet/stores/`), a worker's part of a constant (`ist/subnet/split_model.py`).
"""

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ist.data.nested import tensors_in
from ist.errors import ModelError
from ist.initialization.in_files import built_whole
from ist.network.copies import like
from ist.tensors import checksum, constant_tensors, memory_key

_READS = {"tolist", "numpy", "__array__", "__dlpack__"}
"""Methods of a tensor that read its values without an operator."""


class _UnknownValue(Exception):  # noqa: N818 (it is caught here, so it is no error)
    """The constructor needs a value that it does not have without parameters."""


def constants(template: nn.Module, make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Return the constants of a network by name, on the CPU.

    If they depend on parameters or on random numbers, the network is built; if it is large, with a warning.

    Args:
        template: The network on the `meta` device.
        make: Builds the network, always with the same values.
    """
    names = list(constant_tensors(template))
    if not names:
        return {}
    found, reason = _without_parameters(make, names)
    if reason is None:
        return {name: found[name].detach().clone().cpu() for name in names}
    remedy = "register such tensors as persistent buffers, or compute them without parameters and random numbers"
    made = constant_tensors(built_whole(make, reason, remedy))
    return {name: tensor.detach().clone().cpu() for name, tensor in made.items()}


def check_constants(made: Mapping[str, Tensor], network: nn.Module) -> None:
    """Check that constants are those of a network that was built.

    Args:
        made: The result of `constants`.
        network: The network, before it is trained.

    Raises:
        ModelError: One differs.
    """
    built = constant_tensors(network)
    for name, tensor in made.items():
        if built[name].is_meta or checksum(built[name].cpu()) != checksum(tensor):
            raise ModelError(
                f"'{name}', which is not in the network's state_dict, differs each time the network is created, so "
                "workers would have other values: let it not depend on anything but the arguments of the network, or "
                "register it as a persistent buffer"
            )


def built_without_parameters(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose parameters are on `meta`, and whose other tensors have their values.

    Args:
        make: Builds the network.

    Raises:
        Exception: The constructor needs values of parameters, or random numbers; it may fail in any way.
    """
    return _built(make)[0]


def _built(make: Callable[[], nn.Module]) -> tuple[nn.Module, "UnknownValues"]:
    unknown = UnknownValues()
    with _parameters_on_meta(unknown), unknown, _NoReads(unknown), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those about `meta`; the others come when the network is built
        return make(), unknown


def _without_parameters(make: Callable[[], nn.Module], names: Iterable[str]) -> tuple[dict[str, Tensor], str | None]:
    """Return the constants, and None; or the reason why they cannot be made without parameters."""
    try:
        network, unknown = _built(make)
    except Exception as error:  # a constructor that needs values of parameters may fail in any way without them
        return {}, f"the network cannot be created without values ({type(error).__name__})"
    found = constant_tensors(network)
    for name in names:
        if name not in found or found[name].is_meta:
            return {}, f"'{name}' is not in the network's state_dict and depends on parameters"
        if unknown.holds(found[name]):
            return {}, f"'{name}' is not in the network's state_dict and depends on random numbers"
    return found, None


class UnknownValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the tensors whose values depend on random numbers or on the initial memory of parameters."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: set[Hashable] = set()

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor's values are unknown."""
        return _has_values(tensor) and memory_key(tensor) in self._storages

    def add(self, tensor: Tensor) -> None:
        """Record that a tensor's values are unknown."""
        if _has_values(tensor):
            self._storages.add(memory_key(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator.

        Raises:
            _UnknownValue: It returns a number that is unknown.
        """
        result = func(*args, **(kwargs or {}))
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_random or any(map(self.holds, tensors_in((args, kwargs)))):
            changed = [value for argument, value in _arguments(func, args, kwargs or {}) if _is_written(argument)]
            results = list(tensors_in((result, changed)))
            if not results and result is not None:
                raise _UnknownValue
            for tensor in results:
                self.add(tensor)
        return result


class _NoReads(TorchFunctionMode):
    """Refuses methods that read unknown values without an operator."""

    def __init__(self, unknown: UnknownValues) -> None:
        super().__init__()
        self._unknown = unknown

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function.

        Raises:
            _UnknownValue: It reads unknown values.
        """
        if getattr(func, "__name__", "") in _READS and any(map(self._unknown.holds, tensors_in(args))):
            raise _UnknownValue
        return func(*args, **(kwargs or {}))


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.layout == torch.strided


def _arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield each given argument of an operator, after its description in the schema."""
    schema = func._schema.arguments
    yield from zip(schema, args, strict=False)
    yield from ((argument, kwargs[argument.name]) for argument in schema if argument.name in kwargs)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


@contextmanager
def _parameters_on_meta(unknown: UnknownValues) -> Iterator[None]:
    """Replace each parameter by one on `meta` as soon as a module has it; tied ones stay tied."""
    replaced: dict[int, tuple[weakref.ref[nn.Parameter], Tensor]] = {}

    def replace(_module: nn.Module, _name: str, parameter: nn.Parameter) -> Tensor:
        if parameter.is_meta:
            return parameter
        before, made = replaced.get(id(parameter), (None, parameter))
        if before is None or before() is not parameter:
            unknown.add(parameter)
            made = like(parameter, torch.empty_like(parameter, device="meta"))
            replaced[id(parameter)] = weakref.ref(parameter), made
        return made

    handle = register_module_parameter_registration_hook(replace)  # type: ignore[arg-type]  # it says None
    try:
        yield
    finally:
        handle.remove()
