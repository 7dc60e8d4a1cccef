"""The demo, as a person runs it: offline, twice, and the command that it proposes."""

import shlex
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest

from mmbeam.cli import main
from mmbeam.corpus.scene import COLOURS
from mmbeam.demo import nearest_neighbours
from mmbeam.names import MODALITIES
from mmbeam.report.sketch import sketch_audio, sketch_image


def test_the_demo_captions_rightly_and_runs_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    said, errors = capfd.readouterr()
    assert errors == ""
    assert "samples: 48 = 48 rows" in said
    assert "48 of 48 captions are exactly what the corpus's own JSON says is true" in said
    table = ds.dataset("demo/captions/data").to_table()
    assert table.num_rows == 48
    for modality in MODALITIES:
        assert f"  {modality + '_embedding':<26} list of float, 64 each" in said
        assert table[f"{modality}_embedding"].null_count == 0
        assert table[f"caption_{modality}_attribution"].null_count == 0
    assert "  11-000000  text '#Harbour #Noon'" in said
    check_the_proposed_command(said, capfd)
    assert main(["demo"]) == 0  # again: made anew
    assert "units: 4 written" in capfd.readouterr().out


def check_the_proposed_command(said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What the demo proposes to type works as it is printed, and finds all of it done."""
    command = said[said.index("mmbeam caption") : said.index("The rows, in Python")].replace("\\\n", " ")
    assert main(shlex.split(command)[1:]) == 0
    assert "units: 0 written, 4 committed before" in capfd.readouterr().out
    lines = said[said.index("  import pyarrow") :].splitlines()
    scope: dict[str, object] = {}
    exec("\n".join(line.strip() for line in lines), scope)
    assert getattr(scope["table"], "num_rows", None) == 48


def test_the_demo_leaves_a_directory_of_other_things_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["demo", str(tmp_path)]) == 2
    assert "expected an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_neighbours_are_the_nearest_by_direction() -> None:
    vectors = np.array([[9.0, 1.0], [1.0, 3.0], [90.0, 20.0], [0.1, 0.2]])
    assert nearest_neighbours(vectors) == [2, 3, 0, 1]


def test_a_picture_is_drawn_with_the_letters_of_its_colours() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[:20, :20] = COLOURS["red"]
    image[20:, 20:] = COLOURS["pink"]  # P is purple's
    assert sketch_image(image, COLOURS, rows=4) == ["RRRR....", "RRRR....", "....IIII", "....IIII"]


def test_a_sound_is_drawn_high_notes_above_and_loud_ones_darker() -> None:
    time = np.arange(16000) / 16000
    chirp = np.sin(2 * np.pi * np.where(time < 0.5, 200, 3000) * time).astype(np.float32)
    low, high = (
        {row for row, line in enumerate(sketch_audio(chirp, 16000)) if line[column] != " "} for column in (8, 24)
    )
    assert min(low) > max(high)
    soft = sketch_audio(0.03 * chirp, 16000)
    assert "█" in "".join(sketch_audio(chirp, 16000))
    assert "█" not in "".join(soft)
    assert set("".join(soft)) != {" "}
    assert set("".join(sketch_audio(0 * chirp, 16000))) == {" "}
