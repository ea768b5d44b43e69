"""Copy a network so that the copy is a network of its own.

`copy.deepcopy` leaves three things behind. A function stays the same object, so that a hook, or an activation that is a
lambda, goes on using the modules that it was made with: here it is made anew around those of the copy. A parameter
loses its class and its Python attributes. And a tensor that was computed (as `torch.nn.utils.weight_norm` leaves it in
its module) cannot be copied at all.

Where it sits: whoever needs a copy of a network comes here.
Law: a copy computes what the network computes, and nothing that it does reaches the network.
Not here: which networks are refused for what else they hold (`ist/network/supported.py`).
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
"""For the id of an object of the network, what stands for it in the copy; as `copy.deepcopy` has it."""

_CALLABLES = (FunctionType, MethodType, functools.partial)


def copied(network: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a copy of a network, with the same modes, hooks, and attributes of parameters.

    Hooks on parameters are left behind: they are refused where they matter.

    Args:
        network: The network; left as it is.
        memo: For ids of its tensors, what the copy has in their places.

    Raises:
        ModelError: Something in it cannot be copied, or is a function that would go on using the network itself.
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
    """Return a tensor with the given values, and otherwise like another: a parameter of the same class, its attributes.

    Args:
        tensor: A parameter, or any tensor.
        values: What it holds; of any shape, dtype and device.
    """
    if isinstance(tensor, nn.Parameter):
        values = torch.Tensor._make_subclass(type(tensor), values, tensor.requires_grad)
    vars(values).update(vars(tensor))
    return values


def _tensors_of(network: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors in attributes of modules, where a forward may keep what it has computed."""
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
    """Name the attribute that cannot be copied."""
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if name != "_modules":
                try:
                    copy.deepcopy(value, dict(given) | {id(child): child for child in network.modules()})
                except Exception as own:
                    return (
                        f"'{_join(path, name)}' (a {type(value).__name__}) cannot be copied: {first_line(own)}. "
                        "Workers train copies of the network: make it outside of the network, or where it is used"
                    )
    return f"the network cannot be copied: {type(error).__name__}: {first_line(error)}"


def _rebind(holder: Any, memo: Memo, fresh: set[int], done: Memo) -> None:
    """Replace functions that hold parts of the network, in a copy's attributes, dicts and lists."""
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(items):
        if isinstance(value, FunctionType | MethodType):
            holder[key] = _rebound(value, memo, done)
        elif id(value) not in fresh or id(value) in done:
            continue  # only what was made for this copy may be changed
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
    """Return a function that holds a copy's parts where the given one holds the network's, or the same function."""
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
    done[id(function)] = function  # it may hold itself
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
    """Check that no function in a copy holds a part of the network that was copied.

    Raises:
        ModelError: One does, in a way that could not be changed in the copy.
    """
    parts: dict[int, str] = {id(module): path for path, module in network.named_modules()}
    parts |= {id(tensor): name for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    seen: set[int] = set()
    for path, module in made.named_modules():
        for name, value in vars(module).items():
            for function, part in _holding(value, parts, seen):
                what = f"'{parts[id(part)]}'" if parts[id(part)] else "the network"
                raise ModelError(
                    f"'{_join(path, name)}' holds the function '{function.__qualname__}', which uses {what} from "
                    "outside: copies of the network would go on using the original's. Make it a method, or a module"
                )


def _holding(value: Any, parts: Mapping[int, str], seen: set[int]) -> Iterator[tuple[Any, Any]]:
    """Yield functions within a value, and what part of the network each of them holds."""
    if id(value) in seen or isinstance(value, nn.Module | Tensor | str | int | float | type | ModuleType):
        return
    seen.add(id(value))
    if isinstance(value, FunctionType):
        for held in held_by(value):
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


def held_by(function: FunctionType) -> Iterator[Any]:
    """Yield what a function closes over, its defaults, and the global modules and tensors that its code names."""
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
