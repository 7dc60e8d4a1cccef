"""Dataflow by dry run: the job that a launch would send, and the template that the launcher writes.

A dry run builds the job without credentials. Beam's client writes the template to a GCS server on loopback (see
servers.py). The Dataflow service itself is not tested.
"""

import argparse
import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import pytest
import servers
import shards
from apache_beam.options.pipeline_options import DebugOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow.internal import apiclient
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from google.cloud.dataflow_v1beta3 import TemplateMetadata
from tiny_clip import save_clip
from tiny_generators import save_fusion

from mmbeam.cli import main
from mmbeam.commands import parse
from mmbeam.commands.common import LIMITS
from mmbeam.config import ModelRef
from mmbeam.errors import UsageError
from mmbeam.jobs import caption, embed
from mmbeam.jobs.caption import CaptionOptions
from mmbeam.jobs.embed import EmbedOptions
from mmbeam.jobs.execute import Job
from mmbeam.jobs.options import is_waited_for, pipeline_options
from mmbeam.prompts.ask import Decoding
from mmbeam.runs.plan import load_plan
from mmbeam.types import Input, Shard, WorkUnit

DEPLOY = Path(__file__).parents[1] / "deploy" / "dataflow"
IMAGE = "repository/mmbeam:1"
ACCELERATOR = "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"
ON_DATAFLOW = (
    "--runner=DataflowRunner",
    "--project=my-project",
    "--region=us-central1",
    "--temp_location=gs://my-bucket/temp",
    f"--sdk_container_image={IMAGE}",
    f"--dataflow_service_options={ACCELERATOR}",
)
DRY = (*ON_DATAFLOW, "--dry_run=True")
LARGE = 16_384  # bytes; the weights of a tiny model are 200 KB


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("dataflow")
    save_clip(home / "clip")
    save_fusion(home / "fusion")
    shards.make_webdataset(home / "in", shards.make_truths(6), shards=3)
    return home


def embed_job(home: Path, output: Path | str, **changes: Any) -> Job:
    options = EmbedOptions(
        input=(str(home / "in"),),
        output=str(output),
        models=(ModelRef(model=str(home / "clip")),),
        device="cuda",
        shared_output=True,
        beam_args=DRY,
    )
    return embed.prepare(replace(options, **changes))


def caption_job(home: Path, output: Path | str, **changes: Any) -> Job:
    options = CaptionOptions(
        input=(str(home / "in"),),
        output=str(output),
        model=str(home / "fusion"),
        decoding=Decoding(max_new_tokens=8),
        device="cuda",
        shared_output=True,
        beam_args=DRY,
    )
    return caption.prepare(replace(options, **changes))


JOBS = {"embed": (embed_job, "Embed0"), "caption": (caption_job, "Generate0")}


def describe(job: Job) -> Any:
    """Return the job that Beam would send to Dataflow."""
    return job.submit().job


def environment_of(job: Any) -> Any:
    """Return the environment in the request to the Dataflow service."""
    environment = apiclient.Environment(
        packages=[],
        options=job.options,
        environment_version="8",
        proto_pipeline_staged_url="gs://my-bucket/temp/pipeline.pb",
        proto_pipeline=job.proto_pipeline,
    )
    return environment.proto


# The job


@pytest.mark.parametrize("task", JOBS)
def test_the_steps_fuse_into_one_stage_in_one_environment(home: Path, tmp_path: Path, task: str) -> None:
    make, model = JOBS[task]
    proto = describe(make(home, tmp_path)).proto_pipeline
    (environment,) = proto.components.environments.values()
    assert not environment.resource_hints  # a step with hints has another environment, which breaks fusion
    payload = beam_runner_api_pb2.DockerPayload.FromString(environment.payload)
    assert payload.container_image == IMAGE
    _, stages = FnApiRunner().create_stages(proto)
    fused = [[transform.unique_name for transform in stage.transforms] for stage in stages]
    (chain,) = [names for names in fused if any("ReadShards" in name for name in names)]
    for step in ("Plan/Parse", "ReadShards/Read", f"{model}/Run", "WriteParquet/Write"):
        assert any(name.startswith(step) for name in chain), step


