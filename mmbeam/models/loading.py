"""Find a model's files, check them, and load its weights: safetensors only, never code, never pickles.

What the configuration of a family means is defined in encoders/ and generators/.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from filelock import FileLock
from huggingface_hub import errors as hub_errors
from transformers import AttentionMaskInterface, AutoConfig
from transformers.masking_utils import eager_mask, sdpa_mask

from mmbeam.errors import ModelError, UsageError, printable
from mmbeam.names import SHIPPED_MODEL
from mmbeam.readers.paths import file_system, public_path

logger = logging.getLogger(__name__)

# The files of a model: configuration, weights, tokenizer, word vectors. Only these are downloaded, copied and digested:
# no pickles, no exports for other frameworks, no images of the model card.
MODEL_FILES = (
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.spm", "*.jinja", "*.vec"),
    *("*.bpe", "*.codes", "*.tiktoken", "*.tokenizer"),  # vocabularies of a few tokenizer classes
)
NOT_MODEL_FILES = ("onnx/*", "openvino/*", ".*", "*/.*")

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

PACKAGES = ("open_clip", "timm")  # prefixes of models that run on another package

_SHIPPED_DIRECTORY = Path(__file__).parent / "fusion" / SHIPPED_MODEL

# Buffers that some checkpoints have and others lack; they are computed from the configuration alone.
_COMPUTED_KEYS = re.compile(r"(^|\.)(position_ids|token_type_ids)$")

# While it loads, transformers (5.20) replaces PreTrainedModel.tie_weights, for all threads, and restores it afterwards.
# Two concurrent loads could leave it replaced, and no later model of the process would tie its weights.
# A test in tests/test_loading.py fails when the lock is no longer needed.
_load_lock = threading.Lock()


@dataclass(frozen=True)
class Resolved:
    """Where a model's files are on this machine."""

    directory: Path
    revision: str | None  # the commit of a hub model, None for directories
    name: str  # as the user gave it, without @revision and without credentials
    package: str | None = None  # one of PACKAGES; None: transformers

    @property
    def reference(self) -> str:
        """The argument with which `resolve` finds the same files on another machine."""
        prefix = "" if self.package is None else f"{self.package}:"
        if self.revision is not None:
            return f"{prefix}{self.name}@{self.revision}"
        if self.name == SHIPPED_MODEL:
            return SHIPPED_MODEL  # every installation of this package has it
        return prefix + (self.name if "://" in self.name else str(self.directory))


def resolve(model: str) -> Resolved:
    """Find or fetch the files of `model`: a directory, a remote directory, a hub name, or "shipped".

    With a prefix, "open_clip:" or "timm:", it may also be a name of that package: "open_clip:ViT-B-32/openai".

    A hub name may end in `@revision`, which is resolved to a commit. HF_HUB_OFFLINE is honoured. Raises ModelError,
    also for files that lie outside the directory, and for an adapter without its model.
    """
    package, model = split_package(model)
    if package is not None and "://" not in model and not Path(model).expanduser().is_dir():
        model = _package_repository(package, model)
    resolved = replace(_find(model), package=package)
    model_files(resolved.directory)
    _check_no_adapter(resolved.directory)
    return resolved


def split_package(model: str) -> tuple[str | None, str]:
    """Return the package that a model's prefix names, None for transformers, and the rest."""
    package, colon, rest = model.partition(":")
    return (package, rest) if colon and package in PACKAGES else (None, model)


def _package_repository(package: str, model: str) -> str:
    """Return the hub's repository of a model by its name in the package. Raises ModelError."""
    name, at, revision = model.partition("@")
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{package}:{model}: needs the package; run `pip install 'mmbeam[{package}]'`")
    if package == "timm":
        config = None if "/" in name else importlib.import_module("timm.models").get_pretrained_cfg(name)
        repository = name if "/" in name else getattr(config, "hf_hub_id", None)
    else:
        module, (architecture, _, tag) = importlib.import_module("open_clip"), name.partition("/")
        if architecture not in module.list_models():
            return model  # a name of the hub
        repository = (module.get_pretrained_cfg(architecture, tag).get("hf_hub") or "").rstrip("/")
    if not repository:
        raise ModelError(
            f"{package}:{model}: expected a directory, a hub name, or a model that {package} has on the hub"
            + (
                f", such as {architecture}/{tags[0]}"
                if package == "open_clip" and (tags := module.list_pretrained_tags_by_model(architecture))
                else ""
            )
        )
    return f"{repository}{at}{revision}"


