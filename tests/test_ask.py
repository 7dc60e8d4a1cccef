"""What a request holds for each task and prompt, and for which samples a text is due."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from tiny_generators import make_sample

from mmbeam.errors import PromptError, UsageError
from mmbeam.names import TASKS, Modality, Task
from mmbeam.prompts.ask import (
    NEW_TOKENS,
    Decoding,
    GeneratorSpec,
    Instruction,
    Request,
    make_output,
    make_request,
    prompt_fields,
    request_modalities,
    with_default_tokens,
)
from mmbeam.prompts.template import parse_template
from mmbeam.prompts.turns import Turn
from mmbeam.types import Audio, Sample

CHAT = GeneratorSpec(family="omni", directory="", modalities=("image", "audio", "text"), tasks=TASKS, takes_prompt=True)
VISION = replace(CHAT, modalities=("image", "text"))
CAPTIONER = replace(VISION, required=("image",), tasks=("caption",))
TEXT = replace(CHAT, modalities=("text",), required=("text",))
FUSION = GeneratorSpec(family="fusion", directory="", modalities=("image", "audio", "text"))
SPEECH = GeneratorSpec(family="asr", directory="", modalities=("audio",), required=("audio",), tasks=("transcribe",))
METADATA = '{"title": "A dog", "messages": [{"role": "user", "content": "what is it"}]}'


def sample(without: str = "", metadata: str | None = METADATA) -> Sample:
    return replace(make_sample(0, without), metadata=metadata)


def instruct(task: Task = "caption", prompt: str | None = None) -> Instruction:
    return Instruction(task=task, template=None if prompt is None else parse_template(prompt))


def held(request: Request) -> set[str]:
    return {name for name in ("image", "audio", "text", "prompt") if getattr(request, name) is not None}


@pytest.mark.parametrize(
    ("spec", "instruction", "complete", "without_audio", "text_only"),
    [
        (FUSION, instruct(), {"image", "audio", "text"}, {"image", "text"}, {"text"}),
        (SPEECH, instruct("transcribe"), {"audio"}, None, None),
        (CAPTIONER, instruct(), {"image"}, {"image"}, None),
        (CAPTIONER, instruct(prompt="a"), {"image", "prompt"}, {"image", "prompt"}, None),
        (CAPTIONER, instruct(prompt="{text}"), {"image", "prompt"}, {"image", "prompt"}, None),
        (CHAT, instruct(), {"image", "audio"}, {"image"}, None),
        (CHAT, instruct("transcribe"), {"audio"}, {"image"}, None),
        (CHAT, instruct("translate"), {"audio"}, {"text"}, {"text"}),
        (CHAT, instruct("summarize"), {"audio"}, {"text"}, {"text"}),
        (VISION, instruct("transcribe"), {"image"}, {"image"}, None),
        (VISION, instruct("translate"), {"text"}, {"text"}, {"text"}),
        (CHAT, instruct(prompt="what?"), {"image", "audio", "prompt"}, {"image", "prompt"}, None),
        (CHAT, instruct(prompt="{metadata[title]}"), {"image", "audio", "prompt"}, {"image", "prompt"}, {"prompt"}),
        (CHAT, instruct("dialogue"), {"image", "audio"}, {"image"}, set()),
        (TEXT, instruct(), {"text"}, {"text"}, {"text"}),
        (TEXT, instruct("summarize"), {"text"}, {"text"}, {"text"}),
        (TEXT, instruct(prompt="{text}"), {"prompt"}, {"prompt"}, {"prompt"}),
        (TEXT, instruct("dialogue"), set(), set(), set()),
    ],
)
def test_a_request_holds_the_inputs_of_its_task(
    spec: GeneratorSpec,
    instruction: Instruction,
    complete: set[str],
    without_audio: set[str] | None,
    text_only: set[str] | None,
) -> None:
    """None: no text is due for such a sample."""
    output = make_output(spec, instruction, ())
    for without, expected in (("", complete), ("audio", without_audio), ("image audio", text_only)):
        example = sample(without)
        assert output.is_due(example.present) == (expected is not None)
        if expected is not None:
            assert held(make_request(example, spec, instruction, 0)) == expected


def test_a_prompt_of_metadata_needs_no_modality() -> None:
    instruction = instruct(prompt="{metadata[title]}?")
    for spec in (TEXT, CHAT):
        assert make_output(spec, instruction, ()).is_due(frozenset())
        assert make_request(sample("image audio text"), spec, instruction, 0).prompt == "A dog?"


@pytest.mark.parametrize(
    ("spec", "instruction", "expected"),
    [
        (FUSION, instruct(), {"image", "audio", "text"}),
        (CHAT, instruct(), {"image", "audio"}),
        (CHAT, instruct(prompt="{text} {metadata[title]} {key}"), {"image", "audio", "text", "metadata"}),
        (TEXT, instruct(prompt="{metadata[title]}"), {"metadata"}),
        (VISION, instruct("dialogue"), {"image", "metadata"}),
    ],
)
def test_an_output_reads_the_media_and_the_fields_of_its_prompt(
    spec: GeneratorSpec, instruction: Instruction, expected: set[str]
) -> None:
    assert make_output(spec, instruction, ()).reads == expected


def test_a_prompt_is_filled_with_the_cleaned_text() -> None:
    cleaned = replace(sample(), text="<b>A</b>", text_clean="a")
    assert make_request(cleaned, TEXT, instruct(prompt="{text} {key}"), 0).prompt == "a 0"


def test_a_text_model_gets_the_prompt_only() -> None:
    request = make_request(sample(), TEXT, instruct(prompt="{metadata[title]}"), 3)
    assert request == Request(prompt="A dog", seed=3)


def test_the_instruction_is_in_each_request() -> None:
    instruction = Instruction(task="translate", language="de", source_language="fr")
    request = make_request(sample(), TEXT, instruction, 0)
    assert (request.task, request.language, request.source_language) == ("translate", "de", "fr")
    assert make_request(sample(), CHAT, instruct("dialogue"), 0).turns == (Turn("user", "what is it"),)


@pytest.mark.parametrize("metadata", [None, "{}", '{"title": null}', '{"title": NaN}', "[1]", "3"])
def test_a_sample_without_the_prompts_fields_raises(metadata: str | None) -> None:
    with pytest.raises(PromptError, match=r"no metadata\[title\]"):
        make_request(sample(metadata=metadata), TEXT, instruct(prompt="{metadata[title]}"), 0)
    with pytest.raises(PromptError, match="expected a list of turns"):
        make_request(sample(metadata=metadata), TEXT, instruct("dialogue"), 0)


def test_audio_decoded_for_its_length_only_counts_as_missing() -> None:
    known = replace(sample(), audio=Audio(waves={}, seconds=1.0))
    assert held(make_request(known, CHAT, instruct("translate"), 0)) == {"text"}
    marked = replace(known, metadata='{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}')
    with pytest.raises(PromptError, match="parts of type 'audio'"):
        make_request(marked, CHAT, instruct("dialogue"), 0)


def test_fields_are_those_of_the_prompt_or_of_the_dialogue() -> None:
    assert [str(field) for field in prompt_fields(instruct("dialogue"))] == ["metadata[messages]"]
    assert [str(field) for field in prompt_fields(instruct(prompt="{text}"))] == ["text"]
    assert prompt_fields(instruct("summarize")) == ()


@pytest.mark.parametrize(
    ("spec", "instruction", "modalities"),
    [(CHAT, instruct("translate"), ("audio", "text", "image")), (FUSION, instruct(), ("image", "audio", "text"))],
)
def test_modalities_are_in_order_of_preference(
    spec: GeneratorSpec, instruction: Instruction, modalities: Sequence[Modality]
) -> None:
    assert request_modalities(spec, instruction) == modalities


@pytest.mark.parametrize("task", TASKS)
def test_the_default_of_new_tokens_is_the_tasks_within_the_models_limit(task: Task) -> None:
    assert with_default_tokens(Decoding(), CHAT, instruct(task)).limit == NEW_TOKENS[task]
    short = replace(CHAT, max_new_tokens=32)
    assert with_default_tokens(Decoding(), short, instruct(task)).limit == 32
    assert with_default_tokens(Decoding(max_new_tokens=5, num_beams=2), short, instruct(task)) == Decoding(
        max_new_tokens=5, num_beams=2
    )
    with pytest.raises(UsageError, match="expected at most 32"):
        with_default_tokens(Decoding(max_new_tokens=33), short, instruct(task))
