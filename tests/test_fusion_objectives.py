"""The training losses of the fusion model against direct calculations."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_fusion import BATCH, TOKENS, media, tiny_config, tiny_inputs, tiny_labels, tiny_model
from torch.nn import functional as F

from mmbeam.models.fusion import FusionModel
from mmbeam.models.fusion.configuration import MASK
from mmbeam.models.fusion.objectives import GeneratorAdversary, ModalityAdversary, info_nce, scale_gradient
from mmbeam.names import GENERATOR_KINDS, SIMILARITIES

IMAGES = {"image": media()["image"]}


def plain_info_nce(logits: Any, positives: Any, skip: Any = None) -> float:
    """Return -log of the probability of the positives, by definition: over rows, then over columns."""
    size, directions = len(logits), []
    for turned in (False, True):
        losses = []
        for row in range(size):
            total = positive = 0.0
            for column in range(size):
                at = (column, row) if turned else (row, column)
                if skip is not None and skip[at]:
                    continue
                total += math.exp(logits[at])
                positive += math.exp(logits[at]) if positives[at] else 0.0
            if positive:
                losses.append(math.log(total) - math.log(positive))
        if losses:
            directions.append(sum(losses) / len(losses))
    return sum(directions) / len(directions) if directions else 0.0


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 6), share=st.floats(0, 1), skipping=st.booleans())
def test_info_nce_equals_its_definition(seed: int, size: int, share: float, skipping: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, size, generator=generator, dtype=torch.float64)
    positives = torch.rand(size, size, generator=generator) < share
    skip = torch.eye(size, dtype=torch.bool) if skipping else None
    logits.requires_grad_()
    loss = info_nce(logits, positives, skip)
    assert loss.item() == pytest.approx(plain_info_nce(logits.detach().numpy(), positives.numpy(), skip), abs=1e-9)
    if loss.requires_grad:
        loss.backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_positives_are_not_negatives() -> None:
    logits = torch.zeros(3, 3, requires_grad=True)
    alike = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    info_nce(logits, alike).backward()
    assert logits.grad is not None
    assert (logits.grad[alike] < 0).all()
    assert (logits.grad[~alike] > 0).all()


# The shared space


def test_similarity_functions() -> None:
    model = tiny_model(similarities=SIMILARITIES)
    pair = ("image", "text")
    a, b = torch.randn(3, 16), torch.randn(5, 16)
    scale = model.space.scale.exp()
    logits = {kind: model.space.similarity(kind, pair, a, b) for kind in SIMILARITIES}
    torch.testing.assert_close(logits["cosine"], scale * F.cosine_similarity(a[:, None], b[None], dim=-1))
    torch.testing.assert_close(logits["dot"], (a[:, None] * b[None]).sum(-1) / 4)
    torch.testing.assert_close(logits["bilinear"], logits["dot"])  # W is initialised as the identity
    weight = torch.randn(16, 16)
    model.space.bilinear["image|text"].data = weight
    expected = torch.einsum("ad,de,be->ab", a, weight, b) / 4
    expected_in_float32 = model.space.similarity("bilinear", pair, a, b)
    torch.testing.assert_close(expected_in_float32, expected)
    with torch.autocast("cpu", torch.bfloat16):  # also in mixed precision
        assert torch.equal(model.space.similarity("bilinear", pair, a, b), expected_in_float32)
    with torch.no_grad():
        model.space.scale.fill_(10.0)
    assert model.space.similarity("cosine", pair, a, a).max() <= 100.001


def test_alignment_is_the_mean_over_pairs_and_similarities() -> None:
    pairs = [["image", "text"], ["audio", "caption"]]
    model = tiny_model(similarities=SIMILARITIES, pairs=pairs, loss_weights={"align": 0.5})
    inputs, labels = tiny_inputs(model), tiny_labels()
    labels[2] = labels[0]  # the same caption: positives
    inputs["image" + MASK] = torch.tensor([True, True, True, False])
    inputs["text" + MASK][1] = False
    with torch.no_grad():
        out = model(labels=labels, groups=torch.tensor([-1, -1, 7, 7]), **inputs)
        embeddings: dict[str, Any] = {**model.encode(**inputs).embeddings, "caption": model.embed_captions(labels)}
        alike = torch.eye(BATCH, dtype=torch.bool)
        alike[0, 2] = alike[2, 0] = alike[2, 3] = alike[3, 2] = True
        expected = []
        for (a, b), rows in ((("image", "text"), [0, 2]), (("audio", "caption"), [0, 1, 2, 3])):
            for kind in SIMILARITIES:
                logits = model.space.similarity(kind, (a, b), embeddings[a][rows], embeddings[b][rows])
                expected.append(plain_info_nce(logits.numpy(), alike[rows][:, rows].numpy()))
    assert out.losses["align"].item() == pytest.approx(sum(expected) / 6, rel=1e-4)


@pytest.mark.parametrize("name", ["image", "text"])
def test_self_pair_aligns_two_views(name: str) -> None:
    model = tiny_model(pairs=[[name, name]])
    inputs, labels = tiny_inputs(model), tiny_labels()
    views = {name: tiny_inputs(model, seed=9)[name], name + MASK: inputs[name + MASK]}
    with torch.no_grad():
        loss = model(labels=labels, views=views, **inputs).losses["align"].item()
        first, second = (model.encode(**batch).embeddings[name] for batch in (inputs, views))
        logits = model.space.similarity("cosine", (name, name), first, second)
    assert loss == pytest.approx(plain_info_nce(logits.numpy(), torch.eye(BATCH).bool().numpy()), rel=1e-4)


def test_self_pair_without_views_aligns_the_group() -> None:
    model = tiny_model(pairs=[["image", "image"]])
    inputs, labels = tiny_inputs(model), tiny_labels()
    groups = torch.tensor([3, 5, 3, -1])
    with torch.no_grad():
        loss = model(labels=labels, groups=groups, **inputs).losses["align"].item()
        embedding = model.encode(**inputs).embeddings["image"]
        logits = model.space.similarity("cosine", ("image", "image"), embedding, embedding)
        alone = model(labels=labels, **inputs).losses["align"].item()
    alike = torch.zeros(BATCH, BATCH, dtype=torch.bool)
    alike[0, 2] = alike[2, 0] = True
    assert loss == pytest.approx(
        plain_info_nce(logits.numpy(), alike.numpy(), torch.eye(BATCH).bool().numpy()), rel=1e-4
    )
    assert alone == 0  # no positives


def test_aligned_sources_retrieve_each_other() -> None:
    torch.manual_seed(0)
    model = FusionModel(tiny_config(dropout=0.0, loss_weights={"caption": 0.0, "reconstruct": 0.0, "align": 1.0}))
    inputs = tiny_inputs(model, batch=12)
    labels = torch.arange(12)[:, None] + 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def recall() -> float:
        with torch.no_grad():
            embeddings = model.encode(**inputs).embeddings
        pairs = [("image", "audio"), ("image", "text"), ("audio", "text")]
        best = [model.space.similarity("cosine", (a, b), embeddings[a], embeddings[b]).argmax(1) for a, b in pairs]
        return float((torch.cat(best) == torch.arange(12).repeat(3)).float().mean())

    before = recall()
    for _ in range(40):
        optimizer.zero_grad()
        model(labels=labels, **inputs).loss.backward()
        optimizer.step()
    assert before < 0.5
    assert recall() == 1


# Reconstruction


def _features() -> dict[str, Any]:
    return {
        **media(),
        "clip_image_embedding": {"modality": "image", "kind": "features", "width": 12},
        "t5_text_tokens": {"modality": "text", "kind": "features", "width": 6, "tokens": True},
    }


def _target(name: str, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the reconstruction target of one sample, calculated directly."""
    if name in ("image", "audio"):
        return torch.stack(
            [c[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean() for c in values for y in range(8) for x in range(8)]
        )
    if name == "text":
        words = values[mask].tolist()
        return torch.tensor([words.count(word) / len(words) for word in range(40)])
    vector = values if name == "clip_image_embedding" else values[mask].mean(0)
    return (vector - vector.mean()) / (vector.var(unbiased=False) + 1e-5).sqrt()


@pytest.mark.parametrize("name", _features())
def test_reconstruction_learns_every_source(name: str) -> None:
    model = tiny_model(_features())
    inputs = tiny_inputs(model)
    values, mask = inputs[name], inputs[name + MASK]
    mask[1] = False
    inputs = {name: values, name + MASK: mask}
    with torch.no_grad():
        loss = model(labels=tiny_labels(), **inputs).losses["reconstruct"].item()
        embedding = model.encode(**inputs).embeddings[name]
        guess = model.reconstruction.heads[name](F.normalize(embedding, dim=-1))
    rows = [0, 2, 3]
    target = torch.stack([_target(name, values[row], mask[row]) for row in rows])
    if name == "text":
        expected = -(target * guess[rows].log_softmax(-1)).sum(1).mean()
    else:
        expected = ((guess[rows] - target) ** 2).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)


