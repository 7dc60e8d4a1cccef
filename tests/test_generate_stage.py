"""The generate stage: on a tiny fusion model, and on a generator whose captions name the modalities they depend on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_generators import features, make_sample, save_fusion

from mmbeam.errors import DeviceError, ModelError, UsageError
from mmbeam.models.generators.base import Generator
from mmbeam.models.generators.fusion import FusionGenerator
from mmbeam.names import Modality
from mmbeam.prompts.ask import Decoding, Generated, GeneratorSpec, Instruction, Request, make_request
from mmbeam.stages.base import stream_seed
from mmbeam.stages.generate import GenerateStage, attribute, generate_stage
from mmbeam.types import Audio, Batch, Failure, Sample, WorkUnit

GREEDY = Decoding(max_new_tokens=12)
SAMPLING = Decoding(max_new_tokens=12, temperature=1.0, seed=7)
COLUMNS = ["caption", "caption_num_tokens", "caption_logprob"]
ATTRIBUTIONS = [f"caption_{modality}_attribution" for modality in ("image", "audio", "text")]


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fusion(tmp_path_factory.mktemp("model") / "fusion")


def batch_of(samples: Sequence[Sample], **changes: Any) -> Batch:
    return replace(Batch(unit=WorkUnit(id="u", inputs=()), index=0, last=True, samples=tuple(samples)), **changes)


def every_subset(count: int = 16) -> Batch:
    """Samples with every combination of modalities, in turn."""
    missing = ["", "image", "audio", "text", "image audio", "image text", "audio text", "image audio text"]
    return batch_of([make_sample(index, missing[index % len(missing)]) for index in range(count)])


def run(stage: GenerateStage, batch: Batch) -> Batch:
    return stage.run(stage.load(), batch)


def column(batch: Batch, name: str) -> list[Any]:
    values: list[Any] = batch.features[name].to_pylist()
    return values


@pytest.mark.parametrize(
    "decoding",
    [GREEDY, replace(GREEDY, num_beams=3), SAMPLING, replace(SAMPLING, top_p=0.8)],
    ids=["greedy", "beams", "sampling", "top-p"],
)
def test_captions_do_not_depend_on_the_batches(fusion: Path, decoding: Decoding) -> None:
    batch = every_subset()
    reversed_batch = replace(batch, samples=batch.samples[::-1])
    together = run(generate_stage(str(fusion), decoding=decoding, explain=True), batch)
    alone = run(generate_stage(str(fusion), decoding=decoding, explain=True, batch_size=1), reversed_batch)
    for name in COLUMNS[:2]:
        assert column(together, name) == column(alone, name)[::-1]
    for name in (COLUMNS[2], *ATTRIBUTIONS):
        values = [[-1.0 if value is None else value for value in column(result, name)] for result in (together, alone)]
        np.testing.assert_allclose(values[0], values[1][::-1], atol=1e-3)
    assert len(set(column(together, "caption"))) > 8


def test_a_sample_without_inputs_has_a_null_caption_and_no_failure(fusion: Path) -> None:
    result = run(generate_stage(str(fusion), decoding=GREEDY), every_subset())
    missing = [position for position, text in enumerate(column(result, "caption")) if text is None]
    assert missing == [7, 15]
    assert not result.failures
    for name in COLUMNS:
        assert [value is None for value in column(result, name)] == [i in missing for i in range(16)]
    nothing = batch_of([make_sample(0, "image audio text")] * 2)
    assert column(run(generate_stage(str(fusion), decoding=GREEDY), nothing), "caption") == [None, None]


def test_a_modality_that_cannot_be_decoded_fails_the_caption(fusion: Path) -> None:
    """Its failure is already recorded; a caption without the image would be misleading."""
    broken = replace(make_sample(0), image=None)
    failure = Failure(
        key="0", shard="s.tar", offset=0, modality="image", step="decode", error="DecodeError", message="cut short"
    )
    metadata = replace(failure, offset=512, modality="metadata")
    elsewhere = replace(failure, offset=1024, outputs=("clip_image_embedding",))
    batch = batch_of([broken, make_sample(1), make_sample(2)], failures=(failure, metadata, elsewhere))
    result = run(generate_stage(str(fusion), decoding=GREEDY), batch)
    assert [text is None for text in column(result, "caption")] == [True, False, False]
    assert result.failures == batch.failures


def test_required_modalities_decide_for_which_samples_a_text_is_due(fusion: Path) -> None:
    stage = generate_stage(str(fusion), decoding=GREEDY)
    stage = replace(stage, spec=replace(stage.spec, required=("audio",)))
    [output] = stage.outputs
    assert not output.is_due(frozenset({"image", "text"}))
    assert output.is_due(frozenset({"audio"}))
    result = run(stage, batch_of([make_sample(0), make_sample(1, "audio"), make_sample(2, "image text")]))
    assert [text is None for text in column(result, "caption")] == [False, True, False]


def test_random_streams_depend_on_seed_and_identity_only(fusion: Path) -> None:
    stage = generate_stage(str(fusion), decoding=SAMPLING)
    batch = batch_of([make_sample(0)] * 1)
    moved = batch_of([replace(make_sample(0), key="renamed")])
    first = column(run(stage, batch), "caption")
    assert column(run(stage, moved), "caption") == first
    seeds = {stream_seed(seed, shard, offset) for seed in (0, 1) for shard in ("a", "b") for offset in (0, 512)}
    assert len(seeds) == 8
    assert stream_seed(0, "a.tar", 0) == stream_seed(0, "a.tar", 0)
    texts = {
        column(run(generate_stage(str(fusion), decoding=replace(SAMPLING, seed=seed)), batch), "caption")[0]
        for seed in range(6)
    }
    assert len(texts) > 2


def change(monkeypatch: pytest.MonkeyPatch, before: Any) -> None:
    """Call `before`, which may raise, with the requests of each batch."""
    real = FusionGenerator.generate

    def changed(self: FusionGenerator, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        before(requests)
        return real(self, requests, decoding)

    monkeypatch.setattr(FusionGenerator, "generate", changed)


def test_out_of_memory_halves_the_batch_and_is_counted(fusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(generate_stage(str(fusion), decoding=GREEDY), every_subset())

    def limited(requests: Sequence[Request]) -> None:
        if len(requests) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    change(monkeypatch, limited)
    halved = run(generate_stage(str(fusion), decoding=GREEDY), every_subset())
    assert column(halved, "caption") == column(whole, "caption")
    assert halved.tally.warnings["batches halved because memory ran out"] >= 3
    assert not halved.failures


def test_one_bad_sample_is_one_failure(fusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(generate_stage(str(fusion), decoding=GREEDY), every_subset())

    def selective(requests: Sequence[Request]) -> None:
        if any(request.text == whole.samples[4].text for request in requests):
            raise ValueError("unusable")

    change(monkeypatch, selective)
    result = run(generate_stage(str(fusion), decoding=GREEDY), every_subset())
    [failure] = result.failures
    assert (failure.key, failure.step, failure.error, failure.outputs) == ("4", "generate", "ValueError", ("caption",))
    expected = column(whole, "caption")
    assert column(result, "caption") == [None if index == 4 else text for index, text in enumerate(expected)]


def test_a_sample_that_cannot_be_weighed_does_not_affect_the_others(
    fusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(generate_stage(str(fusion), decoding=GREEDY), every_subset())
    weigh = FusionGenerator.weigh

    def selective(self: FusionGenerator, requests: Sequence[Request]) -> list[int]:
        if any(request.text == whole.samples[4].text for request in requests):
            raise ValueError("too heavy")
        return weigh(self, requests)

    monkeypatch.setattr(FusionGenerator, "weigh", selective)
    result = run(generate_stage(str(fusion), decoding=GREEDY), every_subset())
    assert column(result, "caption") == column(whole, "caption")


def test_a_model_that_always_fails_is_a_device_error(fusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(requests: Sequence[Request]) -> None:
        raise ValueError("no")

    change(monkeypatch, never)
    with pytest.raises(DeviceError, match="known to be good"):
        run(generate_stage(str(fusion), decoding=GREEDY), every_subset())


def test_nan_log_probabilities_are_failures(fusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FusionGenerator.generate

    def spoiled(self: FusionGenerator, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        texts = real(self, requests, decoding)
        return [
            replace(text, logprob=float("nan")) if request.text == make_sample(3).text else text
            for request, text in zip(requests, texts, strict=True)
        ]

    monkeypatch.setattr(FusionGenerator, "generate", spoiled)
    samples = [make_sample(index) for index in range(6)]
    result = run(generate_stage(str(fusion), decoding=GREEDY), batch_of(samples))
    assert [failure.key for failure in result.failures] == ["3"]
    assert "are not finite" in result.failures[0].message
    assert [text is None for text in column(result, "caption")] == [index == 3 for index in range(6)]


def test_an_attribution_that_is_not_finite_is_a_failure(fusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The maximum of 0 and NaN is 0 in Python."""
    real = FusionGenerator.score

    def spoiled(self: FusionGenerator, requests: Any, texts: Any) -> list[float]:
        is_spoiled = [request.text == make_sample(2).text for request in requests]
        return [
            float("nan") if spoil else score
            for spoil, score in zip(is_spoiled, real(self, requests, texts), strict=True)
        ]

    monkeypatch.setattr(FusionGenerator, "score", spoiled)
    result = run(
        generate_stage(str(fusion), decoding=GREEDY, explain=True), batch_of([make_sample(i) for i in range(4)])
    )
    assert [(failure.key, failure.error) for failure in result.failures] == [("2", "FloatingPointError")]


