"""Remove `torch.compile` from a network: the shapes of submodels change from round to round, so they run uncompiled.

Where it sits: `ist/api.py` and `ist/runs/build.py` call it before anything else uses a network.
Law: in the `with` block tensors have the names of the plain network; afterwards the network is compiled again.
Not here: compiling submodels, which IST does not do.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

_PREFIX = "_orig_mod."


def plain_name(name: str) -> str:
    """Return the name in the plain network of a tensor of a compiled network."""
    return name.replace(_PREFIX, "")


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the plain network under a (partly) compiled one; the tensors are the same.

    A warning says that it runs uncompiled. When the `with` block ends, everything is compiled as before.
    """
    plain, undo = _uncompile(network)
    try:
        yield plain
    finally:
        for step in undo:
            step()


def without_compilation(network: nn.Module) -> nn.Module:
    """Return the plain network under a compiled one, permanently; see `uncompiled`."""
    return _uncompile(network)[0]


def _uncompile(network: nn.Module) -> tuple[nn.Module, list[Callable[[], Any]]]:
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
    if compiled:
        warnings.warn(
            f"torch.compile is disabled for {', '.join(dict.fromkeys(compiled))} during training, because the "
            "shapes of submodels change from round to round. Files use the tensor names of the plain network",
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
