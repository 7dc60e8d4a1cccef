"""Tiny checkpoints of captioners, with random weights and all their files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_audio_text import TOWER, byte_tokenizer
from tiny_chat_models import save_florence2
from tiny_clip import PATCH, SIDE
from tiny_generators_hub import byte_vocabulary, ids_of, save
from tiny_models import SQUARE, save_blip
from tiny_text import unigrams
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    GPT2Config,
    GPT2Tokenizer,
    OPTConfig,
    T5Config,
    T5Tokenizer,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)


def save_vit_gpt2(directory: Path) -> Path:
    """A ViT of 48 x 48 pixels with a GPT-2 of 64 positions behind a projection."""
    tokenizer = GPT2Tokenizer(vocab=byte_vocabulary("<|endoftext|>"), merges=[])
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 256}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**TOWER, image_size=SIDE, patch_size=PATCH),
        GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=4, **ids),
    )
    config.decoder_start_token_id = config.pad_token_id = config.eos_token_id = 256
    return save(VisionEncoderDecoderModel, config, directory, tokenizer, ViTImageProcessorPil(size=SQUARE))


def save_blip2(directory: Path, encoder_decoder: bool = False) -> Path:
    """A BLIP-2 of 48 x 48 pixels and 4 tokens an image, with an OPT or a T5."""
    if encoder_decoder:
        tokenizer: Any = T5Tokenizer(vocab=unigrams(["<pad>", "</s>", "<unk>"]), extra_ids=4)
        sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        text: Any = T5Config(decoder_start_token_id=0, bos_token_id=1, vocab_size=len(tokenizer) + 1, **sizes)
    else:
        tokenizer = byte_tokenizer()
        sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = ids_of(tokenizer) | {"vocab_size": len(tokenizer) + 1}
        text = OPTConfig(word_embed_proj_dim=32, max_position_embeddings=96, **sizes, **ids)
    vision = Blip2VisionConfig(**TOWER, image_size=SIDE, patch_size=PATCH)
    qformer = Blip2QFormerConfig(**TOWER, encoder_hidden_size=32, vocab_size=10)
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=len(tokenizer),
    )
    processor = Blip2Processor(BlipImageProcessorPil(size=SQUARE), tokenizer, num_query_tokens=4)
    return save(Blip2ForConditionalGeneration, config, directory, processor)


CAPTIONERS: dict[str, Callable[[Path], Path]] = {
    "vision-encoder-decoder": save_vit_gpt2,
    "blip": lambda directory: save_blip(directory, BlipForConditionalGeneration),
    "blip-2": save_blip2,
    "florence2": save_florence2,
    "blip-2-t5": lambda directory: save_blip2(directory, encoder_decoder=True),
}
