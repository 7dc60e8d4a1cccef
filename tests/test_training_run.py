"""Whole trainings from shards and from features, and options that are rejected before the start."""

import io
import json
import re
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
from mmbeam.config import FieldMap, Reading
from mmbeam.corpus.write import write_corpus
from mmbeam.errors import MissingModalityError, ModelError, RunMismatchError, TrainingError, UsageError
from mmbeam.models.fusion import FusionConfig, FusionModel, FusionProcessor
from mmbeam.names import SIMILARITIES
from mmbeam.prompts.ask import Request
from mmbeam.training.options import TrainOptions
from mmbeam.training.setup import new_model, set_up
from mmbeam.training.train import open_training, train
from mmbeam.types import Origin

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
        split_fractions=(0.7, 0.15, 0.15),
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


def test_training_on_shards_writes_a_usable_model_with_card_and_plot(trained: tuple[Path, dict[str, Any]]) -> None:
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


def test_a_finished_training_is_not_repeated(shards: str, trained: tuple[Path, dict[str, Any]]) -> None:
    output, report = trained
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert train(shard_options(shards, output)) == report
    assert (output / "model.safetensors").stat().st_mtime_ns == before


def test_other_options_on_the_same_output_are_an_error(shards: str, trained: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(RunMismatchError, match=r"seed: 0 -> 1\n"):
        train(shard_options(shards, trained[0], seed=1))


def test_every_sample_is_in_one_split_and_once_in_an_epoch(shards: str, tmp_path: Path) -> None:
    source = set_up(shard_options(shards, tmp_path), tmp_path).source
    parts = {part: [example.key for example in source.examples(part)] for part in ("train", "validation", "test")}
    assert sorted(key for keys in parts.values() for key in keys) == sorted(f"0-{index:06d}" for index in range(100))
    assert {part: source.count(part) for part in parts} == {part: len(keys) for part, keys in parts.items()}
    epochs = [[example.key for example in source.examples("train", epoch)] for epoch in (0, 1, 2, 0)]
    assert {tuple(sorted(keys)) for keys in epochs} == {tuple(sorted(parts["train"]))}
    assert epochs[0] == epochs[3]
    assert len({tuple(keys) for keys in epochs}) > 1


def test_init_sets_the_initial_weights_and_frozen_parts_do_not_change(
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


def test_heads_missing_from_the_initial_model_are_drawn_by_the_seed(
    shards: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    changed = {"model": {}, "init": str(trained[0]), "loss_weights": {"modality_adversary": 0.1}, "steps": 1}
    chosen = shard_options(shards, tmp_path, **changed)
    setup, drawn = set_up(chosen, tmp_path), []
    for noise in (1, 2):
        torch.manual_seed(noise)
        drawn.append(new_model(chosen, setup, torch.device("cpu"))[0].modality_adversary.net[0].weight)
    assert torch.equal(*drawn)


def test_freezing_an_unknown_part_is_an_error_that_leaves_the_output_unused(
    shards: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    wrong = shard_options(shards, tmp_path, model={}, init=str(trained[0]), freeze=("nose",), steps=1)
    with pytest.raises(UsageError, match="`freeze` nose: the parts of this model are image, audio, text, words"):
        train(wrong)
    assert train(replace(wrong, freeze=("words",)))["training"]["step"] == 1


def test_samples_without_captions_are_an_error_that_names_the_fields(shards: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none of the 100 samples has a caption in 'title'.*caption, clauses"):
        train(shard_options(shards, tmp_path, captions="title"))


@pytest.mark.parametrize("name", ["clauses", "group"])
def test_a_field_that_no_sample_has_is_an_error_that_names_the_fields(name: str, shards: str, tmp_path: Path) -> None:
    message = f"`{name}` nosuch: none of the 100 samples has a usable value; their JSON has caption, clauses"
    with pytest.raises(TrainingError, match=message):
        train(shard_options(shards, tmp_path, **{name: "nosuch"}))


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"columns": ("image_embedding",)}, "`columns`"), ({"captions_from": "a.csv"}, "`captions_from`")],
)
def test_options_of_features_are_rejected_for_shards(
    changed: dict[str, Any], name: str, shards: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"{name}: applies to features, and the input is shards"):
        train(shard_options(shards, tmp_path, **changed))


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"encoders": (("image", "conv"),)}, "`encoders`"),
        ({"audio_seconds": 1.0}, "`audio_seconds`"),
        ({"reading": Reading(fields=FieldMap(image="b.jpg"))}, "`image_field` and the other fields"),
    ],
)
def test_options_of_shards_are_rejected_for_features(changed: dict[str, Any], name: str, tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=f"{name}: applies to shards, and the input is features"):
        train(feature_options(path, tmp_path / "m", **changed))


