"""The image kernels against Pillow, torchvision, scipy and transformers, on every available device."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import SIZES, pictures
from PIL import Image, ImageFilter
from scipy import ndimage
from torchvision.transforms.v2 import functional as tv
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    convert_image_to_patches,
    get_image_size_for_max_num_patches,
)

from mmbeam.errors import LimitError, UsageError
from mmbeam.models.tokenizing import pad, unpad
from mmbeam.ops import image
from mmbeam.ops.image import ImageRecipe, Interpolation, Patching
from mmbeam.types import ImageHWC

PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
TARGETS = ((224, 224), (48, 48), (64, 96), (17, 5))
SIDES = st.integers(1, 3000)


def batch(picture: ImageHWC, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(device)


def unbatch(pixels: torch.Tensor) -> ImageHWC:
    return pixels[0].permute(1, 2, 0).cpu().numpy()


def level_difference(a: ImageHWC, b: ImageHWC) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_is_within_a_level_of_pillow(interpolation: Interpolation) -> None:
    """At most 1 % of the values differ: by one level, or by two in 1 of 50,000 where an image is enlarged."""
    levels = {True: np.zeros(3, int), False: np.zeros(3, int)}
    for picture in pictures():
        for height, width in TARGETS:
            ours = unbatch(image.resize(batch(picture, torch.device("cpu")), (height, width), interpolation))
            theirs = np.asarray(Image.fromarray(picture).resize((width, height), PILLOW[interpolation]))
            enlarged = height > picture.shape[0] or width > picture.shape[1]
            levels[enlarged] += np.bincount(level_difference(ours, theirs).ravel(), minlength=3)
    shares = {enlarged: counts / counts.sum() for enlarged, counts in levels.items()}
    assert shares[False][1] < 0.01
    assert shares[False][2] == 0
    assert shares[True][1] < 0.01
    assert shares[True][2] < 1 / 50_000


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_on_a_cpu_equals_torchvision(interpolation: Interpolation) -> None:
    for picture in pictures():
        pixels = batch(picture, torch.device("cpu"))
        theirs = tv.resize(pixels, [48, 64], tv.InterpolationMode(interpolation), antialias=True)
        assert torch.equal(image.resize(pixels, (48, 64), interpolation), theirs)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_resized_together_equal_pillow(
    interpolation: Interpolation, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several runs of padded images, and at a scale of 100: one value of 1,000 differs by one level."""
    monkeypatch.setattr(image, "RESIZED_ELEMENTS", 3 * 640 * 640 * 3)
    some, levels = [*pictures(), *pictures(((3, 9000), (224, 224)))], np.zeros(3, int)
    for height, width in TARGETS:
        recipe = ImageRecipe(size=(height, width), interpolation=interpolation)
        together = image.resize_together(image.upload_images(some, device, recipe), recipe)
        for ours, picture in zip(together, some, strict=True):
            theirs = np.asarray(Image.fromarray(picture).resize((width, height), PILLOW[interpolation]))
            difference = level_difference(ours.permute(1, 2, 0).cpu().numpy(), theirs)
            levels += np.bincount(difference.ravel(), minlength=3)
    assert levels[1] / levels.sum() < 1e-3
    assert levels[2] / levels.sum() < 1 / 50_000


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("crop", [None, (48, 48), (64, 30), (47, 51)])
@pytest.mark.parametrize("rounds_crop", [True, False])
def test_images_resized_and_cropped_together_equal_the_kernels_of_the_cpu(
    rounds_crop: bool, crop: tuple[int, int] | None, rounded: bool, device: torch.device
) -> None:
    """Sides that are cropped and sides that are padded."""
    recipe = ImageRecipe(size=48, crop=crop, rounded=rounded, rounds_crop=rounds_crop)
    some = [picture for picture in pictures() if min(picture.shape[:2]) > 2]
    expected = image._resized(some, recipe, torch.device("cpu"), None)
    together = image.resize_together(image.upload_images(some, device, recipe), recipe)
    for ours, theirs in zip(together, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.cpu() - theirs.float()).abs().max() <= (2 if rounded else 0.01)


