"""The memory of a training step, counted without values: gradients, optimizer state, activations and temporaries.

The step runs on fake tensors, which have a shape and a device but no memory, so counting takes as long as Python needs
to call the operators. Every storage is counted from the operator that makes it until it is freed.

Where it sits: `ist/training/memory_budget.py` counts the step of a worker and of a rank here.
Not here: memory that an operator allocates and frees inside its kernel, and memory that the allocator keeps.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ist.data.nested import mapped, tensors_in
from ist.errors import first_line
from ist.loops.local_step import LocalStep
from ist.network.copies import copied
from ist.subnet.job import Job
from ist.tensors import constant_tensors


@dataclass(frozen=True)
class StepMemory:
    """The memory of a step, in addition to the network and the batch.

    Attributes:
        gradient: Bytes of the gradients.
        optimizer: Bytes of the optimizer's state.
        activations: Bytes by which the step's peak is above gradients and optimizer state: values that the backward
            pass needs, and temporary tensors.
    """

    gradient: int
    optimizer: int
    activations: int


class UncountedError(Exception):
    """A step cannot run without values; the text says why."""


def step_memory(job: Job, module: nn.Module, samples: tuple[Any, Any], device: torch.device) -> StepMemory:
    """Count the memory of a step: forward and backward pass, clipping, and the optimizer's step.

    Args:
        job: The run; its loss, optimizer and settings are used, without compilation.
        module: The network that trains, on any device; it does not change.
        samples: A micro-batch (inputs, targets), or (whole batch, None) with a step function.
        device: The device on which the network trains.

    Raises:
        UncountedError: An operator needs values, such as one whose result has as many rows as a mask has ones.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    settings = job.config.train.model_copy(update={"compile": None, "accumulate": 1})
    try:
        with fakes:
            fake = _without_values(module, device)
            batch = mapped(samples, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
            named = {name: parameter for name, parameter in fake.named_parameters() if parameter.requires_grad}
            known = [*fake.parameters(), *fake.buffers(), *tensors_in(batch)]
            step = LocalStep(settings, job.task, device)
            with _Counted(known) as counted:
                optimizer = job.task.make_optimizer(named)
                for _ in range(2):  # the first step makes the optimizer's state, which the second finds at its start
                    counted.peak = counted.live
                    optimizer.zero_grad(set_to_none=True)
                    step.result(fake, batch, _no_numbers).loss.backward()  # type: ignore[no-untyped-call]
                    gradient = sum(p.grad.nbytes for p in named.values() if p.grad is not None)
                    step.finish(fake, list(named.values()), optimizer)
                state = _state_bytes(optimizer)
                return StepMemory(gradient, state, max(0, counted.peak - gradient - state))
    except Exception as error:  # the user's code may raise anything
        raise UncountedError(first_line(error)) from error


def optimizer_bytes(job: Job, module: nn.Module, device: torch.device) -> int:
    """Count the bytes of the optimizer's state after a step, without running the network.

    Args:
        job: The run.
        module: The network that trains, on any device; it does not change.
        device: The device on which it trains.

    Raises:
        UncountedError: The optimizer needs values.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = _without_values(module, device)
            named = {name: parameter for name, parameter in fake.named_parameters() if parameter.requires_grad}
            optimizer = job.task.make_optimizer(named)
            for parameter in named.values():
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            return _state_bytes(optimizer)
    except Exception as error:  # the user's code may raise anything
        raise UncountedError(first_line(error)) from error


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(storage_bytes(tree_leaves(list(optimizer.state.values()))).values())


def storage_bytes(tensors: Any) -> dict[int, int]:
    """Return the bytes of the storages of tensors, each once, by an id of the storage."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return {key: int(nbytes) for key, nbytes in storages.items()}


def _without_values(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a network with fake tensors on a device."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers(), *constant_tensors(module).values()]:
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
        vars(memo[id(tensor)]).update(vars(tensor))
    return copied(module, memo)


def _no_numbers() -> Any:
    return range(0)


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators make within the context.

    Args:
        known: Tensors that do not count.

    Attributes:
        live: Bytes of the storages that exist now.
        peak: The most bytes at once; may be set to `live` to measure a part.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = set(storage_bytes(known))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **kwargs or {})
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        nbytes = storage.nbytes()
        self._known.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes
