"""The search job and command, on vectors that were committed as a job commits them, and on those of a tiny CLIP."""

import json
from pathlib import Path

import browser
import numpy as np
import pyarrow.dataset as ds
import pytest
import shards
from test_evaluate import CAPTION, WIDTH, vector_output, write_run
from test_report_page import HOSTILE, data_of
from tiny_clip import save_clip

from mmbeam.cli import main
from mmbeam.config import ModelRef
from mmbeam.errors import JobError, ModelError, SampleError, UsageError
from mmbeam.jobs.embed import EmbedOptions, embed
from mmbeam.jobs.search import SearchOptions, search
from mmbeam.names import EXTENSIONS
from mmbeam.report.page import write_results

PARTS = (7, 1, 12)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty rows in three parts; one has no vector, one a vector of zeros, and two the same vector."""
    vectors = np.random.default_rng(0).normal(size=(sum(PARTS), WIDTH)).astype(np.float32)
    vectors[4] = 0
    vectors[15] = 3 * vectors[9]
    rows = [
        {"key": f"k{n}", "text": f"text {n}", "caption": f"caption {n}", "image_embedding": list(map(float, v))}
        for n, v in enumerate(vectors)
    ]
    rows[2]["image_embedding"] = None
    parts = [rows[sum(PARTS[:n]) : sum(PARTS[: n + 1])] for n in range(len(PARTS))]
    return write_run(tmp_path_factory.mktemp("stored") / "out", parts, vector_output("image"), CAPTION)


def test_the_nearest_rows_to_a_row_are_those_of_a_sort_of_all_rows(stored: Path) -> None:
    table = ds.dataset(stored / "data").to_table()
    keys = table["key"].to_pylist()
    vectors = np.array([v or [0.0] * WIDTH for v in table["image_embedding"].to_pylist()])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    query = keys.index("k9")
    expected = sorted((n for n in range(len(keys)) if n != query), key=lambda n: -vectors[n] @ vectors[query])
    expected = [n for n in expected if keys[n] != "k2"]
    result = search(SearchOptions(run=str(stored), like="k9", top=100))
    assert (result.column, result.rows) == ("image_embedding", sum(PARTS) - 1)
    assert [hit.row["key"] for hit in result.hits] == [keys[n] for n in expected]
    np.testing.assert_allclose([hit.score for hit in result.hits], vectors[expected] @ vectors[query], atol=1e-6)
    assert result.hits[0].row["text"] == "text 15"
    assert "image_embedding" not in result.hits[0].row
    top = search(SearchOptions(run=str(stored), like="k9", top=3))
    assert top.hits == result.hits[:3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "expected exactly one query"),
        ({"text": "a", "like": "k1"}, UsageError, "expected exactly one query"),
        ({"like": "k1", "top": 0}, UsageError, "`top` 0"),
        ({"like": "nobody"}, JobError, "has no row with this key"),
        ({"like": "k2"}, JobError, "the row has no vector in image_embedding"),
        ({"like": "k4"}, JobError, "the vector of the query is zero"),
        ({"like": "k1", "column": "text"}, UsageError, "one of image_embedding"),
        ({"text": "a"}, UsageError, "image_embedding: the run does not record its model"),
    ],
)
def test_an_impossible_search_names_the_reason(
    stored: Path, options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        search(SearchOptions(run=str(stored), **options))  # type: ignore[arg-type]


def test_the_command_prints_a_table_or_json_lines(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(stored), "--like", "k9", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "19 rows compared by image_embedding"
    assert lines[1].split()[:2] == ["1.0000", "k15"]
    assert [line.strip() for line in lines[2:4]] == ["text: text 15", "caption: caption 15"]
    assert main(["search", str(stored), "--like", "k9", "--top", "2", "--json"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (len(hits), hits[0]["key"]) == (2, "k15")
    assert main(["search", str(stored), "a", "--image", "b"]) == 2


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[shards.Truth]]:
    """Twelve samples with image and text, embedded by a tiny CLIP in OUT of the directory returned."""
    root = tmp_path_factory.mktemp("embedded")
    truths = shards.make_truths(12)
    shards.make_webdataset(root / "in", truths, shards=2)
    model = ModelRef(model=str(save_clip(root / "clip")))
    options = {"text_prompt": "a photo: ", "dims": 16}  # which the search repeats
    embed(EmbedOptions(input=(str(root / "in"),), output=str(root / "out"), models=(model,), device="cpu", **options))
    return root, truths


def test_a_file_finds_its_own_row_and_a_text_its_own(embedded: tuple[Path, list[shards.Truth]], tmp_path: Path) -> None:
    root, truths = embedded
    truth = truths[5]
    file = tmp_path / "query"
    file.write_bytes(next(data for name, data in truth.members.items() if name in EXTENSIONS["image"]))
    out = str(root / "out")
    by_image = search(SearchOptions(run=out, image=str(file), device="cpu"))
    assert (by_image.column, by_image.rows, len(by_image.hits)) == ("image_embedding", 12, 10)
    assert by_image.hits[0].row["key"] == truth.key
    assert by_image.hits[0].score == pytest.approx(1, abs=1e-5)
    text = truth.members["txt"].decode()
    by_text = search(SearchOptions(run=out, text=text, column="text_embedding", device="cpu"))
    assert by_text.hits[0].score == pytest.approx(1, abs=1e-5)
    assert by_text.hits[0].row["text"] == text
    across = search(SearchOptions(run=out, text=text, top=1, device="cpu"))  # the text against the images
    assert across.column == "image_embedding"
    assert across.hits[0].score < 0.999


def test_a_page_shows_the_media_texts_and_scores_of_the_hits(
    embedded: tuple[Path, list[shards.Truth]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, truths = embedded
    file, args = tmp_path / "found.html", ["--like", truths[5].key, "--top", "3"]
    assert main(["search", str(root / "out"), *args, "--html", str(file)]) == 0
    assert capsys.readouterr().out == f"12 rows compared by image_embedding, 3 shown: {file}\n"
    assert main(["search", str(root / "out"), *args, "--output", str(file)]) == 0  # replaces its own page
    data = data_of(file)
    expected = search(SearchOptions(run=str(root / "out"), like=truths[5].key, top=3)).hits
    assert [card["key"] for card in data["samples"]] == [hit.row["key"] for hit in expected]
    assert [card["score"] for card in data["samples"]] == [hit.score for hit in expected]
    assert all(card["image"].startswith("data:image/jpeg") and card["texts"] for card in data["samples"])
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    assert main(["search", str(root / "out"), *args, "--html", str(mine)]) == 2
    assert "--html" in (message := capsys.readouterr().err)
    assert "exists and is not a report of mmbeam" in message
    assert main(["search", str(root / "out"), *args, "--html", str(tmp_path)]) == 2
    assert "expected a file, found a directory" in capsys.readouterr().err
    if browser.CHROMIUM is not None:
        write_results(
            str(root / "out"), str(file), HOSTILE, "image_embedding", 12, [(h.score, h.row) for h in expected]
        )
        with browser.Browser() as chromium:
            page = chromium.page()
            page.open(file)
            assert page.run("section('title').textContent") == f"search: {HOSTILE}"
            assert page.run("[...document.querySelectorAll('article h4')].map((node) => node.textContent)") == [
                hit.row["key"] for hit in expected
            ]
            assert page.run("[...document.querySelectorAll('main > section')].map((node) => node.id)") == ["samples"]
            assert page.problems == []


def test_a_query_that_the_model_cannot_encode_is_refused(
    embedded: tuple[Path, list[shards.Truth]], tmp_path: Path
) -> None:
    out = str(embedded[0] / "out")
    with pytest.raises(UsageError, match="does not encode audio"):
        search(SearchOptions(run=out, audio=str(tmp_path / "a.wav"), device="cpu"))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    with pytest.raises(SampleError, match=r"broken\.jpg: "):
        search(SearchOptions(run=out, image=str(broken), device="cpu"))


def test_a_changed_model_is_refused(embedded: tuple[Path, list[shards.Truth]]) -> None:
    root = embedded[0]
    config = root / "clip" / "preprocessor_config.json"
    original = config.read_text()
    config.write_text(original + "\n")
    try:
        with pytest.raises(ModelError, match="its files have changed"):
            search(SearchOptions(run=str(root / "out"), text="a", device="cpu"))
    finally:
        config.write_text(original)
