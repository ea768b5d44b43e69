"""A worker's part of a round: its subnet module and optimizer, and the local steps that are to be made.

Where it sits: a worker (`ist/training/worker.py`), and every rank of a baseline, yields a `Part` when its module has
arrived. It reaches the caller that iterates the rounds: `completed` runs each part with the worker's own loop;
`ist.join` (`ist/own_loop.py`) hands each part to the user's `for` loop. Then the round continues.
Not here: the built-in loop (`ist/loops/local_loop.py`), receiving and returning weights (`ist/training/worker.py`).
"""

import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ist.errors import AbandonedRoundError, ISTError, LoopError, PoolError, error_with_line
from ist.loops.batch_source import BatchSources
from ist.optimization.schedule import Schedule
from ist.optimization.step_settings import apply_settings, matching_groups
from ist.rng import Purpose, seeded
from ist.subnet.assignments import WorkerSlot

_Result = TypeVar("_Result")
_Batch = TypeVar("_Batch")

_log = logging.getLogger(__name__)

MAX_BATCHES_WITHOUT_STEP = 10_000
"""After as many batches without an optimizer step, `Part.take` reports that the loop makes none."""

_BATCHES_OF_A_CHECK = 100


class LocalLoop(Protocol):
    """Makes a worker's local steps."""

    def run(self, part: "Part") -> None:
        """Make the steps of a round, and log each with `part.log`."""
        ...

    def close(self) -> None:
        """Release what the loop holds."""
        ...


class StateOwner(Protocol):
    """Holds a worker's state between rounds; `ist.training.worker.Worker`."""

    def state_dict(self, part: "Part") -> dict[str, Tensor]:
        """Return copies of the state with which a part starts, on the CPU."""
        ...

    def load_state_dict(self, part: "Part", state: Mapping[str, Tensor]) -> None:
        """Undo `state_dict`, in the first part of a resumed run."""
        ...


