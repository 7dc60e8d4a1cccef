"""Tiny models with random weights, built from a configuration: for the demo and for tests, where no hub is.

They have all the files that a published checkpoint has, and the same code runs them. Nothing was learned:
what their vectors say of an input is what any random projection says.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    RobertaTokenizer,
)

from mmbeam.models.loading import quiet_transformers

DIM = 24  # of a vector
SIDE, PATCH = 48, 16  # pixels
SECONDS = 2  # of sound that CLAP hears at once
TOWER: dict[str, Any] = {  # of a transformer
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def save_clip(directory: Path) -> Path:
    """Write a CLIP of 48 x 48 pixels, 77 tokens and 24 dimensions; its directory."""
    tokens = [*_bytes(), *(byte + "</w>" for byte in _bytes())]
    tokens += ["an", "and</w>", "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    merges: Any = [("a", "n"), ("an", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    tokenizer = CLIPTokenizer(vocab=_numbered(tokens), merges=merges, model_max_length=77)
    text = TOWER | {
        "vocab_size": len(tokens),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = TOWER | {"image_size": SIDE, "patch_size": PATCH}
    save_lively(CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM), directory)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pictures.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_clap(directory: Path) -> Path:
    """Write a CLAP of windows of 2 s at 48 kHz, 64 mel bins and 24 dimensions; its directory."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *_bytes()]
    tokenizer = RobertaTokenizer(vocab=_numbered(tokens), merges=[], model_max_length=64)
    audio = {
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "spec_size": 256,
    }
    text = TOWER | {"vocab_size": len(tokens), "max_position_embeddings": 66}
    save_lively(ClapModel, ClapConfig(text_config=text, audio_config=audio, projection_dim=DIM), directory)
    sounds = ClapFeatureExtractor(truncation="rand_trunc", max_length_s=SECONDS, frequency_min=50)
    processor: Any = ClapProcessor  # untyped
    processor(sounds, tokenizer).save_pretrained(directory)
    return directory


def compute_on_one_thread() -> None:
    """For this process, from here on: a tiny model's operations are too short to share, and wait for busy cores."""
    torch.set_num_threads(1)


def save_lively(cls: Any, config: Any, directory: Path) -> None:
    """Write a model of `cls` whose weights are random but large: a fresh model's vectors are all alike."""
    quiet_transformers()
    torch.manual_seed(0)
    model = cls(config)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dim() > 1 and value.is_floating_point():
            torch.nn.init.normal_(value.data, std=1.5 * value[0].numel() ** -0.5)
        elif name.endswith("running_mean"):  # of a CLAP: as after training on spectrograms in decibels
            value.fill_(-40.0)
        elif name.endswith("running_var"):
            value.fill_(400.0)
    model.save_pretrained(directory)


def _bytes() -> list[str]:
    """The letters that byte-level tokenizers write the 256 bytes with: no text is unknown to them."""
    return sorted(ByteLevel.alphabet())


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}
