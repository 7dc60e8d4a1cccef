"""The HTML report: what it holds, what hostile input becomes in it, and what a browser shows."""

import base64
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shards
import soundfile
from outputs import make_run, make_unit, write_unit
from PIL import Image
from test_evaluate import CAPTION, WIDTH, vector_output, write_run

from mmbeam.cli import main
from mmbeam.config import Reading
from mmbeam.decode import decode_sample
from mmbeam.errors import JobError, UsageError
from mmbeam.features import read as features_read
from mmbeam.readers.listing import list_shards
from mmbeam.readers.samples import read_samples
from mmbeam.readers.stream import open_shard
from mmbeam.readers.tar import TarReader
from mmbeam.report import page
from mmbeam.report.gallery import load_media
from mmbeam.report.page import ReportOptions, collect, write_report
from mmbeam.runs.commits import Totals, report_failed_unit
from mmbeam.runs.run import open_run
from mmbeam.runs.summary import write_summary
from mmbeam.runs.writer import UnitWriter
from mmbeam.types import Batch, Input, Needs, Output, SampleId, Tally, UnitReport, WorkUnit

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\u2028\u2029]]>'
SAMPLES = 20
ATTRIBUTIONS = ("image", "audio", "text")
OUTPUTS = (
    Output(modalities=frozenset({"image"}), columns=(pa.field("image_embedding", pa.list_(pa.float16(), 8)),)),
    Output(modalities=frozenset({"text"}), columns=(pa.field("text_embedding", pa.list_(pa.float32(), 8)),)),
    Output(
        modalities=frozenset({"image", "audio", "text"}),
        columns=(
            pa.field("caption", pa.string()),
            pa.field("caption_num_tokens", pa.int32()),
            pa.field("caption_logprob", pa.float32()),
            *(pa.field(f"caption_{modality}_attribution", pa.float32()) for modality in ATTRIBUTIONS),
        ),
    ),
)


def run_on_shards(root: Path, truths: Sequence[shards.Truth], **changes: Any) -> Path:
    """Write shards and the run of a job on them, whose models are random numbers; the last shard does not exist."""
    made = shards.make_webdataset(root / "in", truths)
    run = make_run(str(root / "out"), OUTPUTS, task="caption", modalities={"clip": ["image", "text"]}, **changes)
    run = replace(
        run, recorded={**run.recorded, "models": {"clip": "org/clip@main"}, "beam_args": ["--password=hidden-word-1"]}
    )
    open_run(run)
    reading, rng = Reading(), np.random.default_rng(0)
    reports: list[UnitReport] = []
    for shard in list_shards([str(path) for path in made.paths]):
        with open_shard(shard) as stream:
            raws = list(TarReader(stream, shard.path, lambda field: True, reading.limits))
        needs = Needs(modalities=frozenset({"image", "audio", "text"}))
        decoded = [decode_sample(raw, reading, needs) for raw in raws]
        samples = tuple(sample for sample, _ in decoded)
        failures = tuple(failure for _, faults in decoded for failure in faults)
        vectors = [None if sample.image is None else rng.normal(size=8).astype(np.float16) for sample in samples]
        texts = [None if sample.text is None else rng.normal(size=8).astype(np.float32) for sample in samples]
        captions = [f"caption {n} of {sample.key}" for n, sample in enumerate(samples)]
        values = [captions, [4] * len(samples), [-1.0 - n for n in range(len(samples))]]
        values += [[share] * len(samples) for share in (0.5, 0.3, 0.2)]
        columns = [vectors, texts, *values]
        types = [column for output in OUTPUTS for column in output.columns]
        unit = WorkUnit(id=Path(shard.path).stem, inputs=(Input(shard=shard),))
        batch = Batch(
            unit=unit,
            index=0,
            last=True,
            samples=samples,
            features={column.name: pa.array(v, column.type) for column, v in zip(types, columns, strict=True)},
            failures=failures,
            tally=Tally(samples=len(samples), seconds={"compute": 2.0, "write": 1.0}, warnings={"odd shards": 1}),
        )
        with UnitWriter(run, unit) as writer:
            writer.write(batch)
            reports.append(replace(writer.commit(), status="written"))
    reports.append(report_failed_unit(run, make_unit("gone-1"), "/shards/gone-1.tar: does not exist"))
    write_summary(run, Totals.of(reports), wall_seconds=4.0)
    return root / "out"


