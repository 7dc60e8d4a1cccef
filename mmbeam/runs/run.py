"""A run: what is fixed at launch, the names of its files, and its manifest."""

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self

import pyarrow as pa

from mmbeam.config import FieldMap, Limits, Reading, Table
from mmbeam.errors import JobError, RunMismatchError
from mmbeam.names import KINDS, UNNAMED_MODEL
from mmbeam.runs.rows import build_schema
from mmbeam.runs.store import ATTEMPTS, DryStore, Store
from mmbeam.types import Output

logger = logging.getLogger(__name__)

DATA = "data"
FAILURES = "_failures"  # data frames skip names that begin with _ when they read the whole output
MEDIA = "_media"  # pyarrow and pandas read every file of data/ as Parquet
OLD_FAILURES = "failures"  # of mmbeam 0.1
PRIVATE = "_mmbeam"
MANIFEST = f"{PRIVATE}/run.json"
PLAN = f"{PRIVATE}/plan"
COMMITS = f"{PRIVATE}/commits"
STOP = f"{PRIVATE}/stop.json"
LOCK = f"{PRIVATE}/lock"
SUMMARY = f"{PRIVATE}/summary.json"
DATASET = ".huggingface.yaml"  # tells `datasets.load_dataset(OUT)` which files are the rows
_DATASET_CONFIG = b"configs:\n- config_name: default\n  data_files: data/*.parquet\n"

# The argument that decides an entry of the configuration, where its name differs or is not at the top.
_ARGUMENTS = {
    **{
        name: name
        for name in ("dims", "dtype", "engine", "language", "limit", "prompt", "source_language", "task", "tokens")
    },
    **{f"decoding.{name}": name for name in ("max_new_tokens", "num_beams", "temperature", "top_p", "seed", "robust")},
    "decoding.word_timestamps": "word_timestamps",
    **{f"reading.fields.{kind}": f"{kind}_field" for kind in KINDS},
    "modalities.model": "modalities",
    "text_prompt.model": "text_prompt",
    "reading.cleaning.image_filter": "image_filter",
    "reading.cleaning.text": "clean_text",
    "reading.cleaning.where": "where",
    "reading.draft": "draft",
}
_PART = re.compile(r"part-(.+)\.parquet")
_MEDIA_SHARD = re.compile(r"media-(.+)-[0-9a-f]+\.tar")


def part_name(unit_id: str) -> str:
    """Return the name of the file with the rows of a unit."""
    return f"{DATA}/part-{unit_id}.parquet"


def part_unit(name: str) -> str | None:
    """Return the unit of a file in data/; None if mmbeam did not write the file."""
    match = _PART.fullmatch(name)
    return None if match is None else match[1]


def media_name(unit_id: str, attempt: str) -> str:
    """Return the name of the tar with the generated media of one attempt at a unit; `attempt` has no hyphen."""
    return f"{MEDIA}/media-{unit_id}-{attempt}.tar"


def media_unit(name: str) -> str | None:
    """Return the unit of a file in _media/; None if mmbeam did not write the file."""
    match = _MEDIA_SHARD.fullmatch(name)
    return None if match is None else match[1]


def failures_name(unit_id: str, attempt: str) -> str:
    """Return the name of the failure file of one attempt at a unit; `attempt` has no hyphen."""
    return f"{FAILURES}/part-{unit_id}-{attempt}.parquet"


def failures_unit(name: str) -> str | None:
    """Return the unit of a failure file; None if mmbeam did not write the file."""
    unit = part_unit(name)
    return None if unit is None else unit.rpartition("-")[0]


def list_failures(store: Store) -> dict[str, int]:
    """Return name and size in bytes of the failure files of a run."""
    return {**store.list(OLD_FAILURES), **store.list(FAILURES)}


def remove_failures(store: Store, name: str) -> None:
    """Remove a failure file."""
    for folder in (FAILURES, OLD_FAILURES):
        store.remove(f"{folder}/{name}")


def commit_name(unit_id: str) -> str:
    """Return the name of the file with the cached report of a unit."""
    return f"{COMMITS}/{unit_id}.json"


