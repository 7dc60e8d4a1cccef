"""The other text families against transformers' own models and tokenizers, from the same directories."""

from pathlib import Path

import pytest
import torch
import transformers
from encoder_checks import load_encoder
from tiny_audio_text import TEXTS, WIDTH
from tiny_text import TEXT_FAMILIES
from transformers import AutoTokenizer

from mmbeam.models.encoders.text import ENCODER_HALVES

CLOSE = 2e-5  # on vectors of length 1 to 10, float32
HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}  # largest distance of a unit vector from its float32 self
FAMILY = pytest.mark.parametrize("family", TEXT_FAMILIES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for family, save in TEXT_FAMILIES.items():
        save(root / family)
    return root


@FAMILY
def test_a_vector_is_the_mean_over_the_references_tokens(family: str, root: Path, device: torch.device) -> None:
    cls = getattr(transformers, ENCODER_HALVES.get(family, "AutoModel"))
    model = cls.from_pretrained(root / family, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(root / family)
    encoder = load_encoder(root / family, device)
    assert (encoder.spec.family, dict(encoder.spec.dims), encoder.spec.max_text_tokens) == (family, {"text": WIDTH}, 64)
    encoded = encoder.encode_text(encoder.tokenize(TEXTS), tokens=True)
    assert encoded.tokens is not None
    for text, vector, tokens in zip(TEXTS, encoded.pooled.cpu(), encoded.tokens, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state[0]
        assert (hidden.mean(0) - vector).abs().max() < CLOSE
        assert torch.allclose(tokens.cpu(), hidden, atol=2e-4)
    assert (encoded.pooled[0] - encoded.pooled[2]).abs().max() > 0.05  # the tiny model distinguishes texts


@FAMILY
def test_padding_does_not_change_vectors(family: str, root: Path, device: torch.device) -> None:
    encoder = load_encoder(root / family, device)
    ids = encoder.tokenize(TEXTS)
    together = encoder.encode_text(ids).pooled
    for text_ids, vector in zip(ids, together, strict=True):
        assert (encoder.encode_text([text_ids]).pooled[0] - vector).abs().max() < CLOSE


@pytest.mark.parametrize("dtype", HALF)
@FAMILY
def test_half_precision_is_close_to_single(family: str, dtype: torch.dtype, root: Path, device: torch.device) -> None:
    full, half = (load_encoder(root / family, device, precision) for precision in (torch.float32, dtype))
    ids = full.tokenize(TEXTS)
    unit = torch.nn.functional.normalize
    distances = unit(full.encode_text(ids).pooled, dim=-1) - unit(half.encode_text(ids).pooled, dim=-1)
    assert distances.norm(dim=-1).max() < HALF[dtype]


@FAMILY
def test_a_special_token_in_a_text_is_not_a_special_token(family: str, root: Path) -> None:
    """Even if a normalizer produces it from full-width letters."""
    encoder = load_encoder(root / family, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(root / family)
    special = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
    (empty,) = encoder.tokenize([""])
    for token in special:
        wide = "".join(chr(ord(letter) + 0xFEE0) for letter in token)
        for ids in encoder.tokenize([f"a dog {token} er", f"a dog {wide} er"]):
            added = [i for i in ids if i in tokenizer.all_special_ids and i != tokenizer.unk_token_id]
            assert added == empty
