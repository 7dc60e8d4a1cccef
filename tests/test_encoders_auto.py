"""Checkpoints of architectures without a family, against transformers with their own processors, one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_checks import edit_json, load_encoder
from pictures import pictures
from shards import natural_sound
from tiny_auto import AUTO, Checkpoints
from tiny_models import BACKBONES, BUILDERS
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer

from mmbeam.errors import ModelError
from mmbeam.jobs.embed import embed_run
from mmbeam.models.encoders import describe
from mmbeam.models.encoders.auto import PIECE_SECONDS, AutoEncoder
from mmbeam.models.encoders.joint import ImageTextEncoder
from mmbeam.models.encoders.vision import VisionEncoder
from mmbeam.models.loading import quiet_transformers
from mmbeam.stages.embed import embed_stage
from mmbeam.types import Batch, Sample, WorkUnit

CPU = torch.device("cpu")
RATE = 16000
IMAGES = [image.copy() for image in (*pictures(((48, 48), (97, 60), (97, 60), (3, 70))), *pictures()[:1])]
TEXTS = ["a dog", "two cats and a dog", "", "a cat", "thunder " * 200]
CLIPS = [natural_sound(seed, seconds, RATE) for seed, seconds in enumerate((0.5, 1.3, 0.5))]


def pooled(output: Any) -> torch.Tensor:
    """Return pooler_output as vectors."""
    return output.pooler_output.flatten(1)


def mean(output: Any) -> torch.Tensor:
    """Return the mean over positions, [B, L, D] or [B, D, H, W]."""
    hidden = output.last_hidden_state
    return hidden.mean((2, 3)) if hidden.dim() == 4 else hidden.mean(1)


IMAGE = {"swin": pooled, "swinv2": pooled, "beit": pooled, "efficientnet": pooled, "regnet": pooled, "hiera": pooled}
IMAGE |= {"deit": lambda output: output.last_hidden_state[:, 0], "poolformer": mean}
TEXT: dict[str, Any] = {"camembert": mean, "gte": mean, "nomic_bert": mean, "bart": mean, "modernbert": mean}
TEXT |= {"ernie": pooled, "llama": lambda output: output.last_hidden_state[:, -1]}
JOINT = ("altclip", "align", "clipseg")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    quiet_transformers()
    return Checkpoints(tmp_path_factory.mktemp("auto"), AUTO)


def some(*names: str, torture: str) -> list[Any]:
    """Parametrise by the names; those of `torture` run with `make torture` only, since each takes a second."""
    return [*names, *(pytest.param(name, marks=pytest.mark.torture) for name in torture.split())]


def reference(directory: Path) -> Any:
    model = AutoModel.from_pretrained(directory).eval()
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return model.encoder if type(model).__name__ == "ParakeetForCTC" else model


def check(vectors: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """Within 1e-4 of the largest number; and the vectors depend on the input."""
    theirs = torch.cat(expected)
    assert vectors.shape == theirs.shape
    assert (vectors - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (theirs - theirs[0]).abs().max() > 1e-3 * theirs.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize(
    "name",
    some(
        "swin", "beit", "deit", "efficientnet", "poolformer", "altclip", "align", torture="swinv2 regnet hiera clipseg"
    ),
)
def test_images_equal_transformers_one_by_one(name: str, checkpoints: Checkpoints) -> None:
    encoder, model = load_encoder(checkpoints[name], CPU), reference(checkpoints[name])
    processor = AutoImageProcessor.from_pretrained(checkpoints[name], backend="pil")
    method = model.get_image_features if name in JOINT else model
    expected = [
        IMAGE.get(name, pooled)(method(**processor(image, input_data_format="channels_last", return_tensors="pt")))
        for image in IMAGES
    ]
    encoded = encoder.encode_image(IMAGES, tokens=True)
    check(encoded.pooled, expected)
    assert encoded.tokens is not None
    assert [tokens.shape[1] for tokens in encoded.tokens] == [encoder.spec.token_dims["image"]] * len(IMAGES)
    assert encoder.spec.dims["image"] == encoded.pooled.shape[1]


@torch.inference_mode()
@pytest.mark.parametrize(
    "name",
    some("camembert", "ernie", "gte", "bart", "llama", "altclip", "align", torture="modernbert nomic_bert clipseg"),
)
def test_texts_equal_transformers_one_by_one(name: str, checkpoints: Checkpoints) -> None:
    encoder, model = load_encoder(checkpoints[name], CPU), reference(checkpoints[name])
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[name])
    options: dict[str, Any] = {"truncation": True, "max_length": encoder.spec.max_text_tokens, "return_tensors": "pt"}
    method = model.get_text_features if name in JOINT else model
    texts = TEXTS[:4] if name == "llama" else TEXTS
    inputs = [tokenizer(text, **options) for text in texts]
    expected = [TEXT.get(name, pooled)(method(**values)) for values in inputs]
    check(encoder.encode_text(encoder.tokenize(texts)).pooled, expected)


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", some("data2vec-audio", "moonshine", "parakeet_ctc", torture="wav2vec2-conformer wav2vec2-bert")
)
def test_sounds_equal_transformers_one_by_one(name: str, checkpoints: Checkpoints) -> None:
    encoder, model = load_encoder(checkpoints[name], CPU), reference(checkpoints[name])
    extractor = AutoFeatureExtractor.from_pretrained(checkpoints[name])
    inputs = [extractor(clip, sampling_rate=RATE, return_tensors="pt") for clip in CLIPS]
    encoded = encoder.encode_audio(CLIPS, [RATE] * len(CLIPS), tokens=True)
    check(encoded.pooled, [mean(model(**values)) for values in inputs])
    assert encoder.spec.sampling_rate == RATE


def test_long_audio_is_encoded_in_pieces(checkpoints: Checkpoints) -> None:
    encoder = load_encoder(checkpoints["moonshine"], CPU)
    clip = natural_sound(9, 2 * PIECE_SECONDS, RATE)
    whole = encoder.encode_audio([clip], [RATE]).pooled
    halves = encoder.encode_audio([clip[: len(clip) // 2], clip[len(clip) // 2 :]], [RATE] * 2).pooled
    assert torch.allclose(whole[0], halves.mean(0), atol=1e-5)


def test_the_run_states_how_vectors_are_pooled(checkpoints: Checkpoints, tmp_path: Path) -> None:
    stage = embed_stage(str(checkpoints["deit"]))
    [note] = embed_run(str(tmp_path / "out"), [stage]).recorded["notes"]
    assert "deit has no family of its own: it runs by AutoModel" in note
    assert "slower than a family; vectors are image: class token of DeiTModel" in note


def test_a_stage_runs_the_processor_before_the_device(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = tuple(
        Sample(key=str(offset), shard="s", offset=offset, present=frozenset({"image"}), image=image)
        for offset, image in enumerate(IMAGES)
    )
    batch = Batch(unit=WorkUnit(id="u", inputs=()), index=0, last=True, samples=samples)
    stage = embed_stage(str(checkpoints["swin"]))
    model = stage.load()
    with torch.inference_mode():
        work = list(stage.prepare(model, batch))
        monkeypatch.setattr(AutoEncoder, "prepare_image", None)
        vectors = stage.collect(model, batch, [stage.launch(model, pack) for pack in work]).features["image_embedding"]
    assert vectors.null_count == 0


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("vit", {"resample": 1}),
        ("dinov2", {"do_pad": True}),
        ("convnext", {"image_processor_type": "ViTImageProcessor", "size": {"height": 40, "width": 56}, "resample": 0}),
    ],
)
def test_settings_that_the_kernels_lack_are_followed_by_the_checkpoints_own_processor(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    directory = BACKBONES[family](tmp_path / family)
    edit_json(directory, "preprocessor_config.json", **changes)
    encoder = load_encoder(directory, CPU)
    assert isinstance(encoder, VisionEncoder)
    assert encoder.spec.family == family
    assert "its image processor" in encoder.spec.notes[0]
    assert "preprocessed by the checkpoint's own processor" in encoder.spec.notes[0]
    processor, model = AutoImageProcessor.from_pretrained(directory, backend="pil"), reference(directory)
    inputs = [processor(image, input_data_format="channels_last", return_tensors="pt") for image in IMAGES]
    pool = (lambda output: output.last_hidden_state[:, 0]) if family == "vit" else pooled
    check(encoder.encode_image(IMAGES).pooled, [pool(model(**values)) for values in inputs])


@torch.inference_mode()
@pytest.mark.parametrize("family", ["clip", "siglip", "blip"])
def test_texts_do_not_change_if_images_need_the_checkpoints_own_processor(family: str, tmp_path: Path) -> None:
    directory = BUILDERS[family](tmp_path / family)
    before = load_encoder(directory, CPU)
    name = "processor_config.json" if (directory / "processor_config.json").is_file() else "preprocessor_config.json"
    edit_json(directory, name, "image_processor" if name.startswith("processor") else None, resample=1)
    after = load_encoder(directory, CPU)
    assert isinstance(after, ImageTextEncoder)
    assert after.tokenize(TEXTS) == before.tokenize(TEXTS)
    ids = before.tokenize(TEXTS)
    assert torch.equal(after.encode_text(ids).pooled, before.encode_text(ids).pooled)
    prepared = after.prepare("image", IMAGES)
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    pixels = [
        processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"] for image in IMAGES
    ]
    assert torch.equal(torch.stack(prepared), torch.cat(pixels))
    assert torch.equal(after.encode_image(prepared).pooled, after.encode_image(IMAGES).pooled)
    assert not torch.allclose(after.encode_image(IMAGES).pooled, before.encode_image(IMAGES).pooled, atol=1e-3)
    assert "has resample 1" in after.spec.notes[0]


def test_a_checkpoint_with_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "new", "auto_map": {"AutoModel": "modeling.NewModel", "AutoConfig": "modeling.C"}})
    )
    (tmp_path / "modeling.py").write_text("raise SystemExit('run')")
    with pytest.raises(ModelError, match=r"unsupported model_type 'new'.*Code in a checkpoint is never run"):
        describe(tmp_path)


def test_without_a_processor_the_error_says_what_is_missing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for path in checkpoints["swin"].iterdir():
        if path.name != "preprocessor_config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match="expected a tokenizer, an image processor or a feature extractor, found none"):
        describe(tmp_path)
