"""The command `mmbeam search`."""

import argparse
import json
from collections.abc import Generator

from mmbeam.commands.common import check_url, device_argument, libraries_quiet, positive

ABOUT = "Find the rows of a run that are nearest to a text, an image, a sound or another row."
_TEXT_WIDTH = 80  # characters shown of a text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam search`."""
    parser.epilog = "Example: mmbeam search out 'a red car' --top 5"
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
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per row, with all columns but vectors"
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
    with libraries_quiet(args.verbose):
        result = search(options)
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
