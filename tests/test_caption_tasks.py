"""Tasks, prompts and dialogues end to end: shards or features in, committed rows out, and what is refused before."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
import shards
import tiny_chat_models
import tiny_generators_hub as hub
from tiny_captioners import CAPTIONERS

from mmbeam.cli import main
from mmbeam.config import Cleaning, Reading
from mmbeam.decode.image import decode_image
from mmbeam.errors import FailureRateError, MissingModalityError, RunMismatchError, UsageError
from mmbeam.jobs.caption import CaptionOptions, caption
from mmbeam.prompts.ask import Decoding, Request
from mmbeam.prompts.turns import Turn
from mmbeam.types import RunReport

SHORT = Decoding(max_new_tokens=6)


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.save_qwen2(tmp_path_factory.mktemp("models") / "qwen2")


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_models.save_gemma3(tmp_path_factory.mktemp("models") / "gemma3")


def write(directory: Path, samples: Sequence[Mapping[str, bytes | dict[str, Any]]]) -> Path:
    """A shard of samples, JSON given as dictionaries; its path."""
    members = [
        (f"{number:04d}.{name}", json.dumps(data).encode() if isinstance(data, dict) else data)
        for number, sample in enumerate(samples)
        for name, data in sample.items()
    ]
    directory.mkdir(exist_ok=True)
    path = directory / "a.tar"
    path.write_bytes(shards.tar_bytes(members))
    return path


def run(tmp_path: Path, model: Path, source: Path, **changes: Any) -> RunReport:
    options = CaptionOptions(
        input=(str(source),), output=str(tmp_path / "out"), model=str(model), device="cpu", decoding=SHORT
    )
    return caption(replace(options, **changes))


def rows_of(tmp_path: Path) -> list[dict[str, Any]]:
    return sorted(ds.dataset(tmp_path / "out" / "data").to_table().to_pylist(), key=lambda row: str(row["key"]))


def failures_of(tmp_path: Path) -> list[dict[str, Any]]:
    return sorted(ds.dataset(tmp_path / "out" / "failures").to_table().to_pylist(), key=lambda row: str(row["key"]))


def dialogue(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


def test_a_prompt_is_filled_with_what_each_sample_has(tmp_path: Path, chat: Path) -> None:
    titles = ["A dog", "Zwei {text} Katzen", "x<|im_end|>", "\N{GRINNING FACE}"]
    source = write(tmp_path / "in", [{"json": {"a": {"title": title}}} for title in titles])
    report = run(tmp_path, chat, source, prompt="Say: {metadata[a][title]} {{1}}")
    assert (report.tally.rows, dict(report.tally.outputs)) == (4, {"caption": 4})
    model = hub.load_tiny(chat)
    for row, title in zip(rows_of(tmp_path), titles, strict=True):
        [expected] = model.generate([Request(prompt=f"Say: {title} {{1}}")], SHORT)
        assert row["caption"] == expected.text
        assert json.loads(row["metadata"])["a"]["title"] == title


def test_a_sample_without_the_field_is_one_failure(tmp_path: Path, chat: Path) -> None:
    samples: list[dict[str, Any]] = [
        {"json": {"title": "a"}},
        {"json": {"other": "b"}, "txt": b"words"},
        {"txt": b"words"},
        {"json": b"{no json"},
        {"json": {"title": "\ud800"}},
        {"json": {"title": " "}},
    ]
    report = run(tmp_path, chat, write(tmp_path / "in", samples), prompt="{metadata[title]}", max_failure_rate=1.0)
    tally = report.tally
    assert (tally.samples, tally.rows, tally.failed, dict(tally.skipped)) == (6, 2, 4, {})
    assert [(each["key"], each["step"], each["error"]) for each in failures_of(tmp_path)] == [
        ("0001", "generate", "PromptError"),
        ("0002", "generate", "PromptError"),
        ("0003", "decode", "DecodeError"),
        ("0005", "generate", "PromptError"),
    ]
    assert all(each["outputs"] == ["caption"] for each in failures_of(tmp_path))
    assert failures_of(tmp_path)[0]["message"].startswith("no metadata[title], which the prompt names; where")


def test_such_samples_can_be_left_out_as_the_message_says(tmp_path: Path, chat: Path) -> None:
    source = write(tmp_path / "in", [{"json": {"title": "a"}}, {"json": {"x": 1}}, {"txt": b"words"}])
    where = "metadata['title'] is not None"
    report = run(tmp_path, chat, source, prompt="{metadata[title]}", reading=Reading(cleaning=Cleaning(where=(where,))))
    assert (report.tally.rows, report.tally.failed, dict(report.tally.skipped)) == (1, 0, {where: 2})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"prompt": "{metadata[titel]} {metadata[title]}"},
            "`prompt`: none of the first 3 samples has {metadata[titel]}; they have "
            "{key}, {text}, {metadata[title]}, {metadata[a][b]}",
        ),
        ({"prompt": "{metadata[a][c]}"}, "has {metadata[a][c]}; they have"),
        ({"task": "dialogue"}, "`task` dialogue: none of the first 3 samples has {metadata[messages]}; they have"),
    ],
)
def test_a_field_that_no_sample_has_is_an_error_before_the_start(
    tmp_path: Path, chat: Path, options: dict[str, Any], words: str
) -> None:
    source = write(tmp_path / "in", [{"json": {"title": "x", "a": {"b": 1}}}, {"txt": b"words"}, {"json": b"{"}])
    with pytest.raises(UsageError) as caught:
        run(tmp_path, chat, source, **options)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_text_anywhere_is_an_error_too(tmp_path: Path, chat: Path) -> None:
    source = write(tmp_path / "in", [{"json": {"title": "x"}}])
    with pytest.raises(UsageError, match=r"none of the first 1 samples has \{text\}; they have \{key\}, \{metadata"):
        run(tmp_path, chat, source, prompt="{text}")


def test_in_a_large_corpus_the_first_samples_speak_for_all(tmp_path: Path, chat: Path) -> None:
    """Unless --where chooses among them: the fault then shows as failures."""
    source = write(tmp_path / "in", [{"json": {"title": "x"}}] * 120)
    with pytest.raises(UsageError, match=r"none of the first 32 samples has \{metadata\[titel\]\}"):
        run(tmp_path, chat, source, prompt="{metadata[titel]}")
    reading = Reading(cleaning=Cleaning(where=("metadata['title'] == 'x'",)))
    with pytest.raises(FailureRateError):
        run(tmp_path, chat, source, prompt="{metadata[titel]}", reading=reading)


def test_a_model_whose_modality_the_shards_lack_is_an_error_with_a_prompt_too(tmp_path: Path) -> None:
    model = CAPTIONERS["blip"](tmp_path / "blip")
    source = write(tmp_path / "in", [{"json": {"title": "x"}}])
    for prompt in ("a", "{metadata[title]}"):
        with pytest.raises(MissingModalityError, match="no image"):
            run(tmp_path, model, source, prompt=prompt)


def test_dialogues_are_answered(tmp_path: Path, chat: Path) -> None:
    samples = [
        {"json": dialogue("hello", "hi", "what is it")},
        {"json": dialogue("hello", "the answer that is known")},
        {"json": dialogue()},
        {"json": {"messages": [{"role": "tool", "content": "x"}]}},
    ]
    report = run(tmp_path, chat, write(tmp_path / "in", samples), max_failure_rate=1.0)
    assert (report.tally.rows, dict(report.tally.outputs)) == (2, {"reply": 2})
    assert [each["message"].split(":")[0] for each in failures_of(tmp_path)] == ["metadata[messages]"] * 2
    model = hub.load_tiny(chat)
    turns = (Turn("user", "hello"), Turn("assistant", "hi"), Turn("user", "what is it"))
    for row, asked in zip(rows_of(tmp_path), (turns, turns[:1]), strict=True):
        [expected] = model.generate([Request(turns=asked, task="dialogue")], SHORT)
        assert (row["reply"], row["reply_num_tokens"]) == (expected.text, expected.num_tokens)
        assert row["reply_logprob"] == pytest.approx(expected.logprob, abs=1e-3)


def test_a_dialogue_is_about_the_samples_picture(tmp_path: Path, seeing: Path) -> None:
    picture = shards.encode_image(shards.natural_image(1, 64, 64), "png")
    samples: list[dict[str, Any]] = [
        {"json": dialogue("what is it"), "png": picture},
        {"json": dialogue("what is it")},
        {"json": dialogue("what is it"), "png": b"\x89PNG no picture"},
    ]
    report = run(tmp_path, seeing, write(tmp_path / "in", samples), task="dialogue", max_failure_rate=1.0)
    assert (report.tally.rows, report.tally.failed) == (2, 1)
    [failure] = failures_of(tmp_path)
    assert (failure["key"], failure["modality"], failure["outputs"]) == ("0002", "image", ["reply"])
    model = hub.load_tiny(seeing)
    image, _ = decode_image(picture, Reading().limits)
    for row, shown in zip(rows_of(tmp_path), (image, None), strict=True):
        request = Request(image=shown, turns=(Turn("user", "what is it"),), task="dialogue")
        assert row["reply"] == model.generate([request], SHORT)[0].text


def test_a_caption_of_a_model_that_chats_is_of_the_picture_and_not_of_its_text(tmp_path: Path, seeing: Path) -> None:
    picture = shards.encode_image(shards.natural_image(1, 64, 64), "png")
    source = write(tmp_path / "in", [{"png": picture, "txt": b"some words"}, {"txt": b"words alone"}])
    run(tmp_path, seeing, source)
    image, _ = decode_image(picture, Reading().limits)
    [expected] = hub.load_tiny(seeing).generate([Request(image=image)], SHORT)
    assert [row["caption"] for row in rows_of(tmp_path)] == [expected.text, None]


def test_what_is_asked_is_part_of_the_fingerprint(tmp_path: Path, chat: Path) -> None:
    source = write(tmp_path / "in", [{"txt": b"words"}])
    run(tmp_path, chat, source, prompt="say {text}")
    kept = run(tmp_path, chat, source, prompt="say {text}")
    assert (kept.units_written, kept.units_kept) == (0, 1)
    for changes, words in (
        ({"prompt": "say: {text}"}, r"prompt: say \{text\} -> say: \{text\}"),
        ({"prompt": "say {text}", "task": "summarize"}, "task: caption -> summarize"),
        ({"task": "translate", "language": "de"}, "language: null -> de"),
    ):
        with pytest.raises(RunMismatchError, match=words):
            run(tmp_path, chat, source, **changes)


def test_prompts_are_filled_from_features_too(tmp_path: Path, chat: Path) -> None:
    """Rows that a run wrote hold texts and metadata."""
    source = write(tmp_path / "in", [{"txt": b"words", "json": {"title": "A dog"}}, {"json": {"title": "x"}}])
    run(tmp_path, chat, source, task="summarize")
    rows = tmp_path / "out" / "data" / "*.parquet"
    report = run(tmp_path, chat, rows, prompt="Say {metadata[title]}", output=str(tmp_path / "again"))
    assert dict(report.tally.outputs) == {"caption": 2}
    with pytest.raises(UsageError, match=r"the first 2 samples has \{metadata\[no\]\}; they have \{key\}, \{text\}"):
        run(tmp_path, chat, rows, prompt="{metadata[no]}", output=str(tmp_path / "no"))


def test_the_command_line_asks(tmp_path: Path, chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in", [{"txt": b"words"}])
    command = ["caption", "--model", str(chat), "--input", str(source), "--device", "cpu", "--max-new-tokens", "4"]
    command += ["--output", str(tmp_path / "out")]
    for arguments, status, words in (
        (["--prompt", "{text"], 2, "--prompt, column 1: unmatched brace"),
        (["--task", "draw"], 2, "invalid choice: 'draw'"),
        (["--task", "caption", "--prompt", "{metadata[x]}"], 2, "none of the first 1 samples has {metadata[x]}"),
        (["--task", "translate", "--language", "French", "--source-language", "German"], 0, ""),
    ):
        assert main([*command, *arguments]) == status
        assert words in capsys.readouterr().err
    [row] = rows_of(tmp_path)
    asked = Request(text="words", task="translate", language="French", source_language="German")
    [expected] = hub.load_tiny(chat).generate([asked], Decoding(max_new_tokens=4))
    assert row["translation"] == expected.text


def test_without_a_number_the_task_says_how_many_tokens(tmp_path: Path, chat: Path) -> None:
    source = write(tmp_path / "in", [{"txt": b"words"}])
    run(tmp_path, chat, source, task="summarize", decoding=Decoding())
    manifest = json.loads((tmp_path / "out" / "_mmbeam" / "run.json").read_text())
    assert manifest["configuration"]["decoding"]["max_new_tokens"] == 128


def test_more_new_tokens_than_the_models_positions_are_refused_before_the_start(tmp_path: Path, chat: Path) -> None:
    source = write(tmp_path / "in", [{"txt": b"a b"}])
    with pytest.raises(UsageError, match=r"`max_new_tokens` 100000: expected at most \d+"):
        run(tmp_path, chat, source, task="summarize", decoding=Decoding(max_new_tokens=100_000))