# Adversaries


def test_scale_gradient_changes_only_the_gradient() -> None:
    values = torch.randn(3, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 3.0])
    out = scale_gradient(values, -1.0)
    assert torch.equal(out, values)
    (out * weights).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, -weights)


def _fitted(embeddings: Mapping[str, torch.Tensor]) -> float:
    """Return the loss of an adversary trained on these embeddings."""
    torch.manual_seed(0)
    adversary = ModalityAdversary(list(embeddings), tiny_config(IMAGES))
    optimizer = torch.optim.Adam(adversary.parameters(), lr=1e-2)
    present = {name: torch.ones(len(rows), dtype=torch.bool) for name, rows in embeddings.items()}
    for _ in range(150):
        optimizer.zero_grad()
        loss = adversary.loss(embeddings, present)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_modality_adversary_wins_only_if_modalities_differ() -> None:
    torch.manual_seed(0)
    cloud = torch.randn(400, 16)
    apart = {"image": cloud + torch.eye(16)[0] * 4, "text": cloud - torch.eye(16)[0] * 4}
    assert _fitted(apart) < 0.05
    assert _fitted({"image": cloud, "text": cloud.clone()}) == pytest.approx(math.log(2), abs=0.01)


def test_reversed_gradient_removes_the_modality_from_embeddings() -> None:
    torch.manual_seed(0)
    model = FusionModel(
        tiny_config(dropout=0.0, loss_weights={"align": 0.0, "reconstruct": 0.0, "modality_adversary": 1.0})
    )
    inputs, labels = tiny_inputs(model, batch=16), tiny_labels(16)
    space = [value for name, value in model.named_parameters() if "modality_adversary" not in name]
    adversary = list(model.modality_adversary.parameters())
    optimizer = torch.optim.Adam([{"params": adversary, "lr": 1e-2}, {"params": space, "lr": 1e-3}])
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        out = model(labels=labels, **inputs)
        out.losses["modality_adversary"].backward()
        for value in space if step < 20 else ():  # first train the adversary alone
            value.grad = None
        optimizer.step()
        losses.append(out.losses["modality_adversary"].item())
    assert losses[20] < 0.3
    assert losses[-1] > 1.5 * losses[20]


