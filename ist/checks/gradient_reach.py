"""Check that a loss has gradients with respect to the trained network only.

Workers train copies of the network that the user passed in. So a loss that uses that network (such as a penalty on
`model.parameters()`) has no effect on training. Neither has a loss with parameters of its own, which are in no
optimizer. This module finds both from the tensors to which the backward pass would add gradients.

Where it sits: `ist/runs/rehearsal.py` calls `check_reach` before a run, `ist/api.py` calls `check_captured_network`.
Not here: non-finite losses (`ist/checks/finite_values.py`).
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ist.data.nested import tensors_in
from ist.errors import ModelError
from ist.network.copies import captured_values

Leaves = dict[int, Tensor]
"""Tensors by id."""


def check_captured_network(loss: Any, network: nn.Module) -> None:
    """Refuse a loss that uses the network that was passed in, because workers train copies of it.

    Args:
        loss: The user's loss.
        network: The user's network.

    Raises:
        ModelError: The loss is a closure over the network, or a module that holds it.
    """
    parts = {id(module) for module in network.modules()}
    found = False
    if isinstance(loss, FunctionType):
        found = any(id(held) in parts for held in captured_values(loss))
    elif isinstance(loss, nn.Module):
        found = any(id(module) in parts for module in loss.modules())
    elif isinstance(loss, MethodType) and id(loss.__self__) in parts:
        warnings.warn(
            f"the loss '{loss.__qualname__}' is a method of the network: it uses the network that was passed in, not "
            "the submodels that workers train",
            stacklevel=3,
        )
    if found:
        raise ModelError(
            f"the loss ({getattr(loss, '__qualname__', type(loss).__name__)}) holds the network: it would use the one "
            "that was passed in, not the submodels that workers train. Pass it constants instead; return values of a "
            f"step from the forward; {_PENALTY}"
        )


_PENALTY = (
    "for a penalty on weights use weight decay (train.optimizer.args), or compute it in the forward and return it "
    "with the outputs"
)


def check_reach(
    loss: Tensor,
    again: Callable[[], Tensor],
    module: nn.Module,
    data: Any,
    outputs: Any,
    given: Callable[[], nn.Module],
) -> None:
    """Check that only the network's parameters would get gradients from the loss of a step.

    Args:
        loss: The loss of a batch.
        again: Computes the loss again from the same outputs.
        module: The network that is trained.
        data: Inputs and targets of the batch.
        outputs: The network's outputs.
        given: Returns the network that was passed in, of which `module` is a copy.

    Raises:
        ModelError: Another tensor would get gradients.
    """
    known: Leaves = {id(parameter): parameter for parameter in module.parameters()}
    through = leaves(tensors_in(outputs))
    known |= through | {id(tensor): tensor for tensor in tensors_in(data)}
    foreign = _others([loss], known)
    if any(not isinstance(tensor, nn.Parameter) for tensor in foreign.values()):
        # A tensor that the loss creates is a different one in each call.
        once_more = _others([again()], known)
        foreign = {key: tensor for key, tensor in foreign.items() if key in once_more}
    names = {id(parameter): name for name, parameter in given().named_parameters()} if foreign else {}
    for key, tensor in foreign.items():
        if key in names:
            raise ModelError(
                f"the loss differentiates '{names[key]}' of the network that was passed in, not of the submodels that "
                f"workers train: it would have no effect; {_PENALTY}"
            )
        raise ModelError(
            f"the loss differentiates a {type(tensor).__name__} of shape {tuple(tensor.shape)} that does not belong to "
            "the network: it would not be trained. Make it a parameter of the network, or detach it"
        )
    _warn_of_unregistered(module, through)


def _warn_of_unregistered(module: nn.Module, through: Mapping[int, Tensor]) -> None:
    own = {id(parameter) for parameter in module.parameters()}
    for key, tensor in through.items():
        if isinstance(tensor, nn.Parameter) and key not in own:
            warnings.warn(
                f"the forward uses a parameter of shape {tuple(tensor.shape)} that is not registered in the network, "
                "perhaps of a module in a plain list: it is not trained. Register it (nn.ModuleList, nn.ParameterList)",
                stacklevel=3,
            )
            return


def _others(results: Iterable[Tensor], known: Mapping[int, Tensor]) -> Leaves:
    return {key: tensor for key, tensor in leaves(results).items() if key not in known}


def leaves(results: Iterable[Tensor]) -> Leaves:
    """Return the tensors to which a backward pass from some results would add gradients."""
    found: Leaves = {}
    nodes = [t.grad_fn for t in results if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)  # only nodes that accumulate gradients have it
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        nodes += following
    return found
