"""The neuron groups of an `nn.Sequential` of linear layers, batch norms, activations and dropout.

The outputs of every linear layer but the last are one group; its slots are the layer's rows and
bias, the batch norm behind it, and the columns of the next linear layer. Inputs of the network and
outputs of the last linear layer are never split.

Not here: networks of other shapes. A module that is not known is refused, never assumed harmless; that
goes for subclasses of known modules too.
"""

from collections.abc import Iterator

from torch import nn

from ist.errors import ModelError
from ist.groups import Group, Slot, check_groups, tensor_specs

_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.Identity, nn.Dropout,
)  # fmt: skip
_PER_NEURON: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.PReLU)
_OUTPUT_ONLY: tuple[type[nn.Module], ...] = (nn.Softmax, nn.LogSoftmax)


def sequential_groups(model: nn.Module) -> tuple[Group, ...]:
    """Return the groups of a (possibly nested) `nn.Sequential`.

    Args:
        model: The whole network; may be on the `meta` device.

    Returns:
        One group per hidden linear layer, in order, named after it. An empty tuple means that
        the network has no hidden layer to split.

    Raises:
        ModelError: The model is no `nn.Sequential`, or holds a module that cannot be split; the message names it.
    """
    if not _is_sequential(model):
        raise ModelError(
            f"{type(model).__name__} is not an nn.Sequential: only nets of Linear, BatchNorm1d, activations and "
            "Dropout can be split so far"
        )
    assert isinstance(model, nn.Sequential)
    leaves = list(_leaves(model, ""))
    last_linear = max((i for i, (_, leaf) in enumerate(leaves) if type(leaf) is nn.Linear), default=-1)
    _refuse_reuse(leaves)
    groups: list[Group] = []
    name, size, slots = "", 0, list[Slot]()
    for index, (path, leaf) in enumerate(leaves):
        if type(leaf) is nn.Linear:
            if size:
                if leaf.in_features != size:
                    raise ModelError(f"'{path}' expects {leaf.in_features} inputs, but '{name}' gives {size}")
                groups.append(Group(name, size, (*slots, Slot(f"{path}.weight", 1))))
            size = leaf.out_features if index < last_linear else 0
            name, slots = path, _rows(path, leaf)
        elif type(leaf) in _PER_NEURON and size:
            slots += _vectors(path, leaf, size)
        elif not _passes(leaf, hidden=bool(size), behind_output=index > last_linear):
            raise ModelError(
                f"'{path}' is a {type(leaf).__name__}, which cannot be split by neurons: supported are Linear, "
                "BatchNorm1d, elementwise activations, Dropout, Flatten before the first and Softmax after the "
                "last Linear"
            )
    found = tuple(groups)
    check_groups(found, tensor_specs(model, with_statistics=True))
    return found


def _is_sequential(module: nn.Module) -> bool:
    # A subclass with a forward of its own may do anything with its children, such as add a residual.
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _leaves(module: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    # Not named_children(): it leaves out a module's second use, which must be seen to be refused.
    for name, child in module._modules.items():
        assert child is not None
        if _is_sequential(child):
            assert isinstance(child, nn.Sequential)
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _refuse_reuse(leaves: list[tuple[str, nn.Module]]) -> None:
    owner: dict[int, str] = {}
    for path, leaf in leaves:
        for name, parameter in leaf.named_parameters():
            first = owner.setdefault(id(parameter), f"{path}.{name}")
            if first != f"{path}.{name}":
                raise ModelError(f"'{path}.{name}' is the same parameter as '{first}': tied weights cannot be split")


def _rows(path: str, leaf: nn.Linear) -> list[Slot]:
    return [Slot(f"{path}.weight", 0), *([Slot(f"{path}.bias", 0)] if leaf.bias is not None else [])]


def _vectors(path: str, leaf: nn.Module, size: int) -> list[Slot]:
    """Slots of the per-neuron vectors of a batch norm or a PReLU; a single PReLU slope is shared."""
    vectors = [(name, tensor) for name, tensor in leaf.state_dict().items() if tensor.ndim == 1]
    for name, tensor in vectors:
        if len(tensor) != size and not (isinstance(leaf, nn.PReLU) and len(tensor) == 1):
            raise ModelError(f"'{path}.{name}' holds {len(tensor)} values, but {size} neurons reach it")
    return [Slot(f"{path}.{name}", 0) for name, tensor in vectors if len(tensor) == size]


def _passes(leaf: nn.Module, hidden: bool, behind_output: bool) -> bool:
    if type(leaf) in _ELEMENTWISE:
        return True
    if type(leaf) is nn.Flatten:
        return not hidden
    if type(leaf) in _PER_NEURON:
        return True  # on the inputs or the outputs: its parameters are shared
    return behind_output and type(leaf) in _OUTPUT_ONLY
