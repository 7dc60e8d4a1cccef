"""Worker processes and the messages between them and their launcher, on light work; real jobs: test_workers_job.py.

Worker processes unpickle objects of this file, so nothing slow may be imported here.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmbeam.errors import DeviceError, JobError
from mmbeam.jobs.workers import Workers
from mmbeam.types import Tally, UnitReport, WorkUnit

Tell = Callable[[Tally], None]


def unit(name: str) -> WorkUnit:
    return WorkUnit(id=name, inputs=())


def count(unit: WorkUnit, tell: Tell) -> UnitReport:
    """Count one sample; report the process id and its number of threads."""
    os.write(1, b"printed by a library")
    tell(Tally(samples=1))
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return UnitReport(unit=unit.id, status="written", batch_plan={"pid": os.getpid(), **threads})


class OddError(Exception):
    """An error that cannot be pickled."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(f"{subject}: {reason}")


def fail(unit: WorkUnit, tell: Tell) -> UnitReport:
    if unit.id == "device":
        raise DeviceError("cuda:1: lost")
    if unit.id == "odd":
        raise OddError("it", "is odd")
    if unit.id == "quit":
        sys.exit("a library exits")
    if unit.id == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if unit.id == "exit":
        os._exit(7)
    time.sleep(60)
    raise AssertionError("the process was not ended")


@dataclass(frozen=True)
class Slow:
    """The unit "slow" waits until the other process has done all other units."""

    done: Path
    others: int

    def __call__(self, unit: WorkUnit, tell: Tell) -> UnitReport:
        if unit.id != "slow":
            (self.done / unit.id).touch()
        while unit.id == "slow" and len(list(self.done.iterdir())) < self.others:
            time.sleep(0.005)
        return count(unit, tell)


