"""Averages of word vectors (GloVe, fastText): the cheap baseline that any text encoder should beat.

A text is split at white space. A word is looked up as it is, then without the punctuation and symbols around it
(Unicode categories P and S), then in lower case too. (For ASCII punctuation this is the rule of sentence-transformers'
WordEmbeddings, without its stop words.) An unknown word is split as the words of the table were: in a table with "n't"
and "'s", such as GloVe's, contractions are split by the rules of the Penn Treebank ("don't" is "do" and "n't"); in any
table, words are split at punctuation inside them ("red/green"). A part that is still unknown is left out.
A text without a known word has no vector. Vectors are not composed of subwords: fastText's text files have none.

The files:
- A text file (`vectors.txt`, `glove*.txt` or `*.vec`), in UTF-8: a line per word, the word and its numbers, separated
  by single spaces. fastText's files begin with a line of two integers, rows and columns. A word may contain spaces
  (some of GloVe 840B do): the numbers are counted from the right.
- `model.safetensors` with one table [words, columns], and `vocab.txt`, its words line by line.

Binary formats (word2vec's .bin, fastText's .bin) and pickles are unsupported. Reading needs memory for the table and
the words, not for the file.
"""

import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from mmbeam.clean.text import normalize
from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.names import Modality

logger = logging.getLogger(__name__)

