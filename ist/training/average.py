"""The average of the full network over rounds, for any method.

Where it sits: `ist/runs/opening/process.py` wraps a method in it if the configuration sets `recipe.average`. The round
loop then evaluates and saves the average, while training continues from the network itself. The average needs memory on
the device of the full network, and sends no bytes.
Not here: batch norm's running statistics. The round loop re-estimates them for the average as for any network.

Reference: Izmailov et al., arXiv 1803.05407 (SWA); torch.optim.swa_utils.
"""

import math
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ist.config.recipe import Average
from ist.errors import CheckpointError
from ist.loops.part import Part
from ist.network.copies import copied
from ist.storage.checkpoint import check_tensors
from ist.training.rounds import Method, RoundReport

PREFIX = "average/"
"""Prefix of the average's tensors in a checkpoint."""


def averaged(
    method: Method, settings: Average, num_rounds: int, state: Mapping[str, Tensor], is_resumed: bool
) -> Method:
    """Return a method with its average over rounds, if one is configured.

    Args:
        method: The method that trains.
        settings: The kind of average.
        num_rounds: The number of rounds of the run.
        state: The average's tensors from a checkpoint, by name.
        is_resumed: Whether rounds precede the state of the method.

    Raises:
        CheckpointError: `state` does not match the average, or none is configured.
    """
    if settings.kind != "none":
        return Averaged(method, settings, num_rounds, state if is_resumed else None)
    if state:
        raise CheckpointError(
            "the checkpoint contains an average over rounds, but 'recipe.average.kind' is 'none': restore the value of "
            "the saved run"
        )
    return method


class Averaged:
    """A `Method` whose model is the average, over rounds, of another method's model.

    Args:
        method: The method that trains.
        settings: The kind of average; not 'none'.
        num_rounds: The number of rounds of the run.
        state: The average's tensors from a checkpoint, by name; None for a new run.

    Raises:
        CheckpointError: `state` does not match this average.
    """

    def __init__(
        self, method: Method, settings: Average, num_rounds: int, state: Mapping[str, Tensor] | None = None
    ) -> None:
        average = self._move if settings.kind == "ema" else get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        self._settings = settings
        self._decay = settings.decay
        self._method = method
        self._averaged = AveragedModel(nn.Identity(), multi_avg_fn=average)
        self._averaged.module = copied(method.model)
        self._first_round = math.floor(settings.start * num_rounds)
        if state is not None:
            check_tensors(state, self._own_state())
            self._averaged.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in state.items()})

    @property
    def model(self) -> nn.Module:
        """The averaged network."""
        module: nn.Module = self._averaged.module
        return module

    def train_round(self, round_number: int) -> Generator[Part, None, RoundReport]:
        """Train for a round, and add the network to the average.

        Before the round in which averaging starts, the network replaces the average.
        """
        report = yield from self._method.train_round(round_number)
        if round_number <= self._first_round:
            self._averaged.n_averaged.zero_()
        if self._settings.decay_unit == "step":
            self._decay = self._settings.decay ** report.numbers["steps"]
        self._averaged.update_parameters(self._method.model)
        with torch.no_grad():
            for mine, theirs in zip(self.model.buffers(), self._method.model.buffers(), strict=True):
                mine.copy_(theirs)
        return report

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Return every tensor that the method and the average need to resume."""
        return {**self._method.checkpoint_state(), **self._own_state()}

    def bytes_sent(self) -> int:
        """Return the payload bytes that the method has sent."""
        return self._method.bytes_sent()

    def close(self) -> None:
        """Release the workers."""
        self._method.close()

    def _move(self, averages: Any, current: Any, count: Any) -> None:
        """Move an exponential average towards the current tensors, by the decay of this round."""
        get_ema_multi_avg_fn(self._decay)(averages, current, count)  # type: ignore[no-untyped-call]

    def _own_state(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{name}": tensor for name, tensor in self._averaged.state_dict().items()}
