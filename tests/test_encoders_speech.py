"""wav2vec 2.0, HuBERT and WavLM against transformers' own models and feature extractor, from the same directories."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_checks import edit_json, load_encoder
from tiny_audio_text import SPEECH, WIDTH, noise, save_speech, tone
from transformers import AutoFeatureExtractor, AutoModel

from mmbeam.errors import DecodeError, ModelError
from mmbeam.models.encoders import describe
from mmbeam.ops.audio import standardize

# transformers' WavLM gives torch a boolean mask beside a bias in floating point.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

RATE = 16000
CLOSE = 2e-5  # on vectors of length 1 to 10, float32
HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}  # largest distance of a unit vector from its float32 self
NAMES = [*SPEECH, *(f"{family}-large" for family in SPEECH)]
MODEL = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speech")
    return {name: save_speech(root / name, name.removesuffix("-large"), name.endswith("-large")) for name in NAMES}


def sounds() -> list[np.ndarray]:
    """Return sounds of mixed lengths, two of them equal; silent, quiet, off centre, and as short as one frame."""
    seconds = (0.31, 2.0, 3.3, 400 / RATE, 1.0, 2.0)
    mixed = [tone(RATE, length) + noise(RATE, length, seed) for seed, length in enumerate(seconds)]
    return [*mixed, np.zeros(RATE, np.float32), 1e-3 * noise(RATE, 1.5, 9) + np.float32(0.2)]


def reference(directory: Path, waves: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Return the model's last hidden states for each sound alone, prepared by its own extractor."""
    extractor = AutoFeatureExtractor.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [
            model(extractor(wave, sampling_rate=RATE, return_tensors="pt").input_values).last_hidden_state[0]
            for wave in waves
        ]


@MODEL
def test_a_vector_is_the_mean_over_the_references_frames(
    name: str, directories: dict[str, Path], device: torch.device
) -> None:
    theirs = reference(directories[name], sounds())
    encoded = load_encoder(directories[name], device).encode_audio(sounds(), [RATE] * len(sounds()), tokens=True)
    assert encoded.tokens is not None
    for tokens, pooled, frames in zip(encoded.tokens, encoded.pooled.cpu(), theirs, strict=True):
        assert tokens.shape == frames.shape
        assert (tokens.cpu() - frames).abs().max() < 10 * CLOSE
        assert (pooled - frames.mean(0)).abs().max() < CLOSE
    assert (encoded.pooled[0] - encoded.pooled[1]).abs().max() > 0.01  # the tiny model distinguishes sounds


