"""Files of word vectors: GloVe's and fastText's text format, and safetensors beside a list of words.

- A text file (`vectors.txt`, `glove*.txt` or `*.vec`): a line for each word, the word and its numbers with
  single spaces between them, in UTF-8; fastText's begin with a line of two whole numbers, rows and columns.
  A word may hold spaces (GloVe 840B has some): the numbers are counted from the right.
- `model.safetensors` with one table [words, columns], and `vocab.txt`, its words line by line.

Binary formats (word2vec's .bin, fastText's .bin) and pickles are not read. Reading takes the memory of the
table and of the words, whatever the size of the file.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from mmbeam.errors import ModelError

logger = logging.getLogger(__name__)

TEXT_FILES = ("vectors.txt", "glove*.txt", "*.vec")
TABLE_FILE, WORDS_FILE = "model.safetensors", "vocab.txt"
HEADER = re.compile(rb"[0-9]{1,12} ([0-9]{1,5})\s*")  # rows, which are counted instead, and columns
MAX_LINE = 1 << 20  # bytes; a line of 2000 numbers has 20 KB
COUNT_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class WordVectors:
    """A vector for each word."""

    rows: dict[str, int]  # of the table, by word
    table: npt.NDArray[np.float32]  # [words, columns]


def has_word_vectors(directory: Path) -> bool:
    """Whether the directory holds word vectors, and no model of another kind."""
    if any((directory / name).is_file() for name in ("config.json", "modules.json")):
        return False
    return bool(_text_files(directory)) or all((directory / name).is_file() for name in (TABLE_FILE, WORDS_FILE))


def word_vector_width(directory: Path) -> int:
    """Columns of the table, read from its beginning. Raises ModelError."""
    path = _text_file(directory)
    if path is None:
        return _open_table(directory)[1][1]
    with path.open("rb") as file:
        return _read_header(path, file)


def read_word_vectors(directory: Path) -> WordVectors:
    """All words and their vectors; of a word that comes twice the first. Raises ModelError naming the line."""
    path = _text_file(directory)
    found = _read_table(directory) if path is None else _read_text(path)
    if len(found.rows) < len(found.table):
        logger.info("%s: %d words come more than once; the first counts", directory, len(found.table) - len(found.rows))
    if not np.isfinite(found.table).all():
        row = int(np.flatnonzero(~np.isfinite(found.table).all(axis=1))[0])
        raise ModelError(f"{directory}: the vector in row {row + 1} holds a number that is not finite")
    return found


def _text_files(directory: Path) -> list[Path]:
    return sorted({path for pattern in TEXT_FILES for path in directory.glob(pattern)})


def _text_file(directory: Path) -> Path | None:
    """The text file of vectors; None if they are in safetensors."""
    found = _text_files(directory)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ModelError(f"{directory}: expected one file of word vectors, found {names}; keep one in a directory")
    return found[0] if found else None


def _read_header(path: Path, file: BinaryIO) -> int:
    """Columns of the table; `file` is left at the first word."""
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
        for line, text in _lines(path, file, header=start > 0):
            word, *numbers = text.rsplit(b" ", columns)
            if not _fill(table[count], numbers):
                raise ModelError(f"{path}, line {line}: expected a word and {columns} numbers, found {text[:80]!r}")
            rows.setdefault(word.decode("utf-8", errors="replace"), count)
            count += 1
    if not count:
        raise ModelError(f"{path}: holds no words")
    return WordVectors(rows, table[:count])


def _fill(row: npt.NDArray[np.float32], numbers: list[bytes]) -> bool:
    """Write the numbers into the row; False if they are none, or not as many as it holds."""
    try:
        with np.errstate(over="ignore"):  # infinite: found when all is read
            row[:] = numbers
    except ValueError:
        return False
    return len(numbers) == len(row)


def _count_lines(file: BinaryIO) -> int:
    count, last = 0, b"\n"
    while block := file.read(COUNT_BLOCK):
        count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _lines(path: Path, file: BinaryIO, header: bool) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, by their number in the file, without what ends them."""
    number = 1 + header
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
        raise ModelError(f"{directory}/{WORDS_FILE}: expected {count:,} words, one a line, found {len(words):,}")
    with safe_open(directory / TABLE_FILE, framework="pt") as file:
        table = file.get_tensor(name).to(torch.float32).numpy()
    rows: dict[str, int] = {}
    for row, word in enumerate(words):
        rows.setdefault(word, row)
    return WordVectors(rows, table)


def _open_table(directory: Path) -> tuple[str, tuple[int, int]]:
    """Name and shape of the one table in the safetensors file."""
    path = directory / TABLE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no dict
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error
    if [len(shape) for shape in shapes.values()] != [2]:
        raise ModelError(f"{path}: expected one table [words, columns], found {shapes}")
    name, (count, columns) = next(iter(shapes.items()))
    return name, (count, columns)