def fingerprint_of(configuration: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the SHA-256 of the canonical JSON of a configuration."""
    canonical = json.dumps(configuration, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a job does and where its output goes, fixed at launch. Picklable; holds no weights and no credentials.

    run.json holds `configuration` and `recorded` unchanged: JSON values under string keys.
    """

    output: str  # a local directory, or any URL that fsspec can write to
    configuration: Mapping[str, Any]  # fingerprinted: it determines the content of the rows
    recorded: Mapping[str, Any]  # device, batch size, runner, inputs; package versions under "versions"
    outputs: tuple[Output, ...]
    schema: pa.Schema  # of the rows
    max_failure_rate: float = 0.05  # fraction of samples that may fail
    dry: bool = field(default=False, compare=False)  # whether nothing is written to the output
    launch_id: str = field(default_factory=lambda: uuid.uuid4().hex, compare=False)  # differs between launches of a run

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
        """Return a run. Its schema holds the fingerprint, and name and digest of each model."""
        models = configuration.get("models", {})
        digests = {name: model["digest"] for name, model in models.items() if "digest" in model}
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
        """The output directory."""
        return DryStore(self.output) if self.dry else Store(self.output)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of `configuration`."""
        return fingerprint_of(self.configuration)


def recorded_reading(run: Run) -> Reading:
    """Return how the run read its samples, without cleaning and selection; defaults for what it does not record."""
    recorded = run.configuration.get("reading", {})
    names = {item.name for item in fields(Limits)}
    return Reading(
        fields=FieldMap(**{kind: recorded.get("fields", {}).get(kind) for kind in KINDS}),
        table=Table(**{name: tuple(columns) for name, columns in recorded.get("table", {}).items()}),
        limits=Limits(**{name: value for name, value in recorded.get("limits", {}).items() if name in names}),
        background=tuple(recorded.get("background", (255, 255, 255))),
    )


def open_run(run: Run, overwrite: bool = False) -> None:
    """Create the run in its output, or check that the output holds this run. Called at launch, before workers start.

    This creates run.json, or compares the configuration with the existing one, and removes stale scratch files. With
    `overwrite` it first removes the files that mmbeam wrote there.

    Raises RunMismatchError if the output holds a run of another configuration, or data files without a run.
    """
    store = run.store
    if overwrite:
        clear_run(store)
    _compare(run, read_manifest(store) or _create_manifest(run))
    store.sweep_scratch()


def read_manifest(store: Store) -> dict[str, Any] | None:
    """Return run.json: fingerprint, configuration, recorded. None if there is no run."""
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
        "Choose another `output`, or use `overwrite` to start over"
    )


def find_run(output: str) -> Run:
    """Return the run that `output` holds, for reading only: without its outputs and schema.

    Raises JobError if there is no run, RunMismatchError if its manifest cannot be read.
    """
    store = Store(output)
    manifest = read_manifest(store)
    if manifest is None:
        raise JobError(
            f"{store}: not the output of an mmbeam job ({MANIFEST} does not exist); pass the `output` of a job"
        )
    configuration, recorded = manifest["configuration"], manifest["recorded"]
    return Run(
        output=store.url, configuration=configuration, recorded=recorded, outputs=(), schema=build_schema((), False, {})
    )


def _create_manifest(run: Run) -> dict[str, Any]:
    unknown = sorted(run.store.list(DATA))
    if unknown:
        raise RunMismatchError(
            f"{run.store}/{DATA}: expected no files, since there is no {MANIFEST}; found {len(unknown)}, the first is "
            f"{unknown[0]}. Choose another `output`, or remove them"
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
    run.store.replace(DATASET, _DATASET_CONFIG)
    return manifest


def _check_exclusive(store: Store, content: bytes) -> None:
    """Warn if the store does not create files exclusively, as commits require; once per run."""
    try:
        store.create(MANIFEST, content)
    except FileExistsError:
        return
    logger.warning("%s: this store does not create files exclusively; run one job at a time", store)


def _compare(run: Run, manifest: Mapping[str, Any]) -> None:
    if manifest["fingerprint"] != run.fingerprint:
        changes = _changes(manifest, run)
        raise RunMismatchError(
            f"{run.store} holds a run of another configuration (old -> new):\n  "
            + "\n  ".join(changes or [f"fingerprint: {manifest['fingerprint']} -> {run.fingerprint}"])
            + "\nChoose another `output`, or use `overwrite` to replace that run"
        )
    for change in differences(manifest["recorded"].get("versions", {}), run.recorded.get("versions", {})):
        logger.warning("%s was started with other versions: %s", run.store, change)


def _changes(manifest: Mapping[str, Any], run: Run) -> list[str]:
    """Return the differences between a manifest and a run in the user's terms: models by name, values as options."""
    old, new = dict(manifest["configuration"]), dict(run.configuration)
    names = [recorded.get("models", {}) for recorded in (manifest["recorded"], run.recorded)]
    models = old.pop("models", {}), new.pop("models", {})
    lines = []
    for label in dict.fromkeys([*models[0], *models[1]]):
        if models[0].get(label) == models[1].get(label):
            continue
        digests = [str(model.get(label, {}).get("digest", "unknown"))[:12] for model in models]
        titles = [
            str(name.get(label, f"digest {digest}")) if label in model else "not used"
            for name, model, digest in zip(names, models, digests, strict=True)
        ]
        title = "model" if label == UNNAMED_MODEL else f"model {label}"
        if titles[0] == titles[1]:
            lines.append(f"{title} {titles[0]}: its files have changed (digest {digests[0]} -> {digests[1]})")
        else:
            lines.append(f"{title}: {titles[0]} -> {titles[1]}")
    for line in differences(old, new):
        name, _, change = line.partition(": ")
        _, of_limits, limit = name.partition("reading.limits.")
        argument = f"max_{limit}" if of_limits else _ARGUMENTS.get(name)
        lines.append(line if argument is None else f"`{argument}`: {change}")
    return lines


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return each leaf in which two nested mappings differ, as "dotted.key: old -> new", sorted."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    names = sorted(name for name in before | after if before.get(name) != after.get(name))
    return [f"{name}: {before.get(name, 'not set')} -> {after.get(name, 'not set')}" for name in names]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _shown(value)


def _shown(value: Any) -> str:
    """Return a value of a configuration as a message shows it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    words = {None: "not set", True: "yes", False: "no"}
    if value is None or isinstance(value, bool):
        return words[value]
    return value if isinstance(value, str) else json.dumps(value)


def clear_run(store: Store) -> None:
    """Remove a run, its rows first and its manifest last: a kill leaves a run with fewer rows."""
    if not store.exists(MANIFEST):
        return
    for folder in (DATA, FAILURES, OLD_FAILURES):
        for name in store.list(folder):
            if part_unit(name) is not None:
                store.remove(f"{folder}/{name}")
    for name in store.list(MEDIA):
        if media_unit(name) is not None:
            store.remove(f"{MEDIA}/{name}")
    for folder in (COMMITS, ATTEMPTS, PLAN, PRIVATE):
        for name in store.list(folder):
            if f"{folder}/{name}" != MANIFEST:
                store.remove(f"{folder}/{name}")
    store.remove(DATASET)
    store.remove(MANIFEST)
