"""Make the optimizer of a network's named parameters: from a class of `torch.optim`, or by a user's function.

Every optimizer of a run comes from one `MakeOptimizer`, `Task.make_optimizer`: that of a worker's subnet, of a
baseline's full network, and of stand-ins on which settings are checked and schedules are recorded.

Where it sits: `ist/runs/build.py` chooses the function; `ist/training/worker_state.py` and `ist/baselines/` call it.
Not here: optimizer state as tensors (`optimizers.py`), schedules (`step_settings.py`).
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ist.config.registry import call, resolve
from ist.config.schema import FROM_PYTHON, Optimizer
from ist.errors import ConfigError, ISTError, error_with_line, is_out_of_memory
from ist.optimization.muon import check_names
from ist.optimization.parameter_groups import check_groups, split_groups

MakeOptimizer = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer of the given parameters, whose keys are their names in the full network.

It is called with the parameters of the full network and of every new subnet, whose tensors are narrower, and with
stand-ins without values or of small sizes. So it may decide by a parameter's name, number of dims and dtype, but not by
its shape or values. It returns a new optimizer that holds only parameters it was given, each in the same group for a
subnet as for the full network. A subnet may lack some parameters.
"""

MUON = "MuonWithAdamW"
OPTIMIZERS = {MUON: "ist.optimization.muon:muon_with_adamw"}
"""Functions that come with the package, by the names that `train.optimizer.name` may use."""

_TRIED_STEPS = 3
_SAMPLE_SHAPE = (2, 3)


def optimizer_factory(spec: Optimizer, given: MakeOptimizer | None = None) -> MakeOptimizer:
    """Return the function that makes all optimizers of a run; it can be sent to other processes.

    Args:
        spec: The section `train.optimizer`.
        given: A user's function, which is used instead of the one that `spec` names; None for none.
    """
    return partial(_make, spec, given)


def of_class(cls: Callable[..., torch.optim.Optimizer]) -> MakeOptimizer:
    """Return a function that makes optimizers of a class, or of a `functools.partial` of one."""
    return partial(_of_class, cls)


def _of_class(cls: Any, named: Mapping[str, nn.Parameter]) -> Any:
    return cls(list(named.values()))


def is_users_function(spec: Optimizer, given: MakeOptimizer | None) -> bool:
    """Return whether a user's function makes the optimizer, and not a class or a function of this package.

    Raises:
        ConfigError: The name is unknown.
    """
    return given is not None or not (spec.name in OPTIMIZERS or isinstance(_resolved(spec), type))


