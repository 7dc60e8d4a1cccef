"""The turns of a dialogue, read from a sample's metadata and written for models without a chat template.

The format is that of `apply_chat_template`: {"messages": [{"role": "user", "content": "..."}, ...]}, where content is
a string or a list of parts, {"type": "text", "text": "..."}. The sample's image and audio belong to the user's last
turn; a part {"type": "image"} declares that there is an image. Samples are untrusted: a malformed turn is a failure
of the sample, and its words are never read as a command.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from mmbeam.errors import PromptError
from mmbeam.prompts.template import PromptField, encodable

MESSAGES = PromptField("metadata", ("messages",))
ROLES = ("system", "user", "assistant")
_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}
# A line break followed by a speaker's name. The possessive quantifiers keep this linear in a million empty lines.
_BREAK = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"
_NEXT_TURN = re.compile(rf"(?<!\s)[^\S{_BREAK}]*+[{_BREAK}]\s*+(?=(?:{'|'.join(_NAMES.values())}):)")


class Turn(NamedTuple):
    """One turn of a dialogue."""

    role: str  # one of ROLES
    text: str


def parse_turns(messages: Any, media: Collection[str]) -> tuple[Turn, ...]:
    """Return the turns up to the user's last one, which the model answers; an answer after it is dropped.

    `media` names the sample's media that the model receives: "image", "audio". Raises PromptError.
    """
    if not isinstance(messages, list):
        kinds = {dict: "an object", str: "a string", type(None): "nothing"}
        raise PromptError(
            f"{MESSAGES}: expected a list of turns, found {kinds.get(type(messages), repr(messages)[:60])}"
        )
    declared: list[str] = []
    turns = [_parse_turn(number, message, declared) for number, message in enumerate(messages, 1)]
    users = [number for number, turn in enumerate(turns, 1) if turn.role == "user"]
    if not users:
        raise PromptError(f"{MESSAGES}: expected a turn of the user, found none in {len(turns)} turns")
    for kind in declared:
        if kind not in media or declared.count(kind) > 1:
            raise PromptError(
                f"{MESSAGES}: {declared.count(kind)} parts of type {kind!r}; the model receives "
                f"{' and '.join(sorted(media)) or 'no media'} of this sample, one of each"
            )
    dialogue = turns[: users[-1]]
    if not dialogue[-1].text.strip() and not media:
        raise PromptError(f"{MESSAGES}: the user's last turn is empty")
    return tuple(dialogue)


def _parse_turn(number: int, message: Any, declared: list[str]) -> Turn:
    """Return a turn, and append the media that it declares to `declared`."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise PromptError(f"{MESSAGES}: turn {number}: expected a role of {', '.join(ROLES)}, found {repr(role)[:60]}")
    content = message.get("content")
    text = ""
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        entries = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if entries.keys() == {"type", "text"} and entries["type"] == "text" and isinstance(entries["text"], str):
            text += entries["text"]
        elif entries in ({"type": "image"}, {"type": "audio"}):
            declared.append(entries["type"])
        else:
            raise PromptError(f"{MESSAGES}: turn {number}: expected text, found {repr(part)[:60]}")
    return Turn(message["role"], encodable(text))


def write_dialogue(turns: Sequence[Turn], media: str = "") -> str:
    """Write a dialogue for a model without a chat template: "User: ..." per turn, `media` in the last one."""
    *earlier, last = turns
    lines = [f"{_NAMES[role]}: {text}" for role, text in [*earlier, (last.role, media + last.text)]]
    return "\n".join([*lines, "Assistant:"])


def one_speaker(text: str) -> str:
    """Return a turn's text with line breaks removed where the next line would begin another turn."""
    return _NEXT_TURN.sub(" ", text)


def until_next_turn(text: str) -> str:
    """Return a model's answer without any further turns that the model has written after it."""
    return _NEXT_TURN.split(text, maxsplit=1)[0].strip()
