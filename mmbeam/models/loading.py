"""Find a model's files, check them, and load its weights: safetensors only, never code, never pickles.

It knows nothing of what a family does with its configuration; the encoders and generators do.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import huggingface_hub
import torch
import transformers
from filelock import FileLock
from huggingface_hub import errors as hub_errors
from transformers import AutoConfig

from mmbeam.config import SHIPPED
from mmbeam.errors import ModelError, UsageError

logger = logging.getLogger(__name__)

# What a model consists of: configuration, weights, tokenizer, word vectors. Nothing else is downloaded, copied or
# digested: no pickles, no other frameworks' exports, no pictures of the model card.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.spm", "*.jinja", "*.vec")
NOT_MODEL_FILES = ("onnx/*", "openvino/*", ".*", "*/.*")

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

_SHIPPED_DIRECTORY = Path(__file__).parent / "fusion" / SHIPPED

# Buffers that older checkpoints hold or lack, and that are computed from the configuration alone.
_COMPUTED_KEYS = re.compile(r"(^|\.)(position_ids|token_type_ids)$")

# While transformers loads it replaces functions of its own and of torch, for all threads, and puts back what it found:
# two loads at once leave them replaced, and no later model of the process ties its weights.
_one_load = threading.Lock()


@dataclass(frozen=True)
class Resolved:
    """Where a model's files are on this machine."""

    directory: Path
    revision: str | None  # the commit of a hub model, None for directories
    name: str  # as the user named it, without @revision and without credentials

    @property
    def reference(self) -> str:
        """What `resolve` on another machine has to be given to find the same files."""
        if self.revision is not None:
            return f"{self.name}@{self.revision}"
        if self.name == SHIPPED:
            return SHIPPED  # every installation of this package has it, wherever that is
        return self.name if "://" in self.name else str(self.directory)


def resolve(model: str) -> Resolved:
    """Bring the files of `model` to this machine: a directory, a remote directory, a hub name, or "shipped".

    A hub name may end in `@revision`; it is resolved to a commit here, once. HF_HUB_OFFLINE is honoured.
    Raises ModelError saying what to do.
    """
    if model == SHIPPED:
        return Resolved(_SHIPPED_DIRECTORY, None, SHIPPED)
    if "://" in model:
        return Resolved(_copy_remote(model), None, _public(model))
    path = Path(model).expanduser()
    if path.is_dir():
        return Resolved(path.resolve(), None, model)
    if path.exists():
        raise ModelError(f"{model}: expected a directory with config.json and model.safetensors, found a file")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{model}: no such directory; give a directory that exists, or a hub name like org/model")
    return _download(model)


def _download(model: str) -> Resolved:
    name, _, revision = model.partition("@")
    try:
        directory = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=list(MODEL_FILES),
            ignore_patterns=list(NOT_MODEL_FILES),
        )
    except Exception as error:  # the hub's errors have no common root
        raise ModelError(_hub_message(name, revision, error)) from error
    return Resolved(Path(directory), Path(directory).name, name)


def _hub_message(name: str, revision: str, error: Exception) -> str:
    if isinstance(error, hub_errors.HFValidationError):
        return f"{name!r} is neither a directory that exists nor a hub name (org/model)"
    if isinstance(error, hub_errors.GatedRepoError):
        return (
            f"{name}: access to this hub model must be granted first; accept its terms and log in with `hf auth login`"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{name}: the hub has no revision {revision!r} of it; leave out @{revision} or name an existing one"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f"{name}: no such directory here and no such model on the hub (a private one needs `hf auth login`)"
    if isinstance(error, hub_errors.LocalEntryNotFoundError | hub_errors.OfflineModeIsEnabled):
        there = ", ".join(f"{name}@{commit}" for commit in _cached(name))
        return (
            f"{name}{f'@{revision}' if revision else ''}: not in the local hub cache"
            f"{f', which has {there}' if there else ''}, and the hub cannot be reached or HF_HUB_OFFLINE is set; "
            f"download it where there is a network with `hf download {name}`, or give a directory"
        )
    return f"{name}: downloading it from the hub failed: {type(error).__name__}: {error}"


def _cached(name: str) -> list[str]:
    """The revisions of a hub model that the cache has."""
    try:
        repositories = huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE).repos
    except (huggingface_hub.CacheNotFound, OSError):
        return []
    return sorted(each.commit_hash for found in repositories if found.repo_id == name for each in found.revisions)


