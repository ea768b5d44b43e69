"""Which of a network's groups are split: the policy.

Split by default: everything hidden. Residual streams are split on request (LoFT, TwIST and ResIST
share them); what `partition.exclude` names is shared; with the strategy `blocks`, whole residual blocks
are dealt instead of neurons.

Reference: Dun et al., arXiv 2107.00961 (ResIST: blocks); Wang et al., arXiv 2210.16169 (LoFT: hidden channels).
"""

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ist.config.method import Partition
from ist.errors import ConfigError, ModelError
from ist.neurons.find import Found
from ist.neurons.group import Group, check_groups
from ist.tensors import constant_tensors, named_tensors


def split_groups(found: Found, template: nn.Module, partition: Partition) -> tuple[Group, ...]:
    """Return the groups that are split.

    Args:
        found: What is known of the network.
        template: The network, on any device.
        partition: How neurons are dealt.

    Raises:
        ConfigError: A pattern of the configuration matches nothing.
        ModelError: Nothing is left to split.
    """
    for operator, where in found.unknown.items():
        warnings.warn(
            f"operator {operator} (in {where}) has no rule: what reaches it is not split",
            stacklevel=2,
        )
    if partition.strategy == "blocks":
        return _blocks(template, partition.blocks)
    for pattern in partition.exclude:
        if not any(fnmatchcase(group.name, pattern) for group in found.groups):
            names = ", ".join(group.name for group in found.groups[:8])
            raise ConfigError(f"'partition.exclude' holds '{pattern}', which no group matches: groups are {names}, ...")
    hidden = [group for group in found.groups if partition.residual or not group.residual]
    groups = tuple(g for g in hidden if not any(fnmatchcase(g.name, pattern) for pattern in partition.exclude))
    if found.groups and not groups:
        left = (
            "'partition.exclude' leaves nothing" if hidden else "only residual streams could be: set partition.residual"
        )
        raise ModelError(f"no neurons are split: {left}")
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
                f"'partition.blocks' holds '{pattern}', which matches {len(paths)} modules: expected at least two"
            )
        groups.append(Group(pattern, len(paths), (), "residual blocks", modules=tuple(paths)))
    return tuple(groups)
