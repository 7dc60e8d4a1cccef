"""Pretrained encoders of a fusion model, frozen and trained, against their checkpoints."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny_audio_text as sounds
import tiny_models as pictures
import torch
from tiny_clip import SIDE, save_clip
from tiny_fusion import SIZES, tiny_config, tiny_labels
from torch.nn import functional as F
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from mmbeam.errors import ModelError
from mmbeam.models.fusion import FusionModel, FusionProcessor, SourceConfig
from mmbeam.models.fusion.configuration import MASK
from mmbeam.models.fusion.pretrained import load_weights, read_preprocessing, read_source
from mmbeam.models.loading import load_pretrained
from mmbeam.names import Modality
from mmbeam.prompts.ask import Request
from mmbeam.training.batching import make_views

# WavLM of transformers 5 passes PyTorch a mask and a bias of different types, which PyTorch adds with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
CPU = torch.device("cpu")
Save = Callable[[Path], Path]
CHECKPOINTS: dict[str, tuple[Save, Modality]] = {
    "clip-image": (save_clip, "image"),
    "clip-text": (save_clip, "text"),
    "siglip-image": (pictures.save_siglip, "image"),
    "siglip2-text": (pictures.save_siglip2, "text"),
    "blip-text": (pictures.save_blip, "text"),
    "metaclip2-text": (pictures.save_metaclip2, "text"),
    "blip-image": (pictures.save_blip, "image"),
    "vit": (pictures.save_vit, "image"),
    "dinov2": (pictures.save_dinov2, "image"),
    "resnet": (pictures.save_resnet, "image"),
    "whisper": (sounds.save_whisper, "audio"),
    "clap-audio": (sounds.save_clap, "audio"),
    "clap-audio-fusion": (lambda path: sounds.save_clap(path, fusion=True), "audio"),
    "ast": (sounds.save_ast, "audio"),
    "bert": (sounds.save_bert, "text"),
    "roberta": (sounds.save_roberta, "text"),
    "t5": (sounds.save_t5, "text"),
    "clap-text": (sounds.save_clap, "text"),
}
SPEECH: dict[str, Save] = {
    f"{family}{'-large' * large}": partial(sounds.save_speech, family=family, large=large)
    for family in ("wav2vec2", "hubert", "wavlm")
    for large in (False, True)
}
TRAINED = ("wav2vec2", "wavlm", "clip-image", "clip-text", "vit", "bert", "whisper", "clap-audio", "resnet", "t5")
REQUESTS = [
    Request(
        image=np.random.default_rng(row).integers(0, 256, (40 + row, 50, 3), dtype=np.uint8),
        audio=(sounds.tone(8000, 0.5 + row), 8000),
        text="a dog" + " [SEP] barks </s>" * 30 * row,
    )
    for row in range(3)
]


def make(name: str, directory: Path, frozen: bool) -> tuple[FusionModel, FusionProcessor]:
    audio: Modality = "audio"
    save, modality = (SPEECH[name], audio) if name in SPEECH else CHECKPOINTS[name]
    save(directory)
    config = tiny_config({"tower": read_source(directory, modality, frozen=frozen, max_tokens=20)}, vocab_size=260)
    sources = config.parsed_sources()
    preparations = {"tower": read_preprocessing(directory, sources["tower"])}
    processor = FusionProcessor.fit(sources, ["a dog"], 260, pretrained=preparations)
    torch.manual_seed(0)
    model = FusionModel(config)
    load_weights(model.encoders["tower"], modality, directory)
    return model, processor


def reference(name: str, directory: Path, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states of the checkpoint."""
    if name == "blip-text":
        whole = BlipForImageTextRetrieval.from_pretrained(directory).eval()
        with torch.no_grad():
            return cast(torch.Tensor, whole.text_encoder(values, attention_mask=mask.long()).last_hidden_state)
    model = AutoModel.from_pretrained(directory).eval()
    part = {"image": "vision_model", "text": "text_model", "audio": "audio_model"}.get("-".join(name.split("-")[1:2]))
    tower: Any = getattr(model, part) if part else model.get_encoder() if name in ("whisper", "t5") else model
    masks = {"attention_mask": mask.long()} if mask.dim() > 1 else {}
    if part == "audio_model":
        masks["is_longer"] = torch.zeros(len(values), 1, dtype=torch.bool)
    with torch.no_grad():
        states: torch.Tensor = tower(values, **masks).last_hidden_state
    return states


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_encoder_equals_the_checkpoint(name: str, tmp_path: Path) -> None:
    model, processor = make(name, tmp_path / "own", frozen=True)
    inputs = processor(REQUESTS, CPU)
    values, mask = inputs["tower"], inputs["tower" + MASK]
    expected = reference(name, tmp_path / "own", values, mask)
    if expected.dim() == 4:
        expected = expected.flatten(2).transpose(1, 2)
    inputs: list[torch.Tensor] = []
    encoder: Any = model.eval().encoders["tower"]
    encoder.project.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    tokens, _ = model.embed("tower", values, mask)
    torch.testing.assert_close(inputs[0], expected, rtol=1e-4, atol=1e-4)
    if mask.dim() > 1:
        assert mask.sum(1).max() <= 20
        assert torch.equal(tokens[1], mask)


