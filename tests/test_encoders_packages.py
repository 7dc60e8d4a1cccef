"""Models of open_clip, timm and sentence-transformers against the packages themselves, from the same directories."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from encoder_checks import edit_json
from pictures import pictures
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling
from timm.models import save_for_hf
from tiny_audio_text import TEXTS, WIDTH, save_bert
from torch.nn.functional import cosine_similarity

import mmbeam
from mmbeam.commands.common import check_model
from mmbeam.errors import ModelError, UsageError
from mmbeam.models import loading
from mmbeam.models.encoders import describe, load
from mmbeam.models.encoders.packages import SentencePackageEncoder
from mmbeam.models.loading import resolve
from mmbeam.stages.embed import embed_stage
from mmbeam.stages.generate import generate_stage

CPU = torch.device("cpu")
SIDE = 48
IMAGES = pictures()
CLIP_TEXTS = ["a photo of a cat", "two dogs & a <end_of_text>", "", "naïve café " * 20]


def save_open_clip(directory: Path, **preprocess: Any) -> Path:
    """A CLIP of open_clip with random weights: 48 x 48 pixels, 16 tokens, 24 numbers."""
    directory.mkdir(parents=True, exist_ok=True)
    vision = {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    options = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"size": SIDE, **options, **preprocess},
    }
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("packages") / "open_clip")


def load_package(package: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load(describe(directory, package), CPU, dtype)


def close(ours: torch.Tensor, theirs: torch.Tensor, cosine: float = 0.999) -> None:
    """Pillow's resizing differs from the kernels' by two levels of 256 at most."""
    assert ours.shape == theirs.shape
    assert cosine_similarity(ours.float(), theirs.float()).min() > cosine
    assert (theirs - theirs[0]).abs().max() > 1e-2 * theirs.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_images_equal_open_clip(mode: str, clip_directory: Path, tmp_path: Path) -> None:
    if mode != "shortest":
        clip_directory = save_open_clip(tmp_path / "clip", resize_mode=mode)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_directory}")
    theirs = model.eval().encode_image(torch.stack([transform(Image.fromarray(image)) for image in IMAGES]))
    encoder = load_package("open_clip", clip_directory)
    assert (encoder.recipe is None) == (mode == "longest") == bool(encoder.spec.notes)
    close(encoder.encode_image(IMAGES).pooled, theirs)
    if mode == "longest":
        prepared = encoder.prepare("image", IMAGES)
        assert torch.allclose(encoder.encode_image(prepared).pooled, theirs, atol=1e-5)


@torch.inference_mode()
def test_texts_equal_open_clip(clip_directory: Path) -> None:
    model = open_clip.create_model(f"local-dir:{clip_directory}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_directory}")
    encoder = load_package("open_clip", clip_directory)
    plain = [text for text in CLIP_TEXTS if "<" not in text]
    assert encoder.tokenize(plain) == tokenizer(plain).tolist()
    assert torch.allclose(encoder.encode_text(encoder.tokenize(plain)).pooled, model.encode_text(tokenizer(plain)))
    [ids] = encoder.tokenize(CLIP_TEXTS[1:2])
    assert ids.count(tokenizer.eot_token_id) == 1  # the text's own is spelt
    assert encoder.count_tokens(CLIP_TEXTS)[2:] == [0, 20 * 4]  # a piece for each part of "naïve café"
    assert (dict(encoder.spec.dims), encoder.spec.max_text_tokens) == ({"image": 24, "text": 24}, 16)


@pytest.mark.parametrize(("dtype", "cosine"), [(torch.bfloat16, 0.99), (torch.float16, 0.999)])
def test_half_precision_is_close(dtype: torch.dtype, cosine: float, clip_directory: Path) -> None:
    half, single = (load_package("open_clip", clip_directory, kind) for kind in (dtype, torch.float32))
    close(half.encode_image(IMAGES).pooled, single.encode_image(IMAGES).pooled, cosine)
    ids = single.tokenize(CLIP_TEXTS)
    close(half.encode_text(ids).pooled, single.encode_text(ids).pooled, cosine)


def test_the_prefix_leads_to_the_package(clip_directory: Path) -> None:
    name = f"open_clip:{clip_directory}"
    check_model(name)
    resolved = resolve(name)
    assert (resolved.package, resolved.reference) == ("open_clip", name)
    encoder = mmbeam.load_encoder(name, device="cpu")
    vectors = encoder.encode(images=[np.asarray(IMAGES[0])], texts=["a cat"])
    assert {modality: vector.shape for modality, vector in vectors.items()} == {"image": (1, 24), "text": (1, 24)}
    with pytest.raises(UsageError, match="a model of open_clip writes no texts"):
        generate_stage(name)
    with pytest.raises(UsageError, match=r"`tokens`: .* has no vector per token of image and text"):
        embed_stage(name, tokens=True)


@pytest.mark.parametrize(
    ("model", "repository"),
    [
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("open_clip:org/name@main", "org/name@main"),
        ("timm:vit_base_patch16_224.augreg_in21k", "timm/vit_base_patch16_224.augreg_in21k"),
        ("timm:timm/resnet18.a1_in1k@abc", "timm/resnet18.a1_in1k@abc"),
    ],
)
def test_a_name_of_the_package_is_a_repository(model: str, repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def stop(name: str) -> Any:
        found.append(name)
        raise ModelError("stop")

    monkeypatch.setattr(loading, "_find", stop)
    with pytest.raises(ModelError, match="stop"):
        resolve(model)
    assert found == [repository]


def test_an_unknown_name_or_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"a model that open_clip has on the hub, such as ViT-B-32/"):
        resolve("open_clip:ViT-B-32/nothing")
    with pytest.raises(ModelError, match="a model that timm has on the hub"):
        resolve("timm:nothing")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"timm:resnet18: needs the package; run `pip install 'mmbeam\[timm\]'`"):
        resolve("timm:resnet18")


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("test_vit", {"input_size": (3, 64, 64), "crop_pct": 0.9, "interpolation": "bicubic"}),
        ("resnet10t", {"input_size": (3, 64, 64), "crop_pct": 0.95, "interpolation": "bilinear"}),
        ("resnet10t", {"input_size": (3, 64, 64), "crop_mode": "squash", "crop_pct": 1.0}),
        ("resnet10t", {"input_size": (3, 64, 64), "crop_mode": "border"}),
    ],
)
def test_images_equal_timm(name: str, data: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    arguments = {"img_size": 64} if name == "test_vit" else {}
    model = timm.create_model(name, pretrained=False, pretrained_cfg_overlay=data, **arguments).eval()
    save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
    encoder = load_package("timm", tmp_path)
    options = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**options, is_training=False)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in IMAGES])
    theirs = model.forward_head(model.forward_features(pixels), pre_logits=True)
    assert (encoder.recipe is None) == (data.get("crop_mode") == "border") == bool(encoder.spec.notes)
    assert encoder.spec.dims == {"image": theirs.shape[1]}
    close(encoder.encode_image(IMAGES).pooled, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hf-hub:org/name"}, "architecture is 'hf-hub:org/name'; expected a model of timm"),
        ({"architecture": None}, "architecture is None"),
        ({"architecture": "resnet26t"}, "its weights do not fit|weights are missing"),
    ],
)
def test_a_timm_directory_that_cannot_be_used(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_for_hf(timm.create_model("resnet10t", pretrained=False), str(tmp_path), safe_serialization=True)
    edit_json(tmp_path, "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_package("timm", tmp_path)


def test_pickled_weights_of_open_clip_are_never_loaded(clip_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_bytes((clip_directory / "open_clip_config.json").read_bytes())
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickled weights"):
        describe(tmp_path, "open_clip")


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder that pools a weighted mean of all layers."""
    root = tmp_path_factory.mktemp("layered")
    transformer = Transformer(
        str(save_bert(root / "bert")), max_seq_length=20, config_kwargs={"output_hidden_states": True}
    )
    torch.manual_seed(0)
    modules = [transformer, WeightedLayerPooling(WIDTH, num_hidden_layers=2, layer_start=0), Pooling(WIDTH)]
    SentenceTransformer(modules=modules, device="cpu", prompts={"query": "ask: "}).save(str(root / "model"))
    return root / "model"


