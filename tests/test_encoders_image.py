"""Image and text encoders against transformers' own models and processors, from the same directories."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoder_checks import edit_json, load_encoder
from pictures import pictures
from PIL import Image
from scipy import ndimage
from tiny_clip import PATCH, SIDE
from tiny_models import BUILDERS, save_blip
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoTokenizer

from mmbeam.errors import ModelError
from mmbeam.models.encoders import FAMILIES, describe, family_of, load
from mmbeam.models.encoders.base import Encoder
from mmbeam.models.encoders.joint import ImageTextEncoder
from mmbeam.models.recipes import read_image_recipe
from mmbeam.ops.image import ImageRecipe, preprocess, preprocess_patches
from mmbeam.types import ImageHWC

Checkpoints = dict[str, Path]

TEXTS = (
    *("a photo of a cat and a dog", "", " ", "The  Quick\tBrown\nFOX, jumps!?", "x"),
    *(
        "Größe, señor, naïve façade",
        "привет мир",
        "שלום עולם",
        "مرحبا بالعالم",
        "こんにちは世界",
        "안녕하세요",
        "नमस्ते दुनिया",
    ),
    *("สวัสดีชาวโลก", "emoji 👩‍👩‍👧‍👦 🏳️‍🌈", "a\u0301 combining", "cat " * 500, "世界" * 300),
)
TOKENS = {"clip": 77, "metaclip_2": 77}  # the model's limit; 64 for the others
FAMILY = pytest.mark.parametrize("family", list(BUILDERS))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("models")
    return {family: build(root / family) for family, build in BUILDERS.items()}


def load_joint(directory: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> ImageTextEncoder:
    encoder = load_encoder(directory, device, dtype)
    assert isinstance(encoder, ImageTextEncoder)
    return encoder


def reference_model(directory: Path, device: torch.device) -> Any:
    """Return the model of the class in config.json; AutoModel would load a BLIP for retrieval as another class."""
    config = json.loads((directory / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    return cls.from_pretrained(directory, dtype=torch.float32).eval().to(device)


@torch.inference_mode()
def reference_features(model: Any, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return projected pooled vectors and last hidden states."""
    of_pictures = "pixel_values" in inputs
    if not isinstance(model, transformers.BlipForImageTextRetrieval):
        out = (model.get_image_features if of_pictures else model.get_text_features)(**inputs)
        return out.pooler_output, out.last_hidden_state
    hidden = (model.vision_model if of_pictures else model.text_encoder)(**inputs).last_hidden_state
    return (model.vision_proj if of_pictures else model.text_proj)(hidden[:, 0]), hidden


def reference_pixels(directory: Path, images: list[ImageHWC], backend: str) -> dict[str, torch.Tensor]:
    processor = AutoImageProcessor.from_pretrained(directory, backend=backend)
    return dict(processor([Image.fromarray(image) for image in images], return_tensors="pt"))


def our_pixels(recipe: ImageRecipe, family: str, images: list[ImageHWC], device: torch.device) -> torch.Tensor:
    if family == "siglip2":
        return preprocess_patches(images, recipe, device, torch.float32).pixels_BND
    return preprocess(images, recipe, device, torch.float32)


def assert_close_vectors(ours: torch.Tensor, theirs: torch.Tensor, cosine: float) -> None:
    assert ours.shape == theirs.shape
    assert cosine_similarity(ours.float().cpu(), theirs.float().cpu()).min() > cosine


# A level is 1 / 255 of the range, divided by the smallest standard deviation of each processor.
LEVEL = {
    **dict.fromkeys(("clip", "metaclip_2", "blip"), 1 / 255 / 0.26130258),
    **dict.fromkeys(("siglip", "siglip2"), 1 / 255 / 0.5),
}


