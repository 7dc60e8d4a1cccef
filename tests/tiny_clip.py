"""A tiny CLIP with random weights, and how every tiny checkpoint of the tests gets its weights.

The checkpoints have all the files of a published one, and the same code runs them.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from mmbeam.models.loading import quiet_transformers

DIM = 24  # width of an embedding
SIDE, PATCH = 48, 16  # pixels
TOWER: dict[str, Any] = {  # sizes of a transformer
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def save_clip(directory: Path) -> Path:
    """Write a CLIP of 48 x 48 pixels, 77 tokens and 24 dimensions; return its directory."""
    alphabet = sorted(ByteLevel.alphabet())  # the characters that stand for the 256 bytes: no text is unknown
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    tokens += ["an", "and</w>", "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    merges: Any = [("a", "n"), ("an", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    text = TOWER | {
        "vocab_size": len(tokens),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = TOWER | {"image_size": SIDE, "patch_size": PATCH}
    save_random(CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM), directory)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_random(cls: Any, config: Any, directory: Path) -> None:
    """Write a model of `cls` with large random weights: a freshly initialised one maps every input to one vector."""
    quiet_transformers()
    torch.manual_seed(0)
    model = cls(config)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dim() > 1 and value.is_floating_point():
            torch.nn.init.normal_(value.data, std=1.5 * value[0].numel() ** -0.5)
        elif name.endswith("audio_encoder.batch_norm.running_mean"):  # of a CLAP, in decibels
            value.fill_(-40.0)
        elif name.endswith("audio_encoder.batch_norm.running_var"):
            value.fill_(400.0)
    model.save_pretrained(directory)
