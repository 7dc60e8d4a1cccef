"""The caption job end to end: shards or features in, committed captions out, with failures and retries."""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import shards
from outputs import is_conserved, read_failures, read_rows
from tiny_clip import save_clip
from tiny_generators import features, save_fusion

from mmbeam.cli import main
from mmbeam.config import Cleaning, FieldMap, ModelRef, Reading, Windows
from mmbeam.errors import MissingModalityError, RunMismatchError, UsageError
from mmbeam.jobs.caption import CaptionOptions, caption, caption_run
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.jobs.options import pipeline_options
from mmbeam.models.generators.fusion import FusionGenerator
from mmbeam.prompts.ask import Decoding, Generated, Request
from mmbeam.stages.generate import generate_stage
from mmbeam.transforms import Generate, Plan, ReadShards, Rows, Summarize, WriteParquet
from mmbeam.types import RunReport

GREEDY = Decoding(max_new_tokens=8)
COLUMNS = ("caption", "caption_num_tokens", "caption_logprob")


@pytest.fixture(scope="session")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fusion(tmp_path_factory.mktemp("models") / "fusion")


@pytest.fixture(scope="session")
def of_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes the vectors and tokens of the tiny CLIP."""
    sources = features(image_embedding=("image", 24, False), text_tokens=("text", 32, True))
    return save_fusion(tmp_path_factory.mktemp("models") / "of_features", sources)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `mmbeam embed` on 12 samples in 3 shards: one has no image, one a broken image."""
    home = tmp_path_factory.mktemp("embedded")
    truths = shards.make_truths(12)
    truths[4] = replace(truths[4], members={"txt": b"no image"})
    truths[6] = replace(truths[6], members={"jpg": b"\xff\xd8 not an image", "txt": b"a broken image"})
    shards.make_webdataset(home / "in", truths, shards=3)
    model = ModelRef(model=str(save_clip(home / "clip")))
    embed(
        EmbedOptions(
            input=(str(home / "in"),),
            output=str(home / "out"),
            models=(model,),
            device="cpu",
            tokens=True,
            max_failure_rate=1.0,
        )
    )
    return home / "out"


def run(tmp_path: Path, model: Path, source: Path | str, **changes: Any) -> RunReport:
    """Run a caption job on the CPU, with small windows so that a unit is several batches."""
    options = CaptionOptions(
        input=(str(source),),
        output=str(tmp_path / "out"),
        model=str(model),
        device="cpu",
        batch_size=4,
        windows=Windows(samples=7),
        decoding=GREEDY,
    )
    return caption(replace(options, **changes))


def captions(rows: Sequence[dict[str, Any]]) -> list[str | None]:
    return [row["caption"] for row in rows]


# From shards


def test_samples_with_any_modality_are_captioned(tmp_path: Path, fusion: Path) -> None:
    """A sample without image, audio and text has a null caption."""
    truths = shards.make_truths(15)
    for index, removed in enumerate((set(), {"jpg"}, {"txt"}, {"wav"}, {"jpg", "wav"}, {"jpg", "wav", "txt"})):
        truth = shards.make_truth(index, key=f"{index:06d}")
        truths[index] = replace(truth, members={n: data for n, data in truth.members.items() if n not in removed})
    made = shards.make_webdataset(tmp_path / "in", truths, shards=2)
    report = run(tmp_path, fusion, tmp_path / "in", explain=True)
    rows = read_rows(tmp_path / "out")
    assert [row["key"] for row in rows] == [truth.key for truth in made.truths]
    assert is_conserved(report)
    assert dict(report.tally.outputs) == {"caption": 14}
    assert not report.tally.failures
    assert [row["key"] for row in rows if row["caption"] is None] == ["000005"]
    assert len(set(captions(rows))) > 5
    for row, truth in zip(rows, made.truths, strict=True):
        kinds = {FieldMap().kind(name) for name in truth.members}
        attribution = {m: row[f"caption_{m}_attribution"] for m in ("image", "audio", "text")}
        assert {m for m, part in attribution.items() if part is not None} == kinds - {"metadata"}
        assert sum(filter(None, attribution.values())) == pytest.approx(float(bool(kinds - {"metadata"})))
        assert [row[name] is None for name in COLUMNS] == [row["caption"] is None] * 3
        assert (row["text_num_tokens"] is None) == ("txt" not in truth.members)
    schema = pq.read_schema(next((tmp_path / "out" / "data").glob("*.parquet")))
    types = [pa.string(), pa.int32(), pa.float32(), *[pa.float32()] * 3]
    names = [*COLUMNS, *(f"caption_{modality}_attribution" for modality in ("image", "audio", "text"))]
    assert [schema.field(name).type for name in names] == types


