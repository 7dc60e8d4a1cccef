"""Tiny checkpoints with heads for labels, from their configurations, with all their files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tiny_audio_text import CONVOLUTIONS, TOWER, byte_tokenizer, word_tokenizer
from tiny_auto import STAGED, VISION
from tiny_clip import SIDE, save_random
from tokenizers.pre_tokenizers import ByteLevel

SQUARE = {"height": SIDE, "width": SIDE}
ANIMALS = ("cat", "dog", "owl", "fox", "hen", "eel", "bat")


def names(labels: tuple[str, ...] = ANIMALS) -> dict[str, Any]:
    """The options of a configuration that name its classes."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def _save(cls: str, config: Any, directory: Path, *processors: Any) -> Path:
    save_random(getattr(transformers, cls), config, directory)
    for processor in processors:
        processor.save_pretrained(directory)
    return directory


def _image(
    model: str, cls: str, options: dict[str, Any], processor: str = "ViTImageProcessor", **settings: Any
) -> Callable[..., Path]:
    def build(directory: Path, **more: Any) -> Path:
        config = getattr(transformers, f"{model}Config")(**{**options, **names(), **more})
        made = getattr(transformers, f"{processor}Pil")(**{"size": SQUARE, **settings})
        return _save(model + cls, config, directory, made)

    return build


def _audio(model: str, cls: str, options: dict[str, Any], extractor: Any) -> Callable[..., Path]:
    def build(directory: Path, **more: Any) -> Path:
        config = getattr(transformers, f"{model}Config")(**{**options, **names(), **more})
        return _save(model + cls, config, directory, extractor())

    return build


def _text(model: str, cls: str, options: dict[str, Any], tokenizer: Callable[[], Any]) -> Callable[..., Path]:
    def build(directory: Path, **more: Any) -> Path:
        words = tokenizer()
        ids = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
        config = getattr(transformers, f"{model}Config")(**{**options, **ids, **names(), **more})
        return _save(model + cls, config, directory, words)

    return build


CLASSIFY = "ForImageClassification"
SPEECH = TOWER | CONVOLUTIONS | {"vocab_size": 12, "classifier_proj_size": 16}
POSITIONS = TOWER | {"max_position_embeddings": 66}
DISTIL = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}

IMAGES: dict[str, Callable[..., Path]] = {
    "vit": _image("ViT", CLASSIFY, VISION),
    "deit": _image("DeiT", CLASSIFY, VISION, "DeiTImageProcessor", size={"height": 56, "width": 56}, crop_size=SQUARE),
    "beit": _image("Beit", CLASSIFY, VISION | {"layer_scale_init_value": 1.0}, "BeitImageProcessor"),
    "swin": _image("Swin", CLASSIFY, STAGED),
    "resnet": _image(
        "ResNet",
        CLASSIFY,
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1]},
        "ConvNextImageProcessor",
        size={"shortest_edge": SIDE},
    ),
    "convnext": _image(
        "ConvNext",
        CLASSIFY,
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 1.0},
        "ConvNextImageProcessor",
        size={"shortest_edge": SIDE},
        crop_pct=0.95,
    ),
}
SOUNDS: dict[str, Callable[..., Path]] = {
    "ast": _audio(
        "AST",
        "ForAudioClassification",
        TOWER | {"max_length": 64},
        lambda: transformers.ASTFeatureExtractor(max_length=64),
    ),
    **{
        model: _audio(name, "ForSequenceClassification", SPEECH, transformers.Wav2Vec2FeatureExtractor)
        for model, name in (("wav2vec2", "Wav2Vec2"), ("hubert", "Hubert"), ("wavlm", "WavLM"))
    },
    "sew": _audio(
        "SEW",
        "ForSequenceClassification",
        SPEECH | {"conv_kernel": (10, 3, 3, 3, 3, 2, 2), "conv_stride": (5, 2, 2, 2, 2, 2, 2), "squeeze_factor": 1},
        transformers.Wav2Vec2FeatureExtractor,
    ),
}
TEXTS: dict[str, Callable[..., Path]] = {
    "bert": _text("Bert", "ForSequenceClassification", POSITIONS, word_tokenizer),
    "roberta": _text("Roberta", "ForSequenceClassification", POSITIONS, byte_tokenizer),
    "xlm-roberta": _text("XLMRoberta", "ForSequenceClassification", POSITIONS, byte_tokenizer),
    "distilbert": _text("DistilBert", "ForSequenceClassification", DISTIL, word_tokenizer),
    "deberta-v2": _text(
        "DebertaV2",
        "ForSequenceClassification",
        POSITIONS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        word_tokenizer,
    ),
    "gpt2": _text(
        "GPT2",
        "ForSequenceClassification",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        byte_tokenizer,
    ),
}


