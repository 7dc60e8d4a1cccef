"""Samples and signals that end a process: marks of attempts, isolation in child processes, stale locks."""

import errno
import itertools
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from killers import SIGNALS, make_corpus, make_job, run_units
from known import read_parts
from outputs import make_run, make_unit, write_unit
from servers import STORES, fresh_output

from mmbeam.errors import FailureRateError, JobError, RunMismatchError
from mmbeam.jobs.isolate import MAX_CRASHES, Isolate, _End
from mmbeam.jobs.workers import ProcessEndedError, run_unit
from mmbeam.report.status import status_text
from mmbeam.report.summary import summary_text
from mmbeam.runs import attempts
from mmbeam.runs.attempts import attempt, is_left_behind, marks, release_all
from mmbeam.runs.commits import committed, read_failures
from mmbeam.runs.control import lock_run, stop_run
from mmbeam.runs.run import LOCK, Run, list_failures, part_name
from mmbeam.runs.store import ATTEMPTS, Store, _state, process_identity, process_is_gone
from mmbeam.transforms.plan import wait_for_others
from mmbeam.types import SampleId, UnitReport, WorkUnit


def ended_process() -> dict[str, Any]:
    """The identity of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return {**process_identity(), "pid": process.pid, "start": 1}


def test_a_process_that_was_not_reaped_has_ended() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        identity = {**process_identity(), "pid": process.pid, "start": _state(process.pid)[1]}
        assert not process_is_gone(identity)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as under a parent that reaps none
        assert process_is_gone(identity)


def elsewhere() -> dict[str, Any]:
    """The identity of a process of another host, which cannot be looked up."""
    return {"host": "other", "pid": os.getpid(), "space": "other", "start": 1}


def leave_marks(run: Run, unit: str, identity: dict[str, Any], count: int = 3) -> None:
    for number in range(count):
        run.store.create(f"{ATTEMPTS}/{unit}-{number:012x}.json", json.dumps(identity).encode())


def begin(run: Run, unit: str, exclusive: bool = False) -> AbstractContextManager[int | None]:
    return attempt(run.store, unit, part_name(unit), exclusive)


def failures(output: Path) -> list[dict[str, Any]]:
    return [record for path in sorted((output / "_failures").glob("*")) for record in pq.read_table(path).to_pylist()]


# Marks


@pytest.fixture(params=STORES)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output directory that does not exist yet, in each store."""
    return fresh_output(request.param, tmp_path)


def test_only_attempts_that_ended_their_processes_are_counted(output: str) -> None:
    run = make_run(output)
    leave_marks(run, "a-1", ended_process())
    leave_marks(run, "a-1-2", ended_process(), count=1)  # another unit, whose name begins alike
    with begin(run, "a-1") as died:
        assert died == 3
        with begin(run, "a-1") as died:  # the first one is alive, in this process
            assert died == 3
    assert len(marks(run.store)["a-1"]) == 3  # not committed: they stay
    with pytest.raises(FileNotFoundError), begin(run, "b-1"):
        run.store.read("absent")
    assert "b-1" not in marks(run.store)


def test_a_commit_removes_the_marks_of_its_unit(output: str) -> None:
    run, unit = make_run(output), make_unit()
    leave_marks(run, unit.id, ended_process())
    with begin(run, unit.id):
        write_unit(run, unit).commit()
    assert marks(run.store) == {}


