"""Tiny checkpoints of models with audio in a prompt, some with images too, with all their files."""

import base64
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny_chat_models import ROPE, SMALL, gemma_tokenizer, limits
from tiny_gemma import SPECIAL as GEMMA4_TOKENS
from tiny_generators_hub import chat_tokenizer, ids_of, save
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)

SECONDS = 2  # of an audio window
OMNI_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
AUDIO_TOWER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 50 * SECONDS,
}


def extractor() -> WhisperFeatureExtractor:
    """A feature extractor with windows of 2 s and 16 mel bins."""
    return WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS)


def save_qwen2_audio(directory: Path) -> Path:
    """A Qwen2-Audio with a chat template."""
    special_tokens = {name: token for name, token in OMNI_TOKENS.items() if "audio" in name}
    tokenizer = chat_tokenizer(audio="<|audio_bos|><|AUDIO|><|audio_eos|>", **special_tokens)
    config = Qwen2AudioConfig(
        audio_config=AUDIO_TOWER | {"model_type": "qwen2_audio_encoder"},
        text_config=SMALL | {"model_type": "qwen2"} | ids_of(tokenizer),
        audio_token_index=tokenizer.audio_token_id,
    )
    processor = Qwen2AudioProcessor(extractor(), tokenizer, chat_template=tokenizer.chat_template)
    return save(Qwen2AudioForConditionalGeneration, config, directory, processor)


def save_voxtral(directory: Path) -> Path:
    """A Voxtral with 25 tokens per window and no tokenizer but tekken.json, like the published one."""
    marks = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[BEGIN_AUDIO]", "[AUDIO]", "[TRANSCRIBE]", "<pad>"]
    _save_tekken(directory, marks)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = VoxtralConfig(
        audio_config=sizes | {"num_mel_bins": 16, "max_source_positions": 50 * SECONDS},
        text_config=SMALL
        | {"model_type": "llama", "vocab_size": 256 + len(marks), "head_dim": 8}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 8},
        audio_token_id=marks.index("[AUDIO]"),
    )
    return save(VoxtralForConditionalGeneration, config, directory, extractor())


def save_gemma4(directory: Path, audio: bool = True) -> Path:
    """A Gemma 4 with 70 tokens per image, and an audio tower if `audio`."""
    tokenizer = gemma_tokenizer(GEMMA4_TOKENS, GEMMA4_TOKENS["image_token"], GEMMA4_TOKENS["audio_token"])
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    text = sizes | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16}
    text |= {"num_global_key_value_heads": 1, "hidden_size_per_layer_input": 8, "sliding_window": 16}
    text |= {
        "vocab_size": len(tokenizer),
        "vocab_size_per_layer_input": len(tokenizer),
        "max_position_embeddings": 4096,
    }
    text |= {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
    vision = sizes | {"intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8, "position_embedding_size": 256}
    config = Gemma4Config(
        text_config=text | {"tie_word_embeddings": False},
        vision_config=vision,
        audio_config=sizes | {"output_proj_dims": 48} if audio else None,
        eoa_token_index=tokenizer.convert_tokens_to_ids(GEMMA4_TOKENS["eoa_token"]),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        tie_word_embeddings=False,  # random tied embeddings repeat the prompt's last token
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in GEMMA4_TOKENS.items()},
    )
    images, videos = Gemma4ImageProcessor(max_soft_tokens=70), Gemma4VideoProcessor()
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(), images, tokenizer, videos, chat_template=tokenizer.chat_template
    )
    return save(Gemma4ForConditionalGeneration, config, directory, processor)


def save_qwen_omni(directory: Path, whole: bool = False) -> Path:
    """The thinker of a Qwen2.5-Omni; or the `whole` checkpoint as published, of which the thinker is a part."""
    tokenizer = chat_tokenizer(
        image="<|vision_bos|><|IMAGE|><|vision_eos|>", audio="<|audio_bos|><|AUDIO|><|audio_eos|>", **OMNI_TOKENS
    )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in OMNI_TOKENS.items()}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = Qwen2_5OmniThinkerConfig(
        audio_config=AUDIO_TOWER | {"output_dim": 32, "n_window": 20},
        vision_config=vision | {"fullatt_block_indexes": [1], "window_size": 56},
        text_config=SMALL | {"rope_parameters": ROPE} | ids_of(tokenizer),
        image_token_index=ids["image_token"],
        audio_token_index=ids["audio_token"],
        video_token_index=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
    )
    images, videos = Qwen2VLImageProcessorPil(size=limits(28)), Qwen2VLVideoProcessor()
    processor = Qwen2_5OmniProcessor(images, videos, extractor(), tokenizer, chat_template=tokenizer.chat_template)
    # A trained model never writes placeholders of media; such a text could not be scored.
    never = [ids[f"{kind}_token"] for kind in ("image", "audio", "video")]
    save(Qwen2_5OmniThinkerForConditionalGeneration, config, directory, processor, suppress_tokens=never)
    if whole:
        _wrap_thinker(directory)
    return directory


def _wrap_thinker(directory: Path) -> None:
    """Rename weights and configuration as in a checkpoint of the whole model."""
    weights = load_file(directory / "model.safetensors")
    save_file(
        {f"thinker.{name}": value for name, value in weights.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((directory / "config.json").read_text())
    whole = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": config}
    (directory / "config.json").write_text(json.dumps(whole))


def _save_tekken(directory: Path, marks: list[str]) -> None:
    """Save a tokenizer of `marks` and single bytes, in Mistral's format."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
        "num_vocab_tokens": 256,
        "default_vocab_size": 256 + len(marks),
        "default_num_special_tokens": len(marks),
        "version": "v13",
    }
    vocabulary = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(256)
    ]
    special = [{"rank": rank, "token_str": mark, "is_control": True} for rank, mark in enumerate(marks)]
    (directory / "tekken.json").write_text(
        json.dumps({"config": config, "vocab": vocabulary, "special_tokens": special})
    )


AUDIO_MODELS = {
    "gemma4": save_gemma4,
    "qwen2_5_omni": lambda directory: save_qwen_omni(directory, whole=True),
    "qwen2_5_omni_thinker": save_qwen_omni,
    "qwen2_audio": save_qwen2_audio,
    "voxtral": save_voxtral,
}
