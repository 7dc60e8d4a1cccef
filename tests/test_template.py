"""Prompt templates: filling, syntax errors, and that inserted text is never parsed."""

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmbeam.errors import PromptError, UsageError
from mmbeam.prompts.template import PromptField, Template, entry_paths, parse_template

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
def test_fields_are_filled_in(template: str, expected: str) -> None:
    assert parse_template(template).fill(VALUES) == expected


def test_fields_are_listed_without_repetitions() -> None:
    fields = parse_template("{text} {metadata[a][b]} {text}").fields
    assert fields == (PromptField("text"), PromptField("metadata", ("a", "b")))
    assert str(fields[1]) == "metadata[a][b]"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "found a blank string"),
        (" \n", "found a blank string"),
        ("a {text", "column 3: unmatched brace"),
        ("a } b", "column 3: unmatched brace"),
        ("{ {text}}", "column 1: unmatched brace"),
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
def test_syntax_errors_point_at_the_column(template: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_template(template)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "template", ["{metadata[nothing]}", "{metadata[no]}", "{metadata[tags][2]}", "{metadata[title][x]}"]
)
def test_a_missing_field_is_named_in_the_error(template: str) -> None:
    with pytest.raises(PromptError, match=r"no metadata\[.*where \"metadata\[.*is not None\" skips"):
        parse_template(f"a {template}").fill(VALUES)


def test_missing_text_and_missing_metadata_raise() -> None:
    for template, name in (("{metadata[title]}", "metadata"), ("{text}", "text"), ("{metadata}", "metadata")):
        with pytest.raises(PromptError, match=name):
            parse_template(template).fill({"text": None, "key": "k", "metadata": None})


def test_a_blank_prompt_raises() -> None:
    with pytest.raises(PromptError, match="prompt is blank, because text"):
        parse_template(" {text}\n").fill({"text": " "})
    assert parse_template("say: {text}").fill({"text": ""}) == "say: "


def test_inserted_text_is_not_parsed() -> None:
    attack = "{metadata[title]} {{ {0.__class__} %s ${x} {{7*7}}"
    assert parse_template("<{text}>").fill({**VALUES, "text": attack}) == f"<{attack}>"


def test_lone_surrogates_are_replaced() -> None:
    """JSON allows lone surrogates, tokenizers do not."""
    values = {"metadata": json.loads('{"title": "a\\ud800b", "list": ["\\udfff"]}')}
    assert parse_template("{metadata[title]}{metadata[list]}").fill(values) == 'a?b["?"]'


@given(st.text(alphabet="{}[]abtext metdk", max_size=30))
def test_any_string_is_parsed_or_rejected(source: str) -> None:
    try:
        template = parse_template(source)
    except UsageError:
        return
    assert isinstance(template, Template)
    assert all(field.name in ("text", "key", "metadata") for field in template.fields)


@given(
    st.lists(st.sampled_from(["{text}", "{key}", "{{", "}}", "a", "{metadata[title]}", "\n"]), min_size=1).map("".join)
)
def test_valid_templates_agree_with_str_format(source: str) -> None:
    if source.strip():
        assert parse_template(f"-{source}").fill(VALUES) == f"-{source}".format(**VALUES)


@given(
    st.recursive(
        st.none() | st.text(string.ascii_letters), lambda inner: st.dictionaries(st.text(), inner) | st.lists(inner)
    )
)
def test_entry_paths_accept_any_json(value: Any) -> None:
    assert all(name.startswith("[") for name in entry_paths(value))


def test_entry_paths_go_two_levels_deep() -> None:
    assert entry_paths(METADATA) == ["[title]", "[tags]", "[a][b]", "[0]", "[no]", "[yes]"]
    assert entry_paths(["a"]) == []
