"""Damaged shards in whole jobs: every sample is a row or a failure, and the neighbours of damage are whole.

All shards of the table are read by one `mmbeam embed`, each as a unit. A shard has four samples of jpg, wav and txt.
"""

import gzip
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import shards
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs import read_failures, read_rows
from tars import PACK, write

from mmbeam.cli import main
from mmbeam.config import Reading, Windows
from mmbeam.readers.listing import list_shards
from mmbeam.readers.tar import parts_are_contiguous
from mmbeam.readers.units import plan_units
from mmbeam.readers.windows import read_batches
from mmbeam.runs.rows import build_schema, check_conserved, make_rows
from mmbeam.types import Needs, Shard, Tally

FIELDS = ("jpg", "wav", "txt")
KEYS = [f"s{number:03}" for number in range(4)]


def members_of(number: int) -> list[tuple[str, bytes]]:
    truth = shards.make_truth(number, key=f"s{number:03}")
    return [(f"{truth.key}.{name}", truth.members[name]) for name in FIELDS]


PAIRS = [pair for number in range(4) for pair in members_of(number)]
WHOLE = write(PAIRS, "ustar")
with tarfile.open(fileobj=io.BytesIO(WHOLE)) as _tar:
    AT = {member.name: member.offset for member in _tar}
    END = {member.name: member.offset + 512 + -(-member.size // 512) * 512 for member in _tar.getmembers()}
    LAST = max(END.values())


def put(at: int, data: bytes) -> bytes:
    return WHOLE[:at] + data + WHOLE[at + len(data) :]


def flip(at: int) -> bytes:
    return put(at, bytes([WHOLE[at] ^ 1]))


def with_checksum(header: bytes) -> bytes:
    return header[:148] + b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:])) + header[156:]


def with_size(name: str, change: int) -> bytes:
    """The size in a header, with a right checksum, differs by `change`."""
    at = AT[name]
    size = int(WHOLE[at + 124 : at + 135], 8) + change
    return put(at, with_checksum(WHOLE[at : at + 124] + b"%011o\0" % size + WHOLE[at + 136 : at + 512]))


def long_named(format: str, damage: Callable[[bytes], bytes]) -> bytes:
    """The second sample has long names, so each of its members has an extended header; damage that of its jpg."""
    name = "s001" + "-long" * 30
    pairs = [(pair[0].replace("s001", name), pair[1]) for pair in PAIRS]
    at = len(write(pairs[:3], format, end=False))
    data = write(pairs, format)
    return data[:at] + damage(data[at : at + 1024]) + data[at + 1024 :]


@dataclass(frozen=True)
class Case:
    data: bytes
    hit: Mapping[str, str]  # for each sample that is hit: the field that its row lacks, or "" if it has no row
    reason: str = ""  # part of the message of a record
    at: int | None = None  # the byte that a record names
    broken: bool = False
    suffix: str = ".tar"
    others: tuple[str, ...] = (KEYS[0], KEYS[2], KEYS[3])  # keys of rows that are whole


def hits_second(data: bytes, field: str = "jpg", reason: str = "expected a tar header", **changes: Any) -> Case:
    return Case(data, {"s001": field}, reason, **changes)