@pytest.fixture(scope="module")
def truths() -> list[shards.Truth]:
    truths = shards.make_truths(SAMPLES)
    truths[3] = replace(truths[3], members={**truths[3].members, "png": b"not an image"})
    truths[3] = replace(truths[3], members={n: d for n, d in truths[3].members.items() if n != "gif"})
    truths[5] = replace(truths[5], members={**truths[5].members, "txt": HOSTILE.encode()})
    hostile = json.dumps(
        {"place": HOSTILE, "url": "https://user:hidden-word-2@host/x.jpg?sig=hidden-word-3", "score": 1.5}
    )
    truths[6] = replace(truths[6], key="<b>bold", members={**truths[6].members, "json": hostile.encode()})
    return truths


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, truths: list[shards.Truth]) -> Path:
    return run_on_shards(tmp_path_factory.mktemp("report"), truths)


@pytest.fixture(scope="module")
def written(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `out`."""
    file = tmp_path_factory.mktemp("html") / "report.html"
    write_report(ReportOptions(run=str(out), html=str(file)))
    return file


def data_of(file: Path) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text("ascii"), re.DOTALL)
    assert match is not None
    return dict(json.loads(match[1]))


def card_of(data: dict[str, Any], key: str) -> dict[str, Any]:
    return next(card for card in data["samples"] if card["key"] == key)


class Outline(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_states_what_was_run_and_that_the_counts_add_up(written: Path) -> None:
    data = data_of(written)
    assert data["task"] == "caption"
    assert data["models"] == [
        {"name": "clip", "model": "org/clip@main", "family": None, "digest": "12ab", "modalities": ["image", "text"]}
    ]
    counts = data["counts"]
    assert (counts["samples"], counts["rows"], counts["failed"], counts["impaired"]) == (SAMPLES, SAMPLES, 0, 1)
    assert counts["outputs"] == {"image_embedding": SAMPLES - 1, "text_embedding": SAMPLES, "caption": SAMPLES}
    assert data["state"] == {"planned": 3, "committed": 2, "failed": 1, "left": 0, "stopped": None}
    assert data["failed_units"] == [["gone-1", "/shards/gone-1.tar: does not exist"]]
    assert data["warnings"] == ["2 odd shards"]
    assert data["time"]["rate"] == SAMPLES / 4
    assert dict(data["time"]["steps"])["model"] == 4.0
    [failure] = data["failures"]
    assert (failure["kind"], failure["count"], failure["example"]["key"]) == ("decode: DecodeError", 1, "000003")


def test_distributions_count_every_row(written: Path) -> None:
    charts = {chart["name"]: chart for chart in data_of(written)["distributions"]}
    assert {"image_width", "audio_seconds", "text: characters", "caption_logprob"} <= charts.keys()
    assert {"image_embedding: norm", "text_embedding: norm"} <= charts.keys()
    assert not {"offset", "key: characters", "shard: characters"} & charts.keys()
    for name, chart in charts.items():
        assert sum(chart["counts"]) == chart["values"], name
        assert chart["values"] + chart["missing"] == SAMPLES - (name == "image_embedding: norm"), name
    assert charts["image_width"]["missing"] == 1
    assert charts["audio_seconds"]["min"] == 0.25


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        ([np.nan, np.inf, 3.0], [1]),
        ([1.0, 1.0 + 1e-7], [2]),
        ([0.0, 0.0], [2]),
        ([1.0, 2.0, 2.0, 4.0], [1, 2, 0, 1]),
        ([1.0] * 50 + [1e6], [50, *[0] * 22, 1]),
    ],
)
def test_a_histogram_counts_each_finite_value_once(values: list[float], counts: list[int]) -> None:
    chart = page._histogram("x", np.array(values))
    assert chart["counts"] == counts
    assert chart["values"] + chart["missing"] == len(values)


def test_cards_show_the_media_of_their_sample_re_encoded(written: Path, truths: list[shards.Truth]) -> None:
    data = data_of(written)
    card = card_of(data, "000001")
    picture = Image.open(BytesIO(base64.b64decode(card["image"].partition(",")[2])))
    assert (picture.format, picture.size, list(picture.size)) == ("JPEG", truths[1].size, card["image_size"])
    original = np.asarray(Image.open(BytesIO(truths[1].members["png"])).convert("RGB"), float)
    assert np.abs(np.asarray(picture, float) - original).mean() < 12
    wave, rate = soundfile.read(BytesIO(base64.b64decode(card["audio"].partition(",")[2])))
    assert len(wave) / rate == pytest.approx(truths[1].seconds, abs=0.1)
    assert card["attribution"] == [["image", 0.5], ["audio", pytest.approx(0.3)], ["text", pytest.approx(0.2)]]
    assert dict(card["texts"]) == {"caption": "caption 1 of 000001", "text": truths[1].text}
    originals = [base64.b64encode(data[:300]).decode()[:-4] for truth in truths for data in truth.members.values()]
    text = written.read_text("ascii")
    assert [part for part in originals if len(part) > 200 and part in text] == []


def test_large_images_and_long_sounds_are_cut_down(tmp_path: Path) -> None:
    wave = shards.natural_sound(0, seconds=20, rate=44100, channels=2)
    members = {"jpg": shards.encode_image(shards.natural_image(0, 1500, 500)), "flac": b""}
    members["flac"] = b"ID3\x04\x00\x00\x00\x00\x00\x04tags" + shards.encode_sound(wave, 44100, "flac")
    run_on_shards(tmp_path, [shards.Truth(key="large", members=members)] * 3)
    card = collect(ReportOptions(run=str(tmp_path / "out")))["samples"][0]
    assert card["image_size"] == (320, 107)
    clip, rate = soundfile.read(BytesIO(base64.b64decode(card["audio"].partition(",")[2])))
    assert (rate, clip.ndim) == (24000, 1)
    assert len(clip) / rate == pytest.approx(8, abs=0.1)


def test_failed_samples_have_a_card_with_the_reason(written: Path) -> None:
    data = data_of(written)
    [group] = [group for group in data["groups"] if group["title"] == "Failures"]
    [[_, [number]]] = group["sets"]
    card = data["samples"][number]
    assert (card["key"], card["image"]) == ("000003", None)
    [fault] = card["failures"]
    assert (fault["modality"], fault["lost"], fault["row"]) == ("image", ["image_embedding"], True)
    assert "not an image of a known format" in fault["message"]
    assert card["notes"] == []
    assert card["audio"].startswith("data:audio/")


def test_extremes_are_ordered_by_log_probability_per_token(written: Path) -> None:
    data = data_of(written)
    groups = {group["title"]: group["sets"][0][1] for group in data["groups"]}
    scores = {
        title: [dict(data["samples"][i]["values"])["caption_logprob"] for i in members]
        for title, members in groups.items()
    }
    assert scores["Most likely captions"][:4] == [-1, -1, -2, -2]
    assert scores["Least likely captions"][:4] == [-10, -10, -9, -9]
    assert len(groups["Random sample"]) == SAMPLES


def test_hostile_text_is_text_and_nothing_is_loaded(written: Path) -> None:
    text = written.read_text("ascii")
    assert HOSTILE in {text for card in data_of(written)["samples"] for _, text in card["texts"]}
    outline = Outline(text)
    assert [set(attributes) for attributes in outline.of("script")] == [{"type", "id"}, set()]
    assert {tag for tag, _ in outline.elements} & {"img", "iframe", "link", "object", "form", "b", "base"} == set()
    assert [
        a for _, attributes in outline.elements for a in attributes if a.startswith("on") or a in ("src", "style")
    ] == []
    assert {a["href"] for a in outline.of("a")} == {
        f"#{i}" for i in ("main", "overview", "samples", "maps", "distributions", "time", "configuration")
    }
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval\\(|Function\\(", text)
    [policy] = [str(meta["content"]) for meta in outline.of("meta") if meta.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert (rules["default-src"], rules["img-src"], rules["media-src"]) == ("'none'", "data:", "data:")
    assert re.fullmatch("'sha256-[A-Za-z0-9+/=]{44}'", rules["script-src"])
    assert re.fullmatch("'sha256-[A-Za-z0-9+/=]{44}'", rules["style-src"])


def test_no_credential_is_in_the_page(written: Path) -> None:
    text = written.read_text("ascii")
    assert [secret for secret in ("hidden-word-1", "hidden-word-2", "hidden-word-3") if secret in text] == []
    assert "https://host/x.jpg" in text


def test_the_seed_decides_what_is_shown(out: Path) -> None:
    def shown(**options: Any) -> dict[str, Any]:
        data = collect(ReportOptions(run=str(out), samples=5, **options))
        return {name: data[name] for name in ("groups", "maps", "points", "samples", "distributions")}

    assert shown() == shown()
    assert shown()["groups"][0] != shown(seed=1)["groups"][0]
    assert len(shown()["groups"][0]["sets"][0][1]) == 5


def test_of_many_rows_a_sample_is_read_and_stated(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MAX_PARTS": 1, "MAX_ROWS": 7, "VECTOR_ROWS": 5, "POINTS": 4}.items():
        monkeypatch.setattr(page, name, value)
    monkeypatch.setattr(features_read, "BATCH_ROWS", 3)
    data = collect(ReportOptions(run=str(out)))
    assert data["drawn"] == {"rows": 7, "of": 20, "parts": 1, "of_parts": 2, "vectors": 5, "points": 4, "seed": 0}
    assert "7 of 20 rows" in data["groups"][0]["note"]
    table = {row["key"]: row for row in pq.read_table(out / "data").to_pylist()}
    for card in data["samples"]:
        if not card["failures"]:
            assert dict(card["texts"])["caption"] == table[card["key"]]["caption"]
            assert card["offset"] == table[card["key"]]["offset"]
    by_key = {data["points"][point[0]][1] for point in data["maps"][1]["points"]}
    assert len(by_key) == 4
    assert by_key <= table.keys()


def test_maps_lie_along_the_principal_components() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(200, 40)) * np.linspace(5, 0.1, 40) ** 2).astype(np.float32)
    scores, explained = page._principal_components(vectors, seed=3)
    centred = vectors - vectors.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    for axis in range(2):
        expected = left[:, axis] * values[axis]
        assert abs(np.corrcoef(expected, scores[:, axis])[0, 1]) > 0.999
    np.testing.assert_allclose(explained, (values**2 / (values**2).sum())[:2], rtol=0.01)


def test_clusters_are_those_of_separate_groups() -> None:
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat([0, 1, 2], [30, 20, 10]))
    groups = page._clusters((rng.normal(size=(60, 4)) + 30 * truth[:, None]).astype(np.float32), 3, seed=0)
    assert np.array_equal(groups, truth)  # numbered by size
    assert set(page._clusters(np.zeros((9, 2), np.float32), 3, seed=0)) == {0}


def test_near_duplicates_are_the_closest_pairs_without_repetition() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2500, 6)).astype(np.float32)
    vectors[2400], vectors[7], vectors[1200] = vectors[3], vectors[3] + 1e-3, vectors[900] + 2e-3
    pairs = list(page._near_duplicates(np.arange(2500) * 2, page._unit(vectors)))
    assert pairs[0][:2] == (6, 4800)
    assert [similarity for *_, similarity in pairs] == sorted((s for *_, s in pairs), reverse=True)
    rows = [row for pair in pairs for row in pair[:2]]
    assert len(set(rows)) == len(rows) == 2 * page.PAIRS


@pytest.mark.parametrize(
    ("field", "labels"),
    [
        ("score", ["1.5", "no value"]),
        ("text_num_tokens", None),
        ("caption_num_tokens", ["4"]),
        ("index", ["0 to 3.6", "3.6 to 8.2", "8.2 to 11.8", "11.8 to 15.4", "15.4 to 19", "no value"]),
        ("key", ["000000", "000001", "000002", "000003", "000004", "000005", "other"]),
    ],
)
def test_a_field_colours_the_maps(out: Path, field: str, labels: list[str] | None) -> None:
    options = ReportOptions(run=str(out), color=field)
    if labels is None:
        with pytest.raises(UsageError, match=r"`color` text_num_tokens: none of the 20 rows read has a value.*place"):
            collect(options)
        return
    maps = collect(options)["maps"]
    assert maps[1]["labels"] == labels
    assert sum(maps[1]["counts"]) == SAMPLES
    assert [len(m["points"]) for m in maps] == [SAMPLES - 1, SAMPLES]
    assert all(len(m["counts"]) == len(m["labels"]) for m in maps)


def test_an_input_that_is_gone_or_changed_is_named_on_its_cards(tmp_path: Path, truths: list[shards.Truth]) -> None:
    run_on_shards(tmp_path, truths)
    first, second = sorted((tmp_path / "in").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes() + bytes(512))
    data = collect(ReportOptions(run=str(tmp_path / "out")))
    notes = {card["shard"]: card["notes"] for card in data["samples"]}
    assert "the input cannot be read" in notes[str(first)][0]
    assert "does not exist" in notes[str(first)][0]
    assert "changed since it was listed" in notes[str(second)][0]
    assert not any(card["image"] or card["audio"] for card in data["samples"])
    assert card_of(data, "000001")["texts"]


def test_another_sample_at_the_recorded_byte_is_not_shown(tmp_path: Path, truths: list[shards.Truth]) -> None:
    path = str(shards.make_webdataset(tmp_path, truths[:2], shards=1).paths[0])
    [media] = load_media({SampleId(path, 0): "another"}, {}, Reading()).values()
    assert (media.image, media.notes) == (
        None,
        ["the input holds another sample at this offset; it has changed since the run"],
    )
    [media] = load_media({SampleId(path, 0): "000000"}, {}, Reading()).values()
    assert media.image is not None


def test_files_of_a_folder_are_read_back_by_their_number(tmp_path: Path) -> None:
    folder, pictures = tmp_path / "photos", [shards.natural_image(n, 20 + n, 30) for n in range(4)]
    for number, pixels in enumerate(pictures):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "sub" / f"{number}.png").write_bytes(shards.encode_image(pixels, "png"))
    (folder / "metadata.csv").write_text("file_name,place\nsub/2.png,garden\n")
    [listed] = list_shards([str(folder)])
    parts = [
        Input(shard=listed.with_samples(listed.samples[begin : begin + 2]), begin=begin, end=begin + 2)
        for begin in (0, 2)
    ]
    (folder / "sub" / "3.png").unlink()
    keys = {SampleId(str(folder), number): f"sub/{number}" for number in range(4)}
    media = load_media(keys, {str(folder): parts}, Reading())
    assert [media[sample].image_size for sample in keys] == [(20, 30), (21, 30), (22, 30), None]
    assert "no longer exists" in media[SampleId(str(folder), 3)].notes[0]
    assert media.keys() == keys.keys()
    [raw] = read_samples(parts[1], [2, 9])
    assert (raw.key, raw.offset, raw.members["json"]) == ("sub/2", 2, b'{"place": "garden"}')


def test_a_sample_that_ended_its_process_is_not_decoded_again(tmp_path: Path) -> None:
    root = write_run(tmp_path / "out", [[{"key": "a", "caption": None}, {"key": "b", "caption": "b"}]], CAPTION)
    [file] = (root / "_failures").iterdir()
    table = pq.read_table(file)
    pq.write_table(table.set_column(4, table.schema.field("step"), pa.array(["crash"])), file)
    card = card_of(collect(ReportOptions(run=str(root))), "a")
    assert card["notes"] == ["not read again: this sample ended a process of the run"]


def test_an_output_without_vectors_or_texts_has_a_page(tmp_path: Path) -> None:
    root = write_run(tmp_path / "out", [[{"key": "a", "caption": "x"}, {"key": "b", "caption": "y"}]], CAPTION)
    data = collect(ReportOptions(run=str(root)))
    assert (data["maps"], data["points"]) == ([], [])
    assert len(data["samples"]) == 2
    with pytest.raises(UsageError, match=r"`color` place: none of the 2 rows .* the fields of the metadata are none"):
        collect(ReportOptions(run=str(root), color="place"))


def test_vectors_of_zeros_and_equal_ones_have_a_map(tmp_path: Path) -> None:
    rows = [{"key": f"k{n}", "image_embedding": [0.0] * WIDTH} for n in range(5)]
    data = collect(ReportOptions(run=str(write_run(tmp_path / "out", [rows], vector_output("image")))))
    [chart] = data["maps"]
    assert (len(chart["points"]), chart["explained"]) == (5, [0, 0])
    page.render(data)


def test_a_run_without_rows_has_a_page(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    report_failed_unit(run, make_unit("a-1"), "/shards/a-1.tar: is empty")
    report = write_report(ReportOptions(run=str(tmp_path / "out")))
    data = data_of(report.path)
    assert (report.rows, data["samples"], data["groups"], data["distributions"]) == (0, [], [], [])
    assert data["failed_units"] == [["a-1", "/shards/a-1.tar: is empty"]]
    with pytest.raises(UsageError, match="has no rows"):
        collect(ReportOptions(run=str(tmp_path / "out"), color="x"))
    with pytest.raises(JobError, match="not the output of an mmbeam job"):
        collect(ReportOptions(run=str(tmp_path)))


def test_a_run_at_work_has_a_page(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "out"))
    open_run(run)
    with write_unit(run, make_unit()) as writer:
        writer.commit()
    data = collect(ReportOptions(run=str(tmp_path / "out")))
    assert (data["counts"]["rows"], data["time"]["rate"]) == (10, None)
    assert len([card for card in data["samples"] if card["failures"]]) == 2


def test_the_command_writes_beside_the_run_or_where_it_is_told(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(out), "--samples", "3"]) == 0
    path = out / "_mmbeam" / "report.html"
    assert capsys.readouterr().out == f"report of 20 rows, {len(data_of(path)['samples'])} samples shown: {path}\n"
    assert main(["report", str(out), "--samples", "3"]) == 0
    capsys.readouterr()
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html>\nmine")
    assert main(["report", str(out), "--html", str(mine)]) == 2
    assert "--html" in (message := capsys.readouterr().err)
    assert "exists and is not a report of mmbeam" in message
    assert mine.read_text() == "<!doctype html>\nmine"
    assert main(["report", str(out), "--html", "s3://bucket/x.html"]) == 2
    assert "expected a local file" in capsys.readouterr().err
    assert main(["report", str(out), "--color", "nothing"]) == 2
    assert "--color nothing: none of the 20 rows read has a value" in capsys.readouterr().err


def test_the_report_of_a_remote_output_is_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = f"memory://{tmp_path.name}/out"
    run = make_run(output)
    open_run(run)
    assert write_report(ReportOptions(run=output)).path == Path("report.html")
    assert data_of(tmp_path / "report.html")["output"] == output


# In a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    if browser.CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with browser.Browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def shown(chromium: browser.Browser, written: Path) -> Iterator[browser.Page]:
    """The report of `out`."""
    shown = chromium.page()
    shown.size(1280, 900)
    shown.open(written)
    yield shown
    assert shown.problems == []


@pytest.fixture
def opened(shown: browser.Page) -> browser.Page:
    """The page with nothing filtered."""
    shown.run("section('query').value = section('group').value = ''; update()")
    return shown


def visible_keys(shown: browser.Page) -> set[str]:
    return set(shown.run("[...document.querySelectorAll('article:not([hidden]) h4')].map((node) => node.textContent)"))


def test_the_browser_shows_every_section_without_a_problem(opened: browser.Page) -> None:
    text = opened.run("document.body.innerText")
    assert "20 samples = 20 rows + 0 failed. The sum is complete." in text
    assert "gone-1" in text
    assert "Warning: 2 odd shards" in text
    assert "[object" not in text
    assert "undefined" not in text
    assert opened.run("document.title").startswith("caption: ")
    assert opened.run("document.querySelectorAll('#distributions svg').length") >= 5
    assert opened.run("document.querySelectorAll('#maps svg').length") == 2
    assert opened.run("[...document.querySelectorAll('article img')].every((image) => image.alt)") is True
    assert opened.run("document.querySelectorAll('img[src=x]').length") == 0
    assert opened.problems == []


def test_hostile_text_is_shown_as_it_is(opened: browser.Page) -> None:
    opened.run(
        "section('query').value = '</script><script>alert(1)'; section('query').dispatchEvent(new Event('input'))"
    )
    assert visible_keys(opened) == {"000005", "<b>bold"}
    assert "</script><script>alert(1)</script><img" in opened.run("section('samples').innerText")
    assert opened.run("section('count').textContent") == "2 of 20 samples match"


def test_a_changed_script_does_not_run(written: Path, tmp_path: Path, chromium: browser.Browser) -> None:
    changed = tmp_path / "changed.html"
    changed.write_text(written.read_text("ascii").replace('"use strict";', '"use strict"; '))
    other = chromium.page()
    other.open(changed)
    assert other.run("document.documentElement.dataset.ready") is None
    assert "Content Security Policy" in other.problems[0]


def test_groups_are_chosen_and_expanded(opened: browser.Page) -> None:
    assert opened.run("[...section('group').options].map((option) => option.text)") == [
        "all groups",
        "Random sample",
        "Least likely captions",
        "Most likely captions",
        "Failures",
    ]
    random = "document.querySelectorAll('#samples > section')[0].querySelectorAll('article:not([hidden])').length"
    assert opened.run(random) == 12
    opened.run("document.querySelector('[data-more]').click()")
    assert opened.run(random) == SAMPLES
    opened.run("section('group').value = '3'; section('group').dispatchEvent(new Event('change'))")
    assert visible_keys(opened) == {"000003"}


def test_a_map_is_used_by_keyboard_and_leads_to_a_card(opened: browser.Page) -> None:
    opened.run("document.querySelector('.map').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        opened.press(key)
    key = opened.run("document.querySelector('.detail strong').textContent")
    opened.run("document.querySelector('.detail button').click()")
    assert opened.run("document.activeElement.querySelector('h4').textContent") == key
    opened.run("document.querySelectorAll('.legend button')[0].click()")
    size = opened.run("document.querySelectorAll('.map')[0].querySelectorAll('circle:not(.dim):not(.ring)').length")
    assert 0 < size < SAMPLES - 1
    opened.run("document.querySelectorAll('.legend button')[0].click()")


def test_a_sound_plays(opened: browser.Page) -> None:
    opened.call("Page.bringToFront")  # a hidden page does not load sounds
    seconds = opened.run(
        "new Promise((done, failed) => { const sound = document.querySelector('audio'); sound.muted = true;"
        " sound.onloadedmetadata = () => done(sound.duration); sound.onerror = () => failed(sound.error);"
        " sound.load(); })"
    )
    assert seconds == pytest.approx(0.25, abs=0.15)


def test_axe_has_no_complaint(chromium: browser.Browser, written: Path, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_core_python", reason="needs axe-core-python")
    data = data_of(written)
    for group in data["groups"]:  # axe takes seconds for the contrast of a hundred cards
        group["sets"] = [[label, members[:2]] for label, members in group["sets"]]
    file = tmp_path / "few.html"
    file.write_bytes(page.render(data))
    few = chromium.page()
    few.open(file)
    few.run((Path(axe.__file__).parent / "axe.min.js").read_text("utf-8") + "; null")
    few.run("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    check = (
        "axe.run(document, {resultTypes: ['violations'], runOnly: RULES}).then((result) => result.violations.map("
        "(v) => [v.id, v.help, v.nodes.slice(0, 3).map((node) => node.html.slice(0, 200))]))"
    )
    for width, dark, rules in ((1280, False, "undefined"), (390, True, "['color-contrast']")):
        few.size(width, 900, dark)
        assert few.run(check.replace("RULES", rules)) == []
        assert few.run("document.documentElement.scrollWidth <= innerWidth") is True
    assert few.problems == []


def test_two_hundred_samples_are_interactive_in_three_seconds(
    tmp_path: Path, written: Path, chromium: browser.Browser
) -> None:
    data = data_of(written)
    cards = [{**data["samples"][n % SAMPLES], "offset": n} for n in range(200)]
    data |= {"samples": cards, "groups": [{"title": "Random", "note": "", "sets": [["", list(range(200))]]}]}
    data["points"] = [[-1, f"key {n}", "caption", "text"] for n in range(page.POINTS)]
    rng = np.random.default_rng(0)
    points = np.concatenate(
        [np.arange(page.POINTS)[:, None], rng.integers(0, [1001, 1001, 3], (page.POINTS, 3))], axis=1
    )
    data["maps"] = [{**data["maps"][0], "points": points.tolist()}] * 3
    file = tmp_path / "large.html"
    file.write_bytes(page.render(data))
    large = chromium.page()
    large.open(file)
    assert float(large.run("document.documentElement.dataset.ready")) < 3000
    large.run("section('query').value = '00001'; update()")
    assert large.run("section('count').textContent") == "110 of 200 samples match"
    assert large.problems == []
