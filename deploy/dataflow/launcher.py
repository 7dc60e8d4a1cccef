"""What Dataflow's template launcher runs in the image: the template's parameters as a command of mmbeam.

The launcher gives every parameter as --NAME=VALUE, and options of Beam's own beside them; others are left out. One,
--template_location, tells mmbeam that the job is only to be described, and not waited for: Dataflow starts it.

The parameters are those of metadata.json in this file's directory: those of its group "Apache Beam" are Beam's options,
those of type BOOLEAN are flags, `command` is mmbeam's command, and the others are options of mmbeam, with - for _.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmbeam.cli import entry
from mmbeam.errors import UsageError
from mmbeam.jobs.launch import pipeline_options

METADATA = Path(__file__).with_name("metadata.json")
BEAM = "Apache Beam"


def command_line(given: Sequence[str]) -> list[str]:
    """The arguments of `mmbeam` for those of the launcher."""
    parameters = {each["name"]: each for each in json.loads(METADATA.read_text())["parameters"]}
    command = next((each.partition("=")[2] for each in given if each.startswith("--command=")), "embed")
    own: list[str] = []
    beam: list[str] = []
    for argument in given:
        name, _, value = argument.removeprefix("--").partition("=")
        parameter = parameters.get(name, {"groupName": BEAM})
        if name not in parameters and not _beam_knows(argument):  # a user's parameters Dataflow has checked
            sys.stderr.write(f"left out, since Beam does not know it: --{name}\n")
        elif parameter.get("groupName") == BEAM:
            beam.append(argument)
        elif name == "model" and command == "embed":
            own += [f"--model={each}" for each in value.split(",")]
        elif name != "command":
            own += _option(name, value, flag=parameter.get("paramType") == "BOOLEAN")
    return [command, *own, *beam]


def _beam_knows(argument: str) -> bool:
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
