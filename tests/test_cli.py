"""The command line: its output on both streams, its exit status, and the files it leaves."""

import argparse
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow.dataset as ds
import pytest
import shards
import torch

from mmbeam import __version__
from mmbeam.cli import _with_options, main
from mmbeam.commands import parse
from mmbeam.commands.common import LIMITS, limits_of
from mmbeam.config import Limits
from mmbeam.corpus.write import write_corpus
from mmbeam.process import progress


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    shards.make_webdataset(directory, shards.make_truths(6))
    return directory


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Restore what main sets for its process: the level of the logger, and the progress."""
    logger = logging.getLogger("mmbeam")
    level = logger.level
    yield
    logger.setLevel(level)
    progress.start(0)


class Result(NamedTuple):
    status: int
    out: str
    err: str


Mmbeam = Callable[..., Result]


@pytest.fixture
def mmbeam(capfd: pytest.CaptureFixture[str]) -> Mmbeam:
    """Run the command line in this process and capture both file descriptors."""

    def call(*args: str | Path) -> Result:
        status = main([str(arg) for arg in args])
        return Result(status, *capfd.readouterr())

    return call


@pytest.fixture
def embed(mmbeam: Mmbeam, good: Path, clip: Path, tmp_path: Path) -> Mmbeam:
    """`mmbeam embed` of good shards with a good model; arguments of the call replace these options."""
    options = {"--input": str(good), "--model": str(clip), "--output": str(tmp_path / "out"), "--device": "cpu"}

    def call(*args: str | Path) -> Result:
        arguments = [str(arg) for arg in args]
        rest = [word for name, value in options.items() if name not in arguments for word in (name, value)]
        return mmbeam("embed", *arguments, *rest)

    return call


def test_limits_are_options_with_units() -> None:
    """Each limit has an option, and its help states the default."""
    assert list(LIMITS) == [field.name for field in fields(Limits)]
    words = ["--max-member-bytes", "1.5GiB", "--max-pixels=200M", "--max-text-chars", "5k", "--max-decode-bytes", "2GB"]
    for command in ("embed", "caption", "train"):
        args = parse([command, "--input", "x", "--output", "y", *words, "--max-seconds", "0.5", "--max-channels", "2"])
        assert limits_of(args) == Limits(
            member_bytes=3 << 29,
            pixels=200_000_000,
            text_chars=5000,
            decode_bytes=2_000_000_000,
            seconds=0.5,
            channels=2,
        )
        plain = parse([command, "--input", "x", "--output", "y"])
        assert (limits_of(plain), plain.isolate_decoding) == (Limits(), False)


def check_error(result: Result, status: int, *words: str) -> None:
    """Check for one message on stderr with all `words`, no traceback, and nothing on stdout."""
    assert result.status == status, result
    assert result.out == ""
    assert result.err.startswith("mmbeam: ")
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


# Successful runs


def test_a_successful_run_prints_its_summary_on_stdout_and_nothing_on_stderr(embed: Mmbeam, tmp_path: Path) -> None:
    result = embed()
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(
        "units: 2 written\nsamples: 6 = 6 rows\noutputs: 6 image_embedding, 6 text_embedding\n"
    )
    assert result.out.endswith(f"rows: {tmp_path}/out/data/\n")
    assert ds.dataset(tmp_path / "out" / "data").count_rows() == 6
    again = embed()
    assert (again.status, again.err) == (0, "")
    assert again.out.startswith("units: 0 written, 2 committed by an earlier run\nsamples: 6 = 6 rows")


def test_every_option_reaches_the_job(embed: Mmbeam, clip: Path, clap: Path, tmp_path: Path) -> None:
    models = ["--model", f"clip={clip}", "--model", f"clap={clap}", "--modalities", "image,audio"]
    fields = ["--image-field", "jpg", "--audio-field", "wav", "--text-field", "txt", "--metadata-field", "json"]
    cleaning = ["--clean-text", "nfc,lower", "--where", "image_width >= 1", "--image-filter", "median:3", "--draft"]
    running = ["--dtype", "bfloat16", "--batch-size", "2", "--limit", "5", "--max-failure-rate", "0.5", "--tokens"]
    result = embed(*models, *fields, *cleaning, *running, "--float16", "--direct_num_workers=1")
    assert result.status == 0, result
    manifest = json.loads((tmp_path / "out" / "_mmbeam" / "run.json").read_text())
    configuration, recorded = manifest["configuration"], manifest["recorded"]
    assert configuration["modalities"] == {"clip": ["image"], "clap": ["audio"]}
    assert (configuration["dtype"], configuration["limit"], configuration["tokens"]) == ("bfloat16", 5, True)
    assert configuration["vector_type"] == "float16"
    reading = configuration["reading"]
    assert reading["fields"] == {"image": "jpg", "audio": "wav", "text": "txt", "metadata": "json"}
    cleaned = {"text": ["nfc", "lower"], "where": ["image_width >= 1"], "image_filter": "median:3"}
    assert reading["cleaning"] == cleaned
    assert reading["draft"] is True
    assert (recorded["batch_size"], recorded["beam_args"]) == (2, ["--direct_num_workers=1"])


def test_a_shard_without_kept_samples_has_an_empty_file(embed: Mmbeam, tmp_path: Path) -> None:
    result = embed("--where", "image_width >= 1000")
    assert (result.status, result.err) == (0, "")
    assert "samples: 6 = 0 rows + 6 skipped (image_width >= 1000)\n" in result.out
    assert "warning: --where 'image_width >= 1000' kept none of the 6 samples" in result.out
    data = ds.dataset(tmp_path / "out" / "data")
    assert (len(data.files), data.count_rows(), "image_embedding" in data.schema.names) == (2, 0, True)


def test_a_corrupt_image_fails_one_sample_and_not_the_job(embed: Mmbeam, tmp_path: Path) -> None:
    truths = shards.make_truths(5)
    truths[2] = replace(truths[2], members={"jpg": b"not an image", "txt": b"text"})
    shards.make_webdataset(tmp_path / "in", truths, shards=1)
    result = embed("--input", tmp_path / "in")
    assert (result.status, result.err) == (0, "")
    assert "samples: 5 = 5 rows; 1 rows lack some of their outputs\n" in result.out
    assert f"failures: 1 decode: DecodeError, for example 000002 of {tmp_path}/in/shard-000000.tar: " in result.out
    assert f"failure records: {tmp_path}/out/_failures/\n" in result.out
    records = ds.dataset(tmp_path / "out" / "_failures").to_table().to_pylist()
    assert [(record["key"], record["modality"]) for record in records] == [("000002", "image")]


def test_a_shard_that_is_not_a_tar_file_fails_only_its_unit(embed: Mmbeam, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "in")
    (tmp_path / "in" / "bad.tar").write_bytes(b"no tar at all" * 100)
    result = embed("--input", tmp_path / "in")
    assert (result.status, result.err) == (3, "")
    assert "units: 2 written, 1 FAILED\n" in result.out
    assert "bad.tar: not a tar file" in result.out
    assert "Run the same command again" in result.out
    assert ds.dataset(tmp_path / "out" / "data").count_rows() == 6


def test_too_many_failures_stop_the_job_in_one_line(embed: Mmbeam, mmbeam: Mmbeam, tmp_path: Path) -> None:
    """Beam prints a traceback of ninety lines without logging; it must be suppressed."""
    truths = [replace(truth, members={"jpg": b"none"}) for truth in shards.make_truths(120)]
    shards.make_webdataset(tmp_path / "in", truths, shards=1)
    result = embed("--input", tmp_path / "in")
    check_error(result, 1, "120 of 120 samples lost outputs", "--max-failure-rate")
    assert result.err.count("\n") == 1
    assert "STOPPED: 120 of 120 samples" in mmbeam("status", tmp_path / "out").out


def test_a_run_without_any_output_of_a_modality_ends_with_a_warning(embed: Mmbeam, tmp_path: Path) -> None:
    truths = [replace(truth, members={"txt": b"text alone"}) for truth in shards.make_truths(4)]
    shards.make_webdataset(tmp_path / "in", truths)
    result = embed("--input", tmp_path / "in", "--limit", "3")
    assert (result.status, result.err) == (0, "")
    assert "\nwarning: image_embedding is null in all 3 rows: none of the 3 samples has image\n" in result.out
    assert "\nwarning: --limit 3: only the first 3 samples were read. Without it, all are\n" in result.out
    whole = embed("--input", tmp_path / "in")  # it grows out of the limit
    assert "samples: 4 = 4 rows" in whole.out, whole


def test_a_run_whose_samples_all_fail_ends_with_status_3(embed: Mmbeam, tmp_path: Path) -> None:
    truths = [replace(truth, members={"jpg": b"\xff\xd8 no image"}) for truth in shards.make_truths(3)]
    shards.make_webdataset(tmp_path / "in", truths)
    result = embed("--input", tmp_path / "in", "--modalities", "image")
    assert (result.status, "samples: 3 = 0 rows + 3 failed" in result.out) == (3, True)


def test_the_shipped_model_on_other_samples_than_the_demos_is_a_warning(
    mmbeam: Mmbeam, good: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["caption", "--input", good, "--limit", "2", "--device", "cpu"]
    silent = mmbeam(*arguments, "--model", "shipped", "--output", tmp_path / "silent")
    assert (silent.status, silent.err, "warning: without --model" in silent.out) == (0, "", False)
    result = mmbeam(*arguments, "--output", tmp_path / "out")
    for text in (caplog.text, result.out):  # at the start, and after the summary
        assert "without --model the model that ships with mmbeam is used" in text
        assert f"mmbeam caption --model Salesforce/blip-image-captioning-base --input {good} --output OTHER_DIR" in text
    write_corpus(tmp_path / "demo", samples=4, shards=1)
    demo = mmbeam("caption", "--input", tmp_path / "demo", "--device", "cpu", "--output", tmp_path / "captions")
    assert (demo.status, demo.err, "warning" in demo.out) == (0, "", False)
    assert caplog.text.count("without --model") == 1


def test_a_corpus_that_has_moved(embed: Mmbeam, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "before")
    assert embed("--input", tmp_path / "before").status == 0
    (tmp_path / "before").rename(tmp_path / "after")
    moved = f"{tmp_path}/before={tmp_path}/after"
    check_error(embed("--input", tmp_path / "after"), 1, "2 of its 2 shards are not among", f"pass --moved {moved};")
    result = embed("--input", tmp_path / "after", "--moved", moved)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("units: 0 written, 2 committed by an earlier run\nsamples: 6 = 6 rows")


def test_without_a_locale_of_utf8_the_error_says_so_and_output_is_escaped(tmp_path: Path) -> None:
    shards.make_webdataset(tmp_path / "größe", shards.make_truths(1), shards=1)
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "mmbeam", "inspect", "größe"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert (
        b"gr\\udcc3\\udcb6\\udcc3\\udc9fe/shard-000000.tar': expected a locale with UTF-8, found ascii" in done.stderr
    )
    assert b"set LC_ALL=C.UTF-8 or PYTHONUTF8=1\n" in done.stderr


# Errors before anything is written


def test_no_shard_matches(embed: Mmbeam, tmp_path: Path) -> None:
    pattern = tmp_path / "none-*.tar"
    check_error(embed("--input", pattern), 1, "no shard matches --input", f"{pattern}: no match")
    assert not (tmp_path / "out").exists()


def test_the_only_shard_is_not_a_tar_file(embed: Mmbeam, tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    check_error(embed("--input", tmp_path / "bad.tar"), 1, "bad.tar: not a tar file")
    assert not (tmp_path / "out").exists()


def spoil_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def spoil_pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def spoil_family(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "perceivers"}))


def spoil_processor(model: Path) -> None:
    (model / "preprocessor_config.json").unlink()


def spoil_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def spoil_config(model: Path) -> None:
    (model / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_weights, ["has no model.safetensors"]),
        (spoil_pickled, ["has no model.safetensors", "pickled weights", "never loaded"]),
        (spoil_family, ["unsupported model_type 'perceivers' for embedding"]),
        (spoil_processor, ["preprocessor_config.json"]),
        (spoil_tokenizer, ["tokenizer"]),
        (spoil_config, ["config.json: cannot be read as JSON"]),
    ],
)
def test_a_model_directory_that_cannot_be_used(
    spoil: Callable[[Path], None], words: list[str], embed: Mmbeam, clip: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(clip, tmp_path / "model")
    spoil(model)
    check_error(embed("--model", model), 1, str(model), *words)
    assert not (tmp_path / "out").exists()


def test_a_requested_modality_missing_from_all_shards(embed: Mmbeam, clap: Path, tmp_path: Path) -> None:
    truths = [replace(truth, members={"txt": b"text alone"}) for truth in shards.make_truths(3)]
    shards.make_webdataset(tmp_path / "in", truths)
    result = embed("--input", tmp_path / "in", "--model", clap, "--modalities", "audio")
    check_error(result, 1, "expected audio in the first samples", "found text", "--audio-field")
    check_error(embed("--modalities", "audio"), 2, "encodes none of these")
    assert not (tmp_path / "out").exists()


def test_an_output_of_another_configuration_is_an_error_that_names_the_difference(
    embed: Mmbeam, tmp_path: Path
) -> None:
    assert embed().status == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    result = embed("--modalities", "image", "--where", "image_width >= 8")
    check_error(result, 1, "--modalities: image, text -> image\n", "--where: none -> image_width >= 8\n", "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_an_output_that_cannot_be_written(embed: Mmbeam, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    check_error(
        embed("--output", tmp_path / "file" / "out"),
        2,
        f"--output {tmp_path}/file/out: expected a directory, found a file",
    )
    check_error(embed("--output", "/proc/out"), 1, "/proc/out", "No such file")
    check_error(embed("--output", "nowhere://out"), 2, "--output nowhere://out: Protocol not known")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_an_error(embed: Mmbeam, tmp_path: Path) -> None:
    check_error(embed("--device", "cuda"), 1, "--device cuda: this machine has 0 CUDA devices", "--device cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--bogus"], ["unknown argument --bogus"]),
        (["--direct_num_workers=many"], ["--direct_num_workers", "invalid int value: 'many'"]),
        (["--limit", "0"], ["--limit: expected a whole number of at least 1, found '0'", "mmbeam embed --help"]),
        (["--limit", "1e3"], ["--limit: expected a whole number of at least 1, found '1e3'"]),
        (["--batch-size", "-1"], ["--batch-size"]),
        (["--max-failure-rate", "5"], ["--max-failure-rate: expected a number from 0 to 1, found '5'"]),
        (["--max-failure-rate", "nan"], ["expected a number from 0 to 1, found 'nan'"]),
        (["--device", "tpu"], ["--device: expected auto, cpu, cuda or cuda:N, found 'tpu'"]),
        (["--dtype", "int8"], ["--dtype: invalid choice: 'int8'"]),
        (["--modalities", "image,smell"], ["unknown modality 'smell'; expected image, audio, text"]),
        (["--where", "image_width >="], ["where", "invalid syntax"]),
        (["--where", "__import__('os')"], ["where"]),
        (["--clean-text", "wash"], ["unknown text cleaning step 'wash'", "nfc"]),
        (["--image-filter", "median:2"], ["median:2", "odd"]),
        (["--model", "no-name!=x"], ["--model no-name!=x: 'no-name!' cannot prefix a column"]),
        (
            ["--runner=DataflowRunner", "--sdk_container_image=i", "--shared-output", "--device", "auto"],
            ["--device auto", "the workers are on other machines"],
        ),
    ],
)
def test_invalid_arguments(args: list[str], words: list[str], embed: Mmbeam, tmp_path: Path) -> None:
    check_error(embed(*args), 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["embed"], "--input, --output"),
        (["inspect"], "SHARDS"),
        (["inspect", "x.tar", "--bogus"], "unknown argument --bogus"),
        (["status"], "OUT"),
        (["status", "nowhere://out"], "Protocol not known"),
        (["--verb"], "COMMAND"),  # options are not abbreviated
    ],
)
def test_invalid_commands(args: list[str], word: str, mmbeam: Mmbeam) -> None:
    result = mmbeam(*args)
    check_error(result, 2, word)
    assert result.err.count("\n") == 1


# Other output


def test_verbose_shows_the_traceback(embed: Mmbeam, tmp_path: Path) -> None:
    result = embed("--verbose", "--input", tmp_path / "none-*.tar")
    assert result.status == 1
    assert result.err.startswith("Traceback")
    assert "\nmmbeam: no shard matches --input" in result.err


def test_an_unexpected_error_is_one_line(embed: Mmbeam) -> None:
    check_error(embed("--runner=nowhere.NoSuchRunner", "--shared-output"), 1, "No module named 'nowhere'")


def test_status_and_inspect(embed: Mmbeam, mmbeam: Mmbeam, good: Path, tmp_path: Path) -> None:
    check_error(mmbeam("status", tmp_path), 1, f"{tmp_path}: not the output of an mmbeam job")
    assert embed("--limit", "4").status == 0
    result = mmbeam("status", tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    assert "units: 1 planned, 1 committed\nsamples: 4 = 4 rows\n" in result.out
    result = mmbeam("inspect", good)
    assert (result.status, result.err) == (0, "")
    assert "modalities: audio, image, text" in result.out
    check_error(mmbeam("inspect", tmp_path / "none"), 1, "does not exist")


def test_errors_name_options_for_arguments() -> None:
    args = argparse.Namespace(batch_size=0, model=None)
    message = "`batch_size` 0: expected at least 1; see `models`, `caption` and `mmbeam embed --help`"
    expected = "--batch-size 0: expected at least 1; see --model, `caption` and `mmbeam embed --help`"
    assert _with_options(message, args) == expected


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"mmbeam {__version__}\n")


@pytest.mark.parametrize("command", [[], ["demo"], ["embed"], ["inspect"], ["status"]])
def test_help_names_every_argument(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {' '.join(['mmbeam', *command])}")


def test_help_imports_no_slow_package() -> None:
    code = "import sys; from mmbeam.cli import main\ntry: main(['embed', '--help'])\nexcept SystemExit: pass\n"
    code += (
        "print([name for name in ('torch', 'transformers', 'apache_beam', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(
    ("number", "word"),
    [pytest.param(signal.SIGINT, "interrupted", marks=pytest.mark.torture), (signal.SIGTERM, "terminated")],
)
def test_a_signal_ends_the_process_and_the_same_command_resumes(
    number: signal.Signals, word: str, mmbeam: Mmbeam, clip: Path, tmp_path: Path
) -> None:
    """A real signal to a real process with stderr on a terminal, while two units are being processed."""
    shards.make_webdataset(tmp_path / "in", shards.make_truths(120), shards=60)
    args = ["embed", "--input", tmp_path / "in", "--model", clip, "--output", tmp_path / "out", "--device", "cpu"]
    data, (master, slave) = tmp_path / "out" / "data", os.openpty()
    with subprocess.Popen([sys.executable, "-m", "mmbeam", *args], stdout=subprocess.PIPE, stderr=slave) as process:
        os.close(slave)
        while len(list(data.glob("*.parquet"))) < 2:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait(timeout=5) == 128 + number
        assert process.stdout is not None
        assert process.stdout.read() == b""
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "\r\x1b[Kstarting" in shown
    assert shown.endswith(f"\r\x1b[Kmmbeam: {word}. Run the same command again to resume\r\n")
    assert shown.count(word) == 1
    assert "Traceback" not in shown
    committed = len(list(data.glob("*.parquet")))
    assert 2 <= committed < 60
    before = signal.getsignal(number)
    result = mmbeam(*args)
    assert (result.status, "mmbeam" in result.err) == (0, False)  # a slow machine shows progress
    assert (
        f"units: {60 - committed} written, {committed} committed by an earlier run\nsamples: 120 = 120 rows\n"
        in result.out
    )
    assert signal.getsignal(number) is before


def test_a_closed_stdout_is_not_an_error(good: Path) -> None:
    command = [sys.executable, "-m", "mmbeam", "inspect", str(good)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 1


# Configuration files, dry runs, plans and repeated commands


@pytest.fixture
def config(good: Path, clip: Path, tmp_path: Path) -> Path:
    """A configuration file for `mmbeam embed`."""
    path = tmp_path / "job.toml"
    options = {"input": [str(good)], "model": str(clip), "output": str(tmp_path / "out"), "device": "cpu"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    path.write_text("\n".join([*lines, 'modalities = ["image", "text"]', "batch-size = 3", "overwrite = false"]))
    return path


def test_a_configuration_file_holds_options_and_the_command_line_wins(
    mmbeam: Mmbeam, config: Path, tmp_path: Path
) -> None:
    with config.open("a") as file:
        file.write('\nwhere = ["image_width >= 1", "image_height >= 1"]\ndraft = true\nlimit = 4\n')
    result = mmbeam("embed", "--config", config, "--limit", "2")
    assert result.status == 0, result.err
    manifest = json.loads((tmp_path / "out" / "_mmbeam" / "run.json").read_text())
    configuration = manifest["configuration"]
    assert (configuration["limit"], configuration["reading"]["draft"]) == (2, True)
    assert configuration["reading"]["cleaning"]["where"] == ["image_width >= 1", "image_height >= 1"]
    assert configuration["modalities"] == {"model": ["image", "text"]}
    assert manifest["recorded"]["batch_size"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("input = ", "expected TOML, found an error: Invalid value (at end of document)"),
        ("[table]\na = 1", "table: expected a string, a number, true, false or a list of these"),
        ("inptu = 'x'", "unknown argument --inptu (see `mmbeam embed --help`); did you mean --input?"),
        ("batch-size = 'many'", "argument --batch-size: expected a whole number of at least 1, found 'many'"),
    ],
)
def test_a_wrong_configuration_file_is_reported(content: str, message: str, mmbeam: Mmbeam, tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(content)
    result = mmbeam("embed", "--config", tmp_path / "job.toml", "--input", "x", "--output", "y")
    assert (result.status, result.out) == (2, "")
    assert message in result.err


def test_an_absent_configuration_file_is_named(mmbeam: Mmbeam) -> None:
    result = mmbeam("embed", "--config", "/nowhere.toml")
    assert result.status == 2
    assert "--config /nowhere.toml: expected a TOML file with options: No such file or directory" in result.err


@pytest.mark.parametrize("option", ["--limit=3", "--overwrite", "--retry-failures", "--workers=2"])
def test_a_dry_run_writes_nothing(option: str, mmbeam: Mmbeam, config: Path, tmp_path: Path) -> None:
    fresh = mmbeam("embed", "--config", config, "--dry-run", option)
    assert (fresh.status, fresh.err) == (0, "")
    units = 1 if "limit" in option else 2
    assert f"units: {units} planned, 0 committed, {units} to do" in fresh.out
    assert not (tmp_path / "out").exists()
    assert mmbeam("embed", "--config", config).status == 0
    before = files(tmp_path / "out")
    again = mmbeam("embed", "--config", config, "--dry-run", option)
    if "limit" in option:
        assert again.status == 1
        assert "`limit`: not set -> 3" in again.err.replace("--limit", "`limit`")
    else:
        done = 0 if option == "--overwrite" else 2
        assert f"units: 2 planned, {done} committed, {2 - done} to do" in again.out
    assert files(tmp_path / "out") == before


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_plan_estimates_and_writes_nothing(mmbeam: Mmbeam, config: Path, tmp_path: Path) -> None:
    result = mmbeam("plan", "embed", "--config", config, "--price-per-hour", "3.6")
    assert (result.status, result.err) == (0, "")
    assert re.search(r"^measured on 3 samples: [\d,]+ samples/s read, [\d,]+ samples/s in the model$", result.out, re.M)
    (count,) = re.findall(r"^samples: about (\d+), of which 100% become rows$", result.out, re.M)
    assert 5 <= int(count) <= 8
    assert re.search(r"^time: about \d+s, limited by (the model|reading and decoding), on 1 device$", result.out, re.M)
    assert re.search(r"^cost: about 0\.\d\d, at 3\.6 per hour$", result.out, re.M)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("embedd",), "JOB: expected caption, embed, generate, label, found embedd; did you mean embed?"),
        (("embed", "--price-per-hour", "x"), "argument --price-per-hour: invalid float value: 'x'"),
    ],
)
def test_a_wrong_plan_is_reported(words: tuple[str, ...], message: str, mmbeam: Mmbeam) -> None:
    result = mmbeam("plan", *words)
    assert (result.status, result.out) == (2, "")
    assert message in result.err


def test_rerun_repeats_the_command_of_a_run(
    mmbeam: Mmbeam, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mmbeam("embed", "--config", "job.toml", "--output", "out", "--overwrite").status == 0
    (part, _) = (tmp_path / "out" / "data").glob("*.parquet")
    part.unlink()
    monkeypatch.chdir("/")
    result = mmbeam("rerun", tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    assert "units: 1 written, 1 committed by an earlier run" in result.out
    assert "0 to do" in mmbeam("rerun", tmp_path / "out", "--dry-run").out


def test_a_run_that_cannot_be_repeated_says_why(mmbeam: Mmbeam, config: Path, tmp_path: Path) -> None:
    assert mmbeam("embed", "--config", config).status == 0
    path = tmp_path / "out" / "_mmbeam" / "run.json"
    manifest = json.loads(path.read_text())
    words = manifest["recorded"]["command"]
    for command, message in (
        (words | {"is_whole": False}, "the command held a secret"),
        (words | {"directory": "/nowhere"}, "the command ran in /nowhere, which does not exist here"),
        (None, "expected the command of the run in run.json, found none"),
    ):
        path.write_text(json.dumps({**manifest, "recorded": {**manifest["recorded"], "command": command}}))
        result = mmbeam("rerun", tmp_path / "out")
        assert (result.status, result.out) == (2, "")
        assert message in result.err