@pytest.mark.parametrize("store", [*STORES, "memory"])
def test_an_attempt_on_another_host_counts_when_its_mark_is_old(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the difference of two times of the store: the time in the mark, and this host's clock, do not matter."""
    run = make_run(f"memory://{tmp_path.name}" if store == "memory" else fresh_output(store, tmp_path))
    leave_marks(run, "a-1", {**elsewhere(), "time": 0}, count=1)
    (name,) = marks(run.store)["a-1"]
    assert not is_left_behind(run.store, f"{ATTEMPTS}/{name}")
    if store == "local":
        path = Path(run.output) / ATTEMPTS / name
        old = path.stat().st_mtime - attempts.STALE_SECONDS - 1
        os.utime(path, (old, old))
    else:
        monkeypatch.setattr(attempts, "STALE_SECONDS", -2.0)  # S3 resolves seconds
    assert is_left_behind(run.store, f"{ATTEMPTS}/{name}")
    assert not [file for file in run.store.list("_mmbeam") if file.startswith("clock-")]


def test_a_live_process_renews_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(attempts, "_beat", None)
    ended = threading.Event()
    monkeypatch.setattr(attempts, "_wake", ended)
    run = make_run(str(tmp_path))
    with begin(run, "a-1"):
        path = next((tmp_path / ATTEMPTS).iterdir())
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:
            ended.wait(0.005)
    ended.set()
    assert attempts._beat is not None
    attempts._beat.join()
    assert not path.exists()


def test_files_that_are_no_marks_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(str(tmp_path))
    (tmp_path / ATTEMPTS).mkdir(parents=True)
    for name in ("a-1-0.json", "README", "a-1-2"):
        (tmp_path / ATTEMPTS / name).write_bytes(b"")
    with begin(run, "a-1") as died:
        assert died == 0
    assert f"{ATTEMPTS}/a-1-0.json: expected a mark of mmbeam" in caplog.text


def test_a_process_that_ends_on_purpose_leaves_no_mark(tmp_path: Path) -> None:
    run = make_run(str(tmp_path))
    with begin(run, "a-1"):
        assert len(marks(run.store)["a-1"]) == 1
        release_all()
        assert marks(run.store) == {}


# The lock of `retry_failures`


@pytest.mark.parametrize("start", [1, None])
def test_a_lock_is_taken_over_if_its_process_has_ended(start: int | None, tmp_path: Path) -> None:
    """Also if another process has its number now, as after the restart of a container."""
    run = make_run(str(tmp_path))
    holder = {**process_identity(), "start": 1} if start else ended_process()
    run.store.create(LOCK, json.dumps({**holder, "token": "t"}).encode())
    with lock_run(run):
        assert json.loads(run.store.read(LOCK))["pid"] == os.getpid()
    assert not run.store.exists(LOCK)


def test_a_lock_of_another_host_is_taken_over_when_it_is_old(tmp_path: Path) -> None:
    run = make_run(str(tmp_path))
    run.store.create(LOCK, json.dumps({**elsewhere(), "token": "t"}).encode())
    with (
        pytest.raises(JobError, match=r"another job is replacing rows .* on other\)\. .* after 5 minutes"),
        lock_run(run),
    ):
        pass
    old = (tmp_path / LOCK).stat().st_mtime - attempts.STALE_SECONDS - 1
    os.utime(tmp_path / LOCK, (old, old))
    with lock_run(run):
        pass
    assert not run.store.exists(LOCK)


# The search for the sample


class Simulated(Isolate):
    """Runs no process: `deadly` ends any child, `together` ends one if all of these are in one window."""

    def __init__(self, deadly: dict[int, str], together: Sequence[int] = (), chance: Sequence[int] = ()) -> None:
        super().__init__(steps=lambda: [], device="cpu")
        object.__setattr__(self, "deadly", deadly)
        object.__setattr__(self, "together", set(together))
        object.__setattr__(self, "chance", set(chance))  # the numbers of children that are killed from outside
        object.__setattr__(self, "children", 0)

    deadly: dict[int, str]
    together: set[int]
    chance: set[int]
    children: int

    def _run(self, unit: WorkUnit) -> UnitReport | _End:
        object.__setattr__(self, "children", self.children + 1)
        crashes = unit.isolation.crashes if unit.isolation else {}
        probed = unit.isolation.probed if unit.isolation else None
        numbers = [n for n in range(32) if probed is None or ident(n) in probed]
        size = 1 if unit.isolation and unit.isolation.single else 8
        for begin in range(0, len(numbers), size):
            window = [n for n in numbers[begin : begin + size] if ident(n) not in crashes]
            for number in window:
                if self.deadly.get(number) == "decode":
                    return _End("its process was killed", "decode", (ident(number),))
            if any(self.deadly.get(number) == "model" for number in window) or (
                self.together and self.together <= set(window)
            ):
                return _End("its process was killed", "model", tuple(map(ident, numbers[begin : begin + size])))
            if self.children in self.chance:
                return _End("its process was killed", "model", tuple(map(ident, window)))
        return UnitReport(
            unit=unit.id, status="written", failures_file=",".join(str(sample.offset) for sample in crashes)
        )


def ident(number: int) -> SampleId:
    return SampleId("a.tar", number)


@pytest.mark.parametrize(
    ("isolate", "expected"),
    [
        (Simulated({}), ""),
        (Simulated({5: "decode"}), "5"),
        (Simulated({5: "model"}), "5"),
        (Simulated({5: "model", 6: "model", 30: "decode"}), "5,6,30"),
        (Simulated({}, together=[8, 9]), ""),  # each passes alone: no sample is to blame
        (Simulated({}, chance=[1, 2]), ""),  # killed from outside, twice
        (Simulated({3: "model"}, chance=[2, 4]), "3"),
    ],
)
def test_exactly_the_samples_that_end_a_process_twice_are_blamed(isolate: Simulated, expected: str) -> None:
    report = isolate(make_unit())
    assert isinstance(report, UnitReport)
    assert report.failures_file == expected


def test_a_unit_fails_if_no_sample_explains_the_end_or_too_many_do() -> None:
    reason = Simulated({}, chance=range(100))(make_unit())
    assert reason == "its process was killed in the step model, and no single sample is the cause"
    many = Simulated(dict.fromkeys(range(MAX_CRASHES + 5), "decode"))(make_unit())
    assert isinstance(many, str)
    assert many.startswith(f"more than {MAX_CRASHES} of its samples end their process")


# Real processes


@pytest.mark.parametrize(
    "marked",
    [
        *(pytest.param({9: f"kill in {step}"}, marks=pytest.mark.torture) for step in SIGNALS),
        pytest.param({0: "kill in write", 1: "kill in launch", 11: "kill in decode"}, marks=pytest.mark.torture),
    ],
    ids=str,
)
def test_a_sample_that_ends_its_process_is_one_failure(
    marked: dict[int, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three attempts at the unit have ended their processes. It runs in child processes, and the others here."""
    make_corpus(tmp_path / "in", marked)
    undisturbed = make_job(tmp_path / "in", tmp_path / "undisturbed")
    undisturbed.execute()
    job = make_job(tmp_path / "in", tmp_path / "out")
    leave_marks(job.run, job.units[0].id, ended_process())
    assert make_job(tmp_path / "in", tmp_path / "out").units == job.units[::-1]  # the suspect runs last
    with caplog.at_level(logging.WARNING):
        report = job.execute()
    assert (report.units_written, report.tally.samples, report.tally.failed) == (2, 24, len(marked))
    expected = {
        name: [row for row in rows if "kill" not in row["text"]]
        for name, rows in read_parts(tmp_path / "undisturbed").items()
    }
    assert read_parts(tmp_path / "out") == expected
    records = failures(tmp_path / "out")
    assert [(record["step"], record["error"], record["row"]) for record in records] == [
        ("crash", "CrashError", False)
    ] * len(marked)
    step = marked.get(9, "kill in write").rpartition(" ")[2]
    step = "model" if step in ("prepare", "launch", "collect") else step
    assert f"in the step {step}, twice with this sample alone" in records[0]["message"]
    assert "3 attempts ended their processes" in caplog.text
    assert not list((tmp_path / "out" / ATTEMPTS).iterdir())
    assert not list((tmp_path / "out" / "_mmbeam" / "tmp").iterdir())
    assert make_job(tmp_path / "in", tmp_path / "out").execute().units_kept == 2


@pytest.mark.torture
def test_a_sample_that_ends_its_process_is_one_failure_with_workers(output: str, tmp_path: Path) -> None:
    """No mark is left before: the job's own worker processes end, are replaced, and the unit is isolated."""
    make_corpus(tmp_path / "in", {9: "kill in decode"}, number=4)
    report = make_job(tmp_path / "in", output, workers=2).execute()
    assert (report.units_written, report.tally.samples, report.tally.failed) == (4, 24, 1)
    store = Store(output)
    assert [record["step"] for name in list_failures(store) for record in read_failures(store, name)] == ["crash"]
    assert store.list(ATTEMPTS) == {}


def test_a_worker_process_error_says_how_it_ended() -> None:
    error = ProcessEndedError("worker process 7", "was killed by SIGKILL, perhaps because memory ran out")
    assert str(error).startswith("worker process 7 was killed by SIGKILL, perhaps because memory ran out")
    assert error.how == "its process was killed by SIGKILL, perhaps because memory ran out"
    assert replace(make_unit(), limit=1).isolation is None


# Several launches of one run share its units


def test_an_exclusive_attempt_does_not_begin_while_another_is_at_work(output: str) -> None:
    run = make_run(output)
    leave_marks(run, "a-1", ended_process())
    with begin(run, "a-1", exclusive=True) as died:
        assert died == 3
        with begin(run, "a-1", exclusive=True) as second:
            assert second is None
        with begin(run, "b-1", exclusive=True) as other:
            assert other == 0
    leave_marks(run, "c-1", elsewhere(), count=1)
    with begin(run, "c-1", exclusive=True) as died:
        assert died is None
    with begin(run, "c-1") as died:  # on a runner, which repeats the units of machines that it has lost
        assert died == 0


@pytest.mark.parametrize("ends", ["commits", "is lost"])
def test_a_launch_waits_for_the_unit_of_another_machine_and_takes_it_if_that_is_lost(
    ends: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(corpus / "in", tmp_path)
    first = job.units[0]
    leave_marks(job.run, first.id, elsewhere(), count=1)
    (mark,) = (tmp_path / ATTEMPTS).iterdir()
    committed_before = []

    def end(_: float) -> None:
        committed_before.append(committed(job.run))
        if ends == "commits":
            mark.unlink()
            run_unit(job.steps(), first)
        else:
            os.utime(mark, (0, 0))

    monkeypatch.setattr("mmbeam.transforms.plan.time.sleep", end)
    report = job.execute()
    assert committed_before == [{unit.id for unit in job.units[1:]}]
    kept = int(ends == "commits")
    assert (report.units_written, report.units_kept, report.tally.rows) == (len(job.units) - kept, kept, 24)
    assert read_parts(tmp_path) == read_parts(corpus / "out")
    assert not list((tmp_path / ATTEMPTS).iterdir())


def test_a_launch_that_waits_for_others_ends_when_the_run_is_stopped(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(corpus / "in", tmp_path)
    leave_marks(job.run, job.units[0].id, elsewhere(), count=1)
    monkeypatch.setattr("mmbeam.transforms.plan.time.sleep", lambda _: stop_run(job.run, "too many failures"))
    with pytest.raises(FailureRateError, match="too many failures"):
        list(wait_for_others(job.run, job.units[:1], lambda units: ()))


@pytest.mark.torture
@pytest.mark.parametrize("workers", [1, 2])
def test_two_launches_share_the_units_and_the_second_takes_those_of_the_first_when_it_is_killed(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(tmp_path / "in", {0: "hold"}, number=8)
    make_job(tmp_path / "in", tmp_path / "undisturbed").execute()
    held = tmp_path / "held"
    held.mkdir()
    monkeypatch.setenv("HOLD", str(held))
    with launch(tmp_path / "in", tmp_path / "out", workers) as first:
        while not (held / "held").exists():
            time.sleep(0.01)
        with launch(tmp_path / "in", tmp_path / "out", workers) as second:
            folders = [tmp_path / "out" / "data", tmp_path / "out" / ATTEMPTS]
            while sum(len(list(folder.iterdir())) for folder in folders if folder.exists()) < 8:
                assert second.poll() is None
                time.sleep(0.01)
            first.kill()
            assert second.wait() == 0
    assert read_parts(tmp_path / "out") == read_parts(tmp_path / "undisturbed")
    assert not list((tmp_path / "out" / ATTEMPTS).iterdir())
    windows = Counter(path.name.split("-")[1] for path in held.glob("window-*"))
    assert {number for number, count in windows.items() if count > 1} == {"0"}
    assert len(windows) == 8


# Files that were damaged or added later


def test_damage_to_an_output_costs_its_unit_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A part is cut short and another lost, and there are empty and foreign files in every folder."""
    make_corpus(tmp_path / "in", {}, number=3)
    make_job(tmp_path / "in", tmp_path / "out").execute()
    whole = read_parts(tmp_path / "out")
    first, second, _ = sorted((tmp_path / "out" / "data").iterdir())
    first.write_bytes(first.read_bytes()[:-1000])
    second.write_bytes(second.read_bytes() + b"\0")
    for name in (
        "_failures/part-x-failed.parquet",
        "_failures/part-x-0123.parquet",
        "_failures/notes.txt",
        "_mmbeam/plan/.DS_Store",
        "_mmbeam/attempts/notes",
        "_mmbeam/stop.json",
        "_mmbeam/summary.json",
        "_mmbeam/commits/other.json",
    ):
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert "units: 4 planned" not in "\n".join(status_text(str(tmp_path / "out")))
    assert "_failures/part-x-failed.parquet: expected failure records of mmbeam" in caplog.text
    report = make_job(tmp_path / "in", tmp_path / "out").execute()
    assert (report.units_written, report.units_kept) == (2, 1)
    assert read_parts(tmp_path / "out") == whole
    assert caplog.text.count("damaged since its commit") == 2
    assert "plan: .DS_Store is not a file of the plan" in caplog.text
    assert "samples: 24 = 24 rows" in summary_text(report, str(tmp_path / "out"))


def test_a_touched_shard_is_unchanged_and_another_content_is_named(tmp_path: Path) -> None:
    make_corpus(tmp_path / "in", {}, number=3)
    make_job(tmp_path / "in", tmp_path / "out").execute()
    first, second, _ = sorted((tmp_path / "in").glob("*.tar"))
    for path in (first, second):
        os.utime(path, (1e9, 1e9))
    assert make_job(tmp_path / "in", tmp_path / "out").execute().units_kept == 3
    content = second.read_bytes()
    second.write_bytes(content.replace(b"text 9", b"text 8"))
    assert second.stat().st_size == len(content)
    with pytest.raises(RunMismatchError, match=r"1 of 3 shards has changed:\n  .*000001.tar: etag .* -> "):
        make_job(tmp_path / "in", tmp_path / "out")
    report = make_job(tmp_path / "in", tmp_path / "out", redo_changed=True).execute()
    assert (report.units_written, report.units_kept) == (1, 2)
    make_job(tmp_path / "in", tmp_path / "fresh").execute()
    assert read_parts(tmp_path / "out") == read_parts(tmp_path / "fresh")
    assert make_job(tmp_path / "in", tmp_path / "out", redo_changed=True).execute().units_kept == 3


def test_changed_files_of_a_folder_and_parts_of_a_shard_are_redone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"{number}.txt").write_text(f"text {number}")
    make_job(tmp_path / "in", tmp_path / "out").execute()
    (tmp_path / "in" / "3.txt").write_text("another text")
    report = make_job(tmp_path / "in", tmp_path / "out", redo_changed=True).execute()
    assert (report.units_written, report.tally.samples) == (1, 6)
    [rows] = read_parts(tmp_path / "out").values()
    assert [row["text"] for row in rows][3] == "another text"
    for count in (40, 24, 60):  # the shard shrinks, and grows
        make_corpus(tmp_path / "tar", {}, count=count, number=1)
        job = make_job(tmp_path / "tar", tmp_path / "parts", unit_bytes=8192, redo_changed=True)
        assert len(job.units) > 3
        job.execute()
        make_job(tmp_path / "tar", tmp_path / f"fresh-{count}").execute()
        rows, fresh = (
            sorted(row["text"] for part in read_parts(output).values() for row in part)
            for output in (tmp_path / "parts", tmp_path / f"fresh-{count}")
        )
        assert rows == fresh


@pytest.mark.parametrize("where", ["first", "middle"])
def test_a_limit_takes_the_first_samples_that_can_be_read(where: str, tmp_path: Path) -> None:
    make_corpus(tmp_path / "in", {}, number=3)
    paths = sorted((tmp_path / "in").glob("*.tar"))
    damaged = paths[0] if where == "first" else paths[1]
    damaged.write_bytes(b"not a tar" * 1000)
    report = make_job(tmp_path / "in", tmp_path / "out", limit=10).execute()
    assert (report.units_written, report.units_failed, report.tally.samples) == (1, 0, 10)
    assert [reason.partition(":")[0] for reason in report.broken] == [str(damaged)]  # exit status 3
    keys = [row["key"] for rows in read_parts(tmp_path / "out").values() for row in rows]
    first = 8 if where == "first" else 0
    assert keys == [f"{n:06d}" for n in [*range(first, 8), *range(16 if first == 0 else 8, 24)][:10]]
    one = make_job(tmp_path / "in", tmp_path / "one", limit=1).execute()
    assert one.tally.samples == 1
    again = make_job(tmp_path / "in", tmp_path / "out", limit=10).execute()
    assert (again.units_written, again.units_kept, again.broken) == (0, 1, report.broken)


def test_a_limit_over_shards_that_cannot_be_read_is_a_failed_unit(tmp_path: Path) -> None:
    make_corpus(tmp_path / "in", {}, number=3)
    for path in (tmp_path / "in").glob("*.tar"):
        path.write_bytes(b"not a tar" * 1000)
    report = make_job(tmp_path / "in", tmp_path / "out", limit=10).execute()
    assert (report.units_written, report.units_failed) == (0, 1)
    assert len(failures(tmp_path / "out")) == 1
    every = make_job(tmp_path / "in", tmp_path / "all").execute()
    assert (every.units_written, every.units_failed) == (0, 3)
    assert len(failures(tmp_path / "all")) == 3


# Faults of the store, and kills


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and in `out` what an undisturbed run makes of them."""
    root = tmp_path_factory.mktemp("corpus")
    make_corpus(root / "in", {})
    run_units(make_job(root / "in", root / "out"))
    return root


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fault_at_any_write_is_raised_and_the_next_run_ends_as_an_undisturbed_one(
    when: str, code: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, count = Store._publish, 0

    def faulty(store: Store, name: str, source: Path | bytes, exclusive: bool) -> None:
        nonlocal count
        count -= 1
        if count == 0 and when == "before":
            raise OSError(code, os.strerror(code), name)
        publish(store, name, source, exclusive)
        if count == 0:
            raise OSError(code, os.strerror(code), name)

    monkeypatch.setattr(Store, "_publish", faulty)
    for number in itertools.count(1):
        output, count = tmp_path / str(number), number
        raised = None
        try:
            run_units(make_job(corpus / "in", output))
        except OSError as error:
            raised = error.errno
        if count > 0:
            assert number > 8  # the manifest, the plan, for each unit its mark, rows and record, and the summary
            return
        assert raised == code or when == "after"  # the second one finds that the store refuses an existing file
        count = 0
        run_units(make_job(corpus / "in", output))
        assert read_parts(output) == read_parts(corpus / "out")
        assert not list((output / "_mmbeam" / "tmp").iterdir())
        assert not list((output / ATTEMPTS).iterdir())


def test_a_disk_that_fills_while_rows_are_written_is_raised(corpus: Path, tmp_path: Path) -> None:
    job = make_job(corpus / "in", tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))  # a mark is smaller, a Parquet file is larger
    try:
        with pytest.raises(OSError, match=r"File too large|\[Errno 27\]"):
            run_units(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not read_parts(tmp_path)
    assert not list((tmp_path / "_mmbeam" / "tmp").iterdir())
    run_units(make_job(corpus / "in", tmp_path))
    assert read_parts(tmp_path) == read_parts(corpus / "out")


LAUNCH = """
import sys
from killers import make_job
import mmbeam.transforms.plan
mmbeam.transforms.plan.POLL_SECONDS = 0.1
make_job(sys.argv[1], sys.argv[2], workers=int(sys.argv[3])).execute()
"""


def launch(corpus: Path, output: Path, workers: int = 1) -> "subprocess.Popen[bytes]":
    """Start the job in a process of its own, which marked samples end."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    arguments = [str(corpus), str(output), str(workers)]
    return subprocess.Popen([sys.executable, "-c", LAUNCH, *arguments], env=environment)


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_a_run_killed_at_30_random_moments_ends_as_an_undisturbed_one(corpus: Path, tmp_path: Path) -> None:
    """Each launch is killed up to a second after it has begun to write. In between, one in three may end."""
    moments, kills = random.Random(0), 0
    output = tmp_path / "0"
    for number in itertools.count():
        with launch(corpus / "in", output) as running:
            before = sorted(output.rglob("*"))
            while running.poll() is None and sorted(output.rglob("*")) == before:
                time.sleep(0.01)
            time.sleep(moments.random())
            running.kill()
        kills += running.returncode == -signal.SIGKILL
        if running.returncode == 0:  # it was too fast: begin anew
            assert read_parts(output) == read_parts(corpus / "out")
            output = tmp_path / str(number + 1)
        if kills == 30:
            break
    with launch(corpus / "in", output) as running:
        assert running.wait() == 0
    assert read_parts(output) == read_parts(corpus / "out")
    assert not list((output / "_mmbeam" / "tmp").iterdir())
    assert not list((output / ATTEMPTS).iterdir())


@pytest.mark.torture
def test_three_launches_end_at_a_sample_and_the_fourth_completes(tmp_path: Path) -> None:
    """In one process, without worker processes: the launches themselves end."""
    make_corpus(tmp_path / "in", {9: "kill in decode"})
    statuses = []
    for _ in range(4):
        with launch(tmp_path / "in", tmp_path / "out") as running:
            statuses.append(running.wait())
    assert statuses == [-signal.SIGSEGV] * 3 + [0]
    assert [record["step"] for record in failures(tmp_path / "out")] == ["crash"]
    assert sum(map(len, read_parts(tmp_path / "out").values())) == 23
