"""The run itself: what is decided at launch, where its files are, and the manifest that holds it to that."""

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import pyarrow as pa

from mmbeam.errors import JobError, RunMismatchError
from mmbeam.runs.rows import build_schema
from mmbeam.runs.store import Store
from mmbeam.types import Output

logger = logging.getLogger(__name__)

DATA = "data"
FAILURES = "failures"
PRIVATE = "_mmbeam"
MANIFEST = f"{PRIVATE}/run.json"
PLAN = f"{PRIVATE}/plan"
COMMITS = f"{PRIVATE}/commits"
STOP = f"{PRIVATE}/stop.json"
LOCK = f"{PRIVATE}/lock"
SUMMARY = f"{PRIVATE}/summary.json"

PART = re.compile(r"part-(.+)\.parquet")


def part_name(unit_id: str) -> str:
    """Where the rows of a unit are."""
    return f"{DATA}/part-{unit_id}.parquet"


def failures_name(unit_id: str, attempt: str) -> str:
    """Where one attempt at a unit puts its failures; `attempt` has no hyphen."""
    return f"{FAILURES}/part-{unit_id}-{attempt}.parquet"


def commit_name(unit_id: str) -> str:
    """Where the cached report of a unit is."""
    return f"{COMMITS}/{unit_id}.json"


def fingerprint_of(configuration: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of the canonical JSON of a configuration."""
    canonical = json.dumps(configuration, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a job does and where it puts it, fixed at launch. Picklable; holds no weights and no credentials.

    `configuration` and `recorded` go into run.json as they are: JSON values under string keys.
    """

    output: str  # a local directory, or any URL that fsspec can write to
    configuration: Mapping[str, Any]  # fingerprinted: decides what the rows mean and hold
    recorded: Mapping[str, Any]  # device, batch size, runner, inputs; package versions under "versions"
    outputs: tuple[Output, ...]
    schema: pa.Schema  # of the rows
    max_failure_rate: float = 0.05  # share of samples that may fail
    launch_id: str = field(
        default_factory=lambda: uuid.uuid4().hex, compare=False
    )  # tells two launches of one run apart

    @classmethod
    def create(
        cls,
        *,
        output: str,
        configuration: Mapping[str, Any],
        recorded: Mapping[str, Any],
        outputs: Sequence[Output],
        cleaning: bool = False,
        max_failure_rate: float = 0.05,
    ) -> Self:
        """A run whose schema names its fingerprint and its models, by name and digest; `output` is made absolute."""
        digests = {name: of["digest"] for name, of in configuration.get("models", {}).items() if "digest" in of}
        metadata = {
            "mmbeam.fingerprint": fingerprint_of(configuration),
            "mmbeam.models": json.dumps(recorded.get("models", {}), sort_keys=True),
            "mmbeam.digests": json.dumps(digests, sort_keys=True),
        }
        return cls(
            output=Store(output).url,
            configuration=configuration,
            recorded=recorded,
            outputs=tuple(outputs),
            schema=build_schema(outputs, cleaning, metadata),
            max_failure_rate=max_failure_rate,
        )

    @cached_property
    def store(self) -> Store:
        return Store(self.output)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self.configuration)


def open_run(run: Run, overwrite: bool = False) -> None:
    """Make the output this run's, or find that it is: once at launch, before any worker starts.

    Creates run.json, or compares the configuration with the one that is there. Removes stale scratch.
    With `overwrite` it first removes what mmbeam made there, and nothing else.

    Raises RunMismatchError if the output holds another configuration's run, or files of no known run.
    """
    store = run.store
    if overwrite:
        _clear(store)
    _compare(run, read_manifest(store) or _create_manifest(run))
    store.sweep_scratch()


def read_manifest(store: Store) -> dict[str, Any] | None:
    """What run.json says: fingerprint, configuration, recorded. None if there is no run."""
    try:
        content = store.read(MANIFEST)
    except FileNotFoundError:
        return None
    try:
        manifest = json.loads(content)
    except ValueError:
        manifest = None
    if isinstance(manifest, dict) and manifest.keys() >= {"fingerprint", "configuration", "recorded"}:
        return manifest
    raise RunMismatchError(
        f"{store}/{MANIFEST}: expected the manifest of a run, found something else. "
        "Choose another --output, or give --overwrite to start over"
    )


def find_run(output: str) -> Run:
    """The run that `output` holds, to look at: without its outputs and schema. Nothing is written.

    Raises JobError if there is none, RunMismatchError if its manifest cannot be read.
    """
    store = Store(output)
    manifest = read_manifest(store)
    if manifest is None:
        raise JobError(f"{store}: holds no run of mmbeam (there is no {MANIFEST}); give the --output of a job")
    configuration, recorded = manifest["configuration"], manifest["recorded"]
    return Run(
        output=store.url, configuration=configuration, recorded=recorded, outputs=(), schema=build_schema((), False, {})
    )


def _create_manifest(run: Run) -> dict[str, Any]:
    strangers = sorted(run.store.list(DATA))
    if strangers:
        raise RunMismatchError(
            f"{run.store}/{DATA}: expected no file, since there is no {MANIFEST}; found {len(strangers)}, "
            f"{strangers[0]} among them. Choose another --output, or remove them"
        )
    manifest = {
        "fingerprint": run.fingerprint,
        "configuration": run.configuration,
        "recorded": run.recorded,
    }
    content = json.dumps(manifest, indent=2, allow_nan=False).encode()
    try:
        run.store.create(MANIFEST, content)
    except FileExistsError:  # another launch was first
        return read_manifest(run.store) or manifest
    _check_exclusive(run.store, content)
    return manifest


def _check_exclusive(store: Store, content: bytes) -> None:
    """Find out, once per run, whether the store keeps the promise on which commits rest."""
    try:
        store.create(MANIFEST, content)
    except FileExistsError:
        return
    logger.warning("%s: this store lets a second writer replace what the first created; run one job at a time", store)


def _compare(run: Run, manifest: Mapping[str, Any]) -> None:
    if manifest["fingerprint"] != run.fingerprint:
        changes = differences(manifest["configuration"], run.configuration)
        raise RunMismatchError(
            f"{run.store} holds the run of another configuration (there -> here):\n  "
            + "\n  ".join(changes or [f"fingerprint: {manifest['fingerprint']} -> {run.fingerprint}"])
            + "\nChoose another --output, or give --overwrite to replace that run"
        )
    for change in differences(manifest["recorded"].get("versions", {}), run.recorded.get("versions", {})):
        logger.warning("%s was begun with other versions: %s", run.store, change)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Every leaf in which two nested mappings differ, as "dotted.key: old -> new", sorted."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    names = sorted(name for name in before | after if before.get(name) != after.get(name))
    return [f"{name}: {before.get(name, '(absent)')} -> {after.get(name, '(absent)')}" for name in names]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _clear(store: Store) -> None:
    """Remove a run, its rows first and its manifest last, so that what a kill leaves is a run with fewer rows."""
    if not store.exists(MANIFEST):
        return
    for folder in (DATA, FAILURES):
        for name in store.list(folder):
            if PART.fullmatch(name):
                store.remove(f"{folder}/{name}")
    for folder in (COMMITS, PLAN, PRIVATE):
        for name in store.list(folder):
            if f"{folder}/{name}" != MANIFEST:
                store.remove(f"{folder}/{name}")
    store.remove(MANIFEST)
