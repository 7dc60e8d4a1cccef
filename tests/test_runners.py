"""The same rows on every runner, one fused stage, and what happens when the fusion is broken or a bundle comes twice.

Keys, order within a unit, nulls and counts are exact; vectors are equal within 1e-6, which is what another grouping
of samples in a model's batch may cost.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow.parquet as pq
import pytest
import shards
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from mmbeam.config import ModelRef, Windows
from mmbeam.errors import FlowError, UsageError
from mmbeam.io import runs
from mmbeam.jobs.embed import EmbedJob, EmbedOptions, embed, prepare
from mmbeam.jobs.launch import device_of, execute, pipeline_options, public_args
from mmbeam.models.encoders.clip import ClipEncoder
from mmbeam.models.tiny import save_clip
from mmbeam.stages.embed import EmbedStage
from mmbeam.transforms import Embed, Plan, ReadShards, Summarize, WriteParquet
from mmbeam.types import Batch, RunReport, UnitReport

IN_PROCESS = {
    "DirectRunner": ["--runner=DirectRunner"],
    "FnApiRunner, 4 threads": [
        "--runner=FnApiRunner",
        "--direct_num_workers=4",
        "--direct_running_mode=multi_threading",
    ],
    "PortableRunner, loopback": ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"],
}

Rows = dict[str, list[dict[str, Any]]]  # by part


@dataclass(frozen=True)
class Known:
    """A corpus of five shards with nulls and failures, and what a run with no Beam option makes of it."""

    root: Path
    parts: Rows
    report: RunReport


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    root = tmp_path_factory.mktemp("known")
    save_clip(root / "clip")
    truths = shards.make_truths(35)
    for index in range(0, 35, 5):  # no picture; a picture that is none; neither picture nor text
        truths[index] = replace(truths[index], members={"txt": b"alone"})
        truths[index + 1] = replace(truths[index + 1], members={"jpg": b"\xff\xd8 none", "txt": b"beside it"})
        truths[index + 2] = replace(truths[index + 2], members={"json": b"{}"})
    truths[3] = replace(truths[3], members={"jpg": b"no picture, and nothing else"})
    shards.make_webdataset(root / "in", truths, shards=5)
    report = embed(options(root, root / "out"))
    return Known(root, read_parts(root / "out"), report)


def options(root: Path, output: Path, *beam_args: str, **changes: Any) -> EmbedOptions:
    made = EmbedOptions(
        input=(str(root / "in"),),
        output=str(output),
        models=(ModelRef(model=str(root / "clip")),),
        device="cpu",
        batch_size=3,
        max_failure_rate=1.0,
        windows=Windows(samples=4),
        beam_args=beam_args,
    )
    return replace(made, **changes)


def read_parts(output: Path) -> Rows:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((output / "data").glob("*.parquet"))}


def counts(report: RunReport) -> dict[str, Any]:
    return asdict(replace(report.tally, seconds={}))


def assert_same(found: Rows, expected: Rows) -> None:
    assert list(found) == list(expected)
    for name, rows in expected.items():
        assert [plain(row) for row in found[name]] == [plain(row) for row in rows]
        for row, other in zip(found[name], rows, strict=True):
            for column in ("image_embedding", "text_embedding"):
                if row[column] is not None:
                    np.testing.assert_allclose(row[column], other[column], rtol=0, atol=1e-6)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the vectors' lengths in the place of the vectors."""
    return {name: len(value) if name.endswith("_embedding") and value else value for name, value in row.items()}


def test_the_corpus_has_what_could_differ(known: Known) -> None:
    rows = [row for part in known.parts.values() for row in part]
    assert len(known.parts) == 5
    assert len(rows) == 34
    assert {(row["image_embedding"] is None, row["text_embedding"] is None) for row in rows} == {
        (False, False),
        (True, False),
        (True, True),
    }
    assert (known.report.tally.failed, known.report.tally.impaired) == (1, 7)


@pytest.mark.parametrize("beam_args", IN_PROCESS.values(), ids=IN_PROCESS.keys())
def test_every_runner_in_this_process_gives_the_same_rows(known: Known, beam_args: list[str], tmp_path: Path) -> None:
    report = embed(options(known.root, tmp_path, *beam_args))
    assert counts(report) == counts(known.report)
    assert_same(read_parts(tmp_path), known.parts)


class LoudStage(EmbedStage):
    """An encoder whose library prints more than a pipe holds."""

    def run(self, model: Any, batch: Batch) -> Batch:
        os.write(1, b"x" * 200_000)
        return super().run(model, batch)


def test_a_job_service_with_an_external_worker_pool_gives_the_same_rows(
    known: Known, worker_pool: list[str], tmp_path: Path
) -> None:
    """Processes of their own for the job service and the workers; nobody reads the workers' stdout."""
    job = prepare(options(known.root, tmp_path, *worker_pool))
    stage = LoudStage(**{each.name: getattr(job.stages[0], each.name) for each in fields(EmbedStage)})
    job = replace(job, stages=(stage,))
    report = execute(job.run, job.units, worker_pool, job.build, job.check)
    assert counts(report) == counts(known.report)
    assert_same(read_parts(tmp_path), known.parts)


