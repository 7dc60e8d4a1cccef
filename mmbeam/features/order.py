"""What each of several readers takes: rows of row groups, in windows, and units of shards. Pure arithmetic."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [begin, end) of the row group `group`."""

    group: int
    begin: int
    end: int


def pieces_of(rows: Sequence[int], order: Sequence[int], share: int, shares: int) -> list[Piece]:
    """The pieces of one of `shares` readers, when row groups of `rows` are laid end to end in `order`.

    Every row is in exactly one share, and shares differ by one row at most. Two readers may have a part of
    the same row group, which both decode; there are fewer of those than readers.
    """
    total = sum(rows)
    first, last = total * share // shares, total * (share + 1) // shares
    pieces, start = [], 0
    for group in order:
        begin, end = max(first - start, 0), min(last - start, rows[group])
        if begin < end:
            pieces.append(Piece(group, begin, end))
        start += rows[group]
    return pieces


def windows_of(pieces: Sequence[Piece], sizes: Sequence[int], limit: int) -> Iterator[list[Piece]]:
    """The pieces, in order, in windows that close once their row groups' `sizes` come to `limit`."""
    window: list[Piece] = []
    size = 0
    for piece in pieces:
        window.append(piece)
        size += sizes[piece.group]
        if size >= limit:
            yield window
            window, size = [], 0
    if window:
        yield window


def units_of_rank(order: Sequence[int], rank: int, world_size: int) -> tuple[list[int], list[int]]:
    """The units, in `order`, that a rank reads by itself, and those that all ranks read, each its own samples of.

    Every rank has the same number of its own; the rest, fewer than there are ranks, is for all.
    """
    whole = len(order) - len(order) % world_size
    return list(order[rank:whole:world_size]), list(order[whole:])


def rank_of(key: str, world_size: int) -> int:
    """The rank that a sample of a unit for all belongs to: a hash of its key, other than the one that splits."""
    digest = blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8, person=b"rank").digest()
    return int.from_bytes(digest, "big") % world_size
