"""Voxtral (Mistral AI, 2025, arXiv:2507.13264): a transcript of a sound of any length, or an answer about it.

Prompts are laid out as mistral_common does it, which is not needed. For a transcript there is a mode that the
model was trained for; anything else it is asked in words.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import VoxtralForConditionalGeneration

from mmbeam.errors import ModelError, PromptError
from mmbeam.models.generators.chat import ChatGenerator
from mmbeam.models.generators.languages import code_of
from mmbeam.models.generators.prompts import Medium, task_prompt
from mmbeam.models.generators.sounds import MelReader
from mmbeam.prompts.ask import GeneratorSpec, Request
from mmbeam.prompts.turns import Turn

BEGIN, START, END = "<s>", "[INST]", "[/INST]"  # of the prompt, of the user's turn
SYSTEM = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")  # not every checkpoint has them
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
        return cls.spec_of(
            directory,
            sampling_rate=MelReader(directory).recipe.sampling_rate,
            tasks=("transcribe", "caption", "translate", "summarize", "dialogue"),
        )

    def media(self, request: Request) -> list[Medium]:
        """One for each window of 30 s, of which the last is filled up."""
        return [Medium("audio", AUDIO, AUDIO * self.window_tokens) for _ in self.mels.frames(request)]

    def prompt(self, request: Request) -> list[int]:
        windows = len(self.media(request))
        sound = [self.ids[BEGIN_AUDIO], *[self.ids[AUDIO]] * (windows * self.window_tokens)] if windows else []
        *before, last = request.turns or (Turn("user", task_prompt(request)),)
        turn = [self.ids[BEGIN], *(token for each in before for token in self._turn(each)), self.ids[START], *sound]
        if request.task != "transcribe" or request.prompt is not None:
            return [*turn, *self.tokenizer.words(last.text), self.ids[END]]
        language = self.tokenizer.words(f"lang:{code_of(request.language)}") if request.language else []
        return [*turn, self.ids[END], *language, self.ids[TRANSCRIBE]]

    def _turn(self, turn: Turn) -> list[int]:
        """A turn that has been answered, or that is an answer."""
        words = self.tokenizer.words(turn.text)
        if turn.role == "assistant":
            return [*words, self.model.generation_config.eos_token_id]
        if turn.role == "user":
            return [self.ids[START], *words, self.ids[END]]
        try:
            begin, end = self.tokenizer.ids_of(SYSTEM)
        except ModelError as error:
            raise PromptError("a turn of the system, which this model has no tokens for") from error
        return [begin, *words, end]

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        made = self.mels(requests, self.device)
        return {} if made is None else {"input_features": made[0].to(self.dtype)}
