"""docs/compose.md: every recipe, and mmbeam's steps between sources, sinks and steps of other people."""

import json
import logging
import pickle
import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
from apache_beam.metrics import MetricsFilter
from apache_beam.metrics.metric import Lineage
from apache_beam.transforms.display import DisplayData
from outputs import make_batches, make_run, make_unit, read_rows, write_unit
from test_transforms import collect
from tiny_clip import save_clip

from mmbeam.api import load_encoder
from mmbeam.config import FieldMap, ModelRef, Reading, Windows
from mmbeam.errors import FlowError, ShardError, UsageError
from mmbeam.jobs.embed import EmbedOptions, embed, embed_run
from mmbeam.jobs.options import pipeline_options
from mmbeam.names import MODALITIES
from mmbeam.runs.commits import Totals
from mmbeam.runs.run import open_run
from mmbeam.runs.summary import read_summary
from mmbeam.stages.embed import embed_stage
from mmbeam.transforms import (
    BatchCoder,
    Embed,
    EmbedRows,
    Filter,
    Plan,
    ReadShards,
    Rows,
    StageEmbeddings,
    Summarize,
    ToBatches,
    WriteParquet,
    parse_example,
)
from mmbeam.transforms.plan import Sum
from mmbeam.types import Needs, Tally, UnitReport

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "compose.md").read_text(encoding="utf-8")
RECIPES = {
    title: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
}
JPEG = shards.encode_image(shards.natural_image(0))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, shards of 12 samples with one broken picture, and a run over them."""
    home = tmp_path_factory.mktemp("home")
    save_clip(home / "clip")
    truths = shards.make_truths(12)
    members = [*shards.named_members(truths), ("broken.jpg", b"not an image")]
    (home / "shards").mkdir()
    (home / "shards" / "a.tar").write_bytes(shards.tar_bytes(members))
    embed(EmbedOptions(input=(str(home / "shards"),), output=str(home / "out"), models=(model(home),), device="cpu"))
    return home


def model(home: Path) -> ModelRef:
    return ModelRef(model=str(home / "clip"))


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory with links to the shards, the model and deploy/."""
    for name in ("shards", "clip"):
        (tmp_path / name).symlink_to(home / name)
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def rows(home: Path) -> list[dict[str, Any]]:
    """The rows of `mmbeam embed` over the shards."""
    return read_rows(home / "out")


def run_recipe(title: str, here: Path, block: int = 0) -> dict[str, Any]:
    """Run a block of the document, and return its names."""
    names: dict[str, Any] = {"MODEL": str(here / "clip"), "JPEG": JPEG}
    exec(compile(RECIPES[title][block], title, "exec"), names)
    return names


