"""Convert the parameters of the Dataflow template into an mmbeam command. Dataflow's launcher runs this in the image.

The launcher passes every parameter as --NAME=VALUE, and adds options of Beam. Any other option is dropped. With
--template_location, mmbeam writes the job's description and exits; Dataflow then starts the job.

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
    """Return the arguments of `mmbeam` for the arguments of the launcher."""
    parameters = {entry["name"]: entry for entry in json.loads(METADATA.read_text())["parameters"]}
    commands = (argument.partition("=")[2] for argument in launcher_args if argument.startswith("--command="))
    command = next(commands, "embed")
    options: list[str] = []
    beam: list[str] = []
    for argument in launcher_args:
        name, _, value = argument.removeprefix("--").partition("=")
        parameter = parameters.get(name, {"groupName": BEAM})
        if name not in parameters and not _is_beam_option(argument):  # the user's are all known to Dataflow
            sys.stderr.write(f"dropped --{name}: not an option of Beam\n")
        elif parameter.get("groupName") == BEAM:
            beam.append(argument)
        elif name == "model" and command == "embed":
            options += [f"--model={model}" for model in value.split(",")]
        elif name != "command":
            options += _option(name, value, is_flag=parameter.get("paramType") == "BOOLEAN")
    return [command, *options, *beam]


def _is_beam_option(argument: str) -> bool:
    try:
        pipeline_options([argument])
    except UsageError:
        return False
    return True


def _option(name: str, value: str, is_flag: bool) -> Iterator[str]:
    option = f"--{name.replace('_', '-')}"
    if not is_flag:
        yield f"{option}={value}"
    elif value == "true":
        yield option


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    entry()
