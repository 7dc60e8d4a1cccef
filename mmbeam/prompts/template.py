"""Prompt templates: a prompt with fields of the sample in it. Templates are data: fields are looked up, nothing runs.

    Write one sentence about this picture. Its title is {metadata[title]}, its tags are {metadata[tags]}.

The fields are `{text}`, `{key}` and `{metadata[a][b]}`, with the name of an entry or the number of an item in
brackets; `{{` and `}}` are braces. The syntax is that of str.format without attributes, conversions and formats.
A string is inserted unchanged, any other value as JSON. Inserted text is never read as a template.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmbeam.errors import PromptError, UsageError

NAMES = ("text", "key", "metadata")
_TOKEN = re.compile(r"(?P<words>[^{}]+)|(?P<brace>\{\{|\}\})|\{(?P<field>[^{}]*)\}")
_FIELD = re.compile(r"(?P<name>\w+)(?P<path>(?:\[[^\[\]]+\])*)")


@dataclass(frozen=True)
class PromptField:
    """A field of a sample that a prompt names: its text, its key, or an entry of its metadata."""

    name: str  # one of NAMES
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name + "".join(f"[{part}]" for part in self.path)

    def value_in(self, values: Mapping[str, Any]) -> Any:
        """Return the field's value among a sample's `values` by name; None if it is missing."""
        value = values.get(self.name)
        for part in self.path:
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and part.isascii() and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                return None
        return value

    def text_in(self, values: Mapping[str, Any]) -> str:
        """Return the value as it is inserted into a prompt. Raises PromptError if it is missing."""
        value = self.value_in(values)
        if value is None:
            where = self.name + "".join(f"[{part!r}]" for part in self.path)
            raise PromptError(f'no {self}, which the prompt names; where "{where} is not None" skips such samples')
        return encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


@dataclass(frozen=True)
class Template:
    """A parsed prompt."""

    source: str
    pieces: tuple[str | PromptField, ...]

    @property
    def fields(self) -> tuple[PromptField, ...]:
        """The fields that the prompt names, without repetitions."""
        return tuple(dict.fromkeys(piece for piece in self.pieces if isinstance(piece, PromptField)))

    def fill(self, values: Mapping[str, Any]) -> str:
        """Return the prompt for a sample. Raises PromptError if a field is missing, or the prompt is blank."""
        prompt = "".join(piece if isinstance(piece, str) else piece.text_in(values) for piece in self.pieces)
        if not prompt.strip():
            raise PromptError(
                f"the prompt is blank, because {', '.join(map(str, self.fields))} of this sample is blank"
            )
        return prompt


def parse_template(source: str) -> Template:
    """Parse a prompt. Raises UsageError that points at the column."""
    if not source.strip():
        raise UsageError("`prompt`: expected words, found a blank string")
    pieces: list[str | PromptField] = []
    position = 0
    while position < len(source):
        token = _TOKEN.match(source, position)
        if token is None:
            raise _syntax_error(source, position, "unmatched brace; write {{ or }} for a brace")
        if token["field"] is not None:
            pieces.append(_parse_field(source, position, token["field"]))
        else:
            pieces.append(token["words"] or token["brace"][0])
        position = token.end()
    return Template(source, tuple(pieces))


def _parse_field(source: str, position: int, written: str) -> PromptField:
    match = _FIELD.fullmatch(written)
    if match is None or match["name"] not in NAMES:
        raise _syntax_error(source, position, f"expected {{text}}, {{key}} or {{metadata[name]}}, found {{{written}}}")
    path = tuple(match["path"][1:-1].split("][")) if match["path"] else ()
    if path and match["name"] != "metadata":
        raise _syntax_error(source, position, f"{{{match['name']}}} has no entries; only metadata has entries")
    if any(part[0] in "'\"" for part in path):
        raise _syntax_error(source, position, "write names in brackets without quotes")
    return PromptField(match["name"], path)


def _syntax_error(source: str, position: int, problem: str) -> UsageError:
    line = source.replace("\n", " ")
    return UsageError(f"`prompt`, column {position + 1}: {problem}\n  {line}\n  {' ' * position}^")


def encodable(text: str) -> str:
    """Return the text with lone surrogates replaced: JSON allows them, tokenizers do not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def entry_paths(metadata: Any, depth: int = 2) -> list[str]:
    """Return the paths, "[a][b]", of a sample's metadata that a prompt could name, up to `depth` levels."""
    if depth == 0 or not isinstance(metadata, dict):
        return []
    paths = []
    for name, entry in metadata.items():
        paths += [f"[{name}]{path}" for path in entry_paths(entry, depth - 1)] or [f"[{name}]"]
    return paths
