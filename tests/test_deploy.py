"""deploy/docker and deploy/dataflow: linters, consistency checks, and the scripts with recording stand-ins.

Building the image and running a job in it are manual: see deploy/docker/README.md.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "deploy" / "docker"
DATAFLOW = ROOT / "deploy" / "dataflow"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
SCRIPTS = [path.name for path in sorted(DATAFLOW.glob("*.sh"))]

# Replaces gcloud and docker: appends its name and arguments to a file, one JSON line per call.
STAND_IN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=calls)
"""


def tool(name: str) -> str:
    """Return the path of a linter from the test group."""
    return str(Path(sys.executable).parent / name)


# Linters


def test_the_dockerfile_passes_hadolint() -> None:
    done = subprocess.run([tool("hadolint"), "--no-color", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_pass_shellcheck(script: str) -> None:
    done = subprocess.run([tool("shellcheck"), DATAFLOW / script], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
    assert os.access(DATAFLOW / script, os.X_OK)


@pytest.mark.parametrize(
    ("name", "text"), [("hadolint", "FROM debian\nRUN cd /tmp\n"), ("shellcheck", "#!/bin/sh\nrm $1\n")]
)
def test_the_linters_report_a_fault(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    assert subprocess.run([tool(name), tmp_path / "file"], capture_output=True).returncode == 1


# The image


def stages() -> dict[str, str]:
    """Return the stages of the Dockerfile by name, with their instructions."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {name: f"FROM {base}\n{text}" for base, name, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)}


def test_the_boot_binary_has_the_pinned_version_of_beam() -> None:
    pinned = re.search(r"^apache-beam==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    image = re.search(r"^ARG BEAM_IMAGE=apache/beam_python(\S+)_sdk:(\S+)$", DOCKERFILE, re.MULTILINE)
    python = re.search(r"^ARG PYTHON_IMAGE=python:([\d.]+)-slim", DOCKERFILE, re.MULTILINE)
    launcher = re.search(r"^ARG LAUNCHER_IMAGE=.*/python(\d+)-template-launcher-base", DOCKERFILE, re.MULTILINE)
    assert pinned is not None
    assert image is not None
    assert python is not None
    assert launcher is not None
    assert image[2] == pinned[1]
    assert {image[1], python[1], f"{launcher[1][0]}.{launcher[1][1:]}"} == {"3.11"}


def test_the_extras_in_dockerfile_and_documents_exist() -> None:
    """pip only warns about an unknown extra."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [DOCKERFILE, *(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("d*/**/*.md")])]
    names = {name for text in texts for group in re.findall(r"'\.\[([\w,]+)\]'", text) for name in group.split(",")}
    assert names == {"s3", "eval", "dataflow", "diffusers", "open_clip", "timm"} == set(extras)
    assert extras["dataflow"] == ["apache-beam[gcp]"]  # the dependencies of the Dataflow runner


def test_the_default_image_is_the_harness_without_root() -> None:
    *_, last = stages()
    assert last == "worker"
    assert re.findall(r"^USER (\S+)$", stages()["worker"], re.MULTILINE) == ["10001"]
    assert stages()["worker"].startswith("FROM runtime")
    assert stages()["dataflow"].startswith("FROM runtime")
    assert "USER" not in stages()["dataflow"] + stages()["runtime"]
    assert 'ENTRYPOINT ["/opt/apache/beam/boot"]' in stages()["runtime"]
    assert DOCKERFILE.count("ENTRYPOINT") == 1
    assert "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1" in stages()["runtime"]


def test_the_launcher_is_only_in_the_image_for_dataflow() -> None:
    users = [name for name, text in stages().items() if "--from=launcher" in text]
    assert users == ["dataflow"]
    launcher = re.search(r"FLEX_TEMPLATE_PYTHON_PY_FILE=(\S+)", stages()["dataflow"])
    assert launcher is not None
    assert launcher[1] == "/opt/mmbeam/launcher.py"
    assert "COPY deploy/dataflow/launcher.py deploy/dataflow/metadata.json /opt/mmbeam/" in stages()["dataflow"]


def test_copied_files_exist_and_are_not_ignored() -> None:
    rules = [
        line for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    assert rules[0] == "*"
    let_through = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for sources in copied for source in sources.split()}
    assert sources == let_through
    assert all((ROOT / source).exists() for source in sources)
    assert any(fnmatch("mmbeam/io/__pycache__", rule.replace("**/", "*")) for rule in rules[1:] if rule[0] != "!")


@pytest.mark.parametrize("readme", [DOCKER / "README.md", DATAFLOW / "README.md"])
def test_the_readme_names_every_argument_and_file(readme: Path) -> None:
    text = readme.read_text()
    if readme.parent == DOCKER:
        names = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    else:
        names = {"launcher.py", "metadata.json", *SCRIPTS}
    assert {name for name in names if name not in text} == set()


# The scripts of Dataflow


def run(script: str, tmp_path: Path, *arguments: str, **settings: str) -> list[list[str]]:
    """Run a script and return its calls in order. Raises CalledProcessError."""
    for name in ("gcloud", "docker"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), **settings}
    subprocess.run([DATAFLOW / script, *arguments], env=environment, cwd=tmp_path, check=True, capture_output=True)
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


PLACE = {"PROJECT": "my-project", "REGION": "us-central1", "BUCKET": "my-bucket", "IMAGE": "repository/mmbeam:1"}


def flags(call: list[str]) -> dict[str, list[str]]:
    """Return the values by flag."""
    values: dict[str, list[str]] = {}
    for flag, value in pairwise(call):
        if flag.startswith("--"):
            values.setdefault(flag, []).append(value)
    return values


def test_build_makes_the_image_for_dataflow_and_pushes_it(tmp_path: Path) -> None:
    build, push = run("build.sh", tmp_path, IMAGE=PLACE["IMAGE"], MODELS="a/b@1 c/d", HF_TOKEN="secret")
    options = flags(build)
    assert build[:2] == ["docker", "build"]
    assert build[-1] == "."
    assert options["--target"] == ["dataflow"]
    assert (ROOT / options["--file"][0]).exists()
    assert options["--build-arg"] == ["DEVICE=cuda", "MODELS=a/b@1 c/d"]
    assert options["--secret"] == ["id=hf_token,env=HF_TOKEN"]
    assert "secret" not in json.dumps([build, push]).replace("--secret", "")
    assert push == ["docker", "push", PLACE["IMAGE"]]


def test_template_names_the_image_and_the_parameters(tmp_path: Path) -> None:
    (call,) = run("template.sh", tmp_path, **PLACE)
    assert call[:5] == ["gcloud", "dataflow", "flex-template", "build", "gs://my-bucket/templates/mmbeam.json"]
    assert flags(call)["--image"] == [PLACE["IMAGE"]]
    assert flags(call)["--metadata-file"] == ["deploy/dataflow/metadata.json"]


def parameters(call: list[str]) -> dict[str, str]:
    """Return the parameters of the template; the value of a flag starts with its separator."""
    pairs: dict[str, str] = {}
    for value in flags(call)["--parameters"]:
        _, separator, rest = value.split("^", 2)
        for pair in rest.split(separator):
            name, _, text = pair.partition("=")
            assert name not in pairs  # gcloud rejects a repeated parameter
            pairs[name] = text
    return pairs


METADATA = {
    parameter["name"]: parameter for parameter in json.loads((DATAFLOW / "metadata.json").read_text())["parameters"]
}


@pytest.mark.parametrize(
    ("settings", "device", "machine"),
    [
        ({}, "cuda", "g2-standard-8"),
        ({"GPU": ""}, "cpu", "n2-standard-8"),
        ({"GPU": "nvidia-tesla-t4", "MACHINE": "n1-standard-8"}, "cuda", "n1-standard-8"),
    ],
)
def test_run_passes_valid_parameters_to_the_template(
    tmp_path: Path, settings: dict[str, str], device: str, machine: str
) -> None:
    arguments = [
        "input=gs://my-bucket/{00..99}.tar::gs://b/*.tar",
        "output=gs://my-bucket/out",
        "modalities=image,text",
    ]
    (call,) = run("run.sh", tmp_path, *arguments, **PLACE, **settings)
    assert call[:4] == ["gcloud", "dataflow", "flex-template", "run"]
    assert flags(call)["--worker-machine-type"] == [machine]
    sent = parameters(call)
    assert sent["input"] == arguments[0].partition("=")[2]
    assert sent["modalities"] == "image,text"
    assert sent["device"] == device
    assert ("dataflow_service_options" in sent) == (device == "cuda")
    assert sent.keys() <= METADATA.keys()
    assert {name for name, parameter in METADATA.items() if not parameter.get("isOptional")} <= sent.keys()
    for name, value in sent.items():
        assert all(re.fullmatch(pattern, value) for pattern in METADATA[name].get("regexes", [])), (name, value)


def test_arguments_override_the_defaults_of_run(tmp_path: Path) -> None:
    arguments = {
        "device": "cpu",
        "disk_size_gb": "500",
        "element_processing_timeout_minutes": "600",
        "dataflow_service_options": "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver:5xx",
        "prompt": "<|image|> 100% of it, ^what^ is it = ?",
        "where": "image_width > 1 or text_words < 5 | 6",
    }
    (call,) = run("run.sh", tmp_path, *(f"{name}={value}" for name, value in arguments.items()), **PLACE, DISK="7")
    sent = parameters(call)
    assert {name: sent[name] for name in arguments} == arguments
    assert sent["sdk_container_image"] == PLACE["IMAGE"]


@pytest.mark.parametrize(
    ("setting", "driver"), [({}, "install-nvidia-driver"), ({"DRIVER": "5xx"}, "install-nvidia-driver:5xx")]
)
def test_run_requests_a_driver(tmp_path: Path, setting: dict[str, str], driver: str) -> None:
    (call,) = run("run.sh", tmp_path, "input=a", "output=gs://b", **PLACE, **setting)
    assert parameters(call)["dataflow_service_options"] == f"worker_accelerator=type:nvidia-l4;count:1;{driver}"


def test_run_uses_a_subnetwork_without_public_addresses(tmp_path: Path) -> None:
    more = {"SUBNETWORK": "regions/r/subnetworks/s", "SERVICE_ACCOUNT": "a@b", "WORKERS": "7", "START": "3"}
    (call,) = run("run.sh", tmp_path, "input=a", "output=gs://b", **PLACE, **more)
    assert "--disable-public-ips" in call
    assert flags(call)["--subnetwork"] == ["regions/r/subnetworks/s"]
    assert flags(call)["--service-account-email"] == ["a@b"]
    assert flags(call)["--max-workers"] == ["7"]
    assert flags(call)["--num-workers"] == ["3"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_names_missing_settings_and_calls_nothing(script: str, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(script, tmp_path)
    assert b": set " in failed.value.stderr
    assert not (tmp_path / "calls").exists()
