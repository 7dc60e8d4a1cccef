"""Trainings with encoders of transformers, from the command line to captions, and encoders that are rejected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import tiny_audio_text as sounds
import torch
from safetensors.torch import load_file
from tiny_clip import save_clip
from tiny_models import save_resnet

from mmbeam.cli import main
from mmbeam.config import FieldMap, Reading
from mmbeam.corpus.write import write_corpus
from mmbeam.errors import MissingModalityError, ModelError, UsageError
from mmbeam.models.fusion import FusionConfig
from mmbeam.models.placement import compute_on_one_thread
from mmbeam.training.encoders import source_names
from mmbeam.training.options import TrainOptions
from mmbeam.training.train import train

compute_on_one_thread()
MODEL = {"hidden_size": 32, "ffn_size": 64, "fusion_layers": 1, "generator_layers": 1}
WEIGHTS = "model.safetensors"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("shards")
    write_corpus(directory, samples=30, shards=2, image_side=32, rate=8000)
    return f"{directory}/*.tar"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("encoders")
    save_clip(home / "clip")
    sounds.save_whisper(home / "whisper")
    sounds.save_bert(home / "bert")
    sounds.save_speech(home / "wav2vec2", "wav2vec2")
    save_resnet(home / "resnet")
    return home


def options(shards: str, output: Path, **changed: Any) -> TrainOptions:
    defaults: dict[str, Any] = {
        "input": (shards,),
        "output": str(output),
        "split_fractions": (0.6, 0.2, 0.2),
        "model": MODEL,
        "vocab_size": 280,
        "batch_size": 8,
        "steps": 3,
        "device": "cpu",
    }
    return TrainOptions(**defaults | changed)


def tower(weights: Weights, name: str) -> Weights:
    """Return the weights of the pretrained encoder of a source."""
    prefix = f"encoders.{name}.model."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def same(a: Weights, b: Weights) -> bool:
    assert a
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_command_trains_on_encoders_of_every_modality_and_the_model_is_self_contained(
    shards: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models, tmp_path / "encoders")
    train_ = ["train", "--input", shards, "--output", str(tmp_path / "m"), "--split", "0.6,0.2,0.2"]
    train_ += ["--steps", "3", "--hidden-size", "32", "--vocab-size", "280", "--batch-size", "8", "--device", "cpu"]
    encoders = (("image", "clip"), ("audio", "wav2vec2"), ("audio", "whisper"), ("text", "bert"), ("text", "clip"))
    for modality, name in encoders:
        train_ += ["--encoder", f"{modality}={tmp_path / 'encoders' / name}"]
    assert main(train_) == 0
    clip = load_file(models / "clip" / WEIGHTS)
    shutil.rmtree(tmp_path / "encoders")
    weights = load_file(tmp_path / "m" / WEIGHTS)
    prefix = "vision_model."
    vision = {name.removeprefix(prefix): value for name, value in clip.items() if name.startswith(prefix)}
    learned = tower(weights, "image")
    assert same({name.removeprefix(prefix): value for name, value in learned.items()}, vision)
    assert set(FusionConfig.from_pretrained(tmp_path / "m").parsed_sources()) == {
        "image",
        "audio",
        "audio_2",
        "text",
        "text_2",
    }
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"- `text_2` comes from {tmp_path}/encoders/clip (digest " in card
    assert main(train_) == 0  # finished: not repeated
    for command in ("caption", "embed"):
        argv = [command, "--input", shards, "--output", str(tmp_path / command), "--model", str(tmp_path / "m")]
        assert main([*argv, "--device", "cpu", "--limit", "4"]) == 0
    capsys.readouterr()
    captions = ds.dataset(tmp_path / "caption" / "data").to_table()
    assert (captions.num_rows, captions["caption"].null_count) == (4, 0)
    vectors = ds.dataset(tmp_path / "embed" / "data").to_table()
    assert [vectors[f"{modality}_embedding"].null_count for modality in ("image", "audio", "text")] == [0, 0, 0]


@pytest.fixture(scope="module")
def trained(shards: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an image, an audio and two text encoders (one of them built in), with pairs of views."""
    output = tmp_path_factory.mktemp("trained") / "model"
    encoders = [
        ("image", models / "resnet"),
        ("audio", models / "whisper"),
        ("text", "lstm"),
        ("text", models / "bert"),
    ]
    named_encoders = tuple((modality, str(encoder)) for modality, encoder in encoders)
    pairs = [[name, name] for name in ("image", "audio", "text", "text_2", "fused")]
    report = train(
        options(shards, output, encoders=named_encoders, model={**MODEL, "pairs": [*pairs, ["text", "text_2"]]})
    )
    views = {f"{name}->{name} (another view) cosine" for name, _ in pairs}
    assert set(report["validation"]["recall"]) == views | {"text->text_2 cosine", "text_2->text cosine"}
    [line] = [json.loads(line) for line in (output / "_training" / "metrics.jsonl").read_text().splitlines()][-1:]
    assert min(line["train"].values()) > 0  # including alignment and reconstruction
    return output