TINY_DETR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 12,
}
SWIN: dict[str, Any] = {"model_type": "swin", **STAGED, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
DETECTORS: dict[str, Callable[..., Path]] = {
    "detr": _image(
        "Detr",
        "ForObjectDetection",
        TINY_DETR | {"backbone_config": RESNET | {"out_features": ["stage4"]}},
        "DetrImageProcessor",
        size={"shortest_edge": 64, "longest_edge": 96},
    ),
    "yolos": _image(
        "Yolos",
        "ForObjectDetection",
        TOWER | {"image_size": [64, 96], "patch_size": 16, "num_detection_tokens": 12},
        "YolosImageProcessor",
        size={"shortest_edge": 64, "longest_edge": 96},
    ),
    "rt_detr": _image(
        "RTDetr",
        "ForObjectDetection",
        {
            "encoder_hidden_dim": 32,
            "encoder_in_channels": [8, 16, 16],
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 4,
            "d_model": 32,
            "num_queries": 12,
            "decoder_in_channels": [32, 32, 32],
            "decoder_ffn_dim": 32,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "num_denoising": 0,
            "backbone_config": RESNET
            | {"model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]},
        },
        "RTDetrImageProcessor",
        size={"height": 64, "width": 64},
    ),
}
UNIVERSAL: dict[str, Any] = {
    "backbone_config": SWIN | {"out_features": ["stage1", "stage2", "stage3", "stage4"]},
}
SEGMENTERS: dict[str, Callable[..., Path]] = {
    "segformer": _image(
        "Segformer",
        "ForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [4, 2],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        "SegformerImageProcessor",
        size={"height": 64, "width": 64},
    ),
    "mask2former": _image(
        "Mask2Former",
        "ForUniversalSegmentation",
        UNIVERSAL
        | {
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 16,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "dim_feedforward": 16,
            "num_queries": 12,
        },
        "Mask2FormerImageProcessor",
        size={"height": 64, "width": 64},
    ),
    "maskformer": _image(
        "MaskFormer",
        "ForInstanceSegmentation",
        UNIVERSAL
        | {
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "decoder_config": TINY_DETR | {"model_type": "detr", "num_labels": len(ANIMALS)},
        },
        "MaskFormerImageProcessor",
        size={"height": 64, "width": 64},
    ),
}
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
TAGGERS: dict[str, Callable[..., Path]] = {
    "bert": _text("Bert", "ForTokenClassification", POSITIONS | names(TAGS), word_tokenizer),
    "roberta": _text("Roberta", "ForTokenClassification", POSITIONS | names(TAGS), byte_tokenizer),
}


def save_owlv2(directory: Path) -> Path:
    """An OWLv2 of 64 x 64 pixels."""
    tokenizer = save_clip_tokenizer()
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = TOWER | {"image_size": 64, "patch_size": 16}
    config = transformers.Owlv2Config(text_config=text | ids, vision_config=vision, projection_dim=32)
    images = transformers.Owlv2ImageProcessorPil(size={"height": 64, "width": 64})
    return _save("Owlv2ForObjectDetection", config, directory, transformers.Owlv2Processor(images, tokenizer))


def save_grounding_dino(directory: Path) -> Path:
    """A Grounding DINO with a Swin and a BERT."""
    tokenizer = word_tokenizer()
    text = POSITIONS | {"model_type": "bert", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = transformers.GroundingDinoConfig(
        **{**TINY_DETR, "decoder_layers": 2},
        num_feature_levels=3,
        backbone_config=SWIN | {"out_features": ["stage2", "stage3", "stage4"]},
        text_config=text,
        max_text_len=64,
    )
    images = transformers.GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    processor = transformers.GroundingDinoProcessor(images, tokenizer)
    return _save("GroundingDinoForObjectDetection", config, directory, processor)


def save_clip_tokenizer() -> Any:
    """A CLIP tokenizer of bytes, of 16 tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