def _make(spec: Optimizer, given: MakeOptimizer | None, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Make an optimizer of the given parameters.

    Args:
        spec: Its class or function, and its arguments.
        given: A function that is used instead; see `optimizer_factory`.
        named: The parameters, by their names in the full network.

    Raises:
        ConfigError: The class or function is unknown, fails, needs a closure, or returns no optimizer of these
            parameters.
    """
    where = shown(spec)
    if given is not None:
        made = _called(given, named, {}, where)
    else:
        found = _resolved(spec)
        args = copy.deepcopy(spec.args)  # a schedule changes a learning rate in place if it is a tensor
        if isinstance(found, type):
            _check_muon(found, named)
            made = call(found, {"params": list(named.values()), **args}, "train.optimizer.args")
        elif spec.name in OPTIMIZERS:
            made = call(found, {"named": named, **args}, "train.optimizer.args")
        else:
            made = _called(found, named, args, where)
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"{where}, which returns a {type(made).__name__}: return a torch.optim.Optimizer")
    _check_closure(type(made), where)
    own = {id(parameter) for parameter in named.values()}
    for number, group in enumerate(made.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in own:
                raise ConfigError(
                    f"{where}, whose parameter group {number} holds a parameter of shape {tuple(parameter.shape)} that "
                    "it was not given (of another network, or a copy): use only the parameters of its argument, such "
                    "as named.values()"
                )
    split_groups(spec.groups, made, named)
    return made


def _resolved(spec: Optimizer) -> Any:
    """Return the class or function that `train.optimizer.name` names.

    Raises:
        ConfigError: There is none, or the class is no optimizer that IST can use.
    """
    found = resolve(spec.name, "train.optimizer.name", OPTIMIZERS, torch.optim)
    if isinstance(found, type):
        if not issubclass(found, torch.optim.Optimizer):
            raise ConfigError(f"{shown(spec)}, which is not a torch.optim.Optimizer")
        _check_closure(found, shown(spec))
    return found


def _check_closure(cls: type, where: str) -> None:
    if issubclass(cls, torch.optim.LBFGS):
        raise ConfigError(f"{where}: LBFGS evaluates the loss several times per step, which is not supported")


def _check_muon(cls: type, named: Mapping[str, nn.Parameter]) -> None:
    other = next((name for name, parameter in named.items() if parameter.ndim != 2), None)
    if other is not None and cls is getattr(torch.optim, "Muon", None):
        raise ConfigError(
            f"'train.optimizer.name' is 'Muon', which trains matrices only, but '{other}' has {named[other].ndim} "
            f"dims: use '{MUON}', which trains all other parameters with AdamW"
        )


def _called(function: Any, named: Mapping[str, nn.Parameter], args: Mapping[str, Any], where: str) -> Any:
    """Call a user's function with the parameters and its own arguments.

    Raises:
        ConfigError: It does not accept them, or raises an error.
    """
    try:
        return function(dict(named), **args)
    except ISTError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{where}, which raises {error_with_line(error)}: it is called with one argument, a mapping of names to "
            "parameters, and returns a torch.optim.Optimizer of its values"
        ) from error


def shown(spec: Optimizer) -> str:
    """Return the optimizer's name for a message: the key and its value, or the argument of `ist.train`."""
    if spec.name.startswith(FROM_PYTHON):
        return f"optimizer is {plain_name(spec)}"
    return f"'train.optimizer.name' is '{spec.name}'"


def plain_name(spec: Optimizer) -> str:
    """Return the name of the optimizer's class or function."""
    return spec.name.removeprefix(FROM_PYTHON)


def warn_of_untrained(spec: Optimizer, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> None:
    """Warn of parameters that require a gradient but that an optimizer does not hold, so that nothing trains them."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left = [name for name, parameter in named.items() if id(parameter) not in held]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        warnings.warn(
            f"{shown(spec)}, which leaves out {', '.join(map(repr, left[:3]))}{more}: nothing trains these parameters. "
            "Add them, or freeze them (requires_grad_(False)), so that they are not sent back",
            stacklevel=2,
        )


def small_parameters(dims: Mapping[str, int]) -> dict[str, nn.Parameter]:
    """Return small parameters with given names and numbers of dims, on which an optimizer can be tried.

    Their values lie between 1 and 2. A parameter without dims gets one, because an optimizer's state for it could not
    be told from a step count.
    """
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.empty(_small_shape(number)).uniform_(1, 2, generator=generator))
        for name, number in dims.items()
    }


def dims_of(template: nn.Module) -> dict[str, int]:
    """Return the number of dims of every trained parameter of a network, by its name."""
    return {name: parameter.ndim for name, parameter in template.named_parameters() if parameter.requires_grad}


def _small_shape(dims: int) -> tuple[int, ...]:
    return _SAMPLE_SHAPE[-max(dims, 1) :] if dims <= 2 else (*_SAMPLE_SHAPE, *[2] * (dims - 2))


def try_optimizer(spec: Optimizer, given: MakeOptimizer | None, make: MakeOptimizer, dims: Mapping[str, int]) -> None:
    """Check the parameter groups, and make a few steps on small parameters.

    Some arguments are rejected only at their first use. The values of a group's settings are checked by the class's
    constructor, because it does not check those of a group.

    Args:
        spec: The section `train.optimizer`.
        given: A user's function; see `optimizer_factory`.
        make: Makes the optimizer.
        dims: The number of dims of every parameter, by its name.

    Raises:
        ConfigError: A group has no parameters or invalid settings, or a step fails.
    """
    check_groups(spec.groups, dims)
    if is_users_function(spec, given):  # it may expect a subnet's real shapes
        return
    if spec.name == MUON:
        check_names(spec.args, dims)
    make(small_parameters(dims))
    known = _argument_names(_resolved(spec))
    for number, group in enumerate(spec.groups):
        own = {key: value for key, value in group.args.items() if key in known}
        one = spec.model_copy(update={"args": {**spec.args, **own}, "groups": []})
        try:
            optimizer_factory(one)(small_parameters(dims))
        except ConfigError as error:
            raise ConfigError(f"'train.optimizer.groups.{number}.args': {error}") from error
    stepped(spec, make, small_parameters(dims), 1.0, _TRIED_STEPS)


def _argument_names(function: Any) -> Collection[str]:
    return inspect.signature(function).parameters


def stepped(
    spec: Optimizer, make: MakeOptimizer, named: Mapping[str, nn.Parameter], gradient: float, steps: int
) -> torch.optim.Optimizer:
    """Make an optimizer and some steps with constant gradients, which are sparse if it rejects dense ones.

    Raises:
        ConfigError: A step fails with dense and with sparse gradients.
    """
    first: Exception | None = None
    for is_sparse in (False, True):
        optimizer = make(named)
        for group in optimizer.param_groups if gradient == 0 else ():
            group["weight_decay"] = 0.0  # so that the state depends only on the gradients, which are zero
        try:
            with torch.random.fork_rng(devices=[]):
                for _ in range(steps):
                    for parameter in named.values():
                        dense = torch.full_like(parameter, gradient)
                        parameter.grad = dense.to_sparse(1) if is_sparse else dense
                    optimizer.step()
        except Exception as error:  # a user's class may raise anything
            first = first or error
        else:
            return optimizer
        finally:
            for parameter in named.values():
                parameter.grad = None
    assert first is not None
    raise ConfigError(
        f"'train.optimizer.args' {spec.args}: a step of {plain_name(spec)} raises {error_with_line(first)}"
    ) from first