@pytest.mark.parametrize("family", SPEECH)
def test_vectors_equal_those_of_a_masked_batch_of_the_reference(
    family: str, directories: dict[str, Path], device: torch.device
) -> None:
    """Large models are documented to be run with a mask."""
    directory = directories[f"{family}-large"]
    inputs = AutoFeatureExtractor.from_pretrained(directory)(
        sounds(), sampling_rate=RATE, padding=True, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    encoded = load_encoder(directory, device).encode_audio(sounds(), [RATE] * len(sounds()), tokens=True)
    assert encoded.tokens is not None
    for tokens, frames in zip(encoded.tokens, hidden, strict=True):
        assert (tokens.cpu() - frames[: len(tokens)]).abs().max() < 10 * CLOSE


@MODEL
def test_a_batch_of_mixed_sounds_equals_one_by_one(
    name: str, directories: dict[str, Path], device: torch.device
) -> None:
    encoder = load_encoder(directories[name], device)
    waves = [*sounds(), tone(RATE, 10 / RATE), tone(44100, 1.0)]
    rates = [RATE] * (len(waves) - 1) + [44100]
    together = encoder.encode_audio(waves, rates, tokens=True)
    assert together.pooled.shape == (len(waves), WIDTH)
    assert torch.isfinite(together.pooled).all()
    assert together.tokens is not None
    for position, (wave, rate) in enumerate(zip(waves, rates, strict=True)):
        alone = encoder.encode_audio([wave], [rate], tokens=True)
        assert (alone.pooled[0] - together.pooled[position]).abs().max() < CLOSE
        assert alone.tokens is not None
        assert torch.allclose(alone.tokens[0], together.tokens[position], atol=1e-4)


def test_the_vector_of_a_long_sound_is_the_mean_over_the_frames_of_its_pieces(
    directories: dict[str, Path], device: torch.device
) -> None:
    """75 s are three pieces of 25 s, standardised as one sound; more pieces than one batch."""
    encoder = load_encoder(directories["wavlm"], device)
    wave = noise(RATE, 75.0) * np.linspace(0, 1, 75 * RATE, dtype=np.float32)
    model = AutoModel.from_pretrained(directories["wavlm"], dtype=torch.float32).eval().to(device)
    pieces = standardize(torch.from_numpy(wave).to(device)).split(25 * RATE)
    with torch.inference_mode():
        frames = torch.cat([model(piece[None]).last_hidden_state[0] for piece in pieces])
    encoded = encoder.encode_audio([wave, tone(RATE, 0.5), wave], [RATE] * 3, tokens=True)
    assert encoded.tokens is not None
    assert torch.allclose(encoded.tokens[0], frames, atol=1e-4)
    for position in (0, 2):
        assert (encoded.pooled[position] - frames.mean(0)).abs().max() < CLOSE


def test_without_normalisation_the_level_matters(directories: dict[str, Path], tmp_path: Path) -> None:
    waves = [tone(RATE, 0.5), 0.1 * tone(RATE, 0.5)]
    encoder = load_encoder(directories["hubert-large"], torch.device("cpu"))
    loud, quiet = encoder.encode_audio(waves, [RATE, RATE]).pooled
    assert (loud - quiet).abs().max() < 1e-3
    directory = save_speech(tmp_path / "plain", "hubert", large=True)
    edit_json(directory, "preprocessor_config.json", do_normalize=False)
    vectors = load_encoder(directory, torch.device("cpu")).encode_audio(waves, [RATE, RATE]).pooled
    assert (vectors[0] - vectors[1]).abs().max() > 3e-3
    for vector, frames in zip(vectors, reference(directory, waves), strict=True):
        assert (vector - frames.mean(0)).abs().max() < CLOSE


@pytest.mark.parametrize("dtype", HALF)
@MODEL
def test_half_precision_is_close_to_single(
    name: str, dtype: torch.dtype, directories: dict[str, Path], device: torch.device
) -> None:
    full, half = (
        load_encoder(directories[name], device, precision).encode_audio(sounds(), [RATE] * len(sounds())).pooled
        for precision in (torch.float32, dtype)
    )
    unit = torch.nn.functional.normalize
    assert (unit(full, dim=-1) - unit(half.float(), dim=-1)).norm(dim=-1).max() < HALF[dtype]


@MODEL
def test_describe(name: str, directories: dict[str, Path]) -> None:
    spec = describe(directories[name])
    assert (spec.family, dict(spec.dims), dict(spec.token_dims), spec.sampling_rate) == (
        name.removesuffix("-large"), {"audio": WIDTH}, {"audio": WIDTH}, RATE,
    )  # fmt: skip


def test_an_empty_sound_is_a_decode_error(directories: dict[str, Path], device: torch.device) -> None:
    with pytest.raises(DecodeError, match="no samples"):
        load_encoder(directories["wav2vec2"], device).encode_audio([np.zeros(0, np.float32)], [RATE])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"add_adapter": True}, "add_adapter is true; expected a model without"),
        ("preprocessor_config.json", {"do_normalize": "yes"}, "do_normalize is 'yes'; expected true or false"),
        ("preprocessor_config.json", {"feature_size": 80}, "feature_size is 80; expected 1"),
        ("preprocessor_config.json", {"feature_extractor_type": "ASTFeatureExtractor"}, "is 'ASTFeatureExtractor'"),
    ],
)
def test_unsupported_files_are_an_error(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    directory = save_speech(tmp_path / "model", "wav2vec2")
    edit_json(directory, name, **changes)
    with pytest.raises(ModelError, match=message):
        describe(directory)


def test_a_missing_extractor_is_named(tmp_path: Path) -> None:
    directory = save_speech(tmp_path / "model", "wavlm")
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"expected preprocessor_config\.json, which is missing"):
        describe(directory)
