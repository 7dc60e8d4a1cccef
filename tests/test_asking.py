"""What is taken of a sample for each task and prompt, and for which samples a text is due."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from tiny_generators import make_sample

from mmbeam.config import TASKS, Task
from mmbeam.errors import PromptError, UsageError
from mmbeam.models.generators.base import NEW_TOKENS, Decoding, GeneratorSpec, Request, Wanted
from mmbeam.prompts.template import parse_template
from mmbeam.prompts.turns import Turn
from mmbeam.stages.asking import fields_of, output_of, request_of, settled, taken
from mmbeam.types import Audio, Modality, Sample

CHAT = GeneratorSpec(family="omni", directory="", modalities=("image", "audio", "text"), tasks=TASKS, takes_prompt=True)
SEES = replace(CHAT, modalities=("image", "text"))
CAPTIONER = replace(SEES, required=("image",), tasks=("caption",))
READS = replace(CHAT, modalities=("text",), required=("text",))
FUSION = GeneratorSpec(family="fusion", directory="", modalities=("image", "audio", "text"))
HEARS = GeneratorSpec(family="whisper", directory="", modalities=("audio",), required=("audio",), tasks=("transcribe",))
METADATA = '{"title": "A dog", "messages": [{"role": "user", "content": "what is it"}]}'


def sample(without: str = "", metadata: str | None = METADATA) -> Sample:
    return replace(make_sample(0, without), metadata=metadata)


def wanted(task: Task = "caption", prompt: str | None = None) -> Wanted:
    return Wanted(task=task, prompt=None if prompt is None else parse_template(prompt))


def held(request: Request) -> set[str]:
    return {name for name in ("image", "audio", "text", "prompt") if getattr(request, name) is not None}


@pytest.mark.parametrize(
    ("spec", "asked", "of_all", "without_sound", "of_text_alone"),
    [
        (FUSION, wanted(), {"image", "audio", "text"}, {"image", "text"}, {"text"}),
        (HEARS, wanted("transcribe"), {"audio"}, None, None),
        (CAPTIONER, wanted(), {"image"}, {"image"}, None),
        (CAPTIONER, wanted(prompt="a"), {"image", "prompt"}, {"image", "prompt"}, None),
        (CAPTIONER, wanted(prompt="{text}"), {"image", "prompt"}, {"image", "prompt"}, None),
        (CHAT, wanted(), {"image", "audio"}, {"image"}, None),
        (CHAT, wanted("transcribe"), {"audio"}, {"image"}, None),
        (CHAT, wanted("translate"), {"audio"}, {"text"}, {"text"}),
        (CHAT, wanted("summarize"), {"audio"}, {"text"}, {"text"}),
        (SEES, wanted("transcribe"), {"image"}, {"image"}, None),
        (SEES, wanted("translate"), {"text"}, {"text"}, {"text"}),
        (CHAT, wanted(prompt="what?"), {"image", "audio", "prompt"}, {"image", "prompt"}, None),
        (CHAT, wanted(prompt="{metadata[title]}"), {"image", "audio", "prompt"}, {"image", "prompt"}, {"prompt"}),
        (CHAT, wanted("dialogue"), {"image", "audio"}, {"image"}, set()),
        (READS, wanted(), {"text"}, {"text"}, {"text"}),
        (READS, wanted("summarize"), {"text"}, {"text"}, {"text"}),
        (READS, wanted(prompt="{text}"), {"prompt"}, {"prompt"}, {"prompt"}),
        (READS, wanted("dialogue"), set(), set(), set()),
    ],
)
def test_what_goes_into_a_request(
    spec: GeneratorSpec, asked: Wanted, of_all: set[str], without_sound: set[str] | None, of_text_alone: set[str] | None
) -> None:
    """None: no text is due."""
    output = output_of(spec, asked, ())
    for without, expected in (("", of_all), ("audio", without_sound), ("image audio", of_text_alone)):
        found = sample(without)
        assert output.due(found.present) == (expected is not None)
        if expected is not None:
            assert held(request_of(found, spec, asked, 0)) == expected


def test_a_prompt_of_metadata_needs_no_modality_at_all() -> None:
    asked = wanted(prompt="{metadata[title]}?")
    for spec in (READS, CHAT):
        assert output_of(spec, asked, ()).due(frozenset())
        assert request_of(sample("image audio text"), spec, asked, 0).prompt == "A dog?"


@pytest.mark.parametrize(
    ("spec", "asked", "expected"),
    [
        (FUSION, wanted(), {"image", "audio", "text"}),
        (CHAT, wanted(), {"image", "audio"}),
        (CHAT, wanted(prompt="{text} {metadata[title]} {key}"), {"image", "audio", "text", "metadata"}),
        (READS, wanted(prompt="{metadata[title]}"), {"metadata"}),
        (SEES, wanted("dialogue"), {"image", "metadata"}),
    ],
)
def test_what_a_text_is_made_of_costs_it_when_it_cannot_be_read(
    spec: GeneratorSpec, asked: Wanted, expected: set[str]
) -> None:
    assert output_of(spec, asked, ()).reads == expected


def test_the_cleaned_text_is_what_a_prompt_names() -> None:
    cleaned = replace(sample(), text="<b>A</b>", text_clean="a")
    assert request_of(cleaned, READS, wanted(prompt="{text} {key}"), 0).prompt == "a 0"


def test_only_what_the_prompt_names_goes_with_it() -> None:
    request = request_of(sample(), READS, wanted(prompt="{metadata[title]}"), 3)
    assert request == Request(prompt="A dog", seed=3)


def test_what_is_asked_goes_with_each_request() -> None:
    asked = Wanted(task="translate", language="de", source_language="fr")
    request = request_of(sample(), READS, asked, 0)
    assert (request.task, request.language, request.source_language) == ("translate", "de", "fr")
    assert request_of(sample(), CHAT, wanted("dialogue"), 0).turns == (Turn("user", "what is it"),)


@pytest.mark.parametrize("metadata", [None, "{}", '{"title": null}', '{"title": NaN}', "[1]", "3"])
def test_a_sample_that_lacks_what_the_prompt_names_is_told(metadata: str | None) -> None:
    with pytest.raises(PromptError, match=r"has no metadata\[title\]"):
        request_of(sample(metadata=metadata), READS, wanted(prompt="{metadata[title]}"), 0)
    with pytest.raises(PromptError, match="expected a list of turns"):
        request_of(sample(metadata=metadata), READS, wanted("dialogue"), 0)


def test_a_sound_whose_length_alone_is_known_is_none() -> None:
    known = replace(sample(), audio=Audio(waves={}, seconds=1.0))
    assert held(request_of(known, CHAT, wanted("translate"), 0)) == {"text"}
    marked = replace(known, metadata='{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}')
    with pytest.raises(PromptError, match="parts of type 'audio'"):
        request_of(marked, CHAT, wanted("dialogue"), 0)


def test_fields_are_those_of_the_prompt_or_the_turns() -> None:
    assert [str(field) for field in fields_of(wanted("dialogue"))] == ["metadata[messages]"]
    assert [str(field) for field in fields_of(wanted(prompt="{text}"))] == ["text"]
    assert fields_of(wanted("summarize")) == ()


@pytest.mark.parametrize(
    ("spec", "asked", "modalities"),
    [(CHAT, wanted("translate"), ("audio", "text", "image")), (FUSION, wanted(), ("image", "audio", "text"))],
)
def test_the_order_of_preference(spec: GeneratorSpec, asked: Wanted, modalities: Sequence[Modality]) -> None:
    assert taken(spec, asked) == modalities


@pytest.mark.parametrize("task", TASKS)
def test_the_number_of_new_tokens_is_the_tasks_or_the_most_there_are(task: Task) -> None:
    assert settled(Decoding(), CHAT, wanted(task)).limit == NEW_TOKENS[task]
    short = replace(CHAT, max_new_tokens=32)
    assert settled(Decoding(), short, wanted(task)).limit == 32
    assert settled(Decoding(max_new_tokens=5, num_beams=2), short, wanted(task)) == Decoding(
        max_new_tokens=5, num_beams=2
    )
    with pytest.raises(UsageError, match="writes at most 32"):
        settled(Decoding(max_new_tokens=33), short, wanted(task))
