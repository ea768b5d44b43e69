"""One optimizer step: forward and backward passes over the micro-batches of a step, clipping, the optimizer.

Where it sits: `ist/loops/local_loop.py` makes each step of a round here, and `ist/runs/rehearsal.py` the step of its
rehearsal.
Law: with one worker, a step is that of a plain PyTorch loop with the same features, bit for bit.
Not here: which samples a step uses (`ist/data/batches.py`), the settings of the optimizer (`ist/optimization/`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ist.config.schema import Train
from ist.data.batches import micro_batches
from ist.data.nested import call_model
from ist.errors import ConfigError
from ist.evaluation.step_function import BatchLoss, Values, checked_values, step_loss
from ist.evaluation.task import Task
from ist.network.compiled import Compiler
from ist.network.failures import loss_errors, loss_of, network_errors
from ist.rng import Indices
from ist.subnet.job import Job

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def smallest_micro_batch(job: Job) -> int:
    """Return the number of samples in the smallest micro-batch of any worker."""
    return job.schedule.sampler.smallest_batch // job.config.train.accumulate


class LocalStep:
    """Makes the optimizer steps of a worker, or of a rank of a baseline.

    With float16, it holds the scaler of the gradients, which lives as long as this object.

    Args:
        settings: The configuration's section `train`.
        task: Its loss or step function is used.
        device: The device of the network.
    """

    def __init__(self, settings: Train, task: Task, device: torch.device) -> None:
        self._device = device
        self._dtype = None if settings.autocast is None else _DTYPES[settings.autocast]
        self._scaler: torch.amp.GradScaler | None = None
        if self._dtype == torch.float16:
            if device.type == "cuda":
                self._scaler = torch.amp.GradScaler("cuda")
            else:  # only the rehearsal of a run on a GPU: on a CPU, many operators lack float16
                self._dtype = torch.bfloat16
        self._accumulate = settings.accumulate
        self._max_norm = settings.clip_grad_norm
        self._loss = task.loss
        self._step = task.step
        self._compiler = Compiler(settings.compile)
        self._logged = settings.logged
        if self._logged and self._step is None:
            raise ConfigError(f"'train.logged' is {self._logged}, but no 'train.step' returns these numbers")

    def take(
        self,
        module: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        batch: Indices,
        read: Callable[[Indices], tuple[Any, Any]],
        numbers: Callable[[Indices], Indices],
        weight: float = 1.0,
    ) -> BatchLoss:
        """Make one step.

        Args:
            module: The network to train. If it averages its gradients (DDP, FSDP), it does so once, for the whole step.
            parameters: Its trained parameters.
            optimizer: Their optimizer.
            batch: Positions of the step's samples in the worker's data: int64.
            read: Returns the samples at some of these positions as a batch (inputs, targets), on the module's device.
            numbers: Returns the numbers of these samples in the full data set, for messages.
            weight: A factor of the gradient: that of this rank's samples among those of its worker.

        Returns:
            The mean loss of the step's samples, detached, and the means of the other numbers that the step function
            returns.

        Raises:
            DataError: A sample cannot be read, or its loss fails.
            ModelError: The network or the optimizer fails.
        """
        parts = micro_batches(batch, self._accumulate)
        optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        values: Values = dict.fromkeys(self._logged, 0.0)
        for part in parts:
            samples = read(part)
            with _gradients_kept(module) if part is not parts[-1] else nullcontext():
                found = self.result(module, samples, partial(numbers, part))
                # For parts of equal size this divides by their number, as plain loops do.
                share = found.loss if len(parts) == 1 else found.loss / (len(batch) / len(part))
                weighted = share if weight == 1 else share * weight
                scaled = weighted if self._scaler is None else self._scaler.scale(weighted)
                with network_errors(module, "the backward pass"):
                    scaled.backward()  # type: ignore[no-untyped-call]
            losses.append(share.detach())
            values = {name: sum_ + found.values[name] * len(part) / len(batch) for name, sum_ in values.items()}
        self.finish(module, parameters, optimizer)
        return BatchLoss(losses[0] if len(losses) == 1 else torch.stack(losses).sum(), values)

    def loss(self, module: nn.Module, samples: tuple[Any, Any], numbers: Callable[[], Indices]) -> Tensor:
        """Return the mean loss of a batch; see `result`."""
        return self.result(module, samples, numbers).loss

    def result(self, module: nn.Module, samples: tuple[Any, Any], numbers: Callable[[], Indices]) -> BatchLoss:
        """Return the mean loss of a batch, and the other numbers that a step function returns.

        Args:
            module: The network.
            samples: The batch (inputs, targets), on the module's device; with a step function, (whole batch, None).
            numbers: Returns the numbers of its samples in the full data set, for messages.

        Raises:
            ConfigError: The step function does not return a loss, or other numbers than `train.logged` names.
            DataError: The loss or the step function fails.
            ModelError: The network fails.
        """
        inputs, targets = samples
        network = self._compiler.compiled(module)
        with self.precision():
            if self._step is not None:
                found = step_loss(self._step, network, inputs, numbers)
                return BatchLoss(found.loss, checked_values(found.values, self._logged))
            with network_errors(module):
                outputs = call_model(network, inputs)
            with loss_errors(numbers):
                return BatchLoss(loss_of(self._loss, outputs, targets, numbers), {})

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the forward pass and the loss run."""
        return nullcontext() if self._dtype is None else torch.autocast(self._device.type, self._dtype)

    def finish(self, module: nn.Module, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients that the parameters have, and let the optimizer take its step.

        Raises:
            ModelError: The optimizer fails.
        """
        scaler = self._scaler
        with network_errors(module, f"a step of {type(optimizer).__name__}"):
            if self._max_norm is not None:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, self._max_norm)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()


def _gradients_kept(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which backward passes add up gradients without sending them."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()
