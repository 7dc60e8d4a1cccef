"""CLAP and Whisper against transformers' own models and processors, from the same directories."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_checks import edit_json, load_encoder
from tiny_audio_text import TEXTS, noise, save_clap, save_whisper, tone
from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor

from mmbeam.errors import DecodeError, ModelError
from mmbeam.models.encoders import describe
from mmbeam.models.recipes import read_clap_recipe

CLOSE = 5e-6  # on unit vectors, float32
HALF = {torch.bfloat16: 0.02, torch.float16: 0.005}  # largest distance of a unit vector from its float32 self


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("audio")
    return {
        "clap": save_clap(root / "clap"),
        "clap-fusion": save_clap(root / "clap-fusion", fusion=True),
        "whisper": save_whisper(root / "whisper"),
    }


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors.float().cpu(), dim=-1)


def far(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest distance between rows, as unit vectors."""
    return float((unit(left) - unit(right)).norm(dim=-1).max())


def mixed_sounds(rate: int) -> list[np.ndarray]:
    """Return sounds shorter than a window of 2 s, as long, longer, very short, silent, quiet and loud."""
    seconds = (0.31, 2.0, 7.3, 10 / rate, 1.0, 2.001)
    sounds = [tone(rate, length) + noise(rate, length, seed) for seed, length in enumerate(seconds)]
    return [*sounds, np.zeros(rate, np.float32), 1e-4 * noise(rate, 3.0, 9)]


def clap_reference(directory: Path, waves: Sequence[np.ndarray]) -> Any:
    """Return the reference's output; with a longer sound in the batch, it marks no other sound at random."""
    longer = noise(48000, 3)
    inputs = AutoFeatureExtractor.from_pretrained(directory)([*waves, longer], sampling_rate=48000, return_tensors="pt")
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model.get_audio_features(**inputs)


def test_clap_normalises_its_features_in_float32_whatever_the_dtype(
    directories: dict[str, Path], device: torch.device
) -> None:
    waves = mixed_sounds(48000)
    rates = [48000] * len(waves)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    half = load_encoder(directories["clap"], device, torch.bfloat16)
    norm = half.model.audio_model.audio_encoder.batch_norm
    norm.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    far_from_float32 = far(
        half.encode_audio(waves, rates).pooled,
        load_encoder(directories["clap"], device).encode_audio(waves, rates).pooled,
    )
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert far_from_float32 < HALF[torch.bfloat16]


def test_describe(directories: dict[str, Path], tmp_path: Path) -> None:
    clap, whisper = describe(directories["clap-fusion"]), describe(directories["whisper"])
    assert (clap.family, dict(clap.dims), dict(clap.token_dims)) == (
        "clap", {"audio": 24, "text": 24}, {"audio": 16, "text": 32},
    )  # fmt: skip
    assert (clap.sampling_rate, clap.max_text_tokens) == (48000, 64)
    assert (whisper.family, dict(whisper.dims), whisper.sampling_rate) == ("whisper", {"audio": 32}, 16000)


@pytest.mark.parametrize("name", ["clap", "clap-fusion"])
def test_clap_of_short_sounds_equals_the_reference(
    name: str, directories: dict[str, Path], device: torch.device
) -> None:
    waves = [noise(48000, 2.0), tone(48000, 0.7), tone(48000, 10 / 48000), np.zeros(48000, np.float32)]
    reference = clap_reference(directories[name], waves)
    encoded = load_encoder(directories[name], device).encode_audio(waves, [48000] * 4, tokens=True)
    assert far(encoded.pooled, reference.pooler_output[:4]) < CLOSE
    assert far(encoded.pooled[:1], encoded.pooled[1:2]) > 0.01  # the tiny model distinguishes sounds
    assert encoded.tokens is not None
    cells = reference.last_hidden_state[:4].flatten(2).transpose(1, 2)
    assert torch.allclose(torch.stack(list(encoded.tokens)).cpu(), cells, atol=1e-3)


