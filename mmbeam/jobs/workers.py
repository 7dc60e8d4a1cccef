"""Worker processes of this machine that share a job's units: the launcher's side of `--workers`.

Each has its share of the cores: the environment in which it starts tells every library that computes how many
threads to make, before any of them is imported. Units are handed out one by one, to whoever has room, so a slow one
holds up nobody else. A worker process that ends by itself (the kernel's choice when memory is short) ends the job.

Beam's in-process runner has worker processes too (multi_processing). They are not used: one of them killed makes the
job hang for ever, an error in one shows when those before it are done, and each gets its share of units beforehand.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Self, cast

from mmbeam.errors import JobError
from mmbeam.jobs.worker import Answer, Surroundings, Work
from mmbeam.types import Tally, UnitReport, WorkUnit

# Every library that computes in threads of its own asks one of these.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_SERVE = "import sys; from mmbeam.jobs.worker import serve; serve(int(sys.argv[1]))"


class Workers:
    """As many worker processes as there are `works`, one for each; a context manager, which ends them.

    `threads` is the number of each one's threads for computing, `at_once` of the units it has at a time.
    """

    def __init__(self, works: Sequence[Work], threads: Sequence[int], at_once: int) -> None:
        self._works = works
        self._threads = threads
        self._at_once = at_once
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self._end)
            for threads in self._threads:
                self._start(threads)
            root, own = logging.getLogger(), logging.getLogger("mmbeam")
            surroundings = Surroundings(sys.path, root.getEffectiveLevel(), own.getEffectiveLevel(), self._at_once)
            for connection, work in zip(self._processes, self._works, strict=True):
                self._send(connection, surroundings)
                self._send(connection, work)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def pids(self) -> list[int]:
        """The processes' ids."""
        return [process.pid for process in self._processes.values()]

    def do(self, units: Iterable[WorkUnit], tell: Callable[[Tally], None]) -> Iterator[UnitReport]:
        """The units' reports, as they are done; `tell` is called with what is counted on the way.

        Raises what a worker process raised, and JobError if one has ended. May be called again after its end.
        """
        left = iter(units)
        busy = dict.fromkeys(self._processes, 0)
        for connection in list(self._processes) * self._at_once:  # everyone has one before anyone has two
            busy[connection] += self._hand(connection, left)
        while any(busy.values()):
            for ready in wait([connection for connection, count in busy.items() if count]):
                connection = cast(Connection, ready)
                answer = self._receive(connection)
                if isinstance(answer, UnitReport):
                    busy[connection] += self._hand(connection, left) - 1
                    yield answer
                elif isinstance(answer, Tally):
                    tell(answer)
                else:
                    raise answer

    def _start(self, threads: int) -> None:
        ours, theirs = Pipe()
        environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
        command = [sys.executable, "-W", "ignore", "-c", _SERVE, str(theirs.fileno())]
        with theirs:
            self._processes[ours] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()]
            )

    def _hand(self, connection: Connection, units: Iterator[WorkUnit]) -> int:
        """Send it a unit; how many that were."""
        unit = next(units, None)
        if unit is None:
            return 0
        self._send(connection, unit)
        return 1

    def _send(self, connection: Connection, message: object) -> None:
        try:
            connection.send(message)
        except OSError as error:
            raise self._ended(connection) from error

    def _receive(self, connection: Connection) -> Answer:
        try:
            answer: Answer = connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended(connection) from error
        return answer

    def _ended(self, connection: Connection) -> Exception:
        """What it raised before it ended, or how it did."""
        with contextlib.suppress(EOFError, OSError):
            while not isinstance(answer := connection.recv(), Exception):
                pass
            return answer
        process = self._processes[connection]
        status = process.wait()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        short = ", for lack of memory perhaps: give fewer --workers" if status == -signal.SIGKILL else ""
        return JobError(f"worker process {process.pid} {how}{short}. The same command again does the rest")

    def _end(self) -> None:
        """Kill them: whatever they are at, a unit is committed whole or not at all."""
        for connection, process in self._processes.items():
            process.kill()
            process.wait()
            connection.close()
        self._processes.clear()
