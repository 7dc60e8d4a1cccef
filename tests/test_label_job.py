"""The label job end to end: shards in, committed rows of labels out, with failures and resume, and the command."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
import shards
from outputs import is_conserved, read_failures, read_rows
from PIL import Image
from tiny_labellers import IMAGES, TEXTS

import mmbeam
from mmbeam.cli import main
from mmbeam.config import Labelling, ModelRef, Windows
from mmbeam.decode.masks import encode_mask
from mmbeam.errors import RunMismatchError, SampleError, UsageError
from mmbeam.jobs.label import LabelOptions, label, prepare
from mmbeam.jobs.options import pipeline_options
from mmbeam.names import EXTENSIONS
from mmbeam.report.page import _found
from mmbeam.stages.label import label_stage
from mmbeam.transforms import LabelRows
from mmbeam.types import Batch, RunReport, Sample, WorkUnit


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return IMAGES["vit"](tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TEXTS["bert"](tmp_path_factory.mktemp("models") / "bert")


def run(tmp_path: Path, model: Path, task: Any = "classify", **changes: Any) -> RunReport:
    options = LabelOptions(
        input=(str(tmp_path / "in" / "*.tar"),),
        output=str(tmp_path / "out"),
        models=(ModelRef(model=str(model)),),
        labelling=Labelling(task=task, top_k=2),
        device="cpu",
        batch_size=4,
        windows=Windows(samples=7),
    )
    return label(replace(options, **changes))


def test_rows_have_labels_and_bad_images_are_failures(tmp_path: Path, vit: Path) -> None:
    made = shards.make_hostile(tmp_path / "in")
    report = run(tmp_path, vit, max_failure_rate=1.0)
    assert is_conserved(report)
    rows = {(Path(row["shard"]).stem, row["key"]): row for row in read_rows(tmp_path / "out")}
    for name, corpus in made.items():
        for truth in corpus.truths:
            row = rows.get((name, truth.key))
            if not truth.bad and truth.size is not None:
                assert row is not None
                assert (len(row["labels"]), row["errors"]) == (2, [])
            elif row is not None and truth.bad:
                assert row["labels"] is None
    assert any(record["outputs"] == ["labels"] for record in read_failures(tmp_path / "out"))


def test_a_second_run_does_nothing_and_another_labelling_is_an_error(tmp_path: Path, vit: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(8))
    assert run(tmp_path, vit).units_written == 2
    before = read_rows(tmp_path / "out")
    again = run(tmp_path, vit)
    assert (again.units_written, again.units_kept) == (0, 2)
    with pytest.raises(RunMismatchError, match="labelling"):
        run(tmp_path, vit, labelling=Labelling(task="classify", top_k=3))
    run(tmp_path, vit, overwrite=True, windows=Windows(samples=3), batch_size=3)
    for row, first in zip(read_rows(tmp_path / "out"), before, strict=True):
        assert [record["label"] for record in row["labels"]] == [record["label"] for record in first["labels"]]


def test_several_models_write_a_column_each_as_each_does_alone_and_an_interrupted_run_is_resumed(
    tmp_path: Path, vit: Path, bert: Path
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(9))
    models = (ModelRef(model=str(vit), name="a"), ModelRef(model=str(bert), name="b"))
    both = LabelOptions(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "both"),
        models=models,
        labelling=Labelling(task="classify", top_k=2),
        device="cpu",
    )
    with pytest.raises(UsageError, match="a different name for each"):
        label(replace(both, models=tuple(replace(ref, name=None) for ref in models)))
    job = prepare(both)
    replace(job, units=job.units[:1]).execute()
    report = label(both)
    assert is_conserved(report)
    assert (report.units_written, report.units_kept) == (1, 1)
    rows = read_rows(tmp_path / "both")
    for ref in models:
        label(replace(both, output=str(tmp_path / str(ref.name)), models=(replace(ref, name=None),)))
        alone = read_rows(tmp_path / str(ref.name))
        assert [row[f"{ref.name}_labels"] for row in rows] == [row["labels"] for row in alone]
    assert any(row["a_labels"] for row in rows)
    assert any(row["b_labels"] for row in rows)
    assert all(row["text_num_tokens"] for row in rows if row["text"])
    with pytest.raises(RunMismatchError, match="models"):
        label(replace(both, models=tuple(reversed(models))[:1]))


def test_without_a_pipeline_and_in_one_with_rows_the_labels_are_those_of_a_job(tmp_path: Path, vit: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(5), shards=1)
    run(tmp_path, vit)
    rows = {row["key"]: row["labels"] for row in read_rows(tmp_path / "out")}
    with beam.Pipeline(options=pipeline_options()) as pipeline:
        made = pipeline | LabelRows(str(vit), shards=str(tmp_path / "in" / "*.tar"), top_k=2, batch_size=4)
        _ = made | beam.Map(_check_row, rows)
    truths = [truth for truth in shards.make_truths(5) if rows[truth.key] is not None]
    images = [next(data for name, data in truth.members.items() if name in EXTENSIONS["image"]) for truth in truths]
    model = mmbeam.load_labeller(str(vit), top_k=2, device="cpu")
    for truth, labels in zip(truths, model.label(images=images), strict=True):
        _check(labels, rows[truth.key])
    assert model.label(images=[None, images[0]])[0] is None
    with pytest.raises(UsageError, match=r"`texts`: .* labels image only"):
        model.label(texts=["a"])
    with pytest.raises(SampleError, match=r"images\[0\]"):
        model.label(images=[b"not an image"])


def _check_row(row: Any, rows: dict[str, Any]) -> None:
    labels = row.labels
    _check(None if labels is None else [record._asdict() for record in labels], rows[row.key])


def _check(labels: list[dict[str, Any]] | None, expected: list[dict[str, Any]] | None) -> None:
    assert [record["label"] for record in labels or ()] == [record["label"] for record in expected or ()]
    for record, other in zip(labels or (), expected or (), strict=True):
        assert abs(record["score"] - other["score"]) < 1e-5


def test_an_image_that_fails_in_the_model_costs_one_record(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = label_stage(str(vit))
    model = stage.load()
    compute = model.compute

    def fail_on_black(modality: Any, inputs: Any) -> Any:
        if any(not image.any() for image in inputs):
            raise ValueError("black")
        return compute(modality, inputs)

    monkeypatch.setattr(model, "compute", fail_on_black)
    samples = tuple(
        Sample(
            key=str(number),
            shard="test",
            offset=number,
            present=frozenset({"image"}),
            image=np.full((40, 40, 3), number, np.uint8),
            image_size=(40, 40),
        )
        for number in range(5)
    )
    done = stage.run(model, Batch(unit=WorkUnit(id="test", inputs=()), index=0, last=True, samples=samples))
    assert [value is None for value in done.features["labels"].to_pylist()] == [True] + [False] * 4
    [failure] = done.failures
    assert (failure.key, failure.step, failure.error, failure.outputs) == ("0", "label", "ValueError", ("labels",))


def test_the_command_writes_labels_and_counts_tokens(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(5))
    args = ["label", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(bert)]
    assert main([*args, "--task", "sentiment", "--device", "cpu", "--top-k", "1", "--where", "text_chars > 0"]) == 0
    assert "5 labels" in capsys.readouterr().out
    for row in read_rows(tmp_path / "out"):
        assert len(row["labels"]) == 1
        assert row["text_num_tokens"] > 0
    recorded = json.loads((tmp_path / "out" / "_mmbeam" / "run.json").read_text())
    assert recorded["configuration"]["labelling"]["top_k"] == 1


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--task", "zero-shot"], "--task zero-shot needs --labels to look for"),
        (["--labels", "a,a"], "--labels a,a: a repeats"),
        (["--labels", ","], "expected at least one"),
        (["--segments", "panoptic"], "--segments needs --task segment"),
        (["--templates", "a {}"], "--templates needs --task zero-shot"),
        (["--task", "tag"], "which can do classify, sentiment"),
    ],
)
def test_contradictory_arguments(
    extra: list[str], words: str, tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(1), shards=1)
    args = ["label", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(bert)]
    assert main([*args, *extra]) == 2
    assert words in capsys.readouterr().err


def test_the_report_draws_boxes_and_masks(tmp_path: Path) -> None:
    """Boxes are scaled to the thumbnail, masks become a PNG, and labels are text; nothing is markup."""
    mask = np.zeros((400, 800), bool)
    mask[:200] = True
    hostile = "<b>cat</b>"
    found = {
        "objects": [{"label": hostile, "score": 0.9, "x": 80.0, "y": 40.0, "width": 160.0, "height": 80.0}],
        "segments": [{"label": "sky", "score": 0.8, "area": 1, "size": [400, 800], "rle": encode_mask(mask)}],
        "tags": [{"label": "PER", "score": 0.7, "start": 0, "end": 4, "text": "Anna"}],
    }
    card = _found(found, {"image_width": 800, "image_height": 400}, (320, 160))
    assert card["found"] == [["objects", hostile, 0.9], ["segments", "sky", 0.8], ["tags", "PER 'Anna'", 0.7]]
    assert card["boxes"] == [[hostile, 32.0, 16.0, 64.0, 32.0]]
    url = str(card["masks"])
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
    assert alpha.shape == (160, 320)
    assert (alpha[:80] > 0).all()
    assert not alpha[80:].any()
