"""The model card: README.md of a trained model, in the form that model hubs read."""

import json
from collections.abc import Mapping
from typing import Any

from mmbeam.training.options import TrainOptions
from mmbeam.types import Origin

_DEFAULTS = TrainOptions(input=("",), output="").identity()


def model_card(report: Mapping[str, Any]) -> str:
    """Return the text of the card for a report of `train`: the model, its training and its scores."""
    options, data = report["options"], report["data"]
    changed = {name: value for name, value in options.items() if value != _DEFAULTS.get(name)}
    modalities = " and ".join(sorted(data.get("modalities", {}))) or "stored features"
    return "\n".join(
        [
            "---",
            "library_name: mmbeam",
            "tags: [multimodal, captioning]",
            "---",
            "# A fusion model trained by `mmbeam train`",
            "",
            f"The model writes a caption from {modalities}; any of them may be missing.",
            f"It has {report['parameters']:,} parameters. Use it with `mmbeam caption --model DIRECTORY`.",
            "",
            "## Training",
            "",
            *_training(report),
            "",
            "Options other than the defaults:",
            "",
            "```json",
            json.dumps(changed, indent=2),
            "```",
            "",
            "## Figures",
            "",
            *_figures(report),
            "",
            "Exact match: the greedily decoded caption equals the reference. Words right: words that equal the word of",
            "the reference at the same position, as a fraction of the longer of the two.",
            "",
            "## Limits",
            "",
            "The model covers only the domain of its training samples. Describe them here.",
            "",
        ]
    )


def _training(report: Mapping[str, Any]) -> list[str]:
    training, data, versions = report["training"], report["data"], report["versions"]
    captions = ", ".join(f"{count:,} {split}" for split, count in data.get("captions", {}).items())
    return [
        *(f"- `{name}` comes from {Origin(**origin)}" for name, origin in data.get("origins", {}).items()),
        f"- samples with a caption: {captions or data['samples']}",
        f"- {training['step']:,} steps, {training['samples']:,} samples seen, {training['seconds']:,.0f} s on "
        f"{report['device']}; the weights are those of epoch {training['best_epoch'] + 1} of {training['epoch']}",
        f"- seed {report['options']['seed']}; {', '.join(f'{name} {version}' for name, version in versions.items())}",
    ]


def _figures(report: Mapping[str, Any]) -> list[str]:
    lines = ["| | validation | test |", "|---|---|---|"]
    splits = [report["validation"], report["test"]]
    for name in ("samples", "loss", "exact_match", "words_right"):
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(_number(scores[name]) for scores in splits) + " |")
    for kind, title in (("subsets", "exact match, {} alone"), ("recall", "recall@1, {}")):
        for name in dict.fromkeys(name for scores in splits for name in scores[kind]):
            values = " | ".join(_number(scores[kind].get(name)) for scores in splits)
            lines.append(f"| {title.format(name)} | {values} |")
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
