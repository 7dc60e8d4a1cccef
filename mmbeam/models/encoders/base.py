"""The encoder interface, for the embed stage that runs encoders and for new families of encoders.

A family is a subclass of Encoder. `describe` reads configuration files only, without weights, where the job is
launched. `load` reads the weights, once per process and device. The `encode_*` methods get a list of decoded inputs
that fit one batch and return vectors on the device. Order, windows, failures and memory belong to the embed stage.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from transformers import AutoModel

from mmbeam.models.loading import load_pretrained
from mmbeam.models.tokenizing import TextTokenizer, vocabulary_size
from mmbeam.names import Modality
from mmbeam.ops.image import ImageRecipe, PixelFilter, preprocess, upload_images
from mmbeam.types import ImageHWC, Waveform

WindowT = TypeVar("WindowT")

PooledBD = torch.Tensor  # [batch, dim], on the model's device
TokensTD = torch.Tensor  # [tokens, dim] of one sample, padding removed


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """An encoder as its configuration files describe it."""

    family: str  # config.model_type: "clip", "bert", ...
    directory: str  # local directory of configuration, weights and processor files
    dims: Mapping[Modality, int]  # width of the pooled vector, for each modality that the model encodes
    token_dims: Mapping[Modality, int] = field(default_factory=dict)  # width of one token's vector
    sampling_rate: int | None = None  # Hz, for audio
    image_side: int | None = None  # pixels: the shorter side its preprocessing resizes to
    frames: int | None = None  # of a video, that the model takes; None: it encodes each frame as an image
    max_text_tokens: int | None = None  # special tokens included
    text_prompt: str | None = None  # put before every text; None: the checkpoint's default
    is_generic: bool = False  # served by auto.py, not by a family
    notes: tuple[str, ...] = ()  # what the summary says of the model: processors on the CPU, pooling of an unknown one


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Vectors for one batch of one modality, in any floating-point dtype."""

    pooled: PooledBD
    tokens: Sequence[TokensTD] | None = None  # only when asked for


