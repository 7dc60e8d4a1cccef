"""The fusion processor for texts, images, audio and features, and the families that use it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_audio_text import noise, tone
from tiny_fusion import media, tiny_config, tiny_model

from mmbeam.errors import DecodeError, ModelError
from mmbeam.models.encoders.base import Encoded
from mmbeam.models.encoders.fusion import FusionEncoder
from mmbeam.models.fusion import FusionProcessor
from mmbeam.models.fusion.audio import MelRecipe, log_mel
from mmbeam.models.fusion.configuration import MASK
from mmbeam.models.generators.fusion import FusionGenerator
from mmbeam.models.loading import read_json
from mmbeam.names import FUSION_MODALITIES, Modality
from mmbeam.prompts.ask import Decoding, Generated, Request

CPU = torch.device("cpu")
TEXTS = ["a small red ring at the top", "with a low tone", "ein Ring, üben", "🎻 at noon"]
FEATURES: dict[str, Any] = {
    "clip_image_embedding": {"modality": "image", "kind": "features", "width": 12},
    "t5_text_tokens": {"modality": "text", "kind": "features", "width": 6, "tokens": True, "max_tokens": 5},
}
ALL = {**media(text="transformer"), **FEATURES}


def fitted(sources: Mapping[str, Any], vocab_size: int = 280, **options: Any) -> FusionProcessor:
    return FusionProcessor.fit(tiny_config(sources).parsed_sources(), TEXTS, vocab_size, **options)


@pytest.fixture(scope="module")
def processor() -> FusionProcessor:
    return fitted(ALL)


def request(row: int = 0, **changed: Any) -> Request:
    """Return a request with every modality, except for the changes."""
    rng = np.random.default_rng(row)
    everything: dict[str, Any] = {
        "image": rng.integers(0, 256, (20 + row, 50 - row, 3), dtype=np.uint8),
        "audio": (tone(11025, 0.3 + 0.2 * row, (200.0 * (row + 1),)), 11025),
        "text": TEXTS[row % len(TEXTS)],
        "features": {
            "clip_image_embedding": rng.standard_normal(12).astype(np.float16),
            "t5_text_tokens": rng.standard_normal((row % 4 + 1, 6)).astype(np.float32),
        },
        "seed": row,
    }
    return Request(**(everything | changed))


# Texts


@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=4))
def test_labels_decode_to_the_text(processor: FusionProcessor, texts: list[str]) -> None:
    labels = processor.labels(texts, CPU)
    assert labels.dtype == torch.int64
    for row, text in zip(labels.tolist(), texts, strict=True):
        end = row.index(2)
        assert set(row[end + 1 :]) <= {-100}
        assert not {0, 1, -100} & set(row[:end])
        assert processor.decode([row[: end + 1]]) == [text]


@pytest.mark.parametrize("text", ["</s>", "a </s> b", "<s><pad>", "</s", "<pad></s>"])
def test_special_tokens_in_a_text_are_ordinary_text(processor: FusionProcessor, text: str) -> None:
    labels = processor.labels([text], CPU)[0].tolist()
    assert (labels.count(2), labels[-1]) == (1, 2)
    assert processor.decode([labels]) == [text]
    assert min(processor([request(text=text)], CPU)["text"][0].tolist()) > 2


def test_truncated_captions_keep_the_end_token(processor: FusionProcessor) -> None:
    labels = processor.labels(["a small red ring " * 9, "a", ""], CPU, max_length=4)
    whole = processor.labels(["a small red ring " * 9], CPU)[0]
    assert labels[0].tolist() == [*whole[:3].tolist(), 2]
    assert labels[1, 1:].tolist() == [2, -100, -100]
    assert labels[2].tolist() == [2, -100, -100, -100]


def test_decoding_stops_at_the_first_end_token(processor: FusionProcessor) -> None:
    ids = processor.token_ids(["a ring"])[0]
    assert processor.decode([[1, *ids, 2, *ids, 0, 0], [2], []]) == ["a ring", "", ""]


def test_vocabulary_has_the_requested_size() -> None:
    small, large = fitted(ALL, 260), fitted(ALL, 300)
    assert small.vocab_size == 260
    assert 260 < large.vocab_size <= 300
    assert len(large.token_ids([TEXTS[0]])[0]) < len(small.token_ids([TEXTS[0]])[0])


def test_texts_become_ids_and_mask(processor: FusionProcessor) -> None:
    inputs = processor([request(text="a ring"), request(text=""), request(text=None), request(text="ring " * 40)], CPU)
    ids, mask = inputs["text"], inputs["text" + MASK]
    ring_ids = processor.token_ids(["a ring"])[0]
    assert ids[0, : len(ring_ids)].tolist() == ring_ids
    assert mask.sum(1).tolist() == [len(ring_ids), 0, 0, 16]
    assert ids.shape == (4, 16)
    assert not processor([request(text=None)], CPU)["text" + MASK].any()


# Images, audio, features


def test_images_are_resized_and_normalised() -> None:
    processor = fitted(media())
    white, split = np.full((10, 70, 3), 255, np.uint8), np.zeros((64, 64, 3), np.uint8)
    split[:, 32:, 0] = 255
    inputs = processor([request(image=white), request(image=None), request(image=split)], CPU)
    assert inputs["image"].shape == (3, 3, 32, 32)
    assert inputs["image" + MASK].tolist() == [True, False, True]
    torch.testing.assert_close(inputs["image"][0], torch.ones(3, 32, 32))
    assert inputs["image"][2, :, 16, 2].tolist() == pytest.approx([-1, -1, -1], abs=0.01)
    assert inputs["image"][2, :, 16, 29].tolist() == pytest.approx([1, -1, -1], abs=0.01)
    assert processor.image_side == 32


RECIPE = MelRecipe.of_shape((1, 32, 64), seconds=1.0)


def spectrogram(wave: np.ndarray, recipe: MelRecipe = RECIPE) -> torch.Tensor:
    return log_mel(torch.from_numpy(wave)[None], recipe)[0, 0]


def test_log_mel_keeps_loudness() -> None:
    wave = noise(8000, 1.0)
    quiet, loud = spectrogram(wave), spectrogram(10 * wave)
    torch.testing.assert_close(loud - quiet, torch.full_like(quiet, 2 / 3), rtol=0, atol=0.01)  # log10(100) / 3
    assert spectrogram(np.zeros(8000, np.float32)).unique().tolist() == [-1.0]


def test_log_mel_bin_of_a_tone() -> None:
    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    for hertz in (300.0, 1000.0, 3000.0):
        peak = spectrogram(tone(8000, 1.0, (hertz,)))[4:-4].mean(0).argmax().item()
        expected = (mel(hertz) - mel(40)) / (mel(4000) - mel(40)) * 65 - 1
        assert abs(peak - expected) <= 1


def test_audio_is_cut_or_padded_with_silence() -> None:
    processor = fitted(media())
    recipe = processor.audio_recipes["audio"]
    assert recipe.n_samples == 8000
    window, short = noise(8000, 1.0), noise(8000, 0.5)
    waves = [window, np.concatenate([window, noise(8000, 3.0, seed=1)]), short]
    exact, longer, shorter = processor.audio_values("audio", [(wave, 8000) for wave in waves], CPU)[0]
    torch.testing.assert_close(longer, exact, rtol=0, atol=0)
    assert (shorter[0, 18:] == -1).all()
    assert (shorter[0, :14].amax(1) > 0).all()
    with pytest.raises(DecodeError):
        processor.audio_values("audio", [(np.zeros(0, np.float32), 8000)], CPU)


@pytest.mark.parametrize("rate", [4000, 11025, 22050, 44100, 48000])
def test_audio_is_resampled(rate: int) -> None:
    processor = fitted(media())
    tones = (300.0, 900.0)
    sounds = [(tone(8000, 1.0, tones), 8000), (tone(rate, 1.0, tones), rate)]
    expected, actual = processor.audio_values("audio", sounds, CPU)[0]
    inner = slice(4, -4)  # frames; at the ends, resamplers differ
    loud = expected[0, inner] > 0.3
    assert loud.any()
    torch.testing.assert_close(actual[0, inner][loud], expected[0, inner][loud], rtol=0, atol=0.05)


@pytest.mark.parametrize("seconds", [0.001, 0.05, 1.0, 2.5, 30.0])
def test_mel_recipe_has_the_shape_of_the_source(seconds: float) -> None:
    processor = fitted(media(), audio_seconds=seconds)
    values = processor([request()], CPU)["audio"]
    assert values.shape == (1, 1, 32, 32)
    assert processor.audio_recipes["audio"].n_samples == pytest.approx(max(512, 8000 * seconds), abs=32)


def test_features_are_padded_cut_and_masked(processor: FusionProcessor) -> None:
    vector, tokens = np.ones(12, np.float16), np.arange(42, dtype=np.float32).reshape(7, 6)
    rows = [
        Request(features={"clip_image_embedding": vector, "t5_text_tokens": tokens[:2]}),
        Request(),
        Request(features={"t5_text_tokens": tokens}),
    ]
    inputs = processor(rows, CPU)
    assert inputs["clip_image_embedding"].tolist() == [[1.0] * 12, [0.0] * 12, [0.0] * 12]
    assert inputs["clip_image_embedding" + MASK].tolist() == [True, False, False]
    assert inputs["t5_text_tokens" + MASK].sum(1).tolist() == [2, 0, 5]
    assert inputs["t5_text_tokens"][2].tolist() == tokens[:5].tolist()
    assert not inputs["t5_text_tokens"][0, 2:].any()
    assert all(not inputs[name + MASK].any() for name in media())
    assert processor.columns == {"clip_image_embedding": "image", "t5_text_tokens": "text"}


def test_truncation_is_logged_once_per_source(caplog: pytest.LogCaptureFixture) -> None:
    processor = fitted(ALL)
    long = {"t5_text_tokens": np.ones((6, 6), np.float32)}
    rows = [request(text="ring " * 30, audio=(tone(8000, 1.5), 8000), features=long)]
    for _ in range(2):
        processor(rows, CPU)
        processor.labels(["a ring " * 9, "a"], CPU, max_length=4)
    assert sorted(message.partition(":")[0] for message in caplog.messages) == sorted(
        ["audio", "captions", "t5_text_tokens", "text"]
    )
    assert (
        "audio: inputs longer than 8000 samples at 8000 Hz are truncated (longest in this batch: 12000)"
        in caplog.messages
    )
    caplog.clear()
    processor([request(text="ring")], CPU)
    processor.labels(["a"], CPU, max_length=2 + len(processor.token_ids(["a"])[0]))
    assert not caplog.messages


def test_wrong_feature_width_error_names_both_widths(processor: FusionProcessor) -> None:
    for shape, message in (((16,), r"\[16\]"), ((2, 12), r"\[2, 12\]")):
        with pytest.raises(ModelError, match=rf"features clip_image_embedding: expected shape \[12\], found {message}"):
            processor([Request(features={"clip_image_embedding": np.zeros(shape, np.float32)})], CPU)
    with pytest.raises(ModelError, match=r"features t5_text_tokens: expected shape \[tokens, 6\], found \[6\]"):
        processor([Request(features={"t5_text_tokens": np.zeros(6, np.float32)})], CPU)


def test_dtype_applies_to_floats_only(processor: FusionProcessor) -> None:
    inputs = processor([request()], CPU, torch.bfloat16)
    assert {name: value.dtype for name, value in inputs.items() if not name.endswith(MASK)} == {
        **dict.fromkeys(("image", "audio", *FEATURES), torch.bfloat16),
        "text": torch.int64,
    }


# Files


def test_saved_processor_prepares_the_same_inputs(processor: FusionProcessor, tmp_path: Path) -> None:
    tiny_config(ALL).save_pretrained(tmp_path)
    processor.save(tmp_path)
    again = FusionProcessor.from_directory(tmp_path)
    rows = [request(), request(1, text=None), request(2, image=None, audio=None)]
    torch.testing.assert_close(again(rows, CPU), processor(rows, CPU), rtol=0, atol=0)
    texts = [*TEXTS, "</s> <s>", ""]
    assert torch.equal(again.labels(texts, CPU), processor.labels(texts, CPU))
    assert again.decode(again.token_ids(texts)) == texts
    for name in ("modalities", "columns", "sampling_rate", "image_side", "vocab_size"):
        assert getattr(again, name) == getattr(processor, name)
    assert (again.modalities, again.sampling_rate, again.image_side) == (FUSION_MODALITIES, 8000, 32)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("preprocessing.json", None, r"expected preprocessing\.json, which is missing"),
        ("preprocessing.json", "[]", "expected a JSON object"),
        ("preprocessing.json", '{"images": {}}', "expected the preprocessing of a fusion model"),
        (
            "preprocessing.json",
            '{"images": [], "sounds": {}, "tokenizers": []}',
            "expected the preprocessing of a fusion model",
        ),
        (
            "preprocessing.json",
            '{"images": {"image": {"side": 2}}, "sounds": {}, "tokenizers": []}',
            "unexpected keyword argument",
        ),
        (
            "preprocessing.json",
            '{"images": {}, "sounds": {}, "tokenizers": ["../t"]}',
            "names the file '../t.tokenizer",
        ),
        ("preprocessing.json", '{"images": {}, "sounds": {}, "tokenizers": ["/t"]}', "names the file '/t.tokenizer"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("config.json", '{"model_type": "mmbeam-fusion"}', "expected the preprocessing of a fusion model"),
    ],
)
def test_damaged_files_are_named(
    processor: FusionProcessor, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    tiny_config(ALL).save_pretrained(tmp_path)
    processor.save(tmp_path)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=message):
        FusionProcessor.from_directory(tmp_path)


# The families that use it


@pytest.fixture(scope="module")
def directory(processor: FusionProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fusion")
    tiny_model(ALL, vocab_size=processor.vocab_size).save_pretrained(path)
    processor.save(path)
    return path


@pytest.fixture(scope="module")
def generator(directory: Path) -> FusionGenerator:
    spec = FusionGenerator.describe(directory, read_json(directory, "config.json"))
    return FusionGenerator.load(spec, CPU, torch.float32)


MIXED = [
    request(0),
    request(1, image=None),
    request(2, audio=None, text=None),
    Request(text=TEXTS[3], seed=3),
    Request(seed=4),
]
DECODINGS = {
    "greedy": Decoding(max_new_tokens=10),
    "beams": Decoding(max_new_tokens=10, num_beams=3),
    "sampling": Decoding(max_new_tokens=10, temperature=1.0, top_p=0.95),
}


def test_generator_spec(generator: FusionGenerator) -> None:
    spec = generator.spec
    assert (spec.modalities, spec.required, spec.sampling_rate, spec.image_side) == (FUSION_MODALITIES, (), 8000, 32)
    assert (spec.max_text_tokens, spec.max_new_tokens, spec.embedding_dim) == (16, 32, 16)
    assert {(c.name, c.modality, c.width, c.tokens) for c in spec.columns} == {
        ("clip_image_embedding", "image", 12, False),
        ("t5_text_tokens", "text", 6, True),
    }


@pytest.mark.parametrize("how", DECODINGS)
def test_batch_of_mixed_requests_equals_single_requests(generator: FusionGenerator, how: str) -> None:
    together = generator.generate(MIXED, DECODINGS[how])
    for sample_request, text in zip(MIXED, together, strict=True):
        alone = generator.generate([sample_request], DECODINGS[how])[0]
        assert alone.token_ids == text.token_ids
        assert alone.logprob == pytest.approx(text.logprob, abs=1e-3)
        assert text.text == generator.processor.decode([text.token_ids])[0]
        assert text.num_tokens == len(text.token_ids) - (text.token_ids[-1] == 2)
    assert len({text.token_ids for text in together}) > 2


@pytest.mark.parametrize("how", DECODINGS)
def test_score_is_the_log_probability_of_the_text(generator: FusionGenerator, how: str) -> None:
    texts = generator.generate(MIXED, DECODINGS[how])
    assert generator.score(MIXED, texts) == pytest.approx([text.logprob for text in texts], abs=1e-3)


def test_masking_a_modality_masks_its_features(generator: FusionGenerator) -> None:
    texts = generator.generate(MIXED[:1], DECODINGS["greedy"])
    columns = generator.processor.columns
    whole = generator.score(MIXED[:1], texts)
    for modality in FUSION_MODALITIES:
        without = MIXED[0].without(modality, columns)
        inputs = generator.processor([without], CPU)
        present = {name for name in generator.processor.sources if inputs[name + MASK].any()}
        assert present == {name for name, source in generator.processor.sources.items() if source.modality != modality}
        assert abs(generator.score([without], texts)[0] - whole[0]) > 1e-3


def test_empty_text_has_a_score(generator: FusionGenerator) -> None:
    empty = Generated(text="", token_ids=(2,), num_tokens=0, logprob=0.0)
    long = generator.generate(MIXED[:1], DECODINGS["greedy"])[0]
    scores = generator.score([MIXED[0], MIXED[0]], [empty, long])
    assert scores == pytest.approx([generator.score([MIXED[0]], [text])[0] for text in (empty, long)], abs=1e-4)


def test_generator_counts_tokens_and_weights(generator: FusionGenerator) -> None:
    texts = ["a ring", "", "ring " * 50]
    counts = generator.count_tokens(texts)
    assert counts == [len(generator.processor.token_ids([text])[0]) for text in texts]
    assert counts[2] > 50
    rows = [Request(text="a ring"), request(1), Request()]
    text_tokens = generator.count_tokens([TEXTS[1]])[0]
    assert generator.weigh(rows) == [counts[0], text_tokens + 2, 0]


def test_encoder_equals_the_model(directory: Path) -> None:
    spec = FusionEncoder.describe(directory, read_json(directory, "config.json"))
    assert spec.dims == dict.fromkeys(FUSION_MODALITIES, 16)
    assert spec.token_dims == dict.fromkeys(FUSION_MODALITIES, 32)
    encoder = FusionEncoder.load(spec, CPU, torch.float32)
    rows = [request(row) for row in range(3)]
    with torch.inference_mode():
        inputs = encoder.processor(rows, CPU)
        expected = encoder.model.encode(**inputs).embeddings
        states = {name: encoder.model.embed(name, inputs[name], inputs[name + MASK])[0] for name in FUSION_MODALITIES}
    sounds = [row.audio for row in rows if row.audio is not None]
    encodings: dict[Modality, Encoded] = {
        "image": encoder.encode_image([row.image for row in rows if row.image is not None], tokens=True),
        "audio": encoder.encode_audio([wave for wave, _ in sounds], [rate for _, rate in sounds], tokens=True),
        "text": encoder.encode_text(encoder.tokenize([row.text or "" for row in rows]), tokens=True),
    }
    for name, encoded in encodings.items():
        torch.testing.assert_close(encoded.pooled, expected[name], rtol=1e-4, atol=1e-5)
        assert encoded.tokens is not None
        for vectors, tokens, real in zip(encoded.tokens, *states[name], strict=True):
            torch.testing.assert_close(vectors, tokens[real], rtol=1e-4, atol=1e-4)
    assert [len(ids) for ids in encoder.tokenize(["ring " * 40, ""])] == [16, 0]
    assert encoder.count_tokens(["ring " * 40])[0] >= 40
    assert encoder.encode_text([[]]).pooled.isfinite().all()


def test_feature_only_model_is_not_an_encoder(tmp_path: Path) -> None:
    config, processor = tiny_config(FEATURES), fitted(FEATURES)
    config.vocab_size = processor.vocab_size
    config.save_pretrained(tmp_path)
    processor.save(tmp_path)
    with pytest.raises(ModelError, match="all its sources are features"):
        FusionEncoder.describe(tmp_path, json.loads((tmp_path / "config.json").read_text()))
