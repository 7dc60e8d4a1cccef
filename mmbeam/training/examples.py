"""What a model is trained on: a request, and the caption that is right for it.

An example makes its request when asked, with the modalities asked for, so that nothing is rendered or
copied for a modality that is dropped, and a buffer of examples holds what its source holds and no more.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from mmbeam.names import MODALITIES, Modality, Split
from mmbeam.prompts.ask import Request


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample to learn from. `clauses` are the parts of its caption, by the modality that shows them."""

    key: str
    caption: str
    present: frozenset[Modality]  # what the sample has
    request: Callable[[frozenset[Modality]], Request]  # what the model gets, of these modalities alone
    clauses: Mapping[Modality, str] | None = None
    group: str | None = None
    nbytes: int = 0  # what it holds in memory

    def keeping(self, modalities: Collection[Modality]) -> "Example":
        """The example with no more than `modalities`; its caption says only what they show, if that is known.

        Where no clause is left, the caption stays whole.
        """
        kept = self.present.intersection(modalities)
        caption = self.caption if self.clauses is None or kept == self.present else compose(self.clauses, kept)
        return replace(self, present=kept, caption=caption or self.caption)

    def make(self) -> Request:
        """The request of what is present."""
        return self.request(self.present)


def compose(clauses: Mapping[Modality, str], modalities: Collection[Modality]) -> str:
    """The caption of `modalities`: their clauses in order, joined by ", " and ended by "."; "" if there is none."""
    said = [clauses[modality] for modality in MODALITIES if modality in modalities and modality in clauses]
    return ", ".join(said) + "." if said else ""


class ExampleSource(Protocol):
    """Where examples come from: the same ones in the same order for the same part and epoch."""

    def examples(self, part: Split, epoch: int = 0) -> Iterator[Example]: ...

    def count(self, part: Split) -> int | None:
        """How many there are in an epoch; None if nobody has counted."""

    def of_rank(self, rank: int, world_size: int) -> "ExampleSource":
        """One process's share of the training part, together all of it; the other parts and the counts are whole."""


def clauses_of(value: object) -> dict[Modality, str] | None:
    """The parts of a caption by modality; None unless it is an object that holds one."""
    if not isinstance(value, Mapping):
        return None
    found: dict[Modality, str] = {m: value[m] for m in MODALITIES if isinstance(value.get(m), str) and value[m]}
    return found or None
