"""Import timm without torchvision.

timm imports names of torchvision that its networks never use (image transforms, data sets, a frozen batch norm that
only type checks mention). If torchvision is missing, a stand-in provides these names while timm is imported. It is
removed afterwards, so that no other package takes it for the real one.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

NAMES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)


class _Named(type):
    """A class whose attributes are their own names, which is enough for an enumeration that is only looked up."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(ModuleType):
    """A module whose attributes are empty classes."""

    __path__: list[str] = []  # noqa: RUF012  (a module's attribute, as the import system wants it)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Named(name, (), {})
        setattr(self, name, made)
        return made


def import_timm() -> Any:
    """Import timm, with the stand-in if torchvision is missing."""
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    modules = {name: _StandIn(name) for name in NAMES}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        return importlib.import_module("timm")
    finally:
        for name in NAMES:
            sys.modules.pop(name, None)