def _find(model: str) -> Resolved:
    if model == SHIPPED_MODEL:
        return Resolved(_SHIPPED_DIRECTORY, None, SHIPPED_MODEL)
    if "://" in model:
        return Resolved(_copy_remote(model), None, public_path(model))
    path = Path(model).expanduser()
    if path.is_dir():
        return Resolved(path.resolve(), None, model)
    if path.exists():
        raise ModelError(f"{model}: expected a directory with config.json and model.safetensors, found a file")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{model}: expected an existing directory, or a hub name like org/model")
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
    except Exception as error:  # the hub's errors have no common base class
        raise ModelError(_hub_message(name, revision, error)) from error
    return Resolved(Path(directory), Path(directory).name, name)


def _hub_message(name: str, revision: str, error: Exception) -> str:
    if isinstance(error, hub_errors.HFValidationError):
        return f"{name!r} is neither an existing directory nor a hub name (org/model)"
    if isinstance(error, hub_errors.GatedRepoError):
        return f"{name}: this hub model is gated; accept its terms on the hub and log in with `hf auth login`"
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{name}: the hub lacks revision {revision!r}; omit @{revision} or name an existing one"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f"{name}: no such directory and no such model on the hub (a private one needs `hf auth login`)"
    if isinstance(error, hub_errors.LocalEntryNotFoundError | hub_errors.OfflineModeIsEnabled):
        cached = ", ".join(f"{name}@{commit}" for commit in _cached_revisions(name))
        return (
            f"{name}{f'@{revision}' if revision else ''}: not in the local hub cache"
            f"{f', which has {cached}' if cached else ''}, and the hub cannot be reached or HF_HUB_OFFLINE is set; "
            f"run `hf download {name}` on a machine with network access, or pass a directory"
        )
    return f"{name}: downloading it from the hub failed: {type(error).__name__}: {error}"


def _cached_revisions(name: str) -> list[str]:
    try:
        repositories = huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE).repos
    except (huggingface_hub.CacheNotFound, OSError):
        return []
    return sorted(
        revision.commit_hash
        for repository in repositories
        if repository.repo_id == name
        for revision in repository.revisions
    )


