"""The turns of a dialogue, out of a sample's metadata: {"messages": [{"role": "user", "content": "..."}, ...]}.

It is the format of `apply_chat_template`: content is a string, or a list of parts, {"type": "text", "text": "..."}.
The sample's picture and sound belong to the last turn of the user; a part {"type": "image"} says that there is one,
no more. Samples are strangers': a turn that is not understood costs the sample, and nothing in it is a command.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from mmbeam.errors import PromptError
from mmbeam.prompts.template import Field, writable

MESSAGES = Field("metadata", ("messages",))
ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """What one of the speakers says."""

    role: str  # of ROLES
    text: str


def parse_turns(messages: Any, held: Collection[str]) -> tuple[Turn, ...]:
    """The turns up to the last one of the user, which is the one to be answered; an answer behind it is left out.

    `held` names what else the model gets of the sample: "image", "audio". Raises PromptError.
    """
    if not isinstance(messages, list):
        raise PromptError(f"{MESSAGES}: expected a list of turns, found {_kind(messages)}")
    marks: list[str] = []
    turns = [_turn(number, message, marks) for number, message in enumerate(messages, 1)]
    users = [number for number, turn in enumerate(turns, 1) if turn.role == "user"]
    if not users:
        raise PromptError(f"{MESSAGES}: {len(turns)} turns, and none of the user to answer")
    for mark in marks:
        if mark not in held or marks.count(mark) > 1:
            raise PromptError(
                f"{MESSAGES}: {marks.count(mark)} parts of type {mark!r}; the model gets "
                f"{' and '.join(sorted(held)) or 'no media'} of this sample, one of each"
            )
    asked = turns[: users[-1]]
    if not asked[-1].text.strip() and not held:
        raise PromptError(f"{MESSAGES}: the last turn of the user is empty")
    return tuple(asked)


def _turn(number: int, message: Any, marks: list[str]) -> Turn:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise PromptError(f"{MESSAGES}: turn {number}: expected a role of {', '.join(ROLES)}, found {_shown(role)}")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return Turn(message["role"], writable("".join(_words(number, part, marks) for part in parts)))


def _words(number: int, part: Any, marks: list[str]) -> str:
    """The text of a part; the mark of a medium is put on the list."""
    known = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
    if known.keys() == {"type", "text"} and known["type"] == "text" and isinstance(known["text"], str):
        return known["text"]
    if known in ({"type": "image"}, {"type": "audio"}):
        marks.append(known["type"])
        return ""
    raise PromptError(f"{MESSAGES}: turn {number}: expected text, found {_shown(part)}")


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", type(None): "nothing"}
    return kinds.get(type(value), _shown(value))


def _shown(value: Any) -> str:
    return repr(value)[:60]
