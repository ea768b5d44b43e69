"""Copy a network so that the copy shares nothing with it.

`copy.deepcopy` is not enough, for three reasons. It does not copy functions, so a hook, or an activation that is a
lambda, still uses the modules of the original: here such functions are rebuilt around the modules of the copy. A
parameter loses its class and its Python attributes. A computed tensor (as `torch.nn.utils.weight_norm` stores in its
module) cannot be copied at all.

Where it sits: all code that needs a copy of a network uses `copied`.
Law: a copy computes what the network computes, and never changes the network.
Not here: other reasons to refuse a network (`ist/network/supported.py`).
"""

import copy
import dis
import functools
from collections import deque
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ist.errors import ModelError, first_line
from ist.tensors import constant_tensors

Memo = dict[int, Any]
"""For the id of an object in the network, its counterpart in the copy; the memo of `copy.deepcopy`."""

_CALLABLES = (FunctionType, MethodType, functools.partial)


def copied(network: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a copy of a network, with the same modes, hooks, and attributes of parameters.

    Hooks on parameters are not copied: `ist/network/supported.py` refuses them where they matter.

    Args:
        network: The network; it is not changed.
        memo: For ids of its tensors, the tensors that the copy gets instead.

    Raises:
        ModelError: A part of it cannot be copied, or is a function that would still use the original network.
    """
    known: Memo = dict(memo or {})
    for tensor in _tensors_of(network):
        if id(tensor) not in known and (vars(tensor) or not tensor.is_leaf):
            known[id(tensor)] = like(tensor, tensor.detach().clone())
    given = dict(known)
    try:
        made = copy.deepcopy(network, known)
    except Exception as error:  # whatever a copy raises
        raise ModelError(_not_copied(network, given, error)) from error
    fresh = {id(value) for value in known.values()}
    done: Memo = {}
    for module in made.modules():
        _rebind(vars(module), known, fresh, done)
    _check_functions(made, network)
    return made


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Return a tensor with the given values, and the class (of a parameter) and attributes of another tensor.

    Args:
        tensor: A parameter, or any tensor.
        values: The values; of any shape, dtype and device.
    """
    if isinstance(tensor, nn.Parameter):
        values = torch.Tensor._make_subclass(type(tensor), values, tensor.requires_grad)
    vars(values).update(vars(tensor))
    return values


def _tensors_of(network: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and tensors in attributes of modules, in which a forward may store its results."""
    yield from network.parameters()
    yield from network.buffers()
    for module in network.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from _tensors_within(value)


def _tensors_within(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Yield a tensor, or those in a dict, list, tuple or deque, some levels deep."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict | list | tuple | deque):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_within(item, depth - 1)


def _not_copied(network: nn.Module, given: Memo, error: Exception) -> str:
    """Return the message of the error, which names the attribute that cannot be copied."""
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if name != "_modules":
                try:
                    copy.deepcopy(value, dict(given) | {id(child): child for child in network.modules()})
                except Exception as own:
                    return (
                        f"'{_join(path, name)}' (a {type(value).__name__}) cannot be copied: {first_line(own)}. "
                        "Workers train copies of the network: create it outside the network, or in the forward"
                    )
    return f"the network cannot be copied: {type(error).__name__}: {first_line(error)}"


def _rebind(holder: Any, memo: Memo, fresh: set[int], done: Memo) -> None:
    """Replace functions that hold parts of the network, in a copy's attributes, dicts and lists."""
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(items):
        if isinstance(value, FunctionType | MethodType):
            holder[key] = _rebound(value, memo, done)
        elif id(value) not in fresh or id(value) in done:
            continue  # change only objects that were made for this copy
        elif isinstance(value, functools.partial):
            done[id(value)] = value
            state = (_rebound(value.func, memo, done), value.args, value.keywords, vars(value))
            value.__setstate__(state)  # type: ignore[attr-defined]
        elif isinstance(value, dict | list):
            done[id(value)] = value
            _rebind(value, memo, fresh, done)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor):
            done[id(value)] = value
            _rebind(vars(value), memo, fresh, done)


def _rebound(function: Any, memo: Memo, done: Memo) -> Any:
    """Return a function with references to the copy's modules instead of the network's; the same one if it has none."""
    if id(function) in memo:
        return memo[id(function)]
    if isinstance(function, MethodType):
        inner, owner = _rebound(function.__func__, memo, done), memo.get(id(function.__self__), function.__self__)
        unchanged = _same((inner, owner), (function.__func__, function.__self__))
        return function if unchanged else MethodType(inner, owner)
    if not isinstance(function, FunctionType):
        return function
    if id(function) in done:
        return done[id(function)]
    done[id(function)] = function  # a function may refer to itself
    cells = tuple(_new_cell(cell, memo, done) for cell in function.__closure__ or ())
    defaults = tuple(_rebound(value, memo, done) for value in function.__defaults__ or ())
    named = {name: _rebound(value, memo, done) for name, value in (function.__kwdefaults__ or {}).items()}
    before = (*(function.__closure__ or ()), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if _same((*cells, *defaults, *named.values()), before):
        return function
    made = FunctionType(function.__code__, function.__globals__, function.__name__, defaults or None, cells)
    made.__kwdefaults__ = named or None
    made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
    vars(made).update(vars(function))
    done[id(function)] = made
    return made


def _new_cell(cell: CellType, memo: Memo, done: Memo) -> CellType:
    try:
        value = cell.cell_contents
    except ValueError:  # empty
        return cell
    new = _rebound(value, memo, done)
    return cell if new is value else CellType(new)


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return all(a is b for a, b in zip(left, right, strict=True))


def _check_functions(made: nn.Module, network: nn.Module) -> None:
    """Check that no function in a copy refers to a part of the original network.

    Raises:
        ModelError: A function does, in a way that cannot be changed in the copy.
    """
    parts: dict[int, str] = {id(module): path for path, module in network.named_modules()}
    parts |= {id(tensor): name for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    seen: set[int] = set()
    for path, module in made.named_modules():
        for name, value in vars(module).items():
            for function, part in _holding(value, parts, seen):
                what = f"'{parts[id(part)]}'" if parts[id(part)] else "the network"
                raise ModelError(
                    f"'{_join(path, name)}' holds the function '{function.__qualname__}', which uses {what} through a "
                    "reference: copies of the network would still use the original. Make it a method, or a module"
                )


def _holding(value: Any, parts: Mapping[int, str], seen: set[int]) -> Iterator[tuple[Any, Any]]:
    """Yield the functions within a value, each with the part of the network to which it refers."""
    if id(value) in seen or isinstance(value, nn.Module | Tensor | str | int | float | type | ModuleType):
        return
    seen.add(id(value))
    if isinstance(value, FunctionType):
        for held in captured_values(value):
            for part in [held, *(held.values() if isinstance(held, dict) else held if isinstance(held, list) else [])]:
                if id(part) in parts:
                    yield value, part
            if isinstance(held, _CALLABLES):
                yield from _holding(held, parts, seen)
    elif isinstance(value, MethodType):
        if id(value.__self__) in parts:
            yield value.__func__, value.__self__
        yield from _holding(value.__func__, parts, seen)
    elif isinstance(value, functools.partial):
        for item in (value.func, *value.args, *value.keywords.values()):
            yield from _holding(item, parts, seen)
    elif isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _holding(item, parts, seen)
    elif hasattr(value, "__dict__"):
        yield from _holding(vars(value), parts, seen)


def captured_values(function: FunctionType) -> Iterator[Any]:
    """Yield the values in a function's closure, its defaults, and the global modules and tensors that its code uses."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # empty
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in _names(function.__code__):
        if isinstance(found := function.__globals__.get(name), nn.Module | Tensor):
            yield found


def _names(code: CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of a network without values; tied parameters stay tied."""
    memo: dict[int, object] = {}
    for tensor in [*module.parameters(), *module.buffers(), *constant_tensors(module).values()]:
        memo[id(tensor)] = like(tensor, torch.empty_like(tensor, device="meta"))
    return copied(module, memo)
