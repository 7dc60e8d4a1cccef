"""The progress line: the units done, the throughput, and the time remaining.

Runners report metrics only at the end. Live progress therefore comes from the steps of this process, and for workers
elsewhere from the units that are committed in the output. It does not affect the job.
"""

import logging
import os
import threading
import time
from collections import deque
from dataclasses import replace
from typing import TextIO

from mmbeam.process import RATE_SECONDS, Progress, progress
from mmbeam.runs.commits import committed, load_reports
from mmbeam.runs.run import Run, find_run
from mmbeam.terminal import CLEAR_LINE

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0  # between two looks at what is committed, or
POLL_SHARE = 0.01  # of the time at most, where many pages are to be listed: a store bills each
TERMINAL_SECONDS = 0.5  # between two lines on a terminal, which is rewritten in place,
LOG_SECONDS = 10.0  # and elsewhere


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
    """Return a duration in short form: 41s, 3m20s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


class Committed:
    """The progress of workers of other processes, from the units that they commit."""

    def __init__(self, run: Run, units: int) -> None:
        self.progress = Progress()
        self.progress.start(units)
        self._run = run
        self._seen: set[str] = set()
        self._before = True  # the first look finds what an earlier launch committed

    def look(self) -> None:
        """Take in what has been committed since the last look."""
        new = sorted(committed(self._run) - self._seen)
        for report in load_reports(self._run, new):
            if not self._before:
                self.progress.add(report.tally)
            self.progress.unit_done(report if self._before else replace(report, status="written"))
        self._seen.update(new)
        self._before = False


class ProgressLine:
    """A context manager that shows the progress of the run in `output` on `stream` while it works.

    On a terminal one line is rewritten in place and removed at the end; elsewhere a line is written every
    ten seconds, so a quick job writes none.
    """

    def __init__(self, output: str, stream: TextIO, seconds: float | None = None) -> None:
        self._output = output
        self._stream = stream
        self._terminal = stream.isatty()
        self._seconds = seconds or (TERMINAL_SECONDS if self._terminal else LOG_SECONDS)
        self._elsewhere: Committed | None = None
        self._next_look = time.monotonic() + POLL_SECONDS
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
        while not self._end.wait(self._seconds):
            if not progress.units:
                self._write(f"{CLEAR_LINE}starting" if self._terminal else "")
                continue
            line = progress_line(self._progress())
            self._write(f"{CLEAR_LINE}{line[: self._columns() - 1]}" if self._terminal else f"{line}\n")

    def _progress(self) -> Progress:
        """The counts of this process; if it has none, the counts of the committed units."""
        if progress.units_done or progress.tally.samples:
            return progress
        if time.monotonic() >= self._next_look:
            began = time.monotonic()
            self._look()
            now = time.monotonic()
            self._next_look = now + max(POLL_SECONDS, (now - began) / POLL_SHARE)
        return progress if self._elsewhere is None else self._elsewhere.progress

    def _look(self) -> None:
        try:
            if self._elsewhere is None:
                self._elsewhere = Committed(find_run(self._output), progress.units)
            self._elsewhere.look()
        except Exception as error:  # an outdated line must not end the job
            log.debug("%s: cannot read the committed units: %s", self._output, error)

    def _columns(self) -> int:
        return os.get_terminal_size(self._stream.fileno()).columns or 80

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


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
        """Count one step of training and its `samples`."""
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