def _copy_remote(url: str) -> Path:
    """Copy a remote directory into the local cache, keyed by its listing; one process at a time."""
    url = url.rstrip("/")
    name = public_path(url)
    try:
        fs, root = file_system(url)
        listing = {path[len(root) :].lstrip("/"): info for path, info in fs.find(root, detail=True).items()}
    except Exception as error:  # each store has its own exceptions
        raise ModelError(f"{name}: cannot be listed: {type(error).__name__}: {error}") from error
    wanted = {relative: info for relative, info in listing.items() if is_model_file(relative)}
    if not wanted:
        raise ModelError(
            f"{name}: expected model files ({', '.join(MODEL_FILES)}), found none; pass the directory of config.json"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mmbeam", "models")
    target = cache / _listing_key(name, wanted)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            _copy(fs, root, wanted, target)
    return target


def _listing_key(name: str, listing: Mapping[str, Mapping[str, Any]]) -> str:
    def version(info: Mapping[str, Any]) -> str:
        values = (info.get(key) for key in ("ETag", "etag", "md5Hash", "mtime", "created"))
        return str(next(filter(None, values), ""))

    lines = [f"{relative}\0{info['size']}\0{version(info)}" for relative, info in sorted(listing.items())]
    return hashlib.sha256("\n".join([name, *lines]).encode()).hexdigest()[:32]


def _copy(fs: Any, root: str, wanted: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """Copy into a scratch directory next to `target`, check the sizes, then rename: `target` is complete or absent."""
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
    """Return whether a file of a model directory, by its relative posix path, is part of the model."""

    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatch(relative, pattern) for pattern in patterns)

    return matches(MODEL_FILES) and not matches(NOT_MODEL_FILES)


def model_files(directory: Path) -> dict[str, Path]:
    """Return the files of the model in `directory` by their relative posix paths, in order.

    Links are followed. Raises ModelError for one that leads out of the directory, except to the blobs of the hub's
    cache, whose files are links.
    """
    root = directory.resolve()
    homes = [root, *(parent.with_name("blobs").resolve() for parent in root.parents if parent.name == "snapshots")]
    files: dict[str, Path] = {}

    def walk(folder: Path, prefix: str, above: tuple[Path, ...]) -> None:
        for path in folder.iterdir():
            relative = f"{prefix}{path.name}"
            if path.is_dir():
                real = path.resolve()
                if real not in above:  # a link to a parent folder would recurse forever
                    walk(path, f"{relative}/", (*above, real))
            elif is_model_file(relative) and path.exists():
                if not any(path.resolve().is_relative_to(home) for home in homes):
                    raise ModelError(
                        f"{directory}: {relative} is a link to {path.resolve()}, outside the directory; replace the "
                        "link by the file, or give the directory that holds the files"
                    )
                if not path.is_file():
                    raise ModelError(f"{directory}: {relative} is not a regular file")
                files[relative] = path

    walk(directory, "", (root,))
    return dict(sorted(files.items()))


def model_path(directory: Path, name: object, named_by: str) -> Path:
    """Return the path of `name`, a file that the model's file `named_by` refers to.

    Raises ModelError if it is none of the model's.

    A file that climbs out of the directory, or that is not of the model's kinds, escapes its digest.
    """
    if not isinstance(name, str) or not is_model_file(name) or name.startswith("/") or ".." in name.split("/"):
        raise ModelError(
            f"{directory}/{named_by}: names the file {printable(repr(name))}; expected one of "
            f"{', '.join(MODEL_FILES)}, inside the directory"
        )
    return directory / name


def read_json(directory: Path, name: str, required: bool = True) -> dict[str, Any]:
    """Return the JSON object in `directory/name`; {} if it is absent and not required. Raises ModelError."""
    path = directory / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ModelError(
                f"{directory}: expected {name}, which is missing; pass a directory written by save_pretrained"
            ) from None
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(directory: Path) -> Any:
    """Return config.json as transformers parses it, with the defaults of its class. Raises ModelError."""
    check_implementations(directory, read_json(directory, "config.json"))
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types
        raise ModelError(f"{directory}/config.json: {type(error).__name__}: {error}") from error


def check_implementations(directory: Path, config: object) -> None:
    """Raise ModelError if a configuration, or one inside it, names kernels of the hub: transformers would run them."""
    if isinstance(config, list):
        for value in config:
            check_implementations(directory, value)
    for name, value in config.items() if isinstance(config, dict) else ():
        if str(name).strip("_").removesuffix("_internal") in ("attn_implementation", "experts_implementation"):
            if any("/" in str(choice) for choice in (value.values() if isinstance(value, dict) else (value,))):
                raise ModelError(
                    f"{directory}/config.json: {name} is {printable(repr(value))}, code from the hub, which is never "
                    "run; remove it to use torch's"
                )
        else:
            check_implementations(directory, value)


def _check_no_adapter(directory: Path) -> None:
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory}: has adapter_config.json, an adapter of PEFT for another model; merge them with "
            "`merge_and_unload()` and `save_pretrained`, and give the result"
        )


def check_weights(directory: Path) -> None:
    """Raise ModelError unless all weight files are present, inside the directory, as safetensors."""
    _check_no_adapter(directory)
    config = read_json(directory, "config.json", required=False)
    check_implementations(directory, config)
    single, index = "model.safetensors", "model.safetensors.index.json"
    named = config.get("transformers_weights")  # an option of transformers: another name of the weights
    if named is not None:
        model_path(directory, named, "config.json")
        single, index = (single, named) if str(named).endswith(".index.json") else (named, index)
    if (directory / index).exists():
        shards = _indexed_files(directory, index)
        missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        if missing or not shards:
            raise ModelError(
                f"{directory}: {index} names {missing or 'no files'}, which are missing; copy the whole directory"
            )
    elif not single.endswith(".safetensors") or not (directory / single).is_file():
        raise ModelError(
            f"{directory}: has no {single}; pickled weights (pytorch_model.bin) are never loaded. If you "
            "trust them, convert them with `AutoModel.from_pretrained(dir).save_pretrained(new_dir)`"
        )


def _indexed_files(directory: Path, index: str) -> set[str]:
    """Return the files that an index of weights names. Raises ModelError unless all are safetensors of the model."""
    weight_map = read_json(directory, index).get("weight_map")
    shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    for shard in sorted(shards):
        if model_path(directory, shard, index).suffix != ".safetensors":
            raise ModelError(f"{directory}/{index}: names {shard}; expected safetensors, others are never loaded")
    return shards