def test_an_image_too_narrow_to_resize_is_an_error(device: torch.device) -> None:
    message = r"20000 x 1 pixels would be resized to 4480000 x 224; expected at most"
    with pytest.raises(LimitError, match=message):
        image.resize(torch.zeros(1, 3, 1, 20_000, dtype=torch.uint8), image.shortest_edge(1, 20_000, 224), "bicubic")
    with pytest.raises(LimitError, match=message):
        image.upload_images([np.zeros((1, 20_000, 3), np.uint8)], device, ImageRecipe(size=224))


@given(SIDES, SIDES, st.integers(1, 600))
def test_shortest_edge_equals_transformers(height: int, width: int, size: int) -> None:
    blank = np.broadcast_to(np.uint8(0), (3, height, width))
    theirs = get_resize_output_image_size(blank, size, default_to_square=False, input_data_format="channels_first")
    assert image.shortest_edge(height, width, size) == theirs


@given(SIDES, SIDES, st.sampled_from([14, 16, 32]), st.integers(1, 1024))
def test_naflex_size_equals_transformers(height: int, width: int, patch: int, most: int) -> None:
    ours = image.naflex_size(height, width, patch, most)
    assert ours == get_image_size_for_max_num_patches(height, width, patch, most)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_center_crop_equals_torchvision(height: int, width: int, crop_height: int, crop_width: int) -> None:
    pixels = torch.arange(height * width, dtype=torch.int32).reshape(1, 1, height, width).to(torch.uint8)
    ours = image.center_crop(pixels, (crop_height, crop_width))
    assert torch.equal(ours, reference_center_crop(pixels, crop_height, crop_width))


def reference_center_crop(pixels: torch.Tensor, crop_height: int, crop_width: int) -> torch.Tensor:
    """Crop with transformers' torchvision backend, which pads first."""
    from transformers import CLIPImageProcessor
    from transformers.image_utils import SizeDict

    return CLIPImageProcessor().center_crop(pixels, SizeDict(height=crop_height, width=crop_width))


@pytest.mark.parametrize("side", [1, 4, 16])
def test_patchify_equals_transformers(side: int, device: torch.device) -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    ours = image.patchify(pixels.to(device), side).cpu().numpy()
    assert np.array_equal(ours, np.stack([convert_image_to_patches(picture.numpy(), side) for picture in pixels]))


def test_normalize_does_not_change_its_input(device: torch.device) -> None:
    levels = torch.tensor([0.0, 127.5, 255.0], device=device).view(1, 1, 3, 1).expand(1, 3, 3, 1)
    out = image.normalize(levels, (0.5, 0.5, 0.0), (0.5, 0.25, 1.0), 1 / 255)
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [0.0, 0.5, 1.0]])
    assert torch.allclose(out[0, :, :, 0].cpu(), expected, atol=1e-6)
    assert levels[0, 0, 2, 0] == 255


