"""The command `mmbeam train`."""

import argparse
import sys
from collections.abc import Generator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mmbeam.commands.common import (
    Group,
    field_arguments,
    fields_of,
    fraction,
    limit_arguments,
    limits_of,
    listing_arguments,
    modalities_of,
    number,
    positive,
    whole,
)
from mmbeam.errors import UsageError
from mmbeam.names import (
    BUILTIN_ENCODERS,
    FUSION_MODALITIES,
    FUSIONS,
    GENERATOR_KINDS,
    LOSSES,
    OPTIMIZERS,
    SCHEDULES,
    SELECTIONS,
    SIMILARITIES,
)

if TYPE_CHECKING:
    from mmbeam.training.options import TrainOptions

ABOUT = "Train a fusion model, which writes captions from image, audio and text, or a classification head."
EPILOG = """\
Samples are split by a hash of their keys into training, validation and test. After each epoch the model is scored on
the validation split, and the best weights are kept. The test split is read once, at the end. To resume a training, run
the same command again. To use the model: mmbeam caption --model MODEL_DIR

--task classify trains a linear layer on features, for labels of your own. To use it: mmbeam label --model MODEL_DIR

Examples: mmbeam train --input 'shards/*.tar' --output model --epochs 10
          mmbeam train --input features --task classify --label species --output head

Several processes or GPUs: torchrun --nproc-per-node N -m mmbeam train ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam train`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHARDS_OR_FEATURES",
        help="shards, or features: an output of `mmbeam embed`, or Parquet files of it; may be repeated",
    )
    parser.add_argument("--output", required=True, metavar="MODEL_DIR", help="local directory for the model")
    parser.add_argument("--overwrite", action="store_true", help="discard any earlier training in --output")
    parser.add_argument(
        "--task",
        choices=("caption", "classify"),
        default="caption",
        help="a fusion model that writes captions, or a classification head on features (default: caption)",
    )
    parser.add_argument(
        "--label",
        metavar="FIELD",
        help="with --task classify: the field of the samples' JSON, or the column of features, that holds the label, "
        "or a list of labels",
    )
    _data_arguments(parser.add_argument_group("data"))
    _model_arguments(parser.add_argument_group("model"))
    _training_arguments(parser.add_argument_group("training"))
    limit_arguments(parser)


def _data_arguments(group: Group) -> None:
    group.add_argument(
        "--captions",
        default="caption",
        metavar="FIELD",
        help="field of the samples' JSON, or column of features, that holds the caption; `text` is the samples' own "
        "text (default: caption)",
    )
    group.add_argument(
        "--captions-from",
        metavar="FILE",
        help="read the captions of features from a Parquet, JSON lines, CSV or TSV file with `key` and FIELD",
    )
    group.add_argument(
        "--clauses",
        metavar="FIELD",
        help='field of the JSON with one clause per modality, {"image": ..., "audio": ..., "text": ...}; the caption '
        "is composed of the clauses of the modalities present",
    )
    group.add_argument("--group", metavar="FIELD", help="field of the JSON; samples with the same value form a group")
    group.add_argument("--modalities", metavar="LIST", help="subset of image,audio,text (default: all present)")
    group.add_argument(
        "--column",
        action="append",
        metavar="NAME[=MODALITY]",
        help="column of features; may be repeated (default: all columns of vectors)",
    )
    group.add_argument(
        "--split",
        type=_fractions,
        default="0.9,0.05,0.05",
        metavar="TRAIN,VALIDATION,TEST",
        help="fractions of the samples in each split (default: 0.9,0.05,0.05)",
    )
    listing_arguments(group)
    field_arguments(group)


def _model_arguments(group: Group) -> None:
    group.add_argument("--fusion", choices=FUSIONS, help=f"how the sources are combined (default: {FUSIONS[0]})")
    group.add_argument("--generator", choices=GENERATOR_KINDS, help=f"text decoder (default: {GENERATOR_KINDS[0]})")
    group.add_argument(
        "--encoder",
        action="append",
        type=_encoder,
        metavar="MODALITY=KIND|MODEL",
        help=f"encoder for shards: {', '.join(BUILTIN_ENCODERS)}, or a transformers model, hub name or directory "
        "(default: image=conv, audio=conv, text=transformer); may be repeated; several sources of one modality are "
        "named text, text_2, text_3",
    )
    group.add_argument(
        "--unfreeze",
        metavar="LIST",
        help="sources whose pretrained encoders are trained too; lower --learning-rate for them (default: none)",
    )
    group.add_argument("--hidden-size", type=positive, metavar="N", help="width of the model (default: 128)")
    group.add_argument(
        "--similarity",
        action="append",
        choices=SIMILARITIES,
        help="similarity function to train; may be repeated (default: cosine)",
    )
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
        type=number,
        metavar="S",
        help="longer audio is truncated (default: the longest of the first 100 clips)",
    )
    group.add_argument("--init", metavar="MODEL", help="start from the weights and architecture of this model")
    group.add_argument(
        "--freeze",
        metavar="LIST",
        help="parts of the --init model that are not trained: names of sources, words, space, fusion, generator",
    )


def _training_arguments(group: Group) -> None:
    group.add_argument(
        "--epochs", type=positive, metavar="N", help="number of epochs, at most (default: 20; classify: 100)"
    )
    group.add_argument("--steps", type=positive, metavar="N", help="number of optimizer steps, instead of --epochs")
    group.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="samples per batch, over all processes (default: 64)",
    )
    group.add_argument(
        "--learning-rate", type=number, metavar="R", help="peak learning rate (default: 0.001; classify: 0.003)"
    )
    group.add_argument(
        "--warmup-steps", type=whole, metavar="N", help="steps of linear warmup (default: 5 %% of all steps)"
    )
    group.add_argument(
        "--schedule", choices=SCHEDULES, default="cosine", help="learning rate after the warmup (default: cosine)"
    )
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="(default: adamw)")
    group.add_argument("--weight-decay", type=number, default=0.01, metavar="W", help="(default: 0.01)")
    group.add_argument(
        "--clip-norm",
        type=number,
        default=1.0,
        metavar="N",
        help="gradient clipping: largest norm; 0: off (default: 1)",
    )
    group.add_argument("--dropout", type=fraction, default=0.1, metavar="P", help="dropout probability (default: 0.1)")
    group.add_argument("--label-smoothing", type=fraction, default=0.0, metavar="P", help="(default: 0)")
    group.add_argument(
        "--modality-dropout",
        type=fraction,
        default=0.15,
        metavar="P",
        help="probability of masking each modality of a training sample (default: 0.15)",
    )
    group.add_argument(
        "--loss-weight",
        action="append",
        type=_weight,
        metavar="LOSS=W",
        help=f"weight of a loss: {', '.join(LOSSES)}; may be repeated (default: caption=1, align=0.1, "
        "reconstruct=0.1, the others 0)",
    )
    group.add_argument(
        "--patience",
        type=whole,
        default=5,
        metavar="N",
        help="early stopping: stop after N epochs without a better validation score; 0: off (default: 5)",
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
    group.add_argument("--seed", type=whole, default=0, metavar="N", help="random seed (default: 0)")
    group.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument("--no-mixed-precision", action="store_true", help="compute in float32 on a GPU too")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Train, and yield the scores of the model. In other processes than rank 0, yield nothing."""
    if args.task == "classify":
        return (yield from _run_head(args))
    if args.label is not None:
        raise UsageError("`label` needs `task` classify, found caption")
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
    yield f"best: epoch {training['best_epoch'] + 1} of {training['epoch']}; {_scores_text(report['validation'])}"
    if test["samples"]:
        yield f"test split, {test['samples']:,} samples: {_scores_text(test)}"
    yield f"model: {options.output}"
    return 0


