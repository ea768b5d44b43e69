"""Spectrograms of recordings, and the two data sets of speech."""

import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from ist.data.speech.log_mel import NUM_FEATURES, Samples, log_mel, mel_bands
from ist.data.speech.speech_commands import speech_commands
from ist.data.speech.spoken_digits import spoken_digits
from ist.errors import DataError
from tests.conftest import ROOT

FSDD = ROOT.parent / "shared" / "data" / "fsdd.npz"


def tone(height_hz: float, rate_hz: int, seconds: float = 1) -> Samples:
    times = np.arange(int(seconds * rate_hz)) / rate_hz
    return (10_000 * np.sin(2 * math.pi * height_hz * times)).astype(np.int16)


def write_wave(path: Path, samples: Samples, rate_hz: int, channels: int = 1) -> None:
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as stored:
        stored.setnchannels(channels)
        stored.setsampwidth(2)
        stored.setframerate(rate_hz)
        stored.writeframes(samples.astype("<i2").tobytes())


@pytest.mark.parametrize("rate_hz", [8000, 16_000])
def test_the_energy_of_a_tone_is_in_the_band_of_its_frequency(rate_hz: int) -> None:
    spectrogram = log_mel([tone(1000, rate_hz)], rate_hz)

    assert spectrogram.shape == (1, 128, 32)
    top = 2595 * math.log10(1 + rate_hz / 2 / 700)
    band = 2595 * math.log10(1 + 1000 / 700) / top * 129 - 1
    assert (spectrogram[0].argmax(dim=0) - band).abs().max() <= 1


def test_a_recording_is_truncated_or_padded_with_silence_to_one_second() -> None:
    short, long = tone(500, 8000, 0.5), tone(500, 8000, 2)

    cut, continued, silent = log_mel([long, short, short[:0]], 8000)

    assert torch.equal(cut, log_mel([long[:8000]], 8000)[0])
    assert torch.equal(continued[:, 17:], silent[:, 17:])
    assert torch.equal(continued[:, :14], cut[:, :14])


@pytest.mark.parametrize(("points", "rate_hz"), [(1024, 8000), (2048, 16_000)])
def test_every_band_contains_a_part_of_the_spectrum(points: int, rate_hz: int) -> None:
    bands = mel_bands(points, rate_hz)

    assert bands.shape == (128, points // 2 + 1)
    assert bands.sum(dim=1).min() > 1
    assert bands.max() <= 1


def test_the_spectrogram_of_a_recording_does_not_depend_on_the_others() -> None:
    recordings = [tone(200 + 10 * number, 8000, 0.3) for number in range(260)]

    together = log_mel(recordings, 8000)

    torch.testing.assert_close(together[258:259], log_mel(recordings[258:259], 8000), rtol=1e-4, atol=1e-4)


@pytest.fixture
def digits_folder(tmp_path: Path) -> Path:
    for digit in (0, 1):
        for at, speaker in enumerate(("ann", "bob", "cy")):
            for index in (0, 4, 5, 12):
                name = f"{digit}_{speaker}_{index}.wav"
                write_wave(tmp_path / "recordings" / name, tone(200 + 400 * digit + 50 * at, 8000, 0.2), 8000)
    return tmp_path


def test_the_official_test_recordings_are_the_first_five(digits_folder: Path) -> None:
    splits = spoken_digits(digits_folder)
    tuning = spoken_digits(digits_folder, validation=True)

    assert (len(splits.train), len(splits.test)) == (12, 12)
    assert (len(tuning.train), len(tuning.test)) == (6, 6)
    inputs, targets = splits.train.tensors
    assert (inputs.shape, inputs.dtype, targets.dtype) == ((12, NUM_FEATURES), torch.float32, torch.int64)
    assert abs(float(inputs.mean())) < 1e-4
    assert abs(float(inputs.std()) - 1) < 1e-4
    assert targets.tolist() == [0] * 6 + [1] * 6


def test_a_split_by_speaker_tests_on_a_new_voice(digits_folder: Path) -> None:
    splits = spoken_digits(digits_folder, split="speaker")
    tuning = spoken_digits(digits_folder, split="speaker", validation=True)

    assert (len(splits.train), len(splits.test)) == (16, 8)
    assert (len(tuning.train), len(tuning.test)) == (8, 8)
    with pytest.raises(ValueError, match="'voice'.*'official' or 'speaker'"):
        spoken_digits(digits_folder, split="voice")  # type: ignore[arg-type]


def test_a_file_of_arrays_gives_the_same_data_as_the_folder(digits_folder: Path, tmp_path: Path) -> None:
    paths = sorted((digits_folder / "recordings").glob("*.wav"))
    recordings = []
    for path in paths:
        with wave.open(str(path)) as stored:
            recordings.append(np.frombuffer(stored.readframes(stored.getnframes()), dtype="<i2"))
    names = np.array([path.stem.split("_") for path in paths])
    np.savez(
        tmp_path / "digits.npz",
        samples=np.concatenate(recordings),
        offsets=np.cumsum([0, *map(len, recordings)]),
        digit=names[:, 0].astype(int),
        speaker=names[:, 1],
        index=names[:, 2].astype(int),
    )

    expected, found = spoken_digits(digits_folder), spoken_digits(tmp_path / "digits.npz")

    assert torch.equal(expected.test.tensors[0], found.test.tensors[0])
    assert torch.equal(expected.test.tensors[1], found.test.tensors[1])


def test_missing_or_malformed_recordings_are_named(digits_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="free-spoken-digit-dataset"):
        spoken_digits()
    with pytest.raises(DataError, match="nothing: .*free-spoken-digit-dataset"):
        spoken_digits(tmp_path / "nothing")
    path = digits_folder / "recordings" / "0_ann_7.wav"
    write_wave(path, tone(100, 16_000), 16_000)
    with pytest.raises(DataError, match=r"0_ann_7\.wav: .*\(1, 16, 16000\).*\(1, 16, 8000\)"):
        spoken_digits(digits_folder)
    path.write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"0_ann_7\.wav"):
        spoken_digits(digits_folder)
    path.rename(path.with_name("zero.wav"))
    with pytest.raises(DataError, match=r"zero\.wav: .*'7_jackson_32\.wav'"):
        spoken_digits(digits_folder)


