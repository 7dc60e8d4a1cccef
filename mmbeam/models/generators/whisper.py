"""Whisper (Radford et al., 2022, arXiv:2212.04356): speech to text, in its own language or translated to English.

The request's language is the spoken one, as in OpenAI's program; without it, the model detects the language in the
first 30 s. Audio of up to 30 s is one window, transcribed without timestamps. Longer audio is read window by window
as in section 3.8 of the paper: by the model's timestamps, each window begins where the last whole segment of the
previous window ended. The result equals that of transformers' `generate` with its defaults (no fallback to higher
temperatures, no condition on previous text). `max_new_tokens` limits each window.
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
from mmbeam.models.generators.pretrained import PretrainedGenerator
from mmbeam.models.generators.prompts import language_code
from mmbeam.models.loading import read_config, read_json
from mmbeam.models.recipes import read_whisper_recipe
from mmbeam.ops.audio import to_rate
from mmbeam.ops.log_mel import WhisperRecipe, whisper_log_mel, whisper_windows
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Instruction, Request

START_TOKENS = 4  # at most: the begin token, the language, the task, and the token for no timestamps
FRAMES_PER_STAMP = 2  # mel frames (10 ms) per step of a timestamp (20 ms, one token of the encoder)


class _Whisper(WhisperForConditionalGeneration):
    """A Whisper whose `generate` decodes one window, like any encoder-decoder; WhisperGenerator joins the windows."""

    generate = GenerationMixin.generate


@dataclass
class _LongAudio:
    """Audio of several windows, and its transcript so far."""

    mel_MT: torch.Tensor
    seed: int
    start: list[int]  # the first tokens of each window's transcript
    position: int = 0  # frames transcribed
    windows: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0


class WhisperGenerator(PretrainedGenerator):
    """A Whisper of any size, English-only or multilingual."""

    model_types = ("whisper",)
    model_class = _Whisper

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.recipe: WhisperRecipe = read_whisper_recipe(Path(spec.directory))
        self.frames = self.recipe.n_samples // self.recipe.hop_length  # per window
        model.generation_config.forced_decoder_ids = None  # of older files; `_starts` makes the first tokens

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files. Raises ModelError if they do not fit together."""
        parsed = read_config(directory)
        generation = read_json(directory, "generation_config.json")
        if "no_timestamps_token_id" not in generation:
            raise ModelError(
                f"{directory}/generation_config.json: expected no_timestamps_token_id, which is missing; "
                "use a newer checkpoint"
            )
        recipe = read_whisper_recipe(directory)
        if recipe.n_mels != parsed.num_mel_bins:
            raise ModelError(
                f"{directory}: expected a processor of {parsed.num_mel_bins} mel bins as in the model, "
                f"found {recipe.n_mels}"
            )
        return cls.make_spec(
            directory,
            modalities=("audio",),
            required=("audio",),
            tasks=("transcribe", "translate") if generation.get("is_multilingual") else ("transcribe",),
            sampling_rate=recipe.sampling_rate,
            max_new_tokens=parsed.max_target_positions - START_TOKENS,
        )

    @classmethod
    def check(cls, spec: GeneratorSpec, instruction: Instruction) -> None:
        """Raise UsageError for a language that the model does not support."""
        tokens = read_json(Path(spec.directory), "generation_config.json").get("lang_to_id")
        if instruction.language is None or not tokens:
            super().check(spec, instruction)
        elif _language_token(instruction.language) not in tokens or instruction.source_language is not None:
            raise UsageError(
                f"`language` {instruction.language}: expected the spoken language, one of "
                f"{', '.join(token.strip('<|>') for token in tokens)}, and no `source_language`"
            )

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """Return the encoder's tokens: 1500 for each window of 30 s."""
        seconds = self.recipe.n_samples / self.recipe.sampling_rate
        lengths = [0.0 if request.audio is None else len(request.audio[0]) / request.audio[1] for request in requests]
        return [max(1, math.ceil(length / seconds)) * (self.frames // FRAMES_PER_STAMP) for length in lengths]

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """Return the transcripts; `score` does not support this family."""
        audio = [request.audio for request in requests if request.audio is not None]
        waves = [wave for wave, _ in audio]
        clips = to_rate(waves, [rate for _, rate in audio], self.recipe.sampling_rate, self.device)
        short = [index for index, clip in enumerate(clips) if len(clip) <= self.recipe.n_samples]
        long = [index for index in range(len(clips)) if index not in short]
        transcripts: dict[int, GeneratedTokens] = {}
        for indices, method in ((short, self._transcribe_short), (long, self._transcribe_long)):
            if indices:
                some = [requests[index] for index in indices]
                results = method(some, [clips[index] for index in indices], decoding)
                transcripts.update(zip(indices, results, strict=True))
        return self.to_texts([transcripts[index] for index in range(len(requests))])

    def _transcribe_short(
        self, requests: Sequence[Request], clips: Sequence[torch.Tensor], decoding: Decoding
    ) -> list[GeneratedTokens]:
        """Return the transcripts of audio of one window each."""
        windows = [whisper_windows(clip, self.recipe)[0] for clip in clips]
        memory = self._encode(whisper_log_mel(torch.stack(windows), self.recipe))
        no_timestamps = self.model.generation_config.no_timestamps_token_id
        starts = [[*start, no_timestamps] for start in self._starts(requests, memory)]
        seeds = [request.seed for request in requests]
        return decode(self.model, self._decoder_inputs(memory, starts), decoding, seeds)

    def _transcribe_long(
        self, requests: Sequence[Request], clips: Sequence[torch.Tensor], decoding: Decoding
    ) -> list[GeneratedTokens]:
        """Return the transcripts of audio of several windows; a batch holds the next window of each."""
        mels = [whisper_log_mel(clip[None], self.recipe)[0] for clip in clips]
        starts = self._starts(requests, self._encode(torch.stack([mel[:, : self.frames] for mel in mels])))
        audio = [
            _LongAudio(mel, request.seed, start) for mel, request, start in zip(mels, requests, starts, strict=True)
        ]
        while unfinished := [item for item in audio if item.position < item.mel_MT.shape[1]]:
            self._transcribe_windows(unfinished, decoding)
        return [
            GeneratedTokens(token_ids=tuple(item.token_ids), num_tokens=len(item.token_ids), logprob=item.logprob)
            for item in audio
        ]

    def _transcribe_windows(self, audio: Sequence[_LongAudio], decoding: Decoding) -> None:
        """Transcribe the next window of each. The window after it begins at the end of its last whole segment."""
        windows = [item.mel_MT[:, item.position : item.position + self.frames] for item in audio]
        padded = [functional.pad(mel_MT, (0, self.frames - mel_MT.shape[1])) for mel_MT in windows]
        inputs = self._decoder_inputs(self._encode(torch.stack(padded)), [item.start for item in audio])
        begin = inputs["decoder_input_ids"].shape[1]
        timestamps = WhisperTimeStampLogitsProcessor(self.model.generation_config, begin_index=begin)
        seeds = [(item.seed + item.windows) % 2**64 for item in audio]
        generated = decode(self.model, inputs, decoding, seeds, logits_processor=[timestamps])
        segments = []
        for item, mel_MT, tokens in zip(audio, windows, generated, strict=True):
            kept, frames = self._whole_segments(tokens.token_ids[: tokens.num_tokens], mel_MT.shape[1])
            segments.append(kept)
            item.token_ids += kept
            item.position += frames
            item.windows += 1
        for item, logprob in zip(audio, score(self.model, inputs, segments), strict=True):
            item.logprob += logprob

    def _whole_segments(self, tokens: Sequence[int], frames: int) -> tuple[list[int], int]:
        """Return the tokens of a window's whole segments, and the frames that they cover.

        Two adjacent timestamps end one segment and begin the next; the last segment may be incomplete at the end of the
        window. If there is no such pair, or the text ends with a single timestamp, all tokens are kept and the whole
        window counts as done.
        """
        first = self.model.generation_config.no_timestamps_token_id + 1
        is_stamp = [token >= first for token in tokens]
        pairs = [index for index in range(1, len(tokens)) if is_stamp[index - 1] and is_stamp[index]]
        if not pairs or is_stamp[-2:] == [False, True]:
            return list(tokens), frames
        end = pairs[-1]
        return list(tokens[: end + 1]), (tokens[end - 1] - first) * FRAMES_PER_STAMP or frames

    def _encode(self, mel_BMT: torch.Tensor) -> BaseModelOutput:
        hidden_BLD = self.model.get_encoder()(mel_BMT.to(self.dtype)).last_hidden_state
        return BaseModelOutput(last_hidden_state=hidden_BLD)

    def _decoder_inputs(self, memory: BaseModelOutput, starts: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {"encoder_outputs": memory, "decoder_input_ids": torch.tensor(starts, device=self.device)}

    def _starts(self, requests: Sequence[Request], memory: BaseModelOutput) -> list[list[int]]:
        """Return the first tokens of each transcript; in a multilingual model they name the language and the task."""
        config = self.model.generation_config
        if not getattr(config, "is_multilingual", False):
            return [[config.decoder_start_token_id] for _ in requests]
        languages: list[int] = []
        if any(request.language is None for request in requests):
            languages = self.model.detect_language(encoder_outputs=memory).tolist()
        starts = []
        for row, request in enumerate(requests):
            if request.language is None:
                language = languages[row]
            elif (token := _language_token(request.language)) in config.lang_to_id:
                language = config.lang_to_id[token]
            else:
                raise ModelError(
                    f"{self.spec.directory}: unsupported language {request.language!r}; expected one of "
                    f"{', '.join(config.lang_to_id)}"
                )
            task = config.task_to_id["translate" if request.task == "translate" else "transcribe"]
            starts.append([config.decoder_start_token_id, language, task])
        return starts


def _language_token(language: str) -> str:
    """Return the token of a language by its name, its code or its token: "german", "de", "<|de|>"."""
    return f"<|{language_code(language.lower().strip('<|>'))}|>"
