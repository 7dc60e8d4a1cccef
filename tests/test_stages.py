"""The embed stage and the device that runs it, with a real tiny model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shards
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import save_clip

from mmbeam.errors import DeviceError, ModelError, UsageError
from mmbeam.models.encoders.base import Encoded
from mmbeam.models.encoders.joint import ClipEncoder
from mmbeam.models.placement import Device, resolve_device
from mmbeam.process import may_decode, reset
from mmbeam.stages.embed import EmbedStage, embed_stage
from mmbeam.types import Batch, Sample, Stage, WorkUnit


def batch_of(count: int, **changes: Any) -> Batch:
    """Samples with images of three sizes and texts of different lengths."""
    samples = tuple(
        Sample(
            key=str(i),
            shard="s.tar",
            offset=i,
            present=frozenset({"image", "text"}),
            image=shards.natural_image(i, 40 + 8 * (i % 3), 48),
            text="word " * (i % 7),
        )
        for i in range(count)
    )
    return replace(Batch(unit=WorkUnit(id="u", inputs=()), index=0, last=True, samples=samples), **changes)


def vectors(batch: Batch, column: str) -> list[list[float] | None]:
    values: list[list[float] | None] = batch.features[column].to_pylist()
    return values


def run(stage: EmbedStage, batch: Batch) -> Batch:
    return stage.run(stage.load(), batch)


def test_vectors_do_not_depend_on_the_batches(clip: Path) -> None:
    """Packed by size and length or one by one, a sample has the same vector at its own position."""
    batch = batch_of(13)
    whole = run(embed_stage(str(clip)), batch)
    alone = run(embed_stage(str(clip), batch_size=1), batch)
    for column in ("image_embedding", "text_embedding"):
        np.testing.assert_allclose(vectors(whole, column), vectors(alone, column), atol=1e-5)


def test_out_of_memory_halves_the_batch_and_is_counted(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ClipEncoder.encode_image

    def limited(self: ClipEncoder, images: Any, tokens: bool = False) -> Encoded:
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, images, tokens)

    batch = batch_of(13)
    whole = run(embed_stage(str(clip)), batch)
    monkeypatch.setattr(ClipEncoder, "encode_image", limited)
    halved = run(embed_stage(str(clip)), batch)
    np.testing.assert_allclose(vectors(whole, "image_embedding"), vectors(halved, "image_embedding"), atol=1e-5)
    assert halved.tally.warnings["batches halved because memory ran out"] >= 3
    assert not halved.failures


@pytest.mark.parametrize("memory", [1, 2, 4, 7])
def test_a_batch_size_that_failed_is_not_tried_in_the_next_window(
    clip: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """Each modality has its own limit, and the rows are those of a device with enough memory."""
    reset()
    batch = batch_of(13)
    expected = run(embed_stage(str(clip)), batch)
    reals = {name: getattr(ClipEncoder, name) for name in ("encode_image", "encode_text")}
    for name, real in reals.items():
        room = memory if name == "encode_image" else 2 * memory

        def limited(
            self: ClipEncoder, values: Any, tokens: bool = False, real: Any = real, room: int = room
        ) -> Encoded:
            if len(values) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, values, tokens)

        monkeypatch.setattr(ClipEncoder, name, limited)
    stage = embed_stage(str(clip))
    first, second = run(stage, batch), run(stage, batch)
    assert first.tally.warnings["batches halved because memory ran out"] > 0
    assert "batches halved because memory ran out" not in second.tally.warnings
    for result in (first, second):
        assert not result.failures
        for column in ("image_embedding", "text_embedding"):
            np.testing.assert_allclose(vectors(result, column), vectors(expected, column), atol=1e-5)
    reset()


def test_a_token_outside_the_vocabulary_is_one_samples_failure(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked before the device sees it: on a GPU it would end the process."""
    real = ClipEncoder.tokenize

    def tokenize(self: ClipEncoder, texts: Any) -> list[list[int]]:
        return [[*ids[:-1], 10**6] if len(texts) > 1 and row == 3 else ids for row, ids in enumerate(real(self, texts))]

    monkeypatch.setattr(ClipEncoder, "tokenize", tokenize)
    result = run(embed_stage(str(clip), modalities=["text"]), batch_of(6))
    [failure] = result.failures
    assert (failure.key, failure.error) == ("3", "IndexError")
    assert "token id 1,000,000 is outside the model's vocabulary of" in failure.message
    assert [vector is None for vector in vectors(result, "text_embedding")] == [row == 3 for row in range(6)]