def test_texts_are_counted_whole_and_truncated_for_the_model(fusion: Path) -> None:
    stage = generate_stage(str(fusion), decoding=GREEDY)
    long = replace(make_sample(0), text="red " * 400)
    cut = replace(make_sample(0), text="red " * 16)
    result = run(stage, batch_of([long, replace(cut, offset=1), make_sample(2, "text")]))
    counts = column(result, "text_num_tokens")
    assert counts[0] > 400
    assert counts[2] is None
    assert column(result, "caption")[0] == column(result, "caption")[1]
    assert "text_num_tokens" not in run(replace(stage, count_tokens=False), batch_of([long])).features


def test_the_model_reads_the_cleaned_text(fusion: Path) -> None:
    stage = generate_stage(str(fusion), decoding=GREEDY)
    dirty = replace(make_sample(3), text="<b>RED</b> circle", text_clean="red circle")
    clean = replace(make_sample(3), text="red circle", offset=9)
    assert len(set(column(run(stage, batch_of([dirty, clean])), "caption"))) == 1


def test_images_are_filtered(fusion: Path) -> None:
    plain, blurred = (
        run(generate_stage(str(fusion), decoding=GREEDY, image_filter=f), every_subset(8))
        for f in (None, ("gaussian", 8.0))
    )
    changed = [
        a != b for a, b in zip(column(plain, "caption_logprob"), column(blurred, "caption_logprob"), strict=True)
    ]
    assert changed == ["image" in sample.present for sample in plain.samples]


