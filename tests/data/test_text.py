"""Text from a file or from the system, cut into windows of bytes."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ist.data.text import text
from ist.errors import DataError


def content(part: Any) -> bytes:
    return bytes(part.tensors[0].flatten().tolist())


def test_the_parts_follow_each_other_in_the_text(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_bytes(bytes(range(100)))

    splits = text(path, length=5, held_out=0.2)

    assert content(splits.train) == bytes(range(80))
    assert content(splits.test) == bytes(range(80, 100))


def test_the_validation_part_is_right_before_the_test_part(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_bytes(bytes(range(100)))

    splits = text(path, length=5, held_out=0.2, validation=True)

    assert content(splits.train) == bytes(range(60))
    assert content(splits.test) == bytes(range(60, 80))


def test_only_the_first_bytes_are_used(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_bytes(bytes(range(100)))

    splits = text(path, length=5, held_out=0.5, max_bytes=20)

    assert content(splits.train) + content(splits.test) == bytes(range(20))


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_bytes(bytes(20))

    text(path, length=10, held_out=0.5)
    with pytest.raises(DataError, match=r"letters\.txt: 20 bytes .*\b2 windows of 10\b.*\b1\b"):
        text(path, length=10, held_out=0.5, validation=True)


def test_the_sources_of_the_standard_library_skip_parts_that_some_systems_lack() -> None:
    splits = text(source="stdlib", length=1000)
    sources = content(splits.train) + content(splits.test)

    assert len(sources) > 5_000_000
    assert b"class Formatter" in sources  # logging
    assert b"class IdbAdapter" not in sources  # idlelib
    assert b"import torch" not in sources


@pytest.mark.skipif(shutil.which("bible") is None, reason="Debian's bible-kjv is not installed")
def test_the_bible_is_plain_english() -> None:
    splits = text(source="kjv", length=100)

    assert content(splits.train).startswith(
        b"In the beginning God created the heaven and the earth.\nAnd the earth was"
    )
    assert not set(b"0123456789") & set(content(splits.train))


def test_the_bibles_verses_lose_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    verses = b"Ge1:1 In the beginning\n1Sm2:10 of them: 12 stones\n" * 10
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, verses))

    splits = text(source="kjv", length=10)

    assert content(splits.train).startswith(b"In the beginning\nof them: 12 stones\nIn the")


def test_without_the_bible_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(DataError, match="apt-get install bible-kjv"):
        text(source="kjv")


def test_a_source_must_be_known_and_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'novels'.*topics, stdlib, kjv"):
        text(source="novels")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"source .*'kjv'.*data\.root"):
        text(tmp_path, source="kjv")


def test_test_passages_are_spread_over_the_text_with_validation_passages_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    windows = 64 * 25
    path.write_bytes(b"".join(f"{number:04}".encode() for number in range(windows)))

    def numbers(part: Any) -> set[int]:
        return {int(bytes(window.tolist())) for window in part.tensors[0]}

    final, tuning = (text(path, length=4, held_out=0.1, split="spread", validation=held) for held in (False, True))

    assert numbers(final.test) == {number for number in range(windows) if number // 64 in (9, 19)}
    assert numbers(tuning.test) == {number for number in range(windows) if number // 64 in (8, 18)}
    everything = set(range(windows))
    assert numbers(final.train) == everything - numbers(final.test)
    assert numbers(tuning.train) == everything - numbers(final.test) - numbers(tuning.test)


def test_a_text_that_is_shorter_than_a_passage_to_hold_out_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(bytes(64 * 9))

    with pytest.raises(DataError, match=r"short\.txt: .*\b576 windows of 1\b.*\b0\b"):
        text(path, length=1, split="spread")
    with pytest.raises(ValueError, match="split .*'middle'.*end, spread"):
        text(path, length=1, split="middle")  # type: ignore[arg-type]
