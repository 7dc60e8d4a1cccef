"""Classification heads of the user's own: trained on features, used on features and on shards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shards
import tiny_clip
from outputs import is_conserved, read_rows
from safetensors.torch import load_file, save_file
from test_evaluate import WIDTH, vector_output, write_run
from tiny_labellers import IMAGES

from mmbeam.cli import main
from mmbeam.config import Labelling, ModelRef
from mmbeam.errors import JobError, ModelError, RunMismatchError, TrainingError, UsageError
from mmbeam.features.dataset import split_of
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.jobs.label import LabelOptions, label
from mmbeam.training.head import HeadOptions, train_head

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}


def make_image(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(-20, 20, (32, 32, 3))
    color = np.array(list(COLORS.values())[number % 3])
    return shards.encode_image(np.clip(color + noise, 0, 255).astype(np.uint8), "png")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images and texts; the truth is the color, and the tags are the color and whether the number is even."""
    root = tmp_path_factory.mktemp("head")
    truths = []
    for number in range(150):
        color = list(COLORS)[number % 3]
        tags = [color, *(["even"] if number % 2 == 0 else [])]
        truth = {"color": color, "tags": tags} if number % 10 else {"other": 1}
        members = {"png": make_image(number), "txt": f"it is {color}".encode(), "json": json.dumps(truth).encode()}
        if number % 7 == 0:
            del members["txt"]
        truths.append(replace(shards.make_truth(number), key=f"{number:03}", members=members))
    shards.make_webdataset(root / "in", truths, shards=2)
    tiny_clip.save_clip(root / "clip")
    options = EmbedOptions(
        input=(str(root / "in"),),
        output=str(root / "features"),
        models=(ModelRef(model=str(root / "clip")),),
        device="cpu",
    )
    embed(options)
    return root


def options_of(corpus: Path, tmp_path: Path, **changes: Any) -> HeadOptions:
    options = HeadOptions(
        input=(str(corpus / "features"),),
        output=str(tmp_path / "head"),
        label="color",
        split_fractions=(0.6, 0.2, 0.2),
        learning_rate=0.03,
        device="cpu",
    )
    return replace(options, **changes)


@pytest.fixture(scope="module")
def head(corpus: Path) -> Path:
    train_head(options_of(corpus, corpus))
    return corpus / "head"


def run(source: Path, output: Path, model: Path, **changes: Any) -> list[dict[str, Any]]:
    options = LabelOptions(
        input=(str(source),),
        output=str(output),
        models=(ModelRef(model=str(model)),),
        labelling=Labelling(task="classify", **changes),
        device="cpu",
    )
    assert is_conserved(label(options))
    return read_rows(output)


def test_a_head_learns_what_the_vectors_tell(corpus: Path, head: Path, tmp_path: Path) -> None:
    report = json.loads((head / "report.json").read_text())
    assert report["test"]["accuracy"] == 1.0
    assert (report["classes"], report["multi_label"], sum(report["samples"]["by_class"].values())) == (
        3,
        False,
        report["samples"]["train"],
    )
    assert report["samples"]["train"] + report["samples"]["validation"] + report["samples"]["test"] == 135
    assert train_head(options_of(corpus, corpus)) == report  # it is finished
    again = train_head(options_of(corpus, tmp_path))
    assert again["losses"] == report["losses"]
    assert (tmp_path / "head" / "model.safetensors").read_bytes() == (head / "model.safetensors").read_bytes()


def test_features_and_shards_have_the_same_labels(corpus: Path, head: Path, tmp_path: Path) -> None:
    of_features = run(corpus / "features", tmp_path / "a", head, top_k=3)
    of_shards = run(corpus / "in", tmp_path / "b", head, top_k=3)
    assert len(of_features) == len(of_shards) == 150
    by_key = {row["key"]: row["labels"] for row in of_shards}
    for row in of_features:
        labels = by_key[row["key"]]
        assert [item["label"] for item in row["labels"]] == [item["label"] for item in labels]
        np.testing.assert_allclose(
            [item["score"] for item in row["labels"]], [item["score"] for item in labels], atol=1e-4
        )
        assert sum(item["score"] for item in labels) == pytest.approx(1, abs=1e-5)
    right = [list(COLORS)[int(row["key"]) % 3] == row["labels"][0]["label"] for row in of_features]
    assert np.mean(right) > 0.98


def test_several_labels_per_sample(corpus: Path, tmp_path: Path) -> None:
    report = train_head(options_of(corpus, tmp_path, label="tags", columns=("image_embedding",)))
    assert (report["multi_label"], report["classes"]) == (True, 4)
    rows = run(corpus / "features", tmp_path / "out", tmp_path / "head", threshold=0.5)
    colors = [{item["label"] for item in row["labels"]} - {"even"} for row in rows]
    assert (
        np.mean([color == {list(COLORS)[int(row["key"]) % 3]} for color, row in zip(colors, rows, strict=True)]) > 0.9
    )


