"""Remove `torch.compile` from a network, and compile the modules that workers train.

A network is plain while it is split, because compiled parts hide its modules. Submodels run uncompiled, unless
`train.compile` names a backend: their shapes may change from round to round, and each shape is compiled once more.

Where it sits: `ist/api.py` and `ist/runs/build.py` call it before anything else uses a network;
`ist/loops/local_step.py` compiles the modules.
Law: in the `with` block tensors have the names of the plain network; afterwards the network is compiled again.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ist.errors import ConfigError

_PREFIX = "_orig_mod."


def plain_name(name: str) -> str:
    """Return the name in the plain network of a tensor of a compiled network."""
    return name.replace(_PREFIX, "")


@contextmanager
def uncompiled(network: nn.Module, backend: str | None = None) -> Iterator[nn.Module]:
    """Yield the plain network under a (partly) compiled one; the tensors are the same.

    When the `with` block ends, everything is compiled as before.

    Args:
        network: The network.
        backend: The backend that compiles submodels; None: a warning says that they run uncompiled.
    """
    plain, undo = _uncompile(network, backend)
    try:
        yield plain
    finally:
        for step in undo:
            step()


def without_compilation(network: nn.Module, backend: str | None = None) -> nn.Module:
    """Return the plain network under a compiled one, permanently; see `uncompiled`."""
    return _uncompile(network, backend)[0]


def check_backend(backend: str) -> None:
    """Check that torch.compile has a backend.

    Raises:
        ConfigError: It does not.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"'train.compile' is '{backend}', but the backends of torch.compile are {', '.join(known)}")


def separated(tensors: Mapping[str, Tensor], backend: str | None) -> Mapping[str, Tensor]:
    """Return tensors that a backend accepts as parameters and buffers: copies, if they may be views of one buffer.

    Args:
        tensors: Tensors by name.
        backend: The backend of torch.compile; None: the tensors themselves are returned.
    """
    return tensors if backend is None else {name: tensor.clone() for name, tensor in tensors.items()}


class Compiler:
    """Compiles the module that a worker trains, as long as it is the same module.

    Args:
        backend: The backend of torch.compile; None: modules stay as they are.
    """

    def __init__(self, backend: str | None) -> None:
        self._backend = backend
        self._last: tuple[nn.Module, nn.Module] | None = None

    def compiled(self, module: nn.Module) -> nn.Module:
        """Return the compiled module; it has the parameters of `module`, whose values may be replaced meanwhile."""
        if self._backend is None:
            return module
        if self._last is None or self._last[0] is not module:
            self._last = module, cast("nn.Module", torch.compile(module, backend=self._backend))
        return self._last[1]


def _uncompile(network: nn.Module, backend: str | None) -> tuple[nn.Module, list[Callable[[], Any]]]:
    plain = original(network)
    undo: list[Callable[[], Any]] = []
    compiled = [] if plain is network else ["the network"]
    for path, module in list(plain.named_modules()):
        if original(module) is not module:
            continue  # its parent replaces it by the plain module
        for name, child in module._modules.items():
            if child is not None and original(child) is not child:
                module._modules[name] = original(child)
                undo.append(partial(module._modules.__setitem__, name, child))
                compiled.append(_shown(path, name))
        if module._compiled_call_impl is not None:
            undo.append(partial(setattr, module, "_compiled_call_impl", module._compiled_call_impl))
            module._compiled_call_impl = None
            compiled.append(_shown(path))
        for name, value in list(vars(module).items()):
            function = getattr(value, "_torchdynamo_orig_callable", None)
            if function is not None:
                vars(module)[name] = function
                undo.append(partial(vars(module).__setitem__, name, value))
                compiled.append(_shown(path, name))
    if compiled and backend is None:
        warnings.warn(
            f"torch.compile is disabled for {', '.join(dict.fromkeys(compiled))} during training, because the "
            "shapes of submodels change from round to round. To compile submodels, set 'train.compile' (such as "
            "'inductor'). Files use the tensor names of the plain network",
            stacklevel=4,
        )
    return plain, undo


def _shown(*parts: str) -> str:
    path = plain_name(".".join([*filter(None, parts), ""]))[:-1]
    return f"'{path}'" if path else "the network"


def original(module: nn.Module) -> nn.Module:
    """Return the plain module under a compiled one; any other module is returned unchanged."""
    frames = sys.modules.get("torch._dynamo.eval_frame")  # slow to import, and if it is not, nothing is compiled
    while frames is not None and isinstance(module, frames.OptimizedModule):
        module = module._orig_mod
    return module
