"""What a job asks of a model, settled at launch; and what it takes of a sample to ask it.

A prompt, or a dialogue, is asked with every picture and sound that the model takes. A task without one is about
what the model reads: a caption about all of the sample's media, any other task about one thing.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from mmbeam.clean.select import SampleValues
from mmbeam.config import Task
from mmbeam.errors import UsageError
from mmbeam.models.generators import check_languages
from mmbeam.models.generators.base import NEW_TOKENS, Decoding, GeneratorSpec, Request, Wanted
from mmbeam.prompts.template import Field, parse_template
from mmbeam.prompts.turns import MESSAGES, parse_turns
from mmbeam.stages.common import wave_of
from mmbeam.types import Kind, Modality, Output, Sample

# What a task is about, of what a model with prompts takes: of a caption all, of another the first that is there.
ABOUT: Mapping[Task, tuple[Modality, ...]] = {
    "caption": ("image", "audio"),
    "transcribe": ("audio", "image"),
    "translate": ("audio", "text", "image"),
    "summarize": ("audio", "text", "image"),
}


def wanted_of(
    spec: GeneratorSpec,
    task: Task | None = None,
    prompt: str | None = None,
    language: str | None = None,
    source_language: str | None = None,
) -> Wanted:
    """What is asked of the model; without a task what the model is for. Raises UsageError for what it cannot do."""
    template = None if prompt is None else parse_template(prompt)
    asked = [each for each in spec.tasks if template is None or each != "dialogue"]
    if template is not None and not (spec.takes_prompt and asked):
        raise UsageError(f"--prompt: a {spec.family} reads none; it can be asked to {_list(spec)} by --task")
    task = asked[0] if task is None else task
    if task not in spec.tasks:
        raise UsageError(f"--task {task}: a {spec.family} can {_list(spec)}")
    if template is not None and task == "dialogue":
        raise UsageError(f"--prompt: a dialogue's turns are those of {{{MESSAGES}}}; leave out --prompt or --task")
    if template is not None and not template.fields and spec.modalities == ("text",):
        raise UsageError("--prompt: it would be the same for every sample; put {text} into it, or {metadata[name]}")
    wanted = Wanted(task=task, prompt=template, language=language, source_language=source_language)
    check_languages(spec, wanted)
    return wanted


def _list(spec: GeneratorSpec) -> str:
    return " or ".join(spec.tasks)


def settled(decoding: Decoding, spec: GeneratorSpec, wanted: Wanted) -> Decoding:
    """With the task's number of new tokens, if none is given.

    Raises UsageError for more than the model writes, and for options that contradict each other or make no sense.
    """
    _check_decoding(decoding)
    most = spec.max_new_tokens
    if decoding.max_new_tokens is None:
        usual = NEW_TOKENS[wanted.task]
        return replace(decoding, max_new_tokens=usual if most is None else min(usual, most))
    if most is not None and decoding.max_new_tokens > most:
        raise UsageError(f"--max-new-tokens {decoding.max_new_tokens}: a {spec.family} like this writes at most {most}")
    return decoding


def _check_decoding(decoding: Decoding) -> None:
    if decoding.limit < 1 or decoding.num_beams < 1:
        raise UsageError(f"--max-new-tokens and --num-beams: expected at least 1, found {decoding}")
    if decoding.samples and decoding.num_beams > 1:
        raise UsageError("--temperature goes with sampling, --num-beams with a search that knows no chance: give one")
    if decoding.temperature is not None and not 0 < decoding.temperature < math.inf:
        raise UsageError(f"--temperature {decoding.temperature}: expected a number above 0; leave it out for no chance")
    if not 0 < decoding.top_p <= 1 or (decoding.top_p < 1 and not decoding.samples):
        raise UsageError(f"--top-p {decoding.top_p}: expected a number above 0 and at most 1, with --temperature")


def fields_of(wanted: Wanted) -> tuple[Field, ...]:
    """What every sample must have beside its media: the fields of the prompt, the turns of the dialogue."""
    if wanted.task == "dialogue":
        return (MESSAGES,)
    return () if wanted.prompt is None else wanted.prompt.fields


def taken(spec: GeneratorSpec, wanted: Wanted) -> tuple[Modality, ...]:
    """The modalities that requests are made of, beside the prompt's fields; where only one is, it is the first."""
    if wanted.prompt is not None or wanted.task == "dialogue":
        return tuple(modality for modality in spec.modalities if modality != "text")
    if not spec.takes_prompt:
        return spec.modalities
    return tuple(modality for modality in ABOUT[wanted.task] if modality in spec.modalities) or spec.modalities


def output_of(spec: GeneratorSpec, wanted: Wanted, columns: tuple[pa.Field, ...]) -> Output:
    """The text that is wanted.

    With a prompt of fields, and in a dialogue, it is due for every sample that has the media which the model cannot
    do without: one that lacks a field is a failure.
    """
    media, fields = frozenset(taken(spec, wanted)), {field.name for field in fields_of(wanted)}
    in_words = wanted.prompt is not None or wanted.task == "dialogue"  # then no text of its own is needed
    kinds: tuple[Kind, ...] = ("text", "metadata")
    return Output(
        modalities=frozenset() if fields else media,
        columns=columns,
        required=frozenset(spec.required) - ({"text"} if in_words else set()),
        reads=media.union(kind for kind in kinds if kind in fields),
    )


def request_of(sample: Sample, spec: GeneratorSpec, wanted: Wanted, seed: int) -> Request:
    """What the model is asked for a sample. Raises PromptError if it lacks what the prompt names, or its turns."""
    held = _held(sample, spec, wanted)
    values = SampleValues(sample)
    media: dict[str, Any] = {}
    if sample.audio is not None and "audio" in held:
        media["audio"] = wave_of(sample.audio, spec.sampling_rate)
    if wanted.prompt is not None:
        media["prompt"] = wanted.prompt.fill(values)
    if wanted.task == "dialogue":
        media["turns"] = parse_turns(MESSAGES.of(values), held)
    return Request(
        image=sample.image if "image" in held else None,
        text=sample.model_text if "text" in held else None,
        features=sample.features,
        seed=seed,
        task=wanted.task,
        language=wanted.language,
        source_language=wanted.source_language,
        **media,
    )


def _held(sample: Sample, spec: GeneratorSpec, wanted: Wanted) -> list[Modality]:
    """What of the sample goes into the request."""
    held = [modality for modality in taken(spec, wanted) if sample.has(modality)]
    if sample.audio is not None and not sample.audio.waves and "audio" in held:  # its length alone is known
        held.remove("audio")
    alone = spec.takes_prompt and wanted.prompt is None and wanted.task not in ("caption", "dialogue")
    return held[:1] if alone else held
