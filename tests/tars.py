"""Small tars in memory, and the samples that a reader must return."""

import gzip
import io
import random
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import webdataset

from mmbeam.config import Limits
from mmbeam.readers.tar import BLOCK, TarReader, split_name
from mmbeam.types import RawSample

Pairs = list[tuple[str, bytes]]  # names and contents of members, in order
FORMATS: dict[str, Any] = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "zstd": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
}


def everything(name: str) -> bool:
    return True


def write(pairs: Sequence[tuple[str, bytes]], format: str = "pax", end: bool = True) -> bytes:
    """Return a tar written by the standard library; `end` adds the end-of-archive blocks."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[format], bufsize=BLOCK) as tar:
        for name, data in pairs:
            tar.addfile(info(name, data), io.BytesIO(data))
        length = buffer.tell()
    return buffer.getvalue() if end else buffer.getvalue()[:length]


def info(name: str, data: bytes = b"", **changes: Any) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for attribute, value in changes.items():
        setattr(header, attribute, value)
    return header


def read(data: bytes, want: Callable[[str], bool] = everything, **limits: Any) -> list[RawSample]:
    return list(TarReader(io.BytesIO(data), "x.tar", want, replace(Limits(), **limits)))


def content(samples: Sequence[RawSample]) -> list[tuple[str, dict[str, bytes]]]:
    return [(sample.key, dict(sample.members)) for sample in samples]


def by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    with path.open("rb") as stream:
        files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        samples = list(webdataset.tariterators.group_by_keys(files))
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in samples]


def grouped(pairs: Pairs) -> list[tuple[str, dict[str, bytes]]]:
    """Group well-formed pairs into samples, independently of the reader."""
    samples: list[tuple[str, dict[str, bytes]]] = []
    for name, data in pairs:
        key, field = split_name(name) or pytest.fail(name)
        if not samples or samples[-1][0] != key or field in samples[-1][1]:
            samples.append((key, {}))
        samples[-1][1][field] = data
    return samples


def corpus(seed: int = 0, count: int = 20) -> Pairs:
    source = random.Random(seed)
    sizes = [0, 1, 511, 512, 513, 1024, 5000]
    return [
        (f"{number:05d}.{field}", source.randbytes(source.choice(sizes)))
        for number in range(count)
        for field in ("jpg", "txt", "json")
    ]
