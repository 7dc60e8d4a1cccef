"""Train the fusion model that ships with mmbeam, on the procedural corpus, and measure it on fresh scenes.

    python pipelines/train_fusion.py --output models/fusion

writes the model (bfloat16), its model card and figures.json: exact match and words right from every subset
of the modalities, the share right of each class of words and each word, recall@1. All hyper-parameters have
the values that the shipped model was trained with; to change one, name it:

    python pipelines/train_fusion.py --output lstm --generator lstm --steps 2400 --seed 1

The same command again goes on where it was interrupted. No Apache Beam is in it: one machine does it.
"""

import argparse
import logging
import sys

from mmbeam.training.progress import TrainingLine
from mmbeam.training.shipped import EVALUATION_SAMPLES, shipped_options, train_shipped


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the fusion model that ships with mmbeam.", allow_abbrev=False)
    parser.add_argument("--output", required=True, metavar="MODEL_DIR", help="directory for the model")
    parser.add_argument("--overwrite", action="store_true", help="start over; forget a training in the output")
    parser.add_argument("--evaluate", type=int, default=EVALUATION_SAMPLES, metavar="N", help="fresh scenes")
    parser.add_argument("--fusion", help="attention, concat, gated or bilinear")
    parser.add_argument("--generator", help="transformer or lstm")
    for name, kind in (("steps", int), ("seed", int), ("batch-size", int), ("warmup-steps", int)):
        parser.add_argument(f"--{name}", type=kind, metavar="N")
    for name in ("learning-rate", "weight-decay", "dropout", "modality-dropout", "label-smoothing"):
        parser.add_argument(f"--{name}", type=float, metavar="X")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    names = {"fusion": "fusion", "generator": "generator_kind"}
    model = {field: given.pop(name) for name, field in names.items() if name in given}
    count, overwrite = given.pop("evaluate"), given.pop("overwrite")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = shipped_options(given.pop("output"), model=model, **given)
    train_shipped(options, overwrite=overwrite, watcher=TrainingLine(sys.stderr), count=count)


if __name__ == "__main__":
    main()
