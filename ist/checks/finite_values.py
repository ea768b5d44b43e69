"""Find non-finite values: in a network before training, and in data.

Where it sits: `ist/runs/rehearsal.py` calls it before a run; the coordinator calls it when a loss is not finite.
Not here: whether the results of workers are finite (`ist/training/coordinator.py`).
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ist.data.batches import fetch, take_shard
from ist.data.loading.stream import StreamSampler
from ist.data.nested import tensors_in
from ist.errors import DataError, ISTError, ModelError
from ist.rng import Purpose, seeded
from ist.subnet.job import Job
from ist.tensors import is_finite


def check_example(job: Job) -> None:
    """Check that the first samples are finite.

    Raises:
        DataError: They contain NaN.
    """
    if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in tensors_in(job.task.example)):
        raise DataError("the first samples of the training data hold nan in their inputs: remove or correct them")


def checked_start(job: Job, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Check that trained parameters, and buffers that are rounded or subtracted, are finite.

    Args:
        job: The run.
        tensors: The names and the initial values of parameters and buffers; they do not change.

    Yields:
        Each tensor, after its check.

    Raises:
        ModelError: A trained parameter is not finite, or a buffer that the configured exchange rounds or subtracts.
    """
    trained = {name for name, parameter in job.split.template.named_parameters() if parameter.requires_grad}
    exchange = job.config.exchange
    is_plain = exchange.down == exchange.up == "exact" and exchange.values == "weights"
    buffers = {name for name, _ in job.split.template.named_buffers() if name in job.split.model_specs}
    for name, tensor in tensors:
        # A tensor on `meta` has no value yet: code that needs it raises the error.
        if not tensor.is_meta and name in trained and not is_finite([tensor]):
            raise ModelError(
                f"'{name}' holds {_what(tensor)} before training: give it finite values, or freeze it "
                "(requires_grad_(False)) if it is a mask"
            )
        if not tensor.is_meta and name in buffers and not is_plain and not is_finite([tensor]):
            raise ModelError(
                f"buffer '{name}' holds {_what(tensor)}, which can neither be rounded nor subtracted (exchange): leave "
                "it out of the state_dict (register_buffer(..., persistent=False)), or send exact weights"
            )
        yield name, tensor


def find_non_finite_sample(job: Job, num_workers: int, worker: int, round_number: int) -> str | None:
    """Describe a non-finite value in a worker's samples of a round, with the number of the sample; None: all finite."""
    if job.task.loop is not None:
        return None  # the data are the user's own
    if not (job.task.holds_data_of(worker) or job.config.pool.spec.in_process):
        return None  # the worker's data are in another process
    cpu, sampler = torch.device("cpu"), job.schedule.sampler_for(num_workers)
    if isinstance(sampler, StreamSampler):
        return None  # the items have passed
    try:
        numbers = sampler.shard(worker)
        shard = take_shard(job.task.data_of(worker), numbers)
        with seeded(cpu, job.config.seed, Purpose.TRAINING, round_number, worker):
            for step in job.schedule.steps(round_number):
                for position in sampler.batch(worker, step).tolist():
                    if bad := non_finite_values(*fetch(shard, np.array([position]), cpu)):
                        return f"sample {numbers[position]} of the training data holds {bad}"
    except (ISTError, RuntimeError, ValueError, TypeError, IndexError):
        return None  # the caller reports the error for which it called this function
    return None


def non_finite_values(inputs: Any, targets: Any) -> str | None:
    """Describe a non-finite value in a batch, such as 'nan in its inputs'; None: all values are finite."""
    for where, values in (("inputs", inputs), ("targets", targets)):
        for tensor in tensors_in(values):
            if not is_finite([tensor]):
                return f"{_what(tensor)} in its {where}"
    return None


def _what(tensor: Tensor) -> str:
    return "nan" if bool(tensor.isnan().any()) else "inf"
