"""The generate job end to end: texts in, rows and shards of images and sounds out, with failures and resume."""

import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
import soundfile
import soxr
import torch
from outputs import is_conserved, read_failures, read_rows
from PIL import Image
from tiny_synthesizers import save_diffusion, save_vits

from mmbeam.cli import main
from mmbeam.config import Synthesis
from mmbeam.errors import ModelError, SampleError, UsageError
from mmbeam.features.files import feature_files
from mmbeam.jobs.generate import GenerateOptions, generate
from mmbeam.models.synthesizers.base import Prompt
from mmbeam.runs.store import Store
from mmbeam.stages.synthesize import synthesize_stage
from mmbeam.types import RunReport

FAST: dict[str, Any] = {"modality": "image", "steps": 2}


@pytest.fixture(scope="module")
def pndm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_diffusion(tmp_path_factory.mktemp("pndm"))


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vits(tmp_path_factory.mktemp("vits"))


def write_texts(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, text in enumerate(texts):
            info = tarfile.TarInfo(f"{number:03}.txt")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def run(tmp_path: Path, model: Path, output: str = "out", **changes: Any) -> RunReport:
    options = GenerateOptions(
        input=(str(tmp_path / "in" / "*.tar"),),
        output=str(tmp_path / output),
        model=str(model),
        synthesis=Synthesis(**FAST),
        device="cpu",
        max_failure_rate=1.0,
    )
    return generate(replace(options, **changes))


def members(output: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted((output / "_media").iterdir()):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                yield info.name, file.read()


def test_rows_name_files_whose_bytes_do_not_depend_on_the_run(tmp_path: Path, pndm: Path) -> None:
    """An empty text is a failure, a long one is cut; readers of the rows and of the media see only their own."""
    write_texts(tmp_path / "in" / "a.tar", ["a cat", "a cat", " ", "a cat and " * 30])
    report = run(tmp_path, pndm)
    assert is_conserved(report)
    assert report.tally.warnings == {"prompts cut to 77 tokens": 1}
    rows, files = read_rows(tmp_path / "out"), dict(members(tmp_path / "out"))
    made = [row for row in rows if row["media"] is not None]
    assert [row["key"] for row in made] == ["000", "001", "003"]
    [failure] = read_failures(tmp_path / "out")
    assert (failure["key"], failure["step"], failure["error"]) == ("002", "generate", "SampleError")
    for row in made:
        assert hashlib.sha256(files[row["media"]]).hexdigest() == row["media_sha256"]
        assert (tmp_path / "out" / "_media" / row["media_shard"]).exists()
        assert Image.open(io.BytesIO(files[row["media"]])).size == (16, 16)
    assert len({row["media_sha256"] for row in made}) == 3  # the same text of two samples gives two images
    for place in ("out", "out/data"):
        assert ds.dataset(tmp_path / place, exclude_invalid_files=False).count_rows() == len(rows)
        assert len(pd.read_parquet(tmp_path / place)) == len(rows)
        assert len(feature_files([str(tmp_path / place)], True) or ()) == 1
    assert run(tmp_path, pndm).units_written == 0
    run(tmp_path, pndm, output="again")
    first, second = (next((tmp_path / name / "_media").iterdir()).read_bytes() for name in ("out", "again"))
    assert first == second
    changed = replace(Synthesis(**FAST), seed=1)
    run(tmp_path, pndm, output="other", synthesis=changed, limit=1)
    assert dict(members(tmp_path / "other"))[made[0]["media"]] != files[made[0]["media"]]
    back = GenerateOptions(
        input=(str(tmp_path / "out" / "_media" / "*.tar"),),
        output=str(tmp_path / "back"),
        model=str(pndm),
        synthesis=replace(Synthesis(**FAST), prompt="{metadata[key]}"),
        device="cpu",
        limit=1,
    )
    assert generate(back).tally.rows == 1


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DDIMScheduler"])
def test_a_batch_gives_what_each_prompt_gives_alone(scheduler: str, tmp_path: Path, pndm: Path) -> None:
    """By the pipeline of diffusers itself, called with a generator of the sample's seed."""

    directory = pndm if scheduler == "PNDMScheduler" else save_diffusion(tmp_path, scheduler)
    model = synthesize_stage(str(directory), Synthesis(**FAST)).load()
    prompts = [Prompt("a cat", 3), Prompt("and", 4), Prompt("a cat", 5)]
    with torch.inference_mode():
        together = model.compute(prompts)
        for prompt, image in zip(prompts, together, strict=True):
            alone = model.pipeline(  # type: ignore[attr-defined]
                prompt.text, generator=torch.Generator().manual_seed(prompt.seed), num_inference_steps=2
            ).images[0]
            assert np.abs(np.asarray(alone).astype(int) - image.astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - together[2].astype(int)).max() > 8


def test_counting_tokens_changes_no_prompt_that_the_pipeline_tokenizes(pndm: Path) -> None:
    """On a GPU the units' threads count while the device's thread runs the pipeline."""
    model: Any = synthesize_stage(str(pndm), Synthesis(**FAST)).load()
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            assert model.num_tokens("a cat and " * 30) > 77

    thread = threading.Thread(target=count)
    thread.start()
    try:
        lengths = {
            len(model.pipeline.tokenizer("a cat", padding="max_length", max_length=77, truncation=True).input_ids)
            for _ in range(500)
        }
    finally:
        stop.set()
        thread.join()
    assert lengths == {77}


def test_a_file_that_cannot_be_written_is_a_failure(
    tmp_path: Path, pndm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a WebP of more than 16383 pixels."""

    def fail(*args: object, **options: object) -> None:
        raise OSError("encoding error 5")

    monkeypatch.setattr(Image.Image, "save", fail)
    write_texts(tmp_path / "in" / "a.tar", ["a cat"])
    run(tmp_path, pndm)
    [record] = read_failures(tmp_path / "out")
    assert (record["step"], record["message"]) == ("generate", "encoding error 5")


def test_pixels_that_are_not_finite_are_failures(tmp_path: Path, pndm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmbeam.models.synthesizers import diffusion

    compute = diffusion.DiffusionSynthesizer.compute

    def fail_on_dogs(self: Any, prompts: list[Prompt]) -> list[Any]:
        made = compute(self, prompts)
        return [
            FloatingPointError("nan") if prompt.text == "a dog" else image
            for prompt, image in zip(prompts, made, strict=True)
        ]

    monkeypatch.setattr(diffusion.DiffusionSynthesizer, "compute", fail_on_dogs)
    write_texts(tmp_path / "in" / "a.tar", ["a cat", "a dog"])
    assert is_conserved(run(tmp_path, pndm))
    assert [record["error"] for record in read_failures(tmp_path / "out")] == ["FloatingPointError"]
    before = {path.name for path in (tmp_path / "out" / "_media").iterdir()}
    monkeypatch.undo()
    report = run(tmp_path, pndm, retry_failures=True)
    assert (report.tally.rows, report.tally.failed) == (2, 0)
    [media] = (tmp_path / "out" / "_media").iterdir()  # the replaced one is gone
    assert media.name not in before
    assert {row["media_shard"] for row in read_rows(tmp_path / "out")} == {media.name}


def test_media_of_a_killed_attempt_are_swept_and_lost_media_are_made_again(
    tmp_path: Path, pndm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that ends after its media, before its rows, leaves a shard that no row names."""
    write_texts(tmp_path / "in" / "a.tar", ["a cat"])
    create = Store.create

    def die(self: Store, name: str, source: Any) -> None:
        if name.startswith("data/"):
            raise KeyboardInterrupt
        create(self, name, source)

    monkeypatch.setattr(Store, "create", die)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        run(tmp_path, pndm)
    monkeypatch.undo()
    [orphan] = (tmp_path / "out" / "_media").iterdir()
    assert run(tmp_path, pndm).units_written == 1
    [media] = (tmp_path / "out" / "_media").iterdir()
    assert media.name != orphan.name
    media.unlink()
    assert run(tmp_path, pndm).units_written == 1
    [again] = (tmp_path / "out" / "_media").iterdir()
    assert {row["media_shard"] for row in read_rows(tmp_path / "out")} == {again.name}
    run(tmp_path, pndm, overwrite=True)
    assert len(list((tmp_path / "out" / "_media").iterdir())) == 1


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--format", "wav"], "--format wav: expected one of png, jpg, webp"),
        (["--quality", "50"], "--quality needs --format jpg or webp"),
        (["--quality", "101", "--format", "jpg"], "--quality 101: expected at most 100"),
        (["--sample-rate", "8000"], "--sample-rate needs --modality audio"),
        (["--modality", "audio"], "makes image"),
        (["--modality", "audio", "--sample-rate", "700000"], "--sample-rate 700000: expected 4000 to 192000 Hz"),
        (["--guidance", "nan"], "--guidance nan: expected a finite number"),
    ],
)
def test_contradictory_arguments(
    extra: list[str], words: str, tmp_path: Path, pndm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "in" / "a.tar", ["a cat"])
    args = ["generate", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", str(pndm)]
    assert main([*args, "--modality", "image", *extra]) == 2
    assert words in capsys.readouterr().err


def test_models_that_make_nothing_or_run_code_are_errors(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(UsageError, match="expected a pipeline of diffusers"):
        synthesize_stage(str(clip), Synthesis(**FAST))
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["my_code", "UNet"]}'
    )
    with pytest.raises(ModelError, match="code of 'my_code'"):
        synthesize_stage(str(tmp_path), Synthesis(**FAST))
    (tmp_path / "model_index.json").write_text('{"_class_name": "os"}')
    with pytest.raises(ModelError, match="expected a text-to-image pipeline"):
        synthesize_stage(str(tmp_path), Synthesis(**FAST))


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("unet/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": "../../x.safetensors"}}, "names"),
        ("text_encoder/model.safetensors.index.json", {"weight_map": {"a": "/etc/passwd"}}, "names the file"),
        ("text_encoder/model.safetensors.index.json", {"weight_map": {"a": "pytorch_model.bin"}}, "names"),
        ("vae/diffusion_pytorch_model.fp16.safetensors.index.json", {"weight_map": {"a": "w.json"}}, "names w.json"),
        ("text_encoder/config.json", {"transformers_weights": "../x.safetensors"}, "names the file"),
        ("text_encoder/config.json", {"_attn_implementation": "someone/kernel"}, "code from the hub"),
        ("text_encoder/adapter_config.json", {}, "an adapter of PEFT"),
    ],
)
def test_a_component_that_names_files_or_code_outside_the_pipeline(
    file: str, value: dict[str, Any], message: str, pndm: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(pndm, directory)
    path = directory / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **value}))
    with pytest.raises(ModelError, match=message):
        synthesize_stage(str(directory), Synthesis(modality="image"))


