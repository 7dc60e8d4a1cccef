"""The instruction of a job to a generator, and the request that is made of each sample.

A prompt or a dialogue is sent with all images and audio that the model takes. A task without a prompt is about
what the sample holds: a caption is about all of its media, any other task about the first modality present.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa

from mmbeam.clean.where import SampleValues
from mmbeam.errors import UsageError
from mmbeam.names import Kind, Modality, Task
from mmbeam.prompts.template import PromptField, Template, parse_template
from mmbeam.prompts.turns import MESSAGES, Turn, parse_turns
from mmbeam.types import Feature, FeatureColumn, ImageHWC, Output, Sample, Video, Waveform

# Default limit of new tokens per task. Only the longest texts are cut, such as a transcript of several minutes.
NEW_TOKENS: Mapping[Task, int] = {
    "caption": 64,
    "transcribe": 1024,
    "translate": 256,
    "summarize": 128,
    "dialogue": 256,
}
# The modalities that a task without a prompt is about, in order of preference.
ABOUT: Mapping[Task, tuple[Modality, ...]] = {
    "caption": ("image", "video", "audio"),
    "transcribe": ("audio", "image"),
    "translate": ("audio", "text", "image"),
    "summarize": ("audio", "text", "image"),
}


VideoInput = Literal["video", "images", "middle"]


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """A generator as its configuration files describe it, without its weights."""

    family: str  # config.model_type: "mmbeam-fusion", "whisper", ...
    directory: str  # local directory of configuration, weights and processor files
    modalities: tuple[Modality, ...]  # inputs of the model; a sample may lack any that is not required
    required: tuple[Modality, ...] = ()  # inputs without which the model cannot write a text
    tasks: tuple[Task, ...] = ("caption",)  # supported tasks; the first is the default
    takes_prompt: bool = False  # whether the model reads a prompt in the user's words
    sampling_rate: int | None = None  # Hz, of audio
    image_side: int | None = None  # pixels: the shorter side that preprocessing resizes to
    max_text_tokens: int | None = None
    max_new_tokens: int | None = None  # the longest text that the model writes; None: unlimited
    # What the model receives of a video: it itself, its frames as several images, or its middle frame.
    video: VideoInput | None = None  # None: nothing
    columns: tuple[FeatureColumn, ...] = ()  # features that replace the media of their modalities
    embedding_dim: int | None = None  # of the shared space, if the model has one
    only_greedy: bool = False  # without beams, sampling and scores of given texts
    notes: tuple[str, ...] = ()  # what the summary says of the model, such as slower preprocessing
    # Further columns about a text, by the end of their names. Only a Whisper has them, and only it can be `robust`.
    details: tuple[tuple[str, pa.DataType], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen: greedy decoding, beam search or sampling. Part of the run's fingerprint."""

    max_new_tokens: int | None = None  # None: the task's default, see with_default_tokens
    num_beams: int = 1  # above 1: beam search
    temperature: float | None = None  # None: no sampling
    top_p: float = 1.0  # nucleus sampling: total probability of the tokens to draw from
    seed: int = 0  # of sampling; each sample has its own random stream, see stages.base.stream_seed
    robust: bool = False  # of Whisper: fall back to higher temperatures, and leave out windows without speech
    word_timestamps: bool = False  # of Whisper: also the times of words

    @property
    def is_sampled(self) -> bool:
        """Whether tokens are sampled."""
        return self.temperature is not None

    @property
    def limit(self) -> int:
        """The maximum number of new tokens of a text; of a Whisper, of each window."""
        return NEW_TOKENS["caption"] if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """The task, prompt and languages of a job, the same for every sample."""

    task: Task = "caption"
    template: Template | None = None  # of the prompt; None: the task's own prompt
    language: str | None = None  # see Request
    source_language: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """The input of one text. A modality that the sample lacks is None, and is masked."""

    image: ImageHWC | None = None
    audio: tuple[Waveform, int] | None = None  # waveform and sampling rate in Hz
    video: Video | None = None  # its frames, for GeneratorSpec.video "video" or "images"
    text: str | None = None  # the sample's text, which is translated, summarized or continued
    prompt: str | None = None  # the filled-in template; None: the task's own prompt
    turns: tuple[Turn, ...] = ()  # of a dialogue; the last is the user's, with the image and the audio
    features: Mapping[str, Feature] = field(default_factory=dict)  # by column; absent if the sample has none
    seed: int = 0  # of the sample's random stream: 64 bits
    task: Task = "caption"
    language: str | None = None  # of the text to write: "German", "de", or the model's own name for it
    source_language: str | None = None  # of the text to translate
    encoded: Any = field(default=None, compare=False, repr=False)  # what Generator.encode makes of it

    @property
    def words(self) -> str:
        """The prompt, or else the text: the words that a model without task prompts reads."""
        return self.text or "" if self.prompt is None else self.prompt

    def without(self, modality: Modality, columns: Mapping[str, Modality]) -> "Request":
        """Return the request with a modality masked, and its features; `columns` maps features to modalities."""
        features = {name: value for name, value in self.features.items() if columns.get(name) != modality}
        masked: dict[str, Any] = {modality: None}
        return replace(self, **masked, features=features, encoded=None)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One generated text."""

    text: str
    token_ids: tuple[int, ...]  # as generated, an end-of-text token included
    num_tokens: int  # without the end-of-text token
    logprob: float  # sum of the log-probabilities of token_ids under the model, before temperature or top-p
    details: Mapping[str, Any] = field(default_factory=dict)  # values of GeneratorSpec.details


def make_instruction(
    spec: GeneratorSpec,
    task: Task | None = None,
    prompt: str | None = None,
    language: str | None = None,
    source_language: str | None = None,
) -> Instruction:
    """Return the instruction for a model; `task` defaults to the model's first task that fits.

    Raises UsageError for a task or a prompt that the model does not support. Languages are checked by
    models.generators.check_instruction, which needs the model's tokenizer.
    """
    template = None if prompt is None else parse_template(prompt)
    supported = [name for name in spec.tasks if template is None or name != "dialogue"]
    if template is not None and not (spec.takes_prompt and supported):
        raise UsageError(f"`prompt`: {spec.family} has no prompt option; its tasks are {', '.join(spec.tasks)}")
    task = supported[0] if task is None else task
    if task not in spec.tasks:
        raise UsageError(f"`task` {task}: expected one that {spec.family} supports: {', '.join(spec.tasks)}")
    if template is not None and task == "dialogue":
        raise UsageError(
            f"`prompt`: a dialogue takes its turns from {{{MESSAGES}}}; pass either `prompt` or `task` dialogue"
        )
    if template is not None and not template.fields and spec.modalities == ("text",):
        raise UsageError(
            "`prompt`: the model reads text only, and this prompt has no field, so every sample would get the same "
            "prompt; use {text} or {metadata[name]}"
        )
    return Instruction(task=task, template=template, language=language, source_language=source_language)


def with_default_tokens(decoding: Decoding, spec: GeneratorSpec, instruction: Instruction) -> Decoding:
    """Return `decoding` with the task's default of new tokens, unless it names a number.

    Raises UsageError for invalid or contradictory options, and for more tokens than the model writes.
    """
    if decoding.limit < 1 or decoding.num_beams < 1:
        raise UsageError(f"`max_new_tokens` and `num_beams`: expected at least 1, found {decoding}")
    if decoding.is_sampled and decoding.num_beams > 1:
        raise UsageError("`temperature` and `num_beams` are mutually exclusive: sampling, or beam search")
    if decoding.temperature is not None and not 0 < decoding.temperature < math.inf:
        raise UsageError(
            f"`temperature` {decoding.temperature}: expected a number above 0; omit it for greedy decoding"
        )
    if not 0 < decoding.top_p <= 1 or (decoding.top_p < 1 and not decoding.is_sampled):
        raise UsageError(f"`top_p` {decoding.top_p}: expected a number above 0 and at most 1, with `temperature`")
    if spec.only_greedy and (decoding.num_beams > 1 or decoding.is_sampled):
        name = "num_beams" if decoding.num_beams > 1 else "temperature"
        raise UsageError(f"`{name}`: {spec.family} takes the most likely token of each frame (CTC); omit it")
    for name in ("robust", "word_timestamps"):
        if getattr(decoding, name) and not spec.details:
            raise UsageError(f"`{name}`: only for Whisper; {spec.family} has no such option")
    if decoding.robust and decoding.is_sampled:
        raise UsageError("`robust` and `temperature` are mutually exclusive: `robust` chooses the temperatures")
    longest = spec.max_new_tokens
    if decoding.max_new_tokens is None:
        default = NEW_TOKENS[instruction.task]
        return replace(decoding, max_new_tokens=default if longest is None else min(default, longest))
    if longest is not None and decoding.max_new_tokens > longest:
        raise UsageError(f"`max_new_tokens` {decoding.max_new_tokens}: expected at most {longest}, the model's limit")
    return decoding


def prompt_fields(instruction: Instruction) -> tuple[PromptField, ...]:
    """Return the fields of a sample, besides its media, that the prompt or the dialogue is made of."""
    if instruction.task == "dialogue":
        return (MESSAGES,)
    return () if instruction.template is None else instruction.template.fields


def request_modalities(spec: GeneratorSpec, instruction: Instruction) -> tuple[Modality, ...]:
    """Return the modalities of a request, besides the prompt's fields, in order of preference."""
    if instruction.template is not None or instruction.task == "dialogue":
        return tuple(modality for modality in spec.modalities if modality != "text")
    if not spec.takes_prompt:
        return spec.modalities
    return tuple(modality for modality in ABOUT[instruction.task] if modality in spec.modalities) or spec.modalities


