"""The evaluate job and command, on committed runs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sacrebleu
from outputs import make_run, make_unit
from servers import STORES, fresh_output

from mmbeam.cli import main
from mmbeam.errors import FlowError, JobError, UsageError
from mmbeam.jobs.evaluate import EvaluateOptions, evaluate
from mmbeam.metrics.cider import CiderD, document_frequencies
from mmbeam.metrics.text import TextTotals, text_metrics
from mmbeam.runs.run import open_run
from mmbeam.runs.store import Store
from mmbeam.runs.writer import UnitWriter
from mmbeam.types import Batch, Failure, Output, Sample, Tally

WIDTH = 8
CAPTION = Output(
    modalities=frozenset({"image"}),
    columns=(pa.field("caption", pa.string()), pa.field("caption_logprob", pa.float32())),
)
Row = dict[str, Any]  # caption, text, metadata, and vectors by column


def write_run(output: Path | str, parts: Sequence[Sequence[Row]], *outputs: Output) -> Path:
    """Commit a run of `rows`; a row without a value of an output gets a failure for that output."""
    run = make_run(str(output), outputs)
    open_run(run)
    for number, rows in enumerate(parts):
        unit = make_unit(f"{number}-part")
        samples = tuple(
            Sample(
                key=row.get("key", f"{number}-{n:04}"),
                shard=unit.inputs[0].shard.path,
                offset=n * 1024,
                present=frozenset({"image", "text"}),
                text=row.get("text"),
                metadata=None if row.get("metadata") is None else json.dumps(row["metadata"]),
            )
            for n, row in enumerate(rows)
        )
        columns = [column for output in outputs for column in output.columns]
        failures = tuple(
            Failure(
                key=sample.key,
                shard=sample.shard,
                offset=sample.offset,
                modality="",
                step="generate",
                error="SampleError",
                message="lost",
                outputs=(output.name,),
            )
            for sample, row in zip(samples, rows, strict=True)
            for output in outputs
            if row.get(output.name) is None
        )
        batch = Batch(
            unit=unit,
            index=0,
            last=True,
            samples=samples,
            features={column.name: pa.array([row.get(column.name) for row in rows], column.type) for column in columns},
            failures=failures,
            tally=Tally(samples=len(rows)),
        )
        with UnitWriter(run, unit) as writer:
            writer.write(batch)
            writer.commit()
    return Path(output)


def vector_output(name: str, width: int = WIDTH) -> Output:
    return Output(
        modalities=frozenset({"image", "text"}), columns=(pa.field(f"{name}_embedding", pa.list_(pa.float32(), width)),)
    )


SCENES = ("a red dog runs on the grass", "two people sit on a bench", "a plate of food on a table", "a bus on a street")


def caption_rows(number: int, count: int) -> list[Row]:
    """Make correct, nearly correct and wrong captions, with one to three references."""
    rows = []
    for n in range(count):
        truth = SCENES[(n + number) % 4]
        caption = (truth, truth.replace("a ", "one "), SCENES[(n + 1) % 4])[n % 3]
        references = [truth, f"{truth}, in the sun", f"there is {truth}"][: 1 + n % 3]
        rows.append({"caption": caption, "text": f"Alt {n}", "metadata": {"truth": references, "width": 64}})
    return rows


def pairs_of(parts: Sequence[Sequence[Row]]) -> list[tuple[str, list[str]]]:
    return [(row["caption"], row["metadata"]["truth"]) for rows in parts for row in rows]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    return write_run(tmp_path / "out", [caption_rows(n, count) for n, count in enumerate((30, 1, 17))], CAPTION)


def scores_of(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output / "_mmbeam" / "evaluation").to_pylist()
    return rows


# Texts


def test_scores_summed_by_beam_equal_those_of_the_whole_corpus(captions: Path) -> None:
    pairs = pairs_of([caption_rows(n, count) for n, count in enumerate((30, 1, 17))])
    text = evaluate(EvaluateOptions(run=str(captions), reference="truth"))["text"]
    hypotheses = [caption for caption, _ in pairs]
    references: Any = [[dict(enumerate(texts)).get(n) for _, texts in pairs] for n in range(3)]
    assert text["scores"]["bleu"] == sacrebleu.BLEU().corpus_score(hypotheses, references).score
    assert text["scores"]["chrf"] == sacrebleu.CHRF().corpus_score(hypotheses, references).score
    cider = CiderD(document_frequencies(texts for _, texts in pairs))
    assert text["scores"]["cider"] == pytest.approx(np.mean([cider.score(*pair) for pair in pairs]), abs=1e-12)
    assert text["scores"]["exact_match"] == np.mean([caption in texts for caption, texts in pairs])
    rouge = text_metrics(("rouge",))["rouge"]
    single = [rouge.sample_scores(rouge.measure(*pair)) for pair in pairs]
    for name in rouge.names:
        assert text["scores"][name] == pytest.approx(np.mean([score[name] for score in single]), abs=1e-12)
    assert (text["rows"], text["scored"], text["references"]) == (48, 48, sum(len(texts) for _, texts in pairs))


def test_every_sample_is_scored_and_the_worst_are_listed_first(captions: Path) -> None:
    text = evaluate(EvaluateOptions(run=str(captions), reference="truth"))["text"]
    rows = scores_of(captions)
    assert set(rows[0]) == {
        *("key", "shard", "offset", "hypothesis", "references"),
        *("chrf", "bleu", "rouge1", "rouge2", "rougeL", "cider", "exact_match"),
    }
    written = pq.read_table(captions / "data", columns=["key", "caption"]).to_pylist()
    assert {row["key"]: row["hypothesis"] for row in rows} == {row["key"]: row["caption"] for row in written}
    for row in rows:
        assert row["chrf"] == sacrebleu.sentence_chrf(row["hypothesis"], row["references"]).score
    worst = sorted((row["chrf"], row["shard"], row["offset"], row["key"]) for row in rows)[:5]
    assert [tuple(row[name] for name in ("badness", "shard", "offset", "key")) for row in text["worst"]] == worst


@pytest.mark.parametrize("store", STORES)
def test_rows_and_scores_are_in_any_store(store: str, tmp_path: Path) -> None:
    rows = [{**row, "image_embedding": [1.0] * WIDTH} for row in caption_rows(0, 3)]
    outputs = (CAPTION, vector_output("image"), vector_output("text"))
    out = fresh_output(store, tmp_path)
    write_run(out, [[{**row, "text_embedding": row["image_embedding"]} for row in rows]], *outputs)
    options = EvaluateOptions(run=out, reference="truth", metrics=("exact_match",), retrieval=("all",))
    report = evaluate(options)
    assert report["text"]["scores"] == {"exact_match": 1 / 3}
    assert report["retrieval"][0]["left_to_right"]["median_rank"] == 2
    kept = json.loads(Store(out).read("_mmbeam/evaluation.json"))
    assert kept == json.loads(json.dumps({name: value for name, value in report.items() if name != "report"}))
    scores = pq.read_table(pa.BufferReader(Store(out).read("_mmbeam/evaluation/part-0-part.parquet")))
    assert scores["exact_match"].to_pylist() == [1, 0, 0]


def test_rows_lost_by_the_runner_are_an_error(captions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextTotals, "from_json", lambda data: TextTotals(rows=data["rows"] - 1))
    with pytest.raises(FlowError, match="expected 48 rows, 47 were scored"):
        evaluate(EvaluateOptions(run=str(captions), reference="truth"))


def test_the_reference_may_be_a_column(captions: Path) -> None:
    text = evaluate(EvaluateOptions(run=str(captions), reference="text", metrics=("exact_match",)))["text"]
    assert text["references"] == 48
    assert text["scores"] == {"exact_match": 0}


def test_a_reference_named_like_the_measured_column_is_read_from_the_metadata(tmp_path: Path) -> None:
    rows: list[Row] = [{"caption": "a dog", "metadata": {"caption": "a dog \udcff"}}]
    out = write_run(tmp_path / "out", [rows], CAPTION)
    report = evaluate(EvaluateOptions(run=str(out), reference="caption", metrics=("wer", "exact_match")))
    assert report["text"]["scores"] == {"wer": 1 / 3, "exact_match": 0}
    assert scores_of(out)[0]["references"] == ["a dog ?"]


def test_rows_without_a_text_or_a_reference_are_counted_and_not_scored(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"caption": "a dog", "metadata": {"truth": "a dog"}},
        {"caption": "a dog", "metadata": {"truth": ["a cat", None, 3, "a dog"]}},
        {"caption": "", "metadata": {"truth": "a cat"}},
        {"caption": None, "metadata": {"truth": "a bus"}, "image_embedding": [1.0] * WIDTH},
        {"caption": None, "metadata": {"truth": "a bus"}},  # every output lost: no row
        {"caption": "a bus", "metadata": {"other": "a bus"}},
        {"caption": "a bus", "metadata": {"truth": ["", "  "]}},
        {"caption": "a bus", "metadata": {"truth": {"deep": "a bus"}}},
        {"caption": "a bus", "metadata": None},
    ]
    out = write_run(tmp_path / "out", [rows], CAPTION, vector_output("image"))
    report = evaluate(EvaluateOptions(run=str(out), reference="truth"))
    text = report["text"]
    assert report["failed_samples"] == 1
    counts = {name: text[name] for name in ("rows", "scored", "without_hypothesis", "without_reference", "empty")}
    assert counts == {"rows": 8, "scored": 3, "without_hypothesis": 1, "without_reference": 4, "empty": 1}
    assert text["scores"]["exact_match"] == 2 / 3
    assert [row["hypothesis"] for row in scores_of(out)] == ["a dog", "a dog", ""]


def test_transcripts_are_scored_by_error_rates_and_references_may_be_empty(tmp_path: Path) -> None:
    output = Output(modalities=frozenset({"image"}), columns=(pa.field("transcript", pa.string()),))
    rows: list[Row] = [
        {"transcript": "the cat sat", "metadata": {"truth": "the cat sat down"}},
        {"transcript": "", "metadata": {"truth": ""}},
        {"transcript": "thank you", "metadata": {"truth": ""}},
    ]
    text = evaluate(EvaluateOptions(run=str(write_run(tmp_path / "out", [rows], output)), reference="truth"))["text"]
    assert text["metrics"] == ("wer", "cer", "exact_match")
    assert text["scores"] == {"wer": 3 / 4, "cer": (5 + 9) / 16, "exact_match": 1 / 3}
    assert text["worst"][0]["hypothesis"] == "thank you"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_references_come_from_a_file_joined_by_key(captions: Path, tmp_path: Path, kind: str) -> None:
    """A repeated key adds references; keys without a row are counted."""
    rows = pq.read_table(captions / "data", columns=["key", "caption"]).to_pylist()[:20]
    table = [{"key": row["key"], "truth": row["caption"]} for row in rows]
    table += [{"key": rows[0]["key"], "truth": "another"}, {"key": "nowhere", "truth": "x"}, {"key": "0", "truth": "y"}]
    path = tmp_path / f"references.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        path.write_text("key,truth\n" + "".join(f'{row["key"]},"{row["truth"]}"\n' for row in table))
    options = EvaluateOptions(
        run=str(captions),
        references=str(path),
        reference="truth",
        metrics=("exact_match",),
        output=str(tmp_path / "to"),
    )
    text = evaluate(options)["text"]
    assert text["scores"] == {"exact_match": 1}
    counts = {name: text[name] for name in ("scored", "without_reference", "references", "unused_keys")}
    assert counts == {"scored": 20, "without_reference": 28, "references": 21, "unused_keys": 2}
    assert len(pq.read_table(tmp_path / "to" / "evaluation")) == 20
    assert json.loads((tmp_path / "to" / "evaluation.json").read_text())["text"]["scored"] == 20
    assert not (captions / "_mmbeam" / "evaluation.json").exists()


def test_scores_of_an_earlier_evaluation_are_removed(captions: Path) -> None:
    stale = captions / "_mmbeam" / "evaluation" / "part-gone.parquet"
    stale.parent.mkdir()
    stale.write_bytes(b"of a part that no longer exists")
    evaluate(EvaluateOptions(run=str(captions), reference="truth", metrics=("chrf",)))
    assert len(scores_of(captions)) == 48
    assert not stale.exists()


def test_the_portable_runner_computes_the_same_scores(captions: Path) -> None:
    """It pickles every value between stages."""
    in_process = evaluate(EvaluateOptions(run=str(captions), reference="truth"))
    options = ("--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK")
    assert evaluate(EvaluateOptions(run=str(captions), reference="truth", beam_args=options)) == in_process


# Bad input


def test_an_unknown_field_is_an_error_that_lists_columns_and_metadata(captions: Path) -> None:
    with pytest.raises(UsageError, match=r"no row has title; columns: key, .*caption.*; metadata: truth, width"):
        evaluate(EvaluateOptions(run=str(captions), reference="title"))
    with pytest.raises(UsageError, match="expected text in width, found int"):
        evaluate(EvaluateOptions(run=str(captions), reference="width"))


def test_no_row_with_a_text_and_a_reference_is_an_error(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"caption": None, "image_embedding": [1.0] * WIDTH, "metadata": {"truth": "a"}},
        {"caption": "a", "metadata": {"other": "a"}},
    ]
    out = write_run(tmp_path / "out", [rows], CAPTION, vector_output("image"))
    with pytest.raises(JobError, match="of 2 rows, 1 have no text and 1 of the others no reference"):
        evaluate(EvaluateOptions(run=str(out), reference="truth"))


def test_the_column_must_be_text_and_unambiguous(tmp_path: Path, captions: Path) -> None:
    embedded = write_run(tmp_path / "embedded", [[{"image_embedding": [1.0] * WIDTH}]], vector_output("image"))
    with pytest.raises(UsageError, match="expected a column of generated text, found key"):
        evaluate(EvaluateOptions(run=str(embedded), reference="truth"))
    with pytest.raises(UsageError, match="`column` title: expected a column of text; the rows have key, shard"):
        evaluate(EvaluateOptions(run=str(captions), reference="truth", column="title"))
    summary = Output(modalities=frozenset({"image"}), columns=(pa.field("summary", pa.string()),))
    two = write_run(tmp_path / "two", [[{"caption": "a", "summary": "b", "text": "a"}]], CAPTION, summary)
    with pytest.raises(UsageError, match="caption, summary were generated; name the one to measure: `column` caption"):
        evaluate(EvaluateOptions(run=str(two), reference="text"))
    text = evaluate(EvaluateOptions(run=str(two), reference="text", column="caption", metrics=("exact_match",)))["text"]
    assert text["scores"] == {"exact_match": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", b"a", "expected a file whose name ends in"),
        ("r.csv", b"id,text\n1,a\n", "expected rows with 'key' and 'reference', found id, text"),
        ("r.jsonl", b"[1]\n\xff", "UTF-8"),
        ("r.parquet", b"PAR1", "Parquet"),
        ("r.csv", b"", "found no rows"),
    ],
)
def test_an_invalid_file_of_references_is_an_error(
    captions: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        evaluate(EvaluateOptions(run=str(captions), references=str(tmp_path / name)))


def test_an_output_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="not the output of an mmbeam job"):
        evaluate(EvaluateOptions(run=str(tmp_path), reference="truth"))


def test_a_missing_optional_dependency_is_named(captions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)  # not installed
    with pytest.raises(UsageError, match=r"needs jiwer; install it with: pip install 'mmbeam\[eval\]'"):
        evaluate(EvaluateOptions(run=str(captions), reference="truth", metrics=("wer",)))


# Vectors


def vector_rows(count: int, noise: float = 0.0) -> list[Row]:
    """Make pairs of similar vectors, and a class that they predict."""
    random = np.random.default_rng(3)
    labels = random.integers(0, 3, count)
    image = 3 * np.eye(WIDTH)[labels] + random.normal(size=(count, WIDTH))
    text = image + noise * random.normal(size=image.shape)
    return [
        {
            "key": f"{n:05}",
            "image_embedding": image[n].tolist(),
            "text_embedding": text[n].tolist(),
            "metadata": {"class": int(labels[n]), "name": ["x"]} if n % 10 else None,
        }
        for n in range(count)
    ]


def test_all_pairs_are_measured_by_default(tmp_path: Path) -> None:
    rows = vector_rows(50)
    rows[3]["image_embedding"] = None
    rows[4]["text_embedding"] = [float("nan")] * WIDTH
    out = write_run(tmp_path / "out", [rows[:20], [], rows[20:]], vector_output("image"), vector_output("text"))
    (pair,) = evaluate(EvaluateOptions(run=str(out)))["retrieval"]
    assert (pair["left"], pair["right"], pair["rows"], pair["left_out"]) == (
        "image_embedding",
        "text_embedding",
        48,
        2,
    )
    perfect = {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0, "median_rank": 1.0, "mrr": 1.0}
    assert pair["left_to_right"] == pair["right_to_left"] == perfect


def test_default_pairs_have_the_same_model_and_width(tmp_path: Path) -> None:
    outputs = [
        vector_output(name) for name in ("clip_image", "clip_text", "clap_audio", "clap_text", "clipimage", "cliptext")
    ]
    row = {output.name: [float(n)] * WIDTH for n, output in enumerate(outputs, 1)}
    out = write_run(tmp_path / "out", [[row]], *outputs, vector_output("clap_image", 4))
    pairs = evaluate(EvaluateOptions(run=str(out), retrieval=("all",)))["retrieval"]
    assert [(pair["left"], pair["right"]) for pair in pairs] == [
        ("clip_image_embedding", "clip_text_embedding"),
        ("clap_audio_embedding", "clap_text_embedding"),
    ]
    mixed = ("clip_image_embedding:clap_text_embedding",)
    assert len(evaluate(EvaluateOptions(run=str(out), retrieval=mixed))["retrieval"]) == 1
    assert len(evaluate(EvaluateOptions(run=str(out), retrieval=("all", *mixed)))["retrieval"]) == 3
    with pytest.raises(UsageError, match=r"two columns of one width, among .*clap_image_embedding \(4 numbers\)"):
        evaluate(EvaluateOptions(run=str(out), retrieval=("clip_image_embedding:clap_image_embedding",)))


def test_nothing_to_measure_is_an_error(captions: Path) -> None:
    with pytest.raises(UsageError, match="or a `reference` to measure texts"):
        evaluate(EvaluateOptions(run=str(captions)))
    with pytest.raises(UsageError, match="`label`: expected vectors to predict it from"):
        evaluate(EvaluateOptions(run=str(captions), label="truth"))


def test_no_row_with_both_vectors_is_an_error(tmp_path: Path) -> None:
    rows = vector_rows(4)
    for n, row in enumerate(rows):
        row[("image_embedding", "text_embedding")[n % 2]] = None
    out = write_run(tmp_path / "out", [rows], vector_output("image"), vector_output("text"))
    with pytest.raises(JobError, match="no row has both image_embedding and text_embedding"):
        evaluate(EvaluateOptions(run=str(out)))


def test_a_probe_is_fitted_to_every_column_of_vectors(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", [vector_rows(400, noise=9.0)], vector_output("image"), vector_output("text"))
    image, text = evaluate(EvaluateOptions(run=str(out), label="class"))["probes"]
    assert (image["embedding"], image["label"], image["classes"], image["left_out"]) == (
        "image_embedding",
        "class",
        3,
        40,
    )
    assert image["train_rows"] + image["test_rows"] == 360
    assert image["accuracy"] > 0.9 > text["accuracy"]
    assert image["auc"] > 0.97
    with pytest.raises(UsageError, match="expected text in name, found list"):
        evaluate(EvaluateOptions(run=str(out), label="name"))


# The command


def test_the_command_prints_scores_and_the_worst(captions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(captions), "--reference", "truth", "--metrics", "wer,bleu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "caption: 48 rows = 48 scored; 94 references"
    assert lines[1].split()[0] == "wer"
    assert lines[3] == "worst by wer:"
    assert lines[-1] == f"report: {captions}/_mmbeam/evaluation.json"
    assert len(lines) == 4 + 3 * 5 + 1


def test_the_command_prints_tables_of_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = write_run(tmp_path / "out", [vector_rows(200)], vector_output("image"), vector_output("text"))
    assert main(["evaluate", str(out), "--retrieval", "all", "--label", "class"]) == 0
    printed = capsys.readouterr().out
    assert "image_embedding -> text_embedding" in printed
    assert "text_embedding -> image_embedding" in printed
    assert "probe of class" in printed
    assert "20 rows lack a label" in printed


def test_rouge_of_another_script_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Row] = [
        {"caption": "一只狗", "metadata": {"truth": "一只狗"}},
        {"caption": "a", "metadata": {"truth": "b"}},
    ]
    out = write_run(tmp_path / "out", [rows], CAPTION)
    assert main(["evaluate", str(out), "--reference", "truth"]) == 0
    assert "ROUGE needs words of a-z and 0-9; the references of 1 rows lack them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--reference", "nothing"], 2, "no row has nothing"),
        (["--metrics", "meteor", "--reference", "truth"], 2, "unknown metric 'meteor'"),
        (["--referense", "truth"], 2, "unknown argument --referense"),
        (["--references", "absent.csv"], 1, "absent.csv"),
    ],
)
def test_an_invalid_argument_is_an_error(
    captions: Path, arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(captions), *arguments]) == status
    assert message in capsys.readouterr().err