_HEAD_ARGUMENTS = (  # that apply to --task classify
    *("input", "output", "overwrite", "task", "label", "column", "split", "allow_local_paths", "strict_input"),
    *("epochs", "batch_size", "learning_rate", "weight_decay", "patience", "seed", "device"),
)


def _run_head(args: argparse.Namespace) -> Generator[str, None, int]:
    """Train a classification head, and yield its scores."""
    if args.label is None:
        raise UsageError("`task` classify needs `label`, the field or column that holds the labels")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args(["--input", "", "--output", ""]))
    others = [name for name, value in defaults.items() if getattr(args, name) != value and name not in _HEAD_ARGUMENTS]
    if others:
        names = ", ".join(f"`{name}`" for name in others)
        raise UsageError(f"{names}: applies to `task` caption only; omit it with `task` classify")

    from mmbeam.report.progress import TrainingLine
    from mmbeam.training.head import HeadOptions, train_head

    chosen = {
        name: getattr(args, name)
        for name in (
            *("epochs", "batch_size", "learning_rate", "weight_decay", "seed", "device"),
            *("allow_local_paths", "strict_input"),
        )
        if getattr(args, name) is not None
    }
    options = HeadOptions(
        input=tuple(args.input),
        output=args.output,
        label=args.label,
        columns=None if args.column is None else tuple(args.column),
        split_fractions=args.split,
        patience=args.patience or None,
        **chosen,
    )
    line = TrainingLine(sys.stderr)
    try:
        report = train_head(options, overwrite=args.overwrite, reporter=line.show)
    finally:
        line.end()
    samples, test = report["samples"], report["test"]
    kind = "any number per sample" if report["multi_label"] else "one per sample"
    yield f"trained: {report['classes']} classes, {kind}; {samples['train']:,} samples, {len(report['losses'])} epochs"
    yield f"best: epoch {report['best_epoch'] + 1}; validation loss {report['losses'][report['best_epoch']][1]:.3f}"
    if test["samples"]:
        yield (
            f"test split, {test['samples']:,} samples: accuracy {test['accuracy']:.1%}, "
            f"F1 {test['f1_macro']:.1%} (macro), {test['f1_micro']:.1%} (micro)"
        )
    yield f"model: {options.output}"
    return 0


