"""The line that shows how far a training is."""

import time
from collections import deque
from typing import TextIO

from mmbeam.process import CLEAR_LINE, RATE_SECONDS
from mmbeam.report.progress import LOG_SECONDS, TERMINAL_SECONDS, clock


class TrainingLine:
    """Shows step, loss, samples per second and the time left on `stream`.

    On a terminal one line is rewritten in place; elsewhere a line is written every ten seconds.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._seconds = TERMINAL_SECONDS if self._terminal else LOG_SECONDS
        self._shown = time.monotonic()
        self._samples = 0
        self._history = deque([(self._shown, 0, 0)])  # time, samples, steps

    def show(self, step: int, steps: int, loss: float, samples: int) -> None:
        """A step was done, with so many samples."""
        self._samples += samples
        now = time.monotonic()
        if now - self._shown < self._seconds:
            return
        self._shown = now
        then, before, first = self._history[0]
        rate = (self._samples - before) / (now - then)
        left = f"  {clock((steps - step) * (now - then) / (step - first))} left" if first < step <= steps else ""
        self._history.append((now, self._samples, step))
        while len(self._history) > 1 and self._history[0][0] < now - RATE_SECONDS:
            self._history.popleft()
        self._write(f"step {step:,}/{steps:,}  loss {loss:.3f}  {rate:,.0f} samples/s{left}")

    def end(self) -> None:
        """Nothing more is shown: take the line off a terminal."""
        if self._terminal:
            self._stream.write(CLEAR_LINE)
            self._stream.flush()

    def _write(self, line: str) -> None:
        self._stream.write(f"{CLEAR_LINE}{line[:79]}" if self._terminal else f"{line}\n")
        self._stream.flush()
