"""Prompt templates: a prompt with the sample's own words in it. Data, never code: fields are looked up, no more.

    Write one sentence about this picture. Its title is {metadata[title]}, its tags are {metadata[tags]}.

`{text}`, `{key}` and `{metadata[a][b]}`, in [ ] the name of an entry or the number of an item; `{{` and `}}` are
braces. It is the syntax of str.format without attributes, conversions and formats. A string is put in as it is,
anything else as JSON; what is put in is never read as a template.
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
class Field:
    """A value of a sample: its text, its key, or an entry of its metadata."""

    name: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name + "".join(f"[{part}]" for part in self.path)

    def of(self, values: Mapping[str, Any]) -> Any:
        """The value among `values`, which are by name; None if there is none."""
        value = values.get(self.name)
        for part in self.path:
            value = _entry(value, part)
        return value

    def words(self, values: Mapping[str, Any]) -> str:
        """The value as it is put into a prompt. Raises PromptError if there is none."""
        value = self.of(values)
        if value is None:
            where = self.name + "".join(f"[{part!r}]" for part in self.path)
            raise PromptError(
                f'has no {self}, which the prompt names; --where "{where} is not None" leaves such samples out'
            )
        return writable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


@dataclass(frozen=True)
class Template:
    """A prompt as it was written, and what it consists of."""

    source: str
    pieces: tuple[str | Field, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """What it takes of a sample, each once."""
        return tuple(dict.fromkeys(piece for piece in self.pieces if isinstance(piece, Field)))

    def fill(self, values: Mapping[str, Any]) -> str:
        """The prompt for a sample. Raises PromptError if it lacks a field, or if nothing but space comes of it."""
        words = "".join(piece if isinstance(piece, str) else piece.words(values) for piece in self.pieces)
        if not words.strip():
            raise PromptError(f"its prompt is empty: {', '.join(map(str, self.fields))} of it holds no words")
        return words


def parse_template(source: str) -> Template:
    """The template that is written so. Raises UsageError that points at the column."""
    if not source.strip():
        raise UsageError("--prompt: expected a prompt, found nothing in it")
    pieces: list[str | Field] = []
    at = 0
    while at < len(source):
        found = _TOKEN.match(source, at)
        if found is None:
            raise _error(source, at, "a single brace; a brace is written {{ or }}")
        named = found["field"]
        pieces.append(_field(source, at, named) if named is not None else found["words"] or found["brace"][0])
        at = found.end()
    return Template(source, tuple(pieces))


def writable(text: str) -> str:
    """The text without lone surrogates, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def names_in(value: Any, depth: int = 2) -> list[str]:
    """What `{metadata...}` could name in a sample's metadata, to so many levels."""
    if depth == 0 or not isinstance(value, dict):
        return []
    found = []
    for name, entry in value.items():
        inner = names_in(entry, depth - 1)
        found += [f"[{name}]{path}" for path in inner] or [f"[{name}]"]
    return found


def _field(source: str, at: int, named: str) -> Field:
    found = _FIELD.fullmatch(named)
    if found is None or found["name"] not in NAMES:
        raise _error(source, at, f"expected {{text}}, {{key}} or {{metadata[name]}}, found {{{named}}}")
    path = tuple(found["path"][1:-1].split("][")) if found["path"] else ()
    if path and found["name"] != "metadata":
        raise _error(source, at, f"{{{found['name']}}} has no entries; only metadata has")
    if any(part[0] in "'\"" for part in path):
        raise _error(source, at, "in [ ] names are written without quotes")
    return Field(found["name"], path)


def _entry(parent: Any, part: str) -> Any:
    if isinstance(parent, dict):
        return parent.get(part)
    if isinstance(parent, list) and part.isascii() and part.isdecimal() and int(part) < len(parent):
        return parent[int(part)]
    return None


def _error(source: str, at: int, problem: str) -> UsageError:
    shown = source.replace("\n", " ")
    return UsageError(f"--prompt, column {at + 1}: {problem}\n  {shown}\n  {' ' * at}^")
