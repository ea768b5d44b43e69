"""Architectures that people use, in tiny configurations with random weights: `ENTRIES`, by name.

The packages that the networks come from are imported when an entry of theirs is built, not before. All inputs
hold two samples (graphs: two halves of one graph). Dropout and its like are switched off, so two forward
passes in train mode agree.
"""

from benchmarks.zoo import graph_models, timm_models, torch_models, transformers_models
from benchmarks.zoo.entry import Entry

_PARTS = (transformers_models, timm_models, graph_models, torch_models)
ENTRIES: dict[str, Entry] = {name: entry for part in _PARTS for name, entry in part.ENTRIES.items()}
assert len(ENTRIES) == sum(len(part.ENTRIES) for part in _PARTS), "two entries share a name"

__all__ = ["ENTRIES", "Entry"]
