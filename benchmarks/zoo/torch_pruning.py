"""Test whether Torch-Pruning's dependency graph finds groups that can be cut without changing the rest of a network.

Torch-Pruning is used as documented: `DependencyGraph().build_dependency(network, example_inputs)`, `get_all_groups`
with convolutions and linear layers as roots and without the layers that compute the outputs,
`get_pruning_group(...).prune()`. Its graph does not update the number of heads of attention modules; its examples
assign it after a cut. So if the outputs differ at first, the number of heads, or their size, or only the width, is
halved in the modules whose parameters were cut, under the attribute names that packages use. There is no code for
single architectures: no pruners for a package's own layers, no parameter dims.

Criterion: up to 8 groups, spread over the network, are cut, each on a new copy. Half of a group's channels are removed:
the second half; if that fails, every second channel; or the second half of each part, if layers divide the channels
into parts (grouped convolutions, group norm, a fused query-key-value projection). The best of these results counts, so
a tool that can only remove entire heads, or only a part of each head, passes. A group is

- equal: the forward pass runs, and its outputs are those of the full network with every entry of a parameter that
  the cut removed set to zero (both the slices that compute the channels and the slices that read them);
- not equivalent: the pass runs but its outputs differ, and the channels pass through a norm that averages over them, so
  that no masked network is equal: the cut changes the function, perhaps intentionally;
- failed: an exception while grouping, cutting or running;
- wrong: the pass runs and its outputs differ without such a norm.

All runs use float64, train mode (batch norm with the batch's statistics), and no dropout. A network works if at least
one of its groups is equal and all others are equal or not equivalent. It is wrong if a group is wrong, or if all are
not equivalent. It fails if a group fails and none is wrong, if there is no graph or no group to cut, or if all this
takes more than 30 CPU seconds (most of these small networks take one or two).
"""

import contextlib
import copy
import importlib
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import Entry, Inputs

GROUPS = 8
LIMIT_S = 30.0  # CPU time
TOLERANCE = 1e-5  # relative to the largest output; some networks always compute their norms in single precision
REPAIRED = "with new numbers of heads"
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads")
HEAD_SIZES = (
    "head_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "head_size",
    "dim_per_head",
    "key_dim",
    "val_dim",
)
WIDTHS = (
    "embed_dim",
    "all_head_size",
    "hidden_size",
    "inner_dim",
    "attn_dim",
    "split_size",
    "dim",
    "d_model",
    "kv_dim",
)
REPAIRS: tuple[tuple[str, ...], ...] = ((), HEADS + WIDTHS, HEAD_SIZES + WIDTHS, WIDTHS)
Verdict = Literal["equal", "not equivalent", "failed", "wrong"]
KINDEST: tuple[Verdict, ...] = ("equal", "not equivalent", "failed", "wrong")


@dataclass(frozen=True)
class PruningResult:
    """The result of Torch-Pruning on one network: see the module's docstring for the criterion."""

    status: Literal["works", "wrong", "fails"]
    reason: str
    num_groups: int


@dataclass(frozen=True)
class _Root:
    """A group, identified by the name of its root layer, because indices differ between copies of a network."""

    name: str
    channels: int
    partings: tuple[int, ...]  # the numbers of equal parts into which its layers divide the channels
    with_norm: bool


