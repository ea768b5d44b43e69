"""WordNet's nouns: reading, TF-IDF weights and labels, on small files of the same format and on Debian's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ist.data.batches import fetch, take_shard
from ist.data.graphs.sparse import SparseRows
from ist.data.wordnet.hypernyms import wordnet_hypernyms
from ist.data.wordnet.nouns import DEBIAN_ROOT, ancestors, read_nouns
from ist.data.wordnet.tfidf import tfidf
from ist.errors import DataError

installed = pytest.mark.skipif(
    not (DEBIAN_ROOT / "data.noun").exists(), reason="Debian's wordnet-base is not installed"
)


def line(offset: int, file_number: int, pointers: list[str], gloss: str) -> str:
    return f"{offset:08d} {file_number:02d} n 02 word 0 other_word 0 {len(pointers):03d} {' '.join(pointers)} | {gloss}  \n"


def write_nouns(folder: Path, lines: list[str]) -> Path:
    path = folder / "data.noun"
    path.write_text("  1 This software and database is being provided to you\n" + "".join(lines))
    return path


def write_chain(folder: Path, count: int) -> Path:
    """Write synsets each of which is a kind of the one before; the first has no hypernym."""
    up = [[]] + [[f"@ {i:08d} n 0000"] for i in range(count - 1)]
    return write_nouns(
        folder, [line(i, 3 + i % 26, up[i], f"thing {'odd' if i % 2 else 'even'} n{i}") for i in range(count)]
    )


def test_the_nouns_are_read_with_classes_glosses_and_pointers(tmp_path: Path) -> None:
    write_nouns(
        tmp_path,
        [
            line(100, 3, ["~ 00000200 n 0000"], "that which is"),
            line(
                200, 28, ["@ 00000100 n 0000", "+ 00000300 v 0101", "%p 00000300 n 0000"], 'a kind; "an example | more"'
            ),
            line(300, 5, ["@i 00000200 n 0000", "@ 00000100 n 0000", "! 00000300 n 0101"], "an instance"),
        ],
    )

    nouns = read_nouns(tmp_path)

    assert nouns.classes.tolist() == [0, 25, 2]
    assert nouns.glosses == ["that which is", 'a kind; "an example | more"', "an instance"]
    assert nouns.hypernyms.tolist() == [[1, 2, 2], [0, 1, 0]]
    assert nouns.edges.tolist() == [[0, 0, 1], [1, 2, 2]]


def test_the_folder_layout_of_npms_package_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "dict").mkdir()
    write_chain(tmp_path / "dict", 3)

    assert len(read_nouns(tmp_path).glosses) == 3


def test_missing_nouns_name_the_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get install wordnet-base"):
        read_nouns(tmp_path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("00000009 03 n 01 word 0 002 ~ 00000001 n 0000 | cut\n", r"data\.noun, line 5: .*\b11 fields.*\b15\b"),
        ("00000009 29 n 01 word 0 000 | a verb\n", r"data\.noun, line 5: .*\b29\b.*3 to 28"),
        ("not a synset\n", r"data\.noun, line 5"),
        (line(0, 3, [], "again"), r"data\.noun, line 5: .*00000000"),
        (line(9, 3, ["@ 00000077 n 0000"], "lost"), r"data\.noun: .*'00000077'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, bad: str, message: str) -> None:
    path = write_chain(tmp_path, 3)
    path.write_text(path.read_text() + bad)

    with pytest.raises(DataError, match=message):
        read_nouns(path)


def test_ancestors_are_the_hypernyms_within_the_given_levels(tmp_path: Path) -> None:
    nouns = read_nouns(write_chain(tmp_path, 7))

    offsets, found = ancestors(nouns, 3)

    assert found[offsets[6] : offsets[7]].tolist() == [3, 4, 5]
    assert found[offsets[1] : offsets[2]].tolist() == [0]
    assert offsets[1] == 0


def test_the_weights_are_scikit_learns() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = ["the cat sat on the mat", "The dog's cat; a dog!", "", "mat of mats, x 12", "unseen words"]
    theirs = TfidfVectorizer().fit(texts[:4])

    rows, words = tfidf(texts, np.arange(4))

    assert sorted(words) == sorted(theirs.vocabulary_)
    expected = theirs.transform(texts).toarray()[:, [theirs.vocabulary_[word] for word in words]]
    np.testing.assert_allclose(rows.dense().numpy(), expected, atol=1e-6)


def test_only_the_fitted_texts_define_the_vocabulary() -> None:
    rows, words = tfidf(["bb aa", "aa cc", "dd dd bb"], np.array([0, 1]), max_words=2, stop_words=frozenset({"cc"}))

    assert words == ["aa", "bb"]
    assert rows.dense()[2].tolist() == [0, 1]


def test_rows_of_a_sparse_matrix_are_those_of_the_dense_one() -> None:
    full = (torch.rand(20, 7, generator=torch.Generator().manual_seed(0)) - 0.6).clamp_min(0)
    full[3] = 0
    at, columns = full.nonzero(as_tuple=True)
    offsets = np.searchsorted(at.numpy(), np.arange(21))
    sparse = SparseRows(offsets, columns.numpy().astype(np.int32), full[at, columns].numpy(), 7)
    wanted = np.array([19, 3, 3, 0, 5])

    assert torch.equal(sparse.dense(), full)
    assert torch.equal(sparse.rows(wanted).dense(), full[torch.from_numpy(wanted)])


def test_every_fifth_noun_is_for_testing_and_labels_are_the_synsets_above(tmp_path: Path) -> None:
    splits = wordnet_hypernyms(write_chain(tmp_path, 30))

    assert (len(splits.train), len(splits.test)) == (23, 6)  # the first synset has no hypernym
    (words, weights), labels = splits.test.batch(np.arange(6))
    assert (words.dtype, weights.dtype, labels.dtype) == (torch.int64, torch.float32, torch.int64)
    assert words.shape == weights.shape == (6, 32)
    assert (words == splits.test.num_words).equal(weights == 0)
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(6))
    assert splits.test.num_words == 3  # thing, even, odd
    assert labels.max() < splits.test.num_labels
    known = labels[3][labels[3] >= 0]
    assert known.equal(known.sort().values)


def test_validation_does_not_use_the_test_items_and_has_the_same_words_and_labels(tmp_path: Path) -> None:
    path = write_chain(tmp_path, 60)
    final, tuning = wordnet_hypernyms(path), wordnet_hypernyms(path, validation=True)

    assert len(tuning.train) + len(tuning.test) == len(final.train)
    assert (tuning.train.num_words, tuning.train.num_labels) == (final.train.num_words, final.train.num_labels)


def test_a_part_of_the_items_gives_the_same_batches_as_the_full_data_set(tmp_path: Path) -> None:
    train = wordnet_hypernyms(write_chain(tmp_path, 60), max_words=2).train
    owned = np.array([3, 5, 8, 13, 21])
    cpu = torch.device("cpu")

    (words, weights), labels = fetch(take_shard(train, owned), np.array([4, 1]), cpu)

    (expected_words, expected_weights), expected_labels = fetch(train, owned[[4, 1]], cpu)
    assert torch.equal(words, expected_words)
    assert torch.equal(weights, expected_weights)
    assert torch.equal(labels, expected_labels)
    (first_words, _), first_labels = train[21]
    assert torch.equal(words[0], first_words)
    assert torch.equal(labels[0], first_labels)


def test_too_few_nouns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\b4 nouns"):
        wordnet_hypernyms(write_chain(tmp_path, 4))


@installed
def test_debians_wordnet_has_the_documented_sizes() -> None:
    splits = wordnet_hypernyms()

    assert (len(splits.train), len(splits.test)) == (65_691, 16_423)
    assert (splits.train.num_words, splits.train.num_labels) == (18_182, 10_486)