def test_audio_decoded_for_its_length_only_counts_as_missing(fusion: Path) -> None:
    """It is decoded for a condition, or the rows are features."""
    duration_only = replace(make_sample(0), audio=Audio(waves={}, seconds=3.0))
    without = replace(make_sample(0, "audio"), offset=8)
    assert (
        len(
            set(
                column(run(generate_stage(str(fusion), decoding=GREEDY), batch_of([duration_only, without])), "caption")
            )
        )
        == 1
    )


def test_features_replace_media(tmp_path: Path) -> None:
    model = save_fusion(tmp_path, features(image_embedding=("image", 5, False), text_tokens=("text", 3, True)))
    stage = generate_stage(str(model), decoding=GREEDY, explain=True)
    assert stage.needs.modalities == frozenset()
    assert {(column.name, column.width, column.tokens) for column in stage.needs.columns} == {
        ("image_embedding", 5, False),
        ("text_tokens", 3, True),
    }
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=5).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)

    def sample(offset: int, present: Sequence[Modality], **of: np.ndarray[Any, Any]) -> Sample:
        return Sample(key=str(offset), shard="s", offset=offset, present=frozenset(present), features=of)

    batch = batch_of(
        [
            sample(0, ("image", "text"), image_embedding=image, text_tokens=text),
            sample(1, ("image",), image_embedding=image),
            sample(2, ("text",), text_tokens=text[:2]),
            sample(3, ()),
            sample(4, ("image",), image_embedding=np.ones(7, np.float32)),
        ]
    )
    result = run(stage, batch)
    assert [text is None for text in column(result, "caption")] == [False, False, False, True, True]
    assert [failure.key for failure in result.failures] == ["4"]
    assert column(result, "caption_image_attribution")[1:3] == [1.0, None]
    assert sum(
        column(result, name)[0] for name in ("caption_image_attribution", "caption_text_attribution")
    ) == pytest.approx(1)


# Attribution


class Clauses(Generator):
    """Writes one clause per modality present. A clause is certain with its modality, and unlikely without."""

    WITHOUT: Mapping[Modality, float] = {"image": -6.0, "audio": -3.0, "text": -1.0}
    CLAUSES: Mapping[Modality, str] = {"image": "a red circle", "audio": "a low tone", "text": "says yes"}

    def __init__(self, modalities: Sequence[Modality], ignores: Modality | None = None) -> None:
        spec = GeneratorSpec(family="clauses", directory="", modalities=tuple(modalities))
        super().__init__(spec, torch.device("cpu"), torch.float32)
        self.ignores = ignores

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[Generated]:
        return [self._write(request) for request in requests]

    def _write(self, request: Request) -> Generated:
        clauses = [
            self.CLAUSES[m] for m in self.spec.modalities if getattr(request, m) is not None and m != self.ignores
        ]
        return Generated(text=", ".join(clauses), token_ids=(), num_tokens=len(clauses), logprob=0.0)

    def score(self, requests: Sequence[Request], texts: Sequence[Generated]) -> list[float]:
        return [
            sum(
                lost
                for modality, lost in self.WITHOUT.items()
                if self.CLAUSES[modality] in text.text and getattr(request, modality) is None
            )
            for request, text in zip(requests, texts, strict=True)
        ]