JPG, WAV, TXT, NEXT = AT["s001.jpg"], AT["s001.wav"], AT["s001.txt"], AT["s002.jpg"]
CASES: dict[str, Case] = {
    "whole": Case(WHOLE, {}, others=tuple(KEYS)),
    "checksum-first": hits_second(flip(JPG + 150), at=JPG),
    "checksum-middle": hits_second(flip(WAV + 150), "wav", at=WAV),
    "checksum-last": hits_second(flip(TXT + 150), "txt", at=TXT),
    "name-key": hits_second(flip(JPG + 2), at=JPG),
    "name-dot": hits_second(flip(JPG + 4), at=JPG),
    "name-field": hits_second(flip(JPG + 6), at=JPG),
    "name-last": hits_second(flip(TXT + 2), "txt", at=TXT),
    "magic": hits_second(flip(JPG + 258), at=JPG),
    "type": hits_second(flip(JPG + 156), at=JPG),
    "size-illegible": hits_second(put(JPG + 124, b"zzzzzzzzzzz\0"), at=JPG),
    "size-illegible-checked": hits_second(
        put(JPG, with_checksum(WHOLE[JPG : JPG + 124] + b"zzzzzzzzzzz\0" + WHOLE[JPG + 136 : JPG + 512])), at=JPG
    ),
    "size-512-more": hits_second(with_size("s001.jpg", 512), reason="its size"),
    "size-3000-more": hits_second(with_size("s001.jpg", 3000), reason="its size"),
    "size-into-the-next": hits_second(with_size("s001.txt", 600), "txt", reason="its size"),
    "size-beyond-the-end": hits_second(with_size("s001.jpg", 1 << 27), reason="its size"),
    "size-8-gb": hits_second(with_size("s001.jpg", (8 << 30) - 10_000), reason="its size"),
    "size-less": Case(with_size("s001.wav", -1024), {"s001": "wav"}, "its size", others=("s000", "s002", "s003")),
    "zero-block": hits_second(put(JPG, bytes(512)), at=JPG),
    "zero-block-last": hits_second(put(TXT, bytes(512)), "txt", at=TXT),
    "zero-page": hits_second(put(JPG, bytes(1024)), at=JPG),
    "zero-member": hits_second(put(JPG, bytes(WAV - JPG)), at=JPG, reason="zeros"),
    "garbage": hits_second(put(JPG, b"\xa5" * 700), at=JPG),
    "garbage-over-a-sample": Case(put(JPG, b"\xa5" * (NEXT - JPG)), {}, "expected a tar header", at=JPG),
    "inserted-block": Case(
        WHOLE[:JPG] + b"\xa5" * 512 + WHOLE[JPG:], {}, "expected a tar header", at=JPG, others=tuple(KEYS)
    ),
    "first-checksum": Case(flip(150), {"s000": "jpg"}, "expected a tar header", at=0, others=tuple(KEYS[1:])),
    "first-zero": Case(put(0, bytes(512)), {"s000": "jpg"}, "expected a tar header", at=0, others=tuple(KEYS[1:])),
    "first-garbage": Case(put(0, b"\xa5" * 512), {"s000": "jpg"}, "expected", at=0, others=tuple(KEYS[1:])),
    "last-checksum": Case(flip(AT["s003.txt"] + 150), {"s003": "txt"}, "expected", others=tuple(KEYS[:3])),
    "last-zero": Case(put(AT["s003.txt"], bytes(512)), {"s003": "txt"}, "expected", others=tuple(KEYS[:3])),
    "last-garbage": Case(put(AT["s003.txt"], b"\xa5" * 900), {"s003": "txt"}, "expected", others=tuple(KEYS[:3])),
    "cut-in-data": Case(WHOLE[: AT["s003.wav"] + 1500], {"s003": ""}, "expected", broken=True, others=tuple(KEYS[:3])),
    "cut-in-a-first-header": Case(
        WHOLE[: AT["s003.jpg"] + 200], {"s003": ""}, "no header follows", broken=True, others=tuple(KEYS[:3])
    ),
    "cut-in-a-header": Case(
        WHOLE[: AT["s003.txt"] + 200], {"s003": ""}, "no header follows", broken=True, others=tuple(KEYS[:3])
    ),
    "cut-between-members": Case(WHOLE[: AT["s003.wav"]], {}, "has no wav", broken=True, others=tuple(KEYS[:3])),
    "cut-between-samples": Case(WHOLE[: AT["s003.jpg"]], {}, others=tuple(KEYS[:3])),
    "no-end-mark": Case(WHOLE[:LAST], {}, others=tuple(KEYS)),
    "cut-in-the-end-mark": Case(WHOLE[: LAST + 300], {}, others=tuple(KEYS)),
    "two-tars": Case(write(PAIRS[:6], "ustar") + write(PAIRS[6:], "gnu"), {}, others=tuple(KEYS)),
    "gzip-checksum": Case(
        gzip.compress(WHOLE)[:-8] + bytes(4) + gzip.compress(WHOLE)[-4:],
        {},
        "the checksum of a gzip member is wrong",
        broken=True,
        suffix=".tar.gz",
        others=tuple(KEYS),
    ),
    "gzip-cut-trailer": Case(
        gzip.compress(WHOLE)[:-3], {}, "ends too early", broken=True, suffix=".tgz", others=tuple(KEYS)
    ),
    "gzip-cut": Case(
        gzip.compress(WHOLE[: AT["s003.wav"] + 900], 0)[:-10],
        {"s003": ""},
        "the gzip stream ends too early",
        broken=True,
        suffix=".tar.gz",
        others=tuple(KEYS[:3]),
    ),
    "gzip-flipped-header": hits_second(gzip.compress(flip(JPG + 150)), at=JPG, suffix=".tar.gz"),
    "gzip-8-gb": hits_second(
        gzip.compress(with_size("s001.jpg", (8 << 30) - 10_000)), reason="its size", suffix=".tar.gz"
    ),
    "zstd-checksum": Case(
        zstandard.ZstdCompressor(write_checksum=True).compress(WHOLE)[:-4] + b"oops",
        {},
        "checksum",
        broken=True,
        suffix=".tar.zst",
        others=tuple(KEYS),
    ),
    "zstd-zero-block": hits_second(
        zstandard.ZstdCompressor().compress(put(JPG, bytes(512))), at=JPG, suffix=".tar.zst"
    ),
    "pax-checksum": Case(long_named("pax", lambda head: head[:150] + b"z" + head[151:]), {}, "header"),
    "pax-payload": Case(long_named("pax", lambda head: head[:512] + b"z" * 20 + head[532:]), {}, "pax header"),
    "pax-zero": Case(long_named("pax", lambda head: bytes(1024)), {}, "header"),
    "gnu-checksum": Case(long_named("gnu", lambda head: head[:150] + b"z" + head[151:]), {}, "header"),
    "gnu-zero": Case(long_named("gnu", lambda head: bytes(1024)), {}, "header"),
}


