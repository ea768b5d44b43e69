"""The shipped data sets.

`DATASETS` maps the short names that a configuration may use in `data.name` to import paths of loaders: functions of
(root, **args) that return `Splits`. A loader downloads nothing. If files are missing, its error names the package that
provides them.

Where it sits: `ist/runs/build.py` looks up loaders here.
Not here: assigning samples to workers (`batches.py`).
"""

from typing import Any, NamedTuple

from torch.utils.data import Dataset

DATASETS = {
    "cora": "ist.data.graphs.cora:cora",
    "crime": "ist.data.crime:crime",
    "digits": "ist.data.images.digits:digits",
    "fashion_mnist": "ist.data.images.fashion_mnist:fashion_mnist",
    "speech_commands": "ist.data.speech.speech_commands:speech_commands",
    "spoken_digits": "ist.data.speech.spoken_digits:spoken_digits",
    "text": "ist.data.text:text",
    "wordnet_graph": "ist.data.wordnet.graph:wordnet_graph",
    "wordnet_hypernyms": "ist.data.wordnet.hypernyms:wordnet_hypernyms",
}


class Splits(NamedTuple):
    """A data set in two parts; each item is a pair (input, target).

    Attributes:
        train: The training data.
        test: The data for evaluation.
    """

    train: Dataset[Any]
    test: Dataset[Any]
