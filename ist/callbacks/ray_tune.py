"""Ray Tune: report every round's numbers to the trial in which the run is.

Where it sits: a callback; `ray_tune` in `watch.callbacks`; needs Ray's extra `tune`.
Not here: Ray as the pool of workers (`ist/pools/ray_pool.py`); a trial may use any pool.
"""

import warnings
from importlib.util import find_spec

from ist.errors import ConfigError
from ist.monitoring.callback import Callback, Record, RunStart


class RayTune(Callback):
    """Reports to `ray.tune`, so that schedulers can compare trials and end them.

    The names are those of metrics.jsonl, such as `loss`, `test_loss`, `accuracy` or `sent_bytes`; lists are left out.
    Ray Train is not served: its `report` must be called by every worker, and a callback runs in one process only.

    Args:
        evaluated_only: Whether to report only rounds that were evaluated, so that every report has a test loss.

    Raises:
        ConfigError: Ray Tune is not installed, or (at the start) the run is not in a trial of Ray Tune.
    """

    def __init__(self, evaluated_only: bool = False) -> None:
        if any(find_spec(package) is None for package in ("ray", "pandas", "pyarrow")):
            raise ConfigError("the callback 'ray_tune' needs Ray Tune, which is not installed: pip install 'ray[tune]'")
        self._evaluated_only = evaluated_only

    def on_start(self, run: RunStart) -> None:  # noqa: ARG002
        """Check that the run is in a trial; otherwise Ray would only warn in every round."""
        from ray import tune

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's, if there is no trial
            trial = tune.get_context().get_trial_id()
        if trial is None:
            raise ConfigError(
                "the callback 'ray_tune' reports to a trial of Ray Tune, but this run is not in one: call ist.train in "
                "the function that ray.tune.Tuner runs (Ray Train is not served)"
            )

    def on_round(self, record: Record) -> None:
        """Report a round."""
        from ray import tune

        if self._evaluated_only and "test_loss" not in record:
            return
        tune.report({key: value for key, value in record.items() if type(value) in (int, float)})
