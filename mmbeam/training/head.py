"""Train a classification head: a linear layer on precomputed features, which `mmbeam label --model` takes.

MODEL_DIR/config.json        the classes, and the columns of features with the models that made them
MODEL_DIR/model.safetensors  the weights, and the mean and standard deviation of each column
MODEL_DIR/report.json, README.md

A sample has one class (softmax, cross-entropy) or, if the labels are lists, any number of them (sigmoid, binary
cross-entropy). Columns are standardised by the training split; a vector that a row lacks counts as the mean.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mmbeam.clean.text import json_object
from mmbeam.errors import JobError, RunMismatchError, TrainingError, UsageError
from mmbeam.features.dataset import SPLIT_FRACTIONS, FeatureBatch, FeatureDataset, Fractions
from mmbeam.features.files import feature_files, open_parquet
from mmbeam.metrics.labels import classification_scores, true_labels
from mmbeam.models.labellers.head import ARCHITECTURE, MODEL_TYPE
from mmbeam.models.placement import resolve_device
from mmbeam.names import Split
from mmbeam.readers.paths import public_path
from mmbeam.runs.run import find_run
from mmbeam.training.checkpoint import write_text
from mmbeam.training.options import difference
from mmbeam.types import FeatureColumn

REPORT = "report.json"
MAX_CLASSES = 100_000
Weights = dict[str, torch.Tensor]
EpochReporter = Callable[[int, int, float, int], None]  # epoch, number of epochs, training loss, samples


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The options of the training of one head. `identity` determines its weights."""

    input: tuple[str, ...]  # Parquet files of features
    output: str  # a local directory
    label: str  # a column of the features, or a field of their JSON in `metadata`
    columns: tuple[str, ...] | None = None  # of vectors; None: all columns whose names end in _embedding
    split_fractions: Fractions = SPLIT_FRACTIONS  # of training, validation, test
    batch_size: int = 64
    epochs: int = 100
    patience: int | None = 5  # epochs without a lower validation loss, after which the training ends
    learning_rate: float = 0.003
    weight_decay: float = 0.01
    seed: int = 0
    device: str = "auto"
    strict_input: bool = False  # a pattern that matches nothing is an error
    allow_local_paths: bool = False  # lists that are fetched may name local paths, other servers and other buckets

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{name}` {value}: expected at least 1")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"`{name}` {value}: expected 0 or more")
        if "://" in self.output:
            raise UsageError(f"`output` {public_path(self.output)}: expected a local directory")

    def identity(self) -> dict[str, Any]:
        """Return the options that determine the weights, as JSON values."""
        values = asdict(self)
        for name in ("output", "device", "strict_input", "allow_local_paths"):
            del values[name]
        values["input"] = [public_path(path) for path in self.input]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def train_head(
    options: HeadOptions, *, overwrite: bool = False, reporter: EpochReporter | None = None
) -> dict[str, Any]:
    """Train a head, test it once, write it to `options.output`, and return the report.

    Called again with the same options, it returns the report of the finished training.

    Raises UsageError, NoShardsError, JobError or RunMismatchError before the training, TrainingError if the loss
    becomes NaN or infinite.
    """
    output = Path(options.output).expanduser()
    finished = _open(output, options, overwrite)
    if finished is not None:
        return finished
    device = torch.device(resolve_device(options.device))
    column = _label_column(options)
    splits = {name: _dataset(options, column, name) for name in ("train", "validation", "test")}
    features = tuple(splits["train"].features.values())
    classes, is_multi, counts = _count_labels(splits, options)
    torch.manual_seed(options.seed)
    weights = _standardisation(splits["train"], features, options.label, len(classes))
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    trainable = [tensor.requires_grad_() for name, tensor in weights.items() if name.startswith(("weight", "bias"))]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=options.weight_decay)
    number = {name: position for position, name in enumerate(classes)}

    def losses(dataset: FeatureDataset) -> Iterator[tuple[torch.Tensor, int]]:
        for batch, labels, _ in _labelled(dataset, options.label, number):
            target_BC = torch.zeros(len(labels), len(classes), device=device)
            for row, names in enumerate(labels):
                target_BC[row, [number[name] for name in names]] = 1
            logits_BC = logits(weights, features, batch, device)
            if is_multi:
                yield F.binary_cross_entropy_with_logits(logits_BC, target_BC), len(labels)
            else:
                yield F.cross_entropy(logits_BC, target_BC), len(labels)

    best, best_epoch, kept = math.inf, 0, {name: tensor.detach().clone() for name, tensor in weights.items()}
    history = []
    for epoch in range(options.epochs):
        splits["train"].set_epoch(epoch)
        total, rows = 0.0, 0
        for loss, size in losses(splits["train"]):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total, rows = total + float(loss.detach()) * size, rows + size
        with torch.no_grad():
            validated = [(float(loss), size) for loss, size in losses(splits["validation"])]
        if not rows or not validated:
            raise JobError(f"`label` {options.label}: no validation sample has a class of the training samples")
        train_loss = total / rows
        loss_now = sum(loss * size for loss, size in validated) / sum(size for _, size in validated)
        if not math.isfinite(loss_now) or not math.isfinite(train_loss):
            raise TrainingError(
                f"the loss became NaN or infinite in epoch {epoch + 1}; try a `learning_rate` below "
                f"{options.learning_rate:g}"
            )
        history.append([train_loss, loss_now])
        if reporter is not None:
            reporter(epoch + 1, options.epochs, train_loss, rows)
        if loss_now < best:
            best, best_epoch = loss_now, epoch
            kept = {name: tensor.detach().clone() for name, tensor in weights.items()}
        elif options.patience is not None and epoch - best_epoch >= options.patience:
            break
    report = {
        "options": options.identity(),
        "versions": {name: version(name) for name in ("mmbeam", "torch")},
        "classes": len(classes),
        "multi_label": is_multi,
        "columns": [feature.name for feature in features],
        "samples": counts,
        "losses": history,
        "best_epoch": best_epoch,
        "test": _test(splits["test"], kept, features, options.label, classes, is_multi, device),
    }
    _write(output, options, kept, features, classes, is_multi, report)
    return report


def logits(
    weights: Weights, features: Sequence[FeatureColumn], batch: FeatureBatch, device: torch.device
) -> torch.Tensor:
    """Return the logits of a batch of features, [B, C]. A vector that a row lacks counts as the mean."""
    total = weights["bias"]
    for feature in features:
        vectors_BD = (batch[feature.name].to(device).float() - weights[f"mean.{feature.name}"]) / weights[
            f"std.{feature.name}"
        ]
        present_B1 = batch[f"{feature.name}_mask"].to(device)[:, None]
        total = total + (vectors_BD * present_B1) @ weights[f"weight.{feature.name}"].T
    return total


def _open(output: Path, options: HeadOptions, overwrite: bool) -> dict[str, Any] | None:
    """Return the report of the head that the directory holds; None if it is empty, or to be replaced."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"`output` {options.output}: expected a directory, found a file")
    if overwrite or not (output / "config.json").exists():
        return None
    if not (output / REPORT).exists():
        raise UsageError(f"`output` {options.output}: holds a model from another source; choose another directory")
    report: dict[str, Any] = json.loads((output / REPORT).read_text())
    lines = difference(report["options"], options.identity())
    if lines:
        raise RunMismatchError(
            f"`output` {options.output}: holds a head trained with other options:\n  " + "\n  ".join(lines) + "\n"
            "Choose another `output`, or replace it with `overwrite`"
        )
    return report


def _label_column(options: HeadOptions) -> str:
    """Return the column that holds the label: its own, or "metadata" if it is a field of the JSON there."""
    files = feature_files(options.input, options.strict_input, options.allow_local_paths)
    if not files:
        raise UsageError("`input`: expected features, found shards; write them by `mmbeam embed` first")
    with open_parquet(files[0]) as parquet:
        return options.label if options.label in parquet.schema_arrow.names else "metadata"


def _dataset(options: HeadOptions, column: str, split: Split) -> FeatureDataset:
    return FeatureDataset(
        options.input,
        batch_size=options.batch_size,
        features=options.columns,
        columns=[column],
        allow_local_paths=options.allow_local_paths,
        split=split,
        split_fractions=options.split_fractions,
        shuffle=split == "train",
        seed=options.seed,
        dtype=torch.float32,
    )


def _labelled(
    dataset: FeatureDataset, label: str, known: Mapping[str, int] | None = None
) -> Iterator[tuple[FeatureBatch, list[list[str]], bool]]:
    """Yield the batches with the rows that have labels (known ones), the labels, and whether any of them is a list."""
    for batch in dataset:
        values = batch.get(label)
        if values is None:
            values = [json_object(text).get(label) for text in batch["metadata"]]
        labels = [None if value is None else true_labels(value) for value in values]
        rows = [
            row
            for row, names in enumerate(labels)
            if names is not None and (known is None or known.keys() >= set(names))
        ]
        if rows:
            index = torch.tensor(rows)
            chosen = {name: value[index] for name, value in batch.items() if isinstance(value, torch.Tensor)}
            yield chosen, [labels[row] or [] for row in rows], any(isinstance(values[row], list) for row in rows)


def _count_labels(splits: Mapping[str, FeatureDataset], options: HeadOptions) -> tuple[list[str], bool, dict[str, Any]]:
    """Return the classes of the training split in order, whether rows have several, and the numbers of rows."""
    classes = Counter[str]()
    rows, is_multi = Counter[str](), False
    for name, dataset in splits.items():
        for _, labels, has_lists in _labelled(dataset, options.label):
            rows[name] += len(labels)
            is_multi = is_multi or has_lists
            if name == "train":
                classes.update(label for names in labels for label in names)
    if not sum(rows.values()):
        raise UsageError(f"`label` {options.label}: no row has a string, an integer or a list of them there")
    if len(classes) < 2 or not rows["validation"]:
        raise JobError(
            f"a head needs two classes to learn and a sample to validate; `label` {options.label} has {len(classes)} "
            f"classes in {rows['train']:,} training samples, and {rows['validation']:,} validation samples"
        )
    if len(classes) > MAX_CLASSES or (not is_multi and len(classes) > 2 and len(classes) * 2 > rows["train"]):
        raise UsageError(
            f"`label` {options.label}: expected labels that repeat, found {len(classes):,} different labels in "
            f"{rows['train']:,} training samples"
        )
    counts = {**rows, "by_class": dict(classes.most_common(20))}
    return sorted(classes), is_multi, counts


def _standardisation(
    dataset: FeatureDataset, features: Sequence[FeatureColumn], label: str, num_classes: int
) -> Weights:
    """Return weights of 0 and the mean and standard deviation of each column over the labelled training samples."""
    sums = {feature.name: torch.zeros(2, feature.width, dtype=torch.float64) for feature in features}
    present = Counter[str]()
    for batch, _, _ in _labelled(dataset, label):
        for feature in features:
            vectors_BD = batch[feature.name][batch[f"{feature.name}_mask"]].double()
            sums[feature.name] += torch.stack([vectors_BD.sum(0), vectors_BD.square().sum(0)])
            present[feature.name] += len(vectors_BD)
    weights: Weights = {"bias": torch.zeros(num_classes)}
    for feature in features:
        mean, square = sums[feature.name] / max(1, present[feature.name])
        std = (square - mean.square()).clamp_min(0).sqrt()
        weights[f"weight.{feature.name}"] = torch.zeros(num_classes, feature.width)
        weights[f"mean.{feature.name}"] = mean.float()
        weights[f"std.{feature.name}"] = torch.where(std > 1e-6, std, torch.ones_like(std)).float()
    return weights


@torch.no_grad()
def _test(
    dataset: FeatureDataset,
    weights: Weights,
    features: Sequence[FeatureColumn],
    label: str,
    classes: Sequence[str],
    is_multi: bool,
    device: torch.device,
) -> dict[str, Any]:
    """Return the scores of the test split, as `mmbeam evaluate --label` computes them; no scores without samples."""
    predicted: list[list[dict[str, Any]]] = []
    truths: list[list[str]] = []
    for batch, labels, _ in _labelled(dataset, label):
        logits_BC = logits(weights, features, batch, device)
        scores_BC = logits_BC.sigmoid() if is_multi else logits_BC.softmax(-1)
        for scores in scores_BC.cpu():
            order = torch.argsort(-scores, stable=True).tolist()
            predicted.append([{"label": classes[place], "score": float(scores[place])} for place in order])
        truths += labels
    return {"samples": len(truths), **(classification_scores(predicted, truths, is_multi) if truths else {})}


def _write(
    output: Path,
    options: HeadOptions,
    weights: Weights,
    features: Sequence[FeatureColumn],
    classes: Sequence[str],
    is_multi: bool,
    report: Mapping[str, Any],
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "problem_type": "multi_label_classification" if is_multi else "single_label_classification",
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "columns": [
            {
                "name": feature.name,
                "width": feature.width,
                "modality": feature.modality,
                "origin": None if feature.origin is None else list(feature.origin),
            }
            for feature in features
        ],
        "plain": all(map(_is_plain, options.input)),
    }
    save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, output / "model.safetensors")
    write_text(output / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    shutil.copymode(output / "config.json", output / "model.safetensors")  # only its owner could read it
    write_text(output / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(output / "README.md", head_card(report, classes))


def _is_plain(path: str) -> bool:
    """Return whether the features are a run's vectors as its encoder makes them without further options."""
    try:
        run = find_run(path)
    except JobError:
        return False
    return run.configuration.get("text_prompt") is None and run.configuration.get("dims") is None


def head_card(report: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Return the model card: what the head labels, on which features, and its scores."""
    test = report["test"]
    scores = "".join(
        f"| {name.replace('_', ' ')} | {value:.3f} |\n"
        for name, value in test.items()
        if isinstance(value, float) and name not in ("samples", "classes")
    )
    shown = ", ".join(f"`{name}`" for name in classes[:20]) + (", ..." if len(classes) > 20 else "")
    kind = "any number of labels per sample" if report["multi_label"] else "one label per sample"
    columns = ", ".join(f"`{name}`" for name in report["columns"])
    return (
        f"# Classification head\n\n{len(classes):,} classes, {kind}: {shown}\n\nA linear layer on {columns}, "
        f"trained by `mmbeam train --task classify --label {report['options']['label']}` on "
        f"{report['samples'].get('train', 0):,} samples.\n\nTest split, {test['samples']:,} samples:\n\n"
        f"| score | value |\n|---|---|\n{scores}\n"
        "```console\n$ mmbeam label --input FEATURES_OR_SHARDS --output OUT --model MODEL_DIR\n```\n"
    )
