"""The cores of this process: how many it may use, the threads that decode on them, and when they stand back."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

_lock = threading.Lock()
_reset_callbacks: list[Callable[[], None]] = []


def on_reset(callback: Callable[[], None]) -> Callable[[], None]:
    """Register a function that `reset` calls, for process-wide state whose types this module cannot import (torch)."""
    _reset_callbacks.append(callback)
    return callback


def reset() -> None:
    """Return all process-wide state to what it is after the first import. Not while a unit is being processed."""
    use_cores(0)
    _make_pool.cache_clear()
    for callback in _reset_callbacks:
        callback()


def decode_pool() -> ThreadPoolExecutor:
    """The process's decoding threads, one per core this process may use."""
    with _lock:  # two units that start at once must not make two
        return _make_pool()


@cache
def _make_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=cores(), thread_name_prefix="mmbeam-decode")


_share = 0  # of the cores; 0: all


def use_cores(count: int) -> None:
    """Decode on so many cores, where several processes share the machine; called before anything is read."""
    global _share
    _share = count


def cores() -> int:
    """The cores that this process may use, or those that it is told to."""
    return _share or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class _Pauses:
    """How many hold decoding up, and whether none does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self.none = threading.Event()
        self.none.set()

    def add(self, change: int) -> None:
        with self._lock:
            self._count += change
            if self._count:
                self.none.clear()
            else:
                self.none.set()


_pauses = _Pauses()
may_decode = _pauses.none  # to be waited for before a sample is given to the pool


@contextmanager
def decoding_paused() -> Iterator[None]:
    """While this lasts no unit of this process decodes a further sample; they go on reading, a little ahead.

    For a model that computes on all cores: its threads wait for each other many times a second, so that one core
    lost to decoding costs it all of them.
    """
    _pauses.add(1)
    try:
        yield
    finally:
        _pauses.add(-1)
