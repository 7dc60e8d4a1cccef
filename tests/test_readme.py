"""The README's commands, its output of the demo, and its Python examples."""

import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_generators_hub as hub
from shards import encode_image, natural_image
from tiny_audio_text import save_bert, save_clap
from tiny_chat_models import save_qwen2_5_vl
from tiny_clip import save_clip
from tiny_models import save_blip
from tiny_synthesizers import save_diffusion, save_vits
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
    "stable-diffusion-v1-5/stable-diffusion-v1-5": save_diffusion,
    "facebook/mms-tts-eng": save_vits,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and tiny models in directories with the names of the README's hub models."""
    home = tmp_path_factory.mktemp("home")
    write_corpus(home / "shards", samples=SAMPLES, shards=2, image_side=64, rate=8000)
    (home / "query.jpg").write_bytes(encode_image(natural_image(0)))
    for name, save in MODELS.items():
        save(home / name)
    return home


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a fresh directory with links to the shards and the models."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("here")
def test_every_command_runs_and_the_python_example_reads_the_rows() -> None:
    """Trainings run for one epoch instead of three."""
    lines = "\n".join(CONSOLE).replace("\\\n", "").replace("--epochs 3", "--epochs 1").splitlines()
    commands = [line[2:].partition("#")[0].strip() for line in lines if line]
    assert commands[:2] == ["make demo", "make test"]
    for command in commands[2:]:
        name, *arguments = shlex.split(command)
        assert name == "mmbeam"
        assert main(arguments) == 0, command
    scope: dict[str, np.ndarray] = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        if "import apache_beam" not in block:  # tested in test_transforms.py
            exec(block, scope)
    assert scope["vectors"].shape == (SAMPLES, 24)
    assert scope["images"].shape[1] == 24
    assert scope["present"].all()
    assert {name: vectors.shape for name, vectors in scope["query"].items()} == {"image": (1, 24), "text": (1, 24)}
    assert len(scope["captions"]) == 1
    assert scope["rows"].num_rows == SAMPLES


@pytest.mark.usefixtures("here")
def test_the_named_models_run_in_one_pass() -> None:
    options = " ".join(re.findall(r"`((?:--model \w+=[\w/-]+ ?)+)`", README))
    assert options.count("--model") == 2
    assert main(["embed", "--input", "shards/*.tar", "--output", "both", *shlex.split(options)]) == 0


@pytest.mark.usefixtures("here")
def test_the_named_options_are_accepted() -> None:
    cleaning = re.findall(r"`(--(?:clean-text|where|image-filter) [^`]+)`", README)
    assert len(cleaning) == 3
    arguments = [word for option in cleaning for word in shlex.split(option)]
    assert main(["embed", "--input", "shards", "--output", "out", "--model", next(iter(MODELS)), *arguments]) == 0


def test_the_extensions_are_listed() -> None:
    for kind, extensions in EXTENSIONS.items():
        listed = re.search(rf"{kind} `([a-z0-9 ]+)`", README)
        assert listed is not None
        assert set(listed[1].split()) == set(extensions)
