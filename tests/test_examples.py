"""The examples, on files that are made here: each command of examples/README.md is run as it stands."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.csv
import pytest
import shards
import tiny_generators_hub as hub
from test_deploy import tool
from tiny_clip import save_clip
from tiny_models import save_blip
from transformers import BlipForConditionalGeneration

from mmbeam.cli import main
from mmbeam.corpus.write import write_corpus

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMANDS = re.findall(r"^\$ (.*)", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
PICTURES = 4
SAMPLES = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of the examples, and tiny models in directories with the names of hub models."""
    home = tmp_path_factory.mktemp("examples")
    pictures = [shards.encode_image(shards.natural_image(number, 40, 30)) for number in range(PICTURES)]
    pictures.append(pictures[0])
    (home / "photos" / "trip").mkdir(parents=True)
    with zipfile.ZipFile(home / "archive.zip", "w") as archive:
        for number, data in enumerate(pictures):
            (home / "photos" / "trip" / f"{number}.JPG").write_bytes(data)
            archive.writestr(f"box/{number}.jpg", data)
    lines = [f"photos/trip/{number}.JPG,Product {number}" for number in range(PICTURES)]
    (home / "products.csv").write_text("\n".join(["picture,name", *lines]) + "\n")
    (home / "episodes").mkdir()
    for number in range(2):
        wave = shards.natural_sound(number, seconds=3, rate=16000, channels=1)
        (home / "episodes" / f"episode {number}.flac").write_bytes(shards.encode_sound(wave, 16000, "flac"))
    write_corpus(home / "cases", samples=SAMPLES, shards=2, image_side=32, rate=8000)
    save_clip(home / "openai" / "clip-vit-base-patch32")
    save_blip(home / "Salesforce" / "blip-image-captioning-base", model=BlipForConditionalGeneration)
    hub.save_whisper(home / "openai" / "whisper-tiny")
    return home


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work among the inputs and models; the outputs of the examples have different names."""
    monkeypatch.chdir(home)
    return home


def run_example(name: str, replaced: dict[str, str] | None = None) -> None:
    """Run the README's commands about a script in this process, with words replaced."""
    [number] = [number for number, command in enumerate(COMMANDS) if f"examples/{name}" in command]
    if name.endswith(".py"):
        assert main(shlex.split(COMMANDS[number - 1])[1:]) == 0
        sys.argv[:] = shlex.split(COMMANDS[number])[1:]
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return
    arguments = shlex.split(COMMANDS[number])[2:]
    values = {f"${place}": (replaced or {}).get(value, value) for place, value in enumerate(arguments, 1)}
    script = (EXAMPLES / name).read_text(encoding="utf-8")
    commands = [line for line in script.splitlines() if line and not line.startswith(("#", "set "))]
    assert {value for value in values if value in script.partition("set -eu")[2]} == values.keys()
    for command in commands:
        program, *words = shlex.split(command)
        words = [(replaced or {}).get(word, word) for word in words]
        assert program == "mmbeam"
        assert main([values.get(word, word) for word in words]) == 0, command


def test_a_table_of_products_gets_alt_text(here: Path) -> None:
    run_example("alt_text.sh")
    table = pyarrow.csv.read_csv(here / "alt_text.csv")
    assert table.column_names == ["key", "caption", "metadata"]
    assert table.num_rows == PICTURES
    assert table["caption"].null_count == 0
    assert "Product 3" in table["metadata"][3].as_py()


def test_an_archive_is_searched_by_a_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("archive.sh")
    assert f"{PICTURES + 1} rows compared by image_embedding" in capsys.readouterr().out
    assert "a red car" in (here / "found.html").read_text("ascii")


def test_a_podcast_gets_subtitles(here: Path) -> None:
    run_example("podcast.sh")
    assert sorted(path.name for path in (here / "subtitles").iterdir()) == ["episode 0.vtt", "episode 1.vtt"]
    assert (here / "subtitles" / "episode 0.vtt").read_text("utf-8").startswith("WEBVTT\n")
    assert len(list((here / "texts").iterdir())) == 2


@pytest.mark.torture
def test_reports_are_written_from_pictures_and_notes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("medical_report.sh", {"20": "1", "report": "caption"})  # the corpus calls its texts captions
    assert len((here / "reports.jsonl").read_text("utf-8").splitlines()) == SAMPLES
    assert "bleu" in capsys.readouterr().out.lower()


def test_copies_in_a_folder_of_photos_are_listed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmbeam"])
    run_example("near_duplicates.py")
    pairs = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("0.", "1."))]
    assert ["1.0000", "trip/0", f"trip/{PICTURES}"] in pairs
    assert all(float(score) >= 0.97 for score, *_ in pairs)


def test_the_scripts_pass_shellcheck_and_are_executable() -> None:
    scripts = sorted(EXAMPLES.glob("*.sh"))
    assert len(scripts) == 4
    done = subprocess.run([tool("shellcheck"), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in scripts)