def change(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    """Apply `make` to the model's vectors of images."""
    real = ClipEncoder.encode_image
    monkeypatch.setattr(
        ClipEncoder, "encode_image", lambda self, images, tokens=False: make(real(self, images, tokens))
    )


def test_a_vector_that_is_not_finite_is_a_failure(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(encoded: Encoded) -> Encoded:
        if len(encoded.pooled) > 1:  # the input known to be good is encoded alone
            encoded.pooled[0, 0] = torch.nan
        return encoded

    change(monkeypatch, spoil)
    result = run(embed_stage(str(clip), batch_size=32), batch_of(5))
    assert vectors(result, "image_embedding").count(None) == 1
    [failure] = result.failures
    assert failure.outputs == ("image_embedding",)
    assert "not finite" in failure.message


def test_a_model_without_finite_vectors_is_a_device_error(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, lambda encoded: Encoded(pooled=encoded.pooled * torch.nan))
    with pytest.raises(DeviceError, match="known to be good is not finite"):
        run(embed_stage(str(clip)), batch_of(5))


def test_files_that_changed_since_launch_are_not_loaded(tmp_path: Path) -> None:
    stage = embed_stage(str(save_clip(tmp_path / "clip")))
    (tmp_path / "clip" / "config.json").write_text((tmp_path / "clip" / "config.json").read_text() + " ")
    with pytest.raises(ModelError, match="found different files"):
        stage.load()


@pytest.mark.parametrize(("value", "words"), [(torch.nan, "not finite"), (1e6, "does not fit float16")])
def test_tokens_that_do_not_fit_are_a_failure(
    clip: Path, monkeypatch: pytest.MonkeyPatch, value: float, words: str
) -> None:
    def spoil(encoded: Encoded) -> Encoded:
        if encoded.tokens is not None:
            encoded.tokens[0][0, 0] = value
        return encoded

    change(monkeypatch, spoil)
    result = run(embed_stage(str(clip), tokens=True, vector_type="float16", batch_size=32), batch_of(5))
    assert vectors(result, "image_tokens").count(None) == vectors(result, "image_embedding").count(None) == 1
    assert words in result.failures[0].message


def test_without_a_modality_vectors_and_tokens_are_null(clip: Path) -> None:
    batch = batch_of(4)
    text_only = replace(
        batch, samples=tuple(replace(s, image=None, present=frozenset({"text"})) for s in batch.samples)
    )
    result = run(embed_stage(str(clip), tokens=True), text_only)
    assert vectors(result, "image_embedding") == vectors(result, "image_tokens") == [None] * 4
    assert not result.failures


def test_changed_weights_in_the_same_directory_are_loaded_again(tmp_path: Path) -> None:
    batch, device = batch_of(3), Device("cpu")
    save_clip(tmp_path / "clip")
    before = device.run(embed_stage(str(tmp_path / "clip")), batch)
    weights = tmp_path / "clip" / "model.safetensors"
    save_file({name: 1 - tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    after = device.run(embed_stage(str(tmp_path / "clip")), batch)
    assert not np.allclose(vectors(before, "image_embedding"), vectors(after, "image_embedding"), atol=1e-3)


def test_spellings_of_a_dtype_share_a_loaded_model(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, real = [0], EmbedStage.load

    def counted(self: EmbedStage) -> Any:
        loads[0] += 1
        return real(self)

    monkeypatch.setattr(EmbedStage, "load", counted)
    device = Device("cpu")
    for dtype in (None, "float32", "fp32"):
        device.run(embed_stage(str(clip), dtype=dtype), batch_of(2))
    assert loads == [1]


class Stub(Stage):
    """A simple stage that raises an error."""

    key = "stub"

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    def load(self) -> None:
        return None

    def launch(self, model: None, work: Batch) -> Batch:
        if self.error is not None:
            raise self.error
        return work


def test_only_a_device_error_breaks_the_device_for_good() -> None:
    batch, device = batch_of(1), Device("cpu")
    stage = Stub(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        device.run(stage, batch)
    stage.error = None
    assert device.run(stage, batch).samples == batch.samples
    stage.error = RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later")
    with pytest.raises(DeviceError, match=r"device-side assert triggered$"):
        device.run(stage, batch)
    stage.error = None
    with pytest.raises(DeviceError, match="failed before"):
        device.run(stage, batch)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", "mps"])
def test_an_unsupported_device_is_an_error(name: str) -> None:
    with pytest.raises(UsageError, match=f"`device` {name}"):
        resolve_device(name)


@pytest.mark.parametrize(("cores", "threads", "paused"), [(2, 1, False), (2, 2, True), (1, 1, False)])
def test_decoding_pauses_while_a_model_uses_all_cores(
    clip: Path, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, paused: bool
) -> None:
    monkeypatch.setattr("mmbeam.models.placement.cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    paused_calls = []
    encode = ClipEncoder.encode_image

    def recorded(*args: Any) -> Encoded:
        paused_calls.append(not may_decode.is_set())
        return encode(*args)

    monkeypatch.setattr(ClipEncoder, "encode_image", recorded)
    Device("cpu").run(embed_stage(str(clip)), batch_of(2))
    assert set(paused_calls) == {paused}
    assert may_decode.is_set()
    monkeypatch.setattr(ClipEncoder, "encode_image", lambda *_: 1 / 0)
    with pytest.raises(DeviceError):
        Device("cpu").run(embed_stage(str(clip)), batch_of(2))
    assert may_decode.is_set()
