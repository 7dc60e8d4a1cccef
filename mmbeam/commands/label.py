"""The command `mmbeam label`."""

import argparse
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from mmbeam.commands.common import check_model, fraction, job_arguments, positive, run_job, shared_options
from mmbeam.errors import UsageError
from mmbeam.names import LABEL_TASKS, SEGMENT_KINDS

if TYPE_CHECKING:
    from mmbeam.jobs.label import LabelOptions

ABOUT = "Label every sample: classes, objects, segments, entities or parts of speech."
NEEDS_LABELS = ("zero-shot",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam label`."""
    parser.epilog = (
        "Example: mmbeam label --input 'shards/*.tar' --output out --task classify --model google/vit-base-patch16-224."
    )
    job_arguments(parser, features=True)
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]MODEL",
        help="hub name with optional @revision, or a directory; NAME prefixes its column; may be repeated",
    )
    parser.add_argument(
        "--task",
        choices=LABEL_TASKS,
        default="classify",
        help="classes of images, sounds or texts (classify, sentiment), labels of your own (zero-shot), "
        "boxes (detect), masks (segment), entities or parts of speech (tag) (default: classify)",
    )
    parser.add_argument(
        "--labels",
        metavar="A,B,C|FILE",
        help="labels to look for (zero-shot, and detect with a model for it), or the names of the classes of a model "
        "that does not name them; a file has one per line",
    )
    parser.add_argument(
        "--templates",
        metavar="TEXT|FILE",
        help="text about a label, which stands for {}: 'a photo of {}'; a file has one per line, whose vectors are "
        "averaged (default: 'This is a photo of {}.', or of a sound)",
    )
    parser.add_argument(
        "--top-k", type=positive, metavar="N", help="keep the N best of a sample (default: 5 classes, all of the rest)"
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        metavar="P",
        help="keep what has at least this score (default: 0 for classes and tags, 0.5 for objects and segments, "
        "0.1 with OWLv2, 0.25 with Grounding DINO)",
    )
    parser.add_argument(
        "--segments",
        choices=SEGMENT_KINDS,
        help="what a segment is, for a model that does several: a class, an object, or either (default: panoptic)",
    )


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Run the job, and yield its summary."""
    options = _options(args)  # checked before the slow import

    from mmbeam.jobs.label import prepare

    return (yield from run_job(prepare, options, args))


def _options(args: argparse.Namespace) -> "LabelOptions":
    from mmbeam.config import Labelling, ModelRef

    models = tuple(ModelRef.parse(model) for model in args.model)
    for model in models:
        check_model(model.model)
    labels = None if args.labels is None else read_list("labels", args.labels, ",")
    templates = None if args.templates is None else read_list("templates", args.templates, None)
    if args.task in NEEDS_LABELS and labels is None:
        raise UsageError(f"`task` {args.task} needs `labels` to look for, such as cat,dog or a file of them")
    if args.segments is not None and args.task != "segment":
        raise UsageError(f"`segments` needs `task` segment, found {args.task}")
    if templates is not None and args.task != "zero-shot":
        raise UsageError(f"`templates` needs `task` zero-shot, found {args.task}")
    labelling = Labelling(
        task=args.task,
        labels=labels,
        templates=templates,
        top_k=args.top_k,
        threshold=args.threshold,
        segments=args.segments,
    )
    shared = shared_options(args, features=True)

    from mmbeam.jobs.label import LabelOptions  # slow

    return LabelOptions(models=models, labelling=labelling, **shared)


def read_list(name: str, text: str, separator: str | None) -> tuple[str, ...]:
    """Return the items of an argument: the lines of a file if `text` is its path, else `text` at the separators.

    Raises UsageError for a file that cannot be read, an item that repeats, or no item.
    """
    path = Path(text).expanduser()
    try:
        is_file = path.is_file()
        lines = (
            path.read_text(encoding="utf-8").splitlines() if is_file else text.split(separator) if separator else [text]
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"`{name}` {text}: expected a file of UTF-8 lines: {error}") from error
    items = [line.strip() for line in lines if line.strip()]
    repeated = sorted({item for item in items if items.count(item) > 1})
    if repeated:
        raise UsageError(f"`{name}` {text}: {', '.join(repeated[:5])} repeats; expected each once")
    if not items:
        raise UsageError(f"`{name}` {text}: expected at least one")
    return tuple(items)
