"""The command `mmbeam search`."""

import argparse
import json
from collections.abc import Generator

from mmbeam.commands.common import check_url, device_argument, libraries_quiet, positive

ABOUT = "Find the rows of a run that are nearest to a text, an image, a sound or another row."
_TEXT_WIDTH = 80  # characters shown of a text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam search`."""
    parser.epilog = (
        "Examples: mmbeam search out 'a red car' --top 5; mmbeam search out --like 0-000012 --html found.html"
    )
    parser.add_argument("run", metavar="OUT", help="the --output of a job that wrote embeddings")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="search for this text")
    parser.add_argument("--image", metavar="FILE", help="search for this image")
    parser.add_argument("--audio", metavar="FILE", help="search for this sound")
    parser.add_argument("--like", metavar="KEY", help="search for the rows nearest to the row with this key")
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="column of embeddings to compare with (default: the first of image, audio and text that the model can "
        "compare with the query)",
    )
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="number of rows to show (default: 10)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object per row, with all columns but vectors")
    form.add_argument(
        "--html",
        "--output",
        metavar="FILE",
        help="write the rows as an HTML page to look at: images, sounds, texts and scores (default: print a table)",
    )
    parser.add_argument(
        "--text-prompt",
        metavar="NAME|TEXT",
        help="put this before TEXT, as embed's option does: 'query: ' for rows with 'passage: ' (default: the run's)",
    )
    device_argument(parser)


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Search, and yield the nearest rows."""
    from mmbeam.jobs.search import SearchOptions, search
    from mmbeam.report.page import check_replaceable, page_path, write_results

    for name in ("run", "image", "audio"):
        if getattr(args, name) is not None:
            check_url("OUT" if name == "run" else f"`{name}`", getattr(args, name))
    options = SearchOptions(
        run=args.run,
        text=args.text,
        image=args.image,
        audio=args.audio,
        like=args.like,
        column=args.column,
        top=args.top,
        device=args.device,
        text_prompt=args.text_prompt,
    )
    if args.html is not None:
        check_replaceable(page_path(args.html))
    with libraries_quiet(args.verbose):
        result = search(options)
    if args.html is not None:
        queries = {"": args.text, "image ": args.image, "sound ": args.audio, "rows like ": args.like}
        query = next(f"{kind}{value}" for kind, value in queries.items() if value is not None)
        path = write_results(args.run, args.html, query, result.column, result.rows, result.hits)
        yield f"{result.rows:,} rows compared by {result.column}, {len(result.hits):,} shown: {path}"
        return 0
    if args.json:
        yield from (json.dumps({"score": hit.score, **hit.row}, ensure_ascii=False) for hit in result.hits)
        return 0
    yield f"{result.rows:,} rows compared by {result.column}"
    for hit in result.hits:
        yield f"  {hit.score:7.4f}  {hit.row['key']}  {hit.row['shard']}"
        for column, value in hit.row.items():
            if isinstance(value, str) and column not in ("key", "shard", "metadata"):
                line = " ".join(value.split())
                yield f"           {column}: {line if len(line) <= _TEXT_WIDTH else line[:_TEXT_WIDTH] + '...'}"
    return 0
