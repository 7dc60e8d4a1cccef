"""The embed job end to end: real shards in, committed Parquet out, with failures, retries and kills."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import shards
import torch
from outputs import is_conserved, read_failures, read_rows
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from mmbeam import process
from mmbeam.cli import main
from mmbeam.config import Cleaning, ModelRef, Reading, Windows
from mmbeam.errors import DeviceError, FailureRateError, MissingModalityError, RunMismatchError, UsageError
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.models.encoders.joint import ClipEncoder
from mmbeam.types import RunReport


def run(tmp_path: Path, model: Path, pattern: Path | str, **changes: Any) -> RunReport:
    """Run an embed job on the CPU, with small windows so that a unit is several batches."""
    options = EmbedOptions(
        input=(str(pattern),),
        output=str(tmp_path / "out"),
        models=(ModelRef(model=str(model)),),
        device="cpu",
        batch_size=4,
        windows=Windows(samples=7),
    )
    return embed(replace(options, **changes))


def test_shards_of_every_format_become_rows_with_the_vectors_of_transformers(tmp_path: Path, clip: Path) -> None:
    """Tars by tar, webdataset and img2dataset; every codec; text in many scripts."""
    made = [
        shards.make_tar_command(tmp_path / "in" / "tar", shards.make_truths(9)),
        shards.make_webdataset(tmp_path / "in" / "wds", shards.make_truths(12, start=20)),
        shards.make_img2dataset(tmp_path / "in" / "img2dataset"),
    ]
    truths = [truth for corpus in made for truth in corpus.truths]
    report = run(tmp_path, clip, tmp_path / "in" / "*" / "*.tar")
    rows = {row["key"]: row for row in read_rows(tmp_path / "out")}
    assert set(rows) == {truth.key for truth in truths}
    assert report.tally.rows == len(truths)
    assert is_conserved(report)
    assert not report.tally.failures
    model = CLIPModel.from_pretrained(clip).eval()
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    for truth in truths:
        row = rows[truth.key]
        assert (row["text"], row["errors"]) == (truth.text, [])
        assert (row["image_width"], row["image_height"]) == truth.size
        assert row["text_embedding"] == pytest.approx(reference_text(model, tokenizer, truth.text), abs=1e-5)
    jpeg = next(truth for truth in truths if "jpg" in truth.members)
    expected = reference_image(model, processor, jpeg.members["jpg"])
    # Pixels may differ from Pillow's by one level of 255, which a tiny random model amplifies.
    assert rows[jpeg.key]["image_embedding"] == pytest.approx(expected, abs=5e-3)


@torch.inference_mode()
def reference_text(model: CLIPModel, tokenizer: Any, text: str | None) -> list[float]:
    inputs = tokenizer([text], return_tensors="pt", truncation=True, max_length=77)
    vector = model.get_text_features(**inputs).pooler_output[0]
    return [float(number) for number in torch.nn.functional.normalize(vector, dim=0)]


@torch.inference_mode()
def reference_image(model: CLIPModel, processor: Any, jpeg: bytes) -> list[float]:
    inputs = processor(Image.open(io.BytesIO(jpeg)), return_tensors="pt")
    vector = model.get_image_features(**inputs).pooler_output[0]
    return [float(number) for number in torch.nn.functional.normalize(vector, dim=0)]


def test_bad_input_costs_one_record_each(tmp_path: Path, clip: Path) -> None:
    """Corrupt images, a truncated tar, files that are not tars, hostile names, a pickle: every sample is counted."""
    hostile = shards.make_hostile(tmp_path / "in")
    report = run(tmp_path, clip, tmp_path / "in" / "*.tar", max_failure_rate=1.0)
    assert is_conserved(report)
    assert report.units_failed == 2  # no_tar and empty
    rows = {(Path(row["shard"]).stem, row["key"]): row for row in read_rows(tmp_path / "out")}
    for name, made in hostile.items():
        for truth in made.truths:
            if truth.bad and name != "truncated":
                row = rows.get((name, truth.key))
                if truth.text is not None:
                    assert row is not None
                    assert row["errors"] == ["image_embedding"]
                    assert row["image_embedding"] is None
                    assert row["text_embedding"] is not None
            elif not truth.bad:
                assert rows[name, truth.key]["errors"] == []
    failed = {(Path(record["shard"]).stem, record["key"]) for record in read_failures(tmp_path / "out")}
    assert {("pictures", "noise"), ("pictures", "cut"), ("pictures", "empty"), ("pictures", "huge")} <= failed
    assert ("truncated", hostile["truncated"].truths[-1].key) in failed
    assert ("no_tar", "") in failed
    assert not list(tmp_path.rglob("PICKLED"))


def test_a_second_run_does_only_uncommitted_units(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(20), shards=4)
    first = run(tmp_path, clip, tmp_path / "in")
    before = read_rows(tmp_path / "out")
    calls = count_calls(monkeypatch)
    second = run(tmp_path, clip, tmp_path / "in")
    assert (first.units_written, second.units_written, second.units_kept) == (4, 0, 4)
    assert second.tally.rows == first.tally.rows == 20
    assert not calls
    shards.make_webdataset(tmp_path / "in" / "more", shards.make_truths(5, start=50), shards=1)
    third = run(tmp_path, clip, tmp_path / "in" / "**" / "*.tar")
    assert (third.units_written, third.units_kept) == (1, 4)
    assert [row for row in read_rows(tmp_path / "out") if "/more/" not in row["shard"]] == before


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count calls of the real model from now on, by method."""
    calls: Counter[str] = Counter()
    for name in ("encode_image", "encode_text"):
        real = getattr(ClipEncoder, name)

        def counted(self: ClipEncoder, items: Any, tokens: bool = False, _real: Any = real, _name: str = name) -> Any:
            calls[_name] += 1
            return _real(self, items, tokens)

        monkeypatch.setattr(ClipEncoder, name, counted)
    return calls


