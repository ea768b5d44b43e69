"""A baseline for the graph workload: propagate the known labels along the edges, without features or a network.

    python -m benchmarks.propagation

The classes of WordNet's nouns are mostly those of their neighbors, so this beats networks on the glosses: the workload
compares ways to train one network, not networks.
"""

import numpy as np
import torch
from torch_geometric.nn.models import LabelPropagation

from ist.data.graphs.graph import only, undirected
from ist.data.wordnet.graph import HELD_OUT
from ist.data.wordnet.nouns import read_nouns
from ist.rng import Purpose, permutation

TRAIN_FRACTION = 0.1
LAYERS, ALPHA = 50, 0.9


def main() -> None:
    nouns = read_nouns(None)
    nodes = len(nouns.classes)
    order = permutation(nodes, 0, Purpose.SHARD, 1)  # the split of wordnet_graph with its default seed
    held_out = int(nodes * HELD_OUT)
    known = order[2 * held_out :][: int(nodes * TRAIN_FRACTION)]
    tested = order[:held_out]
    edges = torch.from_numpy(undirected(nouns.edges, nodes))
    labels = only(nouns.classes, np.arange(nodes))
    mask = torch.zeros(nodes, dtype=torch.bool)
    mask[torch.from_numpy(known)] = True
    spread = LabelPropagation(LAYERS, ALPHA)(labels, edges, mask)
    right = spread.argmax(dim=1)[torch.from_numpy(tested)] == labels[torch.from_numpy(tested)]
    print(
        f"label propagation, {len(known)} of {nodes} labels known: {right.double().mean():.2%} of {len(tested)} nodes"
    )


if __name__ == "__main__":
    main()
