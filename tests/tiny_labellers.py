"""Tiny checkpoints with heads for labels, from their configurations, with all their files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tiny_audio_text import CONVOLUTIONS, TOWER, byte_tokenizer, word_tokenizer
from tiny_auto import STAGED, VISION
from tiny_clip import SIDE, save_random

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
