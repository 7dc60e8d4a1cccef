"""Pictures and sounds drawn with characters, for a terminal: enough to see what a caption speaks of."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np

from mmbeam.types import ImageHWC, Waveform

SHADES = " ░▒▓█"  # of a spectrogram, from silence to its loudest
RANGE = 4.0  # powers of ten under the loudest that are still drawn
LOWEST = 60.0  # Hz


def sketch_image(image: ImageHWC, colours: Mapping[str, tuple[int, int, int]], rows: int = 12) -> list[str]:
    """A picture uint8 [H, W, 3] as `rows` lines, twice as many characters wide: a letter of the nearest colour.

    What is clearly darker than the darkest of the colours is the background, a dot.
    """
    height, width = image.shape[:2]
    columns = max(1, round(2 * rows * width / height))
    names, table = _letters(colours), np.array(list(colours.values()), float)
    ys, xs = (((np.arange(n) + 0.5) * size / n).astype(int) for n, size in ((rows, height), (columns, width)))
    cells = image[ys][:, xs].astype(float)
    nearest = np.abs(cells[:, :, None] - table).sum(-1).argmin(-1)
    dark = cells.max(-1) < 0.8 * table.max(-1).min()
    return [
        "".join("." if shadow else names[colour] for colour, shadow in zip(*line, strict=True))
        for line in zip(nearest, dark, strict=True)
    ]


def _letters(names: Iterable[str]) -> list[str]:
    """The first letter of each name that none before it has taken."""
    taken: list[str] = []
    for name in names:
        taken.append(next((letter for letter in name.upper() if letter not in taken), "?"))
    return taken


def sketch_audio(wave: Waveform, rate: int, rows: int = 12, columns: int = 32) -> list[str]:
    """A sound float32 [frames] as a spectrogram of `rows` lines, low below, time to the right; loudness as shades.

    Rows are octaves' parts from 60 Hz to half the rate; a shade is a power of ten, a full one the loudest
    a sound of full scale has.
    """
    size = 1 << max(6, (len(wave) // columns * 2).bit_length() - 1)
    padded = np.pad(wave, (size // 2, size))
    starts = (np.arange(columns) * len(wave) / columns).astype(int)
    frames = np.stack([padded[start : start + size] for start in starts]) * np.hanning(size)
    power = np.abs(np.fft.rfft(frames)) ** 2 / (size / 4) ** 2  # 1 is a sine of full scale
    edges = np.geomspace(LOWEST, rate / 2, rows + 1) * size / rate
    bands = [power[:, int(a) : max(int(a) + 1, int(b))].max(1) for a, b in pairwise(edges)]
    level = (np.log10(np.maximum(np.array(bands), 1e-12)) + RANGE) / RANGE * (len(SHADES) - 1)
    shade = np.clip(np.ceil(level), 0, len(SHADES) - 1).astype(int)
    return ["".join(SHADES[s] for s in line) for line in shade[::-1]]