@pytest.mark.parametrize("name", SPEECH)
def test_batched_waveforms_equal_the_checkpoint(name: str, tmp_path: Path) -> None:
    model, processor = make(name, tmp_path, frozen=True)
    requests = [*REQUESTS, Request(text="silent"), Request(audio=(sounds.tone(16000, 0.01), 16000))]
    inputs = processor(requests, CPU)
    encoder: Any = model.eval().encoders["tower"]
    values, mask = inputs["tower"], inputs["tower" + MASK]
    assert mask.any(1).tolist() == [True, True, True, False, True]
    present = mask.any(1)
    states, real = encoder.hidden_states(values[present], mask[present])
    whole = AutoModel.from_pretrained(tmp_path).eval()
    for row, is_real, wave, is_sample in zip(states, real, values[present], mask[present], strict=True):
        with torch.no_grad():
            expected = whole(wave[None, is_sample]).last_hidden_state[0]
        torch.testing.assert_close(row[is_real], expected, rtol=1e-4, atol=1e-4)
    view = make_views(model.sources, ["tower"], inputs)
    assert torch.equal(view["tower" + MASK], mask)
    assert not torch.equal(view["tower"], values)
    spoiled = {"tower": torch.where(mask, values, torch.nan), "tower" + MASK: mask}
    labels = tiny_labels(len(requests))
    torch.testing.assert_close(model(labels=labels, **spoiled).loss, model(labels=labels, **inputs).loss)
    processor.save(tmp_path)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(FusionProcessor.from_directory(tmp_path)(requests, CPU), inputs, rtol=0, atol=0)


def test_waveforms_equal_the_checkpoints_feature_extractor(tmp_path: Path) -> None:
    _, processor = make("wav2vec2", tmp_path, frozen=True)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    long, short = sounds.tone(16000, 31.0), sounds.tone(16000, 0.5)
    values, mask = processor.audio_values("tower", [(long, 16000), (short, 16000)], CPU)
    assert mask.sum(1).tolist() == [480_000, 8_000]
    for row, wave in zip(values, (long, short), strict=True):
        expected = extractor(wave[:480_000], sampling_rate=16000, return_tensors="pt").input_values[0]
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-4, atol=1e-4)


def test_text_for_a_model_without_a_mask_is_padded(tmp_path: Path) -> None:
    directory = pictures.save_siglip2(tmp_path)
    source = SourceConfig.parse("tower", read_source(directory, "text"))
    tokenizer = read_preprocessing(directory, source)
    processor = FusionProcessor.fit({"tower": source}, ["a dog"], 260, pretrained={"tower": tokenizer})
    reference_tokenizer = AutoTokenizer.from_pretrained(directory)
    for text in ("a dog", "dog " * 50):
        expected = reference_tokenizer(text, padding="max_length", max_length=64, truncation=True).input_ids
        assert processor.input_ids([text], "tower") == [expected]
    expected = reference_tokenizer("a dog", add_special_tokens=False).input_ids
    assert len(processor.token_ids(["a dog"], "tower")[0]) == len(expected)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", TRAINED)