def test_the_clap_vector_of_a_long_sound_is_the_mean_over_windows(
    directories: dict[str, Path], device: torch.device
) -> None:
    wave = noise(48000, 5.0) * np.linspace(0, 1, 5 * 48000, dtype=np.float32)
    windows = [wave[start : start + 96000] for start in (0, 72000, 144000)]
    mean = unit(clap_reference(directories["clap"], windows).pooler_output[:3]).mean(0, keepdim=True)
    encoded = load_encoder(directories["clap"], device).encode_audio([wave], [48000], tokens=True)
    assert far(encoded.pooled, mean) < CLOSE
    window = load_encoder(directories["clap"], device).encode_audio([wave[:96000]], [48000], tokens=True)
    assert encoded.tokens is not None
    assert window.tokens is not None
    assert torch.allclose(encoded.tokens[0][: len(window.tokens[0])], window.tokens[0], atol=1e-4)
    assert len(encoded.tokens[0]) == 3 * len(window.tokens[0])


def test_clap_fusion_of_a_long_sound_is_deterministic(directories: dict[str, Path], device: torch.device) -> None:
    encoder = load_encoder(directories["clap-fusion"], device)
    wave = noise(48000, 5.0) * np.linspace(0, 1, 5 * 48000, dtype=np.float32)
    first, second = (encoder.encode_audio([wave], [48000]).pooled for _ in range(2))
    assert torch.equal(first, second)
    assert far(first, encoder.encode_audio([wave[:96000]], [48000]).pooled) > 1e-3  # the rest of the sound matters


@pytest.mark.parametrize("name", ["clap", "clap-fusion", "whisper"])
def test_a_batch_of_mixed_sounds_equals_one_by_one(
    name: str, directories: dict[str, Path], device: torch.device
) -> None:
    encoder = load_encoder(directories[name], device)
    waves = [*mixed_sounds(48000), tone(44100, 1.0), tone(8000, 1.0)]
    rates = [48000] * (len(waves) - 2) + [44100, 8000]
    together = encoder.encode_audio(waves, rates, tokens=True)
    assert together.pooled.shape == (len(waves), encoder.spec.dims["audio"])
    assert torch.isfinite(together.pooled).all()
    assert together.tokens is not None
    for position, (wave, rate) in enumerate(zip(waves, rates, strict=True)):
        alone = encoder.encode_audio([wave], [rate], tokens=True)
        assert far(alone.pooled, together.pooled[position : position + 1]) < CLOSE
        assert alone.tokens is not None
        assert torch.allclose(alone.tokens[0], together.tokens[position], atol=1e-3)


@pytest.mark.parametrize("name", ["clap", "whisper"])
def test_other_sampling_rates_are_resampled(name: str, directories: dict[str, Path], device: torch.device) -> None:
    encoder = load_encoder(directories[name], device)
    at_own = encoder.encode_audio([tone(encoder.spec.sampling_rate or 0, 1.5)], [encoder.spec.sampling_rate or 0])
    at_other = encoder.encode_audio([tone(44100, 1.5)], [44100])
    assert far(at_own.pooled, at_other.pooled) < 0.02  # they differ at both ends of the sound


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["clap", "clap-fusion", "whisper"])
def test_half_precision_is_close_to_single(
    name: str, dtype: torch.dtype, directories: dict[str, Path], device: torch.device
) -> None:
    waves = mixed_sounds(48000)
    full = load_encoder(directories[name], device).encode_audio(waves, [48000] * len(waves)).pooled
    half = load_encoder(directories[name], device, dtype).encode_audio(waves, [48000] * len(waves)).pooled
    assert far(full, half) < HALF[dtype]


