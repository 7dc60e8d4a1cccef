"""The demo, as a person runs it: offline, twice, and the command that it proposes."""

import shlex
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest

from mmbeam.cli import main
from mmbeam.demo import nearest_neighbours


def test_the_demo_shows_real_rows_and_runs_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    said, errors = capfd.readouterr()
    assert errors == ""
    assert "weights are random" in said
    assert "samples: 48 = 48 rows" in said
    table = ds.dataset("demo/embeddings/data").to_table()
    assert table.num_rows == 48
    names = {f"{model}_{modality}_embedding" for model, modality in zip(MODELS, MODALITIES, strict=True)}
    assert names <= set(table.column_names)
    for name in names:
        assert f"  {name:<22} list of float, 24 each" in said
        assert table[name].null_count == 0
    assert "  0-000000  'The Valley At Noon', 256 x 256 pixels, 1 s of sound" in said
    check_the_proposed_command(said, capfd)
    assert main(["demo"]) == 0  # again: made anew
    assert "units: 4 written" in capfd.readouterr().out


MODELS, MODALITIES = ("clip", "clip", "clap", "clap"), ("image", "text", "audio", "text")


def check_the_proposed_command(said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What the demo proposes to type works as it is printed, and finds all of it done."""
    command = said[said.index("mmbeam embed") : said.index("The rows, in Python")].replace("\\\n", " ")
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


def test_neighbours_are_the_nearest_by_direction_from_the_mean() -> None:
    vectors = np.array([[9.0, 1.0], [9.5, 2.5], [9.0, -1.0], [9.5, -2.5]])
    assert nearest_neighbours(vectors) == [1, 0, 3, 2]