@pytest.fixture
def worker_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A job service and a worker pool on loopback, and the options that send a job there."""
    jobs, workers = free_port(), free_port()
    with (
        Server("apache_beam.runners.portability.local_job_service_main", f"--port={jobs}", port=jobs),
        Server("apache_beam.runners.worker.worker_pool_main", f"--service_port={workers}", port=workers),
    ):
        yield [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{jobs}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{workers}",
        ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """A Beam server as a process group of its own; it starts workers by the command `python`."""

    def __init__(self, module: str, *arguments: str, port: int) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.port = port

    def __enter__(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"no server at {self.port}")

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.parametrize("spelled", [["--runner=DirectRunner"], ["--runner", "DirectRunner"], []])
def test_the_direct_runner_is_beams_in_process_runner_and_never_a_download(spelled: list[str]) -> None:
    """Beam's own DirectRunner would first fetch a Go binary, Prism."""
    assert type(beam.Pipeline(options=pipeline_options(spelled)).runner) is FnApiRunner


def test_options_that_nobody_knows_and_devices_that_nobody_can_see_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--no_such_option"):
        pipeline_options(["--no_such_option=1"])
    elsewhere = options(tmp_path, tmp_path, "--runner=FlinkRunner", "--flink_master=host:8081", device="auto")
    with pytest.raises(UsageError, match="the workers are elsewhere"):
        device_of(elsewhere)
    here = replace(elsewhere, beam_args=("--runner=PortableRunner", "--environment_type", "LOOPBACK"), device="cpu")
    assert device_of(here) == "cpu"


def test_options_are_recorded_without_their_secrets() -> None:
    args = ["--s3_secret_access_key=s3cr3t", "--azure_connection_string", "s3cr3t", "--temp_location=gs://b/t"]
    args += ["--s3_endpoint_url=https://me:s3cr3t@host/?sig=s3cr3t", "--streaming"]
    assert public_args(args) == [
        "--s3_secret_access_key=...",
        "--azure_connection_string",
        "...",
        "--temp_location=gs://b/t",
        "--s3_endpoint_url=https://host/",
        "--streaming",
    ]