@dataclass(frozen=True)
class Outcome:
    """The result of the job over all cases, by name of the case."""

    status: int
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]]  # by key
    failures: Mapping[str, list[Mapping[str, Any]]]
    summary: Mapping[str, Any]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Outcome:
    folder = tmp_path_factory.mktemp("damaged")
    for name, case in CASES.items():
        (folder / f"{name}{case.suffix}").write_bytes(case.data)
    output = folder / "out"
    options = f"--input {folder} --output {output} --model {clip} --device cpu --max-failure-rate 1"
    status = main(["embed", *options.split()])
    rows: dict[str, dict[str, Mapping[str, Any]]] = {name: {} for name in CASES}
    failures: dict[str, list[Mapping[str, Any]]] = {name: [] for name in CASES}
    for row in read_rows(output):
        rows[case_of(row["shard"])][row["key"]] = row
    for record in read_failures(output):
        failures[case_of(record["shard"])].append(record)
    summary = json.loads((output / "_mmbeam" / "summary.json").read_text())
    return Outcome(status, rows, failures, summary)


def case_of(shard: str) -> str:
    return Path(shard).name.partition(".")[0]


@pytest.mark.parametrize("name", list(CASES))
def test_damage_costs_what_it_hits_and_nothing_else(name: str, outcome: Outcome) -> None:
    case, rows, failures = CASES[name], outcome.rows[name], outcome.failures[name]
    for key in case.others:
        row, whole = rows[key], outcome.rows["whole"][key]
        assert (row["errors"], row["text"]) == ([], whole["text"])
        assert row["image_embedding"] == pytest.approx(whole["image_embedding"], abs=1e-5)
    for key, lost in case.hit.items():
        records = [record for record in failures if record["key"] == key]
        assert records
        assert (key in rows) == (lost != "")
        if lost:
            row = rows[key]
            column = {"jpg": "image_embedding", "txt": "text_embedding"}.get(lost)
            assert row["errors"] == ([column] if column else [])
            assert {record["modality"] for record in records} == {{"jpg": "image", "wav": "audio", "txt": "text"}[lost]}
    assert any(case.reason in record["message"] for record in failures) or not case.reason
    assert bool(failures) == bool(case.reason)
    assert {record["step"] for record in failures} <= {"read"}
    if case.at is not None:
        assert any(f"byte {case.at:,}" in record["message"] or record["offset"] == case.at for record in failures)
    assert any(case_of(reason.partition(": ")[0]) == name for reason in outcome.summary["broken"]) == case.broken


