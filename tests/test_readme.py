"""The README is true: its commands run, its output is the real one, its reading lines read."""

import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_generators_hub as hub
from tiny_audio_text import save_bert, save_clap
from tiny_chat_models import save_qwen2_5_vl
from tiny_clip import save_clip
from tiny_models import save_blip
from transformers import BlipForConditionalGeneration

from mmbeam.cli import main
from mmbeam.corpus.write import write_corpus
from mmbeam.names import EXTENSIONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
SAMPLES = 60
MODELS: dict[str, Callable[[Path], object]] = {
    "openai/clip-vit-base-patch32": save_clip,
    "laion/clap-htsat-unfused": save_clap,
    "Salesforce/blip-image-captioning-base": partial(save_blip, model=BlipForConditionalGeneration),
    "openai/whisper-tiny": hub.save_whisper,
    "facebook/nllb-200-distilled-600M": hub.save_nllb,
    "google-bert/bert-base-uncased": save_bert,
    "Qwen/Qwen2.5-VL-3B-Instruct": save_qwen2_5_vl,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with shards, and in it directories named like the README's hub models, of tiny ones."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "shards", samples=SAMPLES, shards=2, image_side=64, rate=8000)
    for name, save in MODELS.items():
        save(tmp_path / name)
    return tmp_path


def test_every_command_runs_and_the_rows_are_read_as_it_says(here: Path) -> None:
    lines = "\n".join(CONSOLE).replace("\\\n", "").splitlines()
    commands = [line[2:].partition("#")[0].strip() for line in lines if line]
    assert commands[:2] == ["make demo", "make test"]
    for command in commands[2:]:
        name, *arguments = shlex.split(command)
        assert name == "mmbeam"
        assert main(arguments) == 0, command
    found: dict[str, np.ndarray] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        if "import apache_beam" not in block:  # those are test_transforms.py's
            exec(block, found)
    assert found["vectors"].shape == (SAMPLES, 24)
    assert found["images"].shape[1] == 24
    assert found["present"].all()


def test_the_models_it_names_in_one_pass_run(here: Path) -> None:
    options = " ".join(re.findall(r"`((?:--model \w+=[\w/-]+ ?)+)`", README))
    assert options.count("--model") == 2
    assert main(["embed", "--input", "shards/*.tar", "--output", "both", *shlex.split(options)]) == 0


def test_the_options_it_names_are_taken(here: Path) -> None:
    cleaning = re.findall(r"`(--(?:clean-text|where|image-filter)[^`]*)`", README)
    assert len(cleaning) == 3
    arguments = [word for option in cleaning for word in shlex.split(option)]
    assert main(["embed", "--input", "shards", "--output", "out", "--model", next(iter(MODELS)), *arguments]) == 0


def test_the_demos_output_is_the_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """But for numbers, and for the rows that the README leaves out."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    said = capfd.readouterr().out.replace(str(tmp_path), "...")
    real = {without_numbers(line) for line in said.splitlines()}
    shown = re.findall(r"```text\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert len(shown) > 30
    assert [line for line in shown if without_numbers(line) not in real | {"  ..."}] == []


def without_numbers(line: str) -> str:
    return re.sub(r"[+-]?\d[\d.,]*(m\d\ds|s\b)?", "#", line)


def test_it_lists_the_extensions_that_are_read() -> None:
    for kind, extensions in EXTENSIONS.items():
        listed = re.search(rf"{kind} `([a-z0-9 ]+)`", README)
        assert listed is not None
        assert set(listed[1].split()) == set(extensions) - {"m4a"}
