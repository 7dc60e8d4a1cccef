"""Checkpoints without a family: models with a `generate` that transformers loads, with the checkpoint's own processor.

The class is AutoModelForImageTextToText's, AutoModelForMultimodalLM's (audio language models among them) or
AutoModelForSpeechSeq2Seq's. A chat model gets one turn of the user, or a dialogue, as its chat template lays it out.
Without a template, a model of images gets the user's prompt, or else its task's prefix, and the image. A speech model
gets the sound. Text-only models are families (seq2seq.py, CausalGenerator).

Requests are prepared one by one on the CPU; those whose inputs have equal shapes share a batch, and nothing is padded,
so that a text equals that of transformers for the request alone. A speech model gets audio in pieces of at most 30 s,
whose texts are joined. A text that spells one of the model's own tokens fails: its processor would read the token.
"""

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor
from transformers.models.auto import modeling_auto

from mmbeam.errors import LimitError, ModelError, PromptError
from mmbeam.models.generators.decoding import GeneratedTokens, decode, score
from mmbeam.models.generators.pretrained import PretrainedGenerator, context_length, text_limits
from mmbeam.models.generators.prompts import task_prompt
from mmbeam.models.loading import load_pretrained, quiet_transformers, read_config
from mmbeam.models.recipes import read_image_processor
from mmbeam.names import TASKS, Modality
from mmbeam.ops.audio import to_rate
from mmbeam.ops.transfer import to_device
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Request, VideoInput
from mmbeam.types import ImageHWC, Video, Waveform

logger = logging.getLogger(__name__)

