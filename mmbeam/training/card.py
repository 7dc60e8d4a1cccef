"""The model card: README.md of a trained model, in the form that model hubs read."""

import json
from collections.abc import Mapping
from typing import Any

from mmbeam.training.options import TrainOptions
from mmbeam.types import Origin

RETRIEVED = 500  # candidates at a time, in `retrieval`
_DEFAULTS = TrainOptions(input=("",), output="").identity()


def model_card(report: Mapping[str, Any]) -> str:
    """A card for what `train` reports: what the model is, how it was made, and how good it is."""
    options, data = report["options"], report["data"]
    changed = {name: value for name, value in options.items() if value != _DEFAULTS.get(name)}
    modalities = " and ".join(sorted(data.get("modalities", {}))) or "stored features"
    return "\n".join(
        [
            "---",
            "library_name: mmbeam",
            "tags: [multimodal, captioning]",
            "---",
            "# A fusion model made by `mmbeam train`",
            "",
            f"It writes a caption from {modalities}; any of them may be missing.",
            f"It has {report['parameters']:,} parameters. Use it with `mmbeam caption --model DIRECTORY`.",
            "",
            "## Training",
            "",
            *_training(report),
            "",
            "Options that are not the defaults:",
            "",
            "```json",
            json.dumps(changed, indent=2),
            "```",
            "",
            "## Figures",
            "",
            *_figures(report),
            "",
            "Exact match: the greedy caption equals the true one, character for character. Words right: words that",
            "equal the true one at the same place, of the words of the longer of the two.",
            "",
            "## Limits",
            "",
            "It knows what its training samples showed, and nothing else; say here what they were.",
            "",
        ]
    )


def _training(report: Mapping[str, Any]) -> list[str]:
    training, data, versions = report["training"], report["data"], report["versions"]
    captions = ", ".join(f"{count:,} {part}" for part, count in data.get("captions", {}).items())
    return [
        *(f"- `{name}` is what {Origin(**of)} makes" for name, of in data.get("origins", {}).items()),
        f"- samples with a caption: {captions or data['samples']}",
        f"- {training['step']:,} steps, {training['samples']:,} samples seen, {training['seconds']:,.0f} s on "
        f"{report['device']}; the weights are those of epoch {training['best_epoch'] + 1} of {training['epoch']}",
        f"- seed {report['options']['seed']}; {', '.join(f'{name} {of}' for name, of in versions.items())}",
    ]


def _figures(report: Mapping[str, Any]) -> list[str]:
    lines = ["| | validation | test |", "|---|---|---|"]
    parts = [report["validation"], report["test"]]
    for name in ("samples", "loss", "exact_match", "words_right"):
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(_number(part[name]) for part in parts) + " |")
    for kind, title in (("subsets", "exact match, {} alone"), ("recall", "recall@1, {}")):
        for name in dict.fromkeys(name for part in parts for name in part[kind]):
            values = " | ".join(_number(part[kind].get(name)) for part in parts)
            lines.append(f"| {title.format(name)} | {values} |")
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def shipped_card(figures: Mapping[str, Any], sha256: str) -> str:
    """The card of the model that ships with the package, from what `train_shipped` measured."""
    report, found = figures["training"], figures["evaluation"]
    training, options = report["training"], report["options"]
    wrong = sorted((share, word) for word, share in found["words"].items() if share < 1)[:8]
    shown = ", ".join(f"{word} ({share:.2%} right)" for share, word in wrong) or "none"
    return "\n".join(
        [
            "---",
            "library_name: mmbeam",
            "license: apache-2.0",
            "tags: [multimodal, captioning]",
            "---",
            "# The small fusion model that ships with mmbeam",
            "",
            "It writes what a picture shows, what a sound is like, and where and when a short text says it was, from",
            "any of the three: `mmbeam caption --input SHARDS --output OUT`. It was made to show that the whole path",
            "works, from shards to captions, and to be checked against a known truth.",
            "",
            "## Training",
            "",
            f"`make model`: {training['step']:,} steps of {options['batch_size']} scenes, each rendered once,",
            f"with seed {options['seed']}, in {training['seconds']:,.0f} s with validation (2 cores, shared).",
            f"{report['parameters']:,} parameters, stored in bfloat16; model.safetensors has SHA-256",
            f"`{sha256}`.",
            f"{', '.join(f'{name} {of}' for name, of in report['versions'].items())}.",
            "",
            "The scenes are those of `mmbeam.corpus`: one or two of six shapes in eight colours, two sizes and nine",
            "places; a tone, chirp or noise of three pitches, three tempi and two levels; a text that names one of 16",
            "places and four times in one of six forms and three cases. Each modality is dropped with probability",
            f"{options['modality_dropout']}, and its clause with it.",
            "",
            "## Figures",
            "",
            f"On {found['samples']:,} scenes of seed {found['seed']}, which neither training nor selection saw.",
            f"Greedy decoding. Exact match {found['exact_match']:.2%}; words right {found['words_right']:.2%}.",
            "",
            "| given | captions that are exactly the clauses of what is given |",
            "|---|---|",
            *(f"| {name} | {share:.2%} |" for name, share in found["subsets"].items()),
            "",
            "| class of words | right |",
            "|---|---|",
            *(f"| {name} | {share:.2%} |" for name, share in found["classes"].items()),
            "",
            f"The words most often wrong: {shown}.",
            "",
            f"| recall@1 among {RETRIEVED}, by cosine | |",
            "|---|---|",
            *(f"| {name} | {share:.1%} |" for name, share in found["recall"].items()),
            "",
            "All words, and the options, are in figures.json.",
            "",
            "## Limits",
            "",
            "It knows this corpus and nothing else: of a photograph it says nonsense in the same words. Pictures are",
            "resized to 64 x 64, sounds cut to their first second, texts to 64 tokens. It has seen all pairs of colour",
            "and shape; that it would join words it never saw together is not claimed.",
            "",
        ]
    )
