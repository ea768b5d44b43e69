"""Write subnets for the way and read them, on both ends: the coordinator's and the worker's.

Where it sits: between cutting and merging (`ist/subnet.py`) on one end and training (`ist/worker.py`) on the other; a
pool carries what is written.
Law: a worker that reads a subnet and writes it back untouched changes nothing, where nothing is rounded ('exact').
Not here: how matrices are rounded (`ist/pool/coding.py`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ist.config_method import Coding
from ist.groups import TensorSpec
from ist.job import Job
from ist.pool.coding import Envelope, Route, coded_specs, decode, encode, make_route, travels_as_delta
from ist.pool.wire import Message, layout_of
from ist.subnet import Cut, cut_specs, extract, positions, reassemble


class Outgoing:
    """The coordinator's end of the way down; holds memory for one subnet where it is rounded on the way."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._scratch: Message | None = None

    def route(self, cut: Cut) -> Route:
        """Return what the messages of a cut look like."""
        return make_route(layout_of(cut_specs(self._job.specs, cut)), self._job.config.exchange)

    def write(self, state: Mapping[str, Tensor], cut: Cut, round_number: int, envelope: Envelope) -> int:
        """Cut a subnet into an envelope; return how many bytes of it are to be sent."""
        route = envelope.route
        message = envelope.down
        if not route.is_plain:
            if self._scratch is None or self._scratch.layout != route.plain:
                self._scratch = Message(route.plain, envelope.flat.device)
            message = self._scratch
        tensors = {name: message.tensors[name] for name in self._job.sent_names(route.plain, round_number)}
        extract(state, cut, into=tensors)
        if not route.is_plain:
            encode(tensors, envelope.down.tensors, self._job.config.exchange.down)
        return self._job.sent_bytes(route, round_number)


def read_trained(job: Job, state: Mapping[str, Tensor], cut: Cut, envelope: Envelope) -> Mapping[str, Tensor]:
    """Return what a worker trained, by name: the coordinator's end of the way up.

    Args:
        job: The run.
        state: Whole tensors, as they were when the subnet was cut, but for what other workers alone hold.
        cut: The worker's positions.
        envelope: Its messages; the one up is read.
    """
    route, settings = envelope.route, job.config.exchange
    if route.is_plain:
        return envelope.up.tensors
    trained = {}
    for name, value in decode(envelope.up.tensors, route.plain.specs, settings.up):
        spec = route.plain.specs[name]
        if settings.values == "deltas" and travels_as_delta(name, spec):
            whole = torch.empty(spec.shape, dtype=spec.dtype, device=value.device)
            extract(state, cut, into={name: whole})
            trained[name] = whole.add_(value)
        else:
            trained[name] = value
    return trained


class WorkerEnd:
    """A worker's end of both ways.

    Holds memory for the subnet where what travels is not what is trained, and what rounding took where it is fed back.

    Args:
        job: The run.
        worker: Which worker.
        device: Where it computes.

    Reference: Seide et al., Interspeech 2014, and Karimireddy et al., arXiv 1901.09847 (error feedback).
    """

    def __init__(self, job: Job, worker: int, device: torch.device) -> None:
        self._job = job
        self._worker = worker
        self._device = device
        self._settings = job.config.exchange
        self._plain: Message | None = None
        self._taken: dict[str, Tensor] = {}

    def open(self, envelope: Envelope) -> Message:
        """Return the subnet that an envelope holds, to be trained in place."""
        route = envelope.route
        if route.is_plain:
            return envelope.down
        if self._plain is None or self._plain.layout != route.plain:
            self._plain = Message(route.plain, self._device)
        for name, value in decode(envelope.down.tensors, route.plain.specs, self._settings.down):
            self._plain.tensors[name].copy_(value)
        return self._plain

    def close(self, envelope: Envelope, trained: Message, round_number: int) -> None:
        """Write the trained subnet into the envelope; `trained` is of no use afterwards."""
        route, settings = envelope.route, self._settings
        if route.is_plain:
            return
        tensors = trained.tensors
        if settings.values == "deltas":
            for name, start in decode(envelope.down.tensors, route.plain.specs, settings.down):
                if travels_as_delta(name, route.plain.specs[name]):
                    tensors[name].sub_(start)
        if settings.error_feedback:
            self._encode_with_feedback(envelope, tensors, round_number)
        else:
            encode(tensors, envelope.up.tensors, settings.up)

    def _encode_with_feedback(self, envelope: Envelope, tensors: Mapping[str, Tensor], round_number: int) -> None:
        job, plain, coding = self._job, envelope.route.plain.specs, self._settings.up
        rounded = {name: spec for name, spec in job.specs.items() if _is_rounded(name, spec, coding)}
        if not self._taken or job.config.checkpoint.is_due(round_number):
            self._taken = {
                name: torch.zeros(spec.shape, dtype=torch.float32, device=self._device)
                for name, spec in rounded.items()
            }
        cut = positions(job.groups, rounded, job.neurons(round_number)[self._worker])
        parts = {name: torch.empty(plain[name].shape, device=self._device) for name in cut}
        extract(self._taken, cut, into=parts)
        # In float32, whatever the network's dtype: what was taken is small beside the change.
        for name, part in parts.items():
            part.add_(tensors[name])
        encode({**tensors, **parts}, envelope.up.tensors, coding)
        for name, value in decode(envelope.up.tensors, plain, coding):
            if name in parts:
                parts[name].sub_(value)
        reassemble(self._taken, [cut], [(0, parts)], frozenset(parts))


def _is_rounded(name: str, spec: TensorSpec, coding: Coding) -> bool:
    return coded_specs({name: spec}, coding)[name] != spec
