"""The worker processes of the `workers` option: the launcher, the worker, and how they share devices and cores.

Each process runs the pipeline's fused stage, from reading to writing, over one unit after another, as a runner would
run it over a bundle. It has its share of the cores: the environment in which it starts tells every library that
computes how many threads to make, before any of them is imported. Units are sent one by one, to the first process with
room, so that a slow unit delays no other. A worker process that ends by itself (killed by the kernel when memory is
short) ends the job.

Launcher and worker exchange pickles over a pair of sockets. The worker receives the module path and log levels, then
the work, then units. It answers with counts while a unit is being processed, and at its end with the report or the
error. Nothing slow is imported here: unpickling the work does that.

Alternatives that were rejected: Beam's multi_processing mode (a killed process makes the job hang for ever, an error
shows only after the units before it, units are divided beforehand), and one ProcessPoolExecutor per worker (it runs one
unit at a time, where two share a model here; it imports the launcher's __main__ again, so that a script without a
__main__ guard fails; and only its private attributes tell how a process ended).
"""

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

from mmbeam.errors import JobError
from mmbeam.process import cores, progress, use_cores
from mmbeam.terminal import log_to_stderr
from mmbeam.types import Tally, UnitReport, WorkUnit

if TYPE_CHECKING:
    import apache_beam as beam

# Every library that computes in threads of its own reads one of these.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_SERVE = "import sys; from mmbeam.jobs.workers import serve; serve(int(sys.argv[1]))"


class Work(Protocol):
    """Processes one unit. It pickles, and is called by several threads simultaneously."""

    def __call__(self, unit: WorkUnit, tell: Callable[[Tally], None]) -> UnitReport:
        """Process the unit; call `tell` with counts on the way."""


# What a job's worker process does


@dataclass(frozen=True)
class UnitWork:
    """Runs a unit through the steps, on the process's devices and cores."""

    steps: Callable[[], Sequence["beam.DoFn"]]  # made anew for each unit, since a DoFn belongs to one thread
    devices: tuple[str, ...]
    cores: int

    def __call__(self, unit: WorkUnit, tell: Callable[[Tally], None]) -> UnitReport:
        """Run the unit as a bundle of one element through the fused stage."""
        from mmbeam.models import placement  # imports torch, so only in a process that computes

        placement.use_devices(self.devices)
        use_cores(self.cores)
        progress.relay = tell
        steps, flow = self.steps(), cast(Iterator[Any], iter([unit]))
        try:
            for step in steps:
                step.start_bundle()
                flow = chain.from_iterable(map(step.process, flow))
            report: UnitReport
            (report,) = flow
            for step in steps:
                step.finish_bundle()
        finally:
            for step in steps:
                step.teardown()
        return report


