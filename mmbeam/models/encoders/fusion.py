"""mmbeam's own fusion model as an encoder: pictures, sounds and texts in its shared space."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.fusion.configuration import PAD
from mmbeam.models.fusion.modeling import FusionModel
from mmbeam.models.fusion.processing import FusionProcessor
from mmbeam.models.generators.fusion import read_processor
from mmbeam.models.loading import load_pretrained
from mmbeam.models.tokenizing import pad
from mmbeam.ops.image import preprocess
from mmbeam.types import ImageHWC, Modality, Waveform


class FusionEncoder(Encoder):
    """Vectors are the projections of each modality's first source into the shared space; tokens are its encoder's."""

    model_types = ("mmbeam-fusion",)

    def __init__(self, spec: EncoderSpec, model: Any, processor: FusionProcessor) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.processor = processor
        self._media = media_sources(processor)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        processor = read_processor(directory, config)
        media = media_sources(processor)
        if not media:
            raise ModelError(f"{directory}: reads features that another model made, and no media itself")
        texts = [source.max_tokens for source in processor.sources.values() if source.modality == "text"]
        return EncoderSpec(
            family=cls.model_types[0],
            directory=str(directory),
            dims=dict.fromkeys(media, int(config["embedding_dim"])),
            token_dims=dict.fromkeys(media, int(config["hidden_size"])),
            sampling_rate=processor.sampling_rate,
            image_side=processor.image_side,
            max_text_tokens=max(texts, default=None),
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> "FusionEncoder":
        directory = Path(spec.directory)
        model = load_pretrained(FusionModel, directory, device, dtype)
        return cls(spec, model, FusionProcessor.from_directory(directory))

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        recipe = self.processor.images[self._media["image"]]
        return self._encode(
            "image", preprocess(images, recipe, self.device, self.dtype, self.pixel_filter), None, tokens
        )

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        sounds = list(zip(waves, rates, strict=True))
        values, mask = self.processor.audio_values(self._media["audio"], sounds, self.device)
        return self._encode("audio", values.to(self.dtype), mask, tokens)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.input_ids(texts, self._media["text"])

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.processor.token_ids(texts, self._media["text"])]

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        ids, mask = pad([each or [PAD] for each in token_ids], PAD, self.device)  # a text of no token has no vector
        return self._encode("text", ids, mask.bool(), tokens)

    def _encode(self, modality: Modality, values: torch.Tensor, mask: torch.Tensor | None, tokens: bool) -> Encoded:
        name = self._media[modality]
        (states, real), pooled = self.model.embed(name, values, mask)
        kept = [own[own_real] for own, own_real in zip(states, real, strict=True)] if tokens else None
        return Encoded(pooled=pooled, tokens=kept)


def media_sources(processor: FusionProcessor) -> dict[Modality, str]:
    """The first source of each modality that reads media itself."""
    found: dict[Modality, str] = {}
    for name, source in processor.sources.items():
        if source.kind != "features":
            found.setdefault(source.modality, name)
    return found