def test_another_configuration_on_the_same_output_is_an_error(tmp_path: Path, clip: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(4))
    run(tmp_path, clip, tmp_path / "in")
    with pytest.raises(RunMismatchError, match=r"`dtype`: float32 -> bfloat16"):
        run(tmp_path, clip, tmp_path / "in", dtype="bfloat16")
    report = run(tmp_path, clip, tmp_path / "in", dtype="bfloat16", overwrite=True)
    assert report.units_written == 2


def test_a_changed_committed_shard_is_an_error(tmp_path: Path, clip: Path) -> None:
    made = shards.make_webdataset(tmp_path / "in", shards.make_truths(4))
    run(tmp_path, clip, tmp_path / "in")
    made.paths[0].write_bytes(made.paths[1].read_bytes())
    with pytest.raises(RunMismatchError, match=made.paths[0].name):
        run(tmp_path, clip, tmp_path / "in")


def test_limit_reads_the_first_samples_as_one_unit(tmp_path: Path, clip: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(20), shards=4)
    report = run(tmp_path, clip, tmp_path / "in", limit=8)
    assert (report.units_written, report.tally.rows) == (1, 8)
    assert [row["key"] for row in read_rows(tmp_path / "out")] == [f"{index:06d}" for index in range(8)]


def test_a_limited_run_keeps_its_shards_and_rejects_a_changed_shard(tmp_path: Path, clip: Path) -> None:
    made = shards.make_webdataset(tmp_path / "in", shards.make_truths(8), shards=2)
    run(tmp_path, clip, tmp_path / "in", limit=3)
    shards.make_webdataset(tmp_path / "in" / "a", shards.make_truths(3), shards=1)
    report = run(tmp_path, clip, tmp_path / "in" / "**" / "*.tar", limit=3)
    assert (report.units_written, report.units_kept, len(read_rows(tmp_path / "out"))) == (0, 1, 3)
    made.paths[0].write_bytes(made.paths[1].read_bytes())
    with pytest.raises(RunMismatchError, match=made.paths[0].name):
        run(tmp_path, clip, tmp_path / "in", limit=3)


@pytest.mark.parametrize("where", [(), ("image_width > 10_000",)])
def test_units_may_be_empty_or_end_with_an_empty_window(tmp_path: Path, clip: Path, where: tuple[str, ...]) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(14), shards=1)  # two full windows
    (tmp_path / "in" / "empty.tar").write_bytes(bytes(1024))
    report = run(tmp_path, clip, tmp_path / "in", reading=Reading(cleaning=Cleaning(where=where)))
    assert report.units_written == 2
    assert (report.tally.samples, report.tally.rows) == (14, 0 if where else 14)
    assert is_conserved(report)


def test_bad_arguments_are_rejected_before_anything_is_overwritten(tmp_path: Path, clip: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(4), shards=1)
    run(tmp_path, clip, tmp_path / "in")
    with pytest.raises(UsageError, match="--typo"):
        run(tmp_path, clip, tmp_path / "in", overwrite=True, beam_args=("--typo=1",))
    assert len(read_rows(tmp_path / "out")) == 4


def test_an_error_in_one_unit_stops_the_others_and_is_raised_unchanged(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(80), shards=20)
    real, calls = ClipEncoder.encode_image, [0]

    def out_of_memory(self: ClipEncoder, images: Any, tokens: bool = False) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError("out of memory")
        return real(self, images, tokens)

    monkeypatch.setattr(ClipEncoder, "encode_image", out_of_memory)
    with pytest.raises(MemoryError, match="out of memory"):
        run(tmp_path, clip, tmp_path / "in")
    assert calls[0] <= 6
    assert not list((tmp_path / "out" / "_failures").glob("*"))
    assert not list((tmp_path / "out" / "_mmbeam" / "tmp").glob("*"))


