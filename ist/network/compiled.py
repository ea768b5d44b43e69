"""Take `torch.compile` off a network: narrow networks change their shapes from round to round, and run uncompiled.

Where it sits: `ist/api.py` and `ist/runs/build.py` do so before anything looks at a network.
Law: in the `with` block names of tensors are those of the plain network; afterwards the network is compiled again.
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
    """Return the name that a tensor of a compiled network has in the plain one."""
    return name.replace(_PREFIX, "")


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[nn.Module]:
    """Give the plain network that a compiled one runs, or has as parts; its tensors are the same.

    A warning says that it runs uncompiled. Everything is compiled as before when the `with` block ends.
    """
    plain, undo = _taken_off(network)
    try:
        yield plain
    finally:
        for step in undo:
            step()


def without_compilation(network: nn.Module) -> nn.Module:
    """Return the plain network that a compiled one runs, for good; see `uncompiled`."""
    return _taken_off(network)[0]


def _taken_off(network: nn.Module) -> tuple[nn.Module, list[Callable[[], Any]]]:
    plain = original(network)
    undo: list[Callable[[], Any]] = []
    compiled = [] if plain is network else ["the network"]
    for path, module in list(plain.named_modules()):
        if original(module) is not module:
            continue  # it is taken out, with what it has
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
            f"torch.compile is taken off {', '.join(dict.fromkeys(compiled))} while it is trained, because the "
            "shapes of narrow networks change from round to round. Names in files are those of the plain network",
            stacklevel=4,
        )
    return plain, undo


def _shown(*parts: str) -> str:
    path = plain_name(".".join([*filter(None, parts), ""]))[:-1]
    return f"'{path}'" if path else "the network"


def original(module: nn.Module) -> nn.Module:
    """Return the module that a compiled one runs; any other as it is."""
    frames = sys.modules.get("torch._dynamo.eval_frame")  # takes seconds to import: without it nothing is compiled
    while frames is not None and isinstance(module, frames.OptimizedModule):
        module = module._orig_mod
    return module
