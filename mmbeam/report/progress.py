"""The progress line of a run or a training: units and samples done, throughput, and time left.

Runners report metrics only at the end. Live progress therefore comes from `process.progress`, which the steps in this
process update, and for workers in other processes from the units committed in the output.
"""

import logging
import os
import threading
import time
from collections import deque
from dataclasses import replace
from datetime import datetime
from typing import TextIO

from mmbeam.process import RATE_SECONDS, Progress, progress
from mmbeam.runs.commits import committed, load_reports
from mmbeam.runs.run import Run, find_run
from mmbeam.terminal import CLEAR_LINE

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0  # at least, between two listings of the committed units
POLL_FRACTION = 0.01  # of the time at most is spent on listings: a store bills each page of them
TERMINAL_SECONDS = 0.5  # between two updates of the line on a terminal
LOG_SECONDS = 10.0  # between two lines elsewhere


def progress_line(progress: Progress) -> str:
    """Return one line: units, samples, the rate of the last half minute, failures, time left."""
    rate = progress.rate()
    left = progress.seconds_left(rate)
    text = f"{progress.units_done:,}/{progress.units:,} units"
    text += f"  {progress.tally.samples + progress.kept.samples:,} samples"
    text += f"  {rate:,.0f}/s" if rate >= 10 else f"  {rate:.1f}/s"
    text += f"  {progress.tally.failed:,} samples failed" if progress.tally.failed else ""
    text += f"  {progress.units_failed:,} units FAILED" if progress.units_failed else ""
    return text if left is None else f"{text}  {clock(left)} left"


def clock(seconds: float) -> str:
    """Return a duration in seconds as 41s, 3m20s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


class Committed:
    """The progress of workers in other processes, from the units that they commit."""

    def __init__(self, run: Run, units: int) -> None:
        self.progress = Progress()
        self.progress.start(units)
        self._run = run
        self._seen: set[str] = set()
        self._is_first = True  # units of the first update were committed by an earlier launch

    def update(self) -> None:
        """Add the units that have been committed since the last update."""
        new = sorted(committed(self._run) - self._seen)
        for report in load_reports(self._run, new):
            if not self._is_first:
                self.progress.add(report.tally)
            self.progress.unit_done(report if self._is_first else replace(report, status="written"))
        self._seen.update(new)
        self._is_first = False


class ProgressLine:
    """A context manager that shows the progress of the run in `output` on `stream`.

    On a terminal, one line is rewritten in place and removed at the end. Elsewhere, a line with the time is written
    every ten seconds, so a short job writes none.
    """

    def __init__(self, output: str, stream: TextIO, seconds: float | None = None) -> None:
        self._output = output
        self._stream = stream
        self._terminal = stream.isatty()
        self._seconds = seconds or (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)
        self._committed: Committed | None = None
        self._next_update = time.monotonic() + POLL_SECONDS
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._show, name="mmbeam-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._terminal:
            self._write(CLEAR_LINE)

    def _show(self) -> None:
        if self._terminal:
            self._write(f"{CLEAR_LINE}starting")
        while not self._end.wait(self._seconds):
            if not progress.units:
                continue
            line = progress_line(self._progress())
            if self._terminal:
                columns = os.get_terminal_size(self._stream.fileno()).columns or 80
                self._write(f"{CLEAR_LINE}{line[: columns - 1]}")
            else:
                self._write(f"{datetime.now().astimezone().isoformat(timespec='seconds')}  {line}\n")

    def _progress(self) -> Progress:
        """Return the counts of this process or, if it has none, those of the committed units."""
        if progress.units_done or progress.tally.samples:
            return progress
        begin = time.monotonic()
        if begin >= self._next_update:
            try:
                if self._committed is None:
                    self._committed = Committed(find_run(self._output), progress.units)
                self._committed.update()
            except Exception as error:  # an outdated progress line must not end a job
                log.debug("%s: cannot list the committed units: %s", self._output, error)
            end = time.monotonic()
            self._next_update = end + max(POLL_SECONDS, (end - begin) / POLL_FRACTION)
        return progress if self._committed is None else self._committed.progress

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class TrainingLine:
    """Shows step, loss, samples per second and the time left on `stream`.

    On a terminal, one line is rewritten in place. Elsewhere, a line is written every ten seconds.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._seconds = TERMINAL_SECONDS if self._terminal else LOG_SECONDS
        self._shown = time.monotonic()
        self._samples = 0
        self._history = deque([(self._shown, 0, 0)])  # time, samples, steps

    def show(self, step: int, steps: int, loss: float, samples: int) -> None:
        """Count one step of training and its `samples`."""
        self._samples += samples
        now = time.monotonic()
        if now - self._shown < self._seconds:
            return
        self._shown = now
        begin, samples_before, first = self._history[0]
        rate = (self._samples - samples_before) / (now - begin)
        left = f"  {clock((steps - step) * (now - begin) / (step - first))} left" if first < step <= steps else ""
        self._history.append((now, self._samples, step))
        while len(self._history) > 1 and self._history[0][0] < now - RATE_SECONDS:
            self._history.popleft()
        self._write(f"step {step:,}/{steps:,}  loss {loss:.3f}  {rate:,.0f} samples/s{left}")

    def end(self) -> None:
        """Remove the line from a terminal. Call this at the end of the training."""
        if self._terminal:
            self._stream.write(CLEAR_LINE)
            self._stream.flush()

    def _write(self, line: str) -> None:
        self._stream.write(f"{CLEAR_LINE}{line[:79]}" if self._terminal else f"{line}\n")
        self._stream.flush()