class Part:
    """A worker's part of one round: the module to train, its optimizer, and how many steps to make.

    Attributes:
        model: This worker's subnet module; the same object from round to round while the shapes are the same. Its
            parameters have new values in every round.
        optimizer: An optimizer of the module's parameters.
        named: The module's trained parameters, by their names in the full network.
        round: The round, from 0.
        steps: The numbers of this round's local steps in the whole run.
        worker: The number of this worker, from 0.
        num_workers: The number of workers in this round.
        rank: The number of this process among the ranks of its worker, from 0 (`pool.ranks_per_worker`).
        ranks: The number of ranks of a worker. With several, `model` is wrapped by DDP or FSDP, gradients are averaged
            over the ranks in the backward pass, and each rank takes its own part of the worker's data.
        device: The device of the module.
        state: A dictionary of this worker, empty at first, that lasts from round to round but is not saved; a loop
            that runs in another process keeps its loader here.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> loader = [(torch.ones(4, 2), torch.ones(4, 1))]
        >>> def loop(part: ist.Part) -> None:
        ...     for inputs, targets in part.take(loader):
        ...         loss = nn.functional.mse_loss(part.model(inputs), targets)
        ...         loss.backward()
        ...         part.optimizer.step()
        ...         part.optimizer.zero_grad()
        ...         part.log(loss, len(inputs))
        >>> result = ist.train(
        ...     nn.Linear(2, 1), loop=loop, example=torch.ones(4, 2), workers=1, local_steps=5, rounds=2, progress=False
        ... )
        >>> [record["samples"] for record in result.history]
        [20, 40]
    """

    def __init__(
        self,
        local: "LocalSteps",
        round_number: int,
        model: nn.Module,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.named = named
        self.round = round_number
        self.steps = local.schedule.steps(round_number)
        self.worker = local.slot.worker
        self.num_workers = local.slot.team.num_workers
        self.rank = local.slot.rank
        self.ranks = local.slot.ranks
        self.device = local.device
        self.state = local.state
        self.samples = 0
        self._local = local
        self._steps_made = 0
        self._open_steps = 0
        self._batches = 0
        self._batches_since_step = 0
        self._versions = self._version()
        self._is_over = is_over
        self.peer_error: PoolError | None = None
        self._loss_sum = torch.zeros((), device=local.device)
        self._value_sums: dict[str, Tensor | float] = {}

    @property
    def local_steps(self) -> int:
        """The number of optimizer steps to make in this round."""
        return len(self.steps)

    @property
    def steps_made(self) -> int:
        """The number of optimizer steps made so far in this round."""
        return self._steps_made

    @property
    def step(self) -> int:
        """The number of the current optimizer step in the whole run, from 0; use it for a learning-rate schedule."""
        return self.steps.start + self._steps_made

    @property
    def loss_sum(self) -> float:
        """The sum of the logged losses of all samples. Reading it waits for the device."""
        return float(self._loss_sum)

    def take(self, loader: Iterable[_Batch]) -> Iterator[_Batch]:
        """Yield batches until this round's optimizer steps are made.

        The next round continues where this one stopped. A loader that ends is started again, as at a new epoch; if its
        sampler, batch sampler or data set has `set_epoch`, that is called first. Several batches may make one step
        (gradient accumulation): what is counted is `part.optimizer.step()`, not batches. A step that a GradScaler skips
        is not counted.

        Args:
            loader: A DataLoader, or any iterable of batches. Give the same object in every round.

        Raises:
            PoolError: Another process has failed.
            LoopError: The loader is empty, or it is an iterator that has ended; or the loop makes no optimizer step, or
                none any more.
        """
        source, where = self._local.sources.of(loader, self.round), f"worker {self.worker}, round {self.round}"
        while self._steps_made < self.local_steps and not self.is_over():
            self._check_progress(where)
            self._batches += 1
            self._batches_since_step += 1
            yield source.next_batch(where)

    def _check_progress(self, where: str) -> None:
        """Raise an error if batches pass without steps.

        Raises:
            LoopError: The loop steps another optimizer, makes no step, or none any more.
        """
        if self._batches and not self._steps_made and self._version() != self._versions:
            raise LoopError(
                f"{where}: the parameters of part.model have changed, but part.optimizer has made no step: step "
                "part.optimizer, which is another object in each round with other neurons, and no optimizer of your own"
            )
        waited = self._batches_since_step
        if waited >= MAX_BATCHES_WITHOUT_STEP:
            raise LoopError(
                f"{where}: no step of part.optimizer in {MAX_BATCHES_WITHOUT_STEP:,} batches: call "
                "part.optimizer.step()"
            )
        if waited and waited % _BATCHES_OF_A_CHECK == 0 and not math.isfinite(self.loss_sum):
            raise LoopError(
                f"{where}: the logged loss is not finite, and part.optimizer has made no step in {waited} batches: "
                "training has diverged. Lower the learning rate"
            )

    def _version(self) -> int:
        """Return a number that grows whenever a trained parameter is changed in place."""
        return sum(parameter._version for parameter in self.named.values())

    def log(self, loss: Tensor | float, samples: int = 1, values: Mapping[str, Tensor | float] | None = None) -> None:
        """Add the loss of a batch to the round's record.

        Args:
            loss: The mean loss of the samples: a tensor with one element, or a number.
            samples: The number of samples.
            values: Means of other numbers over the samples, by name: exactly those that `train.logged` names.

        Raises:
            LoopError: The loss, or a value, is not a single number.
        """
        if samples < 1:
            raise LoopError(f"part.log: samples is {samples}: give the number of samples of the batch, at least 1")
        for name, value in (values or {}).items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise LoopError(f"part.log: '{name}' has shape {tuple(value.shape)}: give a mean, one number")
            number = value.detach().reshape(()).double() if isinstance(value, Tensor) else float(value)
            self._value_sums[name] = self._value_sums.get(name, 0.0) + number * samples
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise LoopError(f"part.log: the loss has shape {tuple(loss.shape)}: give the mean loss, one number")
            self._loss_sum.add_(loss.detach().reshape(()).to(self.device), alpha=samples)
        else:
            self._loss_sum.add_(float(loss), alpha=samples)
        self.samples += samples

    def value_sums(self, names: Sequence[str]) -> tuple[float, ...]:
        """Return the sums over all samples of logged values, in the order of `names`. This waits for the device.

        Raises:
            LoopError: Other names were logged.
        """
        if other := sorted(self._value_sums.keys() ^ set(names)):
            raise LoopError(
                f"worker {self.worker}, round {self.round}: logged values are {sorted(self._value_sums)}, but "
                f"'train.logged' is {list(names)}: log exactly these with part.log, '{other[0]}' differs"
            )
        return tuple(float(self._value_sums[name]) for name in names)

    def is_over(self) -> bool:
        """Return whether the coordinator has continued the round without this worker.

        Raises:
            PoolError: Another process has failed.
        """
        try:
            return self._is_over is not None and self._is_over()
        except PoolError as error:
            self.peer_error = error
            raise

    def run(self) -> None:
        """Make the steps with the worker's own loop.

        Raises:
            AbandonedRoundError: The coordinator has continued without this worker.
            LoopError: The user's loop raises an exception, or makes no step.
            DataError: A sample cannot be read, or its loss fails.
            ModelError: The network fails.
        """
        self._local.loop.run(self)

    def state_dict(self) -> dict[str, Tensor]:
        """Return this worker's state: of the optimizer, of error feedback, and the positions in its loaders.

        Raises:
            LoopError: A batch was already taken, or a step made, in this round.
        """
        if self._batches or self.steps_made or self._local.owner is None:
            raise LoopError(
                f"worker {self.worker}, round {self.round}: the state was asked for after {self._batches} batches and "
                f"{self.steps_made} steps: ask at the top of the loop's body, before the first batch of the round"
            )
        return self._local.owner.state_dict(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state that `state_dict` returned, before the first step of the run."""
        assert self._local.owner is not None
        self._local.owner.load_state_dict(self, state)

    def check_not_over(self) -> None:
        """Raise an error if the coordinator has continued the round without this worker.

        Raises:
            AbandonedRoundError: It has.
        """
        if self.is_over():
            raise AbandonedRoundError(
                f"worker {self.worker}: the coordinator has continued round {self.round} without it"
            )

    def count_step(self) -> None:
        """Count an optimizer step, and apply the settings of the schedule for the next one.

        Raises:
            LoopError: It is the round's first one in the user's own loop, and no parameter has a gradient.
        """
        is_first = self._local.is_own_loop and not self._steps_made
        if is_first and not any(parameter.grad is not None for parameter in self.named.values()):
            raise LoopError(
                f"worker {self.worker}, round {self.round}: part.optimizer makes a step, but no parameter of "
                "part.model has a gradient: compute the loss by part.model, not by the full network, and call "
                "loss.backward() before part.optimizer.step()"
            )
        self._steps_made += 1
        self._batches_since_step = 0
        self._apply_settings()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the steps of the optimizer within the context, and apply the settings of the schedule to them."""
        schedule = self._local.schedule
        self._groups = matching_groups(self.optimizer, self.named, schedule.group_of) if schedule.settings else []
        self._apply_settings()
        # The only hooks: they count. Gradient accumulation, `accelerate` and GradScaler make fewer steps than batches.
        # A class whose step calls that of its base class calls the hooks twice.
        begun = self.optimizer.register_step_pre_hook(self._step_begins)
        ended = self.optimizer.register_step_post_hook(self._step_ends)
        try:
            yield
        finally:
            begun.remove()
            ended.remove()

    def _step_begins(self, *_: object) -> None:
        self._open_steps += 1

    def _step_ends(self, *_: object) -> None:
        self._open_steps -= 1
        if not self._open_steps:
            self.count_step()

    def _apply_settings(self) -> None:
        schedule = self._local.schedule
        if schedule.settings and self.step < self.steps.stop:
            apply_settings(self.optimizer, self._groups, schedule.settings[self.step])


@dataclass(frozen=True)
class LoopMemory:
    """What the user's own loop keeps in a process, also when the worker's number or team changes.

    Attributes:
        sources: The positions in its loaders.
        state: The dictionary `Part.state`.
    """

    sources: BatchSources = field(default_factory=BatchSources)
    state: dict[str, Any] = field(default_factory=dict)


class LocalSteps:
    """Makes the parts of one worker, from round to round.

    Args:
        schedule: The rounds and steps of the run.
        seed: The seed of the run.
        slot: The worker.
        device: The device on which it computes.
        loop: Makes the steps, unless the caller that iterates the rounds makes them.
        memory: What the user's own loop keeps; None: nothing yet.

    Attributes:
        sources: The positions in the loaders of the user's own loop.
        state: The dictionary `Part.state`.
        owner: Holds the worker's state between rounds; None: nobody does.
        is_own_loop: Whether the loop is the user's own.
    """

    def __init__(
        self,
        schedule: Schedule,
        seed: int,
        slot: WorkerSlot,
        device: torch.device,
        loop: LocalLoop,
        memory: "LoopMemory | None" = None,
    ) -> None:
        memory = memory or LoopMemory()
        self.schedule = schedule
        self.slot = slot
        self.device = device
        self.loop = loop
        self.sources = memory.sources
        self.state = memory.state
        self._last_optimizer: torch.optim.Optimizer | None = None
        self._warned = False
        self.owner: StateOwner | None = None
        self.is_own_loop = isinstance(loop, OwnLoop)
        self._seed = seed

    def close(self) -> None:
        """Release what the loop holds."""
        self.loop.close()

    def of_round(
        self,
        round_number: int,
        model: nn.Module,
        named: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        is_over: Callable[[], bool] | None = None,
    ) -> Generator[Part, None, Part]:
        """Yield the part of a round, and return it when its steps are made.

        Random numbers drawn meanwhile depend only on seed, round and worker, and on the rank of several of a worker.

        Args:
            round_number: The round, from 0.
            model: The module to train: a subnet module, or a full network that averages its gradients.
            named: The module's trained parameters, by their names in the full network.
            optimizer: An optimizer of these parameters.
            is_over: Returns whether the coordinator has continued without this worker. None: it never does.

        Raises:
            AbandonedRoundError: The coordinator has continued without this worker.
            LoopError: No optimizer step was made, or no loss was logged.
        """
        part = Part(self, round_number, model, named, optimizer, is_over)
        self._warn_of_scheduler(optimizer)
        key = (round_number, part.worker, part.rank) if part.rank else (round_number, part.worker)
        with part.counted(), seeded(self.device, self._seed, Purpose.TRAINING, *key):
            yield part
        part.check_not_over()
        if not part.steps_made:
            raise LoopError(
                f"worker {part.worker} made no optimizer step in round {round_number}: call part.optimizer.step() "
                f"{part.local_steps} times, or iterate over part.take(loader)"
            )
        if not part.samples:
            raise LoopError(
                f"worker {part.worker} logged no loss in round {round_number}: call part.log(loss, samples) for each "
                "batch, so that the run is recorded and a loss that is not finite is noticed"
            )
        return part

    def _warn_of_scheduler(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn once of a scheduler of torch that was made for an earlier round's optimizer, and has no effect now."""
        last, self._last_optimizer = self._last_optimizer, optimizer
        if (
            last is not None
            and last is not optimizer
            and hasattr(last.step, "_wrapped_by_lr_sched")
            and not self._warned
        ):
            self._warned = True
            _log.warning(
                "worker %d: a scheduler of torch was made for part.optimizer, which is another object now, so "
                "the scheduler has no effect: give schedule= to ist.join, or set the rate by part.step",
                self.slot.worker,
            )  # fmt: skip


class OwnLoop:
    """A user's function as a `LocalLoop`: it is called once for each part.

    Args:
        function: Makes the steps of a `Part`.
    """

    def __init__(self, function: Callable[[Part], Any]) -> None:
        self._function = function

    def run(self, part: Part) -> None:
        """Call the function; see `Part.run`."""
        try:
            self._function(part)
        except (ISTError, MemoryError):
            raise
        except Exception as error:  # user code may raise anything
            raise LoopError(
                f"worker {part.worker}, round {part.round}: the loop raises {error_with_line(error)}"
            ) from error

    def close(self) -> None:
        """Do nothing: what the function keeps is its own."""


def completed(parts: Generator[Part, None, _Result]) -> _Result:
    """Run each part that a generator yields with the worker's own loop, and return the generator's result.

    An exception of a part is raised where the generator yielded the part, so that the round is left as from there.
    """
    try:
        part = next(parts)
        while True:
            try:
                part.run()
            except BaseException as error:
                part = parts.throw(error)
            else:
                part = next(parts)
    except StopIteration as end:
        result: _Result = end.value
        return result