def test_adversary_ignores_rows_without_the_source() -> None:
    adversary = ModalityAdversary(["image", "text"], tiny_config(IMAGES))
    embeddings = {"image": torch.randn(4, 16), "text": torch.randn(4, 16)}
    rows = torch.tensor([True, False, True, False])
    loss = adversary.loss(embeddings, {"image": rows, "text": ~rows})
    expected = adversary.loss(
        {"image": embeddings["image"][rows], "text": embeddings["text"][~rows]},
        {"image": rows[rows], "text": rows[rows]},
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("generator", GENERATOR_KINDS)
def test_professor_forcing_trains_the_decoder_and_keeps_module_modes(generator: str) -> None:
    model = tiny_model(generator_kind=generator, loss_weights={"generator_adversary": 0.1}).train()
    frozen: Any = model.encoders["image"].eval()
    loss = model(labels=tiny_labels(), **tiny_inputs(model)).losses["generator_adversary"]
    assert 0 < loss.item() < 10
    loss.backward()
    for part in (model.decoder, model.fuser, model.generator_adversary):
        assert any(value.grad is not None and value.grad.any() for value in part.parameters())
    assert model.training
    assert model.decoder.training
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize("generator", GENERATOR_KINDS)
def test_professor_forcing_samples_as_generate_does(generator: str) -> None:
    model = tiny_model(IMAGES, generator_kind=generator, loss_weights={"generator_adversary": 0.1})
    image = tiny_inputs(model)["image"][:1]
    with torch.no_grad():
        encoding = model.encode(image=image.repeat(1500, 1, 1, 1))
        sampled = model._sample_tokens(encoding, 2)
        truth = model(decoder_input_ids=torch.tensor([[1]]), image=image).logits[0, -1].softmax(-1)
    assert sampled.shape == (1500, 2)
    assert set(sampled[:, 0].tolist()) == {1}
    torch.testing.assert_close(sampled[:, 1].bincount(minlength=40) / 1500, truth, rtol=0, atol=0.05)


def test_generator_adversary_wins_only_if_states_differ() -> None:
    def fitted(shift: float) -> float:
        torch.manual_seed(0)
        judge = GeneratorAdversary(tiny_config(IMAGES))
        optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
        real = torch.randn(64, TOKENS, 32)
        mask = torch.arange(TOKENS) < torch.arange(64)[:, None] % TOKENS + 1
        sampled = real + shift + 100.0 * ~mask[..., None]  # padding must not matter
        for _ in range(40):
            optimizer.zero_grad()
            loss = judge.loss(real, mask, sampled, mask)
            loss.backward()
            optimizer.step()
        return loss.item()

    assert fitted(0.5) < 0.1
    assert fitted(0.0) == pytest.approx(math.log(2), abs=0.02)


# The total


def test_loss_is_the_weighted_sum() -> None:
    weights = {"caption": 0.7, "align": 0.2, "reconstruct": 0.0, "modality_adversary": 0.3}
    model = tiny_model(loss_weights=weights)
    out = model(labels=tiny_labels(), **tiny_inputs(model))
    assert set(out.losses) == {"caption", "align", "modality_adversary"}
    torch.testing.assert_close(
        out.loss, sum((weights[name] * loss for name, loss in out.losses.items()), torch.zeros(()))
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_is_off_in_eval_mode(smoothing: float) -> None:
    model = tiny_model(media("mlp"), dropout=0.0, label_smoothing=smoothing)
    inputs, labels = tiny_inputs(model), tiny_labels()
    for training in (False, True):
        with torch.no_grad():
            out = model.train(training)(labels=labels, **inputs)
        logprobs = out.logits.log_softmax(-1)[labels != -100]
        right = logprobs.gather(1, labels[labels != -100][:, None])[:, 0]
        share = smoothing if training else 0.0
        expected = -((1 - share) * right + share * logprobs.mean(-1)).mean()
        assert out.losses["caption"].item() == pytest.approx(expected.item(), rel=1e-5)
