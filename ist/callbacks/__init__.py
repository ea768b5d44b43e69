"""Callbacks that come with the package: early stopping, W&B, MLflow, Ray Tune, profiler.

    from ist.callbacks import EarlyStopping
    result = ist.train(model, data, workers=4, rounds=200, callbacks=[EarlyStopping(patience=5)])

In a configuration, `watch.callbacks` names them: `early_stopping`, `wandb`, `mlflow`, `ray_tune`, `profiler`. A package
such as wandb is imported only if its callback is used.
"""

from ist.callbacks.early_stopping import EarlyStopping
from ist.callbacks.mlflow import MLflow
from ist.callbacks.profiler import Profiler
from ist.callbacks.ray_tune import RayTune
from ist.callbacks.wandb import WandB

__all__ = ["EarlyStopping", "MLflow", "Profiler", "RayTune", "WandB"]