class Encoder:
    """A loaded model on one device. Subclasses override `describe`, `load` and the `encode_*` that they support.

    Pooled vectors equal those of the checkpoint's own API: projected where the model projects, pooled as the checkpoint
    defines. The stage normalises them if the space is a normalised one.
    """

    normalized: ClassVar[bool] = True  # whether vectors are compared by cosine and so L2-normalised
    without_tokens: ClassVar[str] = "the text has no tokens"  # why a text that `tokenize` finds empty has no vector

    def __init__(self, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.pixel_filter: PixelFilter | None = None  # applied to images at their own resolution, before resizing

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read configuration and processor files; raise ModelError naming what is missing or unsupported."""
        raise NotImplementedError

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> "Encoder":
        """Load the weights (safetensors only) onto `device`, in eval mode."""
        raise NotImplementedError

    def prepare(self, modality: Modality, values: Sequence[Any]) -> Any:
        """Return what the encode method takes instead of these values, preprocessed on the CPU in the unit's thread.

        None if the model preprocesses on its device.
        """
        return None

    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode images of any sizes, uint8 [H, W, 3]."""
        raise NotImplementedError

    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode waveforms, float32 [frames] at `rates` Hz, resampled on the device to the model's rate."""
        raise NotImplementedError

    def encode_video(self, videos: Any, tokens: bool = False) -> Encoded:
        """Encode what `prepare` made of videos, each a sequence of frames. Only models with `spec.frames` do."""
        raise NotImplementedError

    def with_prompt(self, text: str) -> str:
        """Return a text as `tokenize` takes it, with the prompt of the spec before it."""
        return (self.spec.text_prompt or "") + text

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, special tokens included, truncated to the model's limit.

        Runs before packing, so that texts can be ordered by length.
        """
        raise NotImplementedError

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated, without special tokens."""
        raise NotImplementedError

    def count_encoded(self, token_ids: Sequence[int]) -> int | None:
        """Return what `count_tokens` returns for a text that `tokenize` made these ids of; None: unknown."""
        return None

    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode texts that `tokenize` made, padded to the longest of the batch."""
        raise NotImplementedError


class TransformersEncoder(Encoder):
    """An encoder whose model AutoModel loads, with its preprocessing recipe and, if it encodes text, its tokenizer."""

    optional_weights: ClassVar[tuple[str, ...]] = ()  # patterns of weights that are not needed: files may lack them

    def __init__(
        self, spec: EncoderSpec, model: Any, recipe: Any = None, tokenizer: TextTokenizer | None = None
    ) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.recipe = recipe
        self._tokenizer = tokenizer
        self.vocabulary = None if tokenizer is None else vocabulary_size(model)

    @staticmethod
    def read_recipe(directory: Path) -> Any:
        """Return the preprocessing recipe in the checkpoint's processor files."""
        raise NotImplementedError

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Load the weights without the heads for other tasks. Preprocessing keeps its own precision."""
        directory = Path(spec.directory)
        model = load_pretrained(AutoModel, directory, device, dtype, ignore_missing=cls.optional_weights)
        tokenizer = TextTokenizer(directory) if "text" in spec.dims else None
        return cls(spec, model, cls.read_recipe(directory), tokenizer)

    def prepare(self, modality: Modality, values: Sequence[Any]) -> Any:
        """Return what the checkpoint's own processor makes of images; on a GPU, images with the filters that resize."""
        if modality == "image" and callable(self.recipe):  # the checkpoint's own processor (recipes.OwnPixels)
            return [self._own_pixels(image) for image in values]
        if modality != "image" or self.device.type == "cpu" or not isinstance(self.recipe, ImageRecipe):
            return None
        return upload_images(values, self.device, self.recipe)

    def pixels(self, images: Sequence[Any]) -> torch.Tensor:
        """Return images of any sizes, or what `prepare` made of them, as the model's input [B, 3, height, width]."""
        if not callable(self.recipe):
            return preprocess(images, self.recipe, self.device, self.dtype, self.pixel_filter)
        ready = [image if isinstance(image, torch.Tensor) else self._own_pixels(image) for image in images]
        return torch.stack(ready).to(self.device, self.dtype)

    def _own_pixels(self, image: ImageHWC) -> torch.Tensor:
        if self.pixel_filter is not None:
            pixels_1CHW = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
            image = self.pixel_filter(pixels_1CHW)[0].permute(1, 2, 0).contiguous().numpy()
        pixels_CHW: torch.Tensor = self.recipe(image)
        return pixels_CHW

    @property
    def tokenizer(self) -> TextTokenizer:
        """The checkpoint's tokenizer."""
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def max_text_tokens(self) -> int:
        """The number of tokens that the model takes, special tokens included."""
        assert self.spec.max_text_tokens is not None
        return self.spec.max_text_tokens

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, special tokens included, truncated to the model's limit."""
        return self.tokenizer.encode(texts, self.max_text_tokens)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated, without special tokens."""
        return self.tokenizer.count(texts)

    def count_encoded(self, token_ids: Sequence[int]) -> int | None:
        """Return the number of tokens of a text by its ids; None for a text that is truncated or has a prompt."""
        return None if self.spec.text_prompt else self.tokenizer.count_encoded(token_ids, self.max_text_tokens)


def encode_windows(
    windows: Sequence[Sequence[WindowT]], batch_size: int, encode: Callable[[list[WindowT]], Encoded]
) -> Encoded:
    """Encode the windows of several samples, `batch_size` windows at a time.

    A sample's vector is the mean of its windows' vectors, in float32. Its tokens are the tokens of all its windows.
    """
    flat = [window for of_sample in windows for window in of_sample]
    parts = [encode(flat[first : first + batch_size]) for first in range(0, len(flat), batch_size)]
    counts = [len(of_sample) for of_sample in windows]
    vectors_WD = torch.cat([part.pooled for part in parts]).float()
    pooled_BD = torch.stack([of_sample.mean(0) for of_sample in torch.split(vectors_WD, counts)])
    if parts[0].tokens is None:
        return Encoded(pooled=pooled_BD)
    tokens = iter([window for part in parts for window in part.tokens or ()])
    return Encoded(pooled=pooled_BD, tokens=[torch.cat([next(tokens) for _ in range(count)]) for count in counts])
