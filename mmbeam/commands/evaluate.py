"""The command `mmbeam evaluate`."""

import argparse
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from mmbeam.commands.common import check_url, libraries_quiet

ABOUT = "Evaluate the output of a run: texts against references, retrieval between modalities, linear probes."
_TEXT_WIDTH = 100  # characters shown of a text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam evaluate`."""
    parser.set_defaults(takes_beam_options=True)
    parser.epilog = (
        "Example: mmbeam evaluate out --reference caption. "
        "Without --reference and --label it measures retrieval. Every Apache Beam pipeline option is accepted as Beam "
        "spells it, for example --runner=FlinkRunner."
    )
    parser.add_argument("run", metavar="OUT", help="the --output of a job")
    parser.add_argument(
        "--reference",
        metavar="FIELD",
        help="JSON field or column with the reference text, a string or a list of strings",
    )
    parser.add_argument(
        "--references",
        metavar="FILE",
        help="read references from a Parquet, JSON lines, CSV or TSV file with `key` and FIELD (default: reference)",
    )
    parser.add_argument("--column", metavar="NAME", help="column of text to evaluate (default: the generated one)")
    parser.add_argument(
        "--metrics",
        metavar="LIST",
        help="from chrf,bleu,rouge,cider,exact_match (the default) and wer,cer (for transcripts); the first ranks the "
        "worst samples",
    )
    parser.add_argument(
        "--retrieval",
        action="append",
        default=[],
        metavar="LEFT:RIGHT",
        help="two columns of vectors, or `all` for all pairs of one model; may be repeated",
    )
    parser.add_argument(
        "--label",
        metavar="FIELD",
        help="JSON field or column with the truth of labels, objects or segments; fits a linear classifier for it "
        "on each column of vectors",
    )
    parser.add_argument("--output", metavar="DIR", help="directory for the results (default: OUT/_mmbeam)")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Evaluate, and yield the tables."""
    from mmbeam.jobs.evaluate import EvaluateOptions, evaluate

    for name, url in (("OUT", args.run), ("`output`", args.output), ("`references`", args.references)):
        if url is not None:
            check_url(name, url)
    options = EvaluateOptions(
        run=args.run,
        reference=args.reference,
        references=args.references,
        column=args.column,
        metrics=None if args.metrics is None else tuple(args.metrics.split(",")),
        retrieval=tuple(args.retrieval),
        label=args.label,
        output=args.output,
        beam_args=args.beam_args,
    )
    with libraries_quiet(args.verbose):
        result = evaluate(options)
    yield from result_text(result)
    return 0


def result_text(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tables of an evaluation, its worst samples, and the path of the full report."""
    if result["failed_samples"]:
        yield f"warning: {result['failed_samples']:,} samples failed in the run; they have no row and are not evaluated"
    if "text" in result:
        yield from _texts(result["text"])
    if result["retrieval"]:
        yield from _retrieval(result["retrieval"])
    if result["probes"]:
        yield from _probes(result["probes"])
    for labels in result["labels"]:
        yield f"{labels['column']} against {labels['label']}: {labels['rows']:,} rows, {labels['classes']:,} classes"
        for name, score in labels.items():
            if isinstance(score, float):
                yield f"  {name:<20} {score:8.4f}"
        if labels["left_out"]:
            yield f"  {labels['left_out']:,} rows lack one of the two"
    yield f"report: {result['report']}"


def _texts(text: Mapping[str, Any]) -> Iterator[str]:
    lost = [("without_hypothesis", f"without {text['column']}"), ("without_reference", "without reference")]
    parts = [f"{text['scored']:,} scored", *(f"{text[name]:,} {label}" for name, label in lost if text[name])]
    yield f"{text['column']}: {text['rows']:,} rows = {' + '.join(parts)}; {text['references']:,} references"
    if text["unused_keys"]:
        yield f"warning: {text['unused_keys']:,} keys of the references match no row"
    if text["empty"]:
        yield f"warning: {text['empty']:,} texts are empty"
    if text["foreign"] and "rouge" in text["metrics"]:
        yield f"warning: ROUGE needs words of a-z and 0-9; the references of {text['foreign']:,} rows lack them"
    yield from (f"  {name:<12} {score:8.4f}" for name, score in text["scores"].items())
    yield f"worst by {text['metrics'][0]}:"
    for worst in text["worst"]:
        yield f"  {abs(worst['badness']):8.4f}  {worst['key']} of {worst['shard']}"
        yield f"    {text['column']}: {_short(worst['hypothesis'])}"
        yield f"    reference: {_short(worst['reference'])}"


def _short(text: str) -> str:
    """Return the text on one line, truncated to _TEXT_WIDTH characters."""
    line = " ".join(text.split())
    return line if len(line) <= _TEXT_WIDTH else f"{line[:_TEXT_WIDTH]}..."


def _retrieval(results: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'retrieval':<44} {'rows':>9}   R@1   R@5  R@10  median    MRR"
    for result in results:
        ways = ((result["left"], result["right"], "left_to_right"), (result["right"], result["left"], "right_to_left"))
        for query, answer, way in ways:
            scores = result[way]
            recalls = " ".join(f"{scores[f'recall@{cutoff}']:5.3f}" for cutoff in (1, 5, 10))
            yield (
                f"{f'{query} -> {answer}':<44} {result['rows']:>9,} {recalls} {scores['median_rank']:7,.1f} "
                f"{scores['mrr']:6.4f}"
            )
        if result["left_out"]:
            yield f"  {result['left_out']:,} rows lack one of the two"


def _probes(results: list[dict[str, Any]]) -> Iterator[str]:
    names = ("accuracy", "majority", "precision", "recall", "f1", "auc")
    header = " ".join(f"{name:>9}" for name in ("classes", "test rows", *names))
    yield f"{'probe of ' + results[0]['label']:<30} {header}"
    for result in results:
        scores = " ".join("        -" if result[name] is None else f"{result[name]:9.4f}" for name in names)
        yield f"{result['embedding']:<30} {result['classes']:>9,} {result['test_rows']:>9,} {scores}"
        if result["left_out"]:
            yield f"  {result['left_out']:,} rows lack a label or a vector"
        if not result["converged"]:
            yield "  warning: the solver reached its step limit before converging"
