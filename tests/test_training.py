"""Around the training loop: options, examples, batches, schedules, checkpoints, scores and searches."""

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmbeam.corpus.scene import VOCABULARY, generate_scenes
from mmbeam.errors import TrainingError, UsageError
from mmbeam.models.fusion import FusionConfig, FusionModel, SourceConfig
from mmbeam.names import FUSION_MODALITIES, SCHEDULES, Modality
from mmbeam.prompts.ask import Request
from mmbeam.training import checkpoint
from mmbeam.training.batching import (
    BUFFER_BATCHES,
    TrainingBatch,
    collate,
    drop_modalities,
    evaluation_batches,
    make_views,
    prefetch_batches,
    training_batches,
)
from mmbeam.training.checkpoint import Journal, plot
from mmbeam.training.examples import Example, clauses_of, compose
from mmbeam.training.fit import learning_rate_factor, make_optimizer, warmup_steps
from mmbeam.training.options import TrainOptions, difference
from mmbeam.training.scores import Retrieval, count_words
from mmbeam.training.sources import CorpusSource, scene_example
from mmbeam.training.train import SPACE, apply_changes, sample_trials
from pipelines.train_shipped import single_words, word_classes

OPTIONS = TrainOptions(input=("shards/*.tar",), output="model")


def example(number: int, caption: str = "a cat.", clauses: bool = False, group: str | None = None) -> Example:
    parts: dict[Modality, str] = {"image": "a cat", "audio": "with a meow", "text": "at home"}
    return Example(
        key=str(number),
        caption=compose(parts, FUSION_MODALITIES) if clauses else caption,
        present=frozenset(FUSION_MODALITIES),
        request=lambda kept: Request(text=" ".join(sorted(kept))),
        clauses=parts if clauses else None,
        group=group,
    )