def share_cores(count: int, workers: int) -> list[int]:
    """Return the number of cores of each worker process: as equal as possible, at least one."""
    return [max(1, count // workers + (number < count % workers)) for number in range(workers)]


def share_devices(devices: Sequence[str], workers: int) -> list[tuple[str, ...]]:
    """Return the devices of each worker process: its part of them, or one of them where there are too few."""
    return [tuple(devices[number::workers]) or (devices[number % len(devices)],) for number in range(workers)]


def make_workers(
    steps: Callable[[], Sequence["beam.DoFn"]], devices: Sequence[str], count: int, units_per_device: int
) -> "Workers":
    """Return `count` worker processes, not yet started, that run units through the steps."""
    devices_of_workers, cores_of_workers = share_devices(devices, count), share_cores(cores(), count)
    works = [UnitWork(steps, *share) for share in zip(devices_of_workers, cores_of_workers, strict=True)]
    return Workers(works, cores_of_workers, units_per_process=units_per_device * max(map(len, devices_of_workers)))


# The launcher's side


class Workers:
    """Worker processes, one for each of `works`. A context manager: entering starts them, leaving kills them.

    `threads` is the number of compute threads of each process, `units_per_process` the units it has in flight.
    """

    def __init__(self, works: Sequence[Work], threads: Sequence[int], units_per_process: int) -> None:
        self._works = works
        self._threads = threads
        self._units_per_process = units_per_process
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        levels = logging.getLogger("mmbeam").getEffectiveLevel(), logging.getLogger().getEffectiveLevel()
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            for threads in self._threads:
                ours, theirs = Pipe()
                environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
                command = [sys.executable, "-W", "ignore", "-c", _SERVE, str(theirs.fileno())]
                with theirs:
                    self._processes[ours] = subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()]
                    )
            for connection, work in zip(self._processes, self._works, strict=True):
                self._send(connection, (sys.path, levels, self._units_per_process))
                self._send(connection, work)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the processes, whatever they are doing: a unit is committed whole or not at all."""
        for connection, process in self._processes.items():
            process.kill()
            process.wait()
            connection.close()
        self._processes.clear()

    def do(self, units: Iterable[WorkUnit], tell: Callable[[Tally], None]) -> Iterator[UnitReport]:
        """Yield the units' reports as they are done; call `tell` with the counts on the way.

        Raises what a worker process raised, and JobError if one has ended. May be called again once exhausted.
        """
        left = iter(units)
        in_flight = dict.fromkeys(self._processes, 0)

        def send_next(connection: Connection) -> None:
            for unit in left:
                self._send(connection, unit)
                in_flight[connection] += 1
                return

        for connection in list(self._processes) * self._units_per_process:  # each has one before any has two
            send_next(connection)
        while any(in_flight.values()):
            for ready in wait([connection for connection, count in in_flight.items() if count]):
                connection = cast(Connection, ready)
                try:
                    answer = connection.recv()
                except (EOFError, OSError) as error:
                    raise self._ended(connection) from error
                if isinstance(answer, UnitReport):
                    in_flight[connection] -= 1
                    send_next(connection)
                    yield answer
                elif isinstance(answer, Tally):
                    tell(answer)
                else:
                    raise answer

    def _send(self, connection: Connection, message: object) -> None:
        try:
            connection.send(message)
        except OSError as error:
            raise self._ended(connection) from error

    def _ended(self, connection: Connection) -> Exception:
        """The error that an ended process raised before its end, or a JobError that says how it ended."""
        with contextlib.suppress(EOFError, OSError):
            while not isinstance(answer := connection.recv(), Exception):
                pass
            return answer
        process = self._processes[connection]
        status = process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        short = ", perhaps because memory ran out: reduce `workers`" if status == -signal.SIGKILL else ""
        return JobError(f"worker process {process.pid} {how}{short}. Run the same command again to resume")


# The worker's side


def serve(descriptor: int) -> None:
    """Process what the launcher sends until the launcher is gone; never return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher as well, which ends this process
    launcher = Connection(descriptor)
    lock = threading.Lock()

    def answer(message: Tally | UnitReport | Exception) -> None:
        with lock:
            launcher.send(message)

    def process(unit: WorkUnit) -> None:
        try:
            report = work(unit, answer)
        except BaseException as error:  # SystemExit of a library too: without an answer the launcher waits for ever
            answer(_portable(error))
        else:
            answer(report)

    try:
        sys.path[:], levels, units_per_process = launcher.recv()
        log_to_stderr(*levels)
        pickled = launcher.recv_bytes()
        try:
            work: Work = pickle.loads(pickled)
        except Exception as error:
            answer(_portable(error))
            os._exit(1)
        pool = ThreadPoolExecutor(units_per_process)
        while True:
            pool.submit(process, launcher.recv())
    except (EOFError, OSError):
        os._exit(0)  # without waiting: a unit is committed whole or not at all


def _portable(error: BaseException) -> Exception:
    """The error, or a JobError with the same message if it does not survive pickling. Its traceback is a note."""
    try:
        survives = isinstance(error, Exception) and type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        survives = False
    portable = cast(Exception, error) if survives else JobError(f"{type(error).__name__}: {error}")
    portable.add_note(f"In worker process {os.getpid()}:\n{traceback.format_exc()}")
    return portable
