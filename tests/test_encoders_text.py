"""Text encoders against transformers and sentence-transformers, from the same directories."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from encoder_checks import edit_json, load_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling
from tiny_audio_text import TEXTS, WIDTH, save_bert, save_modernbert, save_mpnet, save_roberta, save_t5
from transformers import AutoModel, AutoTokenizer

import mmbeam
from mmbeam.errors import ModelError, UsageError
from mmbeam.jobs.embed import embed_run
from mmbeam.models.encoders import describe
from mmbeam.models.encoders.base import Encoder
from mmbeam.models.encoders.sentence import LEGACY_MODES, pool
from mmbeam.models.encoders.text import TextEncoder
from mmbeam.stages.embed import embed_stage

CLOSE = 1e-5  # on vectors of length 1 to 10, float32
HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}  # largest distance of a unit vector from its float32 self
PLAIN: dict[str, Callable[[Path], Path]] = {
    "bert": save_bert,
    "roberta": save_roberta,
    "modernbert": save_modernbert,
    "mpnet": save_mpnet,
}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for name, save in PLAIN.items():
        save(root / name)
    save_t5(root / "t5")
    return root


def encode(encoder: Encoder, texts: list[str]) -> np.ndarray:
    return encoder.encode_text(encoder.tokenize(texts)).pooled.cpu().numpy()


def sentence(root: Path, target: Path, *after: Any, base: str = "bert", lower: bool = False, **options: Any) -> Path:
    """Save a transformer and the modules after it with sentence-transformers; return the directory."""
    torch.manual_seed(1)
    transformer = Transformer(str(root / base), max_seq_length=options.pop("max_seq_length", 20), do_lower_case=lower)
    SentenceTransformer(modules=[transformer, *after], device="cpu", **options).save(str(target))
    return target


def reference(directory: Path) -> np.ndarray:
    """Return sentence-transformers' vectors of TEXTS, each encoded alone."""
    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    return model.encode(TEXTS, batch_size=1, show_progress_bar=False)


@pytest.mark.parametrize("name", PLAIN)
def test_a_vector_without_modules_json_is_the_mean_over_tokens(name: str, root: Path, device: torch.device) -> None:
    directory = root / name
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoder = load_encoder(directory, device)
    assert (encoder.spec.family, encoder.spec.max_text_tokens) == (name, 64)
    vectors = encode(encoder, TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state[0]
        assert np.abs(hidden.mean(0).numpy() - vector).max() < CLOSE
    assert np.abs(vectors[0] - vectors[2]).max() > 0.1  # the tiny model distinguishes texts


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_vector_without_modules_json_equals_sentence_transformers(
    name: str, root: Path, device: torch.device
) -> None:
    model = SentenceTransformer(str(root / name), device="cpu", local_files_only=True)
    short = TEXTS[:-2]  # sentence-transformers counts two positions too many for RoBERTa, and fails
    assert np.abs(model.encode(short, batch_size=1) - encode(load_encoder(root / name, device), short)).max() < CLOSE


@pytest.mark.parametrize("name", PLAIN)
def test_padding_does_not_change_vectors(name: str, root: Path, device: torch.device) -> None:
    encoder = load_encoder(root / name, device)
    ids = encoder.tokenize(TEXTS)
    together = encoder.encode_text(ids, tokens=True)
    assert together.tokens is not None
    for position, text_ids in enumerate(ids):
        alone = encoder.encode_text([text_ids], tokens=True)
        assert torch.allclose(alone.pooled[0], together.pooled[position], atol=CLOSE)
        assert alone.tokens is not None
        assert alone.tokens[0].shape == (len(text_ids), WIDTH)
        assert torch.allclose(alone.tokens[0], together.tokens[position], atol=1e-4)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PLAIN)