def test_the_exit_status_is_3_and_the_counts_add_up(outcome: Outcome) -> None:
    tally = outcome.summary["tally"]
    assert outcome.status == 3
    assert outcome.summary["units_failed"] == 0
    assert tally["samples"] == tally["rows"] + tally["failed"] + sum(tally["skipped"].values())
    assert tally["rows"] == sum(map(len, outcome.rows.values()))
    assert sum(tally["failures"].values()) == sum(map(len, outcome.failures.values()))


def test_links_of_a_tar_are_records_and_other_members_are_counted(
    tmp_path: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = members_of(0)[0][1]
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "000.jpg").write_bytes(picture)
    for number in range(5):
        (folder / f"00{number}.txt").write_text(f"text {number}")
    (folder / "001.jpg").hardlink_to(folder / "000.jpg")
    (folder / "002.jpg").symlink_to("000.jpg")
    (folder / "003.jpg").symlink_to("/etc/passwd")
    (folder / "004.jpg").symlink_to("005.jpg")  # a missing file
    for name in ("000.cls", "001.ppm4", "README"):
        (folder / name).write_text("1")
    for suffix in ("", ".gz"):
        command = [
            "tar",
            "--create",
            "--sort=name",
            "--auto-compress",
            "-C",
            folder,
            "-f",
            tmp_path / f"in.tar{suffix}",
        ]
        subprocess.run([*command, "."], check=True)
    options = f"--input {tmp_path}/in.tar* --output {tmp_path}/out --model {clip} --device cpu --max-failure-rate 1"
    assert main(["embed", *options.split()]) == 0
    rows, records = read_rows(tmp_path / "out"), read_failures(tmp_path / "out")
    assert sorted(row["key"] for row in rows) == sorted([f"./00{number}" for number in range(5)] * 2)
    for row in rows:
        assert row["errors"] == ([] if row["key"] == "./000" else ["image_embedding"])
    assert len(records) == 8
    for record in records:
        assert (record["modality"], record["row"]) == ("image", True)
        assert f"is a {'hard' if record['key'] == './001' else 'symbolic'} link to " in record["message"]
    members = json.loads((tmp_path / "out/_mmbeam/summary.json").read_text())["tally"]["members"]
    assert members == {".cls": 2, ".ppm4": 2, "directory": 2, "file without an extension": 2}
    shown = capsys.readouterr().out
    assert "members not read: 2 .cls, 2 .ppm4, 2 directory, 2 file without an extension" in shown