@pytest.mark.skipif(not FSDD.exists(), reason=f"{FSDD} does not exist")
def test_the_spoken_digits_have_the_published_sizes() -> None:
    splits = spoken_digits(FSDD)

    assert (len(splits.train), len(splits.test)) == (2700, 300)
    assert torch.equal(splits.test.tensors[1].bincount(), torch.full((10,), 30))


@pytest.fixture
def commands_folder(tmp_path: Path) -> Path:
    for at, word in enumerate(("yes", "no", "_background_noise_")):
        for name in "abcd":
            write_wave(tmp_path / word / f"{name}.wav", tone(300 + 200 * at, 16_000), 16_000)
    (tmp_path / "validation_list.txt").write_text("yes/c.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/d.wav\nyes/d.wav\n")
    return tmp_path


def test_speech_commands_follow_the_published_lists(commands_folder: Path) -> None:
    splits = speech_commands(commands_folder)
    tuning = speech_commands(commands_folder, validation=True)

    assert splits.train.tensors[0].shape == (5, NUM_FEATURES)
    assert splits.train.tensors[1].tolist() == [0, 0, 0, 1, 1]
    assert splits.test.tensors[1].tolist() == [0, 1]
    assert torch.equal(tuning.train.tensors[0], splits.train.tensors[0])
    assert tuning.test.tensors[1].tolist() == [1]
    assert abs(float(splits.train.tensors[0].mean())) < 1e-4


def test_missing_parts_of_speech_commands_are_named(commands_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"speech_commands_v0\.02\.tar\.gz"):
        speech_commands()
    with pytest.raises(DataError, match=r"nothing: .*speech_commands_v0\.02\.tar\.gz"):
        speech_commands(tmp_path / "nothing")
    (commands_folder / "no" / "d.wav").unlink()
    with pytest.raises(DataError, match=r"\b1 .*'no/d\.wav'"):
        speech_commands(commands_folder)
    (commands_folder / "testing_list.txt").unlink()
    with pytest.raises(DataError, match=r"testing_list\.txt: .*speech_commands_v0\.02\.tar\.gz"):
        speech_commands(commands_folder)
