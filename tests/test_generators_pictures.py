"""Captioners: real tiny models, saved and loaded, against their own processors and `generate`."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_generators_hub as hub
import torch
from pictures import pictures
from tiny_captioners import PICTURES, save_vit_gpt2
from tiny_chat_models import save_florence2
from tiny_models import save_blip
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    BlipProcessor,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    VisionEncoderDecoderModel,
)

from mmbeam.errors import ModelError
from mmbeam.models.generators import describe
from mmbeam.models.generators.base import Generator
from mmbeam.prompts.ask import Request

IMAGES = [image.copy() for image in pictures(((48, 48), (97, 120), (60, 41), (300, 200)))]
WORDS = ("a photo of", None, "a", "cat and dog")
CLASSES: dict[str, Any] = {
    "blip": BlipForConditionalGeneration,
    "blip-2": Blip2ForConditionalGeneration,
    "blip-2-t5": Blip2ForConditionalGeneration,
    "florence2": Florence2ForConditionalGeneration,
    "vision-encoder-decoder": VisionEncoderDecoderModel,
}
TEXTLESS = {"vision-encoder-decoder"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: builder(root / name) for name, builder in PICTURES.items()}


@pytest.fixture(scope="module", params=sorted(PICTURES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, saved: dict[str, Path]) -> Generator:
    return hub.load_tiny(saved[name])


def requests_of(name: str) -> list[Request]:
    """Pictures of four sizes, with prompts of different lengths and without."""
    texts = [None] * 4 if name in TEXTLESS else WORDS
    return [
        Request(image=image, text=text, seed=seed) for seed, (image, text) in enumerate(zip(IMAGES, texts, strict=True))
    ]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 0.9}])
def test_a_batch_gives_what_each_picture_gives_alone(model: Generator, name: str, options: dict[str, Any]) -> None:
    requests = requests_of(name)
    texts = hub.check_batches(model, requests, **options)
    hub.check_scores(model, requests, texts)


@torch.inference_mode()
def expected(name: str, directory: Path, request: Request) -> list[int]:
    """The tokens of transformers' own processor and `generate`, behind the prompt."""
    reference: Any = CLASSES[name].from_pretrained(directory)
    inputs, prompt = referred(name, directory, request, reference)
    ids: list[int] = reference.generate(**inputs, do_sample=False, max_new_tokens=hub.NEW)[0].tolist()
    return ids[prompt:]


def referred(name: str, directory: Path, request: Request, reference: Any) -> tuple[dict[str, Any], int]:
    """What the model's own processor makes of a request, and how many tokens of its output are the prompt."""
    if name == "florence2":
        florence = Florence2Processor.from_pretrained(directory)
        return florence(images=request.image, text=request.text or "<CAPTION>", return_tensors="pt"), 1
    if name == "blip":
        inputs = BlipProcessor.from_pretrained(directory)(images=request.image, text=request.text, return_tensors="pt")
        return inputs, 1 if request.text is None else inputs["input_ids"].shape[1] - 1
    inputs = AutoImageProcessor.from_pretrained(directory)(request.image, return_tensors="pt")
    words = [] if request.text is None else AutoTokenizer.from_pretrained(directory)(request.text)["input_ids"]
    if words:
        inputs["input_ids"] = torch.tensor([[reference.config.image_token_index] * 4 + words])
    return inputs, 4 + len(words or "b") if name == "blip-2" else 1


def test_the_tokens_are_those_of_the_models_own_processor_and_generate(
    model: Generator, name: str, saved: dict[str, Path]
) -> None:
    requests = requests_of(name)
    for request, found in zip(requests, hub.made(model, requests), strict=True):
        assert tuple(expected(name, saved[name], request)[: len(found.token_ids)]) == found.token_ids


