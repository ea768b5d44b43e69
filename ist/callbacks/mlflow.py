"""MLflow: the numbers of every round, the configuration and the result.

Where it sits: a callback; `mlflow` in `watch.callbacks`; needs the extra `mlflow`.
Not here: the names of the numbers, which are those of TensorBoard (`ist/monitoring/exporters.py`).
"""

import time
from importlib.util import find_spec
from typing import Any

from ist.callbacks.run_ids import kept_id
from ist.errors import ConfigError
from ist.monitoring.callback import Callback, Record, RunStart
from ist.monitoring.exporters import scalars
from ist.storage.same_run import flat

_PARAMETERS_AT_ONCE = 100  # MLflow's limit


class MLflow(Callback):
    """Logs a run to MLflow. A step is a round, from 0 as in metrics.jsonl; a parameter is a configuration key.

    A resumed run continues the MLflow run. Give a server's password by MLflow's own means
    (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD).

    Args:
        tracking_uri: Where MLflow stores runs: a server's URL, `sqlite:///FILE` or a folder. None:
            MLFLOW_TRACKING_URI, or MLflow's own default.
        experiment: Name of the experiment, which is created if it does not exist.
        run_name: Name of the run in MLflow; None: the name of the run folder.
        tags: Tags of the run.

    Raises:
        ConfigError: mlflow is not installed.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment: str = "ist",
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        if find_spec("mlflow") is None:
            raise ConfigError("the callback 'mlflow' needs mlflow, which is not installed: pip install 'ist[mlflow]'")
        self._tracking_uri, self._experiment, self._run_name, self._tags = tracking_uri, experiment, run_name, tags

    def on_start(self, run: RunStart) -> None:
        """Start the MLflow run, or continue it."""
        from mlflow import MlflowClient

        self._client = client = MlflowClient(self._tracking_uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._experiment)
        self._is_new = False

        def create() -> str:
            self._is_new = True
            return str(client.create_run(experiment, run_name=self._run_name or run.name, tags=self._tags).info.run_id)

        self._id = kept_id(run, "mlflow-run-id", create)
        self._status = "FAILED"
        if self._is_new:
            self._log_parameters(run)
        else:
            client.update_run(self._id, status="RUNNING")

    def _log_parameters(self, run: RunStart) -> None:
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        values = {**dict(flat(run.config)), "parameters": run.parameters, "trained_parameters": run.trained_parameters}
        params = [Param(key, str(value)[:MAX_PARAM_VAL_LENGTH]) for key, value in values.items()]
        for start in range(0, len(params), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + _PARAMETERS_AT_ONCE])

    def on_round(self, record: Record) -> None:
        """Log a round."""
        self._log(scalars(record), record["round"])

    def on_end(self, result: Record) -> None:
        """Log the final numbers."""
        numbers = {key: value for key, value in result.items() if type(value) in (int, float)}
        self._log({f"result/{key}": value for key, value in numbers.items()}, result["rounds"])
        if "stopped_early" in result:
            self._client.set_tag(self._id, "stopped_early", result["stopped_early"])
        self._status = "FINISHED"

    def close(self) -> None:
        """Mark the run as finished, or as failed if it has not ended."""
        self._client.set_terminated(self._id, self._status)

    def _log(self, numbers: dict[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(key, float(value), now_ms, step) for key, value in numbers.items()])