class Unloadable:
    """Work that the worker process cannot unpickle."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _refuse, ()

    def __call__(self, unit: WorkUnit, tell: Tell) -> UnitReport:
        raise AssertionError


def _refuse() -> object:
    raise ImportError("no such module")


def children() -> set[int]:
    """Return the ids of the living child processes."""
    pids = {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}
    return {pid for pid in pids if exists(pid)}


@contextmanager
def started(workers: Workers) -> Iterator[tuple[Workers, set[int]]]:
    """Start the workers; yield them and their process ids."""
    before = children()
    with workers:
        yield workers, children() - before


@pytest.fixture(scope="module")
def counting() -> Iterator[tuple[Workers, set[int]]]:
    with started(Workers([count, count], threads=[3, 1], units_per_process=2)) as workers:
        yield workers


def test_every_unit_is_done_once_and_all_processes_do_some(
    counting: tuple[Workers, set[int]], capfd: pytest.CaptureFixture[str]
) -> None:
    counts: list[Tally] = []
    reports = list(counting[0].do([unit(f"u{number}") for number in range(20)], counts.append))
    assert sorted(report.unit for report in reports) == sorted(f"u{number}" for number in range(20))
    assert sum(counts, Tally()).samples == 20
    assert {report.batch_plan["pid"] for report in reports} == counting[1]
    assert capfd.readouterr().out == ""  # stdout holds the output of the command


def test_each_process_has_the_thread_count_of_its_cores_in_the_environment(counting: tuple[Workers, set[int]]) -> None:
    reports = list(counting[0].do(map(unit, "ab"), lambda _: None))  # each process has one before any has two
    threads = {(report.batch_plan["OMP_NUM_THREADS"], report.batch_plan["MKL_NUM_THREADS"]) for report in reports}
    assert threads == {("3", "3"), ("1", "1")}


def test_a_worker_process_ignores_sigint(counting: tuple[Workers, set[int]]) -> None:
    """Ctrl-C reaches every process of the terminal; only the launcher acts on it."""
    for pid in counting[1]:
        os.kill(pid, signal.SIGINT)
    assert len(list(counting[0].do(map(unit, "abcd"), lambda _: None))) == 4


def test_no_units_yield_no_reports(counting: tuple[Workers, set[int]]) -> None:
    assert list(counting[0].do([], lambda _: None)) == []


def test_a_slow_unit_delays_no_other(tmp_path: Path) -> None:
    """The fast process does all nine other units: none is assigned to the slow process beforehand."""
    work = Slow(tmp_path, others=9)
    with Workers([work, work], threads=[1, 1], units_per_process=1) as workers:
        reports = list(workers.do([unit("slow"), *map(unit, "abcdefghi")], lambda _: None))
    slow = next(report for report in reports if report.unit == "slow")
    pids = [report.batch_plan["pid"] for report in reports]
    assert (len(reports), pids.count(slow.batch_plan["pid"])) == (10, 1)


@pytest.mark.parametrize(
    ("first", "error", "message"),
    [
        ("device", DeviceError, "^cuda:1: lost"),
        ("odd", JobError, "^OddError: it: is odd"),
        ("quit", JobError, "^SystemExit: a library exits"),
        ("die", JobError, r"worker process \d+ was killed by SIGKILL, perhaps .* and run the same command again"),
        ("exit", JobError, r"worker process \d+ ended with status 7. Reduce `workers` if memory is short"),
    ],
)
def test_an_error_or_the_end_of_too_many_processes_ends_all(first: str, error: type[Exception], message: str) -> None:
    begin = time.monotonic()
    with (
        started(Workers([fail, fail], threads=[1, 1], units_per_process=1, restarts=1)) as (workers, pids),
        pytest.raises(error, match=message) as raised,
    ):
        list(workers.do([unit(first), unit("sleep")], lambda _: None))
    assert time.monotonic() - begin < 30
    assert not any(map(exists, pids))
    if first in ("device", "odd", "quit"):
        assert "in fail" in raised.value.__notes__[0]  # the worker's traceback, for --verbose


@dataclass(frozen=True)
class Deadly:
    """The unit "deadly" ends its process, `times` times; a file per time is left in `directory`."""

    directory: Path
    times: int

    def __call__(self, unit: WorkUnit, tell: Tell) -> UnitReport:
        ended = len(list(self.directory.iterdir()))
        if unit.id == "deadly" and ended < self.times:
            (self.directory / str(ended)).touch()
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)  # another thread may receive the signal
        return count(unit, tell)


def test_a_process_that_ends_is_replaced_and_its_units_run_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = children()
    with Workers([Deadly(tmp_path, 2), Deadly(tmp_path, 2)], threads=[1, 1], units_per_process=2) as workers:
        reports = list(workers.do(map(unit, ["deadly", *"abcdef"]), lambda _: None))
    assert sorted(report.unit for report in reports) == sorted([*"abcdef", "deadly"])
    assert caplog.text.count("was killed by SIGSEGV; its") == 2
    assert children() == before


def test_the_error_of_unpickling_the_work_is_raised() -> None:
    with (
        Workers([Unloadable()], threads=[1], units_per_process=1) as workers,
        pytest.raises(ImportError, match="no such module"),
    ):
        list(workers.do([unit("a")], lambda _: None))


def test_the_error_of_a_process_that_has_ended_is_not_lost() -> None:
    with started(Workers([Unloadable()], threads=[1], units_per_process=1)) as (workers, pids):
        while any(map(exists, pids)):
            time.sleep(0.01)
        with pytest.raises(ImportError, match="no such module"):
            list(workers.do([unit("a")], lambda _: None))


LAUNCHER = """
import sys
from test_workers import Workers, fail, started, unit
with started(Workers([fail, fail], threads=[1, 1], units_per_process=1)) as (workers, pids):
    print(*pids, flush=True)
    list(workers.do([unit("a"), unit("b")], lambda _: None))
"""


def test_the_processes_end_when_their_launcher_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        pids = [int(pid) for pid in launcher.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(exists, pids))
        launcher.kill()
    deadline = time.monotonic() + 20
    while any(map(exists, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exists(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
