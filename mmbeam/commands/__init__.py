"""The commands, one module each: parsing and printing only.

To add a command, write a module with ABOUT, `add_arguments` and `run`, and add its name to COMMANDS. `run` yields the
lines to print and returns the exit status. Slow imports belong in `run`.
"""

import argparse
import importlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import NoReturn, Protocol, cast

from mmbeam.errors import UsageError, did_you_mean
from mmbeam.names import VERSION

_REPEATABLE = (
    "bytes-column",
    "input",
    "model",
    "moved",
    "path-column",
    "url-column",
    "where",
)  # options that a list in a configuration file repeats
COMMANDS = (
    "caption",
    "demo",
    "embed",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "label",
    "pack",
    "plan",
    "report",
    "rerun",
    "search",
    "status",
    "train",
)


class Command(Protocol):
    """The interface of a module of this package."""

    ABOUT: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of the command."""

    def run(self, args: argparse.Namespace) -> Generator[str, None, int]:
        """Run the command: yield the lines to print, return the exit status."""


def command(name: str) -> Command:
    """Return the module of the command `name`."""
    return cast(Command, importlib.import_module(f"{__name__}.{name}"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments. `command` is the command's name, `beam_args` are the arguments left for Apache Beam.

    Raise UsageError for invalid arguments.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["rerun"] and len(words) > 1 and not words[1].startswith("-"):
        words = command("rerun").words_of(words[1], words[2:])  # type: ignore[attr-defined]
    price, is_plan = None, words[:1] == ["plan"] and len(words) > 1 and words[1] not in ("-h", "--help")
    if is_plan:
        words, price = command("plan").words_of(words[1:])  # type: ignore[attr-defined]
    words = _with_config(words)
    args, unknown = _parser(words).parse_known_args(words)
    options = [f"--{name.replace('_', '-')}" for name in vars(args)]
    beam = _beam_names() if unknown and args.takes_beam_options else frozenset()
    for word in unknown:
        name = word.partition("=")[0]
        hint = (
            did_you_mean(name, [*options, *(f"--{option}" for option in beam if not option.endswith("Runner"))])
            if name.startswith("--")
            else ""
        )
        if not args.takes_beam_options or (hint and beam and name[2:] not in beam):
            raise UsageError(f"unknown argument {name} (see `mmbeam {args.command} --help`){hint}")
    args.beam_args = tuple(unknown)
    args.words, args.estimate, args.price_per_hour = tuple(words), is_plan, price
    if unknown:
        _check_runner(unknown, beam)
    return args


def _with_config(words: Sequence[str]) -> list[str]:
    """Return the words with `--config FILE` replaced by the options of the file that the other words do not give.

    Raises UsageError if the file is not TOML, or holds something other than options.
    """
    path = None
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if word == "--config":
            path = next(waiting, None)
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        else:
            rest.append(word)
    if path is None:
        return list(words)
    try:
        options = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: expected TOML, found an error: {error}") from error
    except OSError as error:
        raise UsageError(f"--config {path}: expected a TOML file with options: {error.strerror}") from error
    shown = {word.partition("=")[0] for word in rest}
    added: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float) for item in values):
            raise UsageError(
                f"--config {path}: {name}: expected a string, a number, true, false or a list of these, as in "
                f"`batch-size = 32`; found {type(value).__name__}"
            )
        if f"--{name}" in shown or value is False:
            continue
        if value is True:
            added.append(f"--{name}")
        elif isinstance(value, list) and name not in _REPEATABLE:
            added.append(f"--{name}={','.join(map(str, values))}")
        else:
            added += [f"--{name}={item}" for item in values]
    return [*rest[:1], *added, *rest[1:]]


def _beam_names() -> frozenset[str]:
    """Return the options and runners that occur in the source of Apache Beam's options, which is slow to import."""
    spec = importlib.util.find_spec("apache_beam")
    try:
        source = Path((spec and spec.origin) or "", "../options/pipeline_options.py").resolve().read_text()
    except OSError:
        return frozenset()
    options, runners = re.findall(r"""["']--([\w-]+)["']""", source), re.findall(r"(\w+Runner)'", source)
    return frozenset([*options, *runners])


def _check_runner(words: Sequence[str], beam: Collection[str]) -> None:
    """Raise UsageError for a --runner that Beam does not have; a dotted name is a class, which Beam imports."""
    runners = {name.lower().removesuffix("runner"): name for name in beam if name.endswith("Runner")}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        name = value if equals else after
        if option == "--runner" and runners and "." not in name and name.lower().removesuffix("runner") not in runners:
            expected = ", ".join(sorted(runners.values()))
            hint = did_you_mean(name, runners.values())
            raise UsageError(f"--runner {name}: expected one of {expected}, or the dotted name of a class{hint}")


class _Parser(argparse.ArgumentParser):
    """Reports invalid arguments in one line, as UsageError."""

    words: Sequence[str] = ()  # of the command line

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        hint = "" if choice is None else did_you_mean(choice[1], re.findall(r"'([^']+)'", choice[2]))
        required = message.partition("are required: ")[2].split(", ")
        misspelt = [word for word in self.words if word.startswith("--") and word.partition("=")[0] not in required]
        for word in misspelt if required != [""] else ():
            hint = hint or did_you_mean(word.partition("=")[0], required, cutoff=0.8).replace(
                "did you", f"for {word}, did you"
            )
        raise UsageError(f"{message} (see `{self.prog} --help`){hint}")


def _parser(words: Sequence[str]) -> _Parser:
    _Parser.words = words
    parser = _Parser(
        prog="mmbeam",
        description="Embeddings and captions for buckets of image-text-audio shards.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mmbeam {VERSION}")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = command(name)
        subparser = commands.add_parser(name, help=module.ABOUT, description=module.ABOUT, allow_abbrev=False)
        subparser.add_argument("--verbose", action="store_true", help="show logs of libraries and tracebacks")
        subparser.set_defaults(takes_beam_options=False)
        module.add_arguments(subparser)
    return parser
