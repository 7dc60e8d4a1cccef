"""What the command line says about each mistake: one message that names what was expected, where, and what to do."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import shards
from outputs import make_run, make_unit, write_unit

from mmbeam.cli import main
from mmbeam.commands import COMMANDS
from mmbeam.runs.run import open_run

EMBED = "embed --input {tmp}/tars --output {tmp}/new"
CAPTION = "caption --input {tmp}/tars --output {tmp}/new"
LABEL = "label --input {tmp}/tars --output {tmp}/new --model shipped"
TRAIN = "train --input {tmp}/tars --output {tmp}/new"
# The arguments, the exit status, and the beginning of the message, in which * stands for any text.
MISTAKES = [
    # Commands and options
    ("embd", 2, "argument COMMAND: invalid choice: 'embd'*did you mean embed?"),
    ("captoin", 2, "*did you mean caption?"),
    ("statsu {tmp}/run", 2, "*did you mean status?"),
    ("embed", 2, "the following arguments are required: --input, --output (see `mmbeam embed --help`)"),
    ("embed --input {tmp}/tars --ouput {tmp}/new", 2, "*required: --output*for --ouput, did you mean --output?"),
    ("embed --inptu {tmp}/tars --output {tmp}/new", 2, "*for --inptu, did you mean --input?"),
    (EMBED + " --modle x", 2, "unknown argument --modle (see `mmbeam embed --help`); did you mean --model?"),
    (EMBED + " --batchsize 3", 2, "unknown argument --batchsize*did you mean --batch-size?"),
    (EMBED + " --batch_size=3", 2, "unknown argument --batch_size *did you mean --batch-size?"),
    (EMBED + " --image-feild jpg", 2, "*did you mean --image-field?"),
    (EMBED + " --direct_num_worker 2", 2, "*did you mean --direct_num_workers?"),
    (CAPTION + " --max-new-token 3", 2, "*did you mean --max-new-tokens?"),
    ("inspect {tmp}/tars --image-feild jpg", 2, "unknown argument --image-feild*did you mean --image-field?"),
    ("status {tmp}/run --verbos", 2, "unknown argument --verbos (see `mmbeam status --help`); did you mean --verbose?"),
    ("status", 2, "the following arguments are required: OUT"),
    ("inspect", 2, "the following arguments are required: SHARDS"),
    ("search {tmp}/run --top 0 red", 2, "argument --top: expected a whole number of at least 1, found '0'"),
    # Values
    (EMBED + " --dtype flaot32", 2, "argument --dtype: invalid choice: 'flaot32'*did you mean float32?"),
    (EMBED + " --device gpu", 2, "argument --device: expected auto, cpu, cuda or cuda:N, found 'gpu'"),
    (EMBED + " --device cuda:x", 2, "argument --device: expected auto, cpu, cuda or cuda:N, found 'cuda:x'"),
    (EMBED + " --batch-size 0", 2, "argument --batch-size: expected a whole number of at least 1, found '0'"),
    (EMBED + " --batch-size big", 2, "argument --batch-size: expected a whole number of at least 1, found 'big'"),
    (EMBED + " --limit 1e3", 2, "argument --limit: expected a whole number of at least 1, found '1e3'"),
    (EMBED + " --limit -5", 2, "argument --limit: expected a whole number of at least 1, found '-5'"),
    (EMBED + " --workers none", 2, "argument --workers: expected a whole number of at least 1, found 'none'"),
    (EMBED + " --max-failure-rate 5", 2, "argument --max-failure-rate: expected a number from 0 to 1, found '5'"),
    (EMBED + " --max-failure-rate x", 2, "argument --max-failure-rate: expected a number from 0 to 1, found 'x'"),
    (EMBED + " --modalities imgae", 2, "--modalities imgae: unknown modality 'imgae'; expected *did you mean image?"),
    (EMBED + " --modalities image,", 2, "--modalities image,: unknown modality ''; expected image, audio, text"),
    (EMBED + " --clean-text nfcc", 2, "unknown text cleaning step 'nfcc'; the steps are *did you mean nfc?"),
    (EMBED + " --image-filter median:2", 2, "*median:2*odd"),
    (EMBED + " --image-filter sharpen", 2, "*sharpen"),
    (EMBED + " --model a-b=x", 2, "--model a-b=x: 'a-b' cannot prefix a column; use letters, digits and _"),
    (CAPTION + " --task transcirbe", 2, "argument --task: invalid choice: 'transcirbe'*did you mean transcribe?"),
    (CAPTION + " --engine vlm", 2, "argument --engine: invalid choice: 'vlm'*did you mean vllm?"),
    (CAPTION + " --top-p 2 --temperature 1", 2, "argument --top-p: expected a number from 0 to 1, found '2'"),
    (CAPTION + " --top-p 0.5", 2, "--top-p needs sampling: pass --temperature too"),
    (CAPTION + " --seed 1", 2, "--seed needs sampling: pass --temperature too"),
    (CAPTION + " --num-beams 0", 2, "argument --num-beams: expected a whole number of at least 1, found '0'"),
    (EMBED + " --max-pixels many", 2, "argument --max-pixels: expected a positive number such as 100, 100M or 256MiB"),
    (EMBED + " --max-member-bytes 0MiB", 2, "argument --max-member-bytes: expected a positive number *found '0MiB'"),
    (EMBED + " --max-member-bytes -1", 2, "argument --max-member-bytes: expected *"),
    (EMBED + " --max-seconds inf", 2, "argument --max-seconds: expected a positive number *found 'inf'"),
    (EMBED + " --max-channels 0.5", 2, "--max-channels 0: expected a positive number"),
    (EMBED + " --max-piksels 5", 2, "unknown argument --max-piksels *did you mean --max-pixels?"),
    ("train --input {tmp}/tars --output {tmp}/new --max-pixels x", 2, "argument --max-pixels: expected a positive"),
    # Expressions
    (EMBED + " --where image_widht>=8", 2, "where, column 1: unknown name 'image_widht'; did you mean image_width?"),
    (EMBED + " --where image_width>=", 2, "where, column *invalid syntax"),
    (EMBED + " --where len(text)>3", 2, "where, column 1: expected only comparisons"),
    (EMBED + " --where key.a==1", 2, "where, column 1: only metadata has entries"),
    (EMBED + " --where 2**3==8", 2, "where, column 1: the only supported arithmetic is + - * /"),
    (EMBED + " --where +1==1", 2, "where, column 1: the only supported sign is -"),
    (EMBED + " --where text_is_3", 2, "where, column 1: unknown name 'text_is_3'"),
    (CAPTION + " --prompt {metadata", 2, "*prompt*"),
    (CAPTION + " --prompt {title}", 2, "*prompt*title*"),
    # Inputs
    ("embed --input {tmp}/nothing --output {tmp}/new", 1, "no shard matches --input*{tmp}/nothing: does not exist"),
    (
        "embed --input {tmp}/no-*.tar --output {tmp}/new",
        1,
        "no shard matches --input*{tmp}/no-*.tar: no match in {tmp}",
    ),
    ("embed --input {tmp}/empty --output {tmp}/new", 1, "no shard matches --input*{tmp}/empty: "),
    ("embed --input {tmp}/text.tar --output {tmp}/new", 1, "{tmp}/text.tar: not a tar file"),
    (
        "embed --input {tmp}/run --output {tmp}/new",
        2,
        "--input: expected shards (tar files), found rows of an mmbeam job",
    ),
    ("embed --input nowhere://a.tar --output {tmp}/new", 2, "nowhere://a.tar: "),
    ("embed --input pipe:cat --output {tmp}/new", 2, "--input: a pattern that runs a command (pipe:) is refused"),
    ("embed --input {tmp}/{{a,b.tar --output {tmp}/new", 2, "{tmp}/{{a,b.tar: unbalanced braces"),
    ("embed --input {tmp}/{{0..99999999}}.tar --output {tmp}/new", 2, "*stands for more than 5,000,000 paths"),
    ("embed --input @{tmp}/nolist --output {tmp}/new", 2, "{tmp}/nolist: cannot be read as a list of shards"),
    (EMBED + " --strict-input --input {tmp}/none.tar", 1, "--input: 1 of 2 patterns match nothing"),
    (EMBED + " --image-field jgp", 2, "--image-field jgp: none of the 2 samples has this field; *did you mean jpg?"),
    (EMBED + " --text-field caption", 2, "--text-field caption: none of the 2 samples has this field; they have "),
    (EMBED + " --metadata-field jsno", 2, "--metadata-field jsno: *did you mean json?"),
    (EMBED + " --moved {tmp}", 2, "--moved {tmp}: expected OLD=NEW"),
    (EMBED + " --moved /a=/b", 2, "--moved /a=/b: no shard of the input is under /b"),
    ("inspect {tmp}/nothing", 1, "*{tmp}/nothing: does not exist"),
    # Outputs
    ("embed --input {tmp}/tars --output {tmp}/file", 2, "--output {tmp}/file: expected a directory, found a file"),
    ("embed --input {tmp}/tars --output {tmp}/file/a", 2, "--output {tmp}/file/a: expected a directory, found a file"),
    ("caption --input {tmp}/tars --output {tmp}/file", 2, "--output {tmp}/file: expected a directory, found a file"),
    ("embed --input {tmp}/tars --output nowhere://out", 2, "--output nowhere://out: Protocol not known"),
    ("embed --input {tmp}/tars --output s3://key:secret@b/c", 2, "--output s3://b/c: credentials in the URL"),
    # Models
    (EMBED + " --model {tmp}/file", 1, "{tmp}/file: expected a directory with config.json and model.safetensors"),
    (
        EMBED + " --model {tmp}/nothing",
        1,
        "{tmp}/nothing: expected an existing directory, or a hub name like org/model",
    ),
    (EMBED + " --model ./clip", 1, "./clip: expected an existing directory, or a hub name"),
    (CAPTION + " --model a/b/c", 1, "a/b/c: expected an existing directory, or a hub name"),
    (EMBED + " --model {tmp}/empty", 1, "*config.json"),
    (EMBED + " --model {tmp}/odd", 1, "*unsupported model_type 'clpi' for embedding; *did you mean clip?"),
    (
        EMBED + " --model shipped --model shipped",
        2,
        "--model: expected a different name for each, found shipped, shipped",
    ),
    (EMBED + " --model a=shipped --model a=shipped", 2, "--model: expected a different name for each, found a=shipped"),
    (CAPTION + " --model shipped --task transcribe", 2, "--task transcribe: expected one that mmbeam-fusion supports"),
    (CAPTION + " --engine vllm", 2, "--engine vllm: vLLM is not installed here"),
    # Runners
    (EMBED + " --runner=FlinkRuner", 2, "--runner FlinkRuner: expected one of *did you mean FlinkRunner?"),
    (EMBED + " --runner dataflow_runner", 2, "--runner dataflow_runner: *did you mean DataflowRunner?"),
    (EMBED + " --direct_running_mode multi_processing", 2, "--direct_running_mode=multi_processing: *; use --workers"),
    (EMBED + " --runner=FnApiRunner --direct_running_mode=multi_processing", 2, "--direct_running_mode=multi_proc*"),
    # Outputs of jobs
    ("status {tmp}/nothing", 1, "{tmp}/nothing: not the output of an mmbeam job"),
    ("status {tmp}/empty", 1, "{tmp}/empty: not the output of an mmbeam job"),
    ("status {tmp}/file", 1, "*{tmp}/file"),
    ("status nowhere://out", 2, "OUT nowhere://out: Protocol not known"),
    ("export {tmp}/nothing {tmp}/a.csv", 1, "{tmp}/nothing: not the output of an mmbeam job"),
    ("export {tmp}/run {tmp}/a.xls", 2, "*a.xls"),
    ("search {tmp}/nothing red", 1, "{tmp}/nothing: not the output of an mmbeam job"),
    ("evaluate {tmp}/run --metrics blue", 2, "unknown metric 'blue'; the metrics are bleu"),
    ("evaluate {tmp}/nothing", 1, "{tmp}/nothing: not the output of an mmbeam job"),
    ("report {tmp}/nothing", 1, "{tmp}/nothing: not the output of an mmbeam job"),
    (
        EMBED.replace("new", "run") + " --model shipped",
        1,
        "{tmp}/run holds a run of another configuration",
    ),
    # Config files
    ("embed --config {tmp}/nothing.toml", 2, "--config {tmp}/nothing.toml: expected a TOML file with options: No such"),
    ("embed --config {tmp}/file", 2, "--config {tmp}/file: expected TOML, found an error: "),
    # Tables and archives
    (
        "embed --input {tmp}/t.csv --output {tmp}/new",
        1,
        "*t.csv: expected a column of media or text, found picture, name; name",
    ),
    (
        "embed --input {tmp}/t.csv --output {tmp}/new --path-column pic",
        1,
        "*expected a column pic, found picture, name",
    ),
    ("embed --input {tmp}/bad.zip --output {tmp}/new", 1, "{tmp}/bad.zip: not a zip archive, or its central directory"),
    (
        "embed --input http://127.0.0.1:9/a.tar --output {tmp}/new",
        1,
        "*http://127.0.0.1:9/a.tar: does not exist, or access",
    ),
    # Other commands
    ("label --input {tmp}/tars --output {tmp}/new", 2, "the following arguments are required: --model"),
    ("label --input {tmp}/tars --output {tmp}/new --task zeroshot", 2, "argument --task: *did you mean zero-shot?"),
    (LABEL + " --task zero-shot", 2, "--task zero-shot needs --labels to look for, such as cat,dog or a file of them"),
    (LABEL + " --top-k 0", 2, "argument --top-k: expected a whole number of at least 1, found '0'"),
    (LABEL + " --threshold 2", 2, "argument --threshold: expected a number from 0 to 1, found '2'"),
    ("plan", 2, "the following arguments are required: JOB"),
    (
        "plan embd --input {tmp}/tars",
        2,
        "JOB: expected caption, embed, generate, label, found embd; did you mean embed?",
    ),
    (
        "plan embed --input {tmp}/nothing --output {tmp}/new",
        1,
        "no shard matches --input*{tmp}/nothing: does not exist",
    ),
    ("rerun {tmp}/nothing", 1, "{tmp}/nothing: not the output of an mmbeam job*; pass the --output of a job"),
    ("rerun {tmp}/run", 2, "{tmp}/run: expected the command of the run in run.json*; repeat the command itself"),
    ("pack {tmp}/tars", 2, "the following arguments are required: --output"),
    ("pack {tmp}/nothing --output {tmp}/new", 1, "no shard matches --input*{tmp}/nothing: does not exist"),
    ("pack {tmp}/tars --output {tmp}/new --shuffle x", 2, "argument --shuffle: expected a whole number, found 'x'"),
    ("search {tmp}/run", 2, "expected exactly one query: a text, --image, --audio or --like"),
    ("search {tmp}/run red --image a.jpg", 2, "expected exactly one query: a text, --image, --audio or --like"),
    ("search {tmp}/run --like x", 1, "--like x: {tmp}/run has no row with this key"),
    (
        "search {tmp}/run --like a --column image",
        2,
        "--column image: expected a column of vectors, one of image_embedding",
    ),
    ("search {tmp}/run --like a --json --html x.html", 2, "argument --html/--output: not allowed with argument --json"),
    (
        "search {tmp}/run --like a --html {tmp}",
        2,
        "--html {tmp}: expected a file, found a directory; name a file in it",
    ),
    ("search {tmp}/run --like a --html {tmp}/file", 2, "--html {tmp}/file: exists and is not a report of mmbeam"),
    ("search {tmp}/run --image {tmp}/a.jpg", 2, "cannot search by image: image_embedding: the run does not record its"),
    (
        "export {tmp}/run {tmp}/file --format csv",
        2,
        "TARGET {tmp}/file: exists already; choose another, or use --overwrite",
    ),
    ("export {tmp}/run {tmp}/a.csv --columns kye", 2, "--columns kye: the rows have key, *did you mean key?"),
    ("export {tmp}/run {tmp}/a.csv --format xls", 2, "argument --format: invalid choice: 'xls' (choose from 'csv', "),
    (
        "report {tmp}/run --html {tmp}/file",
        2,
        "--html {tmp}/file: exists and is not a report of mmbeam; choose another",
    ),
    ("report {tmp}/run --samples 0", 2, "argument --samples: expected a whole number of at least 1, found '0'"),
    ("report {tmp}/run --seed x", 2, "argument --seed: expected a whole number, found 'x'"),
    ("report {tmp}/run --html s3://bucket/x.html", 2, "--html s3://bucket/x.html: expected a local file"),
    ("status {tmp}/run --watch x", 2, "argument --watch: expected a whole number of at least 1, found 'x'"),
    (
        "evaluate {tmp}/run --reference title",
        2,
        "{tmp}/run: expected a column of generated text, *; name one as --column",
    ),
    (TRAIN + " --epochs 0", 2, "argument --epochs: expected a whole number of at least 1, found '0'"),
    (TRAIN + " --warmup-steps x", 2, "argument --warmup-steps: expected a whole number, found 'x'"),
    (TRAIN + " --fusion atention", 2, "argument --fusion: invalid choice: 'atention'*did you mean attention?"),
    (TRAIN + " --task classify", 2, "--task classify needs --label, the field or column that holds the labels"),
    ("demo --sampels 3", 2, "unknown argument --sampels (see `mmbeam demo --help`)"),
]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, an empty folder, a file, a shard that is not one, a run, and a model of unknown type."""
    folder = tmp_path_factory.mktemp("messages")
    shards.make_webdataset(folder / "tars", shards.make_truths(2), shards=1)
    (folder / "empty").mkdir()
    (folder / "file").write_text("in the way")
    (folder / "text.tar").write_bytes(b"not a tar" * 200)
    (folder / "t.csv").write_text("picture,name\na.jpg,b\n")
    (folder / "bad.zip").write_bytes(b"PK\x03\x04 and no more")
    (folder / "odd").mkdir()
    (folder / "odd" / "config.json").write_text(json.dumps({"model_type": "clpi"}))
    run = make_run(str(folder / "run"))
    open_run(run)
    write_unit(run, make_unit()).commit()
    return folder