def make_output(spec: GeneratorSpec, instruction: Instruction, columns: tuple[pa.Field, ...]) -> Output:
    """Return the output that holds the generated text.

    With a prompt that names fields, and in a dialogue, the text is due for every sample that has the required media;
    a sample that lacks a field is a failure.
    """
    media = frozenset(request_modalities(spec, instruction))
    fields = {field.name for field in prompt_fields(instruction)}
    has_words = instruction.template is not None or instruction.task == "dialogue"  # then the sample's text is optional
    kinds: tuple[Kind, ...] = ("text", "metadata")
    required = frozenset(spec.required) - ({"text"} if has_words else set())
    image_or_video: frozenset[Modality] = frozenset()
    if "image" in required and "video" in media:
        image_or_video = frozenset({"image", "video"})
    return Output(
        modalities=image_or_video or (frozenset() if fields else media),
        columns=columns,
        required=required - image_or_video,
        reads=media.union(kind for kind in kinds if kind in fields),
    )


def make_request(sample: Sample, spec: GeneratorSpec, instruction: Instruction, seed: int) -> Request:
    """Return the request for a sample. Raises PromptError if a field of the prompt, or a valid dialogue, is missing."""
    present = [modality for modality in request_modalities(spec, instruction) if sample.has(modality)]
    if sample.audio is not None and not sample.audio.waves and "audio" in present:  # decoded for its length only
        present.remove("audio")
    if spec.takes_prompt and instruction.template is None and instruction.task not in ("caption", "dialogue"):
        present = present[:1]
    values = SampleValues(sample)
    image, video = sample.image if "image" in present else None, sample.video if "video" in present else None
    if video is not None and spec.video == "middle":
        present = [modality for modality in present if modality != "video"]
        image, video = (video.frames[len(video.frames) // 2] if image is None else image), None
        present += ["image"] if "image" not in present else []
    return Request(
        image=image,
        video=video,
        audio=sample.audio.at(spec.sampling_rate) if sample.audio is not None and "audio" in present else None,
        text=sample.model_text if "text" in present else None,
        prompt=None if instruction.template is None else instruction.template.fill(values),
        turns=parse_turns(MESSAGES.value_in(values), present) if instruction.task == "dialogue" else (),
        features=sample.features,
        seed=seed,
        task=instruction.task,
        language=instruction.language,
        source_language=instruction.source_language,
    )