def test_an_error_before_the_first_window_is_raised_unchanged(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(20), shards=10)

    def refused(*_: object) -> None:
        raise PermissionError("access refused")

    monkeypatch.setattr("mmbeam.readers.samples.open_shard", refused)
    with pytest.raises(PermissionError, match=r"^access refused$"):
        run(tmp_path, clip, tmp_path / "in")


def test_models_need_different_names(tmp_path: Path, clip: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(1), shards=1)
    models = (ModelRef(model=str(clip)), ModelRef(model=str(clip), name="model"))
    with pytest.raises(UsageError, match="expected a different name for each"):
        run(tmp_path, clip, tmp_path / "in", models=models)


def test_skips_are_counted_by_condition_and_cleaning_keeps_the_original_text(tmp_path: Path, clip: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(15), shards=1)
    cleaning = Cleaning(text=("nfc", "whitespace", "lower"), where=("image_width >= 80", "metadata['index'] != 7"))
    report = run(tmp_path, clip, tmp_path / "in", reading=Reading(cleaning=cleaning))
    rows = read_rows(tmp_path / "out")
    expected = [index for index in range(15) if 64 + 8 * (index % 5) >= 80 and index != 7]
    assert [json.loads(row["metadata"])["index"] for row in rows] == expected
    assert report.tally.skipped == {"image_width >= 80": 6, "metadata['index'] != 7": 1}
    assert is_conserved(report)
    texts = list(shards.TEXTS.values())
    assert [row["text"] for row in rows] == [texts[index % len(texts)] for index in expected]
    assert all(row["text_clean"] == row["text_clean"].lower().strip() for row in rows)
    assert all(row["text_num_tokens"] is not None for row in rows)


def test_several_models_write_prefixed_columns_in_one_pass(tmp_path: Path, clip: Path, clap: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(6), shards=1)
    models = (ModelRef(model=str(clip), name="clip"), ModelRef(model=str(clap), name="clap"))
    report = run(tmp_path, clip, tmp_path / "in", models=models)
    names = {"clip_image_embedding", "clip_text_embedding", "clap_audio_embedding", "clap_text_embedding"}
    assert dict(report.tally.outputs) == dict.fromkeys(names, 6)
    for row in read_rows(tmp_path / "out"):
        for name in names:
            assert np.linalg.norm(row[name]) == pytest.approx(1, abs=1e-5)


def test_a_failure_of_one_model_costs_only_its_column(
    tmp_path: Path, clip: Path, clap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(9), shards=1)
    real = ClipEncoder.encode_image

    def fails_on_wide(self: ClipEncoder, images: Any, tokens: bool = False) -> Any:
        if any(image.shape[1] == 96 for image in images):
            raise ValueError("image too wide")
        return real(self, images, tokens)

    monkeypatch.setattr(ClipEncoder, "encode_image", fails_on_wide)
    models = (ModelRef(model=str(clip), name="clip"), ModelRef(model=str(clap), name="clap"))
    report = run(tmp_path, clip, tmp_path / "in", models=models, max_failure_rate=1.0)
    lost = [row for row in read_rows(tmp_path / "out") if row["errors"]]
    assert [row["key"] for row in lost] == ["000004"]
    assert lost[0]["errors"] == ["clip_image_embedding"]
    assert lost[0]["clap_audio_embedding"] is not None
    assert report.tally.impaired == 1
    record = read_failures(tmp_path / "out")[0]
    assert (record["outputs"], record["row"], record["message"]) == (["clip_image_embedding"], True, "image too wide")


def test_a_device_error_ends_the_attempt_without_failing_a_sample(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, fresh_devices: None
) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(30), shards=3)
    real, calls = ClipEncoder.encode_image, [0]

    def lost(self: ClipEncoder, images: Any, tokens: bool = False) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")
        return real(self, images, tokens)

    monkeypatch.setattr(ClipEncoder, "encode_image", lost)
    with pytest.raises(DeviceError, match="unspecified launch failure"):
        run(tmp_path, clip, tmp_path / "in")
    assert not list((tmp_path / "out" / "_failures").glob("*"))
    assert calls[0] == 6  # nothing was tried on the broken device
    whole = len(list((tmp_path / "out" / "data").glob("*.parquet")))
    monkeypatch.setattr(ClipEncoder, "encode_image", real)
    process.reset()
    report = run(tmp_path, clip, tmp_path / "in")
    assert (report.units_written, report.units_kept, report.tally.rows) == (3 - whole, whole, 30)


