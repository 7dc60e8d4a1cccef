"""In-process runners: the same rows, one fused stage, broken fusion, and retried bundles.

Runners in other processes: test_portable.py, and tests/flink.
"""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from known import Known, assert_same, counts, options, read_parts

from mmbeam.cli import main
from mmbeam.config import Windows
from mmbeam.errors import FlowError, UsageError
from mmbeam.jobs.embed import EmbedJob, embed, prepare
from mmbeam.jobs.execute import execute_pipeline
from mmbeam.jobs.options import device_of, pipeline_options, public_args
from mmbeam.jobs.runner import InProcessRunner
from mmbeam.models.encoders.joint import ClipEncoder
from mmbeam.runs.commits import committed, load_reports
from mmbeam.transforms import Embed, Plan, ReadShards, Summarize, WriteParquet
from mmbeam.types import Batch, UnitReport

IN_PROCESS = {
    "DirectRunner": ["--runner=DirectRunner"],
    "FnApiRunner, 4 threads": [
        "--runner=FnApiRunner",
        "--direct_num_workers=4",
        "--direct_running_mode=multi_threading",
    ],
    "PortableRunner, loopback": ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"],
}


def test_the_corpus_has_missing_modalities_and_failures(known: Known) -> None:
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
def test_every_in_process_runner_writes_the_same_rows_and_pickles_no_batch(
    known: Known, beam_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = count_pickled(monkeypatch)
    report = embed(options(known.root, tmp_path, *beam_args))
    assert counts(report) == counts(known.report)
    assert_same(read_parts(tmp_path), known.parts)
    assert pickled["UnitReport"] >= 5  # the counter works: reports are pickled on their way to Summarize
    assert pickled["Batch"] == 0


def test_the_direct_runner_warns_that_it_runs_in_this_process(
    known: Known, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = ["--input", str(known.root / "in"), "--output", str(tmp_path), "--model", str(known.root / "clip")]
    assert main(["embed", *where, "--device=cpu", "--max-failure-rate=1", "--runner=DirectRunner"]) == 0
    warnings = [
        record for record in caplog.records if "--runner=DirectRunner: the job runs in this process" in record.message
    ]
    assert [record.levelname for record in warnings] == ["WARNING"]  # shown without --verbose


@pytest.mark.parametrize("beam_args", [["--runner=DirectRunner"], ["--runner", "direct"], []])
def test_the_direct_runner_is_the_in_process_runner_without_a_download(beam_args: list[str]) -> None:
    """Beam's DirectRunner would first download Prism, a Go binary."""
    assert type(beam.Pipeline(options=pipeline_options(beam_args)).runner) is InProcessRunner


class _Numbers(beam.DoFn):
    """Emits small elements for `seconds`, then their count."""

    def process(self, seconds: float) -> Iterator[tuple[str, int]]:
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            count += 1
            yield "received", 1
        yield "sent", count


def _write_count(count: tuple[str, int], directory: Path) -> None:
    (directory / count[0]).write_text(str(count[1]))


def test_no_element_is_lost_between_two_stages(tmp_path: Path) -> None:
    """FnApiRunner loses elements that it sends on a timer: see mmbeam.jobs.runner."""
    with beam.Pipeline(options=pipeline_options(())) as pipeline:
        sums = pipeline | beam.Create([2.5, 2.5]) | beam.ParDo(_Numbers()) | beam.Reshuffle() | beam.CombinePerKey(sum)
        sums | beam.Map(_write_count, tmp_path)
    received, sent = (int((tmp_path / name).read_text()) for name in ("received", "sent"))
    assert received == sent > 1000


class _EndsLater(beam.DoFn):
    """Fails for one element; for the other, creates a file at its end, and another if its teardown came first."""

    def setup(self) -> None:
        self._begun = Path()

    def process(self, element: tuple[str, Path]) -> None:
        name, directory = element
        if name == "fails":
            while not (directory / "begun").exists():
                time.sleep(0.01)
            raise ValueError("the cause")
        self._begun = directory / "begun"
        self._begun.touch()
        time.sleep(1)
        (directory / "done").touch()

    def teardown(self) -> None:
        if self._begun.name and not self._begun.with_name("done").exists():
            self._begun.with_name("torn down").touch()


@pytest.mark.parametrize("names", [("fails", "works"), ("works", "fails")])
def test_a_failed_job_waits_for_its_running_bundles(
    names: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """FnApiRunner tears down the DoFns of running bundles, which then print a KeyError."""
    pipeline = beam.Pipeline(options=pipeline_options(()))
    pipeline | beam.Create([(name, tmp_path) for name in names]) | beam.ParDo(_EndsLater())
    with pytest.raises(RuntimeError, match="the cause"):
        pipeline.run().wait_until_finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "done"]
    assert "KeyError" not in capfd.readouterr().err


def test_fnapirunner_still_needs_the_shim(tmp_path: Path) -> None:
    """If this fails, Beam waits for the bundles of a failed job: remove the executor from mmbeam/jobs/runner.py."""
    two_threads = PipelineOptions(["--direct_running_mode=multi_threading", "--direct_num_workers=2"])
    pipeline = beam.Pipeline(FnApiRunner(), two_threads)
    pipeline | beam.Create([("fails", tmp_path), ("works", tmp_path)]) | beam.ParDo(_EndsLater())
    with pytest.raises(RuntimeError, match="the cause"):
        pipeline.run()
    ended_before_the_job = (tmp_path / "done").exists()
    while not (tmp_path / "done").exists():
        time.sleep(0.01)
    time.sleep(1)  # the bundle prints at its end, which would disturb other tests
    assert not ended_before_the_job


def test_unknown_options_and_invisible_devices_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--no_such_option"):
        pipeline_options(["--no_such_option=1"])
    elsewhere = options(tmp_path, tmp_path, "--runner=FlinkRunner", "--flink_master=host:8081", device="auto")
    with pytest.raises(UsageError, match="the workers are on other machines"):
        device_of(elsewhere)
    here = replace(elsewhere, beam_args=("--runner=PortableRunner", "--environment_type", "LOOPBACK"), device="cpu")
    assert device_of(here) == "cpu"


def test_options_are_recorded_without_secrets() -> None:
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


def test_the_pipeline_file_runs_from_any_directory(known: Known, tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "pipelines" / "embed.py"
    arguments = ["--input", str(known.root / "in"), "--output", "out", "--model", str(known.root / "clip")]
    arguments += ["--device=cpu", "--batch-size=3", "--max-failure-rate=1", "--runner=DirectRunner"]
    done = subprocess.run([sys.executable, file, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:6]) == (0, "units:"), done.stderr
    assert_same(read_parts(tmp_path / "out"), known.parts)


# The fused stage


def test_reading_to_writing_is_one_fused_stage(known: Known, tmp_path: Path) -> None:
    """The stages are those of Beam's optimizer for the pipeline of the job."""
    pipeline = beam.Pipeline(options=pipeline_options())
    prepare(options(known.root, tmp_path)).build(pipeline)
    _, stages = FnApiRunner().create_stages(pipeline.to_runner_api())
    fused = [[transform.unique_name for transform in stage.transforms] for stage in stages]
    (stage,) = [names for names in fused if any("ReadShards" in name for name in names)]
    for step in ("Plan/Parse", "ReadShards/Read", "Embed0/Run", "WriteParquet/Write"):
        assert any(name.startswith(step) for name in stage), step


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
    """Run the job with a Reshuffle between its model and its writer."""

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

    execute_pipeline(job.run, job.units, job.options.beam_args, build, job.check)


@pytest.mark.parametrize("samples", [1, 1024])
def test_broken_fusion_is_an_error_in_the_first_window(
    samples: int, known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for units of one window, whose rows would be right."""
    pickled = count_pickled(monkeypatch)
    job = prepare(options(known.root, tmp_path, windows=Windows(samples=samples)))
    with pytest.raises(FlowError, match=r"breaks the fusion \(a Reshuffle, .*\(step Reshuffle/"):
        run_with_a_shuffle(job)
    assert pickled["Batch"] == 0
    assert not read_parts(tmp_path)
    assert not list((tmp_path / "_mmbeam" / "tmp").glob("*"))
    report = embed(options(known.root, tmp_path))  # the correct job resumes from there
    assert counts(report) == counts(known.report)
    assert_same(read_parts(tmp_path), known.parts)


# Retries and races


def test_a_repeated_bundle_calls_the_model_once(known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The DoFns process the same units again, as if the runner had lost the result of the bundle."""
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
    """Count the calls of the model from now on."""
    calls: Counter[str] = Counter()
    for name in ("encode_image", "encode_text"):
        real = getattr(ClipEncoder, name)

        def counted(self: ClipEncoder, items: Any, tokens: bool = False, _real: Any = real, _name: str = name) -> Any:
            calls[_name] += 1
            return _real(self, items, tokens)

        monkeypatch.setattr(ClipEncoder, name, counted)
    return calls


def test_a_failed_bundle_publishes_nothing_and_its_retry_writes_the_whole_unit(known: Known, tmp_path: Path) -> None:
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


@pytest.mark.torture
def test_two_processes_with_the_same_command_at_the_same_time(known: Known, tmp_path: Path) -> None:
    """Each unit is committed once, and both processes succeed."""
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
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    for text, _ in outputs:
        assert "samples: 35 = 34 rows + 1 failed" in text
    assert_same(read_parts(output), known.parts)
    assert not list((output / "_mmbeam" / "tmp").glob("*"))
    job = prepare(options(known.root, output))
    assert committed(job.run) == {unit.id for unit in job.units}
    reports = load_reports(job.run, [unit.id for unit in job.units])
    failure_files = {report.failures_file for report in reports} - {None}
    assert {path.name for path in (output / "_failures").glob("*")} == failure_files
