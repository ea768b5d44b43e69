"""Check that a loss differentiates the network that is trained, and nothing else.

A loss that holds the network that the user passed in (a penalty on `model.parameters()`) changes nothing: workers train
narrow copies of it. So does one with parameters of its own, which no optimiser knows. Both are found by where the
gradients of a step would go, before they go there.

Where it sits: `ist/training/worker.py` asks when a run is rehearsed, and `ist/api.py` before a job is made.
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
    """Refuse a loss that reads the network which is passed in: it would not see what workers train.

    Args:
        loss: What the user passed in.
        network: The network beside it.

    Raises:
        ModelError: It closes over the network, or is a module that holds it.
    """
    parts = {id(module) for module in network.modules()}
    found = False
    if isinstance(loss, FunctionType):
        found = any(id(held) in parts for held in captured_values(loss))
    elif isinstance(loss, nn.Module):
        found = any(id(module) in parts for module in loss.modules())
    elif isinstance(loss, MethodType) and id(loss.__self__) in parts:
        warnings.warn(
            f"the loss '{loss.__qualname__}' is a method of the network: it sees the network as it was passed in, not "
            "the narrow copies that workers train",
            stacklevel=3,
        )
    if found:
        raise ModelError(
            f"the loss ({getattr(loss, '__qualname__', type(loss).__name__)}) holds the network: it would see the one "
            "that was passed in, not the narrow copies that workers train. Give it the values that it needs; return "
            f"from the forward what it needs of a step; {_PENALTY}"
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
    """Check to what the loss of a step would give gradients.

    Args:
        loss: The loss of a batch.
        again: Computes it anew from the same outputs.
        module: The network that is trained.
        data: Inputs and targets of the batch.
        outputs: What came out of the network.
        given: Returns the network that was passed in, of which `module` is a copy.

    Raises:
        ModelError: The loss would give gradients to something else than the network's parameters.
    """
    known: Leaves = {id(parameter): parameter for parameter in module.parameters()}
    through = _leaves(tensors_in(outputs))
    known |= through | {id(tensor): tensor for tensor in tensors_in(data)}
    foreign = _others([loss], known)
    if any(not isinstance(tensor, nn.Parameter) for tensor in foreign.values()):
        # What the loss makes itself is another tensor each time.
        once_more = _others([again()], known)
        foreign = {key: tensor for key, tensor in foreign.items() if key in once_more}
    names = {id(parameter): name for name, parameter in given().named_parameters()} if foreign else {}
    for key, tensor in foreign.items():
        if key in names:
            raise ModelError(
                f"the loss differentiates '{names[key]}' of the network that was passed in, not of the narrow copies "
                f"that workers train: it would do nothing; {_PENALTY}"
            )
        raise ModelError(
            f"the loss differentiates a {type(tensor).__name__} of shape {tuple(tensor.shape)} that is none of the "
            "network's: it would not be trained. Make it a parameter of the network, or detach it"
        )
    _warn_of_unregistered(module, through)


def _warn_of_unregistered(module: nn.Module, through: Mapping[int, Tensor]) -> None:
    own = {id(parameter) for parameter in module.parameters()}
    for key, tensor in through.items():
        if isinstance(tensor, nn.Parameter) and key not in own:
            warnings.warn(
                f"the forward uses a parameter of shape {tuple(tensor.shape)} that is none of the network's, perhaps "
                "of a module in a plain list: it is not trained. Register it (nn.ModuleList, nn.ParameterList)",
                stacklevel=3,
            )
            return


def _others(results: Iterable[Tensor], known: Mapping[int, Tensor]) -> Leaves:
    return {key: tensor for key, tensor in _leaves(results).items() if key not in known}


def _leaves(results: Iterable[Tensor]) -> Leaves:
    """Return the tensors that gradients of some results would be added to."""
    found: Leaves = {}
    nodes = [t.grad_fn for t in results if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)  # of the nodes that add up gradients
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        nodes += following
    return found
