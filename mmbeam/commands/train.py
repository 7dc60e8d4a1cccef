"""mmbeam train."""

import argparse
import sys
from collections.abc import Generator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mmbeam.commands.common import field_arguments, fields_of, fraction, modalities_of, positive
from mmbeam.names import BUILTIN_ENCODERS, MODALITIES, OPTIMIZERS, SCHEDULES, SELECTIONS

if TYPE_CHECKING:
    from mmbeam.training.options import TrainOptions

ABOUT = "Train a fusion model, which writes captions from image, audio and text, on shards or features."
EPILOG = """\
Samples are split by a hash of their keys into training, validation and test. After each epoch the model is scored on
the validation split, and the best weights are kept. The test split is read once, at the end. To resume a training, run
the same command again. To use the model: mmbeam caption --model MODEL_DIR

Several processes or GPUs: torchrun --nproc-per-node N -m mmbeam train ...
"""
CHOICES = {  # options of the model that have a few values
    "fusion": ("attention", "concat", "gated", "bilinear"),
    "generator": ("transformer", "lstm"),
}
LOSSES = ("caption", "align", "reconstruct", "modality_adversary", "generator_adversary")
SIMILARITIES = ("cosine", "dot", "bilinear")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHARDS_OR_FEATURES",
        help="shards, or what `mmbeam embed` wrote (its output, or Parquet files); may be repeated",
    )
    parser.add_argument("--output", required=True, metavar="MODEL_DIR", help="local directory for the model")
    parser.add_argument("--overwrite", action="store_true", help="discard any earlier training in --output")
    _data_arguments(parser.add_argument_group("data"))
    _model_arguments(parser.add_argument_group("model"))
    _training_arguments(parser.add_argument_group("training"))


def _data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--captions",
        default="caption",
        metavar="FIELD",
        help="caption: a field of the samples' JSON or a column; text: the samples' text (default: caption)",
    )
    group.add_argument(
        "--captions-from",
        metavar="FILE",
        help="captions of features: .parquet, .jsonl or .csv with key and FIELD",
    )
    group.add_argument(
        "--clauses",
        metavar="FIELD",
        help='field of the JSON like {"image": ..., "audio": ..., "text": ...}: the parts of the caption, which is '
        "composed of those of the modalities present",
    )
    group.add_argument("--group", metavar="FIELD", help="field of the JSON; samples with the same value form a group")
    group.add_argument("--modalities", metavar="LIST", help="of image,audio,text (default: all present)")
    group.add_argument(
        "--column",
        action="append",
        metavar="NAME[=MODALITY]",
        help="column of features; may be repeated (default: all columns of vectors)",
    )
    group.add_argument(
        "--split", type=_shares, default="0.9,0.05,0.05", metavar="T,V,T", help="shares (default: 0.9,0.05,0.05)"
    )
    field_arguments(group)


def _model_arguments(group: argparse._ArgumentGroup) -> None:
    for name, choices in CHOICES.items():
        group.add_argument(f"--{name}", choices=choices, help=f"default: {choices[0]}")
    group.add_argument(
        "--encoder",
        action="append",
        type=_encoder,
        metavar="MODALITY=KIND|MODEL",
        help=f"encoder for shards: {', '.join(BUILTIN_ENCODERS)}, or a transformers model, hub name or directory "
        "(default: image=conv, audio=conv, text=transformer); may be repeated, also for one modality: its sources are "
        "then text, text_2, text_3",
    )
    group.add_argument(
        "--unfreeze",
        metavar="LIST",
        help="sources whose pretrained encoders are trained, best with a lower --learning-rate (default: none)",
    )
    group.add_argument("--hidden-size", type=positive, metavar="N", help="width of the model (default: 128)")
    group.add_argument("--similarity", action="append", choices=SIMILARITIES, help="may be repeated (default: cosine)")
    group.add_argument(
        "--pair",
        action="append",
        type=_pair,
        metavar="A:B",
        help="sources to align, including fused and caption; A:A aligns two views of a source, or with --group the "
        "samples of a group; may be repeated (default: all pairs of different sources)",
    )
    group.add_argument(
        "--vocab-size", type=positive, default=2000, metavar="N", help="vocabulary size in tokens (default: 2000)"
    )
    group.add_argument(
        "--text-tokens", type=positive, default=64, metavar="N", help="longer texts are truncated (default: 64)"
    )
    group.add_argument(
        "--audio-seconds",
        type=_number,
        metavar="S",
        help="longer audio is truncated (default: the longest of the first 100 clips)",
    )
    group.add_argument("--init", metavar="MODEL", help="start from the weights and architecture of this model")
    group.add_argument(
        "--freeze",
        metavar="LIST",
        help="parts of the --init model that are not trained: names of sources, words, space, fusion, generator",
    )


