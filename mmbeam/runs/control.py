"""What keeps jobs apart and what stops them: the failure rate, the stop mark, and the lock of --retry-failures."""

import json
import logging
import os
import socket
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
from mmbeam.runs.run import LOCK, STOP, Run
from mmbeam.runs.store import forget_file_systems, process_exists
from mmbeam.types import Failure, Tally

logger = logging.getLogger(__name__)

JUDGED_SAMPLES = 100  # below so many a failure rate says little

_errors: dict[str, list[Exception]] = {}  # by launch, of those that this process runs itself
_at_work = threading.local()  # the launch whose unit a thread is at
_seen: dict[str, Tally] = {}  # by launch: what this process has settled
_seen_lock = threading.Lock()


@on_reset
def _reset() -> None:
    _errors.clear()
    _seen.clear()
    forget_file_systems()


def check_rate(run: Run, tally: Tally) -> None:
    """The same over a whole run, whatever processes it was spread over."""
    _judge(run, tally, ())


def judge(run: Run, tally: Tally, failures: Sequence[Failure] = ()) -> None:
    """Count a window's samples in this process; past the limit of failures, stop the run: FailureRateError.

    A row that lost some of its outputs counts as a failure here: a model that fails on every picture
    must not pass because the captions went well. `failures` are the window's, for an example.
    """
    with _seen_lock:
        seen = _seen.get(run.launch_id, Tally()) + replace(tally, seconds={})
        _seen[run.launch_id] = seen
    _judge(run, seen, failures)


def _judge(run: Run, seen: Tally, failures: Sequence[Failure]) -> None:
    samples, hurt = seen.rows + seen.failed, seen.failed + seen.impaired
    if samples < JUDGED_SAMPLES or hurt <= run.max_failure_rate * samples:
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in Counter(seen.failures).most_common(3))
    example = f"; {failures[0].key} of {failures[0].shard}: {failures[0].message}" if failures else ""
    reason = (
        f"{hurt:,} of {samples:,} samples lost what was due ({hurt / samples:.1%}), more than the limit of "
        f"{run.max_failure_rate:.1%}: {kinds}{example}. --max-failure-rate raises the limit"
    )
    stop(run, reason)
    raise FailureRateError(reason)


@contextmanager
def running_here(run: Run) -> Iterator[list[Exception]]:
    """While a runner in this process executes the run: what its steps raised, in order.

    Such a runner fails the run at the first error, but only once its other workers have come to their
    end: they ask `go_on` between two windows, so that this is soon.
    """
    errors: list[Exception] = []
    _errors[run.launch_id] = errors
    try:
        yield errors
    finally:
        _errors[run.launch_id] = [JobError("the run has ended")]  # for units that are still at work


def go_on(run: Run) -> None:
    """Called by a unit before each of its windows, on the thread that takes them through all steps.

    Raises JobError if the run has failed, or has ended, in this process, so that no unit need go on.
    """
    _at_work.launch = run.launch_id
    if _errors.get(run.launch_id):
        raise JobError(f"another unit has failed: {_errors[run.launch_id][0]}")


def note(error: Exception) -> None:
    """A step has failed on this thread; of no consequence where a runner tries again."""
    errors = _errors.get(getattr(_at_work, "launch", ""))
    if errors is not None:
        errors.append(error)


def stop(run: Run, reason: str) -> None:
    """Mark the run as stopped, for every worker and every retry to see. The first reason stays."""
    try:
        run.store.create(STOP, json.dumps({"reason": reason, "time": time.time()}).encode())
    except FileExistsError:
        logger.info("%s was stopped already", run.store)


def stopped(run: Run) -> str | None:
    """Why the run was stopped; None if it was not."""
    try:
        return str(json.loads(run.store.read(STOP))["reason"])
    except FileNotFoundError:
        return None


def clear_stop(run: Run) -> None:
    """Let a new launch go on: remove the mark, and forget what this process has counted."""
    with _seen_lock:
        _seen.pop(run.launch_id, None)
    run.store.remove(STOP)


@contextmanager
def lock(run: Run) -> Iterator[None]:
    """Hold the run's lock: one job at a time may replace what is committed.

    The lock names its holder's host and process. One whose process is gone from this host is taken
    over, by exactly one of those who try; one of another host is not, since nobody here can know.

    Raises JobError that says who holds it.
    """
    token = uuid.uuid4().hex
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "token": token}).encode()
    try:
        run.store.create(LOCK, mine)
    except FileExistsError:
        _take_over(run, mine)
    try:
        yield
    finally:
        if _holder(run).get("token") == token:
            run.store.remove(LOCK)


def locked_by_another(run: Run) -> bool:
    """Whether a job of another process is replacing parts of the run."""
    holder = _holder(run)
    return bool(holder) and (holder.get("host"), holder.get("pid")) != (socket.gethostname(), os.getpid())


def _take_over(run: Run, mine: bytes) -> None:
    holder = _holder(run)
    here = holder.get("host") == socket.gethostname()
    if here and not process_exists(int(holder["pid"])):
        try:  # whoever creates this file, named after the dead lock, has it to themselves
            run.store.create(f"{LOCK}-{holder['token']}", mine)
        except FileExistsError:
            pass
        else:
            run.store.replace(LOCK, mine)
            return
    raise JobError(
        f"{run.store}/{LOCK}: another job replaces parts of this run (process {holder.get('pid')} on "
        f"{holder.get('host')}). Wait for it; if it is gone, remove that file"
    )


def _holder(run: Run) -> dict[str, Any]:
    try:
        holder: dict[str, Any] = json.loads(run.store.read(LOCK))
    except FileNotFoundError:
        return {}
    return holder