@FAMILY
def test_pixels_equal_the_torchvision_processor(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    """Bit for bit on a CPU; elsewhere within a level, in less than 1 % of the values."""
    theirs = reference_pixels(checkpoints[family], pictures(), "torchvision")["pixel_values"]
    ours = our_pixels(read_image_recipe(checkpoints[family]), family, pictures(), device).cpu()
    if device.type == "cpu":
        assert torch.equal(ours, theirs)
    else:
        difference = (ours - theirs).abs()
        assert difference.max() < 1.01 * LEVEL[family]
        assert (difference > 1e-5).float().mean() < 0.01


# Pillow's processor pads an image smaller than the crop differently by a pixel; no image here is smaller.
@FAMILY
def test_pixels_are_close_to_the_pillow_processor(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    """Within two levels of 256; less than 1 % of the values differ."""
    theirs = reference_pixels(checkpoints[family], pictures(), "pil")["pixel_values"]
    ours = our_pixels(read_image_recipe(checkpoints[family]), family, pictures(), device).cpu()
    difference = (ours - theirs).abs()
    assert difference.max() < 2.01 * LEVEL[family]
    assert (difference > 1e-5).float().mean() < 0.01


def test_patches_mask_and_shapes_equal_the_processor(checkpoints: Checkpoints, device: torch.device) -> None:
    theirs = reference_pixels(checkpoints["siglip2"], pictures(), "torchvision")
    recipe = read_image_recipe(checkpoints["siglip2"])
    ours = preprocess_patches(pictures(), recipe, device, torch.float32)
    assert torch.equal(ours.mask_BN.cpu(), theirs["pixel_attention_mask"])
    assert torch.equal(torch.tensor(ours.shapes), theirs["spatial_shapes"])


@FAMILY
def test_image_vectors_equal_the_reference(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    """Within 1e-5 on the torchvision processor's pixels; with a cosine of 0.9999 from Pillow's processor."""
    model = reference_model(checkpoints[family], device)
    encoder = load_joint(checkpoints[family], device)
    ours = encoder.encode_image(pictures(), tokens=True)
    for backend, cosine in (("torchvision", 1 - 1e-6 if device.type == "cpu" else 0.9999), ("pil", 0.9999)):
        inputs = {
            name: value.to(device) for name, value in reference_pixels(checkpoints[family], pictures(), backend).items()
        }
        pooled, tokens = reference_features(model, **inputs)
        assert_close_vectors(ours.pooled, pooled, cosine)
        if backend == "torchvision" and device.type == "cpu":
            assert torch.allclose(ours.pooled, pooled, atol=1e-5)
            assert ours.tokens is not None
            for mine, hidden in zip(ours.tokens, tokens, strict=True):
                assert torch.allclose(mine, hidden[: len(mine)], atol=1e-5)


@FAMILY
def test_text_vectors_equal_the_reference(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    """In many scripts, empty, and too long; within 1e-5, with the reference's own padding."""
    directory = checkpoints[family]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    padding = {
        "padding": "max_length" if family in ("siglip", "siglip2") else True,
        "max_length": TOKENS.get(family, 64),
    }
    inputs = tokenizer(list(TEXTS), truncation=True, return_tensors="pt", **padding).to(device)
    taken = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    pooled, tokens = reference_features(reference_model(directory, device), **taken)
    encoder = load_joint(directory, device)
    ids = encoder.tokenize(TEXTS)
    ours = encoder.encode_text(ids, tokens=True)
    assert torch.allclose(ours.pooled, pooled, atol=1e-5)
    assert ours.tokens is not None
    for text_ids, mine, hidden in zip(ids, ours.tokens, tokens, strict=True):
        assert len(mine) == len(text_ids)
        assert torch.allclose(mine, hidden[: len(text_ids)], atol=1e-5)


@FAMILY
def test_one_by_one_equals_together(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    encoder = load_joint(checkpoints[family], device)
    together = encoder.encode_image(pictures()).pooled
    alone = torch.cat([encoder.encode_image([picture]).pooled for picture in pictures()])
    assert torch.allclose(together, alone, atol=1e-5)
    ids = encoder.tokenize(TEXTS)
    together = encoder.encode_text(ids).pooled
    alone = torch.cat([encoder.encode_text([text_ids]).pooled for text_ids in ids])
    assert torch.allclose(together, alone, atol=1e-5)


@FAMILY
def test_different_inputs_have_different_vectors(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    """Without this the other tests would prove nothing."""
    encoder = load_joint(checkpoints[family], device)
    vectors = encoder.encode_image(pictures()[5:]).pooled.cpu()
    similarity = cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    assert similarity.fill_diagonal_(0).max() < 0.999
    vectors = encoder.encode_text(encoder.tokenize(["a photo of a cat", "a photo of a dog", ""])).pooled.cpu()
    similarity = cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    assert similarity.fill_diagonal_(0).max() < 0.999


@FAMILY
@pytest.mark.parametrize(("dtype", "cosine"), [(torch.float16, 0.9999), (torch.bfloat16, 0.995)])
def test_half_precision_is_close_to_single(
    family: str, dtype: torch.dtype, cosine: float, checkpoints: Checkpoints, device: torch.device
) -> None:
    single = load_joint(checkpoints[family], device)
    half = load_joint(checkpoints[family], device, dtype)
    vectors = half.encode_image(pictures()).pooled
    assert vectors.dtype == dtype
    assert_close_vectors(vectors, single.encode_image(pictures()).pooled, cosine)
    ids = single.tokenize(TEXTS)
    assert_close_vectors(half.encode_text(ids).pooled, single.encode_text(ids).pooled, cosine)


@FAMILY
def test_the_image_filter_is_applied_first(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    plain = load_joint(checkpoints[family], device)
    filtering = load(describe(checkpoints[family]), device, torch.float32, image_filter=("median", 5))
    filtered = [ndimage.median_filter(picture, size=(5, 5, 1), mode="nearest") for picture in pictures()]
    ours = filtering.encode_image(pictures()).pooled
    assert torch.allclose(ours, plain.encode_image(filtered).pooled, atol=1e-6)
    assert not torch.allclose(ours, plain.encode_image(pictures()).pooled, atol=1e-3)


@FAMILY
def test_a_special_token_in_a_text_is_tokenized_as_characters(family: str, checkpoints: Checkpoints) -> None:
    encoder = load_joint(checkpoints[family], torch.device("cpu"))
    special = "[SEP]" if family == "blip" else encoder.tokenizer._tokenizer.eos_token
    end = encoder.tokenizer._tokenizer.convert_tokens_to_ids(special)
    (ids,) = encoder.tokenize([f"a cat {special} a dog"])
    assert ids.count(end) == 1
    assert ids[-1] == end


@FAMILY
def test_counts_include_the_whole_text_without_special_tokens(family: str, checkpoints: Checkpoints) -> None:
    encoder = load_joint(checkpoints[family], torch.device("cpu"))
    short, long, empty = encoder.count_tokens(["a cat", "cat " * 500, ""])
    special = len(encoder.tokenize([""])[0])
    assert empty == 0
    assert short == len(encoder.tokenize(["a cat"])[0]) - special
    assert long >= 500
    assert encoder.count_tokens([]) == encoder.tokenize([]) == []


def test_specs_match_the_encoders_output(checkpoints: Checkpoints) -> None:
    for family, directory in checkpoints.items():
        spec = describe(directory)
        encoder = load_joint(directory, torch.device("cpu"))
        picture = encoder.encode_image([np.zeros((9, 9, 3), np.uint8)], tokens=True)
        text = encoder.encode_text(encoder.tokenize(["a"]), tokens=True)
        assert spec.family == family
        assert spec.dims == {"image": picture.pooled.shape[1], "text": text.pooled.shape[1]}
        assert picture.tokens is not None
        assert text.tokens is not None
        assert spec.token_dims == {"image": picture.tokens[0].shape[1], "text": text.tokens[0].shape[1]}
        assert spec.max_text_tokens == TOKENS.get(family, 64)
        assert spec.image_side == (64 if family == "siglip2" else SIDE)


def test_every_registered_family_exists() -> None:
    for model_type in FAMILIES:
        assert issubclass(family_of(model_type), Encoder)


def test_a_type_that_transformers_lacks_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "yolo"}')
    with pytest.raises(ModelError, match="unsupported model_type 'yolo' for embedding; expected one that AutoModel of"):
        describe(tmp_path)


def changed(directory: Path, target: Path, name: str, changes: dict[str, Any]) -> Path:
    """Copy a checkpoint with some options of one of its JSON files changed; None removes one."""
    shutil.copytree(directory, target)
    edit_json(target, name, **changes)
    return target


BAD_PROCESSORS = {
    "unknown step": ("clip", {"do_pad": True, "pad_size": {"height": 99, "width": 99}}, r"makes \(99, 99\)"),
    "unknown size": ("siglip", {"size": {"max_height": 9, "max_width": 9}}, "expected shortest_edge, or height"),
    "no fixed size": ("clip", {"do_center_crop": False}, "images of different sizes"),
    "another size": (
        "siglip",
        {"size": {"height": 32, "width": 32}},
        r"expects images of \(48, 48\), .* makes \(32, 32\)",
    ),
    "other patches": ("siglip2", {"patch_size": 8}, f"expects patches of {PATCH} pixels"),
}


@pytest.mark.parametrize("case", BAD_PROCESSORS)
def test_an_unsupported_processor_is_an_error(case: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    family, changes, message = BAD_PROCESSORS[case]
    directory = changed(checkpoints[family], tmp_path / "model", "preprocessor_config.json", changes)
    with pytest.raises(ModelError, match=message):
        describe(directory)


GOOD_PROCESSORS = {
    "old": (
        "clip",
        {
            "image_processor_type": None,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": SIDE,
            "crop_size": SIDE,
            "do_rescale": None,
            "rescale_factor": None,
            "do_convert_rgb": None,
        },
    ),
    "fast": ("siglip", {"image_processor_type": "SiglipImageProcessorFast", "do_pad": False, "device": "cpu"}),
    "bilinear": ("siglip", {"resample": 2}),
    "larger before the crop": ("clip", {"size": {"shortest_edge": 57}}),
    "smaller before the crop": ("clip", {"size": {"shortest_edge": 40}}),
    "square before the crop": ("clip", {"size": {"height": 60, "width": 50}}),
    "crop alone": ("clip", {"do_resize": False}),
    "not rescaled": ("clip", {"do_rescale": False}),
    "not normalised": ("siglip", {"do_normalize": False}),
    "neither": ("siglip", {"do_normalize": False, "do_rescale": False}),
    "fewer patches": ("siglip2", {"max_num_patches": 7}),
}


@pytest.mark.parametrize("case", GOOD_PROCESSORS)
def test_a_processors_options_are_applied(
    case: str, checkpoints: Checkpoints, tmp_path: Path, device: torch.device
) -> None:
    """The pixels equal the torchvision processor's within 1e-6 on a CPU, elsewhere in 99 % of the values."""
    family, changes = GOOD_PROCESSORS[case]
    directory = changed(checkpoints[family], tmp_path / "model", "preprocessor_config.json", changes)
    theirs = reference_pixels(directory, pictures(), "torchvision")["pixel_values"].float()
    ours = our_pixels(read_image_recipe(directory), family, pictures(), device).cpu()
    off = (ours - theirs).abs() > 1e-6 * theirs.abs().clamp(min=1)
    assert off.float().mean() <= (0 if device.type == "cpu" else 0.01)


def test_the_nested_processor_file_is_read(checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(checkpoints["clip"], directory)
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").unlink()
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert read_image_recipe(directory) == read_image_recipe(checkpoints["clip"])
    assert describe(directory).image_side == SIDE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("preprocessor_config.json", "expected preprocessor_config.json or processor_config.json"),
        ("tokenizer.json", r"expected a tokenizer \(tokenizer.json, or vocab.json with merges.txt, .*\), found none"),
        ("model.safetensors", "has no model.safetensors; pickled weights"),
        ("config.json", r"expected config.json \(a model saved by save_pretrained\) or word vectors"),
    ],
)
def test_a_missing_file_is_named(name: str, message: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(checkpoints["clip"], directory)
    (directory / name).unlink()
    with pytest.raises(ModelError, match=message):
        describe(directory)


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_a_model_without_a_pooled_vector_is_an_error(family: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    config = json.loads((checkpoints[family] / "config.json").read_text())
    vision = config["vision_config"] | {"vision_use_head": False}
    directory = changed(checkpoints[family], tmp_path / "model", "config.json", {"vision_config": vision})
    with pytest.raises(ModelError, match="vision_use_head is false"):
        describe(directory)


def test_blips_cosines_equal_its_own_scores(checkpoints: Checkpoints) -> None:
    """Its forward computes them with use_itm_head=False."""
    directory, texts = checkpoints["blip"], ["a cat", "dog, dog", "photo of a dog"]
    inputs = AutoTokenizer.from_pretrained(directory)(texts, padding=True, return_tensors="pt")
    pixels = reference_pixels(directory, pictures()[4:8], "torchvision")["pixel_values"]
    with torch.inference_mode():
        scores = reference_model(directory, torch.device("cpu"))(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, pixel_values=pixels, use_itm_head=False
        ).itm_score
    encoder = load_joint(directory, torch.device("cpu"))
    image, text = encoder.encode_image(pictures()[4:8]).pooled, encoder.encode_text(encoder.tokenize(texts)).pooled
    assert torch.allclose(cosine_similarity(image[:, None], text[None], dim=-1), scores, atol=1e-5)


@pytest.mark.parametrize("name", ["BlipForConditionalGeneration", "BlipForQuestionAnswering"])
def test_a_blip_for_captions_or_answers_encodes_images_only(name: str, tmp_path: Path, device: torch.device) -> None:
    directory = save_blip(tmp_path / "blip", getattr(transformers, name))
    spec = describe(directory)
    assert (dict(spec.dims), spec.max_text_tokens) == ({"image": 32}, None)
    pixels = reference_pixels(directory, pictures(), "torchvision")["pixel_values"].to(device)
    with torch.inference_mode():
        hidden = reference_model(directory, device).vision_model(pixels).last_hidden_state
    ours = load(spec, device, torch.float32).encode_image(pictures(), tokens=True)
    assert_close_vectors(ours.pooled, hidden[:, 0], 1 - 1e-6 if device.type == "cpu" else 0.9999)
    assert ours.tokens is not None
    assert len(ours.tokens[0]) == hidden.shape[1]


def test_a_bare_blip_model_is_an_error(checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory = changed(checkpoints["blip"], tmp_path / "blip", "config.json", {"architectures": ["BlipModel"]})
    with pytest.raises(ModelError, match="architectures is BlipModel; expected BlipForImageTextRetrieval"):
        describe(directory)
