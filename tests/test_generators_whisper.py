"""Whisper: real tiny models, compared with their own processor and `generate`, on short and long audio."""

from pathlib import Path
from typing import Any

import pytest
import tiny_generators_hub as hub
import torch
from shards import natural_sound
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from mmbeam.errors import ModelError
from mmbeam.models.generators import describe
from mmbeam.prompts.ask import Decoding, Generated, Request

RATE, WINDOW = 16000, 2.0  # Hz, seconds
SHORT, LONG = (0.3, 1.0, 1.99, 2.0, 0.7), (2.1, 6.4, 4.0, 9.3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.save_whisper(tmp_path_factory.mktemp("models") / "whisper")


@pytest.fixture(scope="module")
def model(saved: Path) -> Any:
    return hub.load_tiny(saved)


@pytest.fixture(scope="module")
def reference(saved: Path) -> Any:
    return load_reference(saved)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.save_whisper(tmp_path_factory.mktemp("models") / "trained", trained=True)


def load_reference(directory: Path) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(directory), WhisperProcessor.from_pretrained(directory)


def sound(seconds: float, seed: int = 0, **options: Any) -> Request:
    return Request(audio=(natural_sound(int(seconds * 100) + seed, seconds, RATE), RATE), **options)


@torch.inference_mode()
def expected(reference: Any, request: Request, **options: Any) -> list[int]:
    """The tokens of transformers' own `generate`."""
    model, processor = reference
    assert request.audio is not None
    long = len(request.audio[0]) > WINDOW * RATE
    how = {"truncation": False, "padding": "longest", "return_attention_mask": True} if long else {}
    features = processor(request.audio[0], sampling_rate=RATE, return_tensors="pt", **how)
    ids = model.generate(
        **features,
        task="translate" if request.task == "translate" else "transcribe",
        language=request.language,
        max_new_tokens=hub.NEW,
        return_timestamps=long,
        **options,
    )
    return list(ids[0].tolist())


def without_end(texts: list[Generated]) -> list[list[int]]:
    return [list(text.token_ids[: text.num_tokens]) for text in texts]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 0.8}])
def test_a_batch_of_mixed_durations_equals_single_requests(model: Any, options: dict[str, Any]) -> None:
    requests = [sound(seconds, seed=seed) for seed, seconds in enumerate((*SHORT, *LONG))]
    hub.check_batches(model, requests, **options)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("options", [{}, {"task": "translate"}, {"language": "german"}, {"language": "<|en|>"}])
def test_short_audio_equals_the_models_own_generate(trained: Path, options: dict[str, Any], beams: int) -> None:
    model, reference = hub.load_tiny(trained), load_reference(trained)
    requests = [sound(seconds, **options) for seconds in SHORT]
    texts = hub.generate(model, requests, num_beams=beams)
    references = [expected(reference, request, num_beams=beams) for request in requests]
    end = reference[0].generation_config.eos_token_id
    assert without_end(texts) == [[token for token in ids if token != end] for ids in references]
    for text, ids in zip(texts, references, strict=True):
        assert text.text == reference[1].decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("options", [{}, {"task": "translate", "language": "de"}])
def test_long_audio_equals_the_models_own_generate(model: Any, reference: Any, options: dict[str, Any]) -> None:
    requests = [sound(seconds, **options) for seconds in LONG]
    texts = hub.generate(model, requests)
    assert without_end(texts) == [expected(reference, request) for request in requests]
    stamp = reference[0].generation_config.no_timestamps_token_id + 1
    assert any(token >= stamp for text in texts for token in text.token_ids)
    assert not any("<|" in text.text for text in texts)


def test_a_window_ends_with_its_last_whole_segment(model: Any) -> None:
    """The cases of transformers' `_retrieve_segment`; 10 timestamps are 0.2 s."""
    stamp = model.model.generation_config.no_timestamps_token_id + 1
    at = [stamp + index for index in range(40)]
    assert model._whole_segments([], 200) == ([], 200)
    assert model._whole_segments([7, 8], 150) == ([7, 8], 150)
    assert model._whole_segments([at[0], 7, at[10]], 200) == ([at[0], 7, at[10]], 200)
    assert model._whole_segments([at[0], 7, at[10], at[10], 8], 200) == ([at[0], 7, at[10], at[10]], 20)
    assert model._whole_segments([at[0], 7, at[10], at[12], 8, at[30]], 200)[1] == 200
    assert model._whole_segments([at[0], 7, at[10], at[10], 8, at[30], at[31]], 200)[1] == 60
    assert model._whole_segments([at[0], at[0], 8], 200)[1] == 200  # never 0 frames


def test_the_log_probability_is_that_of_the_kept_tokens(model: Any) -> None:
    [text] = hub.generate(model, [sound(6.4)])
    assert text.logprob < 0
    assert text.num_tokens == len(text.token_ids)


def test_an_english_only_model_has_neither_language_nor_task(tmp_path: Path) -> None:
    directory = hub.save_whisper(tmp_path / "whisper", multilingual=False, trained=True)
    model, (reference, processor) = hub.load_tiny(directory), load_reference(directory)
    reference.generation_config.forced_decoder_ids = None
    request = sound(1.0)
    assert request.audio is not None
    features = processor(request.audio[0], sampling_rate=RATE, return_tensors="pt")
    [ids] = reference.generate(**features, max_new_tokens=hub.NEW).tolist()
    [text] = hub.generate(model, [request])
    assert list(text.token_ids) == ids[: len(text.token_ids)]


def test_other_rates_are_resampled(model: Any) -> None:
    wave = natural_sound(1, 1.0, 8000)
    texts = hub.generate(model, [Request(audio=(wave, 8000)), Request(audio=(wave, RATE))])
    assert texts[0].token_ids != texts[1].token_ids


def test_audio_weighs_its_windows(model: Any) -> None:
    assert model.weigh([sound(0.3), sound(2.0), sound(2.1), sound(9.3)]) == [100, 100, 200, 500]


def test_the_spec_names_inputs_and_limits(saved: Path) -> None:
    spec = describe(saved)
    assert (spec.modalities, spec.required, spec.sampling_rate) == (("audio",), ("audio",), RATE)
    assert spec.max_new_tokens == 36


def test_an_unsupported_language_is_an_error(model: Any) -> None:
    with pytest.raises(ModelError, match=r"unsupported language 'klingon'; expected one of <\|en\|>, <\|de\|>"):
        model.generate([sound(1.0, language="klingon")], Decoding())


@pytest.mark.parametrize("name", ["processor_config.json", "generation_config.json", "tokenizer.json"])
def test_describe_names_a_missing_file(tmp_path: Path, name: str) -> None:
    directory = hub.save_whisper(tmp_path / "whisper")
    (directory / name).unlink()
    (directory / "vocab.json").unlink(missing_ok=True)
    stem = "preprocessor" if name.startswith("processor") else name.partition(".")[0]
    with pytest.raises(ModelError, match=stem):
        describe(directory)


def test_bfloat16(saved: Path) -> None:
    hub.check_bfloat16(saved, [sound(1.0), sound(5.0)])