def test_half_precision_is_close_to_single(name: str, dtype: torch.dtype, root: Path, device: torch.device) -> None:
    full, half = (encode(load_encoder(root / name, device, precision), TEXTS) for precision in (torch.float32, dtype))
    assert half.dtype == np.float32
    distances = full / np.linalg.norm(full, axis=1, keepdims=True) - half / np.linalg.norm(half, axis=1, keepdims=True)
    assert np.linalg.norm(distances, axis=1).max() < HALF[dtype]


MODES = [*LEGACY_MODES.values(), ("mean", "cls"), tuple(LEGACY_MODES.values())]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("prompted", [False, True])
def test_every_pooling_equals_sentence_transformers(
    mode: Any, prompted: bool, root: Path, tmp_path: Path, device: torch.device
) -> None:
    options: dict[str, Any] = {"prompts": {"q": "about rain. "}, "default_prompt_name": "q"} if prompted else {}
    directory = sentence(root, tmp_path, Pooling(WIDTH, mode, include_prompt=not prompted), **options)
    encoder = load_encoder(directory, device)
    vectors = encode(encoder, TEXTS)
    assert vectors.shape == (len(TEXTS), encoder.spec.dims["text"])
    assert encoder.spec.max_text_tokens == 20
    assert np.abs(reference(directory) - vectors).max() < 2 * CLOSE


@pytest.mark.parametrize("base", ["roberta", "modernbert", "mpnet", "t5"])
def test_a_chain_of_modules_equals_sentence_transformers(
    base: str, root: Path, tmp_path: Path, device: torch.device
) -> None:
    chain = [
        Pooling(WIDTH, ("mean", "cls")),
        Dropout(0.5),
        Dense(2 * WIDTH, 24, activation_function=torch.nn.GELU()),
        LayerNorm(24),
        Dense(24, 16, bias=False, activation_function=torch.nn.Identity(), use_residual=True),
        Normalize(),
    ]
    directory = sentence(root, tmp_path, *chain, base=base, prompts={"query": "ask: "}, default_prompt_name="query")
    encoder = load_encoder(directory, device)
    assert dict(encoder.spec.dims) == {"text": 16}
    assert dict(encoder.spec.token_dims) == {"text": WIDTH}
    assert np.abs(reference(directory) - encode(encoder, TEXTS)).max() < CLOSE
    assert np.allclose(np.linalg.norm(encode(encoder, TEXTS), axis=1), 1, atol=1e-6)


def test_a_truncated_dimension(root: Path, tmp_path: Path, device: torch.device) -> None:
    directory = sentence(root, tmp_path, Pooling(WIDTH), truncate_dim=10)
    encoder = load_encoder(directory, device)
    assert dict(encoder.spec.dims) == {"text": 10}
    assert np.abs(reference(directory) - encode(encoder, TEXTS)).max() < CLOSE


def test_a_prompt_that_is_not_the_default_is_not_used(root: Path, tmp_path: Path, device: torch.device) -> None:
    directory = sentence(root, tmp_path, Pooling(WIDTH), prompts={"query": "ask: "})
    encoder = load_encoder(directory, device)
    assert encoder.tokenize(["a dog"]) == load_encoder(root / "bert", device).tokenize(["a dog"])
    assert np.abs(reference(directory) - encode(encoder, TEXTS)).max() < CLOSE


