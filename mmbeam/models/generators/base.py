"""What a generator is, to the stage that runs it and to whoever adds a family.

A family is one module with a subclass of Generator. `describe` reads configuration files only, at launch,
without weights; `load` reads the weights, once per process and device. `generate` gets requests that fit
one batch. It knows nothing of windows, order, failures or memory: the generate stage does that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmbeam.config import Task
from mmbeam.errors import UsageError
from mmbeam.prompts.template import Template
from mmbeam.prompts.turns import Turn
from mmbeam.types import Feature, FeatureColumn, ImageHWC, Modality, Waveform

# Tokens that hold the texts of a task, but for the longest ones, which are cut: a transcript of several minutes.
NEW_TOKENS: Mapping[Task, int] = {
    "caption": 64,
    "transcribe": 1024,
    "translate": 256,
    "summarize": 128,
    "dialogue": 256,
}


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """What is known of a generator from its configuration files alone."""

    family: str  # config.model_type: "mmbeam-fusion", "whisper", ...
    directory: str  # local directory of configuration, weights and processor files
    modalities: tuple[Modality, ...]  # what it takes of a sample; any of them may be missing, but for
    required: tuple[Modality, ...] = ()  # those without which it has nothing to say
    tasks: tuple[Task, ...] = ("caption",)  # what it can be asked for; the first is what it is for
    takes_prompt: bool = False  # whether it can be asked in the user's words
    sampling_rate: int | None = None  # Hz, for audio
    image_side: int | None = None  # pixels: the shorter side its preprocessing resizes to
    max_text_tokens: int | None = None
    max_new_tokens: int | None = None  # the longest text it can write; None: any
    columns: tuple[FeatureColumn, ...] = ()  # features that it takes in place of the media of their modalities
    embedding_dim: int | None = None  # of its shared space, if it has one


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen: greedily, by beam search, or at random. Part of the fingerprint."""

    max_new_tokens: int | None = None  # None: as many as the task usually takes, settled by generate_stage
    num_beams: int = 1
    temperature: float | None = None  # None: no chance; sampling goes with num_beams = 1
    top_p: float = 1.0  # sampling: the most likely tokens that make up this much
    seed: int = 0  # of sampling; each sample has a random stream of its own, of this and of its identity

    @property
    def samples(self) -> bool:
        """Whether chance is in it."""
        return self.temperature is not None

    @property
    def limit(self) -> int:
        """The most new tokens of a text, or of a window of one."""
        return NEW_TOKENS["caption"] if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a job asks of a model for every sample."""

    task: Task = "caption"
    prompt: Template | None = None  # None: the task's own way to ask
    language: str | None = None  # see Request
    source_language: str | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one text is made from. What a sample lacks is None, and is masked."""

    image: ImageHWC | None = None
    audio: tuple[Waveform, int] | None = None  # and its sampling rate in Hz
    text: str | None = None  # the sample's: what is translated, summarized, gone on from
    prompt: str | None = None  # what the user asks, with the sample's own words in it; None: what the task says
    turns: tuple[Turn, ...] = ()  # of a dialogue, the last one the user's, which holds the picture and the sound
    features: Mapping[str, Feature] = field(default_factory=dict)  # by column; absent where the sample has none
    seed: int = 0  # of its random stream: 64 bits
    task: Task = "caption"
    language: str | None = None  # of the text that is wanted: "German", "de", or as the model names it
    source_language: str | None = None  # of the text that is translated

    @property
    def words(self) -> str:
        """What is asked in words, for a family whose tasks need none: the prompt, or else the text."""
        return self.text or "" if self.prompt is None else self.prompt

    def without(self, modality: Modality, columns: Mapping[str, Modality]) -> "Request":
        """The request with a modality masked, and with it the features that `columns` says are of it."""
        kept = {name: value for name, value in self.features.items() if columns.get(name) != modality}
        masked: dict[str, Any] = {modality: None}
        return replace(self, **masked, features=kept)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One text that came out."""

    text: str
    token_ids: tuple[int, ...]  # as generated, the end-of-text token included where it came
    num_tokens: int  # without the end-of-text token
    logprob: float  # sum over token_ids of their log-probability under the model, whatever the decoding did to it


class Generator:
    """A loaded model on one device. Subclasses override all but what they cannot do."""

    model_types: ClassVar[tuple[str, ...]] = ()  # the config.model_type values that this family serves
    schedules: ClassVar[bool] = False  # whether it makes batches by itself, and is given a window at once

    def __init__(self, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> GeneratorSpec:
        """Read configuration and processor files; raise ModelError naming what is missing."""
        raise NotImplementedError

    @classmethod
    def check(cls, spec: GeneratorSpec, wanted: Wanted) -> None:
        """Raise UsageError for languages that the model cannot be asked for. Of task and prompt `spec` says enough."""
        for option, language in (("language", wanted.language), ("source-language", wanted.source_language)):
            if language is not None:
                raise UsageError(f"--{option} {language}: a {spec.family} takes none; leave it out")

    @classmethod
    def load(cls, spec: GeneratorSpec, device: torch.device, dtype: torch.dtype) -> "Generator":
        """Load the weights (safetensors only) onto `device`, in eval mode."""
        raise NotImplementedError

    def weigh(self, requests: Sequence[Request]) -> list[int]:
        """The tokens that each request is to the model, media included: what batches are ordered and limited by.

        May raise for a request that cannot be answered; it is then weighed by itself, and fails when its turn comes.
        """
        raise NotImplementedError

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, not truncated, special tokens not counted."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        """One text per request, in order. A batch gives what each request alone would give."""
        raise NotImplementedError

    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        """The log-probability of each text, given its request: `Generated.logprob` of that text, had it come out.

        A family that cannot do so raises ModelError; `--explain` is not for it.
        """
        raise NotImplementedError
