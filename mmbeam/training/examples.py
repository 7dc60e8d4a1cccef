"""Training examples: a request and its target caption.

The request is made lazily, from the kept modalities only. Nothing is rendered or copied for a dropped modality, and a
buffer of examples takes little memory.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from mmbeam.names import FUSION_MODALITIES, Modality, Split
from mmbeam.prompts.ask import Request


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training sample."""

    key: str
    caption: str
    present: frozenset[Modality]  # modalities of the sample
    request: Callable[[frozenset[Modality]], Request]  # makes the model input from these modalities only
    clauses: Mapping[Modality, str] | None = None  # parts of the caption, by the modality that they describe
    group: str | None = None
    nbytes: int = 0  # memory held

    def keeping(self, modalities: Collection[Modality]) -> "Example":
        """Return the example restricted to `modalities`.

        If clauses are known, the caption joins the clauses of the kept modalities. If none of them has a clause,
        the caption stays whole.
        """
        kept = self.present.intersection(modalities)
        caption = self.caption if self.clauses is None or kept == self.present else compose(self.clauses, kept)
        return replace(self, present=kept, caption=caption or self.caption)

    def make(self) -> Request:
        """Return the request with all present modalities."""
        return self.request(self.present)


def compose(clauses: Mapping[Modality, str], modalities: Collection[Modality]) -> str:
    """Return the clauses of `modalities` in order, joined by ", " and ended by "."; "" without any."""
    kept = [clauses[modality] for modality in FUSION_MODALITIES if modality in modalities and modality in clauses]
    return ", ".join(kept) + "." if kept else ""


class ExampleSource(Protocol):
    """A source of examples. The same split and epoch give the same examples in the same order."""

    def examples(self, split: Split, epoch: int = 0) -> Iterator[Example]:
        """Yield the examples of a split."""

    def count(self, split: Split) -> int | None:
        """Return the number of examples in an epoch, None if unknown."""

    def of_rank(self, rank: int, world_size: int) -> "ExampleSource":
        """Return the source of one process.

        The processes partition the training split. Other splits, and `count`, cover all samples.
        """


def clauses_of(value: object) -> dict[Modality, str] | None:
    """Return the clauses of a caption by modality; None if `value` is not an object with at least one."""
    if not isinstance(value, Mapping):
        return None
    clauses: dict[Modality, str] = {
        m: value[m] for m in FUSION_MODALITIES if isinstance(value.get(m), str) and value[m]
    }
    return clauses or None