# options


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "lion"}, "adamw, adam, sgd"),
        ({"schedule": "step"}, "cosine, linear, constant"),
        ({"select": "bleu"}, "loss, exact_match"),
        ({"batch_size": 0}, "`batch_size` 0"),
        ({"learning_rate": math.nan}, "`learning_rate` nan"),
        ({"modality_dropout": 1.0}, "below 1"),
        ({"loss_weights": {"caption": 0.0}}, "caption"),
        ({"loss_weights": {"align": -1.0}}, "`loss_weights` align=-1.0: expected 0 or more"),
        ({"loss_weights": {"align": math.nan}}, "`loss_weights` align=nan: expected 0 or more"),
        ({"seed": -1}, "`seed` -1: expected 0 or more"),
        ({"audio_seconds": 0.0}, "`audio_seconds` 0.0: expected more than 0"),
        ({"audio_seconds": math.nan}, "`audio_seconds` nan: expected more than 0"),
        ({"captions": "text", "modalities": ("image", "text")}, "cannot be an input"),
        ({"freeze": ("image",)}, "requires `init`"),
        ({"init": "m", "model": {"fusion": "gated"}}, "fusion"),
        ({"split_fractions": (0.5, 0.4, 0.2)}, "add up to 1"),
        ({"output": "gs://bucket/model"}, "local directory"),
    ],
)
def test_invalid_options_are_rejected(changed: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainOptions(**({"input": ("a.tar",), "output": "model"} | changed))  # type: ignore[arg-type]


def test_the_identity_is_json_without_output_device_and_checkpoint_interval() -> None:
    other = TrainOptions(input=("shards/*.tar",), output="elsewhere", device="cpu", checkpoint_seconds=1.0)
    assert json.loads(json.dumps(OPTIONS.identity())) == OPTIONS.identity() == other.identity()


def test_a_difference_names_nested_options() -> None:
    now = TrainOptions(input=OPTIONS.input, output="model", seed=3, loss_weights={"align": 0.5})
    assert difference(OPTIONS.identity(), now.identity()) == ["loss_weights.align: None -> 0.5", "seed: 0 -> 3"]


# examples


def test_a_caption_is_composed_of_the_clauses_of_the_kept_modalities() -> None:
    whole = example(0, clauses=True)
    assert whole.keeping(FUSION_MODALITIES).caption == "a cat, with a meow, at home."
    assert whole.keeping(("text", "image")).caption == "a cat, at home."
    assert whole.keeping(("text", "image")).make().text == "image text"
    assert example(0).keeping(("audio",)).caption == "a cat."  # it has no clauses


def test_a_caption_whose_clauses_are_all_dropped_stays_whole() -> None:
    partial = Example(
        key="0",
        caption="a cat.",
        present=frozenset(FUSION_MODALITIES),
        request=lambda kept: Request(),
        clauses={"image": "a cat"},
    )
    assert partial.keeping(("audio",)).caption == "a cat."


def test_clauses_keep_strings_of_known_modalities() -> None:
    assert clauses_of({"image": "a cat", "audio": 3, "video": "b"}) == {"image": "a cat"}
    assert [clauses_of(value) for value in (None, "a", {}, {"audio": ""})] == [None] * 4


# batches


@given(lengths=st.lists(st.integers(1, 30), max_size=200), batch_size=st.integers(1, 7), dropout=st.floats(0, 0.9))
def test_batches_hold_every_example_once_and_only_the_last_is_short(
    lengths: list[int], batch_size: int, dropout: float
) -> None:
    examples = [example(number, "a" * length) for number, length in enumerate(lengths)]
    for batches in (
        list(training_batches(examples, batch_size, dropout, (1, 2))),
        list(evaluation_batches(examples, batch_size)),
    ):
        assert sorted(int(item.key) for batch in batches for item in batch) == list(range(len(examples)))
        sizes = sorted(map(len, batches), reverse=True)
        assert all(size == batch_size for size in sizes[:-1])


def test_batches_hold_similar_lengths_in_a_seeded_random_order() -> None:
    rng = np.random.default_rng(0)
    examples = [example(number, "a" * int(length)) for number, length in enumerate(rng.integers(1, 400, 256))]

    def keys(seed: tuple[int, int]) -> list[list[str]]:
        return [[item.key for item in batch] for batch in training_batches(examples, 16, 0.0, seed)]

    first, again, other = keys((0, 0)), keys((0, 0)), keys((0, 1))
    assert first == again != other
    lengths = [[len(examples[int(key)].caption) for key in batch] for batch in first]
    assert np.mean([max(batch) - min(batch) for batch in lengths]) < 60  # in random batches 376
    assert [sum(batch) for batch in lengths] != sorted(sum(batch) for batch in lengths)


def test_the_shuffle_buffer_is_limited_in_bytes() -> None:
    pulled: list[int] = []

    def large() -> Iterator[Example]:
        for number in range(BUFFER_BATCHES * 4):
            pulled.append(number)
            yield replace(example(number), nbytes=100 << 20)

    next(training_batches(large(), 4, 0.0, (0, 0)))
    assert len(pulled) == 4


@given(st.floats(0, 0.99), st.integers(0, 1000))
def test_modality_dropout_keeps_a_modality_of_every_sample(probability: float, seed: int) -> None:
    examples = [
        example(number, clauses=True).keeping(kept) for number, kept in enumerate([FUSION_MODALITIES, ("text",)] * 5)
    ]
    for before, after in zip(
        examples, drop_modalities(examples, probability, np.random.default_rng(seed)), strict=True
    ):
        assert after.present
        assert after.present <= before.present
        assert before.clauses is not None
        assert after.caption == compose(before.clauses, after.present)


def test_modalities_are_dropped_with_the_requested_probability() -> None:
    examples = drop_modalities([example(number) for number in range(4000)], 0.2, np.random.default_rng(0))
    counts = Counter(modality for item in examples for modality in item.present)
    assert all(abs(counts[modality] / 4000 - 0.8) < 0.03 for modality in FUSION_MODALITIES)


class Words:
    """A processor whose only input is the number of words of a request."""

    def __call__(
        self, requests: Sequence[Request], device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        return {"words": torch.tensor([len((request.text or "").split()) for request in requests])}

    def labels(self, captions: Sequence[str], device: torch.device, max_length: int | None = None) -> torch.Tensor:
        return torch.tensor([[len(caption)] for caption in captions])

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [""] * len(ids)


def test_a_batch_holds_inputs_labels_and_group_numbers() -> None:
    groups = ["x", None, "y", "x", None]
    batch = collate([example(n, group=group) for n, group in enumerate(groups)], Words(), torch.device("cpu"), 8)
    assert batch.inputs["words"].tolist() == [3] * 5
    assert batch.labels.tolist() == [[6]] * 5
    assert batch.groups is not None
    x, _, y, _, _ = batch.groups.tolist()
    assert batch.groups.tolist() == [x, -1, y, x, -1]
    assert x != y >= 0
    other = collate([example(7, group="y")], Words(), torch.device("cpu"), 8)
    assert other.groups is not None
    assert other.groups.tolist() == [y]
    assert collate([example(0)], Words(), torch.device("cpu"), 8).groups is None


def test_prefetch_makes_items_ahead_and_its_thread_ends_with_the_generator() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = prefetch_batches(numbers, depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(made) == 4  # one taken, two in the queue, one waiting to be put
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "mmbeam-batches"]


def test_prefetch_raises_errors_of_its_thread_in_the_consumer() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise TrainingError("no more")

    items = prefetch_batches(broken)
    assert next(items) == 1
    with pytest.raises(TrainingError, match="no more"):
        next(items)


# the corpus as a source


def test_every_epoch_and_split_of_the_corpus_has_different_scenes() -> None:
    source = CorpusSource(seed=5, epoch_size=10, evaluation_size=4)
    epochs = [[item.key for item in source.examples("train", epoch)] for epoch in (0, 1)]
    parts = [[item.key for item in source.examples(part)] for part in ("validation", "test")]
    assert [len(keys) for keys in (*epochs, *parts)] == [10, 10, 4, 4]
    assert len({key for keys in (*epochs, *parts) for key in keys}) == 28
    assert source.count("train") == 10


def test_a_scene_renders_only_the_kept_modalities() -> None:
    scene = next(generate_scenes(0))
    request = scene_example(scene).keeping(("image", "text")).make()
    assert request.image is not None
    assert request.image.shape == (64, 64, 3)
    assert (request.audio, bool(request.text)) == (None, True)


# optimizer and schedule


@given(st.sampled_from(SCHEDULES), st.integers(2, 500), st.integers(0, 100))
def test_the_learning_rate_rises_then_falls(schedule: str, total: int, warmup: int) -> None:
    factors = [learning_rate_factor(step, total, warmup, schedule) for step in range(total)]  # type: ignore[arg-type]
    peak = min(warmup, total)
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if warmup and warmup <= total:
        assert factors[warmup - 1] == 1


def test_the_schedules_have_their_final_factors() -> None:
    assert [round(learning_rate_factor(99, 100, 0, name), 3) for name in SCHEDULES] == [0.0, 0.01, 1.0]
    assert learning_rate_factor(50, 100, 0, "cosine") == pytest.approx(0.5)
    assert warmup_steps(OPTIONS, 1000) == 50


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_optimizer_decays_only_matrices_and_leaves_out_frozen_weights(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    optimizer = make_optimizer(model, TrainOptions(input=("a",), output="b", optimizer=name))  # type: ignore[arg-type]
    assert [[len(group["params"]), group["weight_decay"]] for group in optimizer.param_groups] == [[1, 0.01], [3, 0.0]]


# checkpoints


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_optimizer_resumes_from_its_checkpoint_bit_for_bit(name: str, tmp_path: Path) -> None:
    options = TrainOptions(input=("a",), output="b", optimizer=name, learning_rate=0.1)  # type: ignore[arg-type]

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.rand(5, 3)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, options)
    steps(model, optimizer, 3)
    tensors = {
        **checkpoint.prefixed("model", model.state_dict()),
        **checkpoint.prefixed("optimizer", checkpoint.optimizer_tensors(optimizer)),
        **checkpoint.prefixed("random", checkpoint.random_tensors()),
    }
    checkpoint.save(tmp_path / "at", tensors, {"step": 3})
    steps(model, optimizer, 3)

    other = nn.Linear(3, 2)
    again = make_optimizer(other, options)
    loaded, facts = checkpoint.load(tmp_path / "at")
    other.load_state_dict(checkpoint.without_prefix("model", loaded))
    checkpoint.restore_optimizer(again, checkpoint.without_prefix("optimizer", loaded))
    checkpoint.restore_random(checkpoint.without_prefix("random", loaded))
    steps(other, again, 3)
    assert facts == {"step": 3}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_tied_tensors_are_saved(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    checkpoint.save(tmp_path / "at", {"a": shared, "b": shared[1:3]}, {})
    loaded, _ = checkpoint.load(tmp_path / "at")
    assert (loaded["a"].tolist(), loaded["b"].tolist()) == ([0, 1, 2, 3], [1, 2])


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "at"
    checkpoint.save(path, {"a": torch.zeros(3)}, {"step": 1})
    monkeypatch.setattr(checkpoint.os, "fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"a": torch.ones(3)}, {"step": 2})
    assert checkpoint.load(path)[1] == {"step": 1}


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95pickle", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_file_that_is_not_a_checkpoint_is_rejected(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "at").write_bytes(content)
    with pytest.raises(TrainingError, match=r"not a checkpoint of mmbeam train .*remove the file"):
        checkpoint.load(tmp_path / "at")


# the journal


def test_the_journal_drops_later_steps_and_a_truncated_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(1, 41):
        journal.step(step, 1 / step, 0.1)
    with journal.path.open("a") as file:
        file.write('{"step": 5')
    journal.cut(20)
    assert [line["step"] for line in Journal(tmp_path).lines()] == [10, 20]


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    validation = {"loss": 2.0, "exact_match": 0.25}
    plot(
        [{"step": 10, "loss": 3.0}, {"epoch": 0, "step": 10, "train": {"caption": 2.5}, "validation": validation}],
        tmp_path / "loss.png",
    )
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# scores


@pytest.mark.parametrize(
    ("reference", "written", "counts"),
    [
        ("a red cat.", "a red cat.", (3, 3)),
        ("a red cat.", "a blue cat.", (2, 3)),
        ("a red cat.", "a cat.", (1, 3)),
        ("a cat.", "a cat. and more", (2, 4)),
        ("a cat.", "", (0, 2)),
    ],
)
def test_words_are_compared_by_position(reference: str, written: str, counts: tuple[int, int]) -> None:
    assert count_words(reference, written) == counts


def test_every_word_of_the_corpus_has_a_class() -> None:
    scenes = list(generate_scenes(1, count=200))
    written = [(item, item.caption.replace("red", "blue")) for item in map(scene_example, scenes)]
    shares = word_classes(scenes, written)
    assert set(shares) == {
        *("form", "colour", "size", "position", "kind", "pitch", "tempo", "loudness", "place", "time", "grammar")
    }
    assert {name for name, share in shares.items() if share < 1} == {"colour"}
    words = single_words(written)
    assert {word for word, share in words.items() if share < 1} == {"red"}
    assert set(words) <= set(VOCABULARY)
    audio_only = [item.keeping(("audio",)) for item, _ in written]
    assert word_classes(scenes, [(item, item.caption) for item in audio_only]) == dict.fromkeys(
        ("grammar", "kind", "loudness", "pitch", "tempo"), 1.0
    )


# retrieval and views

SOURCES: dict[str, dict[str, object]] = {
    "a_embedding": {"modality": "image", "kind": "features", "width": 6},
    "b_embedding": {"modality": "audio", "kind": "features", "width": 6},
}


def feature_batch(values: torch.Tensor, examples: Sequence[Example], missing: int = 0) -> TrainingBatch:
    mask = torch.ones(len(values), dtype=torch.bool)
    mask[:missing] = False
    inputs = {"a_embedding": values, "a_embedding_mask": mask, "b_embedding": values, "b_embedding_mask": mask}
    return TrainingBatch(
        inputs=inputs, labels=torch.zeros(len(values), 2, dtype=torch.int64), groups=None, examples=examples
    )


def recall_of(pairs: list[list[str]], examples: Sequence[Example], tie: bool = True) -> dict[str, float]:
    torch.manual_seed(0)
    config = FusionConfig(sources=SOURCES, pairs=pairs, vocab_size=8, hidden_size=16, dropout=0.0, embedding_dim=16)
    model = FusionModel(config).eval()
    if tie:  # give both sources the same weights
        model.encoders["b_embedding"].load_state_dict(model.encoders["a_embedding"].state_dict())
        model.space.project["b_embedding"].load_state_dict(model.space.project["a_embedding"].state_dict())
    retrieval = Retrieval(model)
    with torch.no_grad():
        retrieval.add(feature_batch(torch.randn(len(examples), 6), examples, missing=2))
    return retrieval.recall()


def test_recall_is_1_for_sources_with_the_same_embeddings() -> None:
    examples = [example(number, f"caption {number}") for number in range(40)]
    names = {"a_embedding->b_embedding cosine", "b_embedding->a_embedding cosine"}
    pair = [["a_embedding", "b_embedding"]]
    assert recall_of(pair, examples) == dict.fromkeys(names, 1.0)
    assert max(recall_of(pair, examples, tie=False).values()) < 0.5


def test_a_candidate_with_the_same_caption_is_a_hit() -> None:
    examples = [example(number, "one caption for all") for number in range(40)]
    assert min(recall_of([["a_embedding", "b_embedding"]], examples, tie=False).values()) == 1.0


def test_recall_within_a_source_is_by_view_or_by_group() -> None:
    alone = [example(number, f"caption {number}") for number in range(40)]
    views = recall_of([["a_embedding", "a_embedding"]], alone)
    assert views["a_embedding->a_embedding (another view) cosine"] > 0.5
    together = [example(number, group="same" if number < 39 else None) for number in range(40)]
    groups = recall_of([["a_embedding", "a_embedding"]], together)
    assert groups["a_embedding->a_embedding cosine"] > 0.8


def test_views_change_values_slightly_and_mask_no_whole_sample() -> None:
    config = FusionConfig.for_media(vocab_size=300)
    inputs = {
        "image": torch.rand(3, 3, 64, 64) * 2 - 1,
        "image_mask": torch.ones(3, dtype=torch.bool),
        "audio": torch.zeros(3, 1),
        "audio_mask": torch.zeros(3, dtype=torch.bool),
        "text": torch.full((3, 5), 7),
        "text_mask": torch.tensor([[True] * 5, [True] + [False] * 4, [False] * 5]),
    }
    sources = config.parsed_sources()
    for seed in range(20):
        views = make_views(sources, ["image", "audio", "text"], inputs, torch.Generator().manual_seed(seed))
        assert set(views) == {"image", "image_mask", "text", "text_mask"}
        assert views["image"].shape == (3, 3, 64, 64)
        assert 0 < (views["image"] - inputs["image"]).abs().mean() < 1
        assert views["text_mask"].any(1).tolist() == [True, True, False]
        assert (views["text_mask"] <= inputs["text_mask"]).all()


# search


def pretrained(modality: Modality, model_type: str) -> SourceConfig:
    return SourceConfig(modality=modality, kind="pretrained", model={"model_type": model_type})


@pytest.mark.parametrize(
    ("source", "shape", "axis"),
    [
        (SourceConfig(modality="audio", shape=(1, 40, 8), channels=(4,)), (1, 40, 8), 2),
        (pretrained("audio", "whisper"), (8, 40), 2),
        (pretrained("audio", "clap_audio_model"), (1, 40, 8), 2),
        (pretrained("audio", "audio-spectrogram-transformer"), (40, 8), 1),
    ],
    ids=lambda value: value.model["model_type"] if isinstance(value, SourceConfig) and value.model else "",
)
def test_a_view_of_audio_shifts_only_in_time(
    source: SourceConfig, shape: tuple[int, ...], axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for amount in ("CONTRAST", "BRIGHTNESS", "GRAIN"):
        monkeypatch.setattr(f"mmbeam.training.batching.{amount}", 0.0)
    time = torch.arange(40.0).view(*[-1 if place == axis else 1 for place in range(1 + len(shape))])
    values = (time + 1000 * torch.arange(8.0).view(*[-1 if size == 8 else 1 for size in (1, *shape)])).expand(6, *shape)
    inputs = {"audio": values, "audio_mask": torch.ones(6, dtype=torch.bool)}
    moved = make_views({"audio": source}, ["audio"], inputs, torch.Generator().manual_seed(0))["audio"]
    shifts = moved - values
    assert shifts.abs().max() <= 3  # a sixteenth of 40 frames; the bins stay
    assert len(shifts.select(axis, 20).flatten().unique()) > 1  # a shift per sample


def test_views_keep_the_scale_and_special_tokens_of_a_pretrained_encoder() -> None:
    decibels = 30 * torch.randn(4, 1, 40, 8) - 60
    sources = {"audio": pretrained("audio", "clap_audio_model"), "text": pretrained("text", "bert")}
    mask = torch.arange(9) < torch.tensor([9, 5, 2, 0])[:, None]
    inputs = {"audio": decibels, "audio_mask": torch.ones(4, dtype=torch.bool), "text": mask.long(), "text_mask": mask}
    hidden = []
    for seed in range(10):
        views = make_views(sources, sources, inputs, torch.Generator().manual_seed(seed))
        assert abs(float(views["audio"].mean()) + 60) < 12
        assert 20 < views["audio"].std() < 45
        seen = views["text_mask"]
        assert seen[:, 0].tolist() == [True, True, True, False]
        assert (seen[0, 8], seen[1, 4], seen[2, 1]) == (True, True, True)
        assert (seen <= mask).all()
        hidden.append(bool((seen != mask).any()))
    assert any(hidden)


def test_a_view_of_the_fused_vector_has_views_of_all_sources() -> None:
    sources = {name: SourceConfig.parse(name, source) for name, source in SOURCES.items()}
    examples = [example(number, f"caption {number}") for number in range(4)]
    inputs = feature_batch(torch.randn(4, 6), examples).inputs
    assert set(make_views(sources, ["fused"], inputs)) == set(inputs)
    assert make_views(sources, ["caption"], inputs) == {}


def test_a_search_tries_the_given_options_first_and_then_draws_within_the_space() -> None:
    options = TrainOptions(input=("a",), output="b", search=30)
    drawn = sample_trials(options)
    assert drawn == sample_trials(options) != sample_trials(TrainOptions(input=("a",), output="b", search=30, seed=1))
    assert (drawn[0], len(drawn)) == ({}, 30)
    for choice in drawn[1:]:
        assert all(span.low <= choice[name] <= span.high for name, span in SPACE.items())
        made = apply_changes(options, choice)
        assert (made.learning_rate, made.loss_weights["align"]) == (choice["learning_rate"], choice["align"])
    assert len({choice["learning_rate"] for choice in drawn[1:]}) > 20
