"""Captioners: real tiny models, saved and loaded, compared with their own processors and `generate`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_generators_hub as hub
import torch
from pictures import pictures
from tiny_captioners import CAPTIONERS, save_vit_gpt2
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
WITHOUT_TEXT = {"vision-encoder-decoder"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: builder(root / name) for name, builder in CAPTIONERS.items()}


@pytest.fixture(scope="module", params=sorted(CAPTIONERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, saved: dict[str, Path]) -> Generator:
    return hub.load_tiny(saved[name])


def requests_of(name: str) -> list[Request]:
    """Images of four sizes, with prompts of different lengths and without."""
    texts = [None] * 4 if name in WITHOUT_TEXT else WORDS
    return [
        Request(image=image, text=text, seed=seed) for seed, (image, text) in enumerate(zip(IMAGES, texts, strict=True))
    ]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 0.9}])
def test_a_batch_equals_single_images(model: Generator, name: str, options: dict[str, Any]) -> None:
    requests = requests_of(name)
    texts = hub.check_batches(model, requests, **options)
    hub.check_scores(model, requests, texts)


@torch.inference_mode()
def expected(name: str, directory: Path, request: Request) -> list[int]:
    """The tokens of transformers' own processor and `generate`, after the prompt."""
    reference: Any = CLASSES[name].from_pretrained(directory)
    inputs, prompt = reference_inputs(name, directory, request, reference)
    ids: list[int] = reference.generate(**inputs, do_sample=False, max_new_tokens=hub.NEW)[0].tolist()
    return ids[prompt:]


def reference_inputs(name: str, directory: Path, request: Request, reference: Any) -> tuple[dict[str, Any], int]:
    """The inputs by the model's own processor, and how many tokens of the output are the prompt."""
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


def test_tokens_equal_those_of_the_models_own_processor_and_generate(
    model: Generator, name: str, saved: dict[str, Path]
) -> None:
    requests = requests_of(name)
    for request, text in zip(requests, hub.generate(model, requests), strict=True):
        assert tuple(expected(name, saved[name], request)[: len(text.token_ids)]) == text.token_ids


def test_the_spec_names_inputs_and_size(name: str, saved: dict[str, Path]) -> None:
    spec = describe(saved[name])
    assert (spec.required, spec.image_side) == (("image",), 64 if name == "florence2" else 48)
    assert "image" in spec.modalities
    assert ("text" in spec.modalities) == (name not in WITHOUT_TEXT)


def test_longer_prompts_weigh_more(model: Generator, name: str) -> None:
    light, heavy = model.weigh([Request(image=IMAGES[0], text=text) for text in ("a", "a cat and a dog")])
    assert light < heavy or name in WITHOUT_TEXT


@pytest.mark.parametrize(
    ("name", "special"), [("blip", "[SEP]"), ("blip-2", "</s>"), ("florence2", "<image>")], indirect=["name"]
)
def test_special_tokens_in_a_text_are_words(model: Generator, name: str, special: str) -> None:
    attack, plain = (Request(image=IMAGES[0], text=text) for text in (f"a {special} b", "a b"))
    token = AutoTokenizer.from_pretrained(model.spec.directory).convert_tokens_to_ids(special)
    ids, others = (model.encode_prompt(request) for request in (attack, plain))  # type: ignore[attr-defined]
    assert ids.count(token) == others.count(token)
    assert len(ids) > len(others)


def test_an_image_token_in_a_text_is_dropped_even_if_not_declared_special(tmp_path: Path) -> None:
    """Images fill the tokens in order: one too many would take the next sample's image."""
    directory = CAPTIONERS["blip-2"](tmp_path / "model")
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    [image] = [token for token in content["added_tokens"] if token["content"] == "<image>"]
    image["special"] = False
    file.write_text(json.dumps(content))
    model: Any = hub.load_tiny(directory)
    assert image["id"] == model.model.config.image_token_index
    ids = model.encode_prompt(Request(image=IMAGES[0], text="a <image> b"))
    assert ids.count(image["id"]) == 4


def test_an_unsupported_recipe_falls_back_to_the_checkpoints_processor(tmp_path: Path) -> None:
    """Padding to a square is not supported on the device."""
    directory = save_vit_gpt2(tmp_path / "model")
    config = directory / "preprocessor_config.json"
    assert hub.load_tiny(directory)._pixels.recipe is not None  # type: ignore[attr-defined]
    config.write_text(config.read_text().replace('"do_normalize": true', '"do_normalize": true, "pad_size": 7'))
    model: Any = hub.load_tiny(directory)
    assert model._pixels.recipe is None
    assert hub.generate(model, [Request(image=IMAGES[1])])[0].token_ids


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer.json"])
def test_describe_names_a_missing_file(tmp_path: Path, file: str) -> None:
    directory = save_vit_gpt2(tmp_path / "model")
    (directory / file).unlink()
    (directory / "vocab.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=file):
        describe(directory)


def test_a_blip_of_another_architecture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a BlipForConditionalGeneration, found a BlipForImageTextRetrieval"):
        describe(save_blip(tmp_path / "blip"))


def test_florence_prompts_are_the_questions_of_its_tasks(saved: dict[str, Path]) -> None:
    model: Any = hub.load_tiny(saved["florence2"])
    questions = {
        None: "describe?",
        "<OCR>": "text in the image?",
        " <DETAILED_CAPTION> ": "in detail",
        "how many": "how many",
    }
    for text, words in questions.items():
        assert words in model.tokenizer.decode(model.encode_prompt(Request(image=IMAGES[0], text=text)))
    ids = model.encode_prompt(Request(image=IMAGES[0], task="transcribe"))
    assert "text in the image" in model.tokenizer.decode(ids)


def test_florence_needs_the_number_of_image_tokens(tmp_path: Path) -> None:
    directory = save_florence2(tmp_path / "florence2")
    config = directory / "processor_config.json"
    config.write_text(config.read_text().replace('"image_seq_length"', '"other"'))
    with pytest.raises(ModelError, match="expected image_seq_length"):
        describe(directory)


def test_bfloat16(name: str, saved: dict[str, Path]) -> None:
    hub.check_bfloat16(saved[name], requests_of(name))


def test_the_spec_says_that_the_checkpoints_own_processor_is_used(saved: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(saved["blip"], tmp_path / "blip")
    assert describe(directory).notes == ()
    name = next(name for name in ("preprocessor_config.json", "processor_config.json") if (directory / name).is_file())
    content = json.loads((directory / name).read_text())
    content.get("image_processor", content)["resample"] = 1
    (directory / name).write_text(json.dumps(content))
    [note] = describe(directory).notes
    assert (
        "has resample 1; expected 2 (bilinear) or 3 (bicubic); images are preprocessed by the checkpoint's own" in note
    )