@pytest.mark.parametrize("task", JOBS)
def test_a_worker_has_one_process_two_threads_and_a_gpu(home: Path, tmp_path: Path, task: str) -> None:
    sent = environment_of(describe(JOBS[task][0](home, tmp_path)))
    (pool,) = sent.worker_pools
    (image,) = pool.sdk_harness_container_images
    assert (image.container_image, pool.worker_harness_container_image) == (IMAGE, IMAGE)
    assert pool.num_threads_per_worker == 2
    assert "no_use_multiple_sdk_containers" in sent.experiments
    assert "use_multiple_sdk_containers" not in sent.experiments
    assert list(sent.service_options) == [ACCELERATOR]
    assert sent.sdk_pipeline_options["options"]["save_main_session"] is False


@pytest.mark.parametrize("task", JOBS)
def test_the_job_description_is_small(home: Path, tmp_path: Path, task: str) -> None:
    job = describe(JOBS[task][0](home, tmp_path))
    proto = job.proto_pipeline
    sizes = {step.unique_name: len(step.spec.payload) for step in proto.components.transforms.values()}
    assert {name: size for name, size in sizes.items() if size > LARGE} == {}
    assert len(proto.SerializeToString()) < 8 * LARGE
    (environment,) = proto.components.environments.values()
    (artifact,) = environment.dependencies  # the list of packages that the worker logs
    sent = beam_runner_api_pb2.ArtifactFilePayload.FromString(artifact.type_payload)
    assert sent.path.endswith("submission_environment_dependencies.txt")
    assert Path(sent.path).stat().st_size < LARGE


def test_a_unit_adds_less_than_100_bytes_to_the_description(home: Path, tmp_path: Path) -> None:
    """Dataflow accepts 10 MB: 100,000 units. The etags are random, so that they do not compress."""
    job = replace(embed_job(home, tmp_path), units=tuple(map(make_unit, range(5_000))))
    assert len(describe(job).proto_pipeline.SerializeToString()) < 60_000 + 100 * 5_000


def make_unit(number: int) -> WorkUnit:
    path = f"gs://my-bucket/shards/part-{number:06d}.tar"
    etag = base64.b64encode(hashlib.md5(path.encode()).digest()).decode()
    shard = Shard(path=path, url=path, size=10**9 + 512 * (number * 7919 % 9973), etag=etag)
    return WorkUnit(
        id=f"part-{number:06d}-{hashlib.sha256(path.encode()).hexdigest()[:10]}", inputs=(Input(shard=shard),)
    )


def test_beam_options_override_the_defaults() -> None:
    args = [*ON_DATAFLOW, "--number_of_worker_harness_threads=7", "--experiments=a", "--experiments=b"]
    debug = pipeline_options(args).view_as(DebugOptions)
    assert debug.number_of_worker_harness_threads == 7
    assert set(debug.experiments) == {"a", "b", "no_use_multiple_sdk_containers"}
    several = pipeline_options([*ON_DATAFLOW, "--experiments=use_multiple_sdk_containers"]).view_as(DebugOptions)
    assert several.experiments == ["use_multiple_sdk_containers"]
    elsewhere = pipeline_options(["--runner=FlinkRunner"]).view_as(DebugOptions)
    assert elsewhere.number_of_worker_harness_threads is None


# Launches that do not wait for the job


@pytest.mark.parametrize("option", ["--template_location=gs://b/t", "--dry_run=True", "--no_wait_until_finish"])
def test_a_launch_without_waiting_has_no_report(home: Path, tmp_path: Path, option: str) -> None:
    assert not is_waited_for([*ON_DATAFLOW, option])
    assert is_waited_for(ON_DATAFLOW)
    job = embed_job(home, tmp_path, beam_args=(*ON_DATAFLOW, option))
    with pytest.raises(UsageError, match="no report to wait for"):
        job.execute()


