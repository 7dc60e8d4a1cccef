"""A tiny EmbeddingGemma 2, built from a configuration, with all the files that the published checkpoint has."""

from pathlib import Path
from typing import Any

from tiny_clip import DIM, save_random
from tokenizers.processors import TemplateProcessing
from transformers import (
    EmbeddingGemma2Config,
    EmbeddingGemma2Model,
    EmbeddingGemma2Processor,
    EmbeddingGemma2VideoProcessor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    GemmaTokenizer,
)

SPECIAL = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}


def save_embedding_gemma2(directory: Path, towers: bool = True) -> Path:
    """Write one of 24 dimensions and 70 tokens per image; without `towers` it encodes texts only."""
    tokenizer = gemma_tokenizer()
    config = EmbeddingGemma2Config(
        text_config=_text(len(tokenizer)),
        vision_config=_vision() if towers else None,
        audio_config=_audio() if towers else None,
        video_token_id=len(tokenizer) - 1,
        eoa_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["eoa_token"]),
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()},
    )
    save_random(EmbeddingGemma2Model, config, directory)
    processor: Any = EmbeddingGemma2Processor  # untyped
    processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer,
        EmbeddingGemma2VideoProcessor(),
    ).save_pretrained(directory)
    return directory


def gemma_tokenizer() -> GemmaTokenizer:
    """Letters, bytes for everything else, and begin and end tokens around each text."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *SPECIAL.values(), "<|video|>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + [*"▁abcdefghijklmnopqrstuvwxyz.,<>|", "do", "dog"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges: Any = [("d", "o"), ("do", "g")]
    tokenizer = GemmaTokenizer(
        vocab=vocabulary, merges=merges, extra_special_tokens=SPECIAL | {"video_token": "<|video|>"}
    )
    ends = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return tokenizer


def _text(vocabulary: int) -> dict[str, Any]:
    heads = {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1}
    layers = {"sliding_window_pattern": 2, "sliding_window": 8, "hidden_size_per_layer_input": 8}
    return SIZES | heads | layers | {"vocab_size": vocabulary, "intermediate_size": 64, "embedding_dim": DIM}


def _vision() -> dict[str, Any]:
    options = {"intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 256}
    return SIZES | options | {"model_type": "gemma4_vision"}


def _audio() -> dict[str, Any]:
    return SIZES | {"output_proj_dims": 48, "model_type": "gemma4_audio"}
