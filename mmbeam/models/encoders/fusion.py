"""The fusion model as an encoder: images, audio and texts in its shared space."""

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
from mmbeam.names import Modality
from mmbeam.ops.image import preprocess
from mmbeam.types import ImageHWC, Waveform


class FusionEncoder(Encoder):
    """Vectors are the projections of each modality's first source into the shared space; tokens are its encoder's."""

    def __init__(self, spec: EncoderSpec, model: Any, processor: FusionProcessor) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model
        self.processor = processor
        self._sources = _media_sources(processor)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the configuration and the processor's files."""
        processor = read_processor(directory, config)
        sources = _media_sources(processor)
        if not sources:
            raise ModelError(f"{directory}: all its sources are features; expected one that reads media")
        texts = [source.max_tokens for source in processor.sources.values() if source.modality == "text"]
        return EncoderSpec(
            family=str(config["model_type"]),
            directory=str(directory),
            dims=dict.fromkeys(sources, int(config["embedding_dim"])),
            token_dims=dict.fromkeys(sources, int(config["hidden_size"])),
            sampling_rate=processor.sampling_rate,
            image_side=processor.image_side,
            max_text_tokens=max(texts, default=None),
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Load the weights and the processor's files."""
        directory = Path(spec.directory)
        model = load_pretrained(FusionModel, directory, device, dtype)
        return cls(spec, model, FusionProcessor.from_directory(directory))

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageHWC], tokens: bool = False) -> Encoded:
        """Encode images of any sizes, uint8 [H, W, 3]."""
        recipe = self.processor.images[self._sources["image"]]
        pixels_BCHW = preprocess(images, recipe, self.device, self.dtype, self.pixel_filter)
        return self._encode("image", pixels_BCHW, None, tokens)

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Waveform], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode waveforms, float32 [frames] at `rates` Hz."""
        clips = list(zip(waves, rates, strict=True))
        values, mask = self.processor.audio_values(self._sources["audio"], clips, self.device)
        return self._encode("audio", values.to(self.dtype), mask, tokens)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, truncated to the source's limit."""
        return self.processor.input_ids(texts, self._sources["text"])

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated."""
        return self.processor.count_tokens(texts, self._sources["text"])

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode texts that `tokenize` made; a text without tokens is encoded as one padding token."""
        ids_BL, mask_BL = pad([ids or [PAD] for ids in token_ids], PAD, self.device)
        return self._encode("text", ids_BL, mask_BL.bool(), tokens)

    def _encode(self, modality: Modality, values: torch.Tensor, mask: torch.Tensor | None, tokens: bool) -> Encoded:
        (states_BLD, valid_BL), pooled_BD = self.model.embed(self._sources[modality], values, mask)
        kept = [states[valid] for states, valid in zip(states_BLD, valid_BL, strict=True)] if tokens else None
        return Encoded(pooled=pooled_BD, tokens=kept)


def _media_sources(processor: FusionProcessor) -> dict[Modality, str]:
    """Return the name of each modality's first source that reads media, not features."""
    sources: dict[Modality, str] = {}
    for name, source in processor.sources.items():
        if source.kind != "features":
            sources.setdefault(source.modality, name)
    return sources