@pytest.mark.parametrize(
    "decoding",
    [replace(GREEDY, num_beams=3), replace(GREEDY, temperature=1.0, top_p=0.9, seed=3)],
    ids=["beam search", "sampling"],
)
def test_captions_do_not_depend_on_batches_and_windows(tmp_path: Path, fusion: Path, decoding: Decoding) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(10), shards=1)
    run(tmp_path, fusion, tmp_path / "in", decoding=decoding)
    run(
        tmp_path,
        fusion,
        tmp_path / "in",
        decoding=decoding,
        batch_size=1,
        windows=Windows(samples=3),
        output=str(tmp_path / "alone"),
    )
    together, alone = read_rows(tmp_path / "out"), read_rows(tmp_path / "alone")
    assert captions(together) == captions(alone)
    for a, b in zip(together, alone, strict=True):
        assert a["caption_logprob"] == pytest.approx(b["caption_logprob"], abs=1e-3)


def test_bad_input_costs_one_record_each(tmp_path: Path, fusion: Path) -> None:
    hostile = shards.make_hostile(tmp_path / "in")
    report = run(tmp_path, fusion, tmp_path / "in" / "*.tar", max_failure_rate=1.0)
    assert is_conserved(report)
    assert report.units_failed == 2  # no_tar and empty
    rows = {(Path(row["shard"]).stem, row["key"]) for row in read_rows(tmp_path / "out") if row["caption"] is not None}
    failed = {(Path(record["shard"]).stem, record["key"]) for record in read_failures(tmp_path / "out")}
    for name, made in hostile.items():
        for truth in made.truths:
            assert ((name, truth.key) in rows) != bool(truth.bad)
            assert ((name, truth.key) in failed) == bool(truth.bad)


