"""The Python API: a whole job, rows into another sink, and each transform alone."""

import json
import logging
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import shards
from apache_beam import coders
from outputs import make_batches, make_run, make_unit, read_rows
from tiny_audio_text import save_clap
from tiny_clip import save_clip

from mmbeam.config import Cleaning, ModelRef, Reading, Windows
from mmbeam.errors import ModelError, NoShardsError, RunMismatchError, UsageError
from mmbeam.jobs.embed import EmbedOptions, embed, embed_run
from mmbeam.jobs.options import pipeline_options
from mmbeam.runs.control import stop_reason, stop_run
from mmbeam.runs.plan import load_plan
from mmbeam.runs.run import open_run
from mmbeam.runs.summary import read_summary
from mmbeam.stages.embed import EmbedStage, embed_stage
from mmbeam.transforms import BatchCoder, Embed, Plan, ReadShards, Rows, Summarize, WriteParquet
from mmbeam.types import Batch, Needs, Sample, Tally, UnitReport

# The README's two pipelines. The fixture `here` creates the model and the folder that they name.
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
WHOLE_JOB, OTHER_SINK = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import apache_beam" in b)
MODEL = "openai/clip-vit-base-patch32"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_clip(home / MODEL)
    save_clap(home / "clap")
    truths = shards.make_truths(12)
    truths[4] = replace(truths[4], members={"txt": b"no image"})
    shards.make_webdataset(home / "shards", truths, shards=3)
    return home


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory with links to the shards and the models."""
    for name in ("openai", "shards", "clap"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


_collected: list[Any] = []


def _keep(element: Any) -> None:
    _collected.append(element)


def collect(*steps: Any) -> list[Any]:
    """Run a pipeline of `steps` in process and return the elements of the last."""
    _collected.clear()
    with beam.Pipeline(options=pipeline_options()) as pipeline:
        elements = pipeline
        for number, step in enumerate(steps):
            elements = elements | f"step {number}" >> step
        _ = elements | beam.Map(_keep)
    return list(_collected)


def command_options(output: str) -> EmbedOptions:
    """Return the options that the command line makes of --input 'shards/*.tar' --model MODEL."""
    return EmbedOptions(input=("shards/*.tar",), output=output, models=(ModelRef(model=MODEL),), device="cpu")


def test_the_command_resumes_a_job_written_in_python(here: Path) -> None:
    assert len(WHOLE_JOB.partition("\n\n")[2].splitlines()) <= 6
    exec(WHOLE_JOB, {})
    rows = read_rows(here / "out")
    assert [row["key"] for row in rows] == [f"{index:06d}" for index in range(12)]
    report = embed(command_options("out"))
    assert (report.units_written, report.units_kept) == (0, 3)
    embed(command_options("other"))
    assert read_rows(here / "other") == rows
    exec(WHOLE_JOB, {})
    assert read_rows(here / "out") == rows


def test_rows_as_json_into_another_sink(here: Path) -> None:
    exec(OTHER_SINK, {})
    lines = [json.loads(line) for path in here.glob("rows*.jsonl") for line in path.read_text().splitlines()]
    embed(command_options("out"))
    assert sorted(lines, key=lambda row: str(row["key"])) == read_rows(here / "out")
    assert [row["key"] for row in lines if row["image_embedding"] is None] == ["000004"]


def test_rows_into_beams_own_parquet(here: Path) -> None:
    stage = embed_stage(MODEL)
    rows = Rows(stage)
    with beam.Pipeline(options=pipeline_options()) as pipeline:
        elements = pipeline | Plan("shards/*.tar") | ReadShards(stage.needs) | Embed(stage) | rows
        _ = elements | beam.io.WriteToParquet("rows", rows.schema, file_name_suffix=".parquet")
    written = [row for path in here.glob("rows*.parquet") for row in pq.read_table(path).to_pylist()]
    embed(command_options("out"))
    assert sorted(written, key=lambda row: str(row["key"])) == read_rows(here / "out")


# Stages and runs


def test_embed_stage_takes_a_model_and_options(here: Path) -> None:
    stage = embed_stage(MODEL, modalities=["text"], name="clip", vector_type="float16", batch_size=8)
    assert (stage.modalities, stage.count_tokens, stage.device) == (("text",), True, "cpu")
    assert [output.name for output in stage.outputs] == ["clip_text_embedding"]
    assert stage.needs == Needs(modalities=frozenset({"text"}))
    assert embed_stage("clap").modalities == ("audio", "text")
    assert embed_stage(MODEL, modalities=["image"]).count_tokens is False
    with pytest.raises(UsageError, match=r"audio: .*clip.* encodes none of these; it encodes image, text"):
        embed_stage(MODEL, modalities=["audio"])
    with pytest.raises(ModelError, match="expected an existing directory"):
        embed_stage("./nowhere")


def test_contradictory_stages_are_rejected(here: Path) -> None:
    clip, clap = embed_stage(MODEL, name="clip"), embed_stage("clap", name="clap", dtype="bfloat16")
    with pytest.raises(UsageError, match="must agree on dtype"):
        embed_run("out", [clip, clap])
    filtered = embed_stage(MODEL, image_filter=("median", 3.0))
    with pytest.raises(UsageError, match="image_filter"):
        embed_run("out", [filtered])
    reading = Reading(cleaning=Cleaning(image_filter="median:3"))
    assert embed_run("out", [filtered], reading=reading).configuration["reading"]["cleaning"]["image_filter"]
    assert not (here / "out").exists()


def test_two_models_in_one_pipeline(here: Path) -> None:
    stages = [embed_stage(MODEL, name="clip"), embed_stage("clap", name="clap", count_tokens=False)]
    run = embed_run("out", stages)
    needs = stages[0].needs | stages[1].needs
    (report,) = collect(
        Plan("shards/*.tar", run), ReadShards(needs, run=run), *map(Embed, stages), WriteParquet(run), Summarize(run)
    )
    assert report.tally.outputs == {
        "clip_image_embedding": 11,
        "clip_text_embedding": 12,
        "clap_audio_embedding": 11,
        "clap_text_embedding": 12,
    }


# Each transform alone


def test_plan_lists_patterns_when_it_is_built(here: Path) -> None:
    units = collect(Plan(["shards/*0.tar", "shards/*2.tar"]))
    assert sorted(Path(unit.inputs[0].shard.path).name for unit in units) == [
        "shard-000000.tar",
        "shard-000002.tar",
    ]
    assert all(unit.inputs[0].shard.size for unit in units)
    with pytest.raises(NoShardsError, match="nothing"):
        Plan("nothing/*.tar")


def test_plan_takes_units_and_keeps_their_urls_limits_and_replace_marks() -> None:
    unit = replace(make_unit("a-1", path="http://h/a.tar", url="http://h/a.tar?sig=1"), limit=3, replace=True)
    assert collect(Plan([unit])) == [unit]
    with pytest.raises(NoShardsError, match="no pattern was given"):
        Plan([])


@pytest.mark.parametrize(("task", "units"), [("embed", 1), ("caption", 8)])
def test_the_task_of_a_run_decides_the_size_of_its_units(task: str, units: int, tmp_path: Path) -> None:
    with (tmp_path / "giant.tar").open("wb") as shard:
        shard.truncate(256 << 20)
    run = make_run(str(tmp_path / "out"), task=task)
    assert len(Plan(str(tmp_path / "giant.tar"), run).units) == units


def test_plan_extends_a_run_and_rejects_another_configuration(here: Path) -> None:
    run = embed_run("out", [embed_stage(MODEL)])
    first = Plan("shards/*0.tar", run).units
    assert {unit.id for unit in first} < {unit.id for unit in Plan("shards/*.tar", run).units}
    assert len(load_plan(run)) == 3
    stop_run(run, "too many failures")
    Plan("shards/*.tar", run)  # a new launch clears the stop
    assert stop_reason(run) is None
    with pytest.raises(RunMismatchError, match="`dtype`: float32 -> float16"):
        Plan("shards/*.tar", embed_run("out", [embed_stage(MODEL, dtype="float16")]))


def test_read_shards_alone(here: Path) -> None:
    needs = Needs(modalities=frozenset({"image"}))
    batches = collect(Plan("shards/*.tar"), ReadShards(needs, windows=Windows(samples=3)))
    assert sorted((Path(b.samples[0].shard).name, b.index, b.last, len(b.samples)) for b in batches) == [
        (f"shard-{number:06d}.tar", index, last, count)
        for number in range(3)
        for index, last, count in ((0, False, 3), (1, True, 1))
    ]
    for batch in batches:
        for sample in batch.samples:
            assert (sample.image is not None, sample.audio) == (sample.key != "000004", None)


def test_embed_alone(here: Path) -> None:
    stage = embed_stage(MODEL)
    picture = shards.natural_image(0)
    samples = (
        Sample(key="a", shard="s", offset=0, present=frozenset({"image"}), image=picture),
        Sample(key="b", shard="s", offset=512, present=frozenset({"text"}), text="a cat"),
    )
    batch = Batch(unit=make_unit(), index=0, last=True, samples=samples)
    (embedded,) = collect(beam.Create([0]), beam.FlatMap(lambda _: [batch]), Embed(stage))
    assert [name for name, array in embedded.features.items() if array[0].is_valid] == ["image_embedding"]
    assert embedded.features["text_embedding"].is_valid().to_pylist() == [False, True]
    assert embedded.tally.seconds["compute"] > 0


@pytest.mark.parametrize("changes", [{"samples": ()}, {"unit_error": "s.tar: not a tar"}, {"report": "kept"}])
def test_embed_passes_batches_without_samples_through_without_loading_a_model(changes: dict[str, Any]) -> None:
    if "report" in changes:
        changes = {"report": UnitReport(unit="a-1", status="kept")}
    stage = EmbedStage(model="/nowhere", spec=None, digest="", modalities=("text",))  # type: ignore[arg-type]
    batch = Batch(unit=make_unit(), index=0, last=True, **changes)
    assert collect(beam.Create([0]), beam.FlatMap(lambda _: [batch]), Embed(stage)) == [batch]


def test_write_parquet_and_summarize_alone(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    names = beam.Create(["a-1", "b-2"])
    reports = collect(names, beam.FlatMap(lambda name: make_batches(make_unit(name))), WriteParquet(run))
    assert sorted((report.unit, report.status, report.tally.rows) for report in reports) == [
        ("a-1", "written", 10),
        ("b-2", "written", 10),
    ]
    assert ds.dataset(tmp_path / "out" / "data").count_rows() == 20
    (summary,) = collect(beam.Create(reports), Summarize(run))
    assert (summary.units_written, summary.tally.samples) == (2, 20)
    assert read_summary(run) == summary


def test_write_parquet_reports_committed_and_unreadable_units(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    kept = Batch(unit=make_unit("a-1"), index=0, last=True, report=UnitReport(unit="a-1", status="kept"))
    broken = Batch(unit=make_unit("b-2"), index=0, last=True, unit_error="b-2.tar: does not exist")
    reports = collect(beam.Create([0]), beam.FlatMap(lambda _: [kept, broken]), WriteParquet(run))
    assert {report.unit: report.status for report in reports} == {"a-1": "kept", "b-2": "failed"}
    assert not (tmp_path / "out" / "data").exists() or not list((tmp_path / "out" / "data").iterdir())


def reject(report: Any) -> None:
    raise UsageError(f"{report.tally.samples} samples are not enough")


def test_a_failed_check_ends_the_job_after_the_summary_is_written(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    reports = [UnitReport(unit="a-1", status="kept", tally=Tally(samples=2, rows=2))]
    with pytest.raises(RuntimeError, match="UsageError: 2 samples are not enough"):  # Beam loses the type
        collect(beam.Create(reports), Summarize(run, reject))
    assert read_summary(run).tally.samples == 2


def test_rows_log_lost_samples_and_fail_on_an_unreadable_shard(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "bad").mkdir()
    (here / "bad" / "a.tar").write_bytes(shards.tar_bytes([("one.jpg", b"not an image"), ("two.txt", b"two")]))
    stage = embed_stage(MODEL)
    with caplog.at_level(logging.WARNING, "mmbeam"):
        (row,) = collect(Plan("bad/*.tar"), ReadShards(stage.needs), Embed(stage), Rows(stage))
    assert row["key"] == "two"
    assert "1 samples gave no row; 'one' of" in caplog.text
    (here / "bad" / "b.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(RuntimeError, match=r"ShardError: .*b\.tar"):
        collect(Plan("bad/*.tar"), ReadShards(stage.needs), Embed(stage), Rows(stage))


def test_rows_include_the_cleaned_text(here: Path) -> None:
    stage = embed_stage(MODEL, modalities=["text"])
    reading = Reading(cleaning=Cleaning(text=("lower",)))
    rows = Rows(stage, cleaning=True)
    elements = collect(Plan("shards/*.tar"), ReadShards(stage.needs, reading), Embed(stage), rows)
    assert {tuple(row) for row in elements} == {tuple(rows.schema.names)}
    assert [row["text_clean"] for row in elements] == [row["text"].lower() for row in elements]


def test_the_coder_estimates_the_size_of_a_batch_without_pickling() -> None:
    (batch, _) = make_batches(make_unit())
    coder = coders.registry.get_coder(Batch)
    assert isinstance(coder, BatchCoder)
    picture = replace(batch.samples[0], image=shards.natural_image(0, 320, 240))
    heavy = replace(batch, samples=(picture, *batch.samples[1:]))
    assert coder.estimate_size(heavy) - coder.estimate_size(batch) == 320 * 240 * 3
    assert coder.estimate_size(heavy) == pytest.approx(len(pickle.dumps(heavy)), rel=0.05)


def test_rows_of_a_committed_run_are_an_error(here: Path) -> None:
    """Committed units are not read, so their rows would be missing."""
    exec(WHOLE_JOB, {})
    stage = embed_stage(MODEL)
    run = embed_run("out", [stage])
    with pytest.raises(RuntimeError, match="omit `run` in ReadShards"):
        collect(Plan("shards/*.tar", run), ReadShards(stage.needs, run=run), Embed(stage), Rows(stage))


def test_reading_and_limit_are_those_of_the_run(here: Path) -> None:
    stage = embed_stage(MODEL)
    with pytest.raises(UsageError, match="another `reading`"):
        ReadShards(stage.needs, Reading(draft=True), embed_run("out", [stage]))
    (unit,) = Plan("shards/*.tar", embed_run("few", [stage], limit=2)).units
    assert unit.limit == 2
