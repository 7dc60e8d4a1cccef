"""Vision backbones against transformers' own models and processors, from the same directories."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from encoder_checks import edit_json, load_encoder
from pictures import pictures
from PIL import Image
from tiny_clip import SIDE
from tiny_models import BACKBONES
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoModel, ConvNextImageProcessorPil

from mmbeam.errors import ModelError
from mmbeam.models.encoders import describe, load
from mmbeam.models.recipes import read_image_recipe
from mmbeam.ops.image import preprocess
from mmbeam.types import ImageHWC

Checkpoints = dict[str, Path]
FAMILY = pytest.mark.parametrize("family", list(BACKBONES))
UNROUNDED = ("dinov3_vit", "dinov3_convnext")  # resized in float; there is no Pillow processor to compare with
LEVEL = 1 / 255 / 0.224  # of 256, divided by the smallest standard deviation of any processor here


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("backbones")
    return {family: build(root / family) for family, build in BACKBONES.items()}


def reference_pixels(directory: Path, images: list[ImageHWC], backend: str) -> torch.Tensor:
    processor: Any = AutoImageProcessor
    processor = processor.from_pretrained(directory, backend=backend)
    pixels: torch.Tensor = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    return pixels


@FAMILY
def test_pixels_equal_the_torchvision_processor(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    """Bit for bit on a CPU (DINOv3: to 1e-5); elsewhere within a level, in less than 1 % of the values."""
    theirs = reference_pixels(checkpoints[family], pictures(), "torchvision")
    ours = preprocess(pictures(), read_image_recipe(checkpoints[family]), device, torch.float32).cpu()
    difference = (ours - theirs).abs()
    if family in UNROUNDED:
        assert difference.max() < 1e-5
    elif device.type == "cpu":
        assert torch.equal(ours, theirs)
    else:
        assert difference.max() < 1.01 * LEVEL
        assert (difference > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize("family", [family for family in BACKBONES if family not in UNROUNDED])
def test_pixels_are_close_to_the_pillow_processor(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    """Within two levels of 256; less than 2 % of the values differ."""
    theirs = reference_pixels(checkpoints[family], pictures(), "pil")
    ours = preprocess(pictures(), read_image_recipe(checkpoints[family]), device, torch.float32).cpu()
    difference = (ours - theirs).abs()
    assert difference.max() < 2.01 * LEVEL
    assert (difference > 1e-5).float().mean() < 0.02


@FAMILY
def test_vectors_equal_the_reference(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    """Within 1e-4 of their length: the class token, or the model's own average."""
    model = AutoModel.from_pretrained(checkpoints[family], dtype=torch.float32).eval().to(device)
    with torch.inference_mode():
        theirs = model(reference_pixels(checkpoints[family], pictures(), "torchvision").to(device))
    tokens = theirs.last_hidden_state
    pooled = tokens[:, 0] if family == "vit" else theirs.pooler_output.flatten(1)
    if tokens.dim() == 4:
        tokens = tokens.permute(0, 2, 3, 1).flatten(1, 2)
    ours = load_encoder(checkpoints[family], device).encode_image(pictures(), tokens=True)
    assert ours.pooled.shape == pooled.shape
    assert ours.tokens is not None
    if device.type == "cpu":
        assert (ours.pooled - pooled).norm(dim=-1).max() < 1e-4 * pooled.norm(dim=-1).max()
        assert torch.allclose(torch.stack(list(ours.tokens)), tokens, atol=1e-4 * float(tokens.abs().max()))
    assert cosine_similarity(ours.pooled, pooled).min() > 0.9999