def test_speech_is_made_again_by_its_seed_and_clipped(tmp_path: Path, vits: Path) -> None:
    """The waveform is that of transformers under the seed of the row; a text without known letters is a failure."""
    write_texts(tmp_path / "in" / "a.tar", ["a cat", "1", "a dog and a cat"])
    speech = Synthesis(modality="audio", format="flac", sampling_rate=8000)
    report = run(tmp_path, vits, synthesis=speech)
    assert is_conserved(report)
    assert (report.tally.rows, report.tally.failed) == (2, 1)
    files = dict(members(tmp_path / "out"))
    model = synthesize_stage(str(vits), Synthesis(modality="audio")).load()
    for row in read_rows(tmp_path / "out"):
        wave, rate = soundfile.read(io.BytesIO(files[row["media"]]))
        assert rate == 8000
        torch.manual_seed(row["media_seed"])
        with torch.inference_mode():
            inputs = model.tokenizer(row["media_prompt"], return_tensors="pt")  # type: ignore[attr-defined]
            expected = model.model(**inputs).waveform[0].numpy()  # type: ignore[attr-defined]
        resampled = soxr.resample(expected, 16_000, 8000).clip(-1, 1)
        assert np.abs(wave - resampled).max() < 1e-3
    assert model.encode(np.full(800, 2.0, np.float32)).warning == "sounds clipped to full scale"
    with pytest.raises(SampleError, match="empty"):
        model.encode(np.zeros(0, np.float32))


def test_a_language_without_latin_letters_has_a_prompt_known_to_be_good(tmp_path: Path) -> None:
    """A failing sample of it must not look like a broken device."""
    save_vits(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate("_ кот")}))
    stage = synthesize_stage(str(tmp_path), Synthesis(modality="audio"))
    model: Any = stage.load()
    with torch.inference_mode():
        [wave] = model.compute([stage.known_good(model, "file")])
    assert wave.size
    (tmp_path / "vocab.json").write_text("{}")
    stage = synthesize_stage(str(tmp_path), Synthesis(modality="audio"))
    with pytest.raises(ModelError, match="expected the letters of a language"):
        stage.load()
