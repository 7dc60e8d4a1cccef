"""Whisper (Radford et al., 2022, arXiv:2212.04356): speech to text, in its own language or in English.

The task is "translate", or else to transcribe. The request's language is the one spoken, as in OpenAI's own
program; without it that is what the model makes of the first 30 s.
A sound of up to 30 s is one window, written without timestamps. A longer one is read as
section 3.8 of the paper says: window after window, each beginning where the last whole segment of the one
before ended, by the timestamps that the model writes; that is what transformers' `generate` does with its
defaults (no fall-back to higher temperatures, no condition on the text before). --max-new-tokens is of each window.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationMixin, WhisperForConditionalGeneration, WhisperTimeStampLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from mmbeam.errors import ModelError, UsageError
from mmbeam.models.generators.decoding import GeneratedTokens, decode, score
from mmbeam.models.generators.languages import code_of
from mmbeam.models.generators.pretrained import PretrainedGenerator
from mmbeam.models.loading import read_config, read_json
from mmbeam.models.recipes import read_whisper_recipe
from mmbeam.ops.audio import to_rate
from mmbeam.ops.log_mel import WhisperRecipe, whisper_log_mel, whisper_windows
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Instruction, Request

START_TOKENS = 4  # of a transcript at most: its begin, the language, the task, and that there are no timestamps
FRAMES_PER_STAMP = 2  # of 10 ms: timestamps count the encoder's tokens


class _Whisper(WhisperForConditionalGeneration):
    """Whose `generate` decodes one window, as any encoder-decoder's does; the windows are looked after here."""

    generate = GenerationMixin.generate


@dataclass
class _Long:
    """A sound of several windows, on the way through it."""

    mel_MT: torch.Tensor
    seed: int
    start: list[int]  # of each window's transcript
    at: int = 0  # frames done
    windows: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0


