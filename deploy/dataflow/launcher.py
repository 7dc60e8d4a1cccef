"""What Dataflow's template launcher runs in the image: the template's parameters as a command of mmbeam.

The launcher gives every parameter as --NAME=VALUE, and options of Beam's own beside them. One of these,
--template_location, tells mmbeam that the job is only to be described, and not waited for: Dataflow starts it.

The parameters are those of metadata.json in this file's directory: those of its group "Apache Beam" are Beam's options,
those of type BOOLEAN are flags, `command` is mmbeam's command, and the others are options of mmbeam, with - for _.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmbeam.cli import entry

METADATA = Path(__file__).with_name("metadata.json")
BEAM = "Apache Beam"


def command_line(given: Sequence[str]) -> list[str]:
    """The arguments of `mmbeam` for those of the launcher."""
    parameters = {each["name"]: each for each in json.loads(METADATA.read_text())["parameters"]}
    command = "embed"
    own: list[str] = []
    beam: list[str] = []
    for argument in given:
        name, _, value = argument.removeprefix("--").partition("=")
        parameter = parameters.get(name, {"groupName": BEAM})
        if name == "command":
            command = value
        elif parameter.get("groupName") == BEAM:
            beam.append(argument)
        else:
            own += _option(name, value, flag=parameter.get("paramType") == "BOOLEAN")
    return [command, *own, *beam]


def _option(name: str, value: str, flag: bool) -> Iterator[str]:
    spelled = f"--{name.replace('_', '-')}"
    if flag:
        yield from [spelled] if value == "true" else []
        return
    for each in value.split(",") if name == "model" else [value]:
        yield f"{spelled}={each}"


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    entry()