def test_a_failure_of_the_model_is_one_record_and_is_retried_on_request(
    tmp_path: Path, fusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truths = shards.make_truths(8)
    shards.make_webdataset(tmp_path / "in", truths, shards=2)
    real = FusionGenerator.generate

    def fails_once(self: FusionGenerator, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        if any(request.text == truths[5].text for request in requests):
            raise ValueError("transient")
        return real(self, requests, decoding)

    monkeypatch.setattr(FusionGenerator, "generate", fails_once)
    first = run(tmp_path, fusion, tmp_path / "in", max_failure_rate=1.0)
    assert (first.tally.rows, first.tally.failed) == (7, 1)
    [record] = read_failures(tmp_path / "out")
    assert (record["key"], record["step"], record["message"]) == ("000005", "generate", "transient")
    assert (record["outputs"], record["row"]) == (["caption"], False)
    monkeypatch.setattr(FusionGenerator, "generate", real)
    again = run(tmp_path, fusion, tmp_path / "in", retry_failures=True)
    assert (again.units_written, again.units_kept, again.tally.rows) == (1, 1, 8)


def test_a_second_run_does_only_uncommitted_units(
    tmp_path: Path, fusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(12), shards=3)
    run(tmp_path, fusion, tmp_path / "in")
    before = read_rows(tmp_path / "out")
    next((tmp_path / "out" / "data").glob("*.parquet")).unlink()
    calls = Counter[str]()
    real = FusionGenerator.generate

    def counted(self: FusionGenerator, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        calls["samples"] += len(requests)
        return real(self, requests, decoding)

    monkeypatch.setattr(FusionGenerator, "generate", counted)
    report = run(tmp_path, fusion, tmp_path / "in")
    assert (report.units_written, report.units_kept, calls["samples"]) == (1, 2, 4)
    assert captions(read_rows(tmp_path / "out")) == captions(before)
    with pytest.raises(RunMismatchError, match=r"`num_beams`: 1 -> 2"):
        run(tmp_path, fusion, tmp_path / "in", decoding=replace(GREEDY, num_beams=2))


def test_with_embeddings_writes_vectors_and_captions_in_one_pass(tmp_path: Path, fusion: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(6), shards=1)
    report = run(tmp_path, fusion, tmp_path / "in", with_embeddings=True)
    run(tmp_path, fusion, tmp_path / "in", output=str(tmp_path / "captions"))
    options = EmbedOptions(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "vectors"),
        models=(ModelRef(model=str(fusion)),),
        device="cpu",
    )
    embed(options)
    names = [f"{modality}_embedding" for modality in ("image", "audio", "text")]
    assert dict(report.tally.outputs) == dict.fromkeys([*names, "caption"], 6)
    rows, vectors = read_rows(tmp_path / "out"), read_rows(tmp_path / "vectors")
    assert captions(rows) == captions(read_rows(tmp_path / "captions"))
    for row, expected in zip(rows, vectors, strict=True):
        for name in names:
            np.testing.assert_allclose(row[name], expected[name], atol=1e-5)


def test_modalities_absent_from_all_samples_are_an_error(tmp_path: Path, fusion: Path) -> None:
    truths = [replace(truth, members={"json": truth.members["json"]}) for truth in shards.make_truths(4)]
    shards.make_webdataset(tmp_path / "in", truths, shards=1)
    with pytest.raises(MissingModalityError, match="expected image and audio and text in the first samples"):
        run(tmp_path, fusion, tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_text_is_cleaned_and_conditions_skip_samples(tmp_path: Path, fusion: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(6), shards=1)
    cleaning = Cleaning(text=("lower",), where=("metadata['index'] < 4",), image_filter="median:3")
    report = run(tmp_path, fusion, tmp_path / "in", reading=Reading(cleaning=cleaning))
    assert (report.tally.rows, report.tally.skipped) == (4, {"metadata['index'] < 4": 2})
    assert all(row["text_clean"] == row["text"].lower() for row in read_rows(tmp_path / "out"))


def test_the_transforms_write_the_same_as_the_command(tmp_path: Path, fusion: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(6), shards=2)
    stage = generate_stage(str(fusion), decoding=GREEDY)
    record = caption_run(str(tmp_path / "out"), stage)
    pattern = str(tmp_path / "in" / "*.tar")
    with beam.Pipeline(options=pipeline_options()) as pipeline:
        _ = (
            pipeline
            | Plan(pattern, record)
            | ReadShards(stage.needs, run=record)
            | Generate(stage)
            | WriteParquet(record)
            | Summarize(record)
        )
    report = run(tmp_path, fusion, pattern)
    assert (report.units_written, report.units_kept) == (0, 2)
    with beam.Pipeline(options=pipeline_options()) as pipeline:
        rows = pipeline | Plan(pattern) | ReadShards(stage.needs) | Generate(stage) | Rows(stage)
        _ = rows | beam.Map(lambda row: row["caption"]) | beam.io.WriteToText(str(tmp_path / "texts"))
    texts = [line for path in tmp_path.glob("texts*") for line in path.read_text().splitlines()]
    assert len(texts) >= 6  # a caption may hold a line feed


# From features


def test_captions_of_features_equal_those_of_the_model(tmp_path: Path, of_features: Path, embedded: Path) -> None:
    report = run(tmp_path, of_features, embedded, explain=True, max_failure_rate=1.0)
    assert report.units_written == 3
    assert is_conserved(report)
    assert (report.tally.samples, report.tally.rows, report.tally.failed) == (12, 11, 1)
    source = {row["key"]: row for row in ds.dataset(embedded / "data").to_table().to_pylist()}
    rows = read_rows(tmp_path / "out")
    assert len(set(captions(rows))) > 5
    model = generate_stage(str(of_features), decoding=GREEDY).load()
    for row in rows:
        features_row = source[row["key"]]
        for name in ("shard", "offset", "text", "metadata", "image_width", "image_height", "audio_seconds"):
            assert row[name] == features_row[name]
        vectors = {
            name: np.array(features_row[name], np.float32)
            for name in ("image_embedding", "text_tokens")
            if features_row[name] is not None
        }
        [expected] = model.generate([Request(features=vectors)], GREEDY)
        assert row["caption"] == expected.text
        assert row["caption_logprob"] == pytest.approx(expected.logprob, abs=1e-3)
        assert (row["caption_image_attribution"] is None) == ("image_embedding" not in vectors)
    [failure] = read_failures(tmp_path / "out")
    assert (failure["key"], failure["modality"], failure["step"]) == ("000006", "image", "read")
    assert failure["message"] == "image_embedding was lost when the features were made"


def test_jobs_on_features_resume_and_extend_like_jobs_on_shards(
    tmp_path: Path, of_features: Path, embedded: Path
) -> None:
    shutil.copytree(embedded / "data", tmp_path / "in")
    held_back = sorted((tmp_path / "in").glob("*.parquet"))[-1]
    aside = held_back.rename(tmp_path / held_back.name)
    pattern = f"{tmp_path}/in/*.parquet"
    run(tmp_path, of_features, pattern, max_failure_rate=1.0)
    aside.rename(held_back)
    report = run(tmp_path, of_features, pattern, max_failure_rate=1.0)
    assert (report.units_written, report.units_kept) == (1, 2)
    table = pq.read_table(held_back)
    pq.write_table(table.slice(1), held_back)
    with pytest.raises(RunMismatchError, match=held_back.name):
        run(tmp_path, of_features, pattern, max_failure_rate=1.0)
    (tmp_path / "in" / "bad.parquet").write_bytes(b"PAR1 truncated")
    held_back.unlink()
    report = run(tmp_path, of_features, pattern, max_failure_rate=1.0)
    assert (report.units_kept, report.units_failed) == (2, 1)


def test_a_vector_with_nan_is_one_failure(tmp_path: Path, of_features: Path, embedded: Path) -> None:
    path = sorted((embedded / "data").glob("*.parquet"))[0]
    rows = pq.read_table(path).to_pylist()
    rows[1]["image_embedding"][3] = float("nan")
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), tmp_path / "in" / "a.parquet")
    report = run(tmp_path, of_features, f"{tmp_path}/in/a.parquet", max_failure_rate=1.0)
    assert (report.tally.rows, report.tally.failed) == (3, 1)
    assert [(f["key"], f["message"]) for f in read_failures(tmp_path / "out")] == [
        ("000001", "image_embedding is not finite")
    ]


def test_features_that_do_not_fit_the_model_are_rejected_before_the_job_starts(
    tmp_path: Path, of_features: Path, fusion: Path, embedded: Path
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(2), shards=1)
    wide = save_fusion(tmp_path / "wide", features(image_embedding=("image", 512, False)))
    absent = save_fusion(tmp_path / "absent", features(dino_embedding=("image", 24, False)))
    with pytest.raises(UsageError, match="image_embedding is 24 wide, and the model takes 512"):
        run(tmp_path, wide, embedded)
    with pytest.raises(
        MissingModalityError,
        match=r"dino_embedding, which the model takes, in a file of the input; found .*image_embedding",
    ):
        run(tmp_path, absent, embedded)
    with pytest.raises(UsageError, match="takes raw image and audio, not features"):
        run(tmp_path, fusion, embedded)
    with pytest.raises(UsageError, match=r"takes features \(image_embedding, text_tokens\)"):
        run(tmp_path, of_features, tmp_path / "in")
    with pytest.raises(UsageError, match="embeddings already"):
        run(tmp_path, of_features, embedded, with_embeddings=True)
    with pytest.raises(UsageError, match="the directory of the input features"):
        run(tmp_path, of_features, embedded, output=str(embedded), overwrite=True)
    with pytest.raises(UsageError, match="`image_field`"):
        run(tmp_path, of_features, embedded, reading=Reading(fields=FieldMap(image="png")))
    assert not (tmp_path / "out").exists()


def test_rows_in_which_all_features_of_the_model_are_null_are_an_error(
    tmp_path: Path, of_features: Path, embedded: Path
) -> None:
    path = sorted((embedded / "data").glob("*.parquet"))[0]
    table = pq.read_table(path)
    for name in ("image_embedding", "text_tokens"):
        nulls = pa.nulls(len(table), table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), nulls)
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    with pytest.raises(MissingModalityError, match="none of the 4 samples has image or text"):
        run(tmp_path, of_features, f"{tmp_path}/in/*.parquet")


