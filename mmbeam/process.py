"""Process-wide state: cores, decoding threads and progress counters. `reset` restores its initial values.

State whose types this module cannot import (torch devices, runs, file systems) is kept where those types are, and
registered by `on_reset`.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

from mmbeam.types import RawSample, Sample, StepBegun, Tally, UnitReport

RATE_SECONDS = 30.0  # the throughput shown is that of the last RATE_SECONDS

_lock = threading.Lock()
_reset_callbacks: list[Callable[[], None]] = []


def on_reset(callback: Callable[[], None]) -> Callable[[], None]:
    """Register a function that `reset` calls. A decorator."""
    _reset_callbacks.append(callback)
    return callback


def reset() -> None:
    """Reset all process-wide state to its initial values. Must not be called while a unit is being processed."""
    use_cores(0)
    _make_pool.cache_clear()
    progress.relay = None
    progress.start(0)
    steps.relay = None
    for callback in _reset_callbacks:
        callback()


# Cores and decoding


def decode_pool() -> ThreadPoolExecutor:
    """Return the process's decoding threads, one per core this process may use."""
    with _lock:  # two units that start simultaneously must not make two pools
        return _make_pool()


@cache
def _make_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=cores(), thread_name_prefix="mmbeam-decode")


_core_limit = 0  # 0: all


def use_cores(count: int) -> None:
    """Limit this process to `count` cores; 0 is no limit. To be called before anything is read."""
    global _core_limit
    _core_limit = count


def cores() -> int:
    """Return the number of cores that this process may use."""
    return _core_limit or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


may_decode = threading.Event()  # to be waited for before a sample is submitted to the pool
may_decode.set()
_pauses = 0


@contextmanager
def decoding_paused() -> Iterator[None]:
    """Pause decoding: readers submit no samples to the decoding threads, but still read a little ahead.

    For a model that computes on all cores: its threads synchronise many times a second, so that one core
    taken by decoding delays all of them.
    """
    _add_pause(1)
    try:
        yield
    finally:
        _add_pause(-1)


def _add_pause(change: int) -> None:
    global _pauses
    with _lock:
        _pauses += change
        if _pauses:
            may_decode.clear()
        else:
            may_decode.set()


class MemoryBudget:
    """Bytes that the large values of all units of this process may take. Requests are granted in order."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._used = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    def acquire(self, nbytes: int) -> int:
        """Wait until `nbytes` are free, reserve them and return their number; at most the whole budget."""
        granted = min(nbytes, self.nbytes)
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket and self._used + granted <= self.nbytes)
            self._waiting.popleft()
            self._used += granted
            self._changed.notify_all()
        return granted

    def release(self, nbytes: int) -> None:
        """Release the bytes that `acquire` granted."""
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()


# Progress


class Progress:
    """Counters of one run. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.relay: Callable[[Tally], None] | None = None  # in a worker process: sends each tally to the launcher
        self.start(0)

    def start(self, units: int) -> None:
        """Reset the counters for a run of `units` units."""
        with self._lock:
            self.units = units
            self.units_done = 0
            self.units_failed = 0  # of those done
            self.tally = Tally()  # of this launch
            self.kept = Tally()  # of units that an earlier launch committed
            self.finished = Tally()  # of all units that are done and have not failed
            self._history = deque([(time.monotonic(), 0)])  # samples of this launch, by time

    def add(self, tally: Tally) -> None:
        """Add a window's counts."""
        with self._lock:
            self.tally += tally
        if self.relay is not None:
            self.relay(tally)

    def unit_done(self, report: UnitReport) -> None:
        """Count a unit that is committed, now or before, or that failed."""
        with self._lock:
            self.units_done += 1
            if report.status == "failed":
                self.units_failed += 1
                return
            self.finished += report.tally
            if report.status == "kept":
                self.kept += report.tally

    def rate(self) -> float:
        """Return the samples per second of the last RATE_SECONDS."""
        with self._lock:
            now = time.monotonic()
            self._history.append((now, self.tally.samples))
            while len(self._history) > 2 and self._history[1][0] <= now - RATE_SECONDS:
                self._history.popleft()
            then, samples = self._history[0]
            return (self.tally.samples - samples) / max(now - then, 1e-9)

    def seconds_left(self, rate: float) -> float | None:
        """Return the seconds left, assuming that units to come hold as many samples as finished ones. None: unknown."""
        with self._lock:
            finished = self.units_done - self.units_failed
            if not rate or not finished or self.units_done >= self.units:
                return None
            expected = self.finished.samples / finished * (self.units - self.units_failed)
            return max(expected - self.kept.samples - self.tally.samples, 0) / rate


progress = Progress()  # of this process


class Steps:
    """Announces the steps that a child process begins. Without a `relay` it does nothing."""

    relay: Callable[[StepBegun], None] | None = None  # sends the parent process what begins

    def begin(self, step: str, samples: Iterable[RawSample | Sample]) -> None:
        """Announce that `step` begins on `samples`."""
        if self.relay is not None:
            self.relay(StepBegun(step, tuple(sample.id for sample in samples)))


steps = Steps()  # of this process
