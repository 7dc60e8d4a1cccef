"""The Qwen families: Qwen2-VL, Qwen2.5-VL and Qwen3-VL, Qwen2-Audio, and the thinker of Qwen2.5-Omni.

Images are taken at their own resolution, within limits, as groups of patches that the checkpoint's image processor
cuts on the CPU. Audio that is longer than the feature extractor's window (Qwen2-Audio 30 s, Omni 300 s) is several
windows in the prompt. Of a whole Omni checkpoint only the thinker's weights are loaded. Video and speech output are
not implemented. Papers: arXiv:2407.10759 (Qwen2-Audio), arXiv:2503.20215 (Qwen2.5-Omni).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
)

from mmbeam.models.generators.media import AudioWindow, MelReader, images_of
from mmbeam.models.generators.pretrained import ChatGenerator
from mmbeam.models.generators.prompts import Medium, Placeholder
from mmbeam.models.recipes import AS_DECODED, read_image_processor
from mmbeam.ops.transfer import to_device
from mmbeam.prompts.ask import GeneratorSpec, Request

VL_IMAGE, VL_VIDEO = "<|image_pad|>", "<|video_pad|>"
IMAGE, AUDIO, VIDEO = "<|IMAGE|>", "<|AUDIO|>", "<|VIDEO|>"  # of Qwen2-Audio and Omni
AUDIO_PLACEHOLDER = Placeholder("audio", AUDIO, f"<|audio_bos|>{AUDIO}<|audio_eos|>")


class QwenGenerator(ChatGenerator):
    """What the Qwen families share. Subclasses name their modalities and tokens."""

    is_mel_padded: ClassVar[bool] = True  # whether log-mel features are padded to a whole window

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        directory = Path(spec.directory)
        self.processor = read_image_processor(directory) if "image" in self.modalities else None
        self.mels = MelReader(directory) if "audio" in self.modalities else None

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files."""
        if "image" in cls.modalities:
            read_image_processor(directory)
        window = cls.audio_window(directory)
        return cls.make_spec(directory, sampling_rate=None if window is None else window.rate)

    @classmethod
    def audio_window(cls, directory: Path) -> AudioWindow | None:
        """Return the feature extractor's windows; None for a model without audio."""
        return MelReader(directory).window if "audio" in cls.modalities else None

    def media(self, request: Request) -> list[Medium]:
        """Return the request's image and the windows of its audio."""
        media = []
        if self.processor is not None and request.image is not None:
            patches = self.processor.get_number_of_image_patches(*request.image.shape[:2])
            count = patches // self.processor.merge_size**2
            media.append(Medium("image", self.placeholders[0].token * count))
        if self.mels is not None:
            for frames in self.mels.frames(request):
                count = ((frames - 1) // 2 + 1 - 2) // 2 + 1  # a convolution and a pooling, both of stride 2
                media.append(Medium("audio", AUDIO * count))
        return media

    def processed(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """Return the images' patches and grids."""
        images = images_of(requests)
        if self.processor is None or not images:
            return {}
        processed = self.processor(images, **AS_DECODED)
        return {
            "pixel_values": to_device(processed["pixel_values"].to(self.dtype), self.device),
            "image_grid_thw": to_device(processed["image_grid_thw"], self.device),
        }

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """Return the audio windows' log-mel features and masks."""
        mels = None if self.mels is None else self.mels(requests, self.device, is_padded=self.is_mel_padded)
        return {} if mels is None else {"input_features": mels[0].to(self.dtype), "feature_attention_mask": mels[1]}


class QwenVlGenerator(QwenGenerator):
    """Texts of a Qwen-VL model of any generation, dense or a mixture of experts."""

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    model_class = AutoModelForImageTextToText
    modalities = ("image", "text")
    reserved = (VL_IMAGE, VL_VIDEO)
    placeholders = (Placeholder("image", VL_IMAGE, f"<|vision_start|>{VL_IMAGE}<|vision_end|>"),)
    type_ids = "mm_token_type_ids"

    def token_types(self) -> dict[int, int]:
        """Return the kind of image tokens."""
        return {self.model.config.image_token_id: 1}


class QwenOmniGenerator(QwenGenerator):
    """Texts of a Qwen2_5OmniThinkerForConditionalGeneration."""

    model_types = ("qwen2_5_omni", "qwen2_5_omni_thinker")
    model_class = Qwen2_5OmniThinkerForConditionalGeneration
    modalities = ("image", "audio", "text")
    reserved = (IMAGE, AUDIO, VIDEO)
    placeholders = (Placeholder("image", IMAGE, f"<|vision_bos|>{IMAGE}<|vision_eos|>"), AUDIO_PLACEHOLDER)
    is_mel_padded = False


class Qwen2AudioGenerator(QwenGenerator):
    """Texts of a Qwen2AudioForConditionalGeneration."""

    model_types = ("qwen2_audio",)
    model_class = Qwen2AudioForConditionalGeneration
    modalities = ("audio", "text")
    reserved = (AUDIO,)
    placeholders = (AUDIO_PLACEHOLDER,)