def test_a_text_model_reads_texts_from_rows(tmp_path: Path, embedded: Path) -> None:
    model = save_fusion(
        tmp_path / "text", {"text": {"modality": "text", "kind": "transformer", "layers": 1, "max_tokens": 16}}
    )
    report = run(tmp_path, model, embedded)
    assert (report.tally.rows, dict(report.tally.outputs)) == (12, {"caption": 12})


# The command line


def test_the_command_captions_shards_and_features(
    tmp_path: Path, fusion: Path, of_features: Path, embedded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(4), shards=1)
    command = ["caption", "--model", str(fusion), "--input", str(tmp_path / "in"), "--device", "cpu"]
    command += ["--max-new-tokens", "8"]
    status = main([*command, "--output", str(tmp_path / "out"), "--explain", "--with-embeddings", "--num-beams", "2"])
    assert (status, capsys.readouterr().out.splitlines()[2].split(": ")[1].split(", ")[-1]) == (0, "4 caption")
    assert all(row["caption_text_attribution"] is not None for row in read_rows(tmp_path / "out"))
    sampling = ["--temperature", "1.0", "--top-p", "0.9", "--seed", "4"]
    assert main([*command, "--output", str(tmp_path / "sampled"), *sampling]) == 0
    same = replace(GREEDY, temperature=1.0, top_p=0.9, seed=4)
    report = run(tmp_path, fusion, tmp_path / "in", decoding=same, output=str(tmp_path / "sampled"))
    assert (report.units_written, report.units_kept) == (0, 1)  # the same configuration
    command = ["caption", "--model", str(of_features), "--input", str(embedded), "--output", str(tmp_path / "features")]
    assert main([*command, "--max-new-tokens", "8", "--device", "cpu", "--max-failure-rate", "1"]) == 0
    assert len(read_rows(tmp_path / "features")) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-beams", "2", "--temperature", "1"], "--temperature and --num-beams are mutually exclusive"),
        (["--top-p", "0.5"], "--top-p needs sampling: pass --temperature too"),
        (["--seed", "1"], "--seed needs sampling: pass --temperature too"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--temperature", "1", "--top-p", "0"], "--top-p 0.0"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--max-new-tokens", "1000"], "at most 32"),
    ],
)
def test_contradictory_options_are_usage_errors(
    tmp_path: Path, fusion: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(1), shards=1)
    command = ["caption", "--model", str(fusion), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    defaults = [] if "--max-new-tokens" in arguments else ["--max-new-tokens", "8"]
    assert main([*command, *defaults, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_pipeline_file_runs_the_caption_command() -> None:
    script = Path(__file__).parents[1] / "pipelines" / "caption.py"
    done = subprocess.run([sys.executable, script, "--seed", "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "mmbeam caption --help" in done.stderr