class _Graph:
    """A network with Torch-Pruning's graph of it."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        self.network, self.library = network, importlib.import_module("torch_pruning")
        made: list[Any] = []

        def run(module: nn.Module, inputs: Inputs) -> list[Tensor]:
            outputs = [tensor for tensor in _floats(module(*inputs[0], **inputs[1])) if tensor.requires_grad]
            made.extend(tensor.grad_fn for tensor in outputs)
            return outputs

        self.graph = self.library.DependencyGraph()
        self.graph.build_dependency(network, example_inputs=inputs, forward_fn=run, verbose=False)
        self.output_functions = set(made)
        network.train()

    def roots(self) -> list[_Root]:
        """Return the groups that do not change the shape of an output."""
        groups = self.graph.get_all_groups(root_module_types=[nn.modules.conv._ConvNd, nn.Linear])
        return [self._root(group) for group in groups if not any(self._makes_output(dep) for dep, _ in group)]

    def prune(self, root: str, channels: Sequence[int]) -> None:
        """Cut these channels out of the network."""
        layer = self.network.get_submodule(root)
        make = self.graph.get_pruner_of_module(layer).prune_out_channels
        self.graph.get_pruning_group(layer, make, list(channels)).prune()

    def _makes_output(self, dep: Any) -> bool:
        pruner = self.graph.get_pruner_of_module(dep.target.module)
        return dep.handler == pruner.prune_out_channels and (
            dep.target.grad_fn in self.output_functions or dep.target.type == self.library.ops.OPTYPE.OUTPUT
        )

    def _root(self, group: Any) -> _Root:
        root = group[0].dep.target.module
        parted = (self.library.ops.OPTYPE.SPLIT, self.library.ops.OPTYPE.UNBIND)
        sizes: set[int] = set()
        for dep, _ in group:
            pruner = self.graph.get_pruner_of_module(dep.target.module)
            if isinstance(dep.target.module, nn.modules.conv._ConvNd | nn.GroupNorm):
                sizes.add(pruner.get_out_channel_groups(dep.target.module))
            elif dep.target.type in parted and dep.target.module.offsets:
                sizes.add(len(dep.target.module.offsets) - 1)
        channels = self.graph.get_out_channels(root)
        divisors = tuple(sorted(size for size in sizes if size > 1 and channels % size == 0 and channels > size))
        with_norm = any(self._averages_over_channels(dep.target.module) for dep, _ in group)
        return _Root(self.graph._module2name[root], channels, divisors, with_norm)

    def _averages_over_channels(self, module: Any) -> bool:
        """Return whether a module is a norm over channels: one of torch, or a package's own with known parameters."""
        if isinstance(module, nn.Parameter):
            owner = self.network.get_submodule(self.graph._param_to_name[module].rpartition(".")[0])
            return "norm" in type(owner).__name__.lower()
        return isinstance(module, nn.LayerNorm | nn.GroupNorm)


def torch_pruning_result(entry: Entry) -> PruningResult:
    """Group and cut a network with Torch-Pruning, and judge the result.

    Args:
        entry: The network, and its inputs.

    Returns:
        The verdict, by the criterion in this module's docstring.
    """
    verdicts: list[tuple[str, Verdict, str]] = []
    num_groups = 0
    try:
        with warnings.catch_warnings(), _limit(LIMIT_S):
            warnings.simplefilter("ignore")
            network, inputs = _prepare(entry)
            try:
                roots = _Graph(copy.deepcopy(network), inputs).roots()
            except Exception as error:
                return PruningResult("fails", f"no groups: {_describe(error)}", 0)
            num_groups = len(roots)
            verdicts.extend((root.name, *_judge(network, inputs, root)) for root in _spread(roots))
    except _OutOfTimeError:
        return PruningResult("fails", f"no answer after {LIMIT_S:.0f} s", num_groups)
    if not verdicts:
        return PruningResult("fails", "no group that can be pruned", 0)
    return PruningResult(*_summarize(verdicts), num_groups)


class _OutOfTimeError(BaseException):
    """The time limit has passed; not an Exception, so that no `except Exception` on the way catches it."""


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Interrupt code that uses more CPU time of this process; works only in the main thread."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _prepare(entry: Entry) -> tuple[nn.Module, Inputs]:
    """Build a network and its inputs in double precision, in train mode without dropout."""
    network = entry.build().double().train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network, _as_double(entry.inputs())


def _judge(network: nn.Module, inputs: Inputs, root: _Root) -> tuple[Verdict, str]:
    """Cut one group, trying choices of channels until one is equal; return the best verdict and its reason."""
    found: list[tuple[Verdict, str]] = []
    for channels in _choices(root):
        try:
            cut, masked, owners = _cut(network, inputs, root.name, channels)
        except Exception as error:
            found.append(("failed", _describe(error)))
            continue
        found.extend(_compare(cut, masked, owners, inputs, root.with_norm))
        if found[-1][0] == "equal":
            return found[-1]
    return min(found, key=lambda verdict: KINDEST.index(verdict[0]), default=("failed", "a single channel"))