RECIPE = ImageRecipe(size=48, crop=(48, 48), scale=1 / 255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def test_a_batch_of_mixed_sizes_equals_one_by_one(device: torch.device) -> None:
    some = pictures()
    together = image.preprocess(some, RECIPE, device, torch.float32)
    alone = [image.preprocess([picture], RECIPE, device, torch.float32)[0] for picture in some]
    assert together.shape == (len(SIZES), 3, 48, 48)
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("writeable", [True, False])
def test_preprocessing_does_not_change_the_images(writeable: bool, device: torch.device) -> None:
    picture = pictures(((48, 48),))[0].copy()
    before = picture.copy()
    picture.flags.writeable = writeable
    image.preprocess([picture], RECIPE, device, torch.float32)
    assert np.array_equal(picture, before)


def test_patches_of_mixed_sizes_equal_one_by_one(device: torch.device) -> None:
    recipe = ImageRecipe(size=Patching(patch_size=16, max_patches=20), mean=(0.5,) * 3, std=(0.5,) * 3)
    some = pictures()
    together = image.preprocess_patches(some, recipe, device, torch.float32)
    for row, picture in enumerate(some):
        alone = image.preprocess_patches([picture], recipe, device, torch.float32)
        assert torch.equal(together.pixels_BND[row], alone.pixels_BND[0])
        assert torch.equal(together.mask_BN[row], alone.mask_BN[0])
        assert [together.shapes[row]] == alone.shapes
        assert together.mask_BN[row].sum() == together.shapes[row][0] * together.shapes[row][1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_preprocess_in_half_precision_is_rounded_float32(dtype: torch.dtype, device: torch.device) -> None:
    full = image.preprocess(pictures(), RECIPE, device, torch.float32)
    assert torch.equal(image.preprocess(pictures(), RECIPE, device, dtype), full.to(dtype))


def test_a_pixel_filter_is_applied_before_resizing(device: torch.device) -> None:
    some = pictures(((97, 401), (48, 48)))
    filtered = [ndimage.median_filter(picture, size=(3, 3, 1), mode="nearest") for picture in some]
    ours = image.preprocess(some, RECIPE, device, torch.float32, lambda pixels: image.median_filter(pixels, 3))
    assert torch.equal(ours, image.preprocess(filtered, RECIPE, device, torch.float32))


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_median_equals_scipy_and_pillow(size: int, device: torch.device) -> None:
    for picture in pictures(((1, 1), (2, 50), (47, 33), (97, 401))):
        ours = unbatch(image.median_filter(batch(picture, device), size))
        assert np.array_equal(ours, ndimage.median_filter(picture, size=(size, size, 1), mode="nearest"))
        if size > 1 and min(picture.shape[:2]) >= size:
            assert np.array_equal(ours, np.asarray(Image.fromarray(picture).filter(ImageFilter.MedianFilter(size))))


@pytest.mark.parametrize("sigma", [0.4, 1.5, 4.0])
def test_gaussian_equals_scipy(sigma: float, device: torch.device) -> None:
    for picture in pictures(((1, 1), (2, 50), (47, 33), (97, 401))):
        ours = unbatch(image.gaussian_blur(batch(picture, device), sigma))
        exact = ndimage.gaussian_filter(picture.astype(np.float64), (sigma, sigma, 0), mode="nearest", truncate=4.0)
        assert np.abs(ours - exact).max() <= 0.5 + 1e-3  # half a level is rounding


@pytest.mark.parametrize(("name", "value"), [("median", 5), ("gaussian", 1.5)])
def test_filtering_in_strips_equals_the_whole(
    name: str, value: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = batch(pictures(((97, 401),))[0], device)
    whole = image.apply_filter(pixels, name, value)
    monkeypatch.setattr(image, "STRIP_ELEMENTS", 3 * 401 * 7)
    assert torch.equal(image.apply_filter(pixels, name, value), whole)


@pytest.mark.parametrize(
    ("name", "value"), [("median", 4), ("median", 0), ("gaussian", 0), ("gaussian", np.nan), ("x", 1)]
)
def test_invalid_filters_are_an_error(name: str, value: float) -> None:
    with pytest.raises(UsageError, match="expected"):
        image.apply_filter(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), name, value)


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1), st.sampled_from(["left", "right"]))
@settings(deadline=None)
def test_pad_and_unpad_are_inverse(ids: list[list[int]], side: str) -> None:
    tokens, mask = pad(ids, 99, torch.device("cpu"), length=8, side=side)
    assert tokens.shape == mask.shape == (len(ids), 8)
    assert torch.equal(tokens == 99, mask == 0)
    assert [sequence.tolist() for sequence in unpad(tokens, [len(sequence) for sequence in ids], side)] == ids


def test_pad_raises_for_a_sequence_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="expected at most 2 tokens, found 3"):
        pad([[1, 2, 3]], 0, torch.device("cpu"), length=2)