def test_an_empty_split_is_an_error(shards: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="validation split is empty"):
        train(shard_options(shards, tmp_path, split_fractions=(1.0, 0.0, 0.0)))


def test_a_modality_that_no_sample_has_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(40):
            for field, data in (("txt", b"a text"), ("json", b'{"caption": "a cat."}')):
                info = tarfile.TarInfo(f"{number:04d}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises(MissingModalityError, match="none of the 40 samples has image"):
        train(shard_options(str(tmp_path / "a.tar"), tmp_path / "out", modalities=("image", "text"), clauses=None))


def test_the_text_is_not_an_input_if_it_is_the_caption(shards: str, tmp_path: Path) -> None:
    report = train(shard_options(shards, tmp_path, captions="text", clauses=None, steps=2))
    assert set(FusionConfig.from_pretrained(tmp_path).sources or {}) == {"image", "audio"}
    assert report["training"]["step"] == 2


def test_a_directory_with_another_model_is_not_overwritten(shards: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a model from another source"):
        train(shard_options(shards, tmp_path))


# from features


def write_features(
    path: Path, rows: int = 120, width: int = 8, columns: Mapping[str, Any] | None = None, model: str | None = None
) -> Path:
    """Write vectors of three classes with a caption per class; `model` is recorded as their encoder."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, rows)
    names = np.array(["a cat.", "a dog.", "a bird in a tree."])
    vectors = {
        name: (np.eye(width)[kinds + 3 * number] + 0.1 * rng.standard_normal((rows, width))).astype(np.float32)
        for number, name in enumerate(("image_embedding", "text_embedding"))
    }
    lists = {
        name: [None if row % 10 == 7 else vector for row, vector in enumerate(matrix)]
        for name, matrix in vectors.items()
    }
    lists["text_embedding"][3] = np.full(width, np.nan, np.float32)
    table = pa.table(
        {
            "key": [f"key-{row}" for row in range(rows)],
            **{name: pa.array(vectors_of, pa.list_(pa.float32())) for name, vectors_of in lists.items()},
            "metadata": [json.dumps({"caption": names[kind]}) for kind in kinds],
            **(columns or {}),
        }
    )
    facts: dict[str, Any] = {"mmbeam.dims": dict.fromkeys(vectors, width)}
    if model is not None:
        facts |= {"mmbeam.models": {"model": model}, "mmbeam.digests": {"model": model[-1] * 64}}
    table = table.replace_schema_metadata({name: json.dumps(value) for name, value in facts.items()})
    pq.write_table(table, path, row_group_size=32)
    return path


def feature_options(path: Path, output: Path, **changed: Any) -> TrainOptions:
    base = TrainOptions(
        input=(str(path),),
        output=str(output),
        split_fractions=(0.6, 0.2, 0.2),
        model=TINY,
        vocab_size=280,
        batch_size=16,
        steps=120,
        learning_rate=5e-3,
        patience=None,
        device="cpu",
    )
    return replace(base, **changed)


def test_a_model_trained_on_features_captions_them(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.parquet", rows=400)
    report = train(feature_options(path, tmp_path / "model"))
    assert report["test"]["exact_match"] > 0.9
    processor = FusionProcessor.from_directory(tmp_path / "model")
    assert processor.columns == {"image_embedding": "image", "text_embedding": "text"}
    model = FusionModel.from_pretrained(tmp_path / "model")
    request = Request(features={"image_embedding": np.eye(8, dtype=np.float32)[1]})
    ids = model.generate(**processor([request], CPU), max_new_tokens=20)
    assert processor.decode(ids.tolist()) == ["a dog."]


def test_captions_of_features_are_read_from_a_column_or_another_file(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.parquet", columns={"title": ["a fish."] * 120})
    report = train(feature_options(path, tmp_path / "column", captions="title", steps=2))
    assert report["data"]["captions"]["train"] > 50
    lines = [json.dumps({"key": f"key-{row}", "title": "a fish."}) for row in range(80)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    joined = feature_options(path, tmp_path / "file", captions="title", steps=2)
    report = train(replace(joined, captions_from=str(tmp_path / "captions.jsonl")))
    assert sum(report["data"]["captions"].values()) == 80


def test_features_of_another_width_are_an_error_that_names_both_widths(tmp_path: Path) -> None:
    first, wide = write_features(tmp_path / "a.parquet"), write_features(tmp_path / "b.parquet", width=12)
    train(feature_options(first, tmp_path / "model", steps=2))
    other = feature_options(wide, tmp_path / "other", model={}, init=str(tmp_path / "model"))
    with pytest.raises(ModelError, match=r"\[8\].*\[12\]"):
        train(other)


def test_the_longest_training_sequence_sets_max_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = pa.list_(pa.list_(pa.float32(), 4))
    tokens = pa.array([[[1.0] * 4] * (1 + row * 7 % 90) for row in range(120)], kind)
    path = write_features(tmp_path / "a.parquet", columns={"image_tokens": tokens})
    chosen = feature_options(path, tmp_path / "m", columns=("image_tokens", "text_embedding"), steps=2)
    config = set_up(chosen, tmp_path / "m").config
    longest = max(1 + row * 7 % 90 for row in range(120))
    assert config.parsed_sources()["image_tokens"].max_tokens == pytest.approx(longest, abs=3)  # in the training split
    assert "are cut" not in caplog.text
    monkeypatch.setattr("mmbeam.training.sources.MAX_TOKENS", 50)
    report = train(replace(chosen, output=str(tmp_path / "cut")))
    assert FusionConfig.from_pretrained(tmp_path / "cut").parsed_sources()["image_tokens"].max_tokens == 50
    assert "image_tokens: sequences of up to" in caplog.text
    assert report["training"]["step"] == 2


def test_a_model_records_the_encoder_of_its_features_and_rejects_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    identity = {"shard": ["a.tar"] * 120, "offset": list(range(120))}
    same, other, unknown = (
        write_features(tmp_path / f"{number}.parquet", columns=identity, model=model)
        for number, model in enumerate(("org/clip@a", "org/siglip@b", None))
    )
    train(feature_options(same, tmp_path / "model", steps=2))
    sources = FusionConfig.from_pretrained(tmp_path / "model").parsed_sources()
    assert {source.origin for source in sources.values()} == {Origin("org/clip@a", "a" * 64)}
    assert "- `image_embedding` comes from org/clip@a (digest aaaaaaaaaaaa)" in (
        (tmp_path / "model" / "README.md").read_text()
    )
    both = r"image_embedding was made by org/siglip@b \(digest b{12}\), and the model takes features of org/clip@a"
    further = {"model": {}, "init": str(tmp_path / "model"), "steps": 2}
    with pytest.raises(UsageError, match=both):
        train(feature_options(other, tmp_path / "further", **further))
    argv = ["caption", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--input"]
    assert main([*argv, str(other)]) == 2
    assert re.search(both, capsys.readouterr().err)
    train(feature_options(unknown, tmp_path / "further", **further))
    assert [message.partition(";")[0] for message in caplog.messages if "is unknown" in message] == [
        f"`input`: the model that made {name} is unknown" for name in ("image_embedding", "text_embedding")
    ]


def test_a_column_with_features_of_two_models_is_an_error(tmp_path: Path) -> None:
    for number, model in enumerate(("org/clip@a", "org/siglip@b")):
        write_features(tmp_path / f"{number}.parquet", model=model)
    with pytest.raises(
        UsageError, match=r"1\.parquet: image_embedding was made by org/siglip@b .* but in another file by org/clip@a"
    ):
        train(feature_options(tmp_path / "*.parquet", tmp_path / "model", steps=2))


def test_features_of_unknown_origin_are_accepted_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(feature_options(write_features(tmp_path / "a.parquet"), tmp_path / "model", steps=2))
    [warning] = [message for message in caplog.messages if "do not name the model" in message]
    assert "image_embedding, text_embedding" in warning
    assert FusionConfig.from_pretrained(tmp_path / "model").parsed_sources()["text_embedding"].origin is None


def test_a_model_of_features_cannot_start_from_a_model_of_media(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = write_features(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=r"expected `input` of image, audio, text, found features"):
        train(feature_options(path, tmp_path / "out", model={}, init=str(trained[0])))


# the command


def test_the_command_trains_and_prints_the_result(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--input", shards, "--output", str(tmp_path / "m"), "--steps", "3", "--hidden-size", "32"]
    argv += ["--modalities", "text", "--clauses", "clauses", "--vocab-size", "280", "--split", "0.7,0.15,0.15"]
    argv += ["--loss-weight", "align=0.2", "--pair", "text:caption", "--fusion", "gated", "--text-tokens", "20"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "trained: 3 steps" in printed
    assert "test split" in printed
    config = FusionConfig.from_pretrained(tmp_path / "m")
    assert (config.fusion, config.loss_weights["align"]) == ("gated", 0.2)  # type: ignore[index]
    assert config.aligned_pairs() == [("text", "caption")]
    assert config.parsed_sources()["text"].max_tokens == 20
    assert main([*argv, "--seed", "1"]) == 1
    assert "seed: 0 -> 1" in capsys.readouterr().err
    assert open_training(shard_options(shards, tmp_path / "m"), overwrite=True).exists()
    assert not (tmp_path / "m" / "_training" / "report.json").exists()


@pytest.mark.parametrize("grouped", [False, True], ids=["views", "groups"])
def test_pairs_within_a_modality_are_trained_and_measured_by_similarity(
    grouped: bool, shards: str, tmp_path: Path
) -> None:
    names = ("image", "text", "fused")
    argv = ["train", "--input", shards, "--output", str(tmp_path / "m"), "--steps", "4", "--hidden-size", "32"]
    argv += ["--modalities", "image,text", "--encoder", "image=mlp", "--vocab-size", "280", "--split", "0.7,0.15,0.15"]
    argv += [f"--pair={a}:{b}" for a, b in (*zip(names, names, strict=True), ("image", "text"))]
    argv += [f"--similarity={kind}" for kind in SIMILARITIES] + ["--group=time"] * grouped
    assert main(argv) == 0
    report = json.loads((tmp_path / "m" / "_training" / "report.json").read_text())
    pairs = {f"{name}->{name}" if grouped else f"{name}->{name} (another view)" for name in names}
    expected = {f"{pair} {kind}" for pair in (*pairs, "image->text", "text->image") for kind in SIMILARITIES}
    for part in ("validation", "test"):
        assert set(report[part]["recall"]) == expected
        assert all(0 <= value <= 1 for value in report[part]["recall"].values())
    assert "| recall@1, text->text" in (tmp_path / "m" / "README.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "m" / "_training" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train"]["align"] > 0


def test_a_pair_of_captions_requires_groups(shards: str, tmp_path: Path) -> None:
    model = {**TINY, "pairs": [["caption", "caption"]]}
    with pytest.raises(UsageError, match="`pairs` caption:caption: captions have no augmented view; pass `group`"):
        train(shard_options(shards, tmp_path / "a", model=model, modalities=("text",)))
    report = train(shard_options(shards, tmp_path / "b", model=model, modalities=("text",), group="time", steps=2))
    assert set(report["test"]["recall"]) == {"caption->caption cosine"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--loss-weight", "beauty=1"], "LOSS=W"),
        (["--encoder", "nose=conv"], "expected image=, audio= or text= and an encoder"),
        (["--encoder", "image="], "expected image=, audio= or text= and an encoder"),
        (["--pair", "image"], "A:B"),
        (["--split", "0.5,0.5"], "three fractions"),
        (["--input", "nosuch://x/*.tar"], "nosuch"),
        (["--learning-rate", "fast"], "a number"),
    ],
)
def test_an_invalid_argument_is_named(
    argument: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--input", "a.tar", "--output", str(tmp_path), *argument]) == 2
    assert message in capsys.readouterr().err