class WhisperGenerator(PretrainedGenerator):
    """A Whisper of any size, of English or of many languages."""

    model_types = ("whisper",)
    model_class = _Whisper

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.recipe: WhisperRecipe = read_whisper_recipe(Path(spec.directory))
        self.frames = self.recipe.n_samples // self.recipe.hop_length  # of a window
        model.generation_config.forced_decoder_ids = None  # of older files: the start is made here

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        parsed = read_config(directory)
        cls.read_tokenizer(directory)
        generation = read_json(directory, "generation_config.json")
        if "no_timestamps_token_id" not in generation:
            raise ModelError(f"{directory}/generation_config.json: has no no_timestamps_token_id; take a newer one")
        recipe = read_whisper_recipe(directory)
        if recipe.n_mels != parsed.num_mel_bins:
            raise ModelError(
                f"{directory}: the model has {parsed.num_mel_bins} mel bins, its processor {recipe.n_mels}"
            )
        return GeneratorSpec(
            family=parsed.model_type,
            directory=str(directory),
            modalities=("audio",),
            required=("audio",),
            tasks=("transcribe", "translate") if generation.get("is_multilingual") else ("transcribe",),
            sampling_rate=recipe.sampling_rate,
            max_new_tokens=parsed.max_target_positions - START_TOKENS,
        )

    @classmethod
    def check(cls, spec: GeneratorSpec, instruction: Instruction) -> None:
        known = read_json(Path(spec.directory), "generation_config.json").get("lang_to_id")
        if instruction.language is None or not known:
            super().check(spec, instruction)
        elif _language_token(instruction.language) not in known or instruction.source_language is not None:
            raise UsageError(
                f"--language {instruction.language}: expected the language that is spoken, one of "
                f"{', '.join(token.strip('<|>') for token in known)}, and no --source-language"
            )

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """The encoder's tokens: 1500 for each window of 30 s."""
        seconds = self.recipe.n_samples / self.recipe.sampling_rate
        lengths = [0.0 if request.audio is None else len(request.audio[0]) / request.audio[1] for request in requests]
        return [max(1, math.ceil(length / seconds)) * (self.frames // FRAMES_PER_STAMP) for length in lengths]

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        sounds = self._sounds(requests)
        done: dict[int, GeneratedTokens] = {}
        short = [index for index, sound in enumerate(sounds) if len(sound) <= self.recipe.n_samples]
        long = [index for index in range(len(sounds)) if index not in short]
        for indices, method in ((short, self._windows), (long, self._sequences)):
            if indices:
                some = [requests[index] for index in indices]
                done.update(zip(indices, method(some, [sounds[i] for i in indices], decoding), strict=True))
        return self.finished([done[index] for index in range(len(requests))])

    def _sounds(self, requests: Sequence[Request]) -> list[torch.Tensor]:
        heard = [request.audio for request in requests if request.audio is not None]
        waves, rates = [wave for wave, _ in heard], [rate for _, rate in heard]
        return to_rate(waves, rates, self.recipe.sampling_rate, self.device)

    def _windows(
        self, requests: Sequence[Request], sounds: Sequence[torch.Tensor], decoding: Decoding
    ) -> list[GeneratedTokens]:
        """Transcripts of sounds of one window each."""
        windows = [whisper_windows(sound, self.recipe)[0] for sound in sounds]
        memory = self._encoded(whisper_log_mel(torch.stack(windows), self.recipe))
        starts = self._starts(requests, memory)
        unstamped = self.model.generation_config.no_timestamps_token_id
        inputs = self._inputs(memory, [[*start, unstamped] for start in starts])
        return decode(self.model, inputs, decoding, [request.seed for request in requests])

    def _sequences(
        self, requests: Sequence[Request], sounds: Sequence[torch.Tensor], decoding: Decoding
    ) -> list[GeneratedTokens]:
        """Transcripts of sounds of several windows; the next windows of all of them make a batch."""
        mels = [whisper_log_mel(sound[None], self.recipe)[0] for sound in sounds]
        starts = self._starts(requests, self._encoded(torch.stack([mel[:, : self.frames] for mel in mels])))
        all_of = [_Long(mel, request.seed, start) for mel, request, start in zip(mels, requests, starts, strict=True)]
        while ahead := [one for one in all_of if one.at < one.mel_MT.shape[1]]:
            self._step(ahead, decoding)
        return [
            GeneratedTokens(token_ids=tuple(one.token_ids), num_tokens=len(one.token_ids), logprob=one.logprob)
            for one in all_of
        ]

    def _step(self, ahead: Sequence[_Long], decoding: Decoding) -> None:
        """One window of each sound; what of its text was not kept is read again in the next one."""
        cut = [one.mel_MT[:, one.at : one.at + self.frames] for one in ahead]
        filled = [functional.pad(mel_MT, (0, self.frames - mel_MT.shape[1])) for mel_MT in cut]
        inputs = self._inputs(self._encoded(torch.stack(filled)), [one.start for one in ahead])
        begin = inputs["decoder_input_ids"].shape[1]
        stamps = WhisperTimeStampLogitsProcessor(self.model.generation_config, begin_index=begin)
        seeds = [(one.seed + one.windows) % 2**64 for one in ahead]
        decoded = decode(self.model, inputs, decoding, seeds, logits_processor=[stamps])
        kept = []
        for one, mel_MT, window in zip(ahead, cut, decoded, strict=True):
            tokens, frames = self._segments(window.token_ids[: window.num_tokens], mel_MT.shape[1])
            kept.append(tokens)
            one.token_ids += tokens
            one.at += frames
            one.windows += 1
        for one, logprob in zip(ahead, score(self.model, inputs, kept), strict=True):
            one.logprob += logprob

    def _segments(self, tokens: Sequence[int], frames: int) -> tuple[list[int], int]:
        """Of a window's tokens those of whole segments, and the frames that they cover.

        Two timestamps in a row end a segment and begin the next, which the window may cut: the rest is read
        again. Without any, or where a single one ends the text, the window is all done.
        """
        first = self.model.generation_config.no_timestamps_token_id + 1
        stamped = [token >= first for token in tokens]
        pairs = [index for index in range(1, len(tokens)) if stamped[index - 1] and stamped[index]]
        if not pairs or stamped[-2:] == [False, True]:
            return list(tokens), frames
        end = pairs[-1]
        return list(tokens[: end + 1]), (tokens[end - 1] - first) * FRAMES_PER_STAMP or frames

    def _encoded(self, mel_BMT: torch.Tensor) -> BaseModelOutput:
        hidden_BLD = self.model.get_encoder()(mel_BMT.to(self.dtype)).last_hidden_state
        return BaseModelOutput(last_hidden_state=hidden_BLD)

    def _inputs(self, memory: BaseModelOutput, starts: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {"encoder_outputs": memory, "decoder_input_ids": torch.tensor(starts, device=self.device)}

    def _starts(self, requests: Sequence[Request], memory: BaseModelOutput) -> list[list[int]]:
        """What each transcript begins with: of a model of many languages, the language and the task too."""
        config = self.model.generation_config
        if not getattr(config, "is_multilingual", False):
            return [[config.decoder_start_token_id] for _ in requests]
        languages: list[int] = []
        if any(request.language is None for request in requests):
            languages = self.model.detect_language(encoder_outputs=memory).tolist()
        tasks = ["translate" if request.task == "translate" else "transcribe" for request in requests]
        return [
            [
                config.decoder_start_token_id,
                languages[row] if request.language is None else self._language_id(request.language),
                config.task_to_id[task],
            ]
            for row, (request, task) in enumerate(zip(requests, tasks, strict=True))
        ]

    def _language_id(self, language: str) -> int:
        known: Mapping[str, int] = self.model.generation_config.lang_to_id
        token = _language_token(language)
        if token not in known:
            raise ModelError(f"{self.spec.directory}: knows no language {language!r}; it knows {', '.join(known)}")
        return known[token]


def _language_token(language: str) -> str:
    """The token of a language by its name, its code or its token: "german", "de", "<|de|>"."""
    return f"<|{code_of(language.lower().strip('<|>'))}|>"
