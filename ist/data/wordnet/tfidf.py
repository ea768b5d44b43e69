"""Texts as weighted words (TF-IDF): term frequency times inverse document frequency.

The weights equal those of scikit-learn's `TfidfVectorizer` with its defaults; this module is faster to import.
Reference: C. Manning, P. Raghavan, H. Schuetze, "Introduction to Information Retrieval" (2008), section 6.2.

Where it sits: `graph.py` and `hypernyms.py` turn glosses into features with it.
"""

import re
from collections.abc import Sequence

import numpy as np

from ist.data.graphs.sparse import SparseRows
from ist.rng import Indices

_STOP_WORDS = """
a about after all also an and any are as at be because been being both but by can could do does done for from
had has have he her him his how if in into is it its may more most no not of off on one only or other out over
same she so some such than that the their them then there these they this those through to under up upon used
very was were what when where which while who whose will with within without would you your
"""

STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Frequent words with little meaning, in lower case."""

_WORD = re.compile(r"\w\w+")


def tfidf(
    texts: Sequence[str],
    fitted: Indices,
    min_documents: int = 1,
    max_words: int | None = None,
    stop_words: frozenset[str] = frozenset(),
) -> tuple[SparseRows, list[str]]:
    """Return the TF-IDF weights of the words in texts.

    Args:
        texts: The documents.
        fitted: int64: the numbers of the documents that define the vocabulary and the document frequencies.
        min_documents: Words in fewer fitted documents are dropped.
        max_words: The largest size of the vocabulary: the words in the most fitted documents; None: no limit.
        stop_words: Words to drop, in lower case.

    Returns:
        A row per text, of norm 1 if the text has a known word and empty otherwise; and the words by column, the most
        frequent first.
    """
    numbers: dict[str, int] = {}
    found = [_WORD.findall(text.lower()) for text in texts]
    tokens = np.array([numbers.setdefault(word, len(numbers)) for words in found for word in words], dtype=np.int64)
    texts_of = np.repeat(np.arange(len(texts), dtype=np.int64), [len(words) for words in found])
    pairs, counts = np.unique(texts_of * max(len(numbers), 1) + tokens, return_counts=True)
    rows, columns = np.divmod(pairs, max(len(numbers), 1))
    is_fitted = np.zeros(len(texts), dtype=bool)
    is_fitted[fitted] = True
    documents = np.bincount(columns[is_fitted[rows]], minlength=len(numbers))

    words = list(numbers)
    stopped = np.array([word in stop_words for word in words], dtype=bool)
    order = np.argsort(-documents, kind="stable")
    vocabulary = order[(documents[order] >= max(min_documents, 1)) & ~stopped[order]][:max_words]
    column_of = np.full(len(words), -1, dtype=np.int64)
    column_of[vocabulary] = np.arange(len(vocabulary))
    rarity = np.log((1 + len(fitted)) / (1 + documents)) + 1

    known = column_of[columns] >= 0
    rows, counts, columns = rows[known], counts[known], columns[known]
    weights = counts * rarity[columns]
    lengths = np.sqrt(np.bincount(rows, weights**2, minlength=len(texts)))
    values = (weights / lengths[rows]).astype(np.float32)
    offsets = np.searchsorted(rows, np.arange(len(texts) + 1)).astype(np.int64)
    rows_of_texts = SparseRows(offsets, column_of[columns].astype(np.int32), values, len(vocabulary))
    return rows_of_texts, [words[number] for number in vocabulary]
