"""The shipped loaders, on the real files if a package provides them, and on small files of the same format."""

import gzip
import inspect
import struct
from pathlib import Path

import pytest
import torch

from ist.config.registry import resolve
from ist.data.crime import TARGET, crime
from ist.data.images.digits import digits
from ist.data.images.fashion_mnist import DEBIAN_ROOT, fashion_mnist
from ist.data.registry import DATASETS
from ist.errors import DataError


def test_the_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    splits = digits()

    assert (len(splits.train), len(splits.test)) == (1437, 360)
    inputs, target = splits.test[1]
    assert torch.equal(inputs, torch.from_numpy(images[5]).float() / 8 - 1)
    assert target == labels[5]


def write_idx(path: Path, shape: tuple[int, ...], values: bytes) -> None:
    raw = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("t10k", 2)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", (count, 28, 28), bytes(784 * count))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", (count,), bytes(range(count)))
    return tmp_path


def test_fashion_mnist_reads_the_standard_files_zipped_or_not(folder: Path) -> None:
    splits = fashion_mnist(folder)

    assert (len(splits.train), len(splits.test)) == (3, 2)
    inputs, target = splits.train[2]
    assert inputs.shape == (784,)
    assert target == 2


def test_a_missing_file_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'train-images-idx3-ubyte\.gz'.*apt-get install dataset-fashion-mnist"):
        fashion_mnist(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "junk", "short"])
def test_a_damaged_file_is_named(folder: Path, damage: str) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "junk":
        path.write_bytes(gzip.compress(b"not an image"))
    else:
        write_idx(path, (3, 28, 28), bytes(100))

    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        fashion_mnist(folder)


@pytest.mark.skipif(not DEBIAN_ROOT.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_package_has_the_published_sizes() -> None:
    splits = fashion_mnist()

    assert (len(splits.train), len(splits.test)) == (60_000, 10_000)
    inputs = splits.train.tensors[0]
    assert abs(float(inputs.mean())) < 0.01
    assert abs(float(inputs.std()) - 1) < 0.01


def test_fashion_mnist_can_be_loaded_as_images(folder: Path) -> None:
    flat, pictures = fashion_mnist(folder), fashion_mnist(folder, flat=False)

    assert pictures.train.tensors[0].shape == (3, 1, 28, 28)
    assert torch.equal(pictures.test.tensors[0].flatten(1), flat.test.tensors[0])


def test_the_validation_rows_of_crime_are_the_last_before_the_test_rows(tmp_path: Path) -> None:
    path = tmp_path / "crime.csv"
    path.write_text(f"first,{TARGET}\n" + "".join(f"{row},{row}\n" for row in range(900)))

    splits, tuning = crime(path), crime(path, validation=True)

    assert (len(splits.train), len(splits.test)) == (507, 393)
    assert (len(tuning.train), len(tuning.test)) == (107, 400)
    inputs, targets = tuning.train.tensors
    assert targets.flatten().tolist() == list(range(107))
    assert tuning.test.tensors[1][-1] == splits.train.tensors[1][-1] == 506
    assert abs(float(inputs.mean())) < 1e-6
    assert abs(float(inputs.std()) - 1) < 1e-6


def test_every_short_name_refers_to_a_loader() -> None:
    for name in DATASETS:
        assert "root" in inspect.signature(resolve(name, "data.name", DATASETS)).parameters