def test_the_pipeline_file_runs_by_itself_from_anywhere(known: Known, tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "pipelines" / "embed.py"
    arguments = ["--input", str(known.root / "in"), "--output", "out", "--model", str(known.root / "clip")]
    arguments += ["--device=cpu", "--batch-size=3", "--max-failure-rate=1", "--runner=DirectRunner"]
    done = subprocess.run([sys.executable, file, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:6]) == (0, "units:"), done.stderr
    assert_same(read_parts(tmp_path / "out"), known.parts)
    wrong = subprocess.run([sys.executable, file, "--input", "x"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "--output" in wrong.stderr


# The fused stage


def test_from_reading_to_writing_is_one_fused_stage(known: Known, tmp_path: Path) -> None:
    """Asked of Beam's own optimizer, over the job's real pipeline."""
    pipeline = beam.Pipeline(options=pipeline_options())
    prepare(options(known.root, tmp_path)).build(pipeline)
    _, stages = FnApiRunner().create_stages(pipeline.to_runner_api())
    fused = [[transform.unique_name for transform in stage.transforms] for stage in stages]
    (stage,) = [names for names in fused if any("ReadShards" in name for name in names)]
    for step in ("Plan/Parse", "ReadShards/Read", "Embed0/Run", "WriteParquet/Write"):
        assert any(name.startswith(step) for name in stage), step


@pytest.mark.parametrize("beam_args", IN_PROCESS.values(), ids=IN_PROCESS.keys())
def test_no_batch_is_ever_pickled(
    known: Known, beam_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = count_pickled(monkeypatch)
    embed(options(known.root, tmp_path, *beam_args))
    assert pickled["UnitReport"] >= 5  # the counting works: reports do cross to Summarize
    assert pickled["Batch"] == 0


def count_pickled(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    pickled: Counter[str] = Counter()
    for kind in (Batch, UnitReport):
        real = kind.__getstate__

        def counted(self: Any, _real: Any = real, _name: str = kind.__name__) -> Any:
            pickled[_name] += 1
            return _real(self)

        monkeypatch.setattr(kind, "__getstate__", counted)
    return pickled


def run_with_a_shuffle(job: EmbedJob) -> None:
    """The job with a Reshuffle between its model and its writer."""

    def build(pipeline: beam.Pipeline) -> None:
        (
            pipeline
            | Plan(job.units)
            | ReadShards(job.stages[0].needs, run=job.run, windows=job.options.windows)
            | Embed(job.stages[0])
            | beam.Reshuffle()
            | WriteParquet(job.run)
            | Summarize(job.run)
        )

    execute(job.run, job.units, job.options.beam_args, build, job.check)


def test_a_broken_fusion_is_named_and_writes_no_wrong_row(
    known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shuffle keeps no order: a unit of several windows either comes whole and in order, or is refused."""
    pickled = count_pickled(monkeypatch)
    job = prepare(options(known.root, tmp_path, windows=Windows(samples=1)))
    with pytest.raises(FlowError, match=r"fus.*Reshuffle"):
        run_with_a_shuffle(job)
    assert pickled["Batch"] > 0
    found = read_parts(tmp_path)
    assert_same(found, {name: rows for name, rows in known.parts.items() if name in found})
    assert not list((tmp_path / "_mmbeam" / "tmp").glob("*"))
    report = embed(options(known.root, tmp_path))  # and the job as it should be goes on from there
    assert counts(report) == counts(known.report)
    assert_same(read_parts(tmp_path), known.parts)


def test_units_of_one_window_survive_a_shuffle(known: Known, tmp_path: Path) -> None:
    run_with_a_shuffle(prepare(options(known.root, tmp_path, windows=Windows())))
    assert_same(read_parts(tmp_path), known.parts)


# Retries and races


def test_a_bundle_that_comes_twice_calls_the_model_once(
    known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps' functions called over the same units again, as a runner does that lost a bundle's result."""
    job = prepare(options(known.root, tmp_path))
    first = run_bundle(job)
    written = read_parts(tmp_path)
    calls = count_calls(monkeypatch)
    second = run_bundle(job)
    assert [report.status for report in first] == ["written"] * 5
    assert [report.status for report in second] == ["kept"] * 5
    assert [report.tally for report in second] == [report.tally for report in first]
    assert not calls
    assert read_parts(tmp_path) == written
    assert_same(written, known.parts)


def run_bundle(job: EmbedJob) -> list[UnitReport]:
    read = ReadShards(job.stages[0].needs, run=job.run, windows=job.options.windows).dofn
    model, write = Embed(job.stages[0]).dofn, WriteParquet(job.run).dofn
    write.start_bundle()
    reports = [
        report
        for unit in job.units
        for batch in read.process(unit)
        for embedded in model.process(batch)
        for report in write.process(embedded)
    ]
    write.finish_bundle()
    return reports


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the model is called from here on."""
    calls: Counter[str] = Counter()
    for name in ("encode_image", "encode_text"):
        real = getattr(ClipEncoder, name)

        def counted(self: ClipEncoder, items: Any, tokens: bool = False, _real: Any = real, _name: str = name) -> Any:
            calls[_name] += 1
            return _real(self, items, tokens)

        monkeypatch.setattr(ClipEncoder, name, counted)
    return calls


def test_a_bundle_that_dies_inside_a_unit_publishes_nothing_and_the_next_attempt_does_it_all(
    known: Known, tmp_path: Path
) -> None:
    job = prepare(options(known.root, tmp_path))
    read = ReadShards(job.stages[0].needs, run=job.run, windows=job.options.windows).dofn
    model, write = Embed(job.stages[0]).dofn, WriteParquet(job.run).dofn
    write.start_bundle()
    batches = read.process(job.units[0])
    for embedded in model.process(next(batches)):
        assert list(write.process(embedded)) == []
    del batches
    write.teardown()
    assert not read_parts(tmp_path)
    assert not list((tmp_path / "_mmbeam" / "tmp").glob("*"))
    run_bundle(job)
    assert_same(read_parts(tmp_path), known.parts)


STARTED_TOGETHER = """
import sys, time
from pathlib import Path
import mmbeam.jobs.embed
from mmbeam.cli import main
meeting = Path(sys.argv[1])
(meeting / sys.argv[2]).touch()
while len(list(meeting.iterdir())) < 2:
    time.sleep(0.001)
sys.exit(main(sys.argv[3:]))
"""


def test_two_processes_with_the_same_command_at_the_same_time(known: Known, tmp_path: Path) -> None:
    """Every unit once, whoever was first; both end well."""
    output, meeting = tmp_path / "out", tmp_path / "meeting"
    meeting.mkdir()
    arguments = ["embed", "--input", str(known.root / "in"), "--output", str(output), "--device=cpu"]
    arguments += ["--model", str(known.root / "clip"), "--batch-size=3", "--max-failure-rate=1"]
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", STARTED_TOGETHER, str(meeting), name, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    said = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    for text, _ in said:
        assert "samples: 35 = 34 rows + 1 failed" in text
    assert_same(read_parts(output), known.parts)
    assert not list((output / "_mmbeam" / "tmp").glob("*"))
    job = prepare(options(known.root, output))
    assert runs.committed(job.run) == {unit.id for unit in job.units}
    reports = runs.load_reports(job.run, [unit.id for unit in job.units])
    named = {report.failures_file for report in reports} - {None}
    assert {path.name for path in (output / "failures").glob("*")} == named