def test_only_unfrozen_encoders_change(shards: str, models: Path, trained: Path, tmp_path: Path) -> None:
    before = load_file(trained / WEIGHTS)
    checkpoint = load_file(models / "resnet" / WEIGHTS)
    frozen = tower(before, "image")
    assert same(frozen, {name: checkpoint[f"resnet.{name}"] for name in frozen})  # including running statistics
    chosen = options(shards, tmp_path / "m", model={}, init=str(trained), unfreeze=("image",), freeze=("audio",))
    train(chosen)
    after = load_file(tmp_path / "m" / WEIGHTS)
    assert tower(
        load_file(tmp_path / "m" / "_training" / "best.safetensors"), "text_2"
    )  # frozen weights too: --init may change
    changed = [name for name in ("image", "audio", "text_2") if not same(tower(before, name), tower(after, name))]
    assert changed == ["image"]
    sources = FusionConfig.from_pretrained(tmp_path / "m").parsed_sources()
    assert [name for name, source in sources.items() if source.frozen] == ["audio", "text_2"]
    with pytest.raises(UsageError, match="`unfreeze` text: the pretrained encoders of this model are image, audio"):
        train(options(shards, tmp_path / "n", model={}, init=str(trained), unfreeze=("text",)))


class Cut:
    """Interrupts the training after `after` steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def show(self, step: int, steps: int, loss: float, samples: int) -> None:
        if step > self.after:
            raise KeyboardInterrupt


def test_an_interrupted_training_ends_with_the_same_weights(shards: str, models: Path, tmp_path: Path) -> None:
    encoders = (("image", str(models / "resnet")), ("text", str(models / "bert")))
    changed = {"encoders": encoders, "modalities": ("image", "text"), "unfreeze": ("image",), "steps": 4}
    train(options(shards, tmp_path / "whole", **changed))
    cut = options(shards, tmp_path / "cut", checkpoint_seconds=0.0, **changed)
    with pytest.raises(KeyboardInterrupt):
        train(cut, reporter=Cut(after=2))
    train(cut)
    assert same(load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "cut" / WEIGHTS))
    for name, prefix in (("checkpoint", "model."), ("best", "")):  # frozen weights are not copied
        kept = load_file(tmp_path / "cut" / "_training" / f"{name}.safetensors")
        towers = {source: f"{prefix}encoders.{source}.model." for source in ("image", "text")}
        saved = {source for source, start in towers.items() if any(key.startswith(start) for key in kept)}
        assert saved == {"image"}
        assert f"{prefix}encoders.text.project.weight" in kept


def test_an_encoder_that_changed_after_an_interruption_is_rejected(shards: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "bert", tmp_path / "bert")
    chosen = options(shards, tmp_path / "m", encoders=(("text", str(tmp_path / "bert")),), modalities=("text",))
    with pytest.raises(KeyboardInterrupt):
        train(chosen, reporter=Cut(after=1))
    (tmp_path / "bert" / "config.json").write_text((tmp_path / "bert" / "config.json").read_text() + "\n")
    with pytest.raises(ModelError, match="its files have changed since the training started"):
        train(chosen)


def test_sources_are_named_by_modality_and_number() -> None:
    encoders: Any = (("text", "a"), ("image", "b"), ("text", "conv"), ("text", "a"))
    assert source_names(encoders) == dict(zip(("text", "image", "text_2", "text_3"), encoders, strict=True))


def without(name: str, *others: str) -> Callable[[Path], None]:
    def remove(directory: Path) -> None:
        for file in (name, *others):
            (directory / file).unlink()

    return remove


BROKEN: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "no weights": ("image", "clip", without(WEIGHTS), r"has no model\.safetensors"),
    "no configuration": ("image", "clip", without("config.json"), r"expected config\.json, which is missing"),
    "no image processor": (
        "image",
        "resnet",
        without("preprocessor_config.json"),
        r"expected preprocessor_config\.json",
    ),
    "no feature extractor": (
        "audio",
        "whisper",
        without("preprocessor_config.json"),
        r"expected preprocessor_config\.json",
    ),
    "no tokenizer": ("text", "bert", without("tokenizer.json"), r"expected a tokenizer \(tokenizer\.json"),
    "another modality": ("audio", "clip", lambda directory: None, "an encoder for audio, found clip"),
    "a text encoder for images": (
        "image",
        "bert",
        lambda directory: None,
        "bert takes input_ids, expected pixel_values",
    ),
    "no directory": ("image", "clip", shutil.rmtree, "expected an existing directory"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_unusable_encoder_is_an_error_before_the_shards_are_read(case: str, models: Path, tmp_path: Path) -> None:
    modality, name, spoil, message = BROKEN[case]
    shutil.copytree(models / name, tmp_path / name)
    spoil(tmp_path / name)
    encoders: Any = ((modality, str(tmp_path / name)),)
    with pytest.raises(ModelError, match=f"`encoders` {modality}={tmp_path}.*{message}"):
        train(options("nowhere.tar", tmp_path / "m", input=(__file__,), encoders=encoders))


def test_an_unknown_encoder_is_an_error_that_lists_the_kinds(shards: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"image=konv: expected one of conv, .*, or a supported model: konv: "):
        train(options(shards, tmp_path / "m", encoders=(("image", "konv"),)))


def test_audio_seconds_without_a_built_in_audio_encoder_is_an_error(shards: str, models: Path, tmp_path: Path) -> None:
    chosen = options(shards, tmp_path / "m", encoders=(("audio", str(models / "whisper")),), audio_seconds=2.0)
    with pytest.raises(UsageError, match="`audio_seconds`: the model has no built-in audio encoder"):
        train(chosen)


def test_init_with_an_encoder_is_an_error(shards: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a fusion model, found a model of type clip; to use its encoder"):
        train(options(shards, tmp_path / "m", model={}, init=str(models / "clip")))


def test_an_encoder_of_a_modality_that_no_sample_has_is_an_error(shards: str, models: Path, tmp_path: Path) -> None:
    silent = Reading(fields=FieldMap(audio="song.wav"))
    chosen = options(shards, tmp_path / "m", encoders=(("audio", str(models / "whisper")),), reading=silent)
    with pytest.raises(MissingModalityError, match="none of the 30 samples has audio"):
        train(chosen)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modalities": ("image",), "encoders": (("text", "conv"),)}, "`encoders` text: not in `modalities` image"),
        ({"captions": "text", "encoders": (("text", "conv"),)}, "`captions` text: the text is the target"),
        ({"init": "m", "model": {}, "encoders": (("text", "conv"),)}, "`init` has its own architecture; .*encoder"),
        (
            {"init": "m", "model": {}, "modalities": ("image",), "audio_seconds": 2.0},
            "omit `audio_seconds`, `modalities`",
        ),
        ({"init": "m", "model": {}, "text_tokens": 20, "columns": ("a",)}, "omit `columns`, `text_tokens`"),
        ({"init": "m", "model": {}, "freeze": ("image",), "unfreeze": ("image",)}, "`freeze` and `unfreeze` image"),
    ],
)
def test_contradictory_options_are_rejected(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        options("a.tar", tmp_path, **changed)