def _scores_text(scores: dict[str, Any]) -> str:
    return (
        f"loss {scores['loss']:.3f}, exact match {scores['exact_match']:.1%}, words right {scores['words_right']:.1%}"
    )


def _options(args: argparse.Namespace) -> "TrainOptions":
    from mmbeam.config import Reading
    from mmbeam.training.options import TrainOptions

    model = {"fusion": args.fusion, "generator_kind": args.generator, "hidden_size": args.hidden_size}
    model |= {"pairs": args.pair, "similarities": args.similarity}
    names = {field.name for field in fields(TrainOptions)}
    converted = {
        "input": tuple(args.input),
        "reading": Reading(fields=fields_of(args), limits=limits_of(args), isolate_decoding=args.isolate_decoding),
        "modalities": modalities_of(args.modalities),
        "columns": None if args.column is None else tuple(args.column),
        "split_fractions": args.split,
        "model": {name: value for name, value in model.items() if value},
        "encoders": tuple(args.encoder or ()),
        "freeze": _names(args.freeze),
        "unfreeze": _names(args.unfreeze),
        "loss_weights": dict(args.loss_weight or ()),
        "patience": args.patience or None,
        "search": args.search or 0,
        "mixed_precision": not args.no_mixed_precision,
    }
    known = {name: value for name, value in vars(args).items() if name in names}
    for name in ("epochs", "learning_rate"):  # their defaults differ by task
        if known[name] is None:
            del known[name]
    return TrainOptions(**known | converted)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def _fractions(text: str) -> tuple[float, ...]:
    return tuple(number(part) for part in text.split(","))


def _pair(text: str) -> tuple[str, str]:
    a, colon, b = text.partition(":")
    if not (a and colon and b):
        raise argparse.ArgumentTypeError(f"expected A:B, found {text!r}")
    return a, b


def _encoder(text: str) -> tuple[str, str]:
    modality, _, encoder = text.partition("=")
    if modality not in FUSION_MODALITIES or not encoder:
        raise argparse.ArgumentTypeError(f"expected image=, audio= or text= and an encoder, found {text!r}")
    return modality, encoder


def _weight(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    if name not in LOSSES:
        raise argparse.ArgumentTypeError(f"expected LOSS=W, LOSS of {', '.join(LOSSES)}, found {text!r}")
    return name, number(weight)
