"""AST against transformers' own model and feature extractor, from the same directory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_checks import load_encoder
from tiny_audio_text import WIDTH, noise, save_ast, tone
from transformers import ASTFeatureExtractor, ASTModel

from mmbeam.errors import DecodeError, ModelError
from mmbeam.models.encoders import describe
from mmbeam.models.recipes import read_ast_recipe
from mmbeam.ops.log_mel import ast_log_mel, ast_windows

# The reference extractor warns about its own published options: its lowest filters lie between two bins.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")

RATE = 16000
WINDOW = 63 * 160 + 400  # samples
CLOSE = 2e-5  # on vectors of length 5, float32
HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}  # largest distance of a unit vector from its float32 self


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ast(tmp_path_factory.mktemp("ast") / "ast")


def sounds() -> list[np.ndarray]:
    """Return sounds no longer than a window: one frame, a part of a frame more, full, silent, quiet, off centre."""
    seconds = (0.31, WINDOW / RATE, 0.5, 400 / RATE, 0.1, 719 / RATE)
    mixed = [tone(RATE, length) + noise(RATE, length, seed) for seed, length in enumerate(seconds)]
    return [*mixed, np.zeros(5000, np.float32), 1e-4 * noise(RATE, 0.5, 9) + np.float32(0.3), tone(RATE, 0.6)]


def reference_features(directory: Path, waves: Sequence[np.ndarray]) -> torch.Tensor:
    extractor: Any = ASTFeatureExtractor
    features = extractor.from_pretrained(directory)(waves, sampling_rate=RATE, return_tensors="pt")["input_values"]
    return torch.as_tensor(features)


@pytest.mark.parametrize("changes", [{}, {"do_normalize": False}, {"mean": 1.5, "std": 0.25}], ids=str)
def test_features_equal_the_feature_extractor(
    changes: dict[str, Any], directory: Path, tmp_path: Path, device: torch.device
) -> None:
    ASTFeatureExtractor(max_length=64, **changes).save_pretrained(tmp_path)
    recipe = read_ast_recipe(tmp_path)
    windows = [ast_windows(torch.from_numpy(wave).to(device), recipe)[0] for wave in sounds()]
    ours = ast_log_mel(windows, recipe).cpu()
    theirs = reference_features(tmp_path, sounds())
    assert (ours - theirs).abs().max() < 1e-5 / recipe.spread * max(1.0, recipe.spread)


def test_vectors_and_tokens_equal_the_reference(directory: Path, device: torch.device) -> None:
    model = ASTModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = model(reference_features(directory, sounds()))
    encoded = load_encoder(directory, device).encode_audio(sounds(), [RATE] * len(sounds()), tokens=True)
    assert (encoded.pooled.cpu() - theirs.pooler_output).abs().max() < CLOSE
    assert encoded.tokens is not None
    assert (torch.stack(list(encoded.tokens)).cpu() - theirs.last_hidden_state).abs().max() < 10 * CLOSE
    assert (encoded.pooled[0] - encoded.pooled[2]).abs().max() > 0.01  # the tiny model distinguishes sounds


def test_the_vector_of_a_long_sound_is_the_mean_over_windows(directory: Path, device: torch.device) -> None:
    """Twenty windows, more than one batch, the first at the start and the last at the end."""
    wave = noise(RATE, 20 * WINDOW / RATE - 0.1) * np.linspace(0, 1, 20 * WINDOW - 1600, dtype=np.float32)
    starts = [index * (len(wave) - WINDOW) // 19 for index in range(20)]
    encoder = load_encoder(directory, device)
    pieces = encoder.encode_audio([wave[start : start + WINDOW] for start in starts], [RATE] * 20, tokens=True)
    whole = encoder.encode_audio([wave, sounds()[0]], [RATE] * 2, tokens=True)
    assert (whole.pooled[0] - pieces.pooled.mean(0)).abs().max() < CLOSE
    assert whole.tokens is not None
    assert pieces.tokens is not None
    assert torch.allclose(whole.tokens[0], torch.cat(list(pieces.tokens)), atol=1e-4)


def test_a_batch_of_mixed_sounds_equals_one_by_one(directory: Path, device: torch.device) -> None:
    encoder = load_encoder(directory, device)
    waves = [*sounds(), tone(RATE, 10 / RATE), tone(44100, 0.4), noise(RATE, 3.3)]
    rates = [RATE] * (len(sounds()) + 1) + [44100, RATE]
    together = encoder.encode_audio(waves, rates, tokens=True)
    assert together.pooled.shape == (len(waves), WIDTH)
    assert together.tokens is not None
    for position, (wave, rate) in enumerate(zip(waves, rates, strict=True)):
        alone = encoder.encode_audio([wave], [rate], tokens=True)
        assert (alone.pooled[0] - together.pooled[position]).abs().max() < CLOSE
        assert alone.tokens is not None
        assert torch.allclose(alone.tokens[0], together.tokens[position], atol=1e-4)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_close_to_single(dtype: torch.dtype, directory: Path, device: torch.device) -> None:
    full, half = (
        load_encoder(directory, device, precision).encode_audio(sounds(), [RATE] * len(sounds())).pooled
        for precision in (torch.float32, dtype)
    )
    unit = torch.nn.functional.normalize
    assert (unit(full, dim=-1) - unit(half, dim=-1)).norm(dim=-1).max() < HALF[dtype]


def test_describe(directory: Path) -> None:
    spec = describe(directory)
    assert (spec.family, dict(spec.dims), dict(spec.token_dims), spec.sampling_rate) == (
        "audio-spectrogram-transformer", {"audio": WIDTH}, {"audio": WIDTH}, RATE,
    )  # fmt: skip


def test_an_empty_sound_is_a_decode_error(directory: Path, device: torch.device) -> None:
    with pytest.raises(DecodeError, match="no samples"):
        load_encoder(directory, device).encode_audio([np.zeros(0, np.float32)], [RATE])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_rate": 8000}, "sampling_rate is 8000; expected 16000"),
        ({"max_length": 1024}, "128 mel bins and 64 frames, the feature extractor makes 128 and 1024"),
        ({"std": 0.0}, "std is 0.0; expected a number of at least 1e-06"),
        ({"feature_extractor_type": "ClapFeatureExtractor"}, "is 'ClapFeatureExtractor'"),
    ],
)
def test_unsupported_options_of_an_ast_extractor(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save_ast(tmp_path / "ast") / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=message):
        describe(path.parent)
