"""Tasks, prompts and dialogues end to end: shards or features in, committed rows out, and errors at the start."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shards
import tiny_chat_models
import tiny_generators_hub as hub
from outputs import read_failures, read_rows
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
def image_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_models.save_gemma3(tmp_path_factory.mktemp("models") / "gemma3")


def write(directory: Path, samples: Sequence[Mapping[str, bytes | dict[str, Any]]]) -> Path:
    """Write a shard of samples, with JSON from dictionaries; return its path."""
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


def dialogue(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


def test_a_prompt_is_filled_from_the_fields_of_the_sample(tmp_path: Path, chat: Path) -> None:
    titles = ["A dog", "Zwei {text} Katzen", "x<|im_end|>", "\N{GRINNING FACE}"]
    source = write(tmp_path / "in", [{"json": {"a": {"title": title}}} for title in titles])
    report = run(tmp_path, chat, source, prompt="Say: {metadata[a][title]} {{1}}")
    assert (report.tally.rows, dict(report.tally.outputs)) == (4, {"caption": 4})
    model = hub.load_tiny(chat)
    for row, title in zip(read_rows(tmp_path / "out"), titles, strict=True):
        [expected] = model.generate([Request(prompt=f"Say: {title} {{1}}")], SHORT)
        assert row["caption"] == expected.text
        assert json.loads(row["metadata"])["a"]["title"] == title


def test_a_sample_without_the_field_is_one_failure(tmp_path: Path, chat: Path) -> None:
    samples: list[dict[str, Any]] = [
        {"json": {"title": "a"}},
        {"json": {"other": "b"}, "txt": b"words"},
        {"txt": b"words"},
        {"json": b"{not json"},
        {"json": {"title": "\ud800"}},
        {"json": {"title": " "}},
    ]
    report = run(tmp_path, chat, write(tmp_path / "in", samples), prompt="{metadata[title]}", max_failure_rate=1.0)
    tally = report.tally
    assert (tally.samples, tally.rows, tally.failed, dict(tally.skipped)) == (6, 2, 4, {})
    failures = read_failures(tmp_path / "out")
    assert [(failure["key"], failure["step"], failure["error"]) for failure in failures] == [
        ("0001", "generate", "PromptError"),
        ("0002", "generate", "PromptError"),
        ("0003", "decode", "DecodeError"),
        ("0005", "generate", "PromptError"),
    ]
    assert all(failure["outputs"] == ["caption"] for failure in failures)
    assert failures[0]["message"].startswith("no metadata[title], which the prompt names; where")


def test_the_condition_in_the_message_skips_samples_without_the_field(tmp_path: Path, chat: Path) -> None:
    source = write(tmp_path / "in", [{"json": {"title": "a"}}, {"json": {"x": 1}}, {"txt": b"words"}])
    where = "metadata['title'] is not None"
    report = run(tmp_path, chat, source, prompt="{metadata[title]}", reading=Reading(cleaning=Cleaning(where=(where,))))
    assert (report.tally.rows, report.tally.failed, dict(report.tally.skipped)) == (1, 0, {where: 2})


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_a_field_that_no_sample_has_is_an_error_before_the_job_starts(
    tmp_path: Path, chat: Path, options: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / "in", [{"json": {"title": "x", "a": {"b": 1}}}, {"txt": b"words"}, {"json": b"{"}])
    with pytest.raises(UsageError) as caught:
        run(tmp_path, chat, source, **options)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_prompt_of_text_on_samples_without_text_is_an_error(tmp_path: Path, chat: Path) -> None:
    source = write(tmp_path / "in", [{"json": {"title": "x"}}])
    with pytest.raises(UsageError, match=r"none of the first 1 samples has \{text\}; they have \{key\}, \{metadata"):
        run(tmp_path, chat, source, prompt="{text}")


def test_only_the_first_samples_are_checked_for_the_fields_of_a_prompt(tmp_path: Path, chat: Path) -> None:
    """With --where there is no check: each sample fails instead."""
    source = write(tmp_path / "in", [{"json": {"title": "x"}}] * 120)
    with pytest.raises(UsageError, match=r"none of the first 32 samples has \{metadata\[titel\]\}"):
        run(tmp_path, chat, source, prompt="{metadata[titel]}")
    reading = Reading(cleaning=Cleaning(where=("metadata['title'] == 'x'",)))
    with pytest.raises(FailureRateError):
        run(tmp_path, chat, source, prompt="{metadata[titel]}", reading=reading)


def test_shards_without_the_modality_of_the_model_are_an_error_with_a_prompt(tmp_path: Path) -> None:
    model = CAPTIONERS["blip"](tmp_path / "blip")
    source = write(tmp_path / "in", [{"json": {"title": "x"}}])
    for prompt in ("a", "{metadata[title]}"):
        with pytest.raises(MissingModalityError, match="expected image"):
            run(tmp_path, model, source, prompt=prompt)


def test_the_model_replies_to_dialogues(tmp_path: Path, chat: Path) -> None:
    samples = [
        {"json": dialogue("hello", "hi", "what is it")},
        {"json": dialogue("hello", "the known answer")},
        {"json": dialogue()},
        {"json": {"messages": [{"role": "tool", "content": "x"}]}},
    ]
    report = run(tmp_path, chat, write(tmp_path / "in", samples), max_failure_rate=1.0)
    assert (report.tally.rows, dict(report.tally.outputs)) == (2, {"reply": 2})
    assert [record["message"].split(":")[0] for record in read_failures(tmp_path / "out")] == ["metadata[messages]"] * 2
    model = hub.load_tiny(chat)
    turns = (Turn("user", "hello"), Turn("assistant", "hi"), Turn("user", "what is it"))
    for row, dialogue_turns in zip(read_rows(tmp_path / "out"), (turns, turns[:1]), strict=True):
        [expected] = model.generate([Request(turns=dialogue_turns, task="dialogue")], SHORT)
        assert (row["reply"], row["reply_num_tokens"]) == (expected.text, expected.num_tokens)
        assert row["reply_logprob"] == pytest.approx(expected.logprob, abs=1e-3)


def test_a_dialogue_includes_the_image_of_its_sample(tmp_path: Path, image_chat: Path) -> None:
    picture = shards.encode_image(shards.natural_image(1, 64, 64), "png")
    samples: list[dict[str, Any]] = [
        {"json": dialogue("what is it"), "png": picture},
        {"json": dialogue("what is it")},
        {"json": dialogue("what is it"), "png": b"\x89PNG not an image"},
    ]
    report = run(tmp_path, image_chat, write(tmp_path / "in", samples), task="dialogue", max_failure_rate=1.0)
    assert (report.tally.rows, report.tally.failed) == (2, 1)
    [failure] = read_failures(tmp_path / "out")
    assert (failure["key"], failure["modality"], failure["outputs"]) == ("0002", "image", ["reply"])
    model = hub.load_tiny(image_chat)
    image, _ = decode_image(picture, Reading().limits)
    for row, sample_image in zip(read_rows(tmp_path / "out"), (image, None), strict=True):
        request = Request(image=sample_image, turns=(Turn("user", "what is it"),), task="dialogue")
        assert row["reply"] == model.generate([request], SHORT)[0].text


def test_a_chat_model_captions_the_image_without_the_text(tmp_path: Path, image_chat: Path) -> None:
    picture = shards.encode_image(shards.natural_image(1, 64, 64), "png")
    source = write(tmp_path / "in", [{"png": picture, "txt": b"some words"}, {"txt": b"only words"}])
    run(tmp_path, image_chat, source)
    image, _ = decode_image(picture, Reading().limits)
    [expected] = hub.load_tiny(image_chat).generate([Request(image=image)], SHORT)
    assert [row["caption"] for row in read_rows(tmp_path / "out")] == [expected.text, None]


def test_prompt_task_and_language_are_part_of_the_fingerprint(tmp_path: Path, chat: Path) -> None:
    source = write(tmp_path / "in", [{"txt": b"words"}])
    run(tmp_path, chat, source, prompt="say {text}")
    kept = run(tmp_path, chat, source, prompt="say {text}")
    assert (kept.units_written, kept.units_kept) == (0, 1)
    for changes, message in (
        ({"prompt": "say: {text}"}, r"`prompt`: say \{text\} -> say: \{text\}"),
        ({"prompt": "say {text}", "task": "summarize"}, "`task`: caption -> summarize"),
        ({"task": "translate", "language": "de"}, "`language`: not set -> de"),
    ):
        with pytest.raises(RunMismatchError, match=message):
            run(tmp_path, chat, source, **changes)


def test_prompts_are_filled_from_features(tmp_path: Path, chat: Path) -> None:
    """The rows of a run hold texts and metadata."""
    source = write(tmp_path / "in", [{"txt": b"words", "json": {"title": "A dog"}}, {"json": {"title": "x"}}])
    run(tmp_path, chat, source, task="summarize")
    rows = tmp_path / "out" / "data" / "*.parquet"
    report = run(tmp_path, chat, rows, prompt="Say {metadata[title]}", output=str(tmp_path / "again"))
    assert dict(report.tally.outputs) == {"caption": 2}
    with pytest.raises(UsageError, match=r"the first 2 samples has \{metadata\[no\]\}; they have \{key\}, \{text\}"):
        run(tmp_path, chat, rows, prompt="{metadata[no]}", output=str(tmp_path / "no"))


def test_the_command_takes_prompts_tasks_and_languages(
    tmp_path: Path, chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in", [{"txt": b"words"}])
    command = ["caption", "--model", str(chat), "--input", str(source), "--device", "cpu", "--max-new-tokens", "4"]
    command += ["--output", str(tmp_path / "out")]
    for arguments, status, message in (
        (["--prompt", "{text"], 2, "--prompt, column 1: unmatched brace"),
        (["--task", "draw"], 2, "invalid choice: 'draw'"),
        (["--task", "caption", "--prompt", "{metadata[x]}"], 2, "none of the first 1 samples has {metadata[x]}"),
        (["--task", "translate", "--language", "French", "--source-language", "German"], 0, ""),
    ):
        assert main([*command, *arguments]) == status
        assert message in capsys.readouterr().err
    [row] = read_rows(tmp_path / "out")
    request = Request(text="words", task="translate", language="French", source_language="German")
    [expected] = hub.load_tiny(chat).generate([request], Decoding(max_new_tokens=4))
    assert row["translation"] == expected.text


def test_the_task_sets_the_default_of_max_new_tokens(tmp_path: Path, chat: Path) -> None:
    source = write(tmp_path / "in", [{"txt": b"words"}])
    run(tmp_path, chat, source, task="summarize", decoding=Decoding())
    manifest = json.loads((tmp_path / "out" / "_mmbeam" / "run.json").read_text())
    assert manifest["configuration"]["decoding"]["max_new_tokens"] == 128


def test_more_new_tokens_than_positions_are_rejected_before_the_job_starts(tmp_path: Path, chat: Path) -> None:
    source = write(tmp_path / "in", [{"txt": b"a b"}])
    with pytest.raises(UsageError, match=r"`max_new_tokens` 100000: expected at most \d+"):
        run(tmp_path, chat, source, task="summarize", decoding=Decoding(max_new_tokens=100_000))
