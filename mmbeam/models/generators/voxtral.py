"""Voxtral (Mistral AI, 2025, arXiv:2507.13264): a transcript of a sound of any length, or an answer about it.

Prompts are laid out as mistral_common does it, which is not needed. Without words of its own, a request is
for a transcript, in the mode that the model was trained for; to translate or to summarize it is asked in words.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import VoxtralForConditionalGeneration

from mmbeam.models.generators.base import GeneratorSpec, Request
from mmbeam.models.generators.chat import ChatGenerator
from mmbeam.models.generators.prompts import Medium, instruction
from mmbeam.models.generators.sounds import MelReader

BEGIN, START, END = "<s>", "[INST]", "[/INST]"  # of the prompt, of the user's turn
BEGIN_AUDIO, AUDIO, TRANSCRIBE = "[BEGIN_AUDIO]", "[AUDIO]", "[TRANSCRIBE]"


class VoxtralGenerator(ChatGenerator):
    """Texts of a VoxtralForConditionalGeneration."""

    model_types = ("voxtral",)
    model_class = VoxtralForConditionalGeneration
    modalities = ("audio", "text")
    held_back = (BEGIN, START, END, BEGIN_AUDIO, AUDIO, TRANSCRIBE)

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.mels = MelReader(Path(spec.directory))
        audio = model.config.audio_config
        self.window_tokens = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
        self.ids = dict(zip(self.held_back, self.tokenizer.ids_of(self.held_back), strict=True))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        return cls.spec_of(directory, sampling_rate=MelReader(directory).recipe.sampling_rate)

    def media(self, request: Request) -> list[Medium]:
        """One for each window of 30 s, of which the last is filled up."""
        return [Medium("audio", AUDIO, AUDIO * self.window_tokens) for _ in self.mels.frames(request)]

    def prompt(self, request: Request) -> list[int]:
        windows = len(self.media(request))
        sound = [self.ids[BEGIN_AUDIO], *[self.ids[AUDIO]] * (windows * self.window_tokens)] if windows else []
        turn = [self.ids[BEGIN], self.ids[START], *sound]
        if not _transcribes(request):
            return [*turn, *self.tokenizer.words(instruction(request)), self.ids[END]]
        language = self.tokenizer.words(f"lang:{request.language}") if request.language else []
        return [*turn, self.ids[END], *language, self.ids[TRANSCRIBE]]

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        made = self.mels(requests, self.device)
        return {} if made is None else {"input_features": made[0].to(self.dtype)}


def _transcribes(request: Request) -> bool:
    return not (request.text or "").strip() and request.task not in ("translate", "summarize")