def test_what_it_is_says_what_it_needs(name: str, saved: dict[str, Path]) -> None:
    spec = describe(saved[name])
    assert (spec.required, spec.image_side) == (("image",), 64 if name == "florence2" else 48)
    assert "image" in spec.modalities
    assert ("text" in spec.modalities) == (name not in TEXTLESS)


def test_words_weigh(model: Generator, name: str) -> None:
    light, heavy = model.weigh([Request(image=IMAGES[0], text=text) for text in ("a", "a cat and a dog")])
    assert light < heavy or name in TEXTLESS


@pytest.mark.parametrize(
    ("name", "special"), [("blip", "[SEP]"), ("blip-2", "</s>"), ("florence2", "<image>")], indirect=["name"]
)
def test_words_that_spell_special_tokens_are_words(model: Generator, name: str, special: str) -> None:
    attack, plain = (Request(image=IMAGES[0], text=text) for text in (f"a {special} b", "a b"))
    token = AutoTokenizer.from_pretrained(model.spec.directory).convert_tokens_to_ids(special)
    ids, others = (model.prompt(request) for request in (attack, plain))  # type: ignore[attr-defined]
    assert ids.count(token) == others.count(token)
    assert len(ids) > len(others)


def test_words_are_no_second_picture_where_its_token_is_not_called_special(tmp_path: Path) -> None:
    """Its places are filled in order: one too many would take the next sample's picture."""
    directory = PICTURES["blip-2"](tmp_path / "model")
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    [picture] = [token for token in content["added_tokens"] if token["content"] == "<image>"]
    picture["special"] = False
    file.write_text(json.dumps(content))
    model: Any = hub.load_tiny(directory)
    assert picture["id"] == model.model.config.image_token_index
    ids = model.prompt(Request(image=IMAGES[0], text="a <image> b"))
    assert ids.count(picture["id"]) == 4


def test_a_picture_is_read_by_its_own_processor_where_the_device_cannot(tmp_path: Path) -> None:
    """One that pads pictures to a square is no plain one."""
    directory = save_vit_gpt2(tmp_path / "model")
    config = directory / "preprocessor_config.json"
    assert hub.load_tiny(directory)._pixels.recipe is not None  # type: ignore[attr-defined]
    config.write_text(config.read_text().replace('"do_normalize": true', '"do_normalize": true, "pad_size": 7'))
    model: Any = hub.load_tiny(directory)
    assert model._pixels.recipe is None
    assert hub.made(model, [Request(image=IMAGES[1])])[0].token_ids


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_named_at_launch(tmp_path: Path, file: str) -> None:
    directory = save_vit_gpt2(tmp_path / "model")
    (directory / file).unlink()
    (directory / "vocab.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=file):
        describe(directory)


def test_a_blip_that_writes_no_captions_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a BlipForConditionalGeneration, found a BlipForImageTextRetrieval"):
        describe(save_blip(tmp_path / "blip"))


def test_florence_asks_what_its_tasks_mean(saved: dict[str, Path]) -> None:
    model: Any = hub.load_tiny(saved["florence2"])
    asked = {
        None: "describe?",
        "<OCR>": "text in the image?",
        " <DETAILED_CAPTION> ": "in detail",
        "how many": "how many",
    }
    for text, wanted in asked.items():
        assert wanted in model.tokenizer.decode(model.prompt(Request(image=IMAGES[0], text=text)))
    ids = model.prompt(Request(image=IMAGES[0], task="transcribe"))
    assert "text in the image" in model.tokenizer.decode(ids)


def test_florence_needs_to_know_what_a_picture_is_to_it(tmp_path: Path) -> None:
    directory = save_florence2(tmp_path / "florence2")
    config = directory / "processor_config.json"
    config.write_text(config.read_text().replace('"image_seq_length"', '"other"'))
    with pytest.raises(ModelError, match="has no image_seq_length"):
        describe(directory)


def test_it_computes_in_bfloat16(name: str, saved: dict[str, Path]) -> None:
    hub.check_bfloat16(saved[name], requests_of(name))