@pytest.mark.parametrize("include", [True, False])
def test_a_prompt_by_name_or_text_and_fewer_dims_equal_sentence_transformers(
    include: bool, root: Path, tmp_path: Path
) -> None:
    prompts = {"query": "about rain. ", "document": ""}
    directory = sentence(root, tmp_path, Pooling(WIDTH, include_prompt=include), Normalize(), prompts=prompts)
    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True, truncate_dim=10)
    ours = mmbeam.load_encoder(str(directory), device="cpu", text_prompt="query", dims=10)
    assert dict(ours.dims) == {"text": 10}
    theirs = model.encode(TEXTS, prompt_name="query", batch_size=1, show_progress_bar=False, normalize_embeddings=True)
    assert np.abs(theirs - ours.encode(texts=TEXTS)["text"]).max() < CLOSE
    other = mmbeam.load_encoder(str(directory), device="cpu", text_prompt="a dog: ")
    theirs = SentenceTransformer(str(directory), device="cpu").encode(TEXTS, prompt="a dog: ", batch_size=1)
    assert np.abs(theirs - other.encode(texts=TEXTS)["text"]).max() < CLOSE
    with pytest.raises(UsageError, match=r"`text_prompt` qery: the checkpoint defines document, query.*did you mean"):
        embed_stage(str(directory), text_prompt="qery")
    with pytest.raises(UsageError, match=f"`dims` {WIDTH + 1}: .* has vectors of {WIDTH} numbers"):
        embed_stage(str(directory), dims=WIDTH + 1)
    with pytest.raises(UsageError, match="`text_prompt` query: the checkpoint defines no prompts"):
        embed_stage(str(root / "bert"), text_prompt="query")


def test_a_prompt_comes_before_the_texts_of_any_model(clip: Path) -> None:
    plain, prompted = (mmbeam.load_encoder(str(clip), device="cpu", text_prompt=text) for text in (None, "a cat: "))
    expected = plain.encode(texts=["a cat: and a dog"])["text"]
    assert np.allclose(prompted.encode(texts=["and a dog"])["text"], expected)
    images = [np.zeros((9, 9, 3), np.uint8)]
    assert np.array_equal(prompted.encode(images=images)["image"], plain.encode(images=images)["image"])


def test_the_run_keeps_prompt_and_dims(clip: Path, tmp_path: Path) -> None:
    stage = embed_stage(str(clip), text_prompt="a cat: ", dims=10)
    configuration = embed_run(str(tmp_path / "a"), [stage]).configuration
    assert (configuration["text_prompt"], configuration["dims"]) == ({"model": "a cat: "}, 10)
    plain = embed_run(str(tmp_path / "b"), [embed_stage(str(clip))]).configuration
    assert {"text_prompt", "dims"}.isdisjoint(plain)
    assert [column.type.value_type for output in stage.outputs for column in output.columns] == [pa.float32()] * 2
    assert [column.type.list_size for output in stage.outputs for column in output.columns] == [10] * 2


def test_the_files_of_version_2(root: Path, tmp_path: Path, device: torch.device) -> None:
    """Old class paths, a flag per pooling mode, limits in sentence_bert_config.json, and a folder per module."""
    modern = sentence(root, tmp_path / "modern", Pooling(WIDTH, ("cls", "max")), Normalize(), lower=True)
    old = tmp_path / "old"
    (old / "0_Transformer").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(modern / name, old / "0_Transformer")
    AutoTokenizer.from_pretrained(root / "bert", do_lower_case=False).save_pretrained(old / "0_Transformer")
    write(old / "0_Transformer" / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True})
    flags = {key: mode in ("cls", "max") for key, mode in LEGACY_MODES.items()}
    write(old / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, **flags})
    (old / "2_Normalize").mkdir()
    kinds = ["Transformer", "Pooling", "Normalize"]
    write(
        old / "modules.json",
        [{"path": f"{at}_{kind}", "type": f"sentence_transformers.models.{kind}"} for at, kind in enumerate(kinds)],
    )
    encoder, texts = load_encoder(old, device), [*TEXTS, "UPPER ΌΔΌΣ Case"]
    assert encoder.spec.max_text_tokens == 20
    assert np.abs(encode(load_encoder(modern, device), texts) - encode(encoder, texts)).max() < CLOSE
    assert np.abs(reference(modern) - encode(encoder, TEXTS)).max() < CLOSE
    assert encoder.tokenize(["UPPER"]) == encoder.tokenize(["upper"])


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), skip=st.integers(0, 3), seed=st.integers(0, 99))
def test_pooling_of_any_shape_equals_sentence_transformers(lengths: list[int], skip: int, seed: int) -> None:
    hidden = torch.randn(len(lengths), max(lengths), 6, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[at < length + skip for at in range(max(lengths))] for length in lengths]).long()
    modes = tuple(mode for mode in LEGACY_MODES.values() if skip < max(lengths) or mode not in ("max", "lasttoken"))
    features = {"token_embeddings": hidden, "attention_mask": mask, "prompt_length": skip}
    theirs = Pooling(6, modes, include_prompt=False)(features)["sentence_embedding"]
    assert torch.allclose(pool(hidden, mask, modes, skip), theirs, atol=1e-5)


