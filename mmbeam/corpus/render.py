"""Scenes rendered as pixels and waveforms, fast enough to render during training.

Image and audio of a scene are the same at every resolution and sampling rate, except for film grain and a
faint noise floor, which are generated at the requested resolution.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mmbeam.corpus.scene import (
    COLOURS,
    LOUDNESSES,
    PITCHES,
    POSITIONS,
    SIZES,
    TEMPI,
    Key,
    Scene,
    Shape,
    Stream,
    between,
    grains,
    uniforms,
)
from mmbeam.errors import UsageError
from mmbeam.types import ImageHWC, Waveform

Floats = npt.NDArray[np.floating[Any]]  # float32, which numpy's annotations cannot express

MIN_SIDE = 32  # pixels; smaller shapes would be unrecognisable
MIN_RATE = 8000  # Hz; all frequencies are below 4 kHz, so higher rates sample the same signal
SECONDS = 1  # of audio; a bin of its spectrum is 1 Hz wide


def render_image(scene: Scene, side: int = 64) -> ImageHWC:
    """Return the image, uint8 [side, side, 3]: anti-aliased shapes on a dark, soft, grainy background."""
    if side < MIN_SIDE:
        raise UsageError(f"image side of {side} pixels; expected at least {MIN_SIDE}")
    key = (scene.seed, scene.index)
    u = uniforms(key, Stream.IMAGE, 68)
    pixels = _background(u[:53], side)
    for shape, jitter in zip(scene.shapes, (u[53:60], u[60:67]), strict=False):
        _paint(pixels, shape, jitter, side / 64)
    grain = grains(key, Stream.GRAIN, side * side).reshape(side, side, 1)
    pixels += grain * np.float32(7 * u[67])  # at most 7 of 255
    np.clip(pixels, 0, 255, out=pixels)
    return pixels.astype(np.uint8)


def _background(u: npt.NDArray[np.float64], side: int) -> Floats:
    """Return a bumpy gradient, interpolated from colours at 4 x 4 points: float32 [side, side, 3]."""
    angle = 2 * math.pi * u[0]
    steps = np.linspace(-1, 1, 4)
    slope = np.add.outer(steps * math.sin(angle), steps * math.cos(angle))
    colour = 40 + 40 * u[1] + 36 * (u[2:5] - 0.5)
    points = colour + 22 * slope[:, :, None] + 16 * (u[5:53].reshape(4, 4, 3) - 0.5)
    blend = _blend(side)
    rows = np.tensordot(blend, points.astype(np.float32), 1)  # [side, 4, 3]
    pixels: Floats = np.matmul(blend, rows)
    return pixels


@lru_cache(maxsize=8)
def _blend(side: int) -> Floats:
    """Return the cosine interpolation weights of four points along `side` pixels: float32 [side, 4]."""
    place = 3 * (np.arange(side) + 0.5)[:, None] / side
    near = np.clip(1 - np.abs(place - np.arange(4)), 0, 1)
    weights: Floats = (1 - np.cos(np.pi * near)) / 2
    return weights.astype(np.float32)


def _paint(pixels: Floats, shape: Shape, u: npt.NDArray[np.float64], scale: float) -> None:
    """Paint a shape over `pixels`, with jitter of position, radius, angle and colour."""
    row, column = divmod(POSITIONS.index(shape.position), 3)
    y = scale * (15 + 17 * row + between(u[0], (-0.7, 0.7)))
    x = scale * (15 + 17 * column + between(u[1], (-0.7, 0.7)))
    radius = scale * between(u[2], SIZES[shape.size])
    top, left = max(0, int(y - 1.3 * radius)), max(0, int(x - 1.3 * radius))
    box = pixels[top : int(y + 1.3 * radius) + 2, left : int(x + 1.3 * radius) + 2]
    ys = ((np.arange(top, top + box.shape[0]) + 0.5 - y) / radius).astype(np.float32)[:, None]
    xs = ((np.arange(left, left + box.shape[1]) + 0.5 - x) / radius).astype(np.float32)
    tilt = between(u[3], (-0.14, 0.14))  # radians: 8 degrees
    sine, cosine = np.float32(math.sin(tilt)), np.float32(math.cos(tilt))
    distance = _distance(shape.form, cosine * xs + sine * ys, cosine * ys - sine * xs)
    cover = np.clip(0.5 - distance * np.float32(radius), 0, 1)[:, :, None]  # fraction of each pixel
    colour = (np.array(COLOURS[shape.colour]) + 16 * (u[4:7] - 0.5)).astype(np.float32)
    box += cover * (colour - box)


def _distance(form: str, x: Floats, y: Floats) -> Floats:
    """Return the signed distance from the edge of a form of radius about 1: negative inside, exact near the edge."""
    radius: Floats = np.hypot(x, y)
    near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    distance: Floats
    match form:
        case "circle":
            distance = radius - 1
        case "ring":
            distance = np.abs(radius - 0.76) - 0.26
        case "square":
            distance = far - 0.88
        case "cross":
            distance = np.maximum(far - 1, near - 0.34)
        case "triangle":  # inside all of three lines
            distance = np.max(_lines(x, y - 0.3, 3), axis=0) - 0.6
        case _:  # star: inside at least four of five lines
            distance = np.sort(_lines(x, 0.11 - y, 5), axis=0)[-2] - 0.36
    return distance


def _lines(x: Floats, y: Floats, count: int) -> Floats:
    """Return the coordinates of x, y along `count` evenly spaced directions, the first of which is y."""
    angles = 2 * np.pi * np.arange(count) / count
    sines, cosines = (f(angles).astype(np.float32)[:, None, None] for f in (np.sin, np.cos))
    distances: Floats = sines * x + cosines * y
    return distances


def render_audio(scene: Scene, rate: int = MIN_RATE) -> Waveform:
    """Return one second of audio, float32 [rate]."""
    if rate < MIN_RATE:
        raise UsageError(f"sampling rate of {rate} Hz; expected at least {MIN_RATE}")
    key, sound = (scene.seed, scene.index), scene.sound
    u = uniforms(key, Stream.AUDIO, 8).tolist()
    pitch = between(u[0], PITCHES[sound.pitch])
    wave = _noise(key, pitch, rate) if sound.kind == "noise" else _tone(sound.kind, pitch, u[1], rate)
    wave *= np.float32(between(u[2], LOUDNESSES[sound.loudness])) * _fade(rate)
    if sound.tempo != "steady":
        wave *= _pulses(between(u[3], TEMPI[sound.tempo]), u[4], rate)
    wave += grains(key, Stream.FLOOR, rate) * np.float32(0.002 * u[5])  # at least 25 dB below a quiet sound
    return wave


@lru_cache(maxsize=8)
def _seconds(rate: int) -> npt.NDArray[np.float64]:
    return np.arange(rate * SECONDS) / rate


@lru_cache(maxsize=8)
def _fade(rate: int) -> Floats:
    """Return an envelope that fades in and out over 10 ms, which avoids clicks."""
    time = _seconds(rate)
    return np.clip(np.minimum(time, SECONDS - time) / 0.01, 0, 1).astype(np.float32)


def _sine(cycles: npt.NDArray[np.float64]) -> Floats:
    """Return the sine of `cycles` turns. Whole turns are removed in float64, since float32 would lose the phase."""
    turn = (cycles - np.floor(cycles)).astype(np.float32)
    sine: Floats = np.sin(turn * np.float32(2 * math.pi))
    return sine


def _tone(kind: str, pitch: float, phase: float, rate: int) -> Floats:
    """Return a tone, or a chirp between 2/3 and 3/2 of `pitch`; RMS 1."""
    time = _seconds(rate)
    start, end = {"tone": (1.0, 1.0), "rising chirp": (2 / 3, 3 / 2), "falling chirp": (3 / 2, 2 / 3)}[kind]
    sine = _sine(phase + pitch * time * (start + (end - start) / 2 * time))
    return sine * (np.float32(1.75) - sine * sine) * np.float32(1 / 0.729)  # sin x + 1/4 sin 3x


def _noise(key: Key, pitch: float, rate: int) -> Floats:
    """Return noise of 1.6 octaves around twice `pitch`, from a spectrum that does not depend on the rate; RMS 1."""
    low, high = round(2 * pitch / 2**0.8), round(2 * pitch * 2**0.8)
    turns = 2 * np.pi * uniforms(key, Stream.SPECTRUM, high - low)
    spectrum = np.zeros(rate // 2 + 1, np.complex128)
    spectrum[low:high] = np.exp(1j * turns) * (rate / 2 * math.sqrt(2 / (high - low)))
    return np.fft.irfft(spectrum, rate).astype(np.float32)


def _pulses(frequency: float, phase: float, rate: int) -> Floats:
    """Return an envelope between 0 and 1 that opens `frequency` times a second."""
    sine = _sine(phase + frequency * _seconds(rate))
    opening: Floats = np.clip(np.float32(0.5) + np.float32(1.2) * sine, 0, 1)
    return opening
