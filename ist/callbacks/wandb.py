"""Weights & Biases: the numbers of every round, the configuration and the result.

Where it sits: a callback; `wandb` in `watch.callbacks`; needs the extra `wandb`.
Not here: the names of the numbers, which are those of TensorBoard (`ist/monitoring/exporters.py`).
"""

from importlib.util import find_spec
from typing import Any, Literal

from ist.callbacks.run_ids import kept_id
from ist.errors import ConfigError
from ist.monitoring.callback import Callback, Record, RunStart
from ist.monitoring.exporters import scalars


class WandB(Callback):
    """Logs a run to Weights & Biases. A step is a round, from 0 as in metrics.jsonl.

    W&B's files are in the folder wandb/ of the run folder. A resumed run continues the W&B run, if that was online.
    Give the API key by W&B's own means (`wandb login`, WANDB_API_KEY).

    Args:
        project: The project in W&B.
        name: Name of the run in W&B; None: the name of the run folder.
        mode: 'offline' writes files only, and needs no network; `wandb sync` uploads them. None: WANDB_MODE, or online.
        **init: Further arguments of `wandb.init`, such as `entity`, `group` or `tags`.

    Raises:
        ConfigError: wandb is not installed, or the mode is unknown.
    """

    def __init__(
        self,
        project: str = "ist",
        name: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        **init: Any,
    ) -> None:
        if find_spec("wandb") is None:
            raise ConfigError("the callback 'wandb' needs wandb, which is not installed: pip install 'ist[wandb]'")
        if mode not in ("online", "offline", "disabled", None):
            raise ConfigError(f"WandB: mode is {mode!r}: give 'online', 'offline' or 'disabled'")
        self._init = {"project": project, "name": name, "mode": mode, **init}

    def on_start(self, run: RunStart) -> None:
        """Start the W&B run."""
        import wandb

        settings = {
            "config": run.config,
            "dir": run.run_dir,
            "id": kept_id(run, "wandb-run-id", wandb.util.generate_id),
            "resume": "allow" if run.first_round else None,
        }
        named = {"name": self._init["name"] or run.name}
        self._run: Any = wandb.init(**{**settings, **self._init, **named})
        self._ended = False

    def on_round(self, record: Record) -> None:
        """Log a round."""
        self._run.log(scalars(record), step=record["round"])

    def on_end(self, result: Record) -> None:
        """Write the result into the summary."""
        self._run.summary.update({f"result/{key}": value for key, value in result.items() if value is not None})
        self._run.finish(exit_code=0)
        self._ended = True

    def close(self) -> None:
        """Mark a run that has not ended as failed."""
        if not self._ended:
            self._run.finish(exit_code=1)
