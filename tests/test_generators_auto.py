"""Generators without a family, against the checkpoint's own processor and `generate`, one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_generators_hub as hub
import torch
import transformers
from pictures import pictures
from shards import natural_sound
from test_families import save_llava
from tiny_auto import CAPTIONERS, CTC, Checkpoints

from mmbeam.errors import ModelError, PromptError, UsageError
from mmbeam.jobs.caption import caption_run
from mmbeam.models.encoders import describe as describe_encoder
from mmbeam.models.encoders import load as load_encoder
from mmbeam.models.generators import auto, describe
from mmbeam.models.generators.auto import CLASSES, PIECE_SECONDS
from mmbeam.models.recipes import read_image_processor
from mmbeam.prompts.ask import Decoding, Request
from mmbeam.prompts.turns import Turn
from mmbeam.stages.generate import generate_stage

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemmaProcessor

RATE = 16000
IMAGES = [image.copy() for image in pictures(((48, 48), (97, 120), (60, 41)))]
NAMES = (*CAPTIONERS, "llava")
LONG = pytest.mark.torture  # run by `make torture`, since each architecture takes a second
QUESTION = "what is it"
DESCRIBE = "Describe the image in one sentence."


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("auto"), {**CAPTIONERS, "llava": save_llava})


@pytest.fixture(scope="module")
def models(checkpoints: Checkpoints) -> dict[str, Any]:
    """The models by name, each loaded when it is first asked for."""
    return Checkpoints(Path(), {name: lambda _, name=name: hub.load_tiny(checkpoints[name]) for name in NAMES})


def references(directory: Path) -> tuple[Any, Any]:
    """Return the model and its processor, whose images Pillow resizes."""
    processor: Any = transformers.AutoProcessor.from_pretrained(directory)
    if hasattr(processor, "image_processor"):
        processor.image_processor = read_image_processor(directory)
    model_type = transformers.AutoConfig.from_pretrained(directory).model_type
    return getattr(transformers, CLASSES[model_type]).from_pretrained(directory), processor


def answer(model: Any, inputs: Any) -> list[int]:
    """Return the new tokens, without those that end a text."""
    unused = ("labels", "token_type_ids") if type(model).__name__.startswith("Git") else ("labels",)
    inputs = {name: value for name, value in inputs.items() if name not in unused}
    [ids] = model.generate(**inputs, do_sample=False, max_new_tokens=hub.NEW).tolist()
    return ids[inputs["input_ids"].shape[1] if "input_ids" in inputs else 1 :]


def check(texts: Any, expected: list[list[int]]) -> None:
    for text, ids in zip(texts, expected, strict=True):
        assert list(text.token_ids) == ids[: len(text.token_ids)]
        assert len(text.token_ids) > 1
    assert len({text.token_ids for text in texts}) > 1


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llava", pytest.param("internvl", marks=LONG)])
def test_a_chat_model_equals_its_processor_and_generate(
    name: str, checkpoints: Checkpoints, models: dict[str, Any]
) -> None:
    requests = [Request(image=image) for image in IMAGES]
    requests += [Request(image=IMAGES[0], prompt=QUESTION), Request(prompt=QUESTION)]
    dialogue = (Turn("user", "hello"), Turn("assistant", "yes"), Turn("user", QUESTION))
    requests.append(Request(image=IMAGES[1], turns=dialogue, task="dialogue"))
    model, processor = references(checkpoints[name])
    expected = []
    for request in requests:
        words = request.prompt or DESCRIBE
        turns: list[Any] = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in request.turns]
        turns = turns or [{"role": "user", "content": [{"type": "text", "text": words}]}]
        if request.image is not None:
            turns[-1]["content"].insert(0, {"type": "image"})
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        images = None if request.image is None else [request.image]
        options = {} if images is None else {"input_data_format": "channels_last"}
        expected.append(answer(model, processor(images=images, text=text, return_tensors="pt", **options)))
    check(hub.generate(models[name], requests), expected)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "before"), [("paligemma", "<image>"), ("idefics", ""), pytest.param("git", "", marks=LONG)]
)
def test_a_model_of_images_equals_its_processor_and_generate(
    name: str, before: str, checkpoints: Checkpoints, models: dict[str, Any]
) -> None:
    requests = [*(Request(image=image) for image in IMAGES), Request(image=IMAGES[0], prompt="a dog")]
    model, processor = references(checkpoints[name])
    default = "caption en" if name == "paligemma" else ""
    expected = [
        answer(
            model,
            processor(
                images=[request.image],
                text=[before + (request.prompt or default)],
                input_data_format="channels_last",
                return_tensors="pt",
            ),
        )
        for request in requests
    ]
    check(hub.generate(models[name], requests), expected)


@torch.inference_mode()
def test_speech_equals_the_processor_and_generate(checkpoints: Checkpoints, models: dict[str, Any]) -> None:
    clips = [natural_sound(seed, seconds, RATE) for seed, seconds in enumerate((0.5, 1.3, 0.5))]
    model, processor = references(checkpoints["moonshine"])
    expected = [answer(model, processor(clip, sampling_rate=RATE, return_tensors="pt")) for clip in clips]
    requests = [Request(audio=(clip, RATE), task="transcribe") for clip in clips]
    check(hub.generate(models["moonshine"], requests), expected)


@torch.inference_mode()
def test_a_chat_model_of_audio_equals_its_processor(checkpoints: Checkpoints, models: dict[str, Any]) -> None:
    """In generation, and as an encoder by get_audio_features."""
    clips = [natural_sound(seed, seconds, RATE) for seed, seconds in enumerate((0.5, 1.3))]
    model, processor = references(checkpoints["glmasr"])
    expected = []
    for clip in clips:
        content = [{"type": "audio", "audio": clip}, {"type": "text", "text": "Transcribe the speech."}]
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        chat = [{"role": "user", "content": content}]
        expected.append(answer(model, processor.apply_chat_template(chat, return_tensors="pt", **options)))
    check(hub.generate(models["glmasr"], [Request(audio=(clip, RATE), task="transcribe") for clip in clips]), expected)
    spec = describe_encoder(checkpoints["glmasr"])
    vectors = load_encoder(spec, torch.device("cpu"), torch.float32).encode_audio(clips, [RATE] * 2).pooled
    for clip, vector in zip(clips, vectors, strict=True):
        features = processor.feature_extractor(
            clip, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt"
        )
        output = model.get_audio_features(features["input_features"], features["attention_mask"])
        assert torch.allclose(vector, torch.cat(list(output.pooler_output)).reshape(-1, len(vector)).mean(0), atol=1e-4)


def test_beams_need_texts_that_can_be_scored(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models["paligemma"], "_has_scores", False)
    monkeypatch.setattr(auto, "score", lambda *_: [0.0])
    with pytest.raises(ModelError, match="cannot score its texts, which `num_beams` needs"):
        hub.generate(models["paligemma"], [Request(image=IMAGES[0])], num_beams=2)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["wav2vec2", pytest.param("hubert", marks=LONG), "parakeet"])
def test_a_ctc_model_equals_its_processor(name: str, tmp_path: Path) -> None:
    directory = CTC[name](tmp_path)
    clips = [natural_sound(seed, seconds, RATE) for seed, seconds in enumerate((0.7, 1.3, 0.7, 32.0))]
    processor: Any = transformers.AutoProcessor.from_pretrained(directory)
    model: Any = transformers.AutoModelForCTC.from_pretrained(directory).eval()

    def transcribed(clip: Any) -> str:
        inputs = processor.feature_extractor(clip, sampling_rate=RATE, return_tensors="pt")
        return str(processor.batch_decode(model(**inputs).logits.argmax(-1))[0])

    expected = [transcribed(clip) for clip in clips[:3]]
    expected.append(" ".join(filter(None, map(transcribed, np.array_split(clips[3], 2)))))
    generator = hub.load_tiny(directory)
    assert describe(directory).tasks == ("transcribe",)
    texts = hub.generate(generator, [Request(audio=(clip, RATE), task="transcribe") for clip in clips])
    assert [text.text for text in texts] == expected
    assert len(set(expected)) > 1
    alone = hub.generate(generator, [Request(audio=(clips[2], RATE), task="transcribe")])
    assert (alone[0].text, alone[0].token_ids) == (texts[2].text, texts[2].token_ids)
    assert alone[0].logprob == pytest.approx(texts[2].logprob, rel=1e-4)
    assert alone[0].num_tokens == len(alone[0].token_ids) > 0
    for option in ({"num_beams": 2}, {"temperature": 0.5}):
        with pytest.raises(UsageError, match=f"`{next(iter(option))}`: .*CTC"):
            generate_stage(str(directory), decoding=Decoding(**option))
    with pytest.raises(UsageError, match="`explain`"):
        generate_stage(str(directory), explain=True)


def test_long_speech_is_transcribed_in_pieces(models: dict[str, Any]) -> None:
    clip = natural_sound(3, 2 * PIECE_SECONDS, RATE)
    whole, left, right = hub.generate(
        models["moonshine"],
        [Request(audio=(part, RATE)) for part in (clip, clip[: len(clip) // 2], clip[len(clip) // 2 :])],
    )
    assert whole.token_ids == left.token_ids + right.token_ids
    assert whole.text == f"{left.text} {right.text}"
    assert whole.logprob == pytest.approx(left.logprob + right.logprob, abs=1e-4)


@pytest.mark.parametrize("name", ["llava", "paligemma", *(pytest.param(n, marks=LONG) for n in ("internvl", "git"))])
def test_a_batch_equals_single_requests(name: str, models: dict[str, Any]) -> None:
    requests = [*(Request(image=image) for image in IMAGES), Request(image=IMAGES[0], prompt=QUESTION)]
    hub.check_scores(models[name], requests, hub.check_batches(models[name], requests))
    hub.generate(models[name], requests[:2], num_beams=2)


def test_a_text_that_spells_a_token_of_the_model_fails(models: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="the text spells '<image>'"):
        hub.generate(models["llava"], [Request(image=IMAGES[0], text="<image> and more")])


def test_the_run_says_that_there_is_no_family(checkpoints: Checkpoints, tmp_path: Path) -> None:
    stage = generate_stage(str(checkpoints["llava"]))
    [note] = caption_run(str(tmp_path / "out"), stage).recorded["notes"]
    assert "llava has no family of its own: it runs by LlavaForConditionalGeneration" in note
    assert (stage.spec.required, stage.spec.modalities) == ((), ("image", "text"))
    spec = describe(checkpoints["moonshine"])
    assert (spec.required, spec.modalities, spec.tasks) == (("audio",), ("audio",), ("transcribe",))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llava", "idefics", *(pytest.param(n, marks=LONG) for n in ("internvl", "git"))])
def test_the_same_checkpoints_encode_images(name: str, checkpoints: Checkpoints) -> None:
    """By get_image_features, or by the image tower of a model without it."""
    spec = describe_encoder(checkpoints[name])
    vectors = load_encoder(spec, torch.device("cpu"), torch.float32).encode_image(IMAGES).pooled
    reference: Any = transformers.AutoModel.from_pretrained(checkpoints[name])
    processor = read_image_processor(checkpoints[name])
    for image, vector in zip(IMAGES, vectors, strict=True):
        pixels = processor(image, input_data_format="channels_last", return_tensors="pt")
        pixels = pixels if isinstance(pixels, torch.Tensor) else pixels["pixel_values"]
        if hasattr(reference, "get_image_features"):
            expected = torch.cat(list(reference.get_image_features(pixels).pooler_output)).mean(0)
        elif name == "git":
            expected = reference.image_encoder(pixels).last_hidden_state[0, 0]
        else:
            expected = reference.vision_model(pixels.flatten(0, -4)).pooler_output[0]
        assert np.allclose(vector, expected, atol=1e-4)