def test_a_large_shard_in_parts_costs_the_same_as_a_whole_one(tmp_path: Path) -> None:
    """Damage in a shard that is cut at every 2 KiB. If the parts join, they hold what a whole read has."""
    needs, windows = Needs(), Windows()
    for name in (
        "checksum-first",
        "zero-block",
        "garbage",
        "size-3000-more",
        "size-less",
        "inserted-block",
        "two-tars",
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(CASES[name].data)
        shard = Shard(path=str(path), url=str(path), size=path.stat().st_size)
        [whole] = plan_units([shard], [])
        parts = plan_units([shard], [], 2048)
        assert len(parts) > 5
        expected = [sample for batch in read_batches(whole, Reading(), needs, windows) for sample in batch.samples]
        batches = [list(read_batches(part, Reading(), needs, windows)) for part in parts]
        assert not any(batch.unit_error for some in batches for batch in some)
        if parts_are_contiguous(some[-1].inputs_read[0] for some in batches):
            assert [sample for some in batches for batch in some for sample in batch.samples] == expected


FAULTS = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 511), st.integers(1, 255)),
    st.tuples(st.just("overwrite"), st.integers(1, 3000), st.sampled_from([0, 0xA5])),
    st.tuples(st.just("cut"), st.integers(0, 1200), st.just(0)),
    st.tuples(st.just("insert"), st.integers(1, 3), st.sampled_from([0, 0xA5])),
    st.tuples(st.just("remove"), st.integers(1, 3), st.just(0)),
)
SAMPLES = st.lists(
    st.dictionaries(st.sampled_from(["txt", "json", "cls"]), st.integers(0, 1500), min_size=1), min_size=1, max_size=8
)


@given(SAMPLES, st.lists(st.tuples(st.integers(0, 23), FAULTS), max_size=3), st.sampled_from(list(PACK)), st.data())
@settings(deadline=None, max_examples=60)
def test_samples_are_rows_and_failures_in_order_and_once(
    samples: list[dict[str, int]], faults: list[tuple[int, tuple[str, int, int]]], packing: str, data: st.DataObject
) -> None:
    """Headers are damaged, not data, so that a text in a row is one that was written."""
    pairs = [
        (f"{number:03}.{name}", json.dumps(f"{number} {name} " + "x" * size).encode())
        for number, fields in enumerate(samples)
        for name, size in fields.items()
    ]
    shard = bytearray(write(pairs, data.draw(st.sampled_from(["ustar", "gnu", "pax"]))))
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        headers = [member.offset for member in tar]
    for place, (fault, number, value) in faults:
        at = headers[place % len(headers)]
        match fault:
            case "flip" if at + number < len(shard):
                shard[at + number] ^= value
            case "overwrite" if at + number < len(shard):
                shard[at : at + number] = bytes([value]) * number
            case "cut":
                del shard[at + number :]
            case "insert":
                shard[at:at] = bytes([value]) * (number * 512)
            case "remove":
                del shard[at : at + number * 512]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.tar").write_bytes(PACK[packing](bytes(shard)))
        [unit] = plan_units(list_shards([folder]), [])
        batches = list(read_batches(unit, Reading(), Needs(), Windows(samples=3)))
    if batches[-1].unit_error is not None:
        return
    windows = [make_rows(batch, [], build_schema([], False, {})) for batch in batches]
    tally = sum((window.tally for window in windows), Tally())
    check_conserved(tally, "the shard")
    rows = [row for window in windows for row in window.rows.to_pylist()]
    records = [record for window in windows for record in window.failures]
    assert tally.rows == len(rows)
    assert sum(tally.failures.values()) == len(records)
    offsets = [sample.offset for batch in batches for sample in batch.samples]
    assert offsets == sorted(set(offsets))
    written = {value.decode() for _, value in pairs}
    lost = len(written) - sum(row[name] is not None for row in rows for name in ("text", "metadata"))
    kept = [row["text"] for row in rows if row["text"] is not None]
    assert set(kept) <= {*written, ""} or records
    if not any(fault == "remove" for _, (fault, *_) in faults):  # whole members may have been removed
        assert lost <= sum(name.endswith("cls") for name, _ in pairs) or records or tally.warnings