def _training_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=positive, default=20, metavar="N", help="default: 20")
    group.add_argument("--steps", type=positive, metavar="N", help="number of optimizer steps, instead of --epochs")
    group.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="samples per batch, over all processes (default: 64)",
    )
    group.add_argument(
        "--learning-rate", type=_number, default=1e-3, metavar="R", help="highest learning rate (default: 0.001)"
    )
    group.add_argument("--warmup-steps", type=int, metavar="N", help="default: 5 %% of all steps")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="default: cosine")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="default: adamw")
    group.add_argument("--weight-decay", type=_number, default=0.01, metavar="W", help="default: 0.01")
    group.add_argument(
        "--clip-norm",
        type=_number,
        default=1.0,
        metavar="N",
        help="gradient clipping: largest norm; 0: off (default: 1)",
    )
    group.add_argument("--dropout", type=fraction, default=0.1, metavar="P", help="default: 0.1")
    group.add_argument("--label-smoothing", type=fraction, default=0.0, metavar="P", help="default: 0")
    group.add_argument(
        "--modality-dropout",
        type=fraction,
        default=0.15,
        metavar="P",
        help="per modality of a sample (default: 0.15)",
    )
    group.add_argument(
        "--loss-weight",
        action="append",
        type=_weight,
        metavar="LOSS=W",
        help=f"of {', '.join(LOSSES)} (default: caption=1, align=0.1, reconstruct=0.1, the others 0)",
    )
    group.add_argument(
        "--patience",
        type=int,
        default=5,
        metavar="N",
        help="early stopping: epochs without a better score; 0: off (default: 5)",
    )
    group.add_argument(
        "--select",
        choices=SELECTIONS,
        default="loss",
        help="validation score that selects the best weights (default: loss)",
    )
    group.add_argument(
        "--search", type=positive, metavar="N", help="try N hyperparameter configurations first, and train the best"
    )
    group.add_argument(
        "--search-steps", type=positive, default=200, metavar="N", help="steps of each configuration (default: 200)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    group.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument("--no-mixed-precision", action="store_true", help="compute in float32 on a GPU too")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    options = _options(args)

    from mmbeam.report.progress import TrainingLine
    from mmbeam.training.distributed import is_main_process
    from mmbeam.training.train import train

    line = TrainingLine(sys.stderr)
    try:
        report = train(options, overwrite=args.overwrite, reporter=line)
    finally:
        line.end()
    if not is_main_process():
        return 0
    training, test = report["training"], report["test"]
    yield f"trained: {training['step']:,} steps, {training['samples']:,} samples, {training['seconds']:,.0f} s"
    yield f"best: epoch {training['best_epoch'] + 1} of {training['epoch']}; {_scores(report['validation'])}"
    if test["samples"]:
        yield f"test split, {test['samples']:,} samples: {_scores(test)}"
    yield f"model: {options.output}"
    return 0


def _scores(scores: dict[str, Any]) -> str:
    right = f"exact match {scores['exact_match']:.1%}, words right {scores['words_right']:.1%}"
    return f"loss {scores['loss']:.3f}, {right}"


def _options(args: argparse.Namespace) -> "TrainOptions":
    from mmbeam.config import Reading
    from mmbeam.training.options import TrainOptions

    model = {"fusion": args.fusion, "generator_kind": args.generator, "hidden_size": args.hidden_size}
    model |= {"pairs": args.pair, "similarities": args.similarity}
    same = {field.name for field in fields(TrainOptions)}
    other = {
        "input": tuple(args.input),
        "reading": Reading(fields=fields_of(args)),
        "modalities": modalities_of(args.modalities),
        "columns": None if args.column is None else tuple(args.column),
        "shares": args.split,
        "model": {name: value for name, value in model.items() if value},
        "encoders": tuple(args.encoder or ()),
        "freeze": _names(args.freeze),
        "unfreeze": _names(args.unfreeze),
        "loss_weights": dict(args.loss_weight or ()),
        "patience": args.patience or None,
        "search": args.search or 0,
        "mixed_precision": not args.no_mixed_precision,
    }
    return TrainOptions(**({name: value for name, value in vars(args).items() if name in same} | other))


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def _shares(text: str) -> tuple[float, ...]:
    return tuple(_number(number) for number in text.split(","))


def _pair(text: str) -> tuple[str, str]:
    a, colon, b = text.partition(":")
    if not (a and colon and b):
        raise argparse.ArgumentTypeError(f"expected A:B, found {text!r}")
    return a, b


def _encoder(text: str) -> tuple[str, str]:
    modality, _, encoder = text.partition("=")
    if modality not in MODALITIES or not encoder:
        raise argparse.ArgumentTypeError(f"expected image=, audio= or text= and an encoder, found {text!r}")
    return modality, encoder


def _weight(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    if name not in LOSSES:
        raise argparse.ArgumentTypeError(f"expected LOSS=W, LOSS of {', '.join(LOSSES)}, found {text!r}")
    return name, _number(weight)
