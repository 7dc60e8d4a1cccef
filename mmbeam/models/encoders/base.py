"""What an encoder is, to the stage that runs it and to whoever adds a family.

A family is one module with a subclass of Encoder. `describe` reads configuration files only, at
launch, without weights; `load` reads the weights, once per process and device. The `encode_*` methods
get a list of decoded inputs that fit one batch and return vectors on the device. They know nothing of
windows, order, failures or memory: the embed stage does that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmbeam.ops.image import PixelFilter, apply_filter
from mmbeam.types import ImageHWC, Modality, Waveform

PooledBD = torch.Tensor  # [batch, dim], on the model's device
TokensTD = torch.Tensor  # [tokens, dim] of one sample, padding removed


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What is known of an encoder from its configuration files alone."""

    family: str  # config.model_type: "clip", "bert", ...
    directory: str  # local directory of configuration, weights and processor files
    dims: Mapping[Modality, int]  # width of the pooled vector, for each modality the model encodes
    token_dims: Mapping[Modality, int] = field(default_factory=dict)  # width of one token's vector
    sampling_rate: int | None = None  # Hz, for audio
    image_side: int | None = None  # pixels: the shorter side its preprocessing resizes to
    max_text_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Vectors for one batch of one modality."""

    pooled: PooledBD
    tokens: Sequence[TokensTD] | None = None  # only when asked for


class Encoder:
    """A loaded model on one device. Subclasses override `describe`, `load` and the `encode_*` they have.

    Pooled vectors come as the checkpoint's own API returns them (projected where the model projects,
    pooled as the checkpoint says); the stage normalises them where the space is a normalised one.
    """

    model_types: ClassVar[tuple[str, ...]] = ()  # the config.model_type values that this family serves
    normalized: ClassVar[bool] = True  # whether vectors are compared by cosine, so L2-normalised

    def __init__(self, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.image_filter: tuple[str, float] | None = None  # applied to pictures first; see ops/image.py

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read configuration and processor files; raise ModelError naming what is missing."""
        raise NotImplementedError

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> "Encoder":
        """Load the weights (safetensors only) onto `device`, in eval mode."""
        raise NotImplementedError

    @property
    def pixel_filter(self) -> PixelFilter | None:
        """`image_filter` as a function on uint8 pixels."""
        if self.image_filter is None:
            return None
        name, value = self.image_filter
        return partial(apply_filter, name=name, value=value)

    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode pictures of any sizes, uint8 [H, W, 3]."""
        raise NotImplementedError

    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode sounds, float32 [frames] at `rates` Hz (resampled on the device if not the model's)."""
        raise NotImplementedError

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, truncated to what the model takes.

        Runs in the reading thread or before packing, so that texts can be ordered by length.
        """
        raise NotImplementedError

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, not truncated, special tokens not counted."""
        raise NotImplementedError

    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode texts that `tokenize` made, padded to the longest of the batch."""
        raise NotImplementedError
