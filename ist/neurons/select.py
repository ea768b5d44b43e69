"""Choose which neuron groups of a network are split.

By default every hidden group is split. Residual streams are split only on request (LoFT, TwIST and ResIST
share them). Groups that `partition.exclude` names are shared. With the strategy `blocks`, workers get whole
residual blocks instead of neurons.

Where it sits: between `ist/neurons/find.py`, which finds the groups, and `ist/neurons/splittable.py`, which drops
those that a submodel cannot do without.
Not here: which worker gets which neuron (`ist/subnet/partition.py`).

Reference: Dun et al., arXiv 2107.00961 (ResIST: blocks); Wang et al., arXiv 2210.16169 (LoFT: hidden channels).
"""

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ist.config.partition import Partition
from ist.errors import ConfigError, ModelError
from ist.neurons.find import Neurons
from ist.neurons.group import Group, check_groups
from ist.tensors import constant_tensors, named_tensors


def split_groups(neurons: Neurons, template: nn.Module, partition: Partition) -> tuple[Group, ...]:
    """Return the groups that are split.

    Args:
        neurons: The neurons of the network.
        template: The network, on any device.
        partition: The configuration section `partition`.

    Raises:
        ConfigError: A pattern of the configuration matches nothing.
        ModelError: Nothing is left to split.
    """
    for operator, where in neurons.unknown.items():
        warnings.warn(
            f"operator {operator} (in {where}) has no rule: neurons that reach it are not split",
            stacklevel=2,
        )
    if partition.strategy == "blocks":
        return _blocks(template, partition.blocks)
    for pattern in partition.exclude:
        if not any(fnmatchcase(group.name, pattern) for group in neurons.groups):
            names = ", ".join(group.name for group in neurons.groups[:8])
            raise ConfigError(
                f"'partition.exclude' contains '{pattern}', which matches no group: groups are {names}, ..."
            )
    hidden = [group for group in neurons.groups if partition.residual or not group.residual]
    groups = tuple(g for g in hidden if not any(fnmatchcase(g.name, pattern) for pattern in partition.exclude))
    if neurons.groups and not groups:
        reason = (
            "'partition.exclude' excludes every group"
            if hidden
            else "the network has only residual streams; set partition.residual to split them"
        )
        raise ModelError(f"no neurons are split: {reason}")
    check_groups(groups, named_tensors(template) | constant_tensors(template))
    return groups


def _blocks(template: nn.Module, patterns: Sequence[str]) -> tuple[Group, ...]:
    """Return one group for each pattern, whose neurons are the modules that match it."""
    groups = []
    for pattern in patterns:
        depth = pattern.count(".")
        paths = [
            path for path, _ in template.named_modules() if path.count(".") == depth and fnmatchcase(path, pattern)
        ]
        if len(paths) < 2:
            raise ConfigError(
                f"'partition.blocks' contains '{pattern}', which matches {len(paths)} modules: expected at least two"
            )
        groups.append(Group(pattern, len(paths), (), "residual blocks", modules=tuple(paths)))
    return tuple(groups)
