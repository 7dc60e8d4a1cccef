"""Which part of a data set a sample belongs to, by its key alone: stable over machines, runs and order.

Samples of the same key are in the same part, so that no part holds a copy of another's sample. Not here:
what is shuffled within a part.
"""

import math
from collections.abc import Iterable, Iterator
from hashlib import blake2b

from mmbeam.errors import UsageError
from mmbeam.names import SPLITS, Split

Shares = tuple[float, float, float]  # of train, validation and test; their sum is 1

SHARES: Shares = (0.9, 0.05, 0.05)
_HASH_BYTES = 8


def split_of(key: str, seed: int, shares: Shares) -> Split:
    """The part that the sample of this key belongs to.

    The first 8 bytes of the BLAKE2b hash of the key, salted with `seed` (0 to 2^64 - 1), are a fraction of
    1, and the parts lie side by side in `shares`. Raises UsageError for shares that are none.
    """
    return next(splits_of((key,), seed, shares))


def splits_of(keys: Iterable[str], seed: int, shares: Shares) -> Iterator[Split]:
    """`split_of` for many keys: a microsecond for each."""
    check_shares(shares)
    salt = seed.to_bytes(_HASH_BYTES, "big")
    train = shares[0] * 2.0 ** (8 * _HASH_BYTES)
    validation = (1 - shares[2]) * 2.0 ** (8 * _HASH_BYTES)
    for key in keys:
        data = key.encode("utf-8", "backslashreplace")  # as rows.py stores a key that is no Unicode
        place = int.from_bytes(blake2b(data, digest_size=_HASH_BYTES, salt=salt).digest(), "big")
        yield SPLITS[(place >= train) + (place >= validation)]


def check_shares(shares: Shares) -> None:
    """Raise UsageError unless these are three shares of a whole."""
    if len(shares) != len(SPLITS) or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-9):
        raise UsageError(f"expected shares of {', '.join(SPLITS)} that are not negative and sum to 1, found {shares}")
