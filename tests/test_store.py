"""The operations of an output directory, on every store."""

import os
import pickle
import subprocess
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import STORES, fresh_output

from mmbeam.runs.store import SCRATCH_SECONDS, Store


@pytest.fixture(params=[*STORES, "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return Store(f"memory://out-{uuid.uuid4().hex[:8]}")
    return Store(fresh_output(request.param, tmp_path))


def test_files_are_created_read_listed_replaced_and_removed(store: Store) -> None:
    assert store.list("data") == {}
    assert not store.exists("data/a")
    with pytest.raises(FileNotFoundError):
        store.read("data/a")
    store.create("data/a", b"first")
    store.create("data/deeper/b", b"not listed")
    store.create("data/empty", b"")
    assert store.list("data") == {"a": 5, "empty": 0}
    assert store.read("data/a") == b"first"
    assert store.tail("data/a", 3) == b"rst"
    assert store.tail("data/a", 300) == b"first"
    store.replace("data/a", b"second")
    assert store.read("data/a") == b"second"
    assert store.list("data") == {"a": 6, "empty": 0}
    store.remove("data/a")
    store.remove("data/a")
    assert not store.exists("data/a")
    assert store.list("data") == {"empty": 0}


def test_create_fails_if_the_file_exists(store: Store) -> None:
    store.create("data/a", b"first")
    loser = store.scratch_file()
    loser.write_bytes(b"second")
    with pytest.raises(FileExistsError):
        store.create("data/a", loser)
    with pytest.raises(FileExistsError):
        store.create("data/a", b"third")
    assert store.read("data/a") == b"first"
    assert not loser.exists()
    assert set(store.list("data")) == {"a"}


def test_exactly_one_of_several_threads_creates_a_file(store: Store) -> None:
    def create(number: int) -> bool:
        barrier.wait()
        try:
            store.create("data/a", str(number).encode() * 1000)
        except FileExistsError:
            return False
        return True

    for _ in range(5):
        barrier = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            created = list(pool.map(create, range(4)))
        assert created.count(True) == 1
        assert store.read("data/a") == str(created.index(True)).encode() * 1000
        store.remove("data/a")


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs passes whole parts to aiohttp
def test_a_multipart_upload_is_created_once(store: Store) -> None:
    """A large file is uploaded in parts; the condition applies to the last request."""
    size = (110 if store.url.startswith("s3") else 6) << 20
    for first in (True, False):
        file = store.scratch_file()
        with file.open("wb") as stream:
            stream.truncate(size)
        if first:
            store.create("data/a", file)
        else:
            with pytest.raises(FileExistsError):
                store.create("data/a", file)
    assert store.list("data") == {"a": size}


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_files_are_published_without_rename_or_copy(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is exclusive on a store: two simultaneous attempts would both succeed."""

    def refused(*args: object, **_: object) -> None:
        raise AssertionError(f"moved or copied: {args}")

    store.create("data/earlier", b"x")  # the first use imports modules and connects
    for name in ("mv", "copy", "cp_file", "mv_file", "_mv", "_copy", "_cp_file", "_mv_file"):
        monkeypatch.setattr(type(store._at("data")[0]), name, refused, raising=False)
    for name in ("rename", "renames", "replace"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr("shutil.move", refused)
    file = store.scratch_file()
    file.write_bytes(b"first")
    store.create("data/a", file)
    with pytest.raises(FileExistsError):
        store.create("data/a", b"second")
    assert store.read("data/a") == b"first"


def test_a_store_pickles(store: Store) -> None:
    store.create("a", b"x")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"x"


def test_a_local_store_does_not_follow_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("out")
    monkeypatch.chdir("/")
    store.create("data/a", b"x")
    assert (tmp_path / "out/data/a").read_bytes() == b"x"
    assert Store(f"file://{tmp_path}/out").read("data/a") == b"x"


def test_published_files_have_ordinary_permissions(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.create("data/a", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "data/a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "data/a").stat().st_nlink == 1


def test_credentials_and_queries_of_a_url_are_not_shown() -> None:
    store = Store("ftp://user:secret@host/out?token=secret")
    assert str(store) == "ftp://host/out"
    assert "secret" not in repr(store)


def test_stale_scratch_files_are_removed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    live, dead, old, recent = (store.scratch_file() for _ in range(4))
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = dead.with_name(dead.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    old = old.with_name(f"mmbeam-elsewhere-1-{uuid.uuid4().hex}")
    recent = recent.with_name(f"mmbeam-else-where-1-{uuid.uuid4().hex}")
    for path in (live, dead, old, recent):
        path.write_bytes(b"")
    os.utime(old, (0, time.time() - SCRATCH_SECONDS - 60))
    store.sweep_scratch()
    assert sorted(store.scratch().iterdir()) == sorted([live, recent])


def test_the_sweep_keeps_files_with_other_names(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    scratch, other = store.scratch_file(".parquet"), store.scratch() / "mmbeam-results-2024-05.parquet"
    folder = store.scratch() / f"mmbeam-{scratch.stem.removeprefix('mmbeam-')}"
    for path in (scratch, other):
        path.write_bytes(b"x")
    folder.mkdir()
    for path in (scratch, other, folder):
        os.utime(path, (0, 0))
    store.sweep_scratch()
    assert sorted(store.scratch().iterdir()) == sorted([other, folder])