FULL = Request(image=np.zeros((1, 1, 3), np.uint8), audio=(np.zeros(1, np.float32), 8000), text="yes")


@pytest.mark.parametrize(
    ("request_", "ignores", "expected"),
    [
        (FULL, None, {"image": 0.6, "audio": 0.3, "text": 0.1}),
        (replace(FULL, image=None), None, {"audio": 0.75, "text": 0.25}),
        (replace(FULL, image=None, audio=None), None, {"text": 1.0}),
        (FULL, "image", {"image": 0.0, "audio": 0.75, "text": 0.25}),
        (Request(), None, {}),
    ],
)
def test_a_clause_is_attributed_to_its_modality(
    request_: Request, ignores: Modality | None, expected: Mapping[Modality, float]
) -> None:
    model = Clauses(("image", "audio", "text"), ignores)
    requests = [FULL, request_, Request(text="yes")]
    attribution = attribute(model, requests, model.generate(requests, GREEDY))[1]
    assert attribution == pytest.approx(expected)


def test_a_caption_that_loses_nothing_has_no_attribution() -> None:
    model = Clauses(("audio", "text"), ignores="audio")
    model.CLAUSES = {"audio": "", "text": "said", "image": "-"}
    model.score = lambda requests, texts: [0.5 for _ in requests]  # type: ignore[method-assign] # a gain
    requests = [replace(FULL, image=None)]
    assert attribute(model, requests, model.generate(requests, GREEDY)) == [{"audio": 0.0, "text": 0.0}]


def test_attribution_of_a_real_model_follows_from_its_scores(fusion: Path) -> None:
    stage = generate_stage(str(fusion), decoding=GREEDY, explain=True)
    model = stage.load()
    batch = batch_of([make_sample(index) for index in range(4)])
    result = stage.run(model, batch)
    requests = [make_request(sample, stage.spec, stage.instruction, 0) for sample in batch.samples]
    texts = model.generate(requests, GREEDY)
    for row, (request, text) in enumerate(zip(requests, texts, strict=True)):
        lost = {
            m: max(0.0, text.logprob - model.score([replace(request, **{m: None})], [text])[0])
            for m in ("image", "audio", "text")
        }
        attribution = [column(result, f"caption_{m}_attribution")[row] for m in lost]
        assert attribution == pytest.approx([loss / sum(lost.values()) for loss in lost.values()], abs=1e-3)


# Errors


@pytest.mark.parametrize(
    ("decoding", "words"),
    [
        (Decoding(num_beams=2, temperature=1.0), "mutually exclusive"),
        (Decoding(temperature=0.0), "`temperature` 0.0"),
        (Decoding(temperature=float("nan")), "`temperature` nan"),
        (Decoding(top_p=0.5), "`top_p` 0.5"),
        (Decoding(temperature=1.0, top_p=0.0), "`top_p` 0.0"),
        (Decoding(max_new_tokens=0), "at least 1"),
        (Decoding(max_new_tokens=33), "at most 32"),
    ],
)
def test_invalid_or_contradictory_decoding_is_an_error(fusion: Path, decoding: Decoding, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        generate_stage(str(fusion), decoding=decoding)


def test_the_models_longest_text_is_supported(fusion: Path) -> None:
    result = run(generate_stage(str(fusion), decoding=Decoding(max_new_tokens=32)), every_subset())
    assert max(filter(None, column(result, "caption_num_tokens"))) <= 32
    assert not result.failures


def test_a_task_names_the_columns(fusion: Path) -> None:
    stage = replace(generate_stage(str(fusion), decoding=GREEDY), instruction=Instruction(task="summarize"))
    result = run(stage, every_subset(8))
    assert [column.name for column in stage.outputs[0].columns] == ["summary", "summary_num_tokens", "summary_logprob"]
    assert set(result.features) == {"summary", "summary_num_tokens", "summary_logprob", "text_num_tokens"}


def test_a_model_with_a_required_modality_cannot_be_explained(fusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FusionGenerator.describe
    monkeypatch.setattr(
        FusionGenerator,
        "describe",
        classmethod(lambda cls, directory, config: replace(real(directory, config), required=("image",))),
    )
    with pytest.raises(UsageError, match="requires image"):
        generate_stage(str(fusion), decoding=GREEDY, explain=True)


def test_files_that_changed_since_launch_are_not_loaded(tmp_path: Path) -> None:
    stage = generate_stage(str(save_fusion(tmp_path)), decoding=GREEDY)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="found different files"):
        stage.load()


def test_embed_and_generate_stages_do_not_share_a_loaded_model(fusion: Path) -> None:
    from mmbeam.stages.embed import embed_stage

    assert embed_stage(str(fusion)).key != generate_stage(str(fusion), decoding=GREEDY).key
