"""Samples judged by the expressions of --where."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mmbeam.clean.where import KIND_OF_NAME, Values
from mmbeam.types import Sample


def select(sample: Sample, wheres: Sequence[tuple[str, Callable[[Values], bool]]]) -> str | None:
    """The text of the first expression that is not true of the sample; None if all are.

    `wheres`: each expression and what `compile_where` made of it.
    """
    values = SampleValues(sample)
    return next((text for text, is_true in wheres if not is_true(values)), None)


class SampleValues(Mapping[str, Any]):
    """What an expression sees of a sample, each value made when it is first asked for."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self._known: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            self._known[name] = _VALUE_OF[name](self._sample)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(KIND_OF_NAME)

    def __len__(self) -> int:
        return len(KIND_OF_NAME)


_VALUE_OF: Mapping[str, Callable[[Sample], Any]] = {
    "image_width": lambda sample: sample.image_size and sample.image_size[0],
    "image_height": lambda sample: sample.image_size and sample.image_size[1],
    "image_pixels": lambda sample: sample.image_size and sample.image_size[0] * sample.image_size[1],
    "audio_seconds": lambda sample: sample.audio and sample.audio.seconds,
    "text_chars": lambda sample: None if sample.model_text is None else len(sample.model_text),
    "text_words": lambda sample: None if sample.model_text is None else len(sample.model_text.split()),
    "text": lambda sample: sample.model_text,
    "key": lambda sample: sample.key,
    "metadata": lambda sample: None if sample.metadata is None else _parse_json(sample.metadata),
}


def _parse_json(text: str) -> Any:
    """The value, NaN as None: it is how a table's missing value usually comes into JSON."""
    try:
        return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))
    except (ValueError, RecursionError):  # nested so deeply that it parsed only where less of the stack was in use
        return None