TEXT_FILES = ("vectors.txt", "glove*.txt", "*.vec")
TABLE_FILE, WORDS_FILE = "model.safetensors", "vocab.txt"
HEADER = re.compile(rb"[0-9]{1,12} ([0-9]{1,5})\s*")  # rows (ignored: they are counted) and columns
MAX_LINE = 1 << 20  # bytes; a line of 2000 numbers has 20 KB
COUNT_BLOCK = 1 << 20  # bytes
# The contractions of the Penn Treebank, which are two words each; those of the last pattern are whole words.
CONTRACTIONS = (
    *(re.compile(rf"(.+)({end})", re.IGNORECASE | re.DOTALL) for end in ("n't", "'(?:s|m|d|ll|re|ve)")),
    re.compile(r"(can)(not)|(d)('ye)|(gim|lem)(me)|(gon|wan)(na)|(got)(ta)|(more)('n)|('t)(is|was)", re.IGNORECASE),
)
MAX_CONTRACTION = 64  # characters
TREEBANK_WORDS = ("n't", "'s")  # words of every table whose texts were split in this way
APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u2032\uff07`\u00b4", "'"))


@dataclass(frozen=True)
class WordVectors:
    """A vector per word."""

    rows: dict[str, int]  # the row of the table, by word
    table: npt.NDArray[np.float32]  # [words, columns]


class WordVectorsEncoder(Encoder):
    """Text vectors of a table of word vectors, always in float32: looking up is cheap."""

    without_tokens = "none of the text's words is in the table of word vectors"

    def __init__(self, spec: EncoderSpec, vectors: WordVectors, device: torch.device) -> None:
        super().__init__(spec, device, torch.float32)
        self.rows = vectors.rows
        self.table = torch.from_numpy(vectors.table).to(device)
        self.has_contractions = all(word in vectors.rows for word in TREEBANK_WORDS)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read the beginning of the file."""
        width: Mapping[Modality, int] = {"text": word_vector_width(directory)}
        return EncoderSpec(family="word-vectors", directory=str(directory), dims=width, token_dims=width)

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Read all words: half a minute for a text file of 400,000 vectors of 300 numbers."""
        return cls(spec, read_word_vectors(Path(spec.directory)), device)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the rows of each text's known words, never truncated."""
        return [[row for word in text.split() for row in self._rows_of(word)] for text in texts]

    def _rows_of(self, word: str) -> list[int]:
        """Return the row of a known word, or the rows of the known parts of an unknown one."""
        row = self._row(word)
        if row is not None:
            return [row]
        plain = normalize("NFC", word).translate(APOSTROPHES)
        if plain != word and (row := self._row(plain)) is not None:
            return [row]
        parts = self._parts(plain)
        return [row for part in parts for row in self._rows_of(part)]

    def _row(self, word: str) -> int | None:
        bare = strip_marks(word)
        rows = (self.rows.get(form) for form in (word, bare, bare.lower(), word.lower()) if form)
        return next((row for row in rows if row is not None), None)

    def _parts(self, word: str) -> list[str]:
        """Return the shorter words that an unknown word consists of; [] if it is a single one."""
        bare = strip_marks(word)
        if self.has_contractions and len(word) <= MAX_CONTRACTION:
            matches = (pattern.fullmatch(form) for pattern in CONTRACTIONS for form in (word, bare))
            if match := next(filter(None, matches), None):
                return [part.lower() if "'" in part else part for part in match.groups() if part]
        for kept in ("'", ""):
            parts = "".join(" " if is_mark(char) and char != kept else char for char in bare).split()
            if parts != [word]:
                return parts
        return []

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of words of each text, known or not."""
        return [len(text.split()) for text in texts]

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Return the mean over each text's words; tokens are their vectors."""
        lengths = list(map(len, token_ids))
        flat = torch.tensor([row for ids in token_ids for row in ids], dtype=torch.int64, device=self.device)
        starts = torch.tensor([0, *accumulate(lengths)][:-1], dtype=torch.int64, device=self.device)
        pooled_BD = functional.embedding_bag(flat, self.table, starts, mode="mean")
        return Encoded(pooled=pooled_BD, tokens=torch.split(self.table[flat], lengths) if tokens else None)


@cache
def is_mark(char: str) -> bool:
    """Return whether a character is punctuation, a symbol, invisible, or a variant selector of an emoji."""
    return unicodedata.category(char)[0] in "PS" or unicodedata.category(char) in ("Cc", "Cf") or char in "\ufe0e\ufe0f"


def strip_marks(word: str) -> str:
    """Return a word without punctuation and symbols at its ends."""
    start, end = 0, len(word)
    while start < end and is_mark(word[start]):
        start += 1
    while start < end and is_mark(word[end - 1]):
        end -= 1
    return word[start:end]


def word_vector_width(directory: Path) -> int:
    """Return the number of columns of the table, from the beginning of its file. Raises ModelError."""
    path = _text_file(directory)
    if path is None:
        return _open_table(directory)[1][1]
    with path.open("rb") as file:
        return _read_header(path, file)


def read_word_vectors(directory: Path) -> WordVectors:
    """Return all words and their vectors; of a repeated word the first. Raises ModelError naming the line."""
    path = _text_file(directory)
    vectors = _read_table(directory) if path is None else _read_text(path)
    repeated = len(vectors.table) - len(vectors.rows)
    if repeated:
        logger.info("%s: %d words are repeated; the first vector of each is used", directory, repeated)
    finite = np.isfinite(vectors.table).all(axis=1)
    if not finite.all():
        raise ModelError(f"{directory}: row {np.argmin(finite) + 1} has a number that is not finite")
    return vectors


def _text_file(directory: Path) -> Path | None:
    """Return the text file of vectors; None if they are in safetensors. Raises ModelError if there are none."""
    paths = sorted({path for pattern in TEXT_FILES for path in directory.glob(pattern)})
    if not paths and not all((directory / name).is_file() for name in (TABLE_FILE, WORDS_FILE)):
        raise ModelError(
            f"{directory}: expected config.json (a model saved by save_pretrained) or word vectors "
            f"({', '.join(TEXT_FILES)}, or {TABLE_FILE} with {WORDS_FILE}); found neither"
        )
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise ModelError(f"{directory}: expected one file of word vectors, found {names}; keep one per directory")
    return paths[0] if paths else None


def _read_header(path: Path, file: BinaryIO) -> int:
    """Return the number of columns and leave `file` at the first word."""
    first = file.readline(MAX_LINE)
    header = HEADER.fullmatch(first)
    columns = int(header[1]) if header else len(first.split()) - 1
    if columns < 1:
        raise ModelError(f"{path}: expected lines of a word and its numbers, found {first[:80]!r}")
    if not header:
        file.seek(0)
    return columns


def _read_text(path: Path) -> WordVectors:
    with path.open("rb") as file:
        columns = _read_header(path, file)
        start = file.tell()
        table = np.empty((_count_lines(file), columns), np.float32)
        file.seek(start)
        rows: dict[str, int] = {}
        count = 0
        for line, text in _lines(path, file, number=2 if start else 1):
            word, *numbers = text.rsplit(b" ", columns)
            try:
                with np.errstate(over="ignore"):  # read_word_vectors checks for infinite numbers
                    table[count] = numbers
            except ValueError:
                numbers = []
            if len(numbers) != columns:
                raise ModelError(f"{path}, line {line}: expected a word and {columns} numbers, found {text[:80]!r}")
            rows.setdefault(word.decode("utf-8", errors="replace"), count)
            count += 1
    if not count:
        raise ModelError(f"{path}: expected words and their vectors, found none")
    return WordVectors(rows, table[:count])


def _count_lines(file: BinaryIO) -> int:
    count, last = 0, b"\n"
    while block := file.read(COUNT_BLOCK):
        count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _lines(path: Path, file: BinaryIO, number: int) -> Iterator[tuple[int, bytes]]:
    """Yield number and text of each line that is not empty, without trailing white space, from line `number` on."""
    while text := file.readline(MAX_LINE):
        if len(text) == MAX_LINE:
            raise ModelError(
                f"{path}, line {number}: longer than {MAX_LINE:,} bytes; expected one word and its numbers"
            )
        if stripped := text.rstrip(b"\r\n "):
            yield number, stripped
        number += 1


def _read_table(directory: Path) -> WordVectors:
    name, (count, _) = _open_table(directory)
    words = (directory / WORDS_FILE).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(words) != count:
        raise ModelError(f"{directory}/{WORDS_FILE}: expected {count:,} words, one per line, found {len(words):,}")
    with safe_open(directory / TABLE_FILE, framework="pt") as file:
        table = file.get_tensor(name).to(torch.float32).numpy()
    rows: dict[str, int] = {}
    for row, word in enumerate(words):
        rows.setdefault(word, row)
    return WordVectors(rows, table)


def _open_table(directory: Path) -> tuple[str, tuple[int, int]]:
    """Return the name and the shape of the only table in the safetensors file."""
    path = directory / TABLE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error
    if [len(shape) for shape in shapes.values()] != [2]:
        raise ModelError(f"{path}: expected one table [words, columns], found {shapes}")
    name, (count, columns) = next(iter(shapes.items()))
    return name, (count, columns)
