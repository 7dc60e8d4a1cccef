"""Steps that normalise text, applied in the user's order, and JSON written by strangers.

No step is on by default. Every step except "markup" is idempotent: unescaping `&lt;b&gt;` yields new markup.
"""

import html
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from mmbeam.errors import UsageError, did_you_mean

_MAX_DIGITS = 4300  # Python's own limit: converting more takes quadratic time


def json_integer(digits: str) -> int | float:
    """Return an integer of JSON, for `parse_int`; infinity for one of more than 4,300 digits, which JSON allows."""
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def json_object(text: str | bytes | None) -> Mapping[str, Any]:
    """Return the JSON object in `text`, or an empty one if the text is missing, invalid or another JSON value."""
    try:
        value = json.loads(text or "{}", parse_int=json_integer)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# Format characters that carry meaning: the joiners of Persian, Indic scripts and emoji, and the visible number
# signs of Arabic, Syriac and Kaithi (Unicode's Prepended_Concatenation_Mark).
_KEPT_FORMATS = frozenset(
    "\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
)

# Elements that end a line. Others, such as <b>, may end inside a word.
_BLOCK_NAMES = (
    "address article aside blockquote br caption dd details div dl dt fieldset figcaption figure footer form h1 h2 h3 "
    "h4 h5 h6 header hr li main nav ol option p pre section summary table td tfoot th thead title tr ul"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
# Each alternative stops at the next `<` or keeps what it has matched, so time is linear in any text
# (the standard library's html.parser needs an hour for a million characters of `<a `).
_MARKUP = re.compile(
    r"""
    <!--.*?(?:-->|\Z)
    | <(?:script|style)\b[^<>]*>.*?(?:</(?:script|style)\b[^<>]*>|\Z)
    | <!\[CDATA\[(?P<cdata>.*?)(?:\]\]>|\Z)
    | <[!?][a-z][^<>]*>                                    # <!DOCTYPE ...>, <?xml ...?>
    | </?(?P<name>[a-z][^\s/<>]*+)(?:[^<>"']++|"[^"]*"|'[^']*')*+>
    | </?(?P<odd_name>[a-z][^\s/<>]*+)[^<>]*>              # an unclosed quote
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_HUGE_REFERENCE = re.compile(r"&#(?:[0-9]{100,}|[xX][0-9a-fA-F]{100,});?")  # more digits than int() accepts


def normalize(form: Literal["NFC", "NFKC"], text: str) -> str:
    """Return `text` in a normalization form of Unicode.

    CPython sorts the combining marks after a character in quadratic time: a text of a million would take 20 minutes.
    So long runs of them are sorted before.
    """
    marks = [] if text.isascii() else [char for char in set(text) if unicodedata.combining(char)]
    if len(marks) > 1:
        text = re.sub(f"[{re.escape(''.join(marks))}]{{100,}}", _sorted_marks, text)
    return unicodedata.normalize(form, text)


def _sorted_marks(match: re.Match[str]) -> str:
    marks = "".join(unicodedata.normalize("NFD", char) for char in match[0])
    return "".join(sorted(marks, key=unicodedata.combining))


def strip_controls(text: str) -> str:
    """Remove control and format characters except newline, tab, joiners and visible number signs.

    Controls that end a line (CR, CR LF, form feed, NEL) become a newline. Removed are, for example, bidirectional
    marks, soft hyphens, zero-width spaces (U+200B is a format character), and the tags of regional emoji flags.
    """
    if text.isprintable():
        return text
    text = text.replace("\r\n", "\n")
    odd = {char for char in set(text) if unicodedata.category(char) in ("Cc", "Cf")} - _KEPT_FORMATS - {"\n", "\t"}
    return text.translate({ord(char): "\n" if char.isspace() else None for char in odd})


def strip_markup(text: str) -> str:
    """Remove the tags, comments, scripts and styles of HTML or XML, and resolve entities once.

    A `<` that opens no tag stays (`a < b`, `<3`). The tag of a block element becomes a newline.
    """
    return html.unescape(_HUGE_REFERENCE.sub("\N{REPLACEMENT CHARACTER}", _MARKUP.sub(_text_of, text)))


def _text_of(match: re.Match[str]) -> str:
    name = match["name"] or match["odd_name"] or ""
    return match["cdata"] or ("\n" if name.lower() in _BLOCKS else "")


def collapse_whitespace(text: str) -> str:
    """Replace each run of whitespace, including newlines and no-break spaces, by one space, and strip the ends."""
    return " ".join(text.split())


TEXT_STEPS: Mapping[str, Callable[[str], str]] = {
    "nfc": partial(normalize, "NFC"),
    "nfkc": partial(normalize, "NFKC"),
    "control": strip_controls,
    "markup": strip_markup,
    "whitespace": collapse_whitespace,
    "lower": str.lower,  # as uncased models were trained; unlike casefold, it keeps the German ß
}


def check_steps(steps: Sequence[str]) -> None:
    """Raise UsageError if a step is unknown."""
    for step in steps:
        if step not in TEXT_STEPS:
            expected = ", ".join(TEXT_STEPS) + did_you_mean(step, TEXT_STEPS)
            raise UsageError(f"unknown text cleaning step {step!r}; the steps are {expected}")


def clean_text(text: str, steps: Sequence[str]) -> str:
    """Apply the steps in order. Raises UsageError if a step is unknown."""
    check_steps(steps)
    for step in steps:
        text = TEXT_STEPS[step](text)
    return text
