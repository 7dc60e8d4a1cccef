"""The fusion model in every configuration: training, saving and loading, masking, generation."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_fusion import (
    BATCH,
    KINDS,
    SIDE,
    SIZES,
    TOKENS,
    VOCABULARY,
    media,
    only,
    spoiled,
    tiny_config,
    tiny_inputs,
    tiny_labels,
    tiny_model,
)
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import BaseModelOutput

from mmbeam.errors import ModelError
from mmbeam.models.fusion import FusionConfig, FusionModel
from mmbeam.models.fusion.configuration import MASK, feature_source
from mmbeam.models.fusion.encoders import run_rnn
from mmbeam.models.loading import load_pretrained
from mmbeam.names import FUSION_MODALITIES, FUSIONS, GENERATOR_KINDS

CPU = torch.device("cpu")
SUBSETS = [s for size in range(4) for s in itertools.combinations(FUSION_MODALITIES, size)]
EVERY_LOSS = {"align": 0.1, "reconstruct": 0.1, "modality_adversary": 0.1}
FEATURES: dict[str, tuple[Any, int, bool]] = {
    "clip_image_embedding": ("image", 12, False),
    "dino_image_tokens": ("image", 20, True),
    "clap_audio_embedding": ("audio", 8, False),
    "bert_text_embedding": ("text", 10, False),
    "t5_text_tokens": ("text", 6, True),
}


def features_of(*names: str) -> dict[str, Any]:
    return {name: feature_source(*FEATURES[name]) for name in names or FEATURES}


MAKES: dict[str, dict[str, Any]] = {
    **{fusion: {"fusion": fusion} for fusion in FUSIONS},
    "lstm": {"generator_kind": "lstm"},
    **{f"encoders-{kind}": {"sources": media(kind)} for kind in KINDS},
    "features": {"sources": features_of()},
    "features-bilinear": {"sources": features_of(), "fusion": "bilinear"},
}


@pytest.fixture(scope="module", params=MAKES)
def model(request: pytest.FixtureRequest) -> FusionModel:
    return tiny_model(**MAKES[request.param])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generator", GENERATOR_KINDS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_configuration_trains_all_parameters_and_reloads_unchanged(
    fusion: str, generator: str, kind: str, tmp_path: Path
) -> None:
    model = tiny_model(media(kind), fusion=fusion, generator_kind=generator)
    inputs, labels = tiny_inputs(model), tiny_labels()
    with torch.no_grad():
        before = model(labels=labels, **inputs)
    assert before.logits.shape == (BATCH, TOKENS, VOCABULARY)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    for again in (load_pretrained(FusionModel, tmp_path, CPU, torch.float32), AutoModel.from_pretrained(tmp_path)):
        assert type(again) is FusionModel
        with torch.no_grad():
            after = again(labels=labels, **inputs)
        torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
        torch.testing.assert_close(after.logits, before.logits, rtol=1e-5, atol=1e-5)  # the alignment in memory differs
        torch.testing.assert_close(after.losses, before.losses, rtol=1e-5, atol=1e-5)
    model.train()(labels=labels, **inputs).loss.backward()
    still = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert still <= {name for name in still if name.endswith("bias")}, "no gradient"
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


def test_feature_sources_train_all_parameters() -> None:
    model = tiny_model(
        features_of(), pairs=[["clip_image_embedding", "bert_text_embedding"], ["fused", "t5_text_tokens"]]
    )
    model.train()(labels=tiny_labels(), **tiny_inputs(model)).loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("order", list(itertools.permutations(FUSION_MODALITIES))[1:])
def test_order_of_sources_does_not_matter(order: Sequence[str], tmp_path: Path) -> None:
    model = tiny_model(fusion="concat")
    inputs, labels = tiny_inputs(model), tiny_labels()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["sources"] = {name: config["sources"][name] for name in order}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_pretrained(FusionModel, tmp_path, CPU, torch.float32)
    turned = {name: inputs[name] for name in reversed(inputs)}
    torch.testing.assert_close(again(labels=labels, **turned).loss, model(labels=labels, **inputs).loss, rtol=0, atol=0)


# Masking


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_masked_source_equals_omitted_source(fusion: str, training: bool) -> None:
    model = tiny_model(fusion=fusion, loss_weights=EVERY_LOSS).train(training)
    for present in SUBSETS:
        absent = [name for name in FUSION_MODALITIES if name not in present]
        masked = spoiled(tiny_inputs(model), {name: torch.ones(BATCH, dtype=torch.bool) for name in absent})
        first = _outcome(model, masked)
        assert first["loss"].isfinite()
        assert set(model.encode(**masked).embeddings) == {*present, "fused"}
        grew = {name.split(".")[1] for name in first if name.startswith("encoders")}
        assert grew == ({*present, "text"} if present else set())  # the text encoder also encodes captions
        if present:  # without inputs the batch size is unknown
            left_out = {name: value for name, value in masked.items() if name.removesuffix(MASK) in present}
            torch.testing.assert_close(_outcome(model, left_out), first, rtol=0, atol=0)


def test_gated_fusion_ignores_missing_sources() -> None:
    model = tiny_model(fusion="gated")
    inputs = tiny_inputs(model)
    model(labels=tiny_labels(), text=inputs["text"], text_mask=inputs["text" + MASK]).loss.backward()
    learned = [any(value.grad.any() for value in part.parameters()) for part in model.fuser.values]
    assert learned == [False, False, True]  # image, audio, text: not even their biases


def test_none_equals_omitted_input() -> None:
    model = tiny_model(loss_weights=EVERY_LOSS)
    text = {name: value for name, value in tiny_inputs(model).items() if name.startswith("text")}
    none = {"image": None, "audio": None, "audio_mask": None}
    torch.testing.assert_close(_outcome(model, text | none), _outcome(model, text), rtol=0, atol=0)


def _outcome(model: FusionModel, inputs: Any) -> dict[str, torch.Tensor]:
    """Return the output of a call in training mode, with a fixed seed, and the gradients."""
    torch.manual_seed(5)
    model.zero_grad()
    out = model(labels=tiny_labels(len(next(iter(inputs.values())))), **inputs)
    out.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"loss": out.loss, "logits": out.logits, **out.losses, **gradients}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_masked_values_do_not_matter(model: FusionModel, training: bool) -> None:
    model.train(training)
    names = list(model.sources)
    rows = torch.arange(BATCH)
    absent = {name: rows % len(names) == place for place, name in enumerate(names)}
    nonsense = spoiled(tiny_inputs(model), absent)
    zeros = {name: value.clone() for name, value in nonsense.items()}
    for name in names:
        zeros[name][absent[name]] = 0
    first = _outcome(model, nonsense)
    torch.testing.assert_close(_outcome(model, zeros), first, rtol=0, atol=0)
    assert all(value.isfinite().all() for value in first.values())


def test_padding_does_not_matter(model: FusionModel) -> None:
    inputs = tiny_inputs(model)
    clean = _outcome(model.eval(), inputs)
    for name, source in model.sources.items():
        if inputs[name + MASK].dim() > 1:
            values = inputs[name].clone()
            values[~inputs[name + MASK]] = 7 if source.kind != "features" else float("nan")
            inputs[name] = values
    torch.testing.assert_close(_outcome(model.eval(), inputs), clean, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_mask_inside_a_text_hides_that_token_only(kind: str) -> None:
    model = tiny_model(media("conv", text=kind))
    mask = torch.tensor([[True, True, False, True]])
    words = torch.tensor([[5, 6, 7, 8]])

    def read(words: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.encode(text=words, text_mask=mask).embeddings["text"]

    whole = read(words)
    torch.testing.assert_close(read(torch.tensor([[5, 6, 30, 8]])), whole, rtol=0, atol=0)
    assert (read(torch.tensor([[5, 6, 7, 30]])) - whole).abs().max() > 1e-3
    other_order = (read(torch.tensor([[6, 5, 7, 8]])) - whole).abs().max()
    assert other_order > 1e-4


def _mixed(model: FusionModel) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """Return a batch whose samples have different sources, including none, and these sources."""
    names = list(model.sources)
    inputs = tiny_inputs(model, batch=6)
    kept = [names, names[:1], names[1:], names[-1:], names[::2], []]
    absent = {name: torch.tensor([name not in names for names in kept]) for name in names}
    return spoiled(inputs, absent), kept


@torch.inference_mode()
def test_sample_in_a_batch_equals_sample_alone(model: FusionModel) -> None:
    model.eval()
    inputs, kept = _mixed(model)
    labels = tiny_labels(len(kept))
    together = model(labels=labels, **inputs).logits
    encoding = model.encode(**inputs)
    for row, names in enumerate(kept):
        alone = only(inputs, row, names or list(model.sources))
        length = (labels[row] != -100).sum()
        logits = model(labels=labels[row : row + 1, :length], **alone).logits
        torch.testing.assert_close(together[row, :length], logits[0], rtol=1e-4, atol=1e-4)
        for name, embedding in model.encode(**alone).embeddings.items():
            torch.testing.assert_close(encoding.embeddings[name][row], embedding[0], rtol=1e-4, atol=1e-4)
        assert {name for name, rows in encoding.present.items() if rows[row]} == {*names, *(["fused"] if names else [])}
    assert (together[0] - together[-1]).abs().max() > 0.01  # the sources matter


@torch.inference_mode()
def _writes_alone(model: FusionModel, **how: Any) -> None:
    inputs, kept = _mixed(model)
    together = model.generate(**inputs, max_new_tokens=8, **how)
    assert together[:, 0].tolist() == [1] * len(kept)
    for row, names in enumerate(kept):
        alone = model.generate(**only(inputs, row, names or list(model.sources)), max_new_tokens=8, **how)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
        assert set(together[row, len(alone) :].tolist()) <= {0, 2}  # beam search pads with the end-of-text token
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_batched_generation_equals_single_generation(model: FusionModel) -> None:
    _writes_alone(model.eval())


@pytest.mark.parametrize("generator", GENERATOR_KINDS)
def test_batched_beam_search_equals_single_beam_search(generator: str) -> None:
    _writes_alone(tiny_model(generator_kind=generator, fusion="gated"), num_beams=3)


# Generation


@pytest.mark.parametrize("generator", GENERATOR_KINDS)
def test_greedy_generation_chooses_the_most_likely_token(generator: str) -> None:
    model = tiny_model(generator_kind=generator)
    inputs = tiny_inputs(model)
    written = model.generate(**inputs, max_new_tokens=8)
    for row, words in enumerate(written.tolist()):
        end = words.index(2) if 2 in words else len(words) - 1
        with torch.no_grad():
            logits = model(decoder_input_ids=written[row : row + 1, :end], **only(inputs, row)).logits[0]
        assert logits.argmax(-1).tolist() == words[1 : end + 1]


def test_beam_search_scores_at_least_as_high_as_greedy() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model, batch=8)

    def logprobs(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scores = model(decoder_input_ids=ids[:, :-1], **inputs).logits.log_softmax(-1)
        chosen: torch.Tensor = scores.gather(2, ids[:, 1:, None])[..., 0].sum(1)
        return chosen

    length: dict[str, Any] = {"min_new_tokens": 4, "max_new_tokens": 4}
    greedy = logprobs(model.generate(**inputs, **length))
    beams = logprobs(model.generate(**inputs, num_beams=20, **length))
    assert (beams >= greedy - 1e-4).all()
    assert (beams > greedy + 1e-3).any()


@pytest.mark.parametrize("generator", GENERATOR_KINDS)
def test_sampling_depends_on_the_seed(generator: str) -> None:
    model = tiny_model(generator_kind=generator)
    inputs = only(tiny_inputs(model), 0)
    torch.manual_seed(0)
    drawn = model.generate(**inputs, max_new_tokens=1, do_sample=True, top_k=0, num_return_sequences=2000)[:, 1]
    with torch.no_grad():
        truth = model(decoder_input_ids=torch.tensor([[1]]), **inputs).logits[0, -1].softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=VOCABULARY) / 2000, truth, rtol=0, atol=0.05)
    assert len(set(drawn.tolist())) > 5


def test_static_cache_generates_the_same() -> None:
    model = tiny_model()
    inputs, _ = _mixed(model)
    dynamic = model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, cache_implementation="static"), dynamic)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, use_cache=False), dynamic)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("generator", GENERATOR_KINDS)
def test_precomputed_memory_generates_and_scores_the_same(generator: str, how: dict[str, Any]) -> None:
    model = tiny_model(generator_kind=generator)
    inputs, _ = _mixed(model)
    with torch.no_grad():
        encoding = model.encode(**inputs)
        made: dict[str, Any] = {"encoder_outputs": (encoding.memory,), "attention_mask": encoding.memory_mask}
        labels = tiny_labels(6)
        torch.testing.assert_close(model(labels=labels, **made).logits, model(labels=labels, **inputs).logits)
    made["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoding.memory)
    expected = model.generate(**inputs, max_new_tokens=8, **how)
    assert torch.equal(model.generate(**made, max_new_tokens=8, **how), expected)


# Configuration


def test_two_text_sources_are_both_used() -> None:
    texts = {
        name: {"modality": "text", "kind": kind, "layers": 1} for name, kind in (("text", "lstm"), ("text2", "conv"))
    }
    model = tiny_model(texts)
    inputs, labels = tiny_inputs(model), tiny_labels()
    with torch.no_grad():
        both = model(labels=labels, **inputs).logits
        for name in texts:
            alone = model(labels=labels, **{name: inputs[name], name + MASK: inputs[name + MASK]}).logits
            assert (alone - both).abs().max() > 0.01
    assert ("text", "text2") in model.pairs


def test_every_feature_column_is_used() -> None:
    model = tiny_model(features_of())
    inputs, labels = tiny_inputs(model), tiny_labels()
    with torch.no_grad():
        whole = model(labels=labels, **inputs).logits
        for name in FEATURES:
            changed = inputs | {name: inputs[name].flip(-1)}
            assert (model(labels=labels, **changed).logits - whole).abs().max() > 0.001
            if FEATURES[name][2]:  # tokens have an order
                turned = {name: inputs[name][:, :2].flip(1), name + MASK: inputs[name + MASK][:, :2]}
                straight = {name: inputs[name][:, :2], name + MASK: inputs[name + MASK][:, :2]}
                first, second = (model(labels=labels, **inputs).logits for inputs in (turned, straight))
                assert (first - second).abs().max() > 0.001


def test_bfloat16_checkpoint_loads_as_float32(tmp_path: Path) -> None:
    model = tiny_model()
    rounded = {
        name: value.to(torch.bfloat16).float()
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    inputs, labels = tiny_inputs(model), tiny_labels()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    half = (tmp_path / "model.safetensors").stat().st_size
    again = load_pretrained(FusionModel, tmp_path, CPU, torch.float32)
    assert half < 0.6 * sum(value.numel() * 4 for value in again.parameters())
    torch.testing.assert_close({name: again.state_dict()[name] for name in rounded}, rounded, rtol=0, atol=0)
    with torch.no_grad():
        assert again(labels=labels, **inputs).logits.dtype == torch.float32
        low = load_pretrained(FusionModel, tmp_path, CPU, torch.bfloat16)(labels=labels, **inputs)
    assert low.logits.dtype == torch.bfloat16
    assert low.loss.isfinite()


def test_configuration_survives_json(tmp_path: Path) -> None:
    config = tiny_config(
        {**media("lstm"), **features_of()},
        fusion="bilinear",
        generator_kind="lstm",
        similarities=("dot", "bilinear"),
        pairs=[["image", "audio"], ["image", "image"]],
        loss_weights={"align": 0.3, "generator_adversary": 0.05},
        label_smoothing=0.1,
    )
    config.save_pretrained(tmp_path)
    for again in (FusionConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is FusionConfig
        assert again.parsed_sources() == config.parsed_sources()
        assert again.aligned_pairs() == [("image", "audio"), ("image", "image")]
        assert again.loss_weights == {"caption": 1.0, "align": 0.3, "reconstruct": 0.1, "generator_adversary": 0.05}
        for name in ("fusion", "generator_kind", "similarities", "label_smoothing", *SIZES):
            assert getattr(again, name) == getattr(config, name)
    assert type(AutoModel.from_config(config)) is FusionModel


def test_missing_loss_head_is_initialised(tmp_path: Path) -> None:
    tiny_model(loss_weights={"reconstruct": 0.0}).save_pretrained(tmp_path)
    config = tiny_config(loss_weights={"reconstruct": 0.1, "generator_adversary": 0.1, "modality_adversary": 0.1})
    heads = ("reconstruction", "generator_adversary", "modality_adversary")
    with pytest.raises(ModelError, match=r"missing.*generator_adversary"):
        load_pretrained(FusionModel, tmp_path, CPU, torch.float32, config=config)
    ignored = [rf"^{head}\." for head in heads]
    model = load_pretrained(FusionModel, tmp_path, CPU, torch.float32, ignored, config=config)
    fresh = {name: value for name, value in model.named_parameters() if name.startswith(heads)}
    assert {name.split(".")[0] for name in fresh} == set(heads)
    for name, value in fresh.items():
        assert 0 < value.abs().max() < 1, name


def test_wrong_feature_width_error_names_both_widths() -> None:
    model = tiny_model(features_of("clip_image_embedding", "t5_text_tokens"))
    with pytest.raises(ModelError, match=r"features clip_image_embedding: expected vectors of width 12, found 16"):
        model.encode(clip_image_embedding=torch.zeros(2, 16))
    with pytest.raises(ModelError, match=r"source t5_text_tokens: expected at most 64 tokens, found 65"):
        model.encode(t5_text_tokens=torch.zeros(2, 65, 6))


def test_invalid_inputs_are_rejected() -> None:
    model = tiny_model()
    with pytest.raises(ModelError, match="input video: the model's sources are image, audio, text"):
        model(labels=tiny_labels(), video=torch.zeros(2, 3))
    with pytest.raises(ModelError, match="for at least one source, found batch sizes 2, 3"):
        model.encode(image=torch.zeros(2, 3, SIDE, SIDE), image_mask=torch.ones(3))
    with pytest.raises(ModelError, match="expected inputs of one batch size for at least one source, found no input"):
        model.encode()
    with pytest.raises(ModelError, match="expected `labels` or `decoder_input_ids`"):
        model(image=torch.zeros(2, 3, SIDE, SIDE))


GRID = {"modality": "image", "kind": "transformer", "shape": [3, 32, 32]}
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "kind": (
        {"image": GRID | {"kind": "vgg"}},
        {},
        "source image: modality 'image', kind 'vgg'; expected one of image,",
    ),
    "modality": ({"film": {"modality": "video"}}, {}, "source film: modality 'video'"),
    "field": ({"image": GRID | {"depth": 2}}, {}, r"source image: unknown \['depth'\]"),
    "no modality": ({"image": {"kind": "conv"}}, {}, r"source image: .*missing \['modality'\]"),
    "no shape": ({"image": {"modality": "image"}}, {}, "source image: kind conv requires shape"),
    "no channels": ({"image": GRID | {"kind": "conv"}}, {}, "source image: kind conv requires channels"),
    "no patch": ({"image": GRID}, {}, "source image: kind transformer requires patch"),
    "flat": ({"image": GRID | {"shape": [32, 32], "patch": [8, 8]}}, {}, "expected channels, height and width"),
    "patches": ({"image": GRID | {"patch": [5, 8]}}, {}, r"patch size \(5, 8\) does not divide \(32, 32\)"),
    "no width": (
        {"image": {"modality": "image", "kind": "features"}},
        {},
        "image: kind features requires width",
    ),
    "no model": (
        {"image": {"modality": "image", "kind": "pretrained"}},
        {},
        "image: kind pretrained requires model",
    ),
    "a taken name": (
        {"labels": GRID | {"patch": [8, 8]}},
        {},
        "source 'labels': the model has another input of this name",
    ),
    "a dot": ({"a.b": GRID | {"patch": [8, 8]}}, {}, "source 'a.b': not a valid name for a module; rename the column"),
    "a method": ({"values": GRID | {"patch": [8, 8]}}, {}, "source 'values': not a valid name for a module"),
    "fusion": ({}, {"fusion": "sum"}, "fusion 'sum': expected one of attention, concat, gated, bilinear"),
    "generator": ({}, {"generator_kind": "gpt"}, "generator_kind 'gpt': expected one of transformer, lstm"),
    "similarity": (
        {},
        {"similarities": ["euclid"]},
        "unknown euclid; expected some of cosine, dot, bilinear",
    ),
    "a width": (
        {},
        {"hidden_size": 30, "num_attention_heads": 4},
        "hidden_size 30: expected an even number that 4 att",
    ),
    "an odd width": ({}, {"hidden_size": 33, "num_attention_heads": 3}, "hidden_size 33: expected an even number"),
    "origin": (
        {"clip": {"modality": "image", "kind": "features", "width": 4, "origin": {"model": "clip"}}},
        {},
        "source clip: origin .*; expected model, digest",
    ),
    "loss": ({}, {"loss_weights": {"aligned": 1.0}}, "loss_weights: unknown aligned; expected some of caption, align"),
}


@pytest.mark.parametrize("case", WRONG)
def test_configuration_error_names_field_and_expected_values(case: str) -> None:
    sources, options, message = WRONG[case]
    with pytest.raises(ModelError, match=message):
        tiny_config(sources, **options)


def test_unknown_name_in_a_pair_is_rejected() -> None:
    with pytest.raises(ModelError, match="pairs: unknown film; expected some of image, audio, text, fused, caption"):
        tiny_config(pairs=[["image", "film"]]).aligned_pairs()


# Training


@pytest.mark.parametrize("generator", GENERATOR_KINDS)
def test_model_overfits_a_small_corpus(generator: str) -> None:
    """Return samples whose captions have two words from the image, two from the audio and two from the text."""
    torch.manual_seed(0)
    model = FusionModel(tiny_config(generator_kind=generator, dropout=0.0, loss_weights={"align": 0.05}))
    inputs = tiny_inputs(model, batch=16)
    labels = torch.cat([torch.randint(3, VOCABULARY, (16, 6)), torch.full((16, 1), 2)], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        out = model(labels=labels, **inputs)
        out.loss.backward()
        optimizer.step()
        losses.append(out.losses["caption"].item())
    assert losses[-1] < 0.1 < 2 < losses[0]
    assert torch.equal(model.eval().generate(**inputs, max_new_tokens=7)[:, 1:], labels)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_an_rnn_runs_in_float32_under_autocast(kind: Any, packed: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    rnn = kind(8, 8, batch_first=True).to(device)
    states = torch.randn(2, 5, 8, device=device)
    inputs = (
        torch.nn.utils.rnn.pack_padded_sequence(states, torch.tensor([5, 3]), batch_first=True) if packed else states
    )
    with torch.autocast(device.type, torch.bfloat16):
        halved = run_rnn(rnn, inputs.to(torch.bfloat16))
    expected = rnn(inputs.to(torch.bfloat16).to(torch.float32))[0]
    for actual, wanted in [(halved.data, expected.data)] if packed else [(halved, expected)]:
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, wanted)