def test_frozen_and_unfrozen_encoders_train_and_reload_without_the_checkpoint(
    name: str, frozen: bool, tmp_path: Path
) -> None:
    model, processor = make(name, tmp_path / "own", frozen)
    encoder: Any = model.encoders["tower"]
    before = {key: value.clone() for key, value in encoder.model.state_dict().items()}
    inputs = processor(REQUESTS, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    model.train()(labels=tiny_labels(3), **inputs).loss.backward()
    optimizer.step()
    changed = [key for key, value in encoder.model.state_dict().items() if not torch.equal(value, before[key])]
    assert bool(changed) != frozen
    assert encoder.model.training != frozen
    assert encoder.hidden_states(inputs["tower"], inputs["tower" + MASK])[0].requires_grad != frozen
    model.save_pretrained(tmp_path / "fusion")
    processor.save(tmp_path / "fusion")
    shutil.rmtree(tmp_path / "own")
    again = load_pretrained(FusionModel, tmp_path / "fusion", CPU, torch.float32)
    assert any(value.requires_grad for value in again.encoders["tower"].model.parameters()) != frozen
    read = FusionProcessor.from_directory(tmp_path / "fusion")(REQUESTS, CPU)
    torch.testing.assert_close(read, inputs, rtol=0, atol=0)
    expected = model.eval()(labels=tiny_labels(3), **inputs).logits
    torch.testing.assert_close(again(labels=tiny_labels(3), **read).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_reconstruction_learns_pretrained_states(frozen: bool, tmp_path: Path) -> None:
    model, processor = make("bert", tmp_path, frozen)
    model.eval()
    inputs = processor([*REQUESTS, Request()], CPU)
    encoder: Any = model.encoders["tower"]
    states, mask = encoder.hidden_states(inputs["tower"][:3], inputs["tower" + MASK][:3])
    means = torch.stack([state[real].mean(0) for state, real in zip(states, mask, strict=True)])
    code = F.normalize(model.encode(**inputs).embeddings["tower"][:3], dim=-1)
    guess = model.reconstruction.heads["tower"](code)
    expected = F.mse_loss(guess, F.layer_norm(means, means.shape[-1:]))
    loss = model(labels=tiny_labels(4), **inputs).losses["reconstruct"]
    torch.testing.assert_close(loss, expected)
    target = torch.autograd.grad(loss, model.reconstruction.parameters(), allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in target)


def test_sample_without_the_source_is_masked(tmp_path: Path) -> None:
    _, processor = make("bert", tmp_path, frozen=True)
    inputs = processor([REQUESTS[0], Request(), Request(text="")], CPU)
    assert inputs["tower" + MASK].any(1).tolist() == [True, False, False]
    assert not processor([Request(), Request()], CPU)["tower" + MASK].any()


def test_truncated_text_keeps_its_last_special_token(tmp_path: Path) -> None:
    _, processor = make("bert", tmp_path, frozen=True)
    cls, sep = 2, 3
    short, long = processor.input_ids(["a [SEP] dog", "dog " * 50], "tower")
    assert (short[0], short[-1], short.count(sep)) == (cls, sep, 1)
    assert (len(long), long[0], long[-1]) == (20, cls, sep)


def test_two_checkpoints_encode_the_same_text(tmp_path: Path) -> None:
    bert, clip = sounds.save_bert(tmp_path / "bert"), save_clip(tmp_path / "clip")
    sources = {
        "bert": read_source(bert, "text"),
        "clip_text": read_source(clip, "text"),
        "clip": read_source(clip, "image"),
    }
    config = tiny_config(sources, vocab_size=260)
    parsed = config.parsed_sources()
    directories = {"bert": bert, "clip_text": clip, "clip": clip}
    preparations = {name: read_preprocessing(of, parsed[name]) for name, of in directories.items()}
    processor = FusionProcessor.fit(parsed, ["a dog"], 260, pretrained=preparations)
    model = FusionModel(config).eval()
    ids = model.generate(**processor(REQUESTS, CPU), max_new_tokens=4)
    assert ids.shape[0] == len(REQUESTS)
    assert processor.modalities == ("image", "text")
    assert processor.image_side == SIDE


REFUSED: dict[str, tuple[Save, Modality, str]] = {
    "a sound for CLIP": (save_clip, "audio", "an encoder for audio, found clip$"),
    "a sound for a picture": (sounds.save_ast, "image", "takes input_values, expected pixel_values$"),
    "a text for a picture": (sounds.save_bert, "image", "bert takes input_ids, expected pixel_values$"),
    "a picture for a text": (pictures.save_vit, "text", "vit takes pixel_values, expected input_ids$"),
}


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_encoder_error_says_what_to_do(case: str, tmp_path: Path) -> None:
    save, modality, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        read_source(save(tmp_path), modality)


def test_slow_tokenizer_is_rejected(tmp_path: Path) -> None:
    directory = pictures.save_siglip(tmp_path)
    source = SourceConfig.parse("tower", read_source(directory, "text"))
    with pytest.raises(ModelError, match=r"expected a tokenizer with tokenizer\.json, found SiglipTokenizer"):
        read_preprocessing(directory, source)


def test_images_of_varying_shape_are_rejected(tmp_path: Path) -> None:
    directory = pictures.save_siglip2(tmp_path)
    source = SourceConfig.parse("tower", read_source(directory, "image"))
    with pytest.raises(ModelError, match=r"differ in shape.*mmbeam embed"):
        read_preprocessing(directory, source)


def test_preprocessing_must_fit_the_encoder(tmp_path: Path) -> None:
    directory = pictures.save_vit(tmp_path)
    source = read_source(directory, "image")
    source["model"] = {**source["model"], "image_size": 64}
    with pytest.raises(ModelError, match=r"does not take \[3, 48, 48\]"):
        read_preprocessing(directory, SourceConfig.parse("tower", source))


def test_weights_of_another_configuration_are_rejected(tmp_path: Path) -> None:
    source = read_source(pictures.save_vit(tmp_path / "vit"), "image")
    source["model"] = {**source["model"], "hidden_size": 16, "intermediate_size": 8}
    model = FusionModel(tiny_config({"tower": source}, **{"hidden_size": SIZES["hidden_size"]}))
    with pytest.raises(ModelError, match="its weights do not fit the image encoder"):
        load_weights(model.encoders["tower"], "image", tmp_path / "vit")


def test_blip_for_captioning_has_no_text_encoder(tmp_path: Path) -> None:
    directory = pictures.save_blip(tmp_path, BlipForConditionalGeneration)
    model = FusionModel(tiny_config({"tower": read_source(directory, "text")}))
    with pytest.raises(ModelError, match=r"text_encoder\."):
        load_weights(model.encoders["tower"], "text", directory)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    directory = pictures.save_vit(tmp_path)
    model = FusionModel(tiny_config({"tower": read_source(directory, "image")}))
    torch.save(AutoModel.from_pretrained(directory).state_dict(), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors; pickled weights"):
        load_weights(model.encoders["tower"], "image", directory)
