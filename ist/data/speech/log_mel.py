"""Log-mel spectrograms of speech: the logarithm of the energy in 128 frequency bands, in 32 frames of one second.

The bands are triangular filters, evenly spaced on the mel scale of HTK (S. Young et al., "The HTK Book", section 5.4),
from 0 Hz to half the sampling rate.

Where it sits: `speech_commands.py` and `spoken_digits.py` use it.
Not here: finding the recordings.
"""

import math
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from ist.data.registry import Splits
from ist.errors import DataError

NUM_MELS, NUM_FRAMES = 128, 32

NUM_FEATURES = NUM_MELS * NUM_FRAMES

_FLOOR = 1e-6  # about the energy in a band of the rounding errors of 16-bit samples
_AT_ONCE = 256

Samples = NDArray[np.int16]


def log_mel(recordings: Sequence[Samples], rate_hz: int) -> Tensor:
    """Return the spectrograms of recordings, which are truncated or padded with silence to one second.

    A hop is 1/32 of a second, and a frame is two hops long. Its spectrum uses a Hann window and at least as many zeros
    as samples, because the lowest bands would otherwise be narrower than the spectrum's resolution.

    Args:
        recordings: int16, each of shape (samples,).
        rate_hz: Samples per second; at least 1,000.

    Returns:
        float32, shape (recordings, 128, 32): natural logarithms.
    """
    step = rate_hz // NUM_FRAMES
    window = torch.hann_window(2 * step)
    points = 2 ** math.ceil(math.log2(4 * step))
    bands = mel_bands(points, rate_hz)
    spectrograms = torch.empty(len(recordings), NUM_MELS, NUM_FRAMES)
    for start in range(0, len(recordings), _AT_ONCE):
        some = recordings[start : start + _AT_ONCE]
        waves = np.zeros((len(some), (NUM_FRAMES + 1) * step), dtype=np.float32)
        for row, samples in zip(waves, some, strict=True):
            used = samples[: NUM_FRAMES * step]
            row[step // 2 : step // 2 + len(used)] = used  # half a hop of silence before and after
        frames = torch.from_numpy(waves / 2**15).unfold(1, 2 * step, step) * window
        spectrum: Tensor = torch.fft.rfft(frames, n=points)
        energy = (spectrum.real.square() + spectrum.imag.square()) @ bands.T
        spectrograms[start : start + len(some)] = (energy + _FLOOR).log().transpose(1, 2)
    return spectrograms


def mel_bands(points: int, rate_hz: int) -> Tensor:
    """Return the weight of each bin of a spectrum in each band.

    Args:
        points: The number of samples from which the spectrum is computed.
        rate_hz: Samples per second.

    Returns:
        float32, shape (128, points // 2 + 1), in [0, 1].
    """
    pitches = torch.linspace(0, 2595 * math.log10(1 + rate_hz / 2 / 700), NUM_MELS + 2, dtype=torch.float64)
    corners = 700 * (10 ** (pitches / 2595) - 1)
    heights = torch.arange(points // 2 + 1, dtype=torch.float64) * rate_hz / points
    low, middle, high = (corners[at : at + NUM_MELS, None] for at in range(3))
    rising, falling = (heights - low) / (middle - low), (high - heights) / (high - middle)
    return torch.minimum(rising, falling).clamp_min(0).float()


def as_splits(train: Tensor, train_targets: Tensor, held_out: Tensor, held_out_targets: Tensor) -> Splits:
    """Return spectrograms as rows of 4,096 numbers, standardized with the mean and deviation of the training data.

    The spectrograms are changed in place, because there may not be memory for a copy.

    Args:
        train: float32, shape (recordings, 128, 32).
        train_targets: int64, shape (recordings,).
        held_out: The held-out spectrograms, of the same form.
        held_out_targets: Their targets.
    """
    mean, deviation = train.mean(), train.std().clamp_min(1e-6)
    for spectrograms in (train, held_out):
        spectrograms.sub_(mean).div_(deviation)
    return Splits(TensorDataset(train.flatten(1), train_targets), TensorDataset(held_out.flatten(1), held_out_targets))


def read_wave(path: Path, rate_hz: int) -> Samples:
    """Return the samples of a .wav file: int16, shape (samples,).

    Raises:
        DataError: The file cannot be read, or is not one channel of 16 bits at `rate_hz`.
    """
    try:
        with wave.open(str(path), "rb") as stored:
            found = stored.getnchannels(), 8 * stored.getsampwidth(), stored.getframerate()
            raw = stored.readframes(stored.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{path}: cannot be read as .wav: {error or 'it is truncated'}") from error
    if found != (1, 16, rate_hz):
        raise DataError(f"{path}: has (channels, bits, Hz) {found}: expected (1, 16, {rate_hz})")
    return np.frombuffer(raw, dtype="<i2").astype(np.int16)
