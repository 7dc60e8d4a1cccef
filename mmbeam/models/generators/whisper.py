"""Whisper (Radford et al., 2022, arXiv:2212.04356): speech to text, in its own language or translated to English.

The request's language is the spoken one, as in OpenAI's program; without it, the model detects the language in the
first 30 s. Audio of up to 30 s is one window, transcribed without timestamps. Longer audio is read window by window
as in section 3.8 of the paper: by the model's timestamps, each window begins where the last whole segment of the
previous window ended. The result equals that of transformers' `generate` with its defaults (no fallback to higher
temperatures, no condition on previous text). `max_new_tokens` limits each window.

A robust decoding is the paper's (section 4.5), with its thresholds, for audio of any length, always with timestamps.
A window whose text is repetitive or unlikely is decoded again at higher temperatures. A window is left out if it is
unlikely to be speech and its text is unlikely too.

The details of a text: `no_speech`, the smallest probability of its windows that there is no speech; `compression`, the
largest ratio of its windows' texts to their compressed size, which is high for repetitions; `segments`, with their
times in seconds; and `words`, whose times follow from the attention (dynamic time warping, as in transformers).
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
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
from mmbeam.ops.transfer import to_device
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Instruction, Request

START_TOKENS = 4  # at most: the begin token, the language, the task, and the token for no timestamps
FRAMES_PER_STAMP = 2  # mel frames (10 ms) per step of a timestamp (20 ms, one token of the encoder)
SECONDS_PER_STAMP = 0.02
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of a robust decoding, one after the other
MAX_COMPRESSION, MIN_LOGPROB, MAX_NO_SPEECH = 2.4, -1.0, 0.6  # its thresholds; the second is a token's
UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")  # languages that are written without spaces between words
OPENING = "\"'\u201c\u00bf([{-\u00ab\u2018"  # punctuation that belongs to the next word
SPANS = pa.list_(pa.struct([("start", pa.float32()), ("end", pa.float32()), ("text", pa.string())]))
DETAILS = (("no_speech", pa.float32()), ("compression", pa.float32()), ("segments", SPANS), ("words", SPANS))

Span = dict[str, Any]  # start and end in seconds, text


class _Whisper(WhisperForConditionalGeneration):
    """A Whisper whose `generate` decodes one window, like any encoder-decoder; WhisperGenerator joins the windows."""

    generate = GenerationMixin.generate


@dataclass
class _Audio:
    """Audio of one or several windows, and its transcript so far."""

    mel_MT: torch.Tensor
    frames: int  # of the sound; `mel_MT` may have more, of silence
    seed: int
    start: list[int]  # the first tokens of each window's transcript
    position: int = 0  # frames transcribed
    windows: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    logprob: float = 0.0
    no_speech: list[float] = field(default_factory=list)  # of each window
    compression: list[float] = field(default_factory=list)
    segments: list[Span] = field(default_factory=list)
    words: list[Span] = field(default_factory=list)


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
            details=DETAILS if "alignment_heads" in generation else DETAILS[:-1],
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

    def encode(self, requests: Sequence[Request]) -> list[Any]:
        """Return None for each request: the first tokens of a transcript depend on the sound."""
        return [None] * len(requests)

    def prepare(self, requests: Sequence[Request]) -> Any:
        """Return None: the device makes the spectrograms."""
        return None

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """Return the encoder's tokens: 1500 for each window of 30 s."""
        seconds = self.recipe.n_samples / self.recipe.sampling_rate
        lengths = [0.0 if request.audio is None else len(request.audio[0]) / request.audio[1] for request in requests]
        return [max(1, math.ceil(length / seconds)) * (self.frames // FRAMES_PER_STAMP) for length in lengths]

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """Return the transcripts; `score` does not support this family."""
        if decoding.word_timestamps and not getattr(self.model.generation_config, "alignment_heads", None):
            raise ModelError(
                f"{self.spec.directory}/generation_config.json: expected alignment_heads, which word timestamps need"
            )
        waves = [request.audio for request in requests if request.audio is not None]
        clips = to_rate(
            [wave for wave, _ in waves], [rate for _, rate in waves], self.recipe.sampling_rate, self.device
        )
        short = [index for index, clip in enumerate(clips) if len(clip) <= self.recipe.n_samples]
        audio: list[_Audio | None] = [None] * len(clips)
        for indices in (short, [index for index in range(len(clips)) if index not in short]):
            if indices:
                some, is_short = [clips[index] for index in indices], indices is short
                items, memory = self._begin([requests[index] for index in indices], some, is_short)
                if is_short and not decoding.robust:
                    self._transcribe_short(items, memory, decoding)
                else:
                    while unfinished := [item for item in items if item.position < item.frames]:
                        self._transcribe_windows(unfinished, decoding)
                for index, item in zip(indices, items, strict=True):
                    audio[index] = item
        return [self._finish(item) for item in audio if item is not None]

    def _begin(
        self, requests: Sequence[Request], clips: Sequence[torch.Tensor], is_short: bool
    ) -> tuple[list[_Audio], BaseModelOutput]:
        """Return the audio before its first window, and the encoded first windows.

        Short clips are padded before their spectrograms, long ones after.
        """
        if is_short:
            windows = torch.stack([whisper_windows(clip, self.recipe)[0] for clip in clips])
            mels = list(whisper_log_mel(windows, self.recipe))
        else:
            mels = [whisper_log_mel(clip[None], self.recipe)[0] for clip in clips]
        memory = self._encode(torch.stack([mel_MT[:, : self.frames] for mel_MT in mels]))
        starts = self._starts(requests, memory)
        frames = [
            max(1, -(-len(clip) // self.recipe.hop_length)) if is_short else mel_MT.shape[1]
            for clip, mel_MT in zip(clips, mels, strict=True)
        ]
        rows = zip(mels, frames, requests, starts, strict=True)
        return [_Audio(mel_MT, count, request.seed, start) for mel_MT, count, request, start in rows], memory

    def _finish(self, item: _Audio) -> Generated:
        tokens = GeneratedTokens(token_ids=tuple(item.token_ids), num_tokens=item.num_tokens, logprob=item.logprob)
        [text] = self.to_texts([tokens])
        details: dict[str, Any] = {
            "no_speech": min(item.no_speech),
            "compression": max(item.compression),
            "segments": item.segments,
            "words": item.words,
        }
        return replace(text, details=details)

    def _transcribe_short(self, audio: Sequence[_Audio], memory: BaseModelOutput, decoding: Decoding) -> None:
        """Transcribe audio of one window each, without timestamps."""
        no_timestamps = self.model.generation_config.no_timestamps_token_id
        starts = [[*item.start, no_timestamps] for item in audio]
        generated = decode(self.model, self._decoder_inputs(memory, starts), decoding, [item.seed for item in audio])
        no_speech = self._no_speech(memory, [item.start for item in audio])
        words = self._words(memory, starts, generated, [item.frames for item in audio], decoding)
        for item, tokens, probability, spans in zip(audio, generated, no_speech, words, strict=True):
            item.token_ids, item.num_tokens = list(tokens.token_ids), tokens.num_tokens
            item.logprob, item.position = tokens.logprob, item.frames
            self._note(item, tokens.token_ids, probability)
            text, end = self.tokenizer.decode(tokens.token_ids), item.frames * SECONDS_PER_STAMP / FRAMES_PER_STAMP
            item.segments += [{"start": 0.0, "end": end, "text": text}] if text else []
            item.words += _ended(spans, end)

    def _transcribe_windows(self, audio: Sequence[_Audio], decoding: Decoding) -> None:
        """Transcribe the next window of each. The window after it begins at the end of its last whole segment."""
        windows = [item.mel_MT[:, item.position : item.position + self.frames] for item in audio]
        padded = [functional.pad(mel_MT, (0, self.frames - mel_MT.shape[1])) for mel_MT in windows]
        memory, starts = self._encode(torch.stack(padded)), [item.start for item in audio]
        inputs = self._decoder_inputs(memory, starts)
        no_speech = self._no_speech(memory, starts)
        generated = self._decode_windows(audio, inputs, no_speech, decoding)
        frames = [min(self.frames, item.frames - item.position) for item in audio]
        words = self._words(memory, starts, generated, frames, decoding)
        segments = []
        for item, tokens, probability, count, spans in zip(audio, generated, no_speech, frames, words, strict=True):
            ids = tokens.token_ids[: tokens.num_tokens]
            kept, done = self._whole_segments(ids, count)
            segments.append(kept)
            offset = item.position * SECONDS_PER_STAMP / FRAMES_PER_STAMP
            new = self._segments(ids, kept, offset, count)
            item.segments += new
            item.words += [
                {**span, "start": span["start"] + offset, "end": span["end"] + offset}
                for span in _ended(spans, count * SECONDS_PER_STAMP / FRAMES_PER_STAMP)
                if new and span["start"] + offset < max(segment["end"] for segment in new)
            ]
            self._note(item, kept, probability)
            item.token_ids += kept
            item.num_tokens += len(kept)
            item.position += done
            item.windows += 1
        for item, logprob in zip(audio, score(self.model, inputs, segments), strict=True):
            item.logprob += logprob

    def _note(self, item: _Audio, ids: Sequence[int], no_speech: float) -> None:
        item.no_speech.append(no_speech)
        item.compression.append(compression(self.tokenizer.decode(ids)))

    def _decode_windows(
        self, audio: Sequence[_Audio], inputs: Mapping[str, Any], no_speech: Sequence[float], decoding: Decoding
    ) -> list[GeneratedTokens]:
        """Return the tokens of each window, with timestamps; () for a window that a robust decoding leaves out."""
        begin = inputs["decoder_input_ids"].shape[1]
        done: dict[int, GeneratedTokens] = {}
        left = list(range(len(audio)))
        temperatures = TEMPERATURES if decoding.robust else (decoding.temperature or 0.0,)
        for attempt, temperature in enumerate(temperatures):
            timestamps = WhisperTimeStampLogitsProcessor(self.model.generation_config, begin_index=begin)
            memory = inputs["encoder_outputs"].last_hidden_state[left]
            some = {
                "encoder_outputs": BaseModelOutput(last_hidden_state=memory),
                "decoder_input_ids": inputs["decoder_input_ids"][left],
            }
            seeds = [(audio[row].seed + audio[row].windows + (attempt << 32)) % 2**64 for row in left]
            options = replace(
                decoding,
                temperature=temperature or None,
                num_beams=1 if temperature else decoding.num_beams,
                top_p=decoding.top_p if temperature else 1.0,
            )
            generated = decode(
                self.model, some, options, seeds, with_filtered=decoding.robust, logits_processor=[timestamps]
            )
            done.update(zip(left, generated, strict=True))
            if not decoding.robust:
                break
            again = []
            for row, tokens in zip(left, generated, strict=True):
                total = tokens.logprob if tokens.filtered_logprob is None else tokens.filtered_logprob
                is_unlikely = total / max(1, len(tokens.token_ids)) < MIN_LOGPROB
                is_repetitive = compression(self.tokenizer.decode(tokens.token_ids)) > MAX_COMPRESSION
                if is_unlikely and no_speech[row] > MAX_NO_SPEECH:
                    done[row] = GeneratedTokens(token_ids=(), num_tokens=0, logprob=0.0)
                elif is_unlikely or is_repetitive:
                    again.append(row)
            left = again
            if not left:
                break
        return [done[row] for row in range(len(audio))]

    def _no_speech(self, memory: BaseModelOutput, starts: Sequence[Sequence[int]]) -> list[float]:
        """Return the probability of the token for no speech after the begin token of each window."""
        first_B1 = to_device([start[:1] for start in starts], self.device)
        logits_BV = self.model(encoder_outputs=memory, decoder_input_ids=first_B1).logits[:, 0]
        token = self.model.generation_config.no_timestamps_token_id - 1
        probabilities: list[float] = logits_BV.float().softmax(-1)[:, token].tolist()
        return probabilities

    def _segments(self, tokens: Sequence[int], kept: Sequence[int], offset: float, frames: int) -> list[Span]:
        """Return the segments of a window's kept tokens that have a text, with their times in the audio."""
        first = self.model.generation_config.no_timestamps_token_id + 1
        pairs = [index for index in range(1, len(kept)) if kept[index - 1] >= first and kept[index] >= first]
        if not pairs:  # no whole segment: all of the window
            stamps = [token for token in kept if token >= first]
            end = stamps[-1] - first if stamps and stamps[-1] != first else frames // FRAMES_PER_STAMP
            parts = [(0, end, kept)]
        else:
            is_single = len(tokens) > 1 and tokens[-1] >= first and tokens[-2] < first
            ends = [*pairs, len(kept)] if is_single else [*pairs[:-1], len(kept)]
            slices = [kept[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
            last = [
                part[-2] if index == len(slices) - 1 and not is_single else part[-1]
                for index, part in enumerate(slices)
            ]
            parts = [(part[0] - first, end - first, part) for part, end in zip(slices, last, strict=True)]
        return [
            {"start": offset + start * SECONDS_PER_STAMP, "end": offset + end * SECONDS_PER_STAMP, "text": text}
            for start, end, part in parts
            if (text := self.tokenizer.decode(part))
        ]

    def _words(
        self,
        memory: BaseModelOutput,
        starts: Sequence[Sequence[int]],
        generated: Sequence[GeneratedTokens],
        frames: Sequence[int],
        decoding: Decoding,
    ) -> list[list[Span]]:
        """Return the words of each window, with their beginnings in the window; their ends are those of the next."""
        if not decoding.word_timestamps:
            return [[] for _ in starts]
        rows = [tokens.token_ids[: tokens.num_tokens] for tokens in generated]
        times = self.token_times(memory, starts, rows, frames)
        codes = {
            token: name.strip("<|>") for name, token in getattr(self.model.generation_config, "lang_to_id", {}).items()
        }
        words = []
        for start, ids, of_tokens in zip(starts, rows, times, strict=True):
            code = next((codes[token] for token in start if token in codes), "en")
            words.append(self._split_words(ids, of_tokens, code not in UNSPACED))
        return words

    def token_times(
        self,
        memory: BaseModelOutput,
        starts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        frames: Sequence[int],
    ) -> list[list[float]]:
        """Return the seconds at which each token of each window begins, from the attention to its first `frames`."""
        config = self.model.generation_config
        longest = max(map(len, rows))
        if not longest:
            return [[] for _ in rows]
        padded = [[*start, *ids, *[0] * (longest - len(ids))] for start, ids in zip(starts, rows, strict=True)]
        implementation = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")  # the others return no attention
        try:
            ids_BL = torch.tensor(padded, device=self.device)
            output = self.model(encoder_outputs=memory, decoder_input_ids=ids_BL, output_attentions=True)
        finally:
            self.model.set_attn_implementation(implementation)
        heads_BHLT = torch.stack([output.cross_attentions[layer][:, head] for layer, head in config.alignment_heads], 1)
        times: list[list[float]] = []
        for row, (start, ids, count) in enumerate(zip(starts, rows, frames, strict=True)):
            weights_HLT = heads_BHLT[row, :, len(start) : len(start) + len(ids), : count // FRAMES_PER_STAMP].float()
            if not ids or not weights_HLT.shape[-1]:
                times.append([0.0] * len(ids))
                continue
            deviation, mean = torch.std_mean(weights_HLT, dim=-2, keepdim=True, unbiased=False)
            smooth_HLT = _median((weights_HLT - mean) / deviation, self.model.config.median_filter_width)
            times.append([step * SECONDS_PER_STAMP for step in warp(-smooth_HLT.mean(0).double().cpu().numpy())])
        return times

    def _split_words(self, ids: Sequence[int], times: Sequence[float], is_spaced: bool) -> list[Span]:
        """Return the words of a window's tokens; each ends where the next begins."""
        words: list[Span] = []
        waiting: list[int] = []  # tokens that are not yet a whole character
        first = self.model.generation_config.no_timestamps_token_id + 1
        begin = 0.0
        for index, (token, time) in enumerate(zip(ids, times, strict=True)):
            is_stamp = token >= first
            if not is_stamp:
                begin = begin if waiting else time
                waiting.append(token)
            text = self.tokenizer.decode_exactly(waiting)
            is_last = is_stamp or index == len(ids) - 1
            if not text.strip() or ("\ufffd" in text and not is_last):  # only a space, or not whole characters
                text = ""
            is_mark = not any(map(str.isalnum, text)) and text.strip() not in OPENING
            continues = is_mark or (is_spaced and not text.startswith(" "))
            if text and words and "end" not in words[-1] and (continues or words[-1]["text"].strip() in OPENING):
                words[-1]["text"] += text
            elif text:
                if words:
                    words[-1].setdefault("end", begin)
                words.append({"start": begin, "text": text})
            waiting = [] if text or is_last else waiting
            if is_stamp and words:
                words[-1].setdefault("end", time)
        return [{**word, "text": word["text"].strip()} for word in words]

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
        return {"encoder_outputs": memory, "decoder_input_ids": to_device(starts, self.device)}

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


def compression(text: str) -> float:
    """Return the ratio of a text's bytes to its compressed bytes, which is high for repetitions; 0 for no text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def warp(cost_LT: npt.NDArray[np.float64]) -> list[int]:
    """Return the step at which each row begins on the cheapest monotonic path through [rows, steps].

    Dynamic time warping: a path goes from the first row and step to the last ones, by one row, one step, or both.
    """
    rows, steps = cost_LT.shape
    total = np.full((rows + 1, steps + 1), np.inf, np.float32)
    total[0, 0] = 0.0
    moves = np.zeros((rows + 1, steps + 1), np.int8)  # 0: both, 1: a row, 2: a step
    moves[0, :], moves[:, 0] = 2, 1
    for diagonal in range(2, rows + steps + 1):  # its cells depend on the two diagonals before
        row = np.arange(max(1, diagonal - steps), min(rows, diagonal - 1) + 1)
        step = diagonal - row
        both, down, right = total[row - 1, step - 1], total[row - 1, step], total[row, step - 1]
        move = np.where((both < down) & (both < right), 0, np.where((down < both) & (down < right), 1, 2))
        moves[row, step] = move
        total[row, step] = cost_LT[row - 1, step - 1] + np.choose(move, (both, down, right))
    row, step = rows, steps
    begins = [0] * rows
    while row > 0 or step > 0:
        if row > 0:
            begins[row - 1] = max(0, int(step) - 1)
        move = moves[row, step]
        row, step = row - (move != 2), step - (move != 1)
    return begins


def _median(weights_HLT: torch.Tensor, width: int) -> torch.Tensor:
    """Return the running median over `width` steps, reflected at the ends."""
    if weights_HLT.shape[-1] <= width // 2:
        return weights_HLT
    padded = functional.pad(weights_HLT, (width // 2, width // 2, 0, 0), mode="reflect")
    return padded.unfold(-1, width, 1).sort()[0][..., width // 2]


def _ended(words: Sequence[Span], end: float) -> list[Span]:
    """Return the words, the last of which ends at `end` unless its end is known."""
    return [{"start": word["start"], "end": word.get("end", end), "text": word["text"]} for word in words]
