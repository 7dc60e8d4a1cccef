"""EmbeddingGemma 2 against its own processor, its model, and sentence-transformers, from the same directory."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_checks import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import pictures
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_audio_text import TEXTS, noise, tone
from tiny_clip import DIM
from tiny_gemma import SPECIAL, save_embedding_gemma2
from transformers import AutoModel, AutoProcessor
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from mmbeam.errors import DecodeError, ModelError
from mmbeam.models.encoders import describe, load
from mmbeam.models.encoders.base import Encoded
from mmbeam.models.encoders.embedding_gemma2 import EmbeddingGemma2Encoder
from mmbeam.models.recipes import read_gemma_recipe, read_image_recipe
from mmbeam.ops.image import PooledPatching, pooled_size, preprocess_patches
from mmbeam.ops.log_mel import gemma_log_mel, gemma_windows
from mmbeam.types import ImageHWC

RATE = 16000
CLOSE = 2e-5  # on unit vectors, float32
SHAPES = pictures()[1:]  # an image of one pixel has nothing to compare after resizing
MODALITIES = pytest.mark.parametrize("modality", ["text", "image", "audio"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves it, without pooling."""
    return save_embedding_gemma2(tmp_path_factory.mktemp("gemma") / "plain")


@pytest.fixture(scope="module")
def directory(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As sentence-transformers saves it, and as it is published."""
    target = tmp_path_factory.mktemp("gemma") / "sentence"
    modules = [Transformer(str(plain)), Pooling(DIM, "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(target))
    return target


def loaded(directory: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> EmbeddingGemma2Encoder:
    encoder = load(describe(directory), device, dtype)
    assert isinstance(encoder, EmbeddingGemma2Encoder)
    return encoder


def sounds() -> list[np.ndarray]:
    """Return sounds up to 30 s: of one frame, of mixed lengths, silent, quiet."""
    seconds = (0.31, 2.0, 161 / RATE, 1.0, 2.01)
    mixed = [tone(RATE, length) + noise(RATE, length, seed) for seed, length in enumerate(seconds)]
    return [*mixed, np.zeros(RATE, np.float32), 1e-3 * noise(RATE, 1.5, 9)]


def inputs_of(modality: str) -> list[Any]:
    texts = [*TEXTS[:-1], "dog " * 60]  # longer than the sliding window
    everything: dict[str, list[Any]] = {"text": texts, "image": SHAPES, "audio": sounds()}
    return everything[modality]


def encode(encoder: EmbeddingGemma2Encoder, modality: str, inputs: Sequence[Any], tokens: bool = False) -> Encoded:
    if modality == "text":
        return encoder.encode_text(encoder.tokenize(inputs), tokens)
    if modality == "image":
        return encoder.encode_image(inputs, tokens)
    return encoder.encode_audio(inputs, [RATE] * len(inputs), tokens)


def pil(image: ImageHWC) -> Image.Image:
    return Image.fromarray(image)


def far(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float().cpu() - right.float().cpu()).norm(dim=-1).max())


def test_patches_equal_the_processor(plain: Path, device: torch.device) -> None:
    theirs = AutoProcessor.from_pretrained(plain).image_processor([pil(image) for image in SHAPES], return_tensors="pt")
    ours = preprocess_patches(SHAPES, read_image_recipe(plain), device, torch.float32)
    difference = (ours.pixels_BND.cpu() - theirs["pixel_values"]).abs()
    assert difference.max() < (1e-6 if device.type == "cpu" else 1.01 / 255)
    assert (difference > 1e-6).float().mean() < 0.01
    assert torch.equal(ours.mask_BN.cpu().bool(), (theirs["image_position_ids"] != -1).all(-1))


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), tokens=st.sampled_from([70, 280, 1120]))
def test_sizes_equal_the_processor(height: int, width: int, tokens: int) -> None:
    patching = PooledPatching(patch_size=16, max_patches=9 * tokens, pooling=3)
    assert pooled_size(height, width, patching) == get_aspect_ratio_preserving_size(height, width, 16, 9 * tokens, 3)


@pytest.mark.parametrize("changes", [{}, {"input_scale_factor": 0.5, "fft_overdrive": True, "mel_floor": 0.1}], ids=str)
def test_spectrograms_equal_the_feature_extractor(
    changes: dict[str, Any], plain: Path, tmp_path: Path, device: torch.device
) -> None:
    shutil.copy(plain / "processor_config.json", tmp_path)
    edit_json(tmp_path, "processor_config.json", "feature_extractor", **changes)
    extractor = AutoProcessor.from_pretrained(plain).feature_extractor
    theirs = type(extractor)(**(extractor.to_dict() | changes))(sounds(), return_tensors="pt")
    recipe = read_gemma_recipe(tmp_path)
    windows = [gemma_windows(torch.from_numpy(sound).to(device), recipe)[0] for sound in sounds()]
    features, mask = (tensor.cpu() for tensor in gemma_log_mel(windows, recipe))
    frames = mask.shape[1]
    assert torch.equal(mask, theirs["input_features_mask"][:, :frames])
    assert not theirs["input_features_mask"][:, frames:].any()
    assert (features - theirs["input_features"][:, :frames]).abs().max() < 0.01
    assert (features - theirs["input_features"][:, :frames]).abs().mean() < 1e-5


@MODALITIES
def test_tokens_equal_the_model(modality: str, plain: Path, device: torch.device) -> None:
    """One input at a time, laid out by the checkpoint's own processor."""
    processor, model = (
        AutoProcessor.from_pretrained(plain),
        AutoModel.from_pretrained(plain, dtype=torch.float32).eval(),
    )
    encoded = encode(loaded(plain, device), modality, inputs_of(modality), tokens=True)
    assert encoded.tokens is not None
    for value, tokens, pooled in zip(inputs_of(modality), encoded.tokens, encoded.pooled, strict=True):
        inputs = {"images": [[pil(value)]]} if modality == "image" else {modality: [value]}
        with torch.inference_mode():
            hidden = model(**processor(**inputs, return_tensors="pt")).last_hidden_state[0]
        assert tokens.shape == hidden.shape
        tolerance = 5e-3 if device.type == "cuda" and modality == "image" else 1e-3 if modality == "audio" else 1e-4
        assert (tokens.cpu() - hidden).abs().max() < tolerance
        assert (pooled.cpu() - hidden.mean(0)).abs().max() < tolerance


@MODALITIES
def test_vectors_equal_sentence_transformers(modality: str, directory: Path, device: torch.device) -> None:
    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    inputs = inputs_of(modality)
    if modality == "image":
        theirs = model.encode([pil(image) for image in inputs], batch_size=1, show_progress_bar=False)
    elif modality == "audio":
        audio = [{"array": sound, "sampling_rate": RATE} for sound in inputs]
        theirs = model.encode(audio, batch_size=4, show_progress_bar=False)
    else:
        theirs = model.encode(inputs, batch_size=1, show_progress_bar=False)
    ours = encode(loaded(directory, device), modality, inputs).pooled
    assert far(ours, torch.from_numpy(theirs)) < (1e-3 if device.type == "cuda" else CLOSE)
    assert far(ours[:1], ours[1:2]) > 0.01  # the tiny model distinguishes them


@MODALITIES
def test_one_by_one_equals_together(modality: str, directory: Path, device: torch.device) -> None:
    """More inputs than one batch."""
    encoder, inputs = loaded(directory, device), [*inputs_of(modality), *inputs_of(modality)[::-1]]
    together = encode(encoder, modality, inputs, tokens=True)
    assert together.pooled.shape == (len(inputs), DIM)
    assert together.tokens is not None
    for position in range(len(inputs) // 2):
        alone = encode(encoder, modality, [inputs[position]], tokens=True)
        assert far(alone.pooled, together.pooled[position : position + 1]) < CLOSE
        assert alone.tokens is not None
        assert torch.allclose(alone.tokens[0], together.tokens[position], atol=1e-3)


def test_the_vector_of_a_long_sound_is_the_mean_over_windows_of_30_s(directory: Path, device: torch.device) -> None:
    encoder = loaded(directory, device)
    wave = noise(RATE, 35.0) * np.linspace(0, 1, 35 * RATE, dtype=np.float32)
    windows = [wave[start : start + 30 * RATE] for start in (0, 5 * RATE)]
    pieces = encode(encoder, "audio", windows, tokens=True)
    whole = encode(encoder, "audio", [wave, sounds()[0]], tokens=True)
    assert far(whole.pooled[:1], pieces.pooled.mean(0, keepdim=True)) < CLOSE
    assert whole.tokens is not None
    assert pieces.tokens is not None
    assert torch.allclose(whole.tokens[0], torch.cat(list(pieces.tokens)), atol=1e-3)


@MODALITIES
def test_bfloat16_is_close_to_single(modality: str, directory: Path, device: torch.device) -> None:
    full, half = (loaded(directory, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (
        far(encode(full, modality, inputs_of(modality)).pooled, encode(half, modality, inputs_of(modality)).pooled)
        < 0.1
    )


def test_a_prompt_is_put_before_texts_only(directory: Path, plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "prompted"
    shutil.copytree(directory, target)
    edit_json(
        target, "config_sentence_transformers.json", prompts={"document": "title. "}, default_prompt_name="document"
    )
    model = SentenceTransformer(str(target), device="cpu", local_files_only=True)
    prompted, bare = loaded(target, torch.device("cpu")), loaded(directory, torch.device("cpu"))
    theirs = torch.from_numpy(model.encode(TEXTS[:4], batch_size=1, show_progress_bar=False))
    assert far(encode(prompted, "text", TEXTS[:4]).pooled, theirs) < CLOSE
    assert torch.equal(encode(prompted, "image", SHAPES[:2]).pooled, encode(bare, "image", SHAPES[:2]).pooled)


def test_a_placeholder_in_a_text_is_tokenized_as_characters(directory: Path) -> None:
    encoder = loaded(directory, torch.device("cpu"))
    for ids in encoder.tokenize([f"a {token} dog" for token in [*SPECIAL.values(), "<bos>", "<eos>", "<|video|>"]]):
        assert [token for token in ids if token < 12] == [*encoder.begin, *encoder.end]


def test_describe(directory: Path, plain: Path, tmp_path: Path) -> None:
    for spec in (describe(directory), describe(plain)):
        assert spec.family == "embedding_gemma2"
        assert dict(spec.dims) == dict(spec.token_dims) == {"text": DIM, "image": DIM, "audio": DIM}
        assert (spec.max_text_tokens, spec.image_side, spec.sampling_rate) == (8192, 25 * 16, RATE)
    texts = describe(save_embedding_gemma2(tmp_path / "texts", towers=False))
    assert (dict(texts.dims), texts.image_side, texts.sampling_rate) == ({"text": DIM}, None, None)
    assert loaded(tmp_path / "texts", torch.device("cpu")).encode_text([[2, 30, 1]]).pooled.shape == (1, DIM)


def test_an_empty_sound_is_a_decode_error(directory: Path, device: torch.device) -> None:
    with pytest.raises(DecodeError, match="no samples"):
        encode(loaded(directory, device), "audio", [np.zeros(0, np.float32)])


@pytest.mark.parametrize(
    ("name", "part", "changes", "message"),
    [
        ("processor_config.json", "feature_extractor", {"dither": 0.1}, "dither is 0.1; expected 0.0"),
        ("processor_config.json", "feature_extractor", {"preemphasis": 0.97}, "preemphasis is 0.97"),
        ("processor_config.json", "feature_extractor", {"per_bin_mean": [0.0]}, "per_bin_mean is .0.0.; expected None"),
        ("processor_config.json", "image_processor", {"do_resize": False}, "do_resize is false"),
        (
            "processor_config.json",
            "image_processor",
            {"patch_size": 8},
            "expects patches of 16 pixels in groups of 3 x 3",
        ),
    ],
)
def test_unsupported_files_are_an_error(
    name: str, part: str, changes: dict[str, Any], message: str, directory: Path, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    shutil.copytree(directory, target)
    edit_json(target, name, part, **changes)
    with pytest.raises(ModelError, match=message):
        describe(target)


@pytest.mark.parametrize("changes", [{"smell": {}}, {"image": {"method": "get_image_features"}}])
def test_inputs_of_another_kind_are_left_to_the_processor_of_the_checkpoint(
    changes: dict[str, Any], directory: Path, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    shutil.copytree(directory, target)
    edit_json(target, "sentence_bert_config.json", "modality_config", **changes)
    spec = describe(target)
    assert spec.is_generic
    assert any("EmbeddingGemma2Model" in note for note in spec.notes)  # which states the pooling
