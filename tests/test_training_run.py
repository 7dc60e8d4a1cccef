"""Whole trainings from shards and from features, as the command runs them, and what is refused before they start."""

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mmbeam.cli import main
from mmbeam.corpus import write_corpus
from mmbeam.errors import MissingModalityError, ModelError, RunMismatchError, TrainingError, UsageError
from mmbeam.models.fusion import FusionConfig, FusionModel, FusionProcessor
from mmbeam.models.generators.base import Request
from mmbeam.training.options import TrainOptions
from mmbeam.training.setup import set_up
from mmbeam.training.train import open_run, train

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "ffn_size": 64, "fusion_layers": 1, "generator_layers": 1}


# from shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("shards")
    write_corpus(directory, samples=100, shards=3, image_side=64, rate=8000)
    return f"{directory}/*.tar"


def shard_options(shards: str, output: Path, **changed: Any) -> TrainOptions:
    base = TrainOptions(
        input=(shards,),
        output=str(output),
        clauses="clauses",
        shares=(0.7, 0.15, 0.15),
        model={**TINY, "kinds": {"image": "mlp", "audio": "mlp"}},
        vocab_size=300,
        batch_size=16,
        epochs=2,
        device="cpu",
    )
    return replace(base, **changed)


@pytest.fixture(scope="module")
def trained(shards: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("trained") / "model"
    return output, train(shard_options(shards, output))


def test_shards_make_a_model_that_can_be_loaded_and_used(trained: tuple[Path, dict[str, Any]]) -> None:
    output, report = trained
    counts = report["data"]["captions"]
    assert sum(counts.values()) == report["data"]["samples"] == 100
    assert report["training"]["samples"] == 2 * counts["train"]
    assert report["test"]["samples"] == counts["test"]
    model = FusionModel.from_pretrained(output)
    processor = FusionProcessor.from_directory(output)
    ids = model.generate(**processor([Request(text="the harbour at dawn")], CPU), max_new_tokens=5)
    assert len(processor.decode(ids.tolist())) == 1
    assert (output / "_training" / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text()
    assert "seed 0" in card
    assert f"{counts['train']:,} train" in card
    assert "| exact match |" in card
    assert (output / "model.safetensors").stat().st_mode & 0o777 == (output / "config.json").stat().st_mode & 0o777


def test_a_training_that_is_done_is_not_done_again(shards: str, trained: tuple[Path, dict[str, Any]]) -> None:
    output, report = trained
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert train(shard_options(shards, output)) == report
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_other_options_on_the_same_output_are_refused(shards: str, trained: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(RunMismatchError, match=r"seed: 0 -> 1\n"):
        train(shard_options(shards, trained[0], seed=1))


def test_each_sample_is_in_one_part_and_the_training_sees_it_once_an_epoch(shards: str, tmp_path: Path) -> None:
    source = set_up(shard_options(shards, tmp_path), tmp_path).source
    parts = {part: [each.key for each in source.examples(part)] for part in ("train", "validation", "test")}
    assert sorted(key for keys in parts.values() for key in keys) == sorted(f"0-{index:06d}" for index in range(100))
    assert {part: source.count(part) for part in parts} == {part: len(keys) for part, keys in parts.items()}
    epochs = [[each.key for each in source.examples("train", epoch)] for epoch in (0, 1, 2, 0)]
    assert {tuple(sorted(keys)) for keys in epochs} == {tuple(sorted(parts["train"]))}
    assert epochs[0] == epochs[3]
    assert len({tuple(keys) for keys in epochs}) > 1


def test_other_weights_are_the_start_and_frozen_parts_stay_bit_for_bit(
    shards: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    chosen = shard_options(
        shards, tmp_path, model={}, init=str(trained[0]), freeze=("image", "fusion"), epochs=1, learning_rate=5e-3
    )
    train(chosen)
    before, after = load_file(trained[0] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    frozen = {name for name in before if name.startswith(("encoders.image.", "fuser."))}
    assert frozen
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in frozen), name
    tokenizers = [(directory / "tokenizer.json").read_text() for directory in (trained[0], tmp_path)]
    assert tokenizers[0] == tokenizers[1]


def test_a_part_that_the_model_has_not_cannot_be_frozen(
    shards: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--freeze nose: the parts of this model are image, audio, text, words"):
        train(shard_options(shards, tmp_path, model={}, init=str(trained[0]), freeze=("nose",)))


def test_samples_without_captions_are_an_error_that_names_the_fields(shards: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none of the 100 samples has a caption in 'title'.*caption, clauses"):
        train(shard_options(shards, tmp_path, captions="title"))


def test_a_split_that_leaves_a_part_empty_is_an_error(shards: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="validation part is empty"):
        train(shard_options(shards, tmp_path, shares=(1.0, 0.0, 0.0)))


def test_a_modality_that_no_sample_has_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(40):
            for field, data in (("txt", b"a text"), ("json", b'{"caption": "a cat."}')):
                info = tarfile.TarInfo(f"{number:04d}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises(MissingModalityError, match="no image in the 40 samples"):
        train(shard_options(str(tmp_path / "a.tar"), tmp_path / "out", modalities=("image", "text")))


def test_the_text_as_caption_is_no_input(shards: str, tmp_path: Path) -> None:
    report = train(shard_options(shards, tmp_path, captions="text", clauses=None, steps=2))
    assert set(FusionConfig.from_pretrained(tmp_path).sources or {}) == {"image", "audio"}
    assert report["training"]["step"] == 2


def test_a_directory_with_another_model_is_not_overwritten(shards: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a model that no training here made"):
        train(shard_options(shards, tmp_path))


# from features


def write_features(path: Path, rows: int = 120, width: int = 8, columns: Mapping[str, Any] | None = None) -> Path:
    """Vectors that say which of three things is to be said."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, rows)
    names = np.array(["a cat.", "a dog.", "a bird in a tree."])
    vectors = {
        name: (np.eye(width)[kinds + 3 * number] + 0.1 * rng.standard_normal((rows, width))).astype(np.float32)
        for number, name in enumerate(("image_embedding", "text_embedding"))
    }
    lists = {name: [None if row % 10 == 7 else each for row, each in enumerate(of)] for name, of in vectors.items()}
    lists["text_embedding"][3] = np.full(width, np.nan, np.float32)
    table = pa.table(
        {
            "key": [f"key-{row}" for row in range(rows)],
            **{name: pa.array(of, pa.list_(pa.float32())) for name, of in lists.items()},
            "metadata": [json.dumps({"caption": names[kind]}) for kind in kinds],
            **(columns or {}),
        }
    ).replace_schema_metadata({"mmbeam.dims": json.dumps(dict.fromkeys(vectors, width))})
    pq.write_table(table, path, row_group_size=32)
    return path


def feature_options(path: Path, output: Path, **changed: Any) -> TrainOptions:
    base = TrainOptions(
        input=(str(path),),
        output=str(output),
        shares=(0.6, 0.2, 0.2),
        model=TINY,
        vocab_size=280,
        batch_size=16,
        steps=120,
        learning_rate=5e-3,
        patience=None,
        device="cpu",
    )
    return replace(base, **changed)


def test_features_make_a_model_that_says_what_they_hold(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.parquet", rows=400)
    report = train(feature_options(path, tmp_path / "model"))
    assert report["test"]["exact_match"] > 0.9
    processor = FusionProcessor.from_directory(tmp_path / "model")
    assert processor.columns == {"image_embedding": "image", "text_embedding": "text"}
    model = FusionModel.from_pretrained(tmp_path / "model")
    request = Request(features={"image_embedding": np.eye(8, dtype=np.float32)[1]})
    ids = model.generate(**processor([request], CPU), max_new_tokens=20)
    assert processor.decode(ids.tolist()) == ["a dog."]


def test_captions_of_features_come_from_a_column_or_another_file(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.parquet", columns={"said": ["a fish."] * 120})
    report = train(feature_options(path, tmp_path / "column", captions="said", steps=2))
    assert report["data"]["captions"]["train"] > 50
    lines = [json.dumps({"key": f"key-{row}", "said": "a fish."}) for row in range(80)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    joined = feature_options(path, tmp_path / "file", captions="said", steps=2)
    report = train(replace(joined, captions_from=str(tmp_path / "captions.jsonl")))
    assert sum(report["data"]["captions"].values()) == 80


def test_features_of_another_width_than_the_models_are_an_error_that_names_both(tmp_path: Path) -> None:
    first, wide = write_features(tmp_path / "a.parquet"), write_features(tmp_path / "b.parquet", width=12)
    train(feature_options(first, tmp_path / "model", steps=2))
    other = feature_options(wide, tmp_path / "other", model={}, init=str(tmp_path / "model"))
    with pytest.raises(ModelError, match=r"\[12\].*\[8\]"):
        train(other)


def test_a_model_of_features_does_not_start_from_one_of_media(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = write_features(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"the model takes image, audio, text, which --input is not"):
        train(feature_options(path, tmp_path / "out", model={}, init=str(trained[0])))


# the command


def test_the_command_trains_and_says_what_came_of_it(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--input", shards, "--output", str(tmp_path / "m"), "--steps", "3", "--hidden-size", "32"]
    argv += ["--modalities", "text", "--clauses", "clauses", "--vocab-size", "280", "--split", "0.7,0.15,0.15"]
    argv += ["--loss-weight", "align=0.2", "--pair", "text:caption", "--fusion", "gated"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "trained: 3 steps" in said
    assert "test part" in said
    config = FusionConfig.from_pretrained(tmp_path / "m")
    assert (config.fusion, config.loss_weights["align"]) == ("gated", 0.2)  # type: ignore[index]
    assert config.aligned_pairs() == [("text", "caption")]
    assert main([*argv, "--seed", "1"]) == 1
    assert "seed: 0 -> 1" in capsys.readouterr().err
    assert open_run(shard_options(shards, tmp_path / "m"), overwrite=True).exists()
    assert not (tmp_path / "m" / "_training" / "report.json").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--loss-weight", "beauty=1"], "LOSS=W"),
        (["--encoder", "image=resnet"], "MODALITY=KIND"),
        (["--pair", "image"], "A:B"),
        (["--split", "0.5,0.5"], "three shares"),
        (["--input", "nosuch://x/*.tar"], "nosuch"),
        (["--learning-rate", "fast"], "a number"),
    ],
)
def test_a_bad_argument_is_named(
    argument: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--input", "a.tar", "--output", str(tmp_path), *argument]) == 2
    assert message in capsys.readouterr().err