def _cut(
    network: nn.Module, inputs: Inputs, root: str, channels: Sequence[int]
) -> tuple[nn.Module, nn.Module, set[str]]:
    """Cut one copy and mask another; return both, and the names of the modules whose parameters were cut.

    During the cut, the weights of the copy are their own positions, so the remaining values show what was not removed.
    """
    graph = _Graph(copy.deepcopy(network), inputs)
    cut, masked = graph.network, copy.deepcopy(network)
    owners: set[str] = set()
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=parameter.dtype).view_as(parameter))
        graph.prune(root, channels)
        full = dict(network.named_parameters(remove_duplicate=False))
        zeroed = dict(masked.named_parameters(remove_duplicate=False))
        left = list(cut.named_parameters(remove_duplicate=False))
        remaining = {name: parameter.detach().long() for name, parameter in left}
        for name, parameter in left:
            parameter.copy_(full[name].flatten()[remaining[name]])
            removed = torch.ones(full[name].numel(), dtype=torch.bool)
            removed[remaining[name].flatten()] = False
            zeroed[name].masked_fill_(removed.view_as(zeroed[name]), 0.0)
            if removed.any():  # the layer, and every module around it
                parts = name.split(".")[:-1]
                owners |= {".".join(parts[:depth]) for depth in range(len(parts) + 1)}
    if not owners:
        raise RuntimeError("nothing was cut")
    return cut, masked, owners


def _compare(
    cut: nn.Module, masked: nn.Module, owners: set[str], inputs: Inputs, with_norm: bool
) -> list[tuple[Verdict, str]]:
    """Return the verdicts on one cut, without and with repaired sizes in the modules; the last is equal if any is."""
    found: list[tuple[Verdict, str]] = []
    wanted = _run(masked, inputs)
    for names in REPAIRS:
        try:
            with _halved(cut, masked, owners, names):
                difference = _difference(wanted, _run(cut, inputs))
        except Exception as error:
            if not names:
                found.append(("failed", _describe(error)))
            continue
        if difference <= TOLERANCE:
            return [("equal", REPAIRED if names else "")]
        if with_norm:
            found.append(("not equivalent", f"outputs differ by {difference:.1e}"))
        elif not names:
            found.append(("wrong", f"outputs differ by {difference:.1e}"))
    return found


@contextlib.contextmanager
def _halved(cut: nn.Module, full: nn.Module, owners: set[str], names: Sequence[str]) -> Iterator[None]:
    """Halve the owners' whole numbers of these names that the cut itself left as they were, while the context lasts."""
    changed: list[tuple[nn.Module, str, int]] = []
    try:
        for owner in owners:
            module, before = cut.get_submodule(owner), vars(full.get_submodule(owner))
            for name in names:
                value = before.get(name)
                if type(value) is int and value % 2 == 0 and vars(module)[name] == value:
                    changed.append((module, name, value))
                    setattr(module, name, value // 2)
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def _difference(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest difference, relative to the largest output."""
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in found]:
        raise RuntimeError("an output changed its shape")
    scale = max(float(tensor.abs().max()) for tensor in wanted)
    return max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True)) / max(scale, 1e-12)


def _choices(root: _Root) -> Iterator[list[int]]:
    """Yield the ways to take half of a group's channels."""
    if root.channels < 2:
        return
    second_half = list(range(root.channels // 2, root.channels))
    yield second_half
    yield list(range(1, root.channels, 2))
    for parts in root.partings:
        each = root.channels // parts
        yield [start + k for start in range(0, root.channels, each) for k in range(each // 2, each)]


def _spread(roots: Sequence[_Root]) -> list[_Root]:
    """Choose up to `GROUPS` groups at even distances, from the first to the last."""
    if len(roots) <= GROUPS:
        return list(roots)
    return [roots[round(k * (len(roots) - 1) / (GROUPS - 1))] for k in range(GROUPS)]


def _summarize(verdicts: Sequence[tuple[str, Verdict, str]]) -> tuple[Literal["works", "wrong", "fails"], str]:
    counts = Counter(verdict for _, verdict, _ in verdicts)
    reason = ", ".join(f"{counts[verdict]} {verdict}" for verdict in KINDEST if counts[verdict])
    repaired = sum(why == REPAIRED for _, _, why in verdicts)
    reason += f" ({repaired} {REPAIRED})" if repaired else ""
    if counts["equal"] and not counts["failed"] and not counts["wrong"]:
        return "works", reason
    worst: Verdict = "wrong" if counts["wrong"] else "failed" if counts["failed"] else "not equivalent"
    name, why = next((name, why) for name, verdict, why in verdicts if verdict == worst)
    return "fails" if worst == "failed" else "wrong", f"{reason}; {name}: {why}"


def _run(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return _floats(network(*inputs[0], **inputs[1]))


def _floats(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in nested outputs."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in _floats(part)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _floats(part)]
    return []


def _as_double(inputs: Inputs) -> Inputs:
    def convert(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(convert(value) for value in inputs[0]), {name: convert(value) for name, value in inputs[1].items()}


def _describe(error: Exception) -> str:
    """Return the class of an exception and the start of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