def _public(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _copy_remote(url: str) -> Path:
    """Copy a remote directory into the local cache, keyed by its listing, one process at a time."""
    url = url.rstrip("/")
    name = _public(url)
    try:
        fs, root = fsspec.core.url_to_fs(url)
        listing = {path[len(root) :].lstrip("/"): info for path, info in fs.find(root, detail=True).items()}
    except Exception as error:  # every store has its own errors
        raise ModelError(f"{name}: cannot be listed: {type(error).__name__}: {error}") from error
    wanted = {relative: info for relative, info in listing.items() if is_model_file(relative)}
    if not wanted:
        raise ModelError(f"{name}: no model files there ({', '.join(MODEL_FILES)}); give the directory of config.json")
    target = _cache_directory() / _listing_key(name, wanted)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            _copy(fs, root, wanted, target)
    return target


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mmbeam" / "models"


def _listing_key(name: str, listing: Mapping[str, Mapping[str, Any]]) -> str:
    def version(info: Mapping[str, Any]) -> str:
        found = [str(info[key]) for key in ("ETag", "etag", "md5Hash", "mtime", "created") if info.get(key)]
        return found[0] if found else ""

    lines = [f"{relative}\0{listing[relative]['size']}\0{version(listing[relative])}" for relative in sorted(listing)]
    return hashlib.sha256("\n".join([name, *lines]).encode()).hexdigest()[:32]


def _copy(fs: Any, root: str, wanted: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """Copy into a scratch directory beside `target`, check the sizes, then rename: `target` is whole or absent."""
    scratch = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        for relative in wanted:
            (scratch / relative).parent.mkdir(parents=True, exist_ok=True)
        fs.get([f"{root}/{relative}" for relative in wanted], [str(scratch / relative) for relative in wanted])
        for relative, info in wanted.items():
            size = (scratch / relative).stat().st_size
            if size != info["size"]:
                raise ModelError(f"{root}/{relative}: expected {info['size']:,} bytes, copied {size:,}; try again")
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_model_file(relative: str) -> bool:
    """Whether a file of a model directory, by its relative posix path, is part of the model."""

    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatch(relative, pattern) for pattern in patterns)

    return matches(MODEL_FILES) and not matches(NOT_MODEL_FILES)


def read_json(directory: Path, name: str, required: bool = True) -> dict[str, Any]:
    """The JSON object in `directory/name`; {} if it is absent and not required. Raises ModelError."""
    path = directory / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ModelError(
                f"{directory}: has no {name}; give a model directory as save_pretrained writes it"
            ) from None
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(directory: Path) -> Any:
    """config.json as transformers reads it, with the defaults that the file leaves out. Raises ModelError."""
    read_json(directory, "config.json")  # for its clear errors
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        raise ModelError(f"{directory}/config.json: {type(error).__name__}: {error}") from error


def check_weights(directory: Path) -> None:
    """Raise ModelError unless the weights are there, whole, as safetensors."""
    index_name = "model.safetensors.index.json"
    if (directory / index_name).exists():
        shards = set(read_json(directory, index_name).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        if missing or not shards:
            raise ModelError(
                f"{directory}: {index_name} names {missing or 'no files'}, which are not there; copy it whole"
            )
    elif not (directory / "model.safetensors").is_file():
        raise ModelError(
            f"{directory}: has no model.safetensors; pickled weights (pytorch_model.bin) are never loaded: convert "
            "them where you trust them, with `AutoModel.from_pretrained(dir).save_pretrained(new_dir)`"
        )


def digest(directory: Path) -> str:
    """SHA-256 over the names and contents of the model's files, for the run's fingerprint."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    files = {name: path for name, path in sorted(found.items()) if is_model_file(name)}
    states = tuple((name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items())
    return _digest(directory, states)


@cache
def _digest(directory: Path, states: tuple[tuple[str, int, int], ...]) -> str:
    """The digest of files whose names, sizes and times are `states`: a launch asks for it more than once."""
    names = [name for name, _, _ in states]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the GIL
        digests = list(pool.map(_file_digest, [directory / name for name in names]))
    lines = [f"{name}\0{file_digest}\n" for name, file_digest in zip(names, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_dtype(name: str | None, device: str) -> torch.dtype:
    """The dtype called `name`; without one float32 on cpu and bfloat16 elsewhere, whatever the hardware can do."""
    if name is None:
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise UsageError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(name: str | None, device: str) -> str:
    """The one name of the dtype that `name` means on `device`: "float32", "bfloat16", "float16"."""
    return str(parse_dtype(name, device)).removeprefix("torch.")


def load_pretrained(
    cls: Any,
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    ignore_missing: Sequence[str] = (),
    **kwargs: Any,
) -> Any:
    """A transformers model of class `cls` with its weights from `directory`, on `device`, in eval mode.

    A weight that the files lack would be random, so it is a ModelError, unless its name matches one of
    the regular expressions in `ignore_missing` (layers the caller does not use).
    """
    check_weights(directory)
    quiet_transformers()
    try:
        with _one_load:
            model, info = cls.from_pretrained(
                directory,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are an error below, with their names
                **kwargs,
            )
    except Exception as error:  # transformers raises whatever its parts raise
        raise ModelError(f"{directory}: {cls.__name__} cannot be loaded: {type(error).__name__}: {error}") from error
    _check_keys(directory, cls.__name__, info, ignore_missing)
    return model.eval().to(device)


def _check_keys(directory: Path, cls: str, info: Mapping[str, Any], ignore_missing: Sequence[str]) -> None:
    ignored = [_COMPUTED_KEYS, *map(re.compile, ignore_missing)]
    missing = sorted(key for key in info["missing_keys"] if not any(pattern.search(key) for pattern in ignored))
    mismatched = [f"{key} {tuple(found)} for {tuple(wanted)}" for key, found, wanted in sorted(info["mismatched_keys"])]
    broken = [*missing, *mismatched, *map(str, info.get("error_msgs", ()))]
    if broken:
        shown = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise ModelError(
            f"{directory}: its weights do not fill {cls}: missing or of another shape: {shown}; "
            "they would be random. Is config.json of the same model as the weights?"
        )
    if info["unexpected_keys"]:
        logger.info("%s: %d weights are not used by %s", directory, len(info["unexpected_keys"]), cls)


def quiet_transformers() -> None:
    """Send what transformers has to say through logging alone: no progress bars, no handler of its own.

    Its warnings (tables of unused weights, remarks on token ids) are left out unless TRANSFORMERS_VERBOSITY
    asks for them: what matters of them is checked here, and is an error.
    """
    chatter: Any = transformers.utils.logging  # untyped
    chatter.disable_progress_bar()
    chatter.disable_default_handler()
    chatter.enable_propagation()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        chatter.set_verbosity_error()
