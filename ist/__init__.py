"""Independent Subnet Training: train a network on machines joined by slow or unreliable links.

    import ist
    result = ist.train(model, data, workers=4, local_steps=50, epochs=20)

The command line is `ist` (see `ist --help`); how a run goes is told in README.md.
"""

from typing import TYPE_CHECKING, Any

from ist._version import VERSION
from ist.errors import ISTError

if TYPE_CHECKING:
    from ist.api import TrainResult, train

__version__ = VERSION

__all__ = ["ISTError", "TrainResult", "__version__", "train"]


def __getattr__(name: str) -> Any:
    # torch is imported when it is needed, so that `ist --help` is quick.
    if name in ("train", "TrainResult"):
        import ist.api

        return getattr(ist.api, name)
    raise AttributeError(f"module 'ist' has no attribute '{name}'")
