"""What is not finite before anything is trained: in a network's values, and in data.

Where it sits: `ist/training/worker.py` asks when a run is rehearsed, the coordinator and the baselines when a loss is
not finite.
Not here: whether what comes back from workers is finite (`ist/training/coordinator.py`).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ist.data.batches import fetch
from ist.data.nested import tensors_in
from ist.errors import DataError, ISTError, ModelError
from ist.rng import Purpose, seeded
from ist.subnet.job import Job
from ist.tensors import is_finite


def check_start(job: Job, network: nn.Module) -> None:
    """Check that what is trained, or rounded on its way, is finite at the start.

    Args:
        job: The run.
        network: The whole network with its initial weights; left as it is.

    Raises:
        DataError: The first samples are not numbers.
        ModelError: A parameter is not, or a buffer that cannot travel as it is configured.
    """
    if any(tensor.is_floating_point() and bool(tensor.isnan().any()) for tensor in tensors_in(job.task.example)):
        raise DataError("the first samples of the training data hold nan in their inputs: leave them out, or mend them")
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        return  # it has no values yet, which is told where they are needed
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and not is_finite([parameter]):
            raise ModelError(
                f"'{name}' holds {_what(parameter)} before anything is trained: give it values, or freeze it "
                "(requires_grad_(False)) if it is a mask"
            )
    exchange = job.config.exchange
    if exchange.down == exchange.up == "exact" and exchange.values == "weights":
        return
    for name, buffer in network.named_buffers():
        if name in job.split.model_specs and not is_finite([buffer]):
            raise ModelError(
                f"buffer '{name}' holds {_what(buffer)}, which can neither be rounded nor subtracted (exchange): leave "
                "it out of the state_dict (register_buffer(..., persistent=False)), or exchange weights exactly"
            )


def find_non_finite_sample(job: Job, num_workers: int, worker: int, round_number: int) -> str | None:
    """Return what is not finite in the data of a worker's round, and in which sample; None: nothing."""
    cpu, sampler = torch.device("cpu"), job.schedule.sampler_for(num_workers)
    try:
        with seeded(cpu, job.config.seed, Purpose.TRAINING, round_number, worker):
            for step in job.schedule.steps(round_number):
                for number in sampler.shard(worker)[sampler.batch(worker, step)].tolist():
                    if bad := non_finite_values(*fetch(job.task.train_data, np.array([number]), cpu)):
                        return f"sample {number} of the training data holds {bad}"
    except (ISTError, RuntimeError, ValueError, TypeError, IndexError):
        return None  # the question was asked about another error, which is told
    return None


def non_finite_values(inputs: Any, targets: Any) -> str | None:
    """Say what is not finite in a batch: 'nan in its inputs'."""
    for where, values in (("inputs", inputs), ("targets", targets)):
        for tensor in tensors_in(values):
            if not is_finite([tensor]):
                return f"{_what(tensor)} in its {where}"
    return None


def _what(tensor: Tensor) -> str:
    return "nan" if bool(tensor.isnan().any()) else "inf"
