"""Tiny checkpoints of CLIP, SigLIP and SigLIP 2, built from a configuration, with processor and tokenizer files."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTokenizer,
)

SIDE = 48  # pixels of a picture
PATCH = 16
WIDTH = 32
TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def save_clip(directory: Path) -> Path:
    """A CLIP of 48 x 48 pixels, 77 tokens and 24 dimensions."""
    vocabulary = _byte_vocabulary()
    merges = [("a", "n"), ("an", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    config = CLIPConfig(
        text_config=TOWER
        | {
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 77,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        vision_config=TOWER | {"image_size": SIDE, "patch_size": PATCH},
        projection_dim=24,
    )
    _save(CLIPModel, config, directory)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        directory
    )
    tokenizer.save_pretrained(directory)
    return directory


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
    _save(SiglipModel, config, directory)
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
    _save(Siglip2Model, config, directory)
    Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=20).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


BUILDERS: dict[str, Callable[[Path], Path]] = {"clip": save_clip, "siglip": save_siglip, "siglip2": save_siglip2}


def _save(cls: Any, config: Any, directory: Path) -> None:
    torch.manual_seed(0)
    model = cls(config)
    for parameter in model.parameters():  # livelier than a fresh model, whose vectors hardly depend on the input
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    model.save_pretrained(directory)


def _byte_vocabulary() -> dict[str, int]:
    """CLIP's: every byte, alone and at a word's end, a few merges, then the special tokens, the end last."""
    alphabet = sorted(ByteLevel.alphabet())
    merged = ["an", "and</w>", "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate([*alphabet, *(byte + "</w>" for byte in alphabet), *merged])}


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
