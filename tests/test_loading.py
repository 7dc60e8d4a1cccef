"""Finding, checking and loading models: directories, remote directories, and a hub served on this machine."""

import hashlib
import json
import logging
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import transformers
from tiny_audio_text import save_bert, save_roberta, save_t5
from tiny_clip import save_clip
from tiny_models import save_siglip
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel, PreTrainedModel

from mmbeam.errors import ModelError, UsageError
from mmbeam.models.loading import (
    check_weights,
    digest,
    dtype_name,
    is_model_file,
    load_pretrained,
    model_files,
    parse_dtype,
    read_json,
    resolve,
)
from mmbeam.models.tokenizing import TextTokenizer
from mmbeam.stages.embed import embed_stage

CPU = torch.device("cpu")


@pytest.fixture
def copy(clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip, tmp_path / "model"))


def test_a_directory_resolves_to_itself(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(clip)).directory == clip
    monkeypatch.chdir(clip.parent)
    resolved = resolve(clip.name)
    assert resolved.directory == clip
    assert resolved.revision is None
    assert resolved.name == clip.name


@pytest.mark.parametrize("model", ["/no/such/dir", "./nowhere", "~/nowhere_at_all", "a/b/c"])
def test_a_missing_directory_is_an_error(model: str) -> None:
    with pytest.raises(ModelError, match="expected an existing directory, or a hub name"):
        resolve(model)


def test_a_file_is_not_a_model(clip: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a directory with config.json and model.safetensors, found a file"):
        resolve(str(clip / "config.json"))


def test_a_hub_name_offline_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ModelError, match="not in the local hub cache, and the hub cannot be reached or HF_HUB_OFFLINE"):
        resolve("nobody/nothing-of-this-name")


