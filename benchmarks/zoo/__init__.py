"""Common architectures in tiny configurations with random weights: `ENTRIES`, by name.

Packages are imported only when one of their entries is built. All inputs have two samples (graphs: two halves of one
graph). Dropout and similar layers are switched off, so two forward passes in train mode agree.
"""

from benchmarks.zoo import graph_models, timm_models, torch_models, transformers_models
from benchmarks.zoo.entry import Entry

_PARTS = (transformers_models, timm_models, graph_models, torch_models)
ENTRIES: dict[str, Entry] = {name: entry for part in _PARTS for name, entry in part.ENTRIES.items()}
assert len(ENTRIES) == sum(len(part.ENTRIES) for part in _PARTS), "two entries share a name"

__all__ = ["ENTRIES", "Entry"]
