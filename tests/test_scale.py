"""docs/scale.md: its model compared with a simulated fleet, its requests with those of a store, and a small run.

The run with 100,000 units is `python bench/scale.py`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import gcsfs.core
import pytest
import servers

from mmbeam.readers import stream as stream_module
from mmbeam.readers.stream import BLOCK_BYTES, open_shard
from mmbeam.runs.commits import committed
from mmbeam.runs.plan import extend_plan
from mmbeam.runs.run import Run, open_run
from mmbeam.types import Batch, Shard, UnitReport, WorkUnit

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import scale  # noqa: E402
import scale_model  # noqa: E402
from scale_model import CHECK, COMMIT, JOBS, KEPT, LAUNCH, OPEN, Job, Requests, simulate, simulate_restarts  # noqa: E402

UNITS = 60
FLEETS = {
    "50 workers, losses": Job(workers=50, losses_per_hour=0.5),
    "slow, losses": Job(rate=100, losses_per_hour=0.2),
    "even units": Job(spread=0.1),
    "uneven units": Job(spread=1.0),
}


# The model


def test_the_document_shows_the_table_of_the_model() -> None:
    assert scale_model.table() in (ROOT / "docs" / "scale.md").read_text()


@pytest.mark.parametrize("job", [*FLEETS.values(), *JOBS.values()], ids=[*FLEETS.keys(), *JOBS.keys()])
def test_the_simulated_fleet_takes_as_long_as_the_model_predicts(job: Job) -> None:
    for dealt, seconds in ((False, job.seconds), (True, job.dealt_seconds)):
        fleet = simulate(job, dealt)
        assert fleet.seconds >= job.start_seconds + job.ideal_seconds * 0.98
        assert fleet.seconds == pytest.approx(seconds, rel=0.05)
        share = fleet.lost_seconds / (job.ideal_seconds * job.workers * job.concurrency)
        assert share == pytest.approx(job.lost_fraction, abs=0.01)


@pytest.mark.parametrize(("rate", "losses"), [(1_000, 0.05), (1_000, 0.2), (100, 0.05)])
def test_simulated_restarts_cost_as_much_as_the_model_predicts(rate: float, losses: float) -> None:
    job = Job(workers=50, rate=rate, losses_per_hour=losses)
    assert 0.02 < job.restart_fraction < 0.4
    assert simulate_restarts(job).seconds == pytest.approx(job.restarted_seconds, rel=0.1)


def test_the_model_underestimates_frequent_restarts() -> None:
    """The document warns of it: units that take longer than the time between restarts hardly ever end."""
    job = JOBS["caption, 20/s, losses"]
    assert job.restart_fraction > 0.9
    assert simulate_restarts(job).seconds > 5 * job.restarted_seconds


# Requests, counted at a local GCS server

needs_gcs = pytest.mark.skipif("gcs" not in servers.STORES, reason=servers.report_header())


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Requests]]:
    """Collect the billed requests to GCS."""
    real = gcsfs.core.GCSFileSystem._request
    requests: list[Requests] = []

    async def counting(self: Any, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        is_listing = method == "GET" and path.endswith("/o")
        if method != "DELETE":
            requests.append(Requests(writes=1) if is_listing or method in ("POST", "PUT") else Requests(reads=1))
        return await real(self, method, path, *args, **kwargs)

    read_range = stream_module._RESPOND["gs"]

    async def counting_ranges(*args: Any) -> Any:
        requests.append(Requests(reads=1))
        return await read_range(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gcsfs.core.GCSFileSystem, "_request", counting)
        patch.setitem(stream_module._RESPOND, "gs", counting_ranges)
        yield requests


def assert_within(requests: list[Requests], most: Requests) -> None:
    """Check the number against the model, which is an upper bound: gcsfs may cache lookups."""
    total = sum(requests, Requests())
    assert most.writes / 2 <= total.writes <= most.writes
    assert most.reads / 2 <= total.reads <= most.reads


@needs_gcs
def test_the_requests_of_a_run_and_of_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scale.make_run(servers.fresh_output("gcs", tmp_path))
    shards = [Shard(path=f"gs://b/{number}.tar", url=f"gs://b/{number}.tar", size=10) for number in range(3)]
    with counted(monkeypatch) as requests:
        open_run(run)
        units = extend_plan(run, shards)
    assert_within(requests, LAUNCH)
    for status, per_unit in (("written", CHECK + COMMIT), ("kept", CHECK + KEPT)):
        with counted(monkeypatch) as requests:
            assert [report.status for report in run_units(run, units)] == [status] * 3
        assert_within(requests, per_unit * 3)
    resumed = scale_model.requests_of_resume(Job(units=3))
    assert resumed == LAUNCH + scale_model.listing(3) * 2 + (CHECK + KEPT) * 3
    with counted(monkeypatch) as requests:
        assert len(committed(run)) == 3
    assert_within(requests, scale_model.listing(3))


def run_units(run: Run, units: list[WorkUnit]) -> list[UnitReport]:
    """Call the DoFns of the steps as a worker does."""
    reader, writer = scale.read_constant(run), scale.WriteParquet(run).dofn
    batches: Iterator[Batch] = (batch for unit in units for batch in reader.process(unit))
    return [report for batch in batches for report in writer.process(batch)]


@needs_gcs
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # how gcsfs uploads the shard
def test_the_requests_of_reading_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 20_000_000
    url = f"{servers.fresh_output('gcs', tmp_path)}/a.tar"
    (tmp_path / "a.tar").write_bytes(os.urandom(size))
    fsspec.filesystem("gs").put_file(str(tmp_path / "a.tar"), url)
    with counted(monkeypatch) as requests, open_shard(Shard(path=url, url=url, size=size)) as stream:
        while stream.read(1 << 20):
            pass
    blocks = Requests(reads=-(-size // BLOCK_BYTES))
    assert sum(requests, Requests()).reads >= blocks.reads
    assert sum(requests, Requests()).writes <= OPEN.writes
    assert sum(requests, Requests()).reads <= (OPEN + blocks).reads


# A small run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was killed when half of its units were written."""
    directory = tmp_path_factory.mktemp("scale")
    scale.make_shards(directory / "shards", UNITS)
    assert scale.run_step("write", directory, UNITS // 2) is None
    return directory


def test_a_killed_run_resumes(directory: Path) -> None:
    before = scale.written(directory)
    assert UNITS // 2 - 2 <= len(before) <= UNITS // 2
    resumed = scale.step_write(directory)
    assert (resumed["kept"], resumed["written"]) == (len(before), UNITS - len(before))
    after = scale.written(directory)
    assert before.items() <= after.items()
    assert len(after) == UNITS
    again = scale.step_write(directory)
    assert (again["kept"], again["written"]) == (UNITS, 0)
    assert scale.written(directory) == after
    assert scale.step_reports(directory)["gathered_mb"] < 1e-3 * UNITS  # a kilobyte each


def test_the_job_description_does_not_grow_with_the_units(directory: Path, tmp_path: Path) -> None:
    small = scale.step_plan(directory)
    assert small["units"] == UNITS
    scale.make_shards(tmp_path / "shards", 10 * UNITS)
    large = scale.step_plan(tmp_path)
    assert large["units"] == 10 * UNITS
    assert large["description_mb"] == pytest.approx(small["description_mb"], rel=0.01)
