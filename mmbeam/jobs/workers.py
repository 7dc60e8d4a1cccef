"""The worker processes of the `workers` option: the launcher, the worker, and how they share devices and cores.

Each process runs the pipeline's fused stage, from reading to writing, over one unit after another, as a runner would
run it over a bundle. It has its share of the cores: environment variables set at its start tell each numerical library
how many threads to create, before any of them is imported. Units are sent one by one, to the first process with room,
so that a slow unit delays no other. A worker process that ends by itself (killed by the kernel when memory is short, or
by a crash in a codec) is replaced, and its units run again after all others.

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
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

from mmbeam.errors import JobError
from mmbeam.process import cores, progress, use_cores
from mmbeam.process import steps as process_steps
from mmbeam.terminal import before_exit, log_to_stderr
from mmbeam.types import StepBegun, Tally, UnitReport, WorkUnit

if TYPE_CHECKING:
    import apache_beam as beam

log = logging.getLogger(__name__)

# Every library that computes in threads of its own reads one of these.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
MAX_RESTARTS = 10  # processes that may end with the same unit in flight
EXIT_SECONDS = 2.0  # grace period between SIGTERM and SIGKILL
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
    expendable: bool = False  # if memory is short, the kernel should kill this process rather than its parent

    def __call__(self, unit: WorkUnit, tell: Callable[[Tally], None]) -> UnitReport:
        """Run the unit as a bundle of one element through the fused stage."""
        from mmbeam.models import placement  # imports torch, so only in a process that computes

        placement.use_devices(self.devices)
        use_cores(self.cores)
        progress.relay = tell
        if self.expendable:
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("1000")
        if unit.isolation is not None:
            process_steps.relay = cast(Any, tell)
        return run_unit(self.steps(), unit)


def run_unit(steps: Sequence["beam.DoFn"], unit: WorkUnit) -> UnitReport:
    """Run the unit as a bundle of one element through the steps of a fused stage, in this process."""
    flow = cast(Iterator[Any], iter([unit]))
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
    """Worker processes, one for each of `works`. A context manager: entering starts them, leaving ends them.

    `threads` is the number of compute threads of each process, `units_per_process` the units it has in flight. A unit
    may be in flight in `restarts` processes that die; after one more, the job ends.
    """

    def __init__(
        self, works: Sequence[Work], threads: Sequence[int], units_per_process: int, restarts: int = MAX_RESTARTS
    ) -> None:
        self._works = works
        self._threads = threads
        self._units_per_process = units_per_process
        self._restarts = restarts
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        self._numbers: dict[Connection, int] = {}  # of the work of each process

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            for connection in [self._start(number) for number in range(len(self._works))]:
                self._send_work(connection)  # which waits for nothing: all start simultaneously
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, whatever they are doing: a unit is committed whole or not at all."""
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + EXIT_SECONDS
        for connection, process in self._processes.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            connection.close()
        self._processes.clear()

    def do(
        self,
        units: Iterable[WorkUnit],
        tell: Callable[[Tally], None],
        begin: Callable[[StepBegun], None] = lambda step: None,
    ) -> Iterator[UnitReport]:
        """Yield the units' reports as they are done; call `tell` with the counts on the way, `begin` with the steps.

        Raises what a worker process raised, and ProcessEndedError if a unit has ended too many processes. May be called
        again once exhausted.
        """
        left = deque(units)
        ended = Counter[str]()  # processes that ended with a unit in flight, by unit
        in_flight: dict[Connection, dict[str, WorkUnit]] = {connection: {} for connection in self._processes}

        def send_next(connection: Connection) -> None:
            if left:
                unit = left.popleft()
                in_flight[connection][unit.id] = unit
                with contextlib.suppress(OSError):  # the process has ended, which `recv` will tell
                    connection.send(unit)

        for connection in list(self._processes) * self._units_per_process:  # each has one before any has two
            send_next(connection)
        while any(in_flight.values()):
            for ready in wait([connection for connection, units_there in in_flight.items() if units_there]):
                connection = cast(Connection, ready)
                try:
                    answer = connection.recv()
                except (EOFError, OSError):
                    error = self._ended(connection)
                    if not isinstance(error, ProcessEndedError):
                        raise error from None
                    lost = in_flight.pop(connection)
                    ended.update(list(lost))
                    if max(ended[unit] for unit in lost) > self._restarts:
                        raise error from None
                    log.warning("%s; its %d units run again in another process", error.how, len(lost))
                    left.extend(lost.values())  # behind the others, since one of them may be the cause
                    connection = self._start(self._numbers.pop(connection))
                    self._send_work(connection)
                    in_flight[connection] = {}
                    for _ in range(self._units_per_process):
                        send_next(connection)
                    continue
                if isinstance(answer, UnitReport):
                    in_flight[connection].pop(answer.unit)
                    send_next(connection)
                    yield answer
                elif isinstance(answer, Tally):
                    tell(answer)
                elif isinstance(answer, StepBegun):
                    begin(answer)
                else:
                    raise answer

    def _start(self, number: int) -> Connection:
        """Start the process that does the work of this number."""
        ours, theirs = Pipe()
        environment = {**os.environ, **dict.fromkeys(_THREADS, str(self._threads[number]))}
        command = [sys.executable, "-W", "ignore", "-c", _SERVE, str(theirs.fileno())]
        with theirs:
            self._processes[ours] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()]
            )
        self._numbers[ours] = number
        return ours

    def _send_work(self, connection: Connection) -> None:
        levels = logging.getLogger("mmbeam").getEffectiveLevel(), logging.getLogger().getEffectiveLevel()
        work = pickle.dumps(self._works[self._numbers[connection]])
        with contextlib.suppress(OSError):  # the process has ended, which `recv` will tell
            connection.send((sys.path, levels, self._units_per_process))
            connection.send_bytes(work)

    def _ended(self, connection: Connection) -> Exception:
        """Remove an ended process. Return the error that it raised before its end, or a ProcessEndedError."""
        raised = None
        with contextlib.suppress(EOFError, OSError):  # after an error of the socket there may be messages left
            while not isinstance(raised := connection.recv(), Exception):
                pass
        process = self._processes.pop(connection)
        status = process.wait()
        connection.close()
        if isinstance(raised, Exception):
            return raised
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if status == -signal.SIGKILL:
            how += ", perhaps because memory ran out"
        return ProcessEndedError(f"worker process {process.pid}", how)


class ProcessEndedError(JobError):
    """A worker process ended by itself while it processed units."""

    def __init__(self, process: str, how: str) -> None:
        super().__init__(
            f"{process} {how}. Reduce `workers` if memory is short, and run the same command again to resume"
        )
        self.how = f"its process {how}"


# The worker's side


def serve(descriptor: int) -> None:
    """Process what the launcher sends until the launcher is gone; never return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher as well, which ends this process
    signal.signal(signal.SIGTERM, lambda number, _: _exit(128 + number))
    launcher = Connection(descriptor)
    lock = threading.Lock()

    def answer(message: Tally | StepBegun | UnitReport | Exception) -> None:
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
        _exit(0)


def _exit(status: int) -> None:
    """End the process without waiting for units: each is committed whole or not at all."""
    for call in before_exit:
        call()
    os._exit(status)


def _portable(error: BaseException) -> Exception:
    """The error, or a JobError with the same message if it does not survive pickling. Its traceback is a note."""
    try:
        survives = isinstance(error, Exception) and type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        survives = False
    portable = cast(Exception, error) if survives else JobError(f"{type(error).__name__}: {error}")
    portable.add_note(f"In worker process {os.getpid()}:\n{traceback.format_exc()}")
    return portable