def check_component(directory: Path) -> None:
    """Raise ModelError if a folder of a pipeline names weights outside it or that are pickles, or code of the hub."""
    _check_no_adapter(directory)
    config = read_json(directory, "config.json", required=False)
    check_implementations(directory, config)
    if config.get("transformers_weights") is not None:
        model_path(directory, config["transformers_weights"], "config.json")
    for index in sorted(directory.glob("*.safetensors.index*.json")):
        _indexed_files(directory, index.name)


def digest(directory: Path) -> str:
    """Return the SHA-256 of the names and contents of the model's files, for the run's fingerprint."""
    stats = {name: path.stat() for name, path in model_files(directory).items()}
    return _digest(directory, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()))


@cache
def _digest(directory: Path, states: tuple[tuple[str, int, int], ...]) -> str:
    """Return the digest of files by their names, sizes and times, cached: a launch needs it several times."""
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the GIL
        lines = list(pool.map(lambda state: f"{state[0]}\0{_file_digest(directory / state[0])}\n", states))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_dtype(name: str | None, device: str) -> torch.dtype:
    """Return the dtype called `name`; by default float32 on the CPU and bfloat16 elsewhere."""
    if name is None:
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise UsageError(f"`dtype` {name}: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def dtype_name(name: str | None, device: str) -> str:
    """Return torch's name of the dtype that `name` means on `device`: "float32", "bfloat16" or "float16"."""
    return str(parse_dtype(name, device)).removeprefix("torch.")


def load_pretrained(
    cls: Any,
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    ignore_missing: Sequence[str] = (),
    **kwargs: Any,
) -> Any:
    """Return a transformers model of class `cls` with its weights from `directory`, on `device`, in eval mode.

    A weight that is missing from the files would be random. It is a ModelError, unless its name matches one of the
    regular expressions in `ignore_missing` (layers that the caller does not use).
    """
    check_weights(directory)
    quiet_transformers()
    try:
        with _load_lock:
            model, info = cls.from_pretrained(
                directory,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # _check_keys raises an error that names them
                **kwargs,
            )
    except Exception as error:  # transformers raises errors of many types
        raise ModelError(f"{directory}: {cls.__name__} cannot be loaded: {type(error).__name__}: {error}") from error
    _check_keys(directory, type(model).__name__, info, ignore_missing)
    return model.eval().to(device)


def _check_keys(directory: Path, cls: str, info: Mapping[str, Any], ignore_missing: Sequence[str]) -> None:
    ignored = [_COMPUTED_KEYS, *map(re.compile, ignore_missing)]
    missing = sorted(key for key in info["missing_keys"] if not any(pattern.search(key) for pattern in ignored))
    mismatched = [
        f"{key} has shape {list(found)}, expected {list(needed)}"
        for key, found, needed in sorted(info["mismatched_keys"])
    ]
    broken = [*missing, *mismatched, *map(str, info.get("error_msgs", ()))]
    if broken:
        shown = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise ModelError(
            f"{directory}: weights of {cls} are missing or of another shape, and would be random: {shown}. "
            "Is config.json from the same model as the weights?"
        )
    if info["unexpected_keys"]:
        logger.info("%s: %d weights are not used by %s", directory, len(info["unexpected_keys"]), cls)


def _attention_mask(make: Any, **arguments: Any) -> torch.Tensor | None:
    """Return transformers' mask.

    On a GPU, do not check whether the mask can be skipped: the check would synchronise with the GPU.
    """
    mask = arguments.get("attention_mask")
    if mask is not None and mask.is_cuda:
        arguments |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made: torch.Tensor | None = make(**arguments)
    return made


for _name, _make in {"sdpa": sdpa_mask, "eager": eager_mask}.items():
    AttentionMaskInterface.register(_name, partial(_attention_mask, _make))


def quiet_transformers() -> None:
    """Make transformers use Python's logging alone: no progress bars, no handler of its own.

    Its warnings (tables of unused weights, remarks on token ids) are hidden unless TRANSFORMERS_VERBOSITY is set; the
    conditions that matter are checked here and raise errors.
    """
    transformers_logging: Any = transformers.utils.logging  # untyped
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