def test_whisper_equals_the_references_mean_over_frames_with_sound(
    directories: dict[str, Path], device: torch.device
) -> None:
    waves = [tone(16000, 2.0), noise(16000, 0.5), tone(16000, 10 / 16000), noise(16000, 0.02)]
    extractor = AutoFeatureExtractor.from_pretrained(directories["whisper"])
    inputs = extractor(waves, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    model = AutoModel.from_pretrained(directories["whisper"], dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = model.get_encoder()(inputs.input_features).last_hidden_state
    counts = model._get_feat_extract_output_lengths(inputs.attention_mask.sum(-1)).tolist()
    assert counts == [100, 25, 1, 1]
    means = torch.stack([frames[:count].mean(0) for frames, count in zip(hidden, counts, strict=True)])
    encoded = load_encoder(directories["whisper"], device).encode_audio(waves, [16000] * 4, tokens=True)
    assert torch.allclose(encoded.pooled.cpu(), means, atol=1e-4)
    assert encoded.tokens is not None
    for tokens, frames, count in zip(encoded.tokens, hidden, counts, strict=True):
        assert torch.allclose(tokens.cpu(), frames[:count], atol=1e-4)


def test_the_whisper_vector_of_a_long_sound_is_the_mean_over_all_frames(
    directories: dict[str, Path], device: torch.device
) -> None:
    encoder = load_encoder(directories["whisper"], device)
    wave = noise(16000, 19.5)  # ten windows of 2 s, the last one partial: more than one batch
    pieces = [wave[start : start + 32000] for start in range(0, len(wave), 32000)]
    apart = encoder.encode_audio(pieces, [16000] * 10, tokens=True).tokens
    whole = encoder.encode_audio([wave], [16000], tokens=True)
    assert apart is not None
    assert whole.tokens is not None
    assert torch.allclose(whole.tokens[0], torch.cat(list(apart)), atol=1e-4)
    assert torch.allclose(whole.pooled[0], torch.cat(list(apart)).mean(0), atol=1e-4)


def test_clap_text_equals_the_reference(directories: dict[str, Path], device: torch.device) -> None:
    directory = directories["clap"]
    tokenizer = AutoProcessor.from_pretrained(directory).tokenizer
    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        reference = model.get_text_features(**inputs)
    encoder = load_encoder(directory, device)
    ids = encoder.tokenize(TEXTS)
    encoded = encoder.encode_text(ids, tokens=True)
    assert far(encoded.pooled, reference.pooler_output) < CLOSE
    assert [len(text_ids) for text_ids in ids] == inputs.attention_mask.sum(1).tolist()
    assert max(map(len, ids)) == 64 < max(encoder.count_tokens(TEXTS))
    assert encoder.count_tokens(["", "er"]) == [0, 1]
    assert encoded.tokens is not None
    for text_ids, tokens, hidden in zip(ids, encoded.tokens, reference.last_hidden_state, strict=True):
        assert torch.allclose(tokens.cpu(), hidden[: len(text_ids)], atol=1e-4)
        assert far(encoder.encode_text([text_ids]).pooled, encoded.pooled[[ids.index(text_ids)]]) < CLOSE


def test_an_empty_sound_is_a_decode_error(directories: dict[str, Path], device: torch.device) -> None:
    for name in ("clap", "whisper"):
        with pytest.raises(DecodeError, match="no samples"):
            load_encoder(directories[name], device).encode_audio([np.zeros(0, np.float32)], [16000])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truncation": "centre"}, "truncation is 'centre'; expected 'fusion' or 'rand_trunc'"),
        ({"padding": "loop"}, "padding is 'loop'"),
        ({"feature_size": 0}, "feature_size is 0; expected a positive integer"),
        ({"hop_length": "480"}, "hop_length is '480'"),
        ({"frequency_max": float("nan")}, "frequency_max is nan"),
        ({"feature_extractor_type": "ASTFeatureExtractor"}, "feature_extractor_type is 'ASTFeatureExtractor'"),
        ({"truncation": "fusion"}, "enable_fusion False"),
        ({"feature_size": 32}, "64 mel bins, the feature extractor makes 32"),
    ],
)
def test_unsupported_options_of_a_clap_extractor(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = save_clap(tmp_path / "clap")
    edit_json(directory, "processor_config.json", "feature_extractor", **changes)
    with pytest.raises(ModelError, match=message):
        describe(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dither": 0.01}, "dither is 0.01; expected 0.0"),
        ({"padding_side": "left"}, "padding_side is 'left'; expected 'right'"),
        ({"chunk_length": 30}, "80 mel bins and 200 frames"),
        ({"feature_size": 128}, "makes 128 and 200"),
    ],
)
def test_unsupported_options_of_a_whisper_extractor(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = save_whisper(tmp_path / "whisper")
    edit_json(directory, "preprocessor_config.json", **changes)
    with pytest.raises(ModelError, match=message):
        describe(directory)


def test_the_older_file_name_of_a_feature_extractor_is_read(directories: dict[str, Path], tmp_path: Path) -> None:
    nested = json.loads((directories["clap"] / "processor_config.json").read_text())["feature_extractor"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(nested))
    assert read_clap_recipe(tmp_path) == read_clap_recipe(directories["clap"])
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"expected preprocessor_config\.json, which is missing"):
        read_clap_recipe(tmp_path)