@FAMILY
def test_one_by_one_equals_together(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    encoder = load_encoder(checkpoints[family], device)
    together = encoder.encode_image(pictures(), tokens=True)
    assert together.tokens is not None
    for position, picture in enumerate(pictures()):
        alone = encoder.encode_image([picture], tokens=True)
        assert torch.allclose(alone.pooled[0], together.pooled[position], atol=1e-4)
        assert alone.tokens is not None
        assert torch.allclose(alone.tokens[0], together.tokens[position], atol=1e-4)


@FAMILY
def test_different_images_have_different_vectors(family: str, checkpoints: Checkpoints, device: torch.device) -> None:
    """Without this the other tests would prove nothing."""
    vectors = load_encoder(checkpoints[family], device).encode_image(pictures()[5:]).pooled
    similarity = cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    assert similarity.fill_diagonal_(0).max() < 0.9999


@FAMILY
@pytest.mark.parametrize(("dtype", "cosine"), [(torch.float16, 0.9999), (torch.bfloat16, 0.995)])
def test_half_precision_is_close_to_single(
    family: str, dtype: torch.dtype, cosine: float, checkpoints: Checkpoints, device: torch.device
) -> None:
    half = load_encoder(checkpoints[family], device, dtype).encode_image(pictures()).pooled
    single = load_encoder(checkpoints[family], device).encode_image(pictures()).pooled
    assert half.dtype == dtype
    assert cosine_similarity(half.float(), single).min() > cosine


@FAMILY
def test_the_spec_matches_the_encoders_output(family: str, checkpoints: Checkpoints) -> None:
    spec = describe(checkpoints[family])
    encoded = load_encoder(checkpoints[family], torch.device("cpu")).encode_image([np.zeros((9, 9, 3), np.uint8)], True)
    assert encoded.tokens is not None
    assert (spec.family, dict(spec.dims)) == (family, {"image": encoded.pooled.shape[1]})
    assert dict(spec.token_dims) == {"image": encoded.tokens[0].shape[1]}
    sides = {"dinov2": 55, "resnet": 54, "convnext": 50, "convnextv2": 384}  # 48 / 0.875, 48 / 0.95
    assert spec.image_side == sides.get(family, SIDE)


def test_the_image_filter_is_applied(checkpoints: Checkpoints, device: torch.device) -> None:
    for family in ("vit", "dinov3_vit"):
        plain, filtering = (
            load(describe(checkpoints[family]), device, torch.float32, image_filter=image_filter)
            for image_filter in (None, ("median", 5.0))
        )
        left, right = (encoder.encode_image(pictures()[4:]).pooled for encoder in (plain, filtering))
        assert not torch.allclose(left, right, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "name", "changes", "message"),
    [
        ("vit", "config.json", {"image_size": 32}, r"images of \(32, 32\), its image processor makes \(48, 48\)"),
        ("resnet", "config.json", {"num_channels": 1}, "num_channels is 1; expected 3"),
        ("resnet", "preprocessor_config.json", {"size": {"height": 9, "width": 9}}, "expected shortest_edge alone"),
        ("dinov3_vit", "preprocessor_config.json", {"size": {"max_height": 9, "max_width": 9}}, "or height and width"),
        ("dinov2", "preprocessor_config.json", {"image_processor_type": "DPTImageProcessor"}, "is DPTImageProcessor"),
    ],
)
def test_unsupported_files_are_an_error(
    family: str, name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    directory = BACKBONES[family](tmp_path / family)
    edit_json(directory, name, **changes)
    with pytest.raises(ModelError, match=message):
        describe(directory)


def test_a_dinov3_processor_file_of_the_hub_is_read(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """With the old class name, nulls for unset options, and without options at their defaults."""
    directory = BACKBONES["dinov3_vit"](tmp_path / "old")
    nulls = dict.fromkeys(("image_mean", "image_std", "rescale_factor", "resample"))
    edit_json(directory, "preprocessor_config.json", image_processor_type="DINOv3ViTImageProcessorFast", **nulls)
    assert read_image_recipe(directory) == read_image_recipe(checkpoints["dinov3_vit"])


def test_transformers_still_has_no_dinov3_processor_without_torchvision() -> None:
    """If this fails, recipes.py can read DINOv3's processor like the others."""
    assert not hasattr(transformers, "DINOv3ViTImageProcessorPil")


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, None])
def test_convnexts_crop_equals_the_processor(crop_pct: float | None, tmp_path: Path) -> None:
    ConvNextImageProcessorPil(size={"shortest_edge": 96}).save_pretrained(tmp_path)
    edit_json(tmp_path, "preprocessor_config.json", crop_pct=crop_pct)
    theirs = reference_pixels(tmp_path, pictures(), "torchvision")
    assert torch.equal(preprocess(pictures(), read_image_recipe(tmp_path), torch.device("cpu"), torch.float32), theirs)