def test_a_dry_run_describes_the_job_and_writes_nothing(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["--input", str(home / "in"), "--output", str(output), "--model", str(home / "clip"), "--device=cuda"]
    assert main(["embed", *arguments, "--shared-output", *DRY]) == 0
    shown = capsys.readouterr().out
    assert "units: 3 planned, 0 committed, 3 to do" in shown
    assert "nothing was handed over to the runner" in shown
    assert not output.exists()
    job = embed_job(home, output)
    described = describe(job).proto_pipeline
    assert not output.exists()
    embed_job(home, output, beam_args=ON_DATAFLOW)  # writes the plan
    again = describe(embed_job(home, output)).proto_pipeline
    assert len(described.SerializeToString()) == pytest.approx(len(again.SerializeToString()), rel=0.02)


def test_a_launch_without_waiting_submits_the_job_and_says_so(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Job] = []
    monkeypatch.setattr(Job, "submit", lambda job: submitted.append(job))
    arguments = ["embed", "--input", str(home / "in"), "--output", str(tmp_path), "--model", str(home / "clip")]
    assert main([*arguments, "--device=cuda", "--shared-output", *ON_DATAFLOW, "--no_wait_until_finish"]) == 0
    assert "without waiting for the end" in capsys.readouterr().out
    assert len(load_plan(submitted[0].run)) == 3


def test_a_launch_without_waiting_cannot_retry_failures(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`retry_failures` needs a launcher that waits"):
        embed_job(home, tmp_path, retry_failures=True).submit()


# The template


def metadata() -> dict[str, dict[str, Any]]:
    return {
        parameter["name"]: parameter for parameter in json.loads((DEPLOY / "metadata.json").read_text())["parameters"]
    }


def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launcher", DEPLOY / "launcher.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_metadata_match_the_schema_of_dataflow() -> None:
    """The message type of Dataflow's API rejects unknown names and values."""
    text = (DEPLOY / "metadata.json").read_text()
    parameters = TemplateMetadata.from_json(text, ignore_unknown_fields=False).parameters
    assert len({parameter.name for parameter in parameters}) == len(parameters)
    for parameter in parameters:
        assert parameter.name.isidentifier()
        assert parameter.label, parameter.name
        assert parameter.help_text, parameter.name
        assert bool(parameter.enum_options) == (parameter.param_type.name == "ENUM"), parameter.name
    with pytest.raises(Exception, match="helpTxt"):
        TemplateMetadata.from_json(text.replace("helpText", "helpTxt"), ignore_unknown_fields=False)


VALUES = {
    "input": "gs://my-bucket/shards/{000..099}.tar::gs://my-bucket/more/*.tar",
    "output": "gs://my-bucket/out",
    "model": "clip=openai/clip-vit-base-patch32@0123abc,clap=/opt/models/clap",
    "modalities": "image,text",
    "image_field": "b.jpg",
    "where": "image_width >= 64 and metadata['lang'] == 'en'",
    "image_filter": "gaussian:1.5",
    "clean_text": "nfc,lower",
    "max_failure_rate": "0.01",
    "temperature": ".7",
    "top_p": "1.0",
    "sdk_container_image": IMAGE,
    "dataflow_service_options": ACCELERATOR,
    "tokens": "true",
    "overwrite": "false",
    "moved": "gs://old=gs://new",
}


def value_of(parameter: dict[str, Any]) -> str:
    """Return a valid value of a parameter."""
    if "enumOptions" in parameter:
        return str(parameter["enumOptions"][0]["value"])
    default = {"NUMBER": "7", "BOOLEAN": "true"}.get(parameter["paramType"], "txt")
    return VALUES.get(parameter["name"], default)


@pytest.mark.parametrize("parameter", metadata().values(), ids=metadata().keys())
def test_a_parameters_pattern_matches_the_values_of_its_option(parameter: dict[str, Any]) -> None:
    for pattern in parameter.get("regexes", []):
        assert re.fullmatch(pattern, value_of(parameter))
        assert not re.fullmatch(pattern, "")


@pytest.mark.parametrize("task", ["embed", "caption"])
def test_every_parameter_is_an_option_of_mmbeam_or_of_beam(task: str) -> None:
    only = {"embed": ("modalities", "tokens", "float16"), "caption": caption_only()}
    others = only["caption" if task == "embed" else "embed"]
    options = [f"--{name}={value_of(p)}" for name, p in metadata().items() if name not in ("command", *others)]
    args = parse(launcher().command_line([f"--command={task}", *options]))
    assert args.command == task
    assert args.input == [VALUES["input"]]
    assert args.where == [VALUES["where"]]
    assert not args.overwrite
    beam = [name for name, parameter in metadata().items() if parameter.get("groupName") == "Apache Beam"]
    assert list(args.beam_args) == [f"--{name}={value_of(metadata()[name])}" for name in beam]
    pipeline_options(args.beam_args)  # raises for an option unknown to Beam
    if task == "embed":
        assert args.model == VALUES["model"].split(",")
        assert args.tokens
    else:
        assert args.top_p == 1.0


def caption_only() -> tuple[str, ...]:
    return tuple(name for name, parameter in metadata().items() if parameter.get("groupName") == "Captions")


def test_beam_options_pass_the_launcher_unchanged() -> None:
    added = ["--runner=DataflowRunner", "--template_location=gs://b/t", "--requirements_cache_only_sources"]
    assert launcher().command_line(["--input=a", *added, "--output=b"]) == ["embed", "--input=a", "--output=b", *added]


def test_the_launcher_drops_options_unknown_to_beam(capsys: pytest.CaptureFixture[str]) -> None:
    """Dataflow checks the user's parameters by the metadata; options that it adds itself must not fail the launch."""
    arguments = ["--input=a", "--some_new_option=1", "--output=b", "--num_workers=2"]
    assert launcher().command_line(arguments) == ["embed", "--input=a", "--output=b", "--num_workers=2"]
    assert capsys.readouterr().err == "dropped --some_new_option: not an option of Beam\n"


def test_only_embed_takes_several_models() -> None:
    arguments = ["--input=a", "--model=b,c", "--output=d"]
    assert launcher().command_line(arguments) == ["embed", "--input=a", "--model=b", "--model=c", "--output=d"]
    assert launcher().command_line([*arguments, "--command=caption"]) == ["caption", *arguments]


NOT_IN_THE_TEMPLATE = {
    "verbose", "help", "workers", "shared_output",  # for one machine, or a terminal
    "config", "dry_run", "bytes_column", "path_column", "url_column",  # the template has a form, and its own parameters
    "redo_changed", "retry_failures",  # hold a lock while the job runs
    "engine",  # the image has no vLLM
    "fps", "frames", "video_field",  # of videos
    "dims", "isolate_decoding", "robust", "text_prompt", "word_timestamps",  # rarely used
    *(f"max_{name}" for name in LIMITS),  # rarely changed; a template of one's own can add them
}  # fmt: skip


@pytest.mark.parametrize("command", ["embed", "caption"])
def test_every_option_is_a_parameter_of_the_template(command: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"mmbeam.commands.{command}").add_arguments(parser)
    options = {action.dest for action in parser._actions}
    assert options - metadata().keys() - NOT_IN_THE_TEMPLATE == set()


needs_gcs = pytest.mark.skipif("gcs" not in servers.STORES, reason=servers.report_header())


@needs_gcs
def test_the_launcher_writes_the_job_and_returns(home: Path, tmp_path: Path) -> None:
    """The arguments are those that Dataflow passes; the bucket is on a local GCS server."""
    bucket = servers.fresh_output("gcs", tmp_path)
    fs, path = fsspec.core.url_to_fs(f"{bucket}/in")
    fs.put(str(home / "in"), path, recursive=True)
    arguments = [f"--input={bucket}/in", f"--output={bucket}/out", f"--model={home / 'clip'}", "--device=cuda"]
    arguments += [
        "--command=embed",
        "--runner=DataflowRunner",
        "--project=my-project",
        "--region=us-central1",
        "--no_auth",
    ]
    arguments += ["--job_name=mmbeam-1", f"--staging_location={bucket}/staging", f"--temp_location={bucket}/temp"]
    arguments += [f"--template_location={bucket}/staging/template_launches/1/job_object"]
    arguments += ["--requirements_cache_only_sources", f"--sdk_container_image={IMAGE}"]
    arguments += [f"--dataflow_service_options={ACCELERATOR}"]
    done = subprocess.run(
        [sys.executable, DEPLOY / "launcher.py", *arguments],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "without waiting for the end" in done.stdout
    fs = fsspec.filesystem("gs", skip_instance_cache=True)
    job = json.loads(fs.cat_file(f"{bucket}/staging/template_launches/1/job_object"))
    assert job["name"] == "mmbeam-1"
    (pool,) = job["environment"]["workerPools"]
    assert pool["workerHarnessContainerImage"] == IMAGE
    url = job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]
    proto = beam_runner_api_pb2.Pipeline.FromString(fs.cat_file(url))
    names = {step.unique_name for step in proto.components.transforms.values()}
    assert {"ReadShards/Read", "Embed0/Run", "WriteParquet/Write"} <= names
    assert len(json.dumps(job)) < 2 * LARGE
