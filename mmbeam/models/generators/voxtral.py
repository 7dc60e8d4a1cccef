"""Voxtral (Mistral AI, 2025, arXiv:2507.13264): transcripts of audio of any length, and answers about it.

Prompts are laid out as by mistral_common, which is not a dependency. Transcription has its own mode, which the model
was trained for; every other task is asked in words.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import VoxtralForConditionalGeneration

from mmbeam.errors import ModelError, PromptError
from mmbeam.models.generators.media import MelReader
from mmbeam.models.generators.pretrained import ChatGenerator
from mmbeam.models.generators.prompts import Medium, language_code, task_prompt
from mmbeam.prompts.ask import GeneratorSpec, Request
from mmbeam.prompts.turns import Turn

BEGIN, START, END = "<s>", "[INST]", "[/INST]"  # of the prompt; of the user's turn
SYSTEM = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")  # missing in some checkpoints
BEGIN_AUDIO, AUDIO, TRANSCRIBE = "[BEGIN_AUDIO]", "[AUDIO]", "[TRANSCRIBE]"


class VoxtralGenerator(ChatGenerator):
    """Texts of a VoxtralForConditionalGeneration."""

    model_types = ("voxtral",)
    model_class = VoxtralForConditionalGeneration
    modalities = ("audio", "text")
    reserved = (BEGIN, START, END, BEGIN_AUDIO, AUDIO, TRANSCRIBE)

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.mels = MelReader(Path(spec.directory))
        audio = model.config.audio_config
        self.window_tokens = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
        self.ids = dict(zip(self.reserved, self.tokenizer.ids_of(self.reserved), strict=True))

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files."""
        return cls.make_spec(
            directory,
            sampling_rate=MelReader(directory).recipe.sampling_rate,
            tasks=("transcribe", "caption", "translate", "summarize", "dialogue"),
        )

    def media(self, request: Request) -> list[Medium]:
        """Return the windows of 30 s of the request's audio, the last one padded."""
        return [Medium("audio", AUDIO * self.window_tokens) for _ in self.mels.frames(request)]

    def encode_prompt(self, request: Request) -> list[int]:
        """Return the ids of the prompt: earlier turns, the audio, and the question or the mode of transcription."""
        windows = len(self.media(request))
        audio = [self.ids[BEGIN_AUDIO], *[self.ids[AUDIO]] * (windows * self.window_tokens)] if windows else []
        *earlier, last = request.turns or (Turn("user", task_prompt(request)),)
        ids = [self.ids[BEGIN], *(id for turn in earlier for id in self._encode_turn(turn)), self.ids[START], *audio]
        if request.task != "transcribe" or request.prompt is not None:
            return [*ids, *self.tokenizer.encode_words(last.text), self.ids[END]]
        code = f"lang:{language_code(request.language)}" if request.language else ""
        return [*ids, self.ids[END], *(self.tokenizer.encode_words(code) if code else ()), self.ids[TRANSCRIBE]]

    def _encode_turn(self, turn: Turn) -> list[int]:
        """Return the ids of a turn before the last one."""
        words = self.tokenizer.encode_words(turn.text)
        if turn.role == "assistant":
            return [*words, self.model.generation_config.eos_token_id]
        if turn.role == "user":
            return [self.ids[START], *words, self.ids[END]]
        try:
            begin, end = self.tokenizer.ids_of(SYSTEM)
        except ModelError as error:
            raise PromptError("unsupported system turn: this model has no tokens for it") from error
        return [begin, *words, end]

    def tensors(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        """Return the log-mel features of the audio windows."""
        mels = self.mels(requests, self.device)
        return {} if mels is None else {"input_features": mels[0].to(self.dtype)}
