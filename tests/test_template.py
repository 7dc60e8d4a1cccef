"""Prompt templates: what they say, what they refuse, and that nothing of a sample is read as one."""

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmbeam.errors import PromptError, UsageError
from mmbeam.prompts.template import Field, Template, names_in, parse_template

METADATA = {"title": "A dog", "tags": ["one", "two"], "a": {"b": {"c": 3}}, "0": "zero", "no": None, "yes": True}
VALUES = {"text": "words", "key": "k-1", "metadata": METADATA}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("What is it?", "What is it?"),
        ("{text}", "words"),
        ("{key}: {metadata[title]}.", "k-1: A dog."),
        ("{metadata[a][b][c]} {metadata[yes]}", "3 true"),
        ("{metadata[tags]}, {metadata[tags][1]}", '["one", "two"], two'),
        ("{metadata[0]}", "zero"),
        ("{metadata[a]}", '{"b": {"c": 3}}'),
        ("{{text}} {{{text}}} }}", "{text} {words} }"),
        ("{metadata[tags]}", '["one", "two"]'),
    ],
)
def test_fields_are_put_in(template: str, expected: str) -> None:
    assert parse_template(template).fill(VALUES) == expected


def test_it_says_which_fields_it_takes_each_once() -> None:
    fields = parse_template("{text} {metadata[a][b]} {text}").fields
    assert fields == (Field("text"), Field("metadata", ("a", "b")))
    assert str(fields[1]) == "metadata[a][b]"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "found nothing"),
        (" \n", "found nothing"),
        ("a {text", "column 3: a single brace"),
        ("a } b", "column 3: a single brace"),
        ("{ {text}}", "column 1: a single brace"),
        ("{}", "expected {text}, {key} or {metadata"),
        ("{title}", "found {title}"),
        ("{text!r}", "found {text!r}"),
        ("{text:>10}", "found {text:>10}"),
        ("{text.__class__}", "found {text.__class__}"),
        ("{metadata[a].__class__}", "found"),
        ("{metadata[a][}", "found"),
        ("{metadata[]}", "found"),
        ("{metadata['title']}", "without quotes"),
        ("{text[0]}", "{text} has no entries"),
        ("{ text }", "found { text }"),
    ],
)
def test_anything_but_plain_fields_is_refused_with_its_place(template: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_template(template)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "template", ["{metadata[nothing]}", "{metadata[no]}", "{metadata[tags][2]}", "{metadata[title][x]}"]
)
def test_a_sample_without_the_field_is_a_failure_that_names_it(template: str) -> None:
    with pytest.raises(PromptError, match=r"has no metadata\[.*--where \"metadata\[.*is not None\" leaves"):
        parse_template(f"a {template}").fill(VALUES)


def test_no_metadata_and_no_text_are_lacking_too() -> None:
    for template, name in (("{metadata[title]}", "metadata"), ("{text}", "text"), ("{metadata}", "metadata")):
        with pytest.raises(PromptError, match=name):
            parse_template(template).fill({"text": None, "key": "k", "metadata": None})


def test_a_prompt_of_nothing_but_space_is_a_failure() -> None:
    with pytest.raises(PromptError, match="prompt is empty: text"):
        parse_template(" {text}\n").fill({"text": " "})
    assert parse_template("say: {text}").fill({"text": ""}) == "say: "


def test_what_is_put_in_is_no_template_and_no_code() -> None:
    attack = "{metadata[title]} {{ {0.__class__} %s ${x} {{7*7}}"
    assert parse_template("<{text}>").fill({**VALUES, "text": attack}) == f"<{attack}>"


def test_half_a_character_is_replaced() -> None:
    """JSON can spell a lone surrogate, and no tokenizer takes one."""
    values = {"metadata": json.loads('{"title": "a\\ud800b", "list": ["\\udfff"]}')}
    assert parse_template("{metadata[title]}{metadata[list]}").fill(values) == 'a?b["?"]'


@given(st.text(alphabet="{}[]abtext metdk", max_size=30))
def test_whatever_is_written_is_a_template_or_refused(source: str) -> None:
    try:
        template = parse_template(source)
    except UsageError:
        return
    assert isinstance(template, Template)
    assert all(field.name in ("text", "key", "metadata") for field in template.fields)


@given(
    st.lists(st.sampled_from(["{text}", "{key}", "{{", "}}", "a", "{metadata[title]}", "\n"]), min_size=1).map("".join)
)
def test_it_is_str_format_where_both_say_something(source: str) -> None:
    if source.strip():
        assert parse_template(f"-{source}").fill(VALUES) == f"-{source}".format(**VALUES)


@given(
    st.recursive(
        st.none() | st.text(string.ascii_letters), lambda inner: st.dictionaries(st.text(), inner) | st.lists(inner)
    )
)
def test_the_names_of_any_metadata_can_be_listed(value: Any) -> None:
    assert all(name.startswith("[") for name in names_in(value))


def test_names_are_told_to_two_levels() -> None:
    assert names_in(METADATA) == ["[title]", "[tags]", "[a][b]", "[0]", "[no]", "[yes]"]
    assert names_in(["a"]) == []