def test_counting_tokens(root: Path, tmp_path: Path, device: torch.device) -> None:
    options: dict[str, Any] = {"prompts": {"q": "about rain. "}, "default_prompt_name": "q"}
    encoder = load_encoder(sentence(root, tmp_path, Pooling(WIDTH), **options), device)
    assert encoder.count_tokens(["", "a dog", "dog " * 100]) == [0, 4, 300]
    assert len(encoder.tokenize(["dog " * 100])[0]) == 20


def test_texts_without_tokens_are_encoded(root: Path, device: torch.device) -> None:
    encoder = load_encoder(root / "bert", device)
    assert encoder.tokenize([]) == []
    assert encoder.count_tokens([]) == []
    assert torch.isfinite(encoder.encode_text([[], [7, 8]]).pooled).all()  # a tokenizer without special tokens


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "unknown pooling \\['median'\\]"),
        ("2_Dense/config.json", {"activation_function": "os.system"}, "activation 'os.system' is unsupported"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.Linear"}, "activation 'torch.nn.Linear'"),
        ("2_Dense/config.json", {"out_features": 5}, "weights do not fit"),
        ("2_Dense/config.json", {"out_features": None}, "out_features is None; expected a positive integer"),
        ("config_sentence_transformers.json", {"default_prompt_name": "ask"}, "default_prompt_name is 'ask'"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task 'fill-mask'"),
        ("sentence_bert_config.json", {"model_args": {"rotary": 1}}, "unsupported options: rotary"),
        ("sentence_bert_config.json", {"modality_config": {"message": {}}}, "modality_config"),
    ],
)
def test_unsupported_options_of_a_sentence_encoder(
    name: str, changes: dict[str, Any], message: str, root: Path, tmp_path: Path
) -> None:
    directory = sentence(root, tmp_path, Pooling(WIDTH), Dense(WIDTH, 8))
    edit_json(directory, name, **changes)
    with pytest.raises(ModelError, match=message):
        load_encoder(directory, torch.device("cpu"))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{"path": "", "type": "sentence_transformers.models.Transformer"}], "found Transformer$"),
        ([{"path": "", "type": "sentence_transformers.models.CLIPModel"}], "found CLIPModel$"),
        ([{"path": "", "type": "custom_st.Transformer"}], "custom_st.Transformer is code from outside"),
        ([{"path": "../bert", "type": "sentence_transformers.models.Transformer"}], "names the file '../bert/"),
        ([{"path": ".bert", "type": "sentence_transformers.models.Transformer"}], "names the file '.bert/"),
        ([{"path": "onnx", "type": "sentence_transformers.models.Transformer"}], "names the file 'onnx/"),
        ({}, "expected a list of modules"),
    ],
)
def test_unsupported_contents_of_modules_json(modules: Any, message: str, root: Path, tmp_path: Path) -> None:
    directory = sentence(root, tmp_path, Pooling(WIDTH))
    write(directory / "modules.json", modules)
    with pytest.raises(ModelError, match=message):
        TextEncoder.describe(directory, {})


def test_pickled_weights_of_a_dense_layer_are_rejected(root: Path, tmp_path: Path) -> None:
    directory = sentence(root, tmp_path, Pooling(WIDTH), Dense(WIDTH, 8))
    torch.save({}, directory / "2_Dense" / "pytorch_model.bin")
    (directory / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"2_Dense: has no model\.safetensors"):
        describe(directory)
