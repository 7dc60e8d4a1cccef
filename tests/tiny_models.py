"""Tiny checkpoints with random weights: SigLIP and SigLIP 2, beside the CLIP that the package itself has."""

import io
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from tokenizers.processors import TemplateProcessing
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTokenizer,
)

from mmbeam.models.tiny import PATCH, SIDE, TOWER, save_clip, save_lively


def save_siglip(directory: Path) -> Path:
    """A SigLIP of 48 x 48 pixels and 64 tokens, with a sentencepiece tokenizer, trained without a mask."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "trained.model").write_bytes(_sentencepiece_model())
    tokenizer = SiglipTokenizer(str(directory / "trained.model"), model_input_names=["input_ids"])
    tokenizer.save_pretrained(directory)
    (directory / "trained.model").unlink()
    config = SiglipConfig(
        text_config=TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 64},
        vision_config=TOWER | {"image_size": SIDE, "patch_size": PATCH},
    )
    save_lively(SiglipModel, config, directory)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(directory)
    return directory


def save_siglip2(directory: Path) -> Path:
    """A SigLIP 2 NaFlex of at most 20 patches of 16 pixels and 64 tokens."""
    vocabulary = _byte_fallback_vocabulary()
    tokenizer = Siglip2Tokenizer(
        vocab=vocabulary, merges=[], model_input_names=["input_ids"], padding_side="right", model_max_length=64
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    config = Siglip2Config(
        text_config=TOWER | {"vocab_size": len(vocabulary), "max_position_embeddings": 64},
        vision_config=TOWER | {"num_patches": 16, "patch_size": PATCH},
    )
    save_lively(Siglip2Model, config, directory)
    Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=20).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


BUILDERS: dict[str, Callable[[Path], Path]] = {"clip": save_clip, "siglip": save_siglip, "siglip2": save_siglip2}


def _byte_fallback_vocabulary() -> dict[str, int]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    return {token: index for index, token in enumerate(tokens)}


def _sentencepiece_model() -> bytes:
    """A unigram model trained on a few sentences, as SigLIP's is on C4: `</s>` is 1 and pads."""
    sentences = ["a photo of a cat and a dog", "the quick brown fox jumps over the lazy dog", "zwei Katzen im Garten"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 10),
        model_writer=model,
        vocab_size=64,
        hard_vocab_limit=False,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=0,
        minloglevel=2,
    )
    return model.getvalue()