def test_unknown_modules_run_by_sentence_transformers(layered: Path) -> None:
    encoder = mmbeam.load_encoder(str(layered), device="cpu")
    assert isinstance(encoder._model, SentencePackageEncoder)
    theirs = SentenceTransformer(str(layered), device="cpu").encode(TEXTS, batch_size=1, normalize_embeddings=True)
    assert np.abs(encoder.encode(texts=TEXTS)["text"] - theirs).max() < 1e-5
    assert encoder._model.count_tokens(["a dog barks", ""]) == [9, 0]
    asked = mmbeam.load_encoder(str(layered), device="cpu", text_prompt="query").encode(texts=TEXTS)["text"]
    theirs = SentenceTransformer(str(layered), device="cpu").encode(
        TEXTS, prompt_name="query", batch_size=1, normalize_embeddings=True
    )
    assert np.abs(asked - theirs).max() < 1e-5
    notes = encoder._stage.spec.notes
    assert "expected Transformer, Pooling and then any of" in notes[0]
    assert "it runs by the package" in notes[0]


def test_code_and_pickles_in_a_sentence_encoder_are_never_run(layered: Path, tmp_path: Path) -> None:
    for number, (name, changes, message) in enumerate(
        [
            ("2_Pooling/config.json", {"tokenizer_class": "os.system"}, "tokenizer_class is 'os.system', code that is"),
            ("2_Pooling/config.json", {"types": {"a": "evil.Code"}}, "types is 'evil.Code', code that is never run"),
        ]
    ):
        directory = shutil.copytree(layered, tmp_path / str(number))
        edit_json(directory, name, **changes)
        with pytest.raises(ModelError, match="expected Transformer, Pooling"):  # the reason is in the log
            describe(directory)
        with pytest.raises(ModelError, match=message):
            SentencePackageEncoder.describe(directory, {})
    directory = shutil.copytree(layered, tmp_path / "pickled")
    (directory / "2_Pooling" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickled weights are never loaded"):
        SentencePackageEncoder.describe(directory, {})