@pytest.fixture
def fresh_devices() -> Iterator[None]:
    """Forget failed devices before and after the test."""
    process.reset()
    yield
    process.reset()


def test_the_failure_rate_limit_stops_the_job_with_a_reason(tmp_path: Path, clip: Path) -> None:
    good, bad = {"txt": b"a cat"}, {"jpg": b"\xff\xd8 not an image"}
    truths = [shards.Truth(key=f"{number:06d}", members=(good, bad)[number % 2]) for number in range(120)]
    shards.make_webdataset(tmp_path / "in", truths, shards=1)
    windows = Windows(samples=40)
    with pytest.raises(FailureRateError, match=r"of 1\d\d samples lost.*decode: DecodeError"):
        run(tmp_path, clip, tmp_path / "in", windows=windows)
    assert not list((tmp_path / "out" / "data").glob("*"))
    report = run(tmp_path, clip, tmp_path / "in", max_failure_rate=0.6, windows=windows)
    assert (report.tally.failed, report.tally.rows) == (60, 60)


def test_retry_failures_redoes_units_with_failures(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(10), shards=2)
    real = ClipEncoder.encode_image

    def fails_once(self: ClipEncoder, images: Any, tokens: bool = False) -> Any:
        if any(image.shape[:2] == (48, 64) for image in images):
            raise ValueError("transient")
        return real(self, images, tokens)

    monkeypatch.setattr(ClipEncoder, "encode_image", fails_once)
    first = run(tmp_path, clip, tmp_path / "in", max_failure_rate=1.0)
    assert first.tally.impaired == 1
    monkeypatch.setattr(ClipEncoder, "encode_image", real)
    assert run(tmp_path, clip, tmp_path / "in").tally.impaired == 1
    again = run(tmp_path, clip, tmp_path / "in", retry_failures=True)
    assert (again.units_written, again.units_kept, again.tally.impaired) == (1, 1, 0)
    assert not read_failures(tmp_path / "out")
    assert all(row["image_embedding"] for row in read_rows(tmp_path / "out"))


def test_a_requested_modality_absent_from_all_samples_is_an_error(tmp_path: Path, clip: Path, clap: Path) -> None:
    truths = [replace(truth, members={"txt": truth.members["txt"]}) for truth in shards.make_truths(4)]
    shards.make_webdataset(tmp_path / "in", truths)
    with pytest.raises(MissingModalityError, match="expected image in the first samples of the input, found text"):
        run(tmp_path, clip, tmp_path / "in", modalities=("image", "text"))
    with pytest.raises(UsageError, match="audio"):
        run(tmp_path, clip, tmp_path / "in", modalities=("audio",))
    assert not (tmp_path / "out").exists()
    report = run(tmp_path, clip, tmp_path / "in")  # not requested: nulls
    assert dict(report.tally.outputs) == {"image_embedding": 0, "text_embedding": 4}


def test_tokens_and_float16_are_stored_on_request(tmp_path: Path, clip: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(5), shards=1)
    run(tmp_path, clip, tmp_path / "in", tokens=True, vector_type="float16")
    table = ds.dataset(tmp_path / "out" / "data").to_table()
    assert table.schema.field("image_embedding").type.value_type == pa.float16()
    token = table.schema.field("image_tokens").type.value_type
    assert (token.value_type, token.list_size) == (pa.float16(), 32)
    assert all(len(row["image_tokens"]) in (9, 10) for row in table.to_pylist())


def test_the_same_command_resumes_a_killed_run(tmp_path: Path, clip: Path) -> None:
    shards.make_webdataset(tmp_path / "in", shards.make_truths(48), shards=16)
    command = ["embed", "--input", str(tmp_path / "in"), "--model", str(clip), "--device", "cpu"]
    command += ["--output", str(tmp_path / "out")]
    data = tmp_path / "out" / "data"
    with subprocess.Popen([sys.executable, "-m", "mmbeam", *command], start_new_session=True) as process:
        while len(list(data.glob("*.parquet"))) < 2:
            assert process.poll() is None
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
    committed = {path.name: path.stat().st_mtime_ns for path in data.glob("*.parquet")}
    assert 2 <= len(committed) < 16
    for path in data.glob("*.parquet"):
        ds.dataset(path).to_table()  # readable
    assert main(command) == 0
    assert {name: (data / name).stat().st_mtime_ns for name in committed} == committed
    assert [row["key"] for row in read_rows(tmp_path / "out")] == [f"{index:06d}" for index in range(48)]
    assert not list((tmp_path / "out" / "_mmbeam" / "tmp").glob("*"))