@pytest.mark.parametrize(("line", "status", "message"), MISTAKES, ids=[line for line, _, _ in MISTAKES])
def test_a_mistake_is_one_message(
    line: str, status: int, message: str, tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(tmp=tmp) if "{tmp}" in word else word for word in line.split()]
    assert main(words) == status
    out, err = capfd.readouterr()
    assert out == ""
    pattern = ".*".join(re.escape(part) for part in message.format(tmp=tmp).split("*"))
    assert re.match(f"mmbeam: {pattern}", err, re.DOTALL), err
    assert err.count("mmbeam: ") == 1
    err = err.replace("is None", "")  # part of the language of --where
    for word in ("Traceback", "None", "null", "Error:", "Error(", "object at 0x", "`output`", "`input`"):
        assert word not in err
    assert not (tmp / "new").exists()


@pytest.mark.parametrize(
    "line",
    [
        "embed --input {tmp}/nothing --output {tmp}/new",
        EMBED + " --where image_widht>=8",
        EMBED + " --image-field jgp",
        EMBED + " --runner=FlinkRuner",
        CAPTION + " --prompt {metadata",
    ],
)
def test_a_mistake_is_reported_before_torch_and_beam_are_imported(line: str, tmp: Path) -> None:
    words = [word.format(tmp=tmp) if "{tmp}" in word else word for word in line.split()]
    code = "import sys; from mmbeam.cli import main; status = main(sys.argv[1:])\n"
    code += "print(status, [name for name in ('torch', 'apache_beam', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout in ("1 []\n", "2 []\n"), done


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_message(
    number: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def status_text(output: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("mmbeam.report.status.status_text", status_text)
    assert main(["status", "out"]) == 1
    expected = f"mmbeam: {os.strerror(number)}; free some space, and run the same command again to resume\n"
    assert capfd.readouterr().err == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_an_example(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert re.search(f"Examples?: mmbeam {name} ", " ".join(capfd.readouterr().out.split()))
