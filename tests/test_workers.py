"""Worker processes and what they and their launcher say to each other, on light work; real jobs: test_workers_job.py.

What a worker process unpickles is of this file, so nothing slow may be imported here.
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
    """Tells of one sample; the report says which process it was, and with how many threads."""
    os.write(1, b"what a library prints")
    tell(Tally(samples=1))
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return UnitReport(unit=unit.id, status="written", batch_plan={"pid": os.getpid(), **threads})


class OddError(Exception):
    """One that cannot be made again out of its arguments."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def fail(unit: WorkUnit, tell: Tell) -> UnitReport:
    if unit.id == "device":
        raise DeviceError("cuda:1: lost")
    if unit.id == "odd":
        raise OddError("it", "is odd")
    if unit.id == "quit":
        sys.exit("a library gives up")
    if unit.id == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if unit.id == "exit":
        os._exit(7)
    time.sleep(60)
    raise AssertionError("it was not ended")


@dataclass(frozen=True)
class Slow:
    """A unit called "slow" waits until another process has done the others."""

    done: Path
    others: int

    def __call__(self, unit: WorkUnit, tell: Tell) -> UnitReport:
        if unit.id != "slow":
            (self.done / unit.id).touch()
        while unit.id == "slow" and len(list(self.done.iterdir())) < self.others:
            time.sleep(0.005)
        return count(unit, tell)


class Unloadable:
    """Work that the other side cannot unpickle."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _refuse, ()

    def __call__(self, unit: WorkUnit, tell: Tell) -> UnitReport:
        raise AssertionError


def _refuse() -> object:
    raise ImportError("no module named so")


def children() -> set[int]:
    """The processes that this process started and that are alive."""
    pids = {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}
    return {pid for pid in pids if exists(pid)}


@contextmanager
def started(workers: Workers) -> Iterator[tuple[Workers, set[int]]]:
    """The workers, and their process ids."""
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
    told: list[Tally] = []
    reports = list(counting[0].do([unit(f"u{number}") for number in range(20)], told.append))
    assert sorted(report.unit for report in reports) == sorted(f"u{number}" for number in range(20))
    assert sum(told, Tally()).samples == 20
    assert {report.batch_plan["pid"] for report in reports} == counting[1]
    said = capfd.readouterr()
    assert said.out == ""  # which may be this command's output, piped to another


def test_the_libraries_of_each_process_are_told_its_share_of_the_cores(counting: tuple[Workers, set[int]]) -> None:
    reports = list(counting[0].do(map(unit, "ab"), lambda _: None))  # everyone has one before anyone has two
    threads = {(report.batch_plan["OMP_NUM_THREADS"], report.batch_plan["MKL_NUM_THREADS"]) for report in reports}
    assert threads == {("3", "3"), ("1", "1")}


def test_a_process_that_is_interrupted_goes_on(counting: tuple[Workers, set[int]]) -> None:
    """Ctrl-C reaches every process of a terminal's job; the launcher decides."""
    for pid in counting[1]:
        os.kill(pid, signal.SIGINT)
    assert len(list(counting[0].do(map(unit, "abcd"), lambda _: None))) == 4


def test_no_units_are_no_work(counting: tuple[Workers, set[int]]) -> None:
    assert list(counting[0].do([], lambda _: None)) == []


def test_a_slow_unit_holds_up_nobody(tmp_path: Path) -> None:
    """Nine units wait for nobody but the other process, so that none may be promised to the slow one's."""
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
        ("quit", JobError, "^SystemExit: a library gives up"),
        ("die", JobError, r"worker process \d+ was killed by SIGKILL, .* reduce `workers`. The same command again"),
        ("exit", JobError, r"worker process \d+ ended with status 7. The same command again"),
    ],
)
def test_what_one_raises_or_its_death_ends_all_at_once(first: str, error: type[Exception], message: str) -> None:
    begin = time.monotonic()
    with (
        started(Workers([fail, fail], threads=[1, 1], units_per_process=1)) as (workers, pids),
        pytest.raises(error, match=message) as raised,
    ):
        list(workers.do([unit(first), unit("sleep")], lambda _: None))
    assert time.monotonic() - begin < 30
    assert not any(map(exists, pids))
    if first in ("device", "odd", "quit"):
        assert "in fail" in raised.value.__notes__[0]  # the traceback there, for --verbose


def test_work_that_cannot_be_unpickled_says_why() -> None:
    with (
        Workers([Unloadable()], threads=[1], units_per_process=1) as workers,
        pytest.raises(ImportError, match="no module named so"),
    ):
        list(workers.do([unit("a")], lambda _: None))


def test_what_a_process_said_before_it_ended_is_not_lost() -> None:
    with started(Workers([Unloadable()], threads=[1], units_per_process=1)) as (workers, pids):
        while any(map(exists, pids)):
            time.sleep(0.01)
        with pytest.raises(ImportError, match="no module named so"):
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
    """Whether there is such a process, dead ones that nobody has waited for left out."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