def test_dictionaries(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe("Dictionaries in, dictionaries out", here)
    a, b = sorted(capsys.readouterr().out.splitlines())
    assert re.fullmatch(r"\('a', \[[-\d., e]+\]\)", a)
    assert b == "('b', None)"


def test_a_table_of_bytes(here: Path, rows: list[dict[str, Any]]) -> None:
    truths = [truth for truth in shards.make_truths(12) if "jpg" in truth.members]
    table = [{"key": t.key, "photo": t.members["jpg"], "title": t.members.get("txt", b"").decode()} for t in truths]
    pq.write_table(pa.Table.from_pylist(table), here / "products.parquet")
    run_recipe("A table of bytes in: Parquet, BigQuery, Avro", here)
    written = [row for path in here.glob("vectors*.parquet") for row in pq.read_table(path).to_pylist()]
    expected = {row["key"]: row["image_embedding"] for row in rows}
    assert len(written) == len(truths) > 0
    for row in written:
        assert row["image_embedding"] == pytest.approx(expected[row["key"]], abs=1e-5)
        assert row["shard"] == "products"


def example(**features: bytes | int) -> bytes:
    """Return a tf.train.Example, encoded by hand."""

    def field(number: int, content: bytes) -> bytes:
        length, encoded = len(content), b""
        while length > 127:
            encoded, length = encoded + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + encoded + bytes([length]) + content

    entries = b""
    for name, value in features.items():
        kind = field(1, field(1, value)) if isinstance(value, bytes) else field(3, field(1, bytes([value])))
        entries += field(1, field(1, name.replace("__", "/").encode()) + field(2, kind))
    return field(1, entries)


def test_tfrecord(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = example(image__encoded=JPEG, label=7, key=b"seven")
    assert parse_example(record) == {"image/encoded": JPEG, "label": 7, "key": b"seven"}
    with beam.Pipeline(options=pipeline_options()) as pipeline:
        _ = pipeline | beam.Create([record]) | beam.io.WriteToTFRecord("examples/train", file_name_suffix=".tfrecord")
    run_recipe("TFRecord in", here)
    (line,) = capsys.readouterr().out.splitlines()
    assert "'key': 'seven'" in line
    assert "'image_embedding': [" in line


def test_bytes_that_are_no_example_are_named() -> None:
    with pytest.raises(ShardError, match=r"expected a tf\.train\.Example"):
        parse_example(b"\x0a\xff not a message")


def test_rows_with_a_schema(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe("beam.Row with a schema out", here)
    (line,) = capsys.readouterr().out.splitlines()
    assert "samples=12" in line


def test_a_schema_describes_every_column(here: Path, rows: list[dict[str, Any]]) -> None:
    """Rows pass a shuffle, which encodes them by their schema, unchanged."""
    stage = embed_stage("clip", tokens=True)
    made = collect(Plan("shards/*.tar"), ReadShards(stage.needs), Embed(stage), Rows(stage, form="row"), Shuffle())
    by_key = {row.key: row for row in made}
    assert by_key.keys() == {row["key"] for row in rows}
    for row in rows:
        assert (by_key[row["key"]].text, by_key[row["key"]].offset) == (row["text"], row["offset"])
        assert by_key[row["key"]].image_width == row["image_width"]
        vector = by_key[row["key"]].image_embedding
        assert (None if vector is None else list(vector)) == row["image_embedding"]
        tokens = by_key[row["key"]].image_tokens
        assert (tokens is None) == (row["image_embedding"] is None)


class Shuffle(beam.PTransform):
    def expand(self, rows: Any) -> Any:
        return rows | beam.Reshuffle()


def test_qdrant(here: Path, rows: list[dict[str, Any]]) -> None:
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path="qdrant")
    width = len(next(row["image_embedding"] for row in rows if row["image_embedding"]))
    client.create_collection("pictures", {"dense": models.VectorParams(size=width, distance=models.Distance.COSINE)})
    client.close()
    for _ in range(2):  # the second run replaces the items of the first
        run_recipe("Into a vector database", here)
    client = QdrantClient(path="qdrant")
    query = next(row for row in rows if row["image_embedding"])
    (best,) = client.query_points("pictures", query=query["image_embedding"], using="dense", limit=1).points
    assert (best.payload or {})["key"] == query["key"]
    assert client.count("pictures").count == sum(row["image_embedding"] is not None for row in rows)
    client.close()


def test_failures(here: Path) -> None:
    run_recipe("Failures into a sink of their own", here)
    (line,) = [line for path in here.glob("failures*") for line in path.read_text().splitlines()]
    assert line.startswith("broken: ")


def test_a_filter_keeps_the_accounts(here: Path) -> None:
    names = run_recipe("Drop samples between the steps", here)
    tally = read_summary(names["run"]).tally
    assert tally.rows == 12 - tally.skipped["small images"] + 1
    assert tally.skipped["small images"] > 0
    assert tally.samples == 13


def test_a_filter_behind_a_stage(here: Path, rows: list[dict[str, Any]]) -> None:
    stage = embed_stage("clip")
    kept = Filter(lambda sample: sample.key != "000003" and sample.key != "broken")
    made = collect(Plan("shards/*.tar"), ReadShards(stage.needs), Embed(stage), kept, Rows(stage))
    expected = {row["key"]: row["image_embedding"] for row in rows if row["key"] != "000003"}
    assert {row["key"]: row["image_embedding"] for row in made} == expected


def drop_samples(batch: Any) -> Any:
    from dataclasses import replace

    return replace(batch, samples=batch.samples[::2])


@pytest.mark.parametrize("behind", [False, True])
def test_a_step_that_drops_samples_is_told_how(behind: bool, here: Path) -> None:
    stage = embed_stage("clip")
    run = make_run(str(here / "run"), stage.outputs)
    drop = beam.Map(drop_samples)
    steps = [Embed(stage), drop] if behind else [drop, Embed(stage)]
    with pytest.raises(RuntimeError, match=r"use mmbeam\.transforms\.Filter"):
        collect(Plan("shards/*.tar", run), ReadShards(stage.needs, run=run), *steps, WriteParquet(run), Summarize(run))


def test_a_stage_of_ones_own(here: Path) -> None:
    names = run_recipe("A stage of your own", here)
    code = RECIPES["A stage of your own"][0]
    assert len(re.findall(r"^(?:class| +).*$", code.partition("stage = ")[0], re.MULTILINE)) <= 15
    written = {row["key"]: row["brightness"] for row in read_rows(here / "out")}
    assert sum(value is None for value in written.values()) == 0
    report = read_summary(names["run"])
    assert (report.tally.outputs["brightness"], report.tally.failed) == (12, 1)
    configuration = names["run"].configuration
    assert configuration["models"] == {"Brightness": {"family": "Brightness", "digest": "brightness-1"}}
    both = embed_run(str(here / "both"), [embed_stage("clip"), names["stage"]])
    assert both.configuration["columns"] == ["image_embedding", "text_embedding", "brightness"]


def test_run_inference(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe("RunInference", here)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("('a', [")


@pytest.mark.filterwarnings("ignore:keys will default to True:DeprecationWarning")  # how Beam calls jsonpickle
def test_a_stage_in_ml_transform(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe("MLTransform", here)
    rows = [eval(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    vectors = load_encoder(str(here / "clip")).encode(texts=["a red car", "a blue boat"])["text"]
    assert sorted(row["id"] for row in rows) == [1, 2]
    for row in rows:
        assert row["title"] == pytest.approx(vectors[row["id"] - 1].tolist(), abs=1e-5)
    stage = embed_stage("clip")
    with pytest.raises(UsageError, match="`modality`: expected one of image, text, found None"):
        StageEmbeddings(stage, columns=["a"])
    handler = StageEmbeddings(stage, columns=["a"], modality="image").get_model_handler()
    results = handler.run_inference([{"a": JPEG}, {"a": b"broken"}], handler.load_model())
    assert [row["a"] is None for row in results] == [False, True]


def test_rows_into_a_relational_database(here: Path) -> None:
    for _ in range(2):
        run_recipe("Into a relational database", here)
    with closing(sqlite3.connect(here / "pictures.db")) as database:
        rows = database.execute("SELECT key, length(vector) FROM pictures").fetchall()
    assert len(rows) == len({key for key, _ in rows}) == 12
    assert {size for _, size in rows} == {4 * embed_stage("clip").outputs[0].columns[0].type.list_size}


def test_metrics(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe("What a run counted", here)
    counters = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert (counters["samples"], counters["rows"], counters["failed"]) == ("13", "12", "1")
    assert counters["failures: decode: DecodeError"] == "1"
    assert int(counters["compute_ms"]) > 0
    assert int(counters["bytes_read"]) > 0


def test_yaml(here: Path, rows: list[dict[str, Any]]) -> None:
    from apache_beam.yaml import main

    (command,) = re.findall(r"^\$ (.*)", DOCUMENT, re.MULTILINE)
    path = command.partition("--yaml_pipeline_file=")[2]
    text = (ROOT / path).read_text().replace("MODEL", str(here / "clip"))
    main.run([f"--yaml_pipeline={text}"])
    lines = [row for path in here.glob("vectors*") for row in pq.read_table(path).to_pylist()]
    expected = {row["key"]: row["image_embedding"] for row in rows}
    assert {line["key"] for line in lines} == expected.keys()
    for line in lines:
        assert line["vector"] == (expected[line["key"]] and pytest.approx(expected[line["key"]], abs=1e-5))


def test_lance(here: Path, home: Path, rows: list[dict[str, Any]]) -> None:
    """In a process of its own, since Lance warns of every later fork of its process."""
    (here / "out").symlink_to(home / "out")
    code = (
        RECIPES["Into Lance or Iceberg"][0]
        + "import json; print(json.dumps(lance.dataset('pictures.lance').to_table().to_pylist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(rows))


def test_iceberg(here: Path, home: Path, rows: list[dict[str, Any]]) -> None:
    (here / "out").symlink_to(home / "out")
    names = run_recipe("Into Lance or Iceberg", here, block=1)
    stored = names["catalog"].load_table("media.pictures").scan().to_arrow().to_pylist()
    assert [row["key"] for row in stored] == [row["key"] for row in rows]


# ToBatches


def test_elements_are_samples_like_those_of_shards() -> None:
    needs = Needs(modalities=frozenset(MODALITIES))
    elements = [
        {"key": "a", "image": JPEG, "text": "words", "price": 3, "wav": None},
        {"key": "a", "jpg": JPEG},
        {"txt": b"no key"},
        {"key": "bad", "png": b"no picture"},
    ]
    (batch,) = collect(beam.Create(elements, reshuffle=False), ToBatches(needs, source="table"))
    first, again, nameless, bad = batch.samples
    assert (first.key, first.text, first.shard, first.image is not None) == ("a", "words", "table", True)
    assert (again.key, again.offset) == ("a", first.offset + 1)
    assert re.fullmatch("[0-9a-f]{16}", nameless.key)
    assert (bad.image, [failure.key for failure in batch.failures]) == (None, ["bad"])
    (same,) = collect(beam.Create(elements[2:3]), ToBatches(needs))
    assert same.samples[0].key == nameless.key


def test_elements_become_windows_of_the_given_size() -> None:
    elements = [{"key": str(number), "txt": "words"} for number in range(7)]
    windows = collect(
        beam.Create(elements, reshuffle=False),
        ToBatches(Needs(modalities=frozenset({"text"})), windows=Windows(samples=3)),
    )
    assert sum(len(batch.samples) for batch in windows) == 7
    assert max(len(batch.samples) for batch in windows) == 3


def test_a_value_that_is_neither_bytes_nor_text_is_named() -> None:
    with pytest.raises(RuntimeError, match="expected bytes or str in field photo, found int"):
        collect(
            beam.Create([{"photo": 3}]),
            ToBatches(Needs(modalities=frozenset({"image"})), Reading(fields=FieldMap(image="photo"))),
        )


def test_shards_and_rows_are_contradictory_inputs(here: Path) -> None:
    for shards_, source in (("shards/*.tar", beam.Create([{"txt": "a"}])), (None, None)):
        with pytest.raises(UsageError, match="`shards`: expected"), beam.Pipeline() as pipeline:
            _ = (pipeline if source is None else pipeline | source) | EmbedRows("clip", shards_)


def test_elements_without_a_field_of_any_kind_are_an_error_that_names_them() -> None:
    decode = ToBatches(Needs(modalities=frozenset({"text"}))).dofn
    with pytest.raises(UsageError, match=r"found title, id; name yours by .*FieldMap\(text='title'\)"):
        list(decode.process([{"title": "a"}, {"id": 1}]))
    (batch,) = decode.process([{"title": "a"}, {"text": None}])
    assert len(batch.samples) == 2


# Rows


def test_the_form_and_the_vector_of_rows_are_checked(here: Path) -> None:
    stage = embed_stage("clip")
    with pytest.raises(UsageError, match="`form`: expected one of dict, row, item"):
        Rows(stage, form="tuple")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="`vector`: expected one of image_embedding, text_embedding, found None"):
        Rows(stage, form="item")


# What a runner sees


@pytest.fixture
def result(here: Path) -> Iterator[Any]:
    stage = embed_stage("clip")
    run = make_run(str(here / "run"), stage.outputs)
    pipeline = beam.Pipeline(options=pipeline_options())
    batches = pipeline | Plan("shards/*.tar", run) | ReadShards(stage.needs, run=run) | Embed(stage)
    _ = batches | WriteParquet(run) | Summarize(run)
    done = pipeline.run()
    done.wait_until_finish()
    return done


def test_counters_distribution_and_lineage_of_a_job(here: Path, result: Any) -> None:
    metrics = result.metrics().query(MetricsFilter().with_namespace("mmbeam"))
    counters = {counter.key.metric.name: counter.committed for counter in metrics["counters"]}
    assert (counters["units_written"], counters["samples"], counters["rows"], counters["failed"]) == (1, 13, 12, 1)
    assert {"read_ms", "decode_ms", "compute_ms", "read_wait_ms", "device_wait_ms"} <= counters.keys()
    (units,) = [d.committed for d in metrics["distributions"] if d.key.metric.name == "unit_ms"]
    assert units.count == 1
    shard = str(here / "shards" / "a.tar")
    assert Lineage.query(result.metrics(), Lineage.SOURCE) == {f"filesystem:localhost.{shard}"}
    assert Lineage.query(result.metrics(), Lineage.SINK) == {f"filesystem:localhost.{here / 'run'}"}


def test_the_steps_describe_themselves(here: Path) -> None:
    stage = embed_stage("clip")
    run = make_run(str(here / "run"), stage.outputs)
    shown = {
        item.key: item.value
        for step in (Plan("shards/*.tar", run), ReadShards(stage.needs), Embed(stage), WriteParquet(run))
        for item in DisplayData.create_from(step).items
    }
    assert shown["model"] == stage.model
    assert shown["digest"] == stage.digest
    assert (shown["device"], shown["units"], shown["fingerprint"]) == ("cpu", 1, run.fingerprint)


# Lost units, and broken fusion


class Lose(beam.PTransform):
    """Drop the element of the unit `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def expand(self, elements: Any) -> Any:
        return elements | beam.Filter(lambda element: self.name not in str(getattr(element, "id", "") or element.unit))


@pytest.mark.parametrize("where", ["before", "within", "after"])
def test_a_lost_unit_is_an_error_that_names_it(where: str, here: Path) -> None:
    stage = embed_stage("clip", modalities=["text"])
    for name in "bc":
        (here / f"{name}.tar").write_bytes(shards.tar_bytes([(f"{name}.txt", b"words")]))
    run = make_run(str(here / "run"), stage.outputs)
    plan = Plan(["b.tar", "c.tar"], run)
    lost = next(unit.id for unit in plan.units if unit.inputs[0].shard.path.endswith("b.tar"))
    lose = [Lose(lost)]
    steps = [
        plan,
        *(lose if where == "before" else ()),
        ReadShards(stage.needs, run=run),
        *(lose if where == "within" else ()),
        Embed(stage),
        WriteParquet(run),
        *(lose if where == "after" else ()),
        Summarize(run),
    ]
    with pytest.raises(RuntimeError, match=rf"FlowError: 1 of 2 planned units were not reported: {lost}"):
        collect(*steps)
    report = read_summary(run)
    assert report.tally.rows == (2 if where == "after" else 1)
    assert (report.failed.keys() == {lost}) == (where != "after")


def test_a_unit_that_is_reported_twice_counts_once(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    [written, other] = [write_unit(run, make_unit(name)).commit() for name in ("a-1", "b-2")]
    failed = UnitReport(unit="a-1", status="failed", error="another attempt was first")
    reports = [replace(written, status="kept"), failed, other, written]
    (report,) = collect(beam.Create(reports), Summarize(run))
    assert (report.units_written, report.units_kept, report.units_failed, report.tally.rows) == (2, 0, 0, 20)


def test_reports_are_summed_in_any_grouping(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    random_ = random.Random(0)
    reports = []
    for number in range(2000):
        inputs = [{"path": f"{number}.tar", "begin": 0, "end": None, "size": 1, "etag": None}]
        match number % 500:
            case 1:
                inputs[0] |= {"broken": "cut off"}
            case 2 | 3 | 4:
                begin = number % 500 - 2
                inputs[0] |= {"path": "big.tar", "begin": begin, "end": None if begin == 2 else begin + 1}
            case 5:
                inputs += [{**inputs[0], "error": "not a tar"}]
        reports.append(
            UnitReport(
                unit=f"unit-{number}",
                status="failed" if number % 500 == 6 else "written" if number % 2 else "kept",
                tally=Tally(samples=2, rows=1, failed=1, seconds={"compute": 0.5}, failures={"decode: E": 1}),
                failures_file=f"{number}.parquet",
                inputs=tuple(inputs),
            )
        )
    whole = Totals.of(reports)
    assert len(pickle.dumps(whole)) < 100 * len(reports)
    random_.shuffle(reports)
    combine = Sum()
    groups = [Totals.of(reports[begin : begin + 7]) for begin in range(0, len(reports), 7)]
    some = combine.merge_accumulators(groups[100:])
    total = combine.merge_accumulators([*groups[:100], pickle.loads(pickle.dumps(some))])
    assert total.report(2.0) == replace(whole.report(2.0), broken=total.report(2.0).broken)
    assert (total.report(2.0).units_written, total.report(2.0).units_failed) == (1000, 4)
    assert sorted(total.parts["big.tar"][1]) == sorted(whole.parts["big.tar"][1])
    assert len(total.packs) == len(total.report(2.0).broken) == 4
    assert dict(total.reported(["unit-0", "unit-6", "unit-2000"])) == {
        "unit-0": True,
        "unit-6": True,
        "unit-2000": False,
    }


def test_a_batch_is_never_serialised() -> None:
    (batch, _) = make_batches(make_unit())
    with pytest.raises(FlowError, match="Remove the step that breaks the fusion"):
        BatchCoder().encode(batch)


def test_a_shuffle_of_batches_is_an_error_that_names_the_step(here: Path) -> None:
    stage = embed_stage("clip", modalities=["text"])
    with pytest.raises(
        RuntimeError, match=r"FlowError: unit a-\w+: a Batch would be .*while running 'step 3/Reshuffle"
    ):
        collect(Plan("shards/*.tar"), ReadShards(stage.needs), Embed(stage), Shuffle(), Rows(stage))


def test_the_failures_of_rows_are_logged_too(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = embed_stage("clip")
    with caplog.at_level(logging.WARNING, "mmbeam"):
        collect(Plan("shards/*.tar"), ReadShards(stage.needs), Embed(stage), Rows(stage))
    assert "1 samples gave no row; 'broken' of" in caplog.text
