"""Independent Subnet Training: train a network on machines joined by slow or unreliable links.

    import ist
    result = ist.train(model, data, workers=4, local_steps=50, epochs=20)

The command line is `ist` (see `ist --help`); README.md describes a run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ist._version import VERSION
from ist.errors import (
    CallbackError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    ISTError,
    LoopError,
    ModelError,
    PoolError,
    RunFolderError,
    WorkerLostError,
)

if TYPE_CHECKING:
    from ist.api import TrainResult, split, train
    from ist.config.partition import Exchange, Partition
    from ist.config.recipe import Average, MergeScale, Outer, Recipe, Stage
    from ist.config.runtime import Checkpoint, Loader, Pool, Ray, Watch
    from ist.config.schema import Evaluate, Optimizer, ParameterGroup, Schedule, Skew
    from ist.data.batched import BatchedDataset
    from ist.data.shards.dirichlet import dirichlet_split
    from ist.evaluation.metrics import Metric
    from ist.loops.part import Part
    from ist.monitoring.callback import Callback, RunStart, Stop
    from ist.own_loop import Joined, join
    from ist.runs.split import Split
    from ist.subnet.residual_blocks import scaled_blocks

__version__ = VERSION

__all__ = [
    "Average",
    "BatchedDataset",
    "Callback",
    "CallbackError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "Evaluate",
    "Exchange",
    "ISTError",
    "Joined",
    "Loader",
    "LoopError",
    "MergeScale",
    "Metric",
    "ModelError",
    "Optimizer",
    "Outer",
    "ParameterGroup",
    "Part",
    "Partition",
    "Pool",
    "PoolError",
    "Ray",
    "Recipe",
    "RunFolderError",
    "RunStart",
    "Schedule",
    "Skew",
    "Split",
    "Stage",
    "Stop",
    "TrainResult",
    "Watch",
    "WorkerLostError",
    "__version__",
    "dirichlet_split",
    "join",
    "scaled_blocks",
    "split",
    "train",
]

# torch and pydantic are imported when they are needed, so that `ist --help` is quick.
_LATER = {
    "ist.api": ("TrainResult", "split", "train"),
    "ist.config.partition": ("Exchange", "Partition"),
    "ist.config.recipe": ("Average", "MergeScale", "Outer", "Recipe", "Stage"),
    "ist.config.runtime": ("Checkpoint", "Loader", "Pool", "Ray", "Watch"),
    "ist.config.schema": ("Evaluate", "Optimizer", "ParameterGroup", "Schedule", "Skew"),
    "ist.data.batched": ("BatchedDataset",),
    "ist.data.shards.dirichlet": ("dirichlet_split",),
    "ist.evaluation.metrics": ("Metric",),
    "ist.monitoring.callback": ("Callback", "RunStart", "Stop"),
    "ist.loops.part": ("Part",),
    "ist.own_loop": ("Joined", "join"),
    "ist.runs.split": ("Split",),
    "ist.subnet.residual_blocks": ("scaled_blocks",),
}
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'ist' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
