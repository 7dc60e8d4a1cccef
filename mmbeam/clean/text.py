"""Steps that normalise text, each on its own and in the order the user gives. Off unless asked for.

Every step is idempotent but "markup": text that shows escaped markup (`&lt;b&gt;`) becomes markup.
"""

import html
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from mmbeam.errors import UsageError

# Format characters that a text loses meaning without: the joiners of Persian, Indic scripts and emoji, and
# the Arabic, Syriac and Kaithi number signs, which are visible (Unicode's Prepended_Concatenation_Mark).
_KEPT_FORMATS = frozenset(
    "\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
)

# Elements whose end is the end of a line; the others, like <b>, may end inside a word.
_BLOCK_NAMES = (
    "address article aside blockquote br caption dd details div dl dt fieldset figcaption figure footer form h1 h2 h3 "
    "h4 h5 h6 header hr li main nav ol option p pre section summary table td tfoot th thead title tr ul"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
# Each alternative ends at the next `<` or takes what it has seen, so time is linear in the text whatever it is
# (the standard library's html.parser needs an hour for a million characters of `<a `).
_MARKUP = re.compile(
    r"""
    <!--.*?(?:-->|\Z)
    | <(?:script|style)\b[^<>]*>.*?(?:</(?:script|style)\b[^<>]*>|\Z)
    | <!\[CDATA\[(?P<cdata>.*?)(?:\]\]>|\Z)
    | <[!?][a-z][^<>]*>                                    # <!DOCTYPE ...>, <?xml ...?>
    | </?(?P<name>[a-z][^\s/<>]*+)(?:[^<>"']++|"[^"]*"|'[^']*')*+>
    | </?(?P<odd_name>[a-z][^\s/<>]*+)[^<>]*>              # a quote that nothing closes
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_HUGE_REFERENCE = re.compile(r"&#(?:[0-9]{100,}|[xX][0-9a-fA-F]{100,});?")  # more digits than int() may take


def strip_controls(text: str) -> str:
    """Without control and format characters but newline, tab, the joiners and visible number signs.

    Controls that end a line (CR, CR LF, form feed, NEL) become a newline. What goes: bidirectional marks,
    soft hyphens, zero-width spaces (U+200B is a format character), and the tags of regional emoji flags.
    """
    if text.isprintable():
        return text
    text = text.replace("\r\n", "\n")
    odd = {char for char in set(text) if unicodedata.category(char) in ("Cc", "Cf")} - _KEPT_FORMATS - {"\n", "\t"}
    return text.translate({ord(char): "\n" if char.isspace() else None for char in odd})


def strip_markup(text: str) -> str:
    """The text of HTML or XML: no tags, comments, scripts and styles; entities resolved, once.

    A `<` that opens nothing stays (`a < b`, `<3`). A block element's tag becomes a newline.
    """
    return html.unescape(_HUGE_REFERENCE.sub("\N{REPLACEMENT CHARACTER}", _MARKUP.sub(_text_of, text)))


def _text_of(match: re.Match[str]) -> str:
    name = match["name"] or match["odd_name"] or ""
    return match["cdata"] or ("\n" if name.lower() in _BLOCKS else "")


def collapse_whitespace(text: str) -> str:
    """Each run of whitespace, newlines and no-break spaces included, as one space; none at the ends."""
    return " ".join(text.split())


TEXT_STEPS: Mapping[str, Callable[[str], str]] = {
    "nfc": partial(unicodedata.normalize, "NFC"),
    "nfkc": partial(unicodedata.normalize, "NFKC"),
    "control": strip_controls,
    "markup": strip_markup,
    "whitespace": collapse_whitespace,
    "lower": str.lower,  # not casefold: it is what uncased models were trained on, and keeps the German ß
}


def check_steps(steps: Sequence[str]) -> None:
    """Raise UsageError if a step is unknown."""
    for step in steps:
        if step not in TEXT_STEPS:
            raise UsageError(f"text cleaning step {step!r} is unknown; the steps are {', '.join(TEXT_STEPS)}")


def clean_text(text: str, steps: Sequence[str]) -> str:
    """The text after the steps, in the order given."""
    check_steps(steps)
    for step in steps:
        text = TEXT_STEPS[step](text)
    return text
