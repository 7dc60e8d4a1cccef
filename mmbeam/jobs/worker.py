"""A worker process of `--workers`: it does the units that its launcher sends, and ends when its launcher does.

Launcher and worker send each other pickles over a pair of sockets: the worker gets where modules are found and how
much is logged, then the work, then units; it answers with counts while a unit is at work, and at its end with its
report or with what was raised. Nothing slow is imported here: unpickling the work does it, with the number of
threads in the environment. The launcher's side is workers.py.
"""

import logging
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from mmbeam.errors import JobError
from mmbeam.report.progress import CLEAR_LINE
from mmbeam.types import Tally, UnitReport, WorkUnit

Answer = Tally | UnitReport | Exception


class Work(Protocol):
    """What is done with each unit. It pickles, and is called by several threads at once."""

    def __call__(self, unit: WorkUnit, tell: Callable[[Tally], None]) -> UnitReport:
        """Do the unit; `tell` what was counted on the way."""


@dataclass(frozen=True)
class Surroundings:
    """What a worker process takes over from its launcher before anything of the work is imported."""

    path: list[str]  # where modules are found
    log_level: int  # of the libraries,
    own_log_level: int  # and of mmbeam
    at_once: int  # units


def serve(descriptor: int) -> None:
    """Do what is sent until the launcher is gone; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher as well, which ends this process
    launcher = Connection(descriptor)
    lock = threading.Lock()

    def answer(message: Answer) -> None:
        with lock:
            launcher.send(message)

    try:
        surroundings: Surroundings = launcher.recv()
        _set_up(surroundings)
        work = _receive_work(launcher, answer)
        pool = ThreadPoolExecutor(surroundings.at_once)
        while True:
            pool.submit(_do, work, launcher.recv(), answer)
    except (EOFError, OSError):
        os._exit(0)  # at once: a unit is committed whole or not at all


def _set_up(surroundings: Surroundings) -> None:
    sys.path[:] = surroundings.path
    line = f"{CLEAR_LINE if os.isatty(2) else ''}%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=line, level=surroundings.log_level, stream=sys.stderr)
    logging.getLogger("mmbeam").setLevel(surroundings.own_log_level)


def _receive_work(launcher: Connection, answer: Callable[[Answer], None]) -> Work:
    pickled = launcher.recv_bytes()
    try:
        work: Work = pickle.loads(pickled)
    except Exception as error:
        answer(_portable(error))
        raise EOFError from error
    return work


def _do(work: Work, unit: WorkUnit, answer: Callable[[Answer], None]) -> None:
    try:
        report = work(unit, answer)
    except BaseException as error:  # a library's sys.exit too: who is never answered waits for ever
        answer(_portable(error))
    else:
        answer(report)


def _portable(error: BaseException) -> Exception:
    """The error, or a JobError that says the same if it does not survive pickling; its traceback is a note."""
    answer = (
        error if isinstance(error, Exception) and _survives(error) else JobError(f"{type(error).__name__}: {error}")
    )
    answer.add_note(f"In worker process {os.getpid()}:\n{traceback.format_exc()}")
    return answer


def _survives(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False
