"""Tiny checkpoints with random weights: image and text encoders other than CLIP, and vision backbones."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tiny_clip import DIM, PATCH, SIDE, TOWER, save_clip, save_random
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertTokenizer,
    BitImageProcessorPil,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    MetaClip2Config,
    MetaClip2Model,
    ResNetConfig,
    ResNetForImageClassification,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    XLMRobertaTokenizer,
)

SQUARE = {"height": SIDE, "width": SIDE}


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
    save_random(SiglipModel, config, directory)
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
    save_random(Siglip2Model, config, directory)
    Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=20).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_metaclip2(directory: Path) -> Path:
    """A MetaCLIP 2 of 48 x 48 pixels and 77 tokens, with a tokenizer like XLM-RoBERTa's, whose `</s>` is 2."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz.,!</>äöüжд世界"] + [("▁cat", -3.0)]
    tokenizer = XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=77)
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": 2, "bos_token_id": 0}
    config = MetaClip2Config(
        text_config=text, vision_config=TOWER | {"image_size": SIDE, "patch_size": PATCH}, projection_dim=DIM
    )
    save_random(MetaClip2Model, config, directory)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_blip(directory: Path, model: Any = BlipForImageTextRetrieval) -> Path:
    """A BLIP of 48 x 48 pixels and 64 tokens, for retrieval or of another class."""
    letters = [*"abcdefghijklmnopqrstuvwxyz.,!?", "cat", "dog", "photo"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=64)
    text = TOWER | {"vocab_size": len(tokens), "max_position_embeddings": 64, "encoder_hidden_size": 32}
    ids = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    vision = TOWER | {"image_size": SIDE, "patch_size": PATCH}
    config = BlipConfig(text_config=text | ids, vision_config=vision, projection_dim=DIM, image_text_hidden_size=DIM)
    save_random(model, config, directory)
    BlipProcessor(BlipImageProcessorPil(size=SQUARE), tokenizer).save_pretrained(directory)
    return directory


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "clip": save_clip,
    "metaclip_2": save_metaclip2,
    "siglip": save_siglip,
    "siglip2": save_siglip2,
    "blip": save_blip,
}

STAGES: dict[str, Any] = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}


def save_vit(directory: Path) -> Path:
    """A ViT of 48 x 48 pixels: a classifier without a pooler, like most published ones."""
    save_random(ViTForImageClassification, ViTConfig(**TOWER, image_size=SIDE, patch_size=PATCH), directory)
    ViTImageProcessorPil(size=SQUARE).save_pretrained(directory)
    return directory


def save_dinov2(directory: Path) -> Path:
    """A DINOv2 with positions for larger images (80 x 80) than its processor makes."""
    config = Dinov2Config(**_without_intermediate(), image_size=80, patch_size=PATCH)
    save_random(Dinov2Model, config, directory)
    BitImageProcessorPil(size={"shortest_edge": 55}, crop_size=SQUARE).save_pretrained(directory)
    return directory


def save_dinov2_with_registers(directory: Path) -> Path:
    """A DINOv2 with two registers."""
    options = _without_intermediate() | {"image_size": SIDE, "patch_size": PATCH, "num_register_tokens": 2}
    save_random(Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**options), directory)
    BitImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE).save_pretrained(directory)
    return directory


def save_dinov3_vit(directory: Path) -> Path:
    """A DINOv3 ViT with two registers."""
    config = DINOv3ViTConfig(**TOWER, image_size=SIDE, patch_size=PATCH, num_register_tokens=2)
    save_random(DINOv3ViTModel, config, directory)
    DINOv3ViTImageProcessor(size=SQUARE).save_pretrained(directory)
    return directory


def save_dinov3_convnext(directory: Path) -> Path:
    """A DINOv3 ConvNeXt."""
    options: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_scale_init_value": 1.0}
    save_random(DINOv3ConvNextModel, DINOv3ConvNextConfig(**options), directory)
    DINOv3ViTImageProcessor(size=SQUARE).save_pretrained(directory)
    return directory


def save_resnet(directory: Path) -> Path:
    """A ResNet classifier whose processor resizes to 54 pixels and crops to 48."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck")
    ResNetForImageClassification(config).save_pretrained(directory)
    ConvNextImageProcessorPil(size={"shortest_edge": SIDE}).save_pretrained(directory)
    return directory


def save_convnext(directory: Path) -> Path:
    """A ConvNeXt."""
    save_random(ConvNextModel, ConvNextConfig(**STAGES, layer_scale_init_value=1.0), directory)
    ConvNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_pct=0.95).save_pretrained(directory)
    return directory


def save_convnextv2(directory: Path) -> Path:
    """A ConvNeXt V2 of 384 pixels, to which images are warped, not cropped."""
    save_random(ConvNextV2Model, ConvNextV2Config(**STAGES, patch_size=PATCH), directory)
    ConvNextImageProcessorPil(size={"shortest_edge": 384}).save_pretrained(directory)
    return directory


BACKBONES: dict[str, Callable[[Path], Path]] = {
    "vit": save_vit,
    "dinov2": save_dinov2,
    "dinov2_with_registers": save_dinov2_with_registers,
    "dinov3_vit": save_dinov3_vit,
    "dinov3_convnext": save_dinov3_convnext,
    "resnet": save_resnet,
    "convnext": save_convnext,
    "convnextv2": save_convnextv2,
}


def _without_intermediate() -> dict[str, Any]:
    """DINOv2 has a ratio in its place."""
    return {key: value for key, value in TOWER.items() if key != "intermediate_size"}


def _byte_fallback_vocabulary() -> dict[str, int]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    return {token: index for index, token in enumerate(tokens)}


def _sentencepiece_model() -> bytes:
    """A unigram model trained on a few sentences, like SigLIP's on C4: `</s>` is 1 and is the padding token."""
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