# model_type: the class of transformers.
SPEECH: Mapping[str, str] = {
    name: cls
    for name, cls in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.items()
    if name not in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
}
CLASSES: Mapping[str, str] = {**SPEECH, **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
PIECE_SECONDS = 30  # the longest piece of audio of a speech model
TOKENS_PER_MEDIUM = 256  # assumed for the weight of a request
PREFIXES: Mapping[str, str] = {"paligemma": "caption en"}  # what a model without a chat template is asked by default

SEVERAL_IMAGES = ("gemma3", "gemma4", "idefics2", "idefics3", "mistral3", "aya_vision")

Inputs = dict[str, Any]


class AutoGenerator(PretrainedGenerator):
    """A model of the lists above with its AutoProcessor."""

    def __init__(self, spec: GeneratorSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.processor = _read_processor(Path(spec.directory))
        self._lock = Lock()  # its tokenizer has states, which two threads may not change
        self._has_scores = False  # whether `score` was found to agree with greedy decoding
        self.is_chat = _template(self.processor) is not None
        own = self.processor.tokenizer
        added = (token.content for token in own.added_tokens_decoder.values() if token.special)
        self._own_tokens = sorted(token for token in {*own.all_special_tokens, *added} if token.strip())

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration, processor and tokenizer."""
        parsed, processor = read_config(directory), _read_processor(directory)
        takes = set(getattr(getattr(transformers, CLASSES[parsed.model_type]), "input_modalities", ("image", "text")))
        audio = _extractor(processor)
        has_image = getattr(processor, "image_processor", None) is not None and "image" in takes
        media: list[Modality] = []
        media += ["image"] if has_image else []
        media += ["audio"] if audio is not None and ("audio" in takes or not has_image) else []
        if not media:
            raise ModelError(f"{directory}: {type(processor).__name__} reads neither images nor audio")
        is_chat, is_speech = _template(processor) is not None, parsed.model_type in SPEECH
        limits = {} if parsed.is_encoder_decoder else text_limits(context_length(parsed))
        return cls.make_spec(
            directory,
            modalities=("audio",) if is_speech else (*media, "text"),
            required=() if is_chat and not is_speech else tuple(media),
            tasks=TASKS if is_chat and not is_speech else ("transcribe",) if media == ["audio"] else ("caption",),
            takes_prompt=not is_speech,
            sampling_rate=None if "audio" not in media else int(audio.sampling_rate),
            notes=(
                f"{parsed.model_type} has no family of its own: it runs by {CLASSES[parsed.model_type]} with the "
                f"checkpoint's own {type(processor).__name__}, slower than a family",
            ),
            **limits,
        )

    @classmethod
    def load(cls, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the weights."""
        model_class = getattr(transformers, CLASSES[spec.family])
        return cls(spec, load_pretrained(model_class, Path(spec.directory), device, dtype))

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """Return the tokens of each request's words, and an estimate for its media."""
        counts = self.count_tokens([self._words(request) for request in requests])
        media = [
            (request.image is not None)
            + (request.audio is not None)
            + (len(request.video.frames) if request.video else 0)
            for request in requests
        ]
        return [1 + count + TOKENS_PER_MEDIUM * number for count, number in zip(counts, media, strict=True)]

    def encode(self, requests: Sequence[Request]) -> list[Any]:
        """Return None for each request: its processor makes its tokens and its media together."""
        return [None] * len(requests)

    def prepare(self, requests: Sequence[Request]) -> Any:
        """Return the inputs of each request, on the CPU: one, or several for the pieces of long speech."""
        with self._lock:
            return [self._prepare(request) for request in requests]

    def _prepare(self, request: Request) -> list[Inputs]:
        image = None if request.image is None else Image.fromarray(request.image)
        wave = None if request.audio is None else self._resample(*request.audio)
        if self.spec.family in SPEECH:
            assert wave is not None
            rate = int(_extractor(self.processor).sampling_rate)
            pieces = torch.tensor_split(torch.from_numpy(wave), max(1, math.ceil(len(wave) / (PIECE_SECONDS * rate))))
            extract = _extractor(self.processor)
            return [_tensors(extract(piece.numpy(), sampling_rate=rate, return_tensors="pt")) for piece in pieces]
        words = self._words(request)
        texts = [turn.text for turn in request.turns] or [words]
        spelt = [token for token in self._own_tokens if any(token in text for text in texts)]
        if spelt:
            raise PromptError(f"the text spells {spelt[0]!r}, which the model's processor would read as its own token")
        if not self.is_chat:
            token = getattr(self.processor, "image_token", None)
            text = f"{token}{words}" if isinstance(token, str) and image is not None else words
            options: dict[str, Any] = {} if image is None else {"images": [image]}
            if wave is not None:
                options |= {"audio": [wave], "sampling_rate": self.spec.sampling_rate}
            return [_tensors(self.processor(text=[text], return_tensors="pt", **options))]
        media: list[Any] = [{"type": "image", "image": image}] if image is not None else []
        options = {}
        if request.video is not None and self.spec.video == "images":
            media += [{"type": "image", "image": Image.fromarray(frame)} for frame in request.video.frames]
        elif request.video is not None:
            media.append({"type": "video"})
            options = {"do_sample_frames": False, "video_metadata": [video_metadata(request.video)]}
        media += [{"type": "audio", "audio": wave}] if wave is not None else []
        turns = [(turn.role, turn.text) for turn in request.turns] or [("user", words)]
        messages: list[Any] = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        messages[-1]["content"] = [*media, *messages[-1]["content"]]
        if "video_metadata" not in options:
            inputs = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            return [_tensors(inputs)]
        assert request.video is not None
        images = {"images": [image]} if image is not None else {}
        audio = {"audio": [wave]} if wave is not None else {}
        [rendered] = [self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)]
        frames = [np.stack(_of_one_size(request.video.frames))]
        return [
            _tensors(self.processor(text=[rendered], videos=frames, return_tensors="pt", **images, **audio, **options))
        ]

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """Return one text per request."""
        prepared: list[list[Inputs]] = self.prepared(requests)
        parts = [(row, piece, inputs) for row, several in enumerate(prepared) for piece, inputs in enumerate(several)]
        done: dict[int, GeneratedTokens] = {}
        for positions in self._groups([inputs for *_, inputs in parts]):
            joined = self._join([parts[position][2] for position in positions])
            limit = self.spec.max_text_tokens
            if limit is not None and "input_ids" in joined and joined["input_ids"].shape[1] + decoding.limit > limit:
                raise LimitError(
                    f"a prompt of {joined['input_ids'].shape[1]:,} tokens and {decoding.limit} new ones; expected at "
                    f"most {limit:,} together"
                )
            if decoding.num_beams > 1:
                self._check_scores(joined)
            seeds = [(requests[parts[position][0]].seed + parts[position][1]) % 2**64 for position in positions]
            done.update(zip(positions, decode(self.model, joined, decoding, seeds), strict=True))
        texts: list[list[Generated]] = [[] for _ in requests]
        for position, (row, *_) in enumerate(parts):
            texts[row] += self.to_texts([done[position]])
        return [_joined(pieces) for pieces in texts]

    @torch.inference_mode()
    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        """Return the log-probability of each text given its request."""
        inputs: list[list[Inputs]] = self.prepared(requests)
        if any(len(pieces) > 1 for pieces in inputs):
            raise ModelError(f"{self.spec.directory}: texts of audio in several pieces cannot be scored")
        return [
            score(self.model, self._join(pieces), [text.token_ids])[0]
            for pieces, text in zip(inputs, texts, strict=True)
        ]

    def _check_scores(self, inputs: Inputs) -> None:
        """Raise ModelError if `score`, which beam search needs, disagrees with greedy decoding: once per model."""
        if self._has_scores:
            return
        rows = len(next(iter(inputs.values())))
        greedy = decode(self.model, inputs, Decoding(max_new_tokens=2), [0] * rows)
        try:
            scores = score(self.model, inputs, [tokens.token_ids for tokens in greedy])
        except (RuntimeError, ValueError, TypeError) as error:
            scores = [math.nan]
            logger.info("%s: texts cannot be scored: %s", self.spec.directory, error)
        if not all(
            math.isclose(left, tokens.logprob, rel_tol=0.02, abs_tol=0.02)
            for left, tokens in zip(scores, greedy, strict=False)
        ):
            raise ModelError(
                f"{self.spec.directory}: {type(self.model).__name__} cannot score its texts, which `num_beams` needs; "
                "use greedy decoding"
            )
        self._has_scores = True

    def _words(self, request: Request) -> str:
        """Return the prompt of a request that is not a dialogue."""
        if self.is_chat:
            return task_prompt(request)
        if request.prompt is not None:
            return request.prompt
        return request.text or PREFIXES.get(self.spec.family, "")

    def _resample(self, wave: Waveform, rate: int) -> Waveform:
        assert self.spec.sampling_rate is not None
        [resampled] = to_rate([wave], [rate], self.spec.sampling_rate, torch.device("cpu"))
        return resampled.numpy()

    def _groups(self, inputs: Sequence[Inputs]) -> list[list[int]]:
        """Return the positions of inputs that can share a batch: tensors of equal shapes with one row each."""
        groups: dict[Any, list[int]] = {}
        for position, values in enumerate(inputs):
            is_row = all(value.dim() > 0 and len(value) == 1 for value in values.values())
            shapes = tuple((name, value.shape) for name, value in sorted(values.items()))
            groups.setdefault(shapes if is_row else position, []).append(position)
        return list(groups.values())

    def _join(self, inputs: Sequence[Inputs]) -> Inputs:
        """Return the batch of inputs, on the device, with the arguments that the model takes."""
        names = {*inspect.signature(self.model.forward).parameters, *inspect.signature(self.model.generate).parameters}
        return {
            name: to_device(
                torch.cat([values[name] for values in inputs]).to(
                    self.dtype if value.is_floating_point() else value.dtype
                ),
                self.device,
            )
            for name, value in inputs[0].items()
            if name in names and name != "labels"
        }


def video_input(directory: Path, model_type: str) -> VideoInput:
    """Return what a model of this type receives of a video: by its processor, if that can be loaded."""
    try:
        processor = _read_processor(directory)
    except ModelError as error:  # its family reads its files one by one
        logger.info("%s", error)
        return "middle"
    if _template(processor) is None or model_type in SPEECH:
        return "middle"
    if getattr(processor, "video_processor", None) is not None:
        return "video"
    return "images" if model_type in SEVERAL_IMAGES else "middle"


def video_metadata(video: Video) -> dict[str, Any]:
    """Return what a video processor is told of the frames: their number, and the rate at which they were chosen."""
    count = len(video.frames)
    return {
        "total_num_frames": count,
        "fps": count / video.seconds,
        "frames_indices": list(range(count)),
        "duration": video.seconds,
        "width": video.size[0],
        "height": video.size[1],
    }


def _of_one_size(frames: Sequence[ImageHWC]) -> list[ImageHWC]:
    """Return frames of the size of the first; a video may change its size."""
    height, width = frames[0].shape[:2]
    same = [frame.shape == frames[0].shape for frame in frames]
    return [
        frame if is_same else np.asarray(Image.fromarray(frame).resize((width, height)))
        for frame, is_same in zip(frames, same, strict=True)
    ]


def _read_processor(directory: Path) -> Any:
    """Return the checkpoint's processor, whose images Pillow resizes. Raises ModelError."""
    quiet_transformers()
    auto: Any = AutoProcessor  # untyped
    try:
        processor = auto.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types
        raise ModelError(f"{directory}: its processor cannot be loaded: {type(error).__name__}: {error}") from error
    if not hasattr(processor, "tokenizer"):
        raise ModelError(
            f"{directory}: expected a processor with a tokenizer, found {type(processor).__name__}; copy the whole "
            "directory"
        )
    if getattr(processor, "image_processor", None) is not None:
        processor.image_processor = read_image_processor(directory)
    return processor


def _extractor(processor: Any) -> Any:
    """Return the feature extractor of a processor; None if it has none."""
    names = ("feature_extractor", "audio_processor")
    return next((part for name in names if (part := getattr(processor, name, None)) is not None), None)


def _template(processor: Any) -> Any:
    return getattr(processor, "chat_template", None)


def _tensors(inputs: Any) -> Inputs:
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def _joined(pieces: Sequence[Generated]) -> Generated:
    """Return the text of consecutive pieces of speech."""
    if len(pieces) == 1:
        return pieces[0]
    return replace(
        pieces[0],
        text=" ".join(piece.text for piece in pieces if piece.text),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        num_tokens=sum(piece.num_tokens for piece in pieces),
        logprob=math.fsum(piece.logprob for piece in pieces),
    )
