"""Whisper: real tiny models, compared with their own processor and `generate`, on short and long audio."""

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_generators_hub as hub
import torch
from shards import natural_sound
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from mmbeam.errors import ModelError, UsageError
from mmbeam.models.generators import describe, whisper
from mmbeam.models.generators.whisper import MAX_COMPRESSION, compression, warp
from mmbeam.models.placement import get_device
from mmbeam.prompts.ask import Decoding, Generated, Instruction, Request, with_default_tokens
from mmbeam.stages.generate import generate_stage
from mmbeam.types import Audio, Batch, Sample, WorkUnit

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


@torch.inference_mode()
def segments_of(reference: Any, request: Request, **options: Any) -> Any:
    """The segments of transformers' own `generate`."""
    model, processor = reference
    assert request.audio is not None
    how: dict[str, Any] = {"truncation": False, "padding": "longest", "return_attention_mask": True}
    features = processor(request.audio[0], sampling_rate=RATE, return_tensors="pt", **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.generate(
            **features, max_new_tokens=hub.NEW, return_timestamps=True, return_segments=True, **options
        )
    return output["segments"][0]


def test_segments_equal_the_models_own_generate(model: Any, reference: Any) -> None:
    requests = [sound(seconds, seed=seed) for seed, seconds in enumerate((2.1, 6.4, 4.0, 9.3, 7.7))]
    count = 0
    for request, text in zip(requests, hub.generate(model, requests), strict=True):
        decoded = [
            (
                float(segment["start"]),
                float(segment["end"]),
                reference[1].decode(segment["tokens"], skip_special_tokens=True),
            )
            for segment in segments_of(reference, request)
        ]
        expected = [(start, end, words.strip()) for start, end, words in decoded if words.strip()]
        count += len(expected)
        assert [segment["text"] for segment in text.details["segments"]] == [words for *_, words in expected]
        for segment, (start, end, _) in zip(text.details["segments"], expected, strict=True):
            assert (segment["start"], segment["end"]) == pytest.approx((start, end), abs=1e-5)
    assert count > 10


@torch.inference_mode()
def test_token_times_equal_the_models_own_generate(trained: Path) -> None:
    """transformers has no time for the last token; its attention ends with the one before."""
    model, reference = hub.load_tiny(trained), load_reference(trained)
    for seconds in (0.7, 1.3, 2.0):
        request = sound(seconds)
        assert request.audio is not None
        features = reference[1](request.audio[0], sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
        model_reference: Any = WhisperForConditionalGeneration.from_pretrained(trained, attn_implementation="eager")
        output = model_reference.generate(
            **features, language="en", task="transcribe", max_new_tokens=hub.NEW, return_token_timestamps=True
        )
        ids = output["sequences"][0].tolist()
        expected = output["token_timestamps"][0].tolist()
        clip = torch.from_numpy(request.audio[0])
        [item], memory = model._begin([Request(audio=request.audio, language="en")], [clip], True)
        start = [*item.start, model.model.generation_config.no_timestamps_token_id]
        [times] = model.token_times(memory, [start], [ids[:-1]], [item.frames])
        assert times == pytest.approx(expected[: len(times)], abs=1e-5)
    assert len(set(times)) > 3  # the longest sound's


def test_words_have_times(model: Any, trained: Path) -> None:
    for generator, seconds in ((model, 6.4), (model, 9.3), (hub.load_tiny(trained), 1.5)):
        [text] = hub.generate(generator, [sound(seconds)], word_timestamps=True)
        words = text.details["words"]
        assert words
        assert all(0 <= word["start"] <= word["end"] <= seconds + 0.02 for word in words)
        assert [word["start"] for word in words] == sorted(word["start"] for word in words)


def test_tokens_become_words(model: Any) -> None:
    tokenizer = model.tokenizer._tokenizer
    stamp = model.model.generation_config.no_timestamps_token_id + 1
    text = ' "Hello", said the naïve cat.'
    ids = [stamp, *tokenizer(text, add_special_tokens=False)["input_ids"], stamp + 50]
    words = model._split_words(ids, [0.01 * index for index in range(len(ids))], True)
    assert [word["text"] for word in words] == ['"Hello",', "said", "the", "naïve", "cat."]
    assert all(left["end"] == right["start"] for left, right in itertools.pairwise(words))
    assert words[-1]["end"] == pytest.approx(0.01 * (len(ids) - 1))
    spaceless = model._split_words(ids[1:-1], [0.0] * (len(ids) - 2), False)
    assert len(spaceless) > len(words)


def test_warping_equals_a_path_by_hand() -> None:
    cost = np.array([[0.0, 0.0, 5.0, 5.0, 5.0], [5.0, 5.0, 0.0, 5.0, 5.0], [5.0, 5.0, 5.0, 0.0, 0.0]])
    assert warp(cost) == [0, 2, 3]
    assert warp(np.zeros((1, 4))) == [0]


@torch.inference_mode()
def test_no_speech_is_the_probability_after_the_begin_token(model: Any, reference: Any) -> None:
    requests = [sound(seconds) for seconds in (0.7, 6.4)]
    short, long = (text.details["no_speech"] for text in hub.generate(model, requests))
    assert requests[0].audio is not None
    features = reference[1](requests[0].audio[0], sampling_rate=RATE, return_tensors="pt")["input_features"]
    start = torch.tensor([[reference[0].generation_config.decoder_start_token_id]])
    token = reference[0].generation_config.no_timestamps_token_id - 1
    expected = reference[0](features, decoder_input_ids=start).logits[0, 0].softmax(-1)[token]
    assert short == pytest.approx(float(expected), rel=1e-4)
    assert 0 < long < 1


def test_compression_is_high_for_repetitions(model: Any) -> None:
    assert compression("") == 0
    assert compression("the quick brown fox jumps over the lazy dog") < 1.5
    assert compression(" you" * 60) > MAX_COMPRESSION
    [text] = hub.generate(model, [sound(0.7)])
    assert text.details["compression"] == pytest.approx(compression(text.text))


def watch(model: Any, monkeypatch: pytest.MonkeyPatch, **thresholds: float) -> list[tuple[float | None, int]]:
    """Set the thresholds, and return a list that records the temperature and the size of each batch decoded."""
    decoded: list[tuple[float | None, int]] = []
    real = whisper.decode

    def recorded(model: Any, inputs: Any, decoding: Decoding, seeds: Any, **options: Any) -> Any:
        decoded.append((decoding.temperature, len(seeds)))
        return real(model, inputs, decoding, seeds, **options)

    monkeypatch.setattr(whisper, "decode", recorded)
    for name, value in {"MAX_COMPRESSION": 1e9, "MIN_LOGPROB": -1e9, "MAX_NO_SPEECH": 2.0, **thresholds}.items():
        monkeypatch.setattr(whisper, name, value)
    return decoded


def test_a_robust_decoding_of_good_windows_equals_the_plain_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = watch(model, monkeypatch)
    requests = [sound(seconds) for seconds in LONG]
    robust, plain = (hub.generate(model, requests, robust=robust) for robust in (True, False))
    assert [text.token_ids for text in robust] == [text.token_ids for text in plain]
    assert {temperature for temperature, _ in decoded} == {None}


@pytest.mark.parametrize("threshold", [{"MAX_COMPRESSION": 0.0}, {"MIN_LOGPROB": 0.0}])
def test_a_bad_window_is_decoded_at_higher_temperatures(
    model: Any, monkeypatch: pytest.MonkeyPatch, threshold: dict[str, float]
) -> None:
    decoded = watch(model, monkeypatch, **threshold)
    requests = [sound(1.0, seed=1), sound(1.9, seed=2)]
    together = hub.generate(model, requests, robust=True)
    assert [temperature for temperature, _ in decoded[:6]] == [None, 0.2, 0.4, 0.6, 0.8, 1.0]
    alone = [hub.generate(model, [request], robust=True)[0] for request in requests]
    assert [text.token_ids for text in alone] == [text.token_ids for text in together]


def test_only_the_bad_windows_are_decoded_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [sound(1.0), sound(1.9), sound(0.4)]
    ratios: list[float] = []
    monkeypatch.setattr(whisper, "compression", lambda text: ratios.append(compression(text)) or ratios[-1])
    watch(model, monkeypatch)
    hub.generate(model, requests, robust=True)
    decoded = watch(model, monkeypatch, MAX_COMPRESSION=max(ratios[:3]) - 1e-6)
    monkeypatch.setattr(whisper, "TEMPERATURES", (0.0, 0.5))
    hub.generate(model, requests, robust=True)
    assert decoded[0] == (None, 3)
    assert decoded[1] == (0.5, ratios[:3].count(max(ratios[:3])))
    assert len(set(ratios[:3])) > 1


def test_windows_without_speech_have_no_text(model: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers with the same thresholds, of a window's likelihood and of no speech."""
    request = sound(6.4)
    [plain] = hub.generate(model, [request])
    monkeypatch.setattr(whisper, "TEMPERATURES", (0.0,))
    for threshold in (0.0, 1.0):
        watch(model, monkeypatch, MIN_LOGPROB=0.0, MAX_NO_SPEECH=threshold)
        [text] = hub.generate(model, [request], robust=True)
        theirs = segments_of(
            reference, request, temperature=(0.0,), logprob_threshold=0.0, no_speech_threshold=threshold
        )
        assert bool(text.text) == bool(theirs) == (threshold == 1.0)
        assert (text.text == plain.text) == (threshold == 1.0)
    assert text.details["segments"]


def test_the_likelihood_of_a_window_decides_as_in_transformers(
    model: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window's threshold is tried a little above and below its own mean log-probability after the processors."""
    request = sound(2.0)
    monkeypatch.setattr(whisper, "TEMPERATURES", (0.0,))
    found: list[float] = []
    real = whisper.decode

    def kept(*args: Any, **options: Any) -> Any:
        tokens = real(*args, **options)
        found.extend(row.filtered_logprob / len(row.token_ids) for row in tokens)
        return tokens

    monkeypatch.setattr(whisper, "decode", kept)
    hub.generate(model, [request], robust=True)
    for shift in (-1e-3, 1e-3):
        theirs = segments_of(
            reference, request, temperature=(0.0,), logprob_threshold=found[0] + shift, no_speech_threshold=0.0
        )
        assert bool(theirs) == (shift < 0)


def test_options_of_whisper_need_a_whisper(saved: Path) -> None:
    spec = describe(saved)
    assert [name for name, _ in spec.details] == ["no_speech", "compression", "segments", "words"]
    with pytest.raises(UsageError, match="`robust` and `temperature` are mutually exclusive"):
        with_default_tokens(Decoding(robust=True, temperature=0.5), spec, Instruction(task="transcribe"))
    for option in ("robust", "word_timestamps"):
        with pytest.raises(UsageError, match=f"`{option}`: only for Whisper"):
            with_default_tokens(Decoding(**{option: True}), replace(spec, details=()), Instruction(task="transcribe"))


def test_the_stage_writes_the_details(saved: Path) -> None:
    wave = natural_sound(3, 5.0, RATE)
    sample = Sample(
        key="a", shard="s", offset=0, present=frozenset({"audio"}), audio=Audio(waves={RATE: wave}, seconds=5.0)
    )
    stage = generate_stage(str(saved), decoding=Decoding(max_new_tokens=hub.NEW, word_timestamps=True))
    names = [column.name for column in stage.outputs[0].columns]
    assert names[3:] == [f"transcript_{name}" for name in ("no_speech", "compression", "segments", "words")]
    batch = Batch(unit=WorkUnit(id="u", inputs=()), index=0, last=True, samples=(sample,))
    features = get_device("cpu").run(stage, batch).features
    assert [features[column.name].type for column in stage.outputs[0].columns] == [
        column.type for column in stage.outputs[0].columns
    ]
    [segments] = features["transcript_segments"].to_pylist()
    assert set(segments[0]) == {"start", "end", "text"}


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
