"""What stops a run and keeps two jobs apart: the failure rate, errors of this process, the stop mark, and the lock."""

import json
import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from mmbeam.errors import FailureRateError, JobError
from mmbeam.process import on_reset
from mmbeam.runs.attempts import STALE_SECONDS, hold, is_left_behind, release
from mmbeam.runs.run import LOCK, STOP, Run
from mmbeam.runs.store import forget_file_systems, process_identity
from mmbeam.types import Failure, Tally

logger = logging.getLogger(__name__)

RATE_SAMPLES = 100  # a failure rate over fewer samples is not checked

_errors: dict[str, list[Exception]] = {}  # by launch, of the runs that this process executes
_current = threading.local()  # `launch`: of the unit that the thread processes
_tallies: dict[str, Tally] = {}  # by launch: the windows that this process has written
_tallies_lock = threading.Lock()


@on_reset
def _reset() -> None:
    _errors.clear()
    _tallies.clear()
    forget_file_systems()


# The failure rate


def count_window(run: Run, tally: Tally, failures: Sequence[Failure] = ()) -> None:
    """Add a window to this process's count, and check the failure rate of that count.

    `failures` are those of the window, one of which the error quotes. Raises FailureRateError.
    """
    with _tallies_lock:
        total = _tallies.get(run.launch_id, Tally()) + replace(tally, seconds={})
        _tallies[run.launch_id] = total
    check_failure_rate(run, total, failures)


def check_failure_rate(run: Run, tally: Tally, failures: Sequence[Failure] = ()) -> None:
    """Stop the run and raise FailureRateError if more samples have failed than the run allows.

    A row that lacks some of its outputs counts as failed: a model that fails on every image must not pass because
    another model succeeded.
    """
    samples, failed = tally.rows + tally.failed, tally.failed + tally.impaired
    if samples < RATE_SAMPLES or failed <= run.max_failure_rate * samples:
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in Counter(tally.failures).most_common(3))
    example = f"; {failures[0].key} of {failures[0].shard}: {failures[0].message}" if failures else ""
    reason = (
        f"{failed:,} of {samples:,} samples lost outputs ({failed / samples:.1%}), more than the limit of "
        f"{run.max_failure_rate:.1%}: {kinds}{example}. Raise the limit with `max_failure_rate`"
    )
    stop_run(run, reason)
    raise FailureRateError(reason)


# Errors of this process


@contextmanager
def running_here(run: Run) -> Iterator[list[Exception]]:
    """Return the list of errors that steps raise while a runner in this process executes the run, in order.

    An in-process runner reports the first error only after its other threads have ended. They call `raise_if_failed`
    before each window, so they end soon.
    """
    errors: list[Exception] = []
    _errors[run.launch_id] = errors
    try:
        yield errors
    finally:
        _errors[run.launch_id] = [JobError("the run has ended")]  # for units that are still being processed


def raise_if_failed(run: Run) -> None:
    """Raise JobError if the run has failed or ended in this process.

    ReadUnits calls it before each window, on the thread that runs the window through all steps.
    """
    _current.launch = run.launch_id
    if _errors.get(run.launch_id):
        raise JobError(f"stopped: {_errors[run.launch_id][0]}")


def record_error(error: Exception) -> None:
    """Record that a step has failed on this thread. Outside `running_here` it does nothing: the runner retries."""
    errors = _errors.get(getattr(_current, "launch", ""))
    if errors is not None:
        errors.append(error)


# The stop mark


def stop_run(run: Run, reason: str) -> None:
    """Mark the run as stopped, for all workers and retries. The first reason is kept."""
    try:
        run.store.create(STOP, json.dumps({"reason": reason, "time": time.time()}).encode())
    except FileExistsError:
        logger.info("%s is stopped already", run.store)


def stop_reason(run: Run) -> str | None:
    """Return the reason why the run was stopped; None if it was not."""
    try:
        return str(json.loads(run.store.read(STOP))["reason"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return f"{run.store}/{STOP} exists, and states no reason"


def clear_stop(run: Run) -> None:
    """Remove the stop mark and this process's count, for a new launch."""
    with _tallies_lock:
        _tallies.pop(run.launch_id, None)
    run.store.remove(STOP)


# The lock


@contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Hold the run's lock: only one job at a time may replace committed rows.

    The lock contains the process of its holder. A lock whose process has ended (runs/attempts.py) is taken over, by
    exactly one of the jobs that try.

    Raises JobError with the holder.
    """
    token = uuid.uuid4().hex
    content = json.dumps({**process_identity(), "time": time.time(), "token": token}).encode()
    try:
        run.store.create(LOCK, content)
    except FileExistsError:
        _take_over(run, content)
    hold(run.store, LOCK, content)
    try:
        yield
    finally:
        if _holder(run).get("token") == token:
            release(run.store, LOCK)


def locked_by_another(run: Run) -> bool:
    """Return whether a job of another process holds the run's lock."""
    holder = _holder(run)
    return bool(holder) and {**holder, **process_identity()} != holder


def _take_over(run: Run, content: bytes) -> None:
    holder = _holder(run)
    if is_left_behind(run.store, LOCK):
        try:  # the job that creates this file, named after the dead lock, takes over
            run.store.create(f"{LOCK}-{holder.get('token')}", content)
        except FileExistsError:
            pass
        else:
            run.store.replace(LOCK, content)
            return
    raise JobError(
        f"{run.store}/{LOCK}: another job is replacing rows of this run (process {holder.get('pid')} on "
        f"{holder.get('host')}). Wait until it ends. If it was killed on another host, run the same command after "
        f"{STALE_SECONDS / 60:.0f} minutes"
    )


def _holder(run: Run) -> dict[str, Any]:
    try:
        holder: dict[str, Any] = json.loads(run.store.read(LOCK))
    except (FileNotFoundError, ValueError):
        return {}
    return holder
