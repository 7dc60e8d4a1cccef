"""The mean of a text's word vectors (GloVe, fastText): the cheap baseline that any text encoder should beat.

A text is split at white space. A word is looked up as it is, then without punctuation around it, then in
lower case as well; what is not found is left out. (The rule of sentence-transformers' WordEmbeddings,
without its stop words.) A text of no known word is the zero vector. Subwords are not made up: fastText's
text files hold none.
"""

import string
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch.nn import functional

from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.word_vectors import WordVectors, read_word_vectors, word_vector_width


class WordsEncoder(Encoder):
    """Text vectors of a table of word vectors, in float32 whatever the dtype: looking up is cheap."""

    model_types: ClassVar[tuple[str, ...]] = ("word-vectors",)

    def __init__(self, spec: EncoderSpec, vectors: WordVectors, device: torch.device) -> None:
        super().__init__(spec, device, torch.float32)
        self.rows = vectors.rows
        self.table = torch.from_numpy(vectors.table).to(device)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the beginning of the file."""
        width = word_vector_width(directory)
        return EncoderSpec(
            family="word-vectors", directory=str(directory), dims={"text": width}, token_dims={"text": width}
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Self:
        """Read all words: half a minute for 400,000 of 300 numbers in a text file."""
        return cls(spec, read_word_vectors(Path(spec.directory)), device)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Rows of each text's known words; never truncated."""
        return [[row for word in text.split() if (row := self._row(word)) is not None] for text in texts]

    def _row(self, word: str) -> int | None:
        bare = word.strip(string.punctuation)
        found = (self.rows.get(form) for form in (word, bare, bare.lower()) if form)
        return next((row for row in found if row is not None), None)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Words of each text, the unknown ones too."""
        return [len(text.split()) for text in texts]

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """The mean over each text's words; tokens are their vectors."""
        lengths = list(map(len, token_ids))
        flat = torch.tensor([row for ids in token_ids for row in ids], dtype=torch.int64, device=self.device)
        starts = torch.tensor([0, *accumulate(lengths)][:-1], dtype=torch.int64, device=self.device)
        pooled = functional.embedding_bag(flat, self.table, starts, mode="mean")
        return Encoded(pooled=pooled, tokens=torch.split(self.table[flat], lengths) if tokens else None)