def test_the_commands(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features, model, out = str(corpus / "features"), str(tmp_path / "head"), str(tmp_path / "out")
    train = ["train", "--task", "classify", "--label", "color", "--input", features, "--output", model]
    assert main([*train, "--split", "0.6,0.2,0.2", "--learning-rate", "0.03", "--device", "cpu"]) == 0
    assert "accuracy 100.0%" in capsys.readouterr().out
    assert main(["label", "--input", features, "--model", model, "--output", out, "--device", "cpu"]) == 0
    assert main(["evaluate", out, "--label", "color"]) == 0
    assert "accuracy" in capsys.readouterr().out
    for arguments, message in {
        ("--vocab-size", "7"): "--vocab-size: applies to --task caption only",
        ("--learning-rate", "0.1"): "learning_rate: 0.03 -> 0.1",
    }.items():
        assert main([*train, "--split", "0.6,0.2,0.2", *arguments, "--device", "cpu"]) in (1, 2)
        assert message in capsys.readouterr().err
    assert main(["train", "--task", "classify", "--input", features, "--output", model]) == 2
    assert "--task classify needs --label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"label": "nothing"}, UsageError, "`label` nothing: no row has a string, an integer or a list of them"),
        ({"label": "key"}, UsageError, "`label` key: expected labels that repeat"),
        ({"label": "other"}, JobError, "a head needs two classes to learn"),
        ({"columns": ("text",)}, UsageError, "text"),
        ({"input": ("in",)}, UsageError, "`input`: expected features, found shards; write them by `mmbeam embed`"),
        ({"learning_rate": 1e30}, TrainingError, "NaN or infinite"),
        ({"epochs": 0}, UsageError, "`epochs` 0: expected at least 1"),
    ],
)
def test_errors_of_training(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "input" in changes:
        changes = {"input": tuple(str(corpus / name) for name in changes["input"])}
    with pytest.raises(error, match=message):
        train_head(options_of(corpus, tmp_path, **changes))
    assert not (tmp_path / "head" / "config.json").exists()


def test_a_class_that_only_validation_has(tmp_path: Path) -> None:
    split_fractions = (0.5, 0.5, 0.0)
    rows = []
    for number in range(60):
        split = split_of(f"{number}", 0, split_fractions)
        name = {"train": "ab"[number % 2], "validation": "c"}[split]
        rows.append({"key": f"{number}", "metadata": {"x": name}, "image_embedding": [float(number)] * WIDTH})
    run = write_run(tmp_path / "out", [rows], vector_output("image"))
    options = HeadOptions(
        input=(str(run),), output=str(tmp_path / "head"), label="x", split_fractions=split_fractions, device="cpu"
    )
    with pytest.raises(JobError, match="`label` x: no validation sample has a class of the training samples"):
        train_head(options)


def test_another_training_and_another_model_are_not_overwritten(corpus: Path, head: Path, tmp_path: Path) -> None:
    with pytest.raises(RunMismatchError, match="label: color -> tags"):
        train_head(options_of(corpus, corpus, label="tags"))
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a model from another source"):
        train_head(options_of(corpus, tmp_path))


def changed(head: Path, directory: Path, **values: Any) -> Path:
    """Copy a head with another configuration."""
    directory.mkdir()
    config = {**json.loads((head / "config.json").read_text()), **values}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(load_file(head / "model.safetensors"), directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("values", "source", "error", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "features", ModelError, "expected the tensors"),
        ({"columns": []}, "features", ModelError, "expected the configuration of a classification head"),
        ({"problem_type": "regression"}, "features", ModelError, "expected the configuration of a classification head"),
        ({"id2label": None}, "features", ModelError, "expected id2label"),
        ({"plain": False}, "in", UsageError, "use the output of `mmbeam embed`"),
    ],
)
def test_damaged_heads_are_refused(
    corpus: Path, head: Path, tmp_path: Path, values: dict[str, Any], source: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(corpus / source, tmp_path / "out", changed(head, tmp_path / "changed", **values))


def test_a_head_and_features_of_another_model(corpus: Path, head: Path, tmp_path: Path) -> None:
    columns = json.loads((head / "config.json").read_text())["columns"]
    columns[0]["origin"][1] = "0" * 64
    other = changed(head, tmp_path / "other", columns=columns)
    with pytest.raises(UsageError, match="image_embedding"):
        run(corpus / "features", tmp_path / "out", other)
    vit = IMAGES["vit"](tmp_path / "vit")
    with pytest.raises(UsageError, match="takes raw image, not features"):
        run(corpus / "features", tmp_path / "out", vit)