def test_the_error_offline_lists_the_cached_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container image may have only a commit of a model in its cache, and no reference to it."""
    (tmp_path / "models--some--model" / "snapshots" / COMMIT).mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=f"some/model: not in the local hub cache, which has some/model@{COMMIT}, and"):
        resolve("some/model")


def test_an_invalid_hub_name_is_an_error() -> None:
    with pytest.raises(ModelError, match="neither an existing directory nor a hub name"):
        resolve("two words")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download needs, for one model in one directory."""

    def __init__(self, directory: Path, *args: Any) -> None:
        self.directory = directory
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in (f"/api/models/org/clip/revision/{revision}" for revision in ("main", "v1", COMMIT)):
            names = [{"rfilename": file.name} for file in sorted(self.directory.iterdir())]
            self.answer(200, json.dumps({"id": "org/clip", "sha": COMMIT, "siblings": names}).encode())
        elif path.startswith("/api/models/org/clip/tree/"):
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file_etag(file)}
                for file in sorted(self.directory.iterdir())
            ]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith(f"/org/clip/resolve/{COMMIT}/"):
            file = self.directory / path.rpartition("/")[2]
            self.answer(200, file.read_bytes(), ETag=f'"{file_etag(file)}"')
        else:
            known = path.startswith("/api/models/org/clip/")
            self.answer(404, b"{}", **{"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def file_etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(copy: Path) -> Iterator[str]:
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04pickled")
    (copy / "README.md").write_text("a card")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, copy)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


ELSEWHERE = """
import sys
from mmbeam.errors import ModelError
from mmbeam.models.loading import resolve
for model in sys.argv[1:]:
    try:
        resolved = resolve(model)
        print(resolved.directory, resolved.revision, resolved.name)
    except ModelError as error:
        print("ModelError", error)
"""


def resolve_elsewhere(models: list[str], home: Path, endpoint: str | None) -> list[str]:
    """Return the output of `resolve` in a process whose hub is `endpoint`, or that is offline."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"} if endpoint else {"HF_HUB_OFFLINE": "1"}
    environment = os.environ | hub | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *models],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.splitlines()


def test_a_hub_name_is_resolved_to_a_commit_without_pickles(hub: str, copy: Path, tmp_path: Path) -> None:
    (line,) = resolve_elsewhere(["org/clip@v1"], tmp_path / "hf", hub)
    directory, revision, name = line.split()
    assert (revision, name) == (COMMIT, "org/clip")
    files = {file.name for file in Path(directory).iterdir()}
    assert files == {file.name for file in copy.iterdir()} - {"pytorch_model.bin", "README.md"}
    assert digest(Path(directory)) == digest(copy)
    assert resolve_elsewhere(["org/clip@v1"], tmp_path / "hf", None) == [line]  # from the cache, offline


def test_a_missing_revision_and_a_missing_model_are_errors(hub: str, tmp_path: Path) -> None:
    revision, model = resolve_elsewhere(["org/clip@v9", "org/other"], tmp_path / "hf", hub)
    assert revision.startswith("ModelError org/clip: the hub lacks revision 'v9'; omit @v9")
    assert model.startswith("ModelError org/other: no such directory and no such model on the hub")


@pytest.fixture
def remote(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.put(str(clip) + "/", "/bucket/clip/", recursive=True)
    fs.pipe("/bucket/clip/pytorch_model.bin", b"\x80\x04pickled")
    yield "memory://bucket/clip"
    fs.rm("/bucket", recursive=True)


def test_a_remote_directory_is_copied_once(remote: str, clip: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        resolved = set(pool.map(resolve, [remote, remote + "/"] * 4))
    (directory,) = {model.directory for model in resolved}
    assert digest(directory) == digest(clip)
    assert not (directory / "pytorch_model.bin").exists()
    assert {model.revision for model in resolved} == {None}


def test_a_remote_directory_that_changed_is_copied_again(remote: str) -> None:
    first = resolve(remote).directory
    assert resolve(remote).directory == first
    fsspec.filesystem("memory").pipe("/bucket/clip/config.json", b'{"model_type": "other"}')
    second = resolve(remote).directory
    assert second != first
    assert read_json(second, "config.json") == {"model_type": "other"}


def test_an_incomplete_copy_leaves_nothing(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(fs: Any, sources: list[str], targets: list[str]) -> None:
        for target in targets:
            Path(target).write_bytes(b"truncated")

    with monkeypatch.context() as patched:
        patched.setattr(type(fsspec.filesystem("memory")), "get", short)
        with pytest.raises(ModelError, match=r"expected [\d,]+ bytes, copied 9; try again"):
            resolve(remote)
    left = [path.name for path in (tmp_path / "cache" / "mmbeam" / "models").iterdir() if path.suffix != ".lock"]
    assert left == []
    assert resolve(remote).directory.is_dir()


def test_a_remote_directory_without_a_model_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"memory://nothing/here: expected model files"):
        resolve("memory://nothing/here")
    with pytest.raises(ModelError, match="nosuch://bucket/x: cannot be listed"):
        resolve("nosuch://user:secret@bucket/x?token=secret")


def test_credentials_appear_in_neither_names_nor_errors() -> None:
    with pytest.raises(ModelError) as caught:
        resolve("memory://user:secret@nothing/here?token=secret")
    assert "secret" not in str(caught.value)


def test_which_files_are_part_of_a_model() -> None:
    parts = ["config.json", "model-00001-of-00002.safetensors", "vocab.txt", "spiece.model", "1_Pooling/config.json"]
    others = ["README.md", "pytorch_model.bin", "onnx/config.json", ".gitattributes", ".cache/x.json", "tf_model.h5"]
    assert all(map(is_model_file, parts))
    assert not any(map(is_model_file, others))


def test_the_digest_covers_names_and_contents(copy: Path, clip: Path) -> None:
    assert digest(copy) == digest(clip)
    (copy / "README.md").write_text("does not count")
    assert digest(copy) == digest(clip)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    changed = digest(copy)
    assert changed != digest(clip)
    (copy / "config.json").rename(copy / "other.json")
    assert digest(copy) not in (changed, digest(clip))


def test_reading_json(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text('{"a": "ä"}', encoding="utf-8")
    (tmp_path / "truncated.json").write_text('{"a": ')
    (tmp_path / "bytes.json").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "list.json").write_text("[1]")
    assert read_json(tmp_path, "good.json") == {"a": "ä"}
    assert read_json(tmp_path, "none.json", required=False) == {}
    for name, message in {
        "none.json": "expected none.json, which is missing",
        "truncated.json": "truncated.json: cannot be read as JSON",
        "bytes.json": "bytes.json: cannot be read as JSON",
        "list.json": "expected a JSON object, found list",
    }.items():
        with pytest.raises(ModelError, match=message):
            read_json(tmp_path, name)


def test_pickled_weights_are_rejected(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no model.safetensors; pickled weights .* never loaded.*convert them"):
        check_weights(copy)
    with pytest.raises(ModelError, match=r"has no model.safetensors"):
        load_pretrained(CLIPModel, copy, CPU, torch.float32)


def test_weights_in_several_files(copy: Path) -> None:
    model = CLIPModel.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="20KB")
    check_weights(copy)
    assert isinstance(load_pretrained(CLIPModel, copy, CPU, torch.float32), CLIPModel)
    next(copy.glob("model-00002-*")).unlink()
    with pytest.raises(
        ModelError, match=r"names \['model-00002-of-.*safetensors'\], which are missing; copy the whole directory"
    ):
        check_weights(copy)


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def sharded(directory: Path, shard: str) -> None:
    """Replace the weights by an index that names `shard`."""
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    index = {"metadata": {}, "weight_map": {"logit_scale": shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def with_config(directory: Path, **options: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | options))


def adapter(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other", "peft_type": "LORA"}')
    shutil.copy(directory / "model.safetensors", directory / "adapter_model.safetensors")


def fast_tokenizer(directory: Path, name: str) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"fast_tokenizer_files": [name]}))


def linked(directory: Path, name: str, target: str) -> None:
    """Move a file or folder of the model to `target`, and leave a link."""
    moved = directory / target
    moved.parent.mkdir(exist_ok=True)
    (directory / name).rename(moved)
    (directory / name).symlink_to(target)


HOSTILE_MODELS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "index names a pickle": (lambda d: sharded(d, "pytorch_model.bin"), "names the file 'pytorch_model.bin'"),
    "index names a pickle as safetensors": (lambda d: sharded(d, "evil.safetensors"), "cannot be loaded"),
    "index climbs": (lambda d: sharded(d, "../weights.safetensors"), "names the file '../weights.safetensors'"),
    "index climbs from a folder": (lambda d: sharded(d, "a/../../weights.safetensors"), "names the file 'a/../"),
    "index names an absolute path": (lambda d: sharded(d, f"{d}/weights.safetensors"), "names the file '/"),
    "index names a hidden file": (lambda d: sharded(d, ".x/weights.safetensors"), "names the file '.x/"),
    "index names another kind": (lambda d: sharded(d, "config.json"), "names config.json; expected safetensors"),
    "index names a number": (lambda d: sharded(d, 7), "names the file '7'"),  # type: ignore[arg-type]
    "index is a list": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
        "names no files",
    ),
    "index is nested too deeply": (
        lambda d: (d / "model.safetensors.index.json").write_text("[" * 100_000),
        "cannot be read as JSON",
    ),
    "configuration names a pickle": (
        lambda d: with_config(d, transformers_weights="adapter_model.bin"),
        "config.json: names the file 'adapter_model.bin'",
    ),
    "configuration names weights elsewhere": (
        lambda d: with_config(d, transformers_weights="../weights.safetensors"),
        "config.json: names the file",
    ),
    "configuration names weights that are not digested": (
        lambda d: with_config(d, transformers_weights="onnx/model.safetensors"),
        "config.json: names the file",
    ),
    "configuration names a kernel": (
        lambda d: with_config(d, attn_implementation="some/kernel@main"),
        "attn_implementation is 'some/kernel@main', code from the hub",
    ),
    "configuration of a tower names a kernel": (
        lambda d: with_config(d, vision_config={"_attn_implementation": {"": "some/kernel"}}),
        "_attn_implementation is .*code from the hub",
    ),
    "pickle under the name of the weights": (lambda d: None, "cannot be loaded"),
    "only pickles": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors; pickled weights"),
    "adapter": (adapter, "has adapter_config.json, an adapter of PEFT"),
    "tokenizer climbs": (lambda d: fast_tokenizer(d, "../tokenizer.1.0.json"), "tokenizer_config.json: names the file"),
    "weights linked from outside": (lambda d: linked(d, "model.safetensors", "../m.safetensors"), "is a link to"),
    "tokenizer linked from outside": (lambda d: linked(d, "tokenizer.json", "../tokenizer.json"), "is a link to"),
    "pipe": (lambda d: ((d / "vocab.txt").unlink(missing_ok=True), os.mkfifo(d / "vocab.txt")), "not a regular file"),
}


@pytest.mark.parametrize("name", HOSTILE_MODELS)
def test_a_hostile_model_directory_is_refused(name: str, copy: Path, tmp_path: Path) -> None:
    """Every directory holds pickles under all the names that torch, transformers and PEFT load."""
    change, message = HOSTILE_MODELS[name]
    change(copy)
    pickled = pickle.dumps(Payload(tmp_path / "executed"))
    for other in ("pytorch_model.bin", "adapter_model.bin", "evil.safetensors", "spk_dict.pt", "model.pt", "model.pkl"):
        (copy / other).write_bytes(pickled)
    (copy / "pytorch_model.bin.index.json").write_text('{"weight_map": {"logit_scale": "pytorch_model.bin"}}')
    if name == "pickle under the name of the weights":
        (copy / "model.safetensors").write_bytes(pickled)
    with pytest.raises(ModelError, match=message):
        embed_stage(str(copy)).load()
    assert not (tmp_path / "executed").exists()


def test_code_of_a_model_directory_is_never_run(copy: Path, tmp_path: Path) -> None:
    """Every place that may name code: classes of configuration, model, tokenizer and processor."""
    code = f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\nclass C: pass\n"
    (copy / "custom_generate").mkdir()
    for path in ("evil.py", "custom_generate/generate.py"):
        (copy / path).write_text(code)
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        values = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(values | {"auto_map": dict.fromkeys(names, "evil.C")}))
    with suppress(ModelError):
        embed_stage(str(copy)).load()
    assert not (tmp_path / "executed").exists()
    with_config(copy, model_type="unknown")
    with pytest.raises(ModelError, match="unsupported model_type 'unknown'"):
        embed_stage(str(copy))
    assert not (tmp_path / "executed").exists()


def test_the_digest_covers_every_file_that_is_loaded(copy: Path, clip: Path) -> None:
    """Links inside the directory, weights under another name, and vocabularies of any tokenizer class."""
    linked(copy, "tokenizer.json", "folder/tokenizer.json")
    (copy / "linked").symlink_to("folder")
    (copy / "folder" / "loop").symlink_to("..")
    before = digest(copy)
    files = model_files(copy)
    assert {"tokenizer.json", "folder/tokenizer.json", "linked/tokenizer.json"} <= set(files)
    (copy / "folder" / "tokenizer.json").write_text((clip / "tokenizer.json").read_text() + " ")
    assert digest(copy) != before
    with_config(copy, transformers_weights="other.safetensors")
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    check_weights(copy)
    assert isinstance(load_pretrained(CLIPModel, copy, CPU, torch.float32), CLIPModel)
    assert "other.safetensors" in model_files(copy)


def test_all_vocabularies_of_transformers_are_part_of_a_model() -> None:
    names: set[str] = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        table = re.search(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL)
        names.update(re.findall(r': "([^"]+)"', table[1]) if table else ())
    assert len(names) > 20
    assert [name for name in sorted(names) if not is_model_file(name)] == []


def test_the_cache_of_the_hub_may_link_to_its_blobs(copy: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / COMMIT
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in copy.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert resolve(str(snapshot)).directory == snapshot
    assert digest(snapshot)
    (snapshot / "vocab.txt").symlink_to("../../../outside.txt")
    (tmp_path / "outside.txt").write_text("secret")
    with pytest.raises(ModelError, match="is a link to"):
        resolve(str(snapshot))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loaded_model_has_the_given_dtype_and_is_in_eval_mode(
    clip: Path, dtype: torch.dtype, device: torch.device
) -> None:
    model = load_pretrained(CLIPModel, clip, device, dtype)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.device.type == device.type


def rewrite_weights(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors") | change
    kept = {name: value for name, value in weights.items() if value is not None}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight_is_an_error_that_names_it(copy: Path) -> None:
    rewrite_weights(copy, {"visual_projection.weight": None})
    with pytest.raises(
        ModelError, match=r"of CLIPModel are missing or of another shape, and would be random: visual_projection.weight"
    ):
        load_pretrained(CLIPModel, copy, CPU, torch.float32)
    load_pretrained(CLIPModel, copy, CPU, torch.float32, ignore_missing=("^visual_projection",))


def test_a_weight_of_another_shape_is_an_error(copy: Path) -> None:
    rewrite_weights(copy, {"visual_projection.weight": torch.zeros(3, 3)})
    with pytest.raises(ModelError, match=r"visual_projection.weight has shape \[3, 3\], expected \[24, 32\]"):
        load_pretrained(CLIPModel, copy, CPU, torch.float32)


def test_weights_of_another_model_are_an_error(clip: Path, tmp_path: Path) -> None:
    other = save_siglip(tmp_path / "siglip")
    shutil.copy(clip / "model.safetensors", other / "model.safetensors")
    from transformers import SiglipModel

    with pytest.raises(ModelError, match="siglip"):
        load_pretrained(SiglipModel, other, CPU, torch.float32)


def test_a_truncated_weight_file_is_an_error(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="CLIPModel cannot be loaded"):
        load_pretrained(CLIPModel, copy, CPU, torch.float32)


def test_computed_buffers_and_other_towers_are_ignored(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite_weights(copy, {"vision_model.embeddings.position_ids": torch.arange(10)[None]})
    load_pretrained(CLIPModel, copy, CPU, torch.float32)
    with caplog.at_level(logging.INFO, logger="mmbeam"):
        load_pretrained(CLIPVisionModel, copy, CPU, torch.float32)
    assert "weights are not used by CLIPVisionModel" in caplog.text


def test_concurrent_loads_leave_transformers_unchanged(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tie_weights", "init_weights"):  # restored if the test fails
        monkeypatch.setattr(PreTrainedModel, name, getattr(PreTrainedModel, name))
    monkeypatch.setattr(torch.nn.init, "normal_", torch.nn.init.normal_)
    before = (PreTrainedModel.tie_weights, PreTrainedModel.init_weights, torch.nn.init.normal_)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: load_pretrained(CLIPModel, clip, CPU, torch.float32), range(40)))
    assert (PreTrainedModel.tie_weights, PreTrainedModel.init_weights, torch.nn.init.normal_) == before


def test_transformers_still_replaces_its_functions_while_it_loads(clip: Path) -> None:
    """If this fails, load_pretrained needs no lock any more."""
    seen = []

    class RecordingModel(CLIPModel):
        def __init__(self, config: Any) -> None:
            seen.append(PreTrainedModel.tie_weights)
            super().__init__(config)

    before = PreTrainedModel.tie_weights
    load_pretrained(RecordingModel, clip, CPU, torch.float32)
    assert seen
    assert before not in seen


def test_loading_prints_nothing(clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_pretrained(CLIPModel, clip, CPU, torch.float32)
    out, err = capfd.readouterr()
    assert out == err == ""


def test_dtypes() -> None:
    assert parse_dtype(None, "cpu") is torch.float32
    assert parse_dtype(None, "cuda:1") is torch.bfloat16
    assert parse_dtype("fp16", "cpu") is parse_dtype("float16", "cuda") is torch.float16
    assert dtype_name("bf16", "cpu") == dtype_name(None, "cuda") == "bfloat16"
    with pytest.raises(UsageError, match="`dtype` int8: expected one of float32, fp32"):
        parse_dtype("int8", "cpu")


def test_tokenizing_from_many_threads(clip: Path) -> None:
    """Fast tokenizers raise "Already borrowed" if one thread truncates while another counts."""
    tokenizer = TextTokenizer(clip)
    texts = [f"a cat number {number} " * 30 for number in range(20)]
    expected = AutoTokenizer.from_pretrained(clip)(texts, truncation=True, max_length=16)["input_ids"]
    counts = tokenizer.count(texts)

    def work(turn: int) -> bool:
        if turn % 2:
            return tokenizer.count(texts) == counts
        return tokenizer.encode(texts, 16) == expected

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


LONG_TEXTS: Mapping[str, str] = {
    "words": "a cat number 7 " * 3000,
    "one word": "a" * 30_000,
    "random": random.Random(0).randbytes(15_000).hex(),
    "punctuation": "!?.,-" * 6000,
    "spaces and a word": " " * 30_000 + "cat",
    "a word, spaces and a word": "cat" + " " * 30_000 + "dog" * 100,
    "unknown": "\u65e5\u672c\u8a9e" * 9000,
    "combining marks": "a\u0301" * 15_000,
    "emoji": "\U0001f469\u200d\U0001f680" * 5000,
}


@pytest.mark.parametrize("name", LONG_TEXTS)
@pytest.mark.parametrize("save", [save_bert, save_roberta, save_clip, save_t5])
def test_a_text_cut_before_it_is_tokenized_has_the_ids_of_the_whole(
    save: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    directory = save(tmp_path)
    tokenizer, reference, text = TextTokenizer(directory), AutoTokenizer.from_pretrained(directory), LONG_TEXTS[name]
    for length in (8, 77):
        expected = reference([text], truncation=True, max_length=length, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode([text], length) == expected
    whole = reference([text], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.count([text, "cat"])[0] == len(whole[0])


def test_long_texts_are_counted_in_pieces(clip: Path) -> None:
    tokenizer = TextTokenizer(clip)
    text = "a cat number 7 " * 10_000  # two cuts, at white space
    assert len(text) > 2 * 65_536
    assert tokenizer.count(["a", text, ""]) == [1, 10_000 * tokenizer.count(["a cat number 7"])[0], 0]


def test_a_broken_tokenizer_is_an_error(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        TextTokenizer(copy)


def test_the_cache_is_in_the_users_cache_directory(
    remote: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(remote).directory.parent == tmp_path / ".cache" / "mmbeam" / "models"
