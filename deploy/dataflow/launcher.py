"""Run by Dataflow's template launcher in the image: turns the template's parameters into an mmbeam command.

The launcher passes every parameter as --NAME=VALUE, with options of Beam. Other options are dropped. The option
--template_location makes mmbeam describe the job without waiting for it; Dataflow then starts it.

metadata.json in this directory lists the parameters. Those of its group "Apache Beam" are Beam's options, those of type
BOOLEAN are flags, `command` is the mmbeam command, and the others are options of mmbeam, with - for _.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmbeam.cli import entry
from mmbeam.errors import UsageError
from mmbeam.jobs.options import pipeline_options

METADATA = Path(__file__).with_name("metadata.json")
BEAM = "Apache Beam"


def command_line(launcher_args: Sequence[str]) -> list[str]:
    """Return the arguments of `mmbeam` for those of the launcher."""
    parameters = {entry["name"]: entry for entry in json.loads(METADATA.read_text())["parameters"]}
    commands = (argument.partition("=")[2] for argument in launcher_args if argument.startswith("--command="))
    command = next(commands, "embed")
    options: list[str] = []
    beam: list[str] = []
    for argument in launcher_args:
        name, _, value = argument.removeprefix("--").partition("=")
        parameter = parameters.get(name, {"groupName": BEAM})
        if name not in parameters and not _is_beam_option(argument):  # Dataflow has checked the user's parameters
            sys.stderr.write(f"dropped --{name}: not an option of Beam\n")
        elif parameter.get("groupName") == BEAM:
            beam.append(argument)
        elif name == "model" and command == "embed":
            options += [f"--model={model}" for model in value.split(",")]
        elif name != "command":
            options += _option(name, value, flag=parameter.get("paramType") == "BOOLEAN")
    return [command, *options, *beam]


def _is_beam_option(argument: str) -> bool:
    try:
        pipeline_options([argument])
    except UsageError:
        return False
    return True


def _option(name: str, value: str, flag: bool) -> Iterator[str]:
    spelled = f"--{name.replace('_', '-')}"
    if not flag:
        yield f"{spelled}={value}"
    elif value == "true":
        yield spelled


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    entry()
