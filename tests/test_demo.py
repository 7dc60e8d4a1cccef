"""The demo: run offline, compared with the README, and repeated; and the command that it prints."""

import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest

from mmbeam.cli import main
from mmbeam.corpus.scene import COLOURS
from mmbeam.demo import nearest_neighbours, sketch_audio, sketch_image
from mmbeam.names import FUSION_MODALITIES

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_demo_captions_correctly_and_can_be_repeated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    out, errors = capfd.readouterr()
    assert errors == ""
    assert "samples: 48 = 48 rows" in out
    assert "48 of 48 captions equal the true caption in the corpus's JSON" in out
    table = ds.dataset("demo/captions/data").to_table()
    assert table.num_rows == 48
    for modality in FUSION_MODALITIES:
        assert f"  {modality + '_embedding':<26} list of float, 64 each" in out
        assert table[f"{modality}_embedding"].null_count == 0
        assert table[f"caption_{modality}_attribution"].null_count == 0
    assert "  11-000000  text '#Harbour #Noon'" in out
    check_the_readme(out.replace(str(tmp_path), "..."))
    check_the_printed_command(out, capfd)
    assert main(["demo"]) == 0
    out = capfd.readouterr().out
    assert "units: 4 written" in out
    assert Path(out.split()[-1]).read_bytes().startswith(b"<!doctype html>")


def check_the_readme(out: str) -> None:
    """The README shows this output, except for numbers and omitted rows."""
    printed = {without_numbers(line) for line in out.splitlines()}
    shown = re.findall(r"```text\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert len(shown) > 30
    assert [line for line in shown if without_numbers(line) not in printed | {"  ..."}] == []


def without_numbers(line: str) -> str:
    return re.sub(r"[+-]?\d[\d.,]*(m\d\ds|s\b)?", "#", line)


def check_the_printed_command(out: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The printed command runs unchanged, and every unit is already committed."""
    command = out[out.index("mmbeam caption") : out.index("The rows, in Python")].replace("\\\n", " ")
    assert main(shlex.split(command)[1:]) == 0
    assert "units: 0 written, 4 committed by an earlier run" in capfd.readouterr().out
    lines = out[out.index("  import pyarrow") : out.index("The report")].splitlines()
    scope: dict[str, object] = {}
    exec("\n".join(line.strip() for line in lines), scope)
    assert getattr(scope["table"], "num_rows", None) == 48


def test_a_directory_with_other_files_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["demo", str(tmp_path)]) == 2
    assert "expected an empty directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_neighbours_are_nearest_by_cosine() -> None:
    vectors = np.array([[9.0, 1.0], [1.0, 3.0], [90.0, 20.0], [0.1, 0.2]])
    assert nearest_neighbours(vectors) == [2, 3, 0, 1]


def test_an_image_is_drawn_with_letters_for_colours() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[:20, :20] = COLOURS["red"]
    image[20:, 20:] = COLOURS["pink"]  # P is taken by purple
    assert sketch_image(image, COLOURS, rows=4) == ["RRRR....", "RRRR....", "....IIII", "....IIII"]


def test_audio_is_drawn_with_high_frequencies_above_and_loud_ones_darker() -> None:
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
