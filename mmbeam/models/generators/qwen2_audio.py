"""Qwen2-Audio (Chu et al., 2024, arXiv:2407.10759): a sound in a chat's prompt; a long one as several, 30 s each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2AudioForConditionalGeneration

from mmbeam.models.generators.chat import ChatGenerator
from mmbeam.models.generators.prompts import Medium
from mmbeam.models.generators.sounds import MelReader, tokens_of_frames
from mmbeam.prompts.ask import GeneratorSpec, Request

AUDIO = "<|AUDIO|>"


class Qwen2AudioGenerator(ChatGenerator):
    """Texts of a Qwen2AudioForConditionalGeneration."""

    model_types = ("qwen2_audio",)
    model_class = Qwen2AudioForConditionalGeneration
    modalities = ("audio", "text")
    held_back = (AUDIO,)

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.mels = MelReader(Path(spec.directory))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        return cls.spec_of(directory, sampling_rate=MelReader(directory).recipe.sampling_rate)

    def media(self, request: Request) -> list[Medium]:
        return [
            Medium("audio", AUDIO, AUDIO * tokens_of_frames(frames), f"<|audio_bos|>{AUDIO}<|audio_eos|>")
            for frames in self.mels.frames(request)
        ]

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        made = self.mels(requests, self.device)
        if made is None:
            return {}
        return {"input_features": made[0].to(self.dtype), "feature_attention_mask": made[1]}
