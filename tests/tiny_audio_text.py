"""Tiny checkpoints of CLAP, Whisper and text encoders, built from a configuration, with all their files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tiny_clip import TOWER, save_random
from tokenizers import pre_tokenizers
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    BertConfig,
    BertModel,
    BertTokenizer,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapProcessor,
    HubertConfig,
    HubertForCTC,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    MPNetTokenizer,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    T5Config,
    T5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

WIDTH: int = TOWER["hidden_size"]
TEXTS = [
    "a dog barks",
    "",
    "Zwei Katzen schnurren laut.",
    "Дождь стучит по крыше",
    "市場の人混みのざわめき",
    "صوت المطر على السطح",
    "बारिश की आवाज़",
    "🎻 a violin, far away " * 3,
    "thunder " * 200,
]

SPEECH: dict[str, tuple[Any, Any]] = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2ForCTC),
    "hubert": (HubertConfig, HubertForCTC),
    "wavlm": (WavLMConfig, WavLMModel),
}


def clap_extractor(fusion: bool, seconds: int = 10, **options: Any) -> ClapFeatureExtractor:
    """An extractor like those of published checkpoints: from 50 Hz, with feature fusion or without."""
    truncation = "fusion" if fusion else "rand_trunc"
    return ClapFeatureExtractor(truncation=truncation, max_length_s=seconds, frequency_min=50, **options)


def save_clap(directory: Path, fusion: bool = False, seconds: int = 2) -> Path:
    """A CLAP of 24 dimensions with a window of 2 s at 48 kHz and 64 mel bins, as published."""
    tokenizer = byte_tokenizer(model_max_length=64)
    audio = {
        "enable_fusion": fusion,
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "spec_size": 256,
    }
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 66}
    save_random(ClapModel, ClapConfig(text_config=text, audio_config=audio, projection_dim=24), directory)
    ClapProcessor(clap_extractor(fusion, seconds), tokenizer).save_pretrained(directory)
    return directory


def save_whisper(directory: Path, seconds: int = 2) -> Path:
    """A Whisper of 32 dimensions with a window of 2 s at 16 kHz."""
    config = WhisperConfig(
        vocab_size=40,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=50 * seconds,
        max_target_positions=16,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    )
    save_random(WhisperModel, config, directory)
    WhisperFeatureExtractor(chunk_length=seconds).save_pretrained(directory)
    return directory


CONVOLUTIONS: dict[
    str, Any
] = {  # the published front end with fewer channels: 400 samples for the first frame, 320 for each further one
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def save_speech(directory: Path, family: str, large: bool = False) -> Path:
    """A "wav2vec2", "hubert" or "wavlm" for transcription; `large` models normalise per frame and use a mask."""
    config, model = SPEECH[family]
    large_options = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True} if large else {}
    save_random(model, config(vocab_size=12, **TOWER, **CONVOLUTIONS, **large_options), directory)
    Wav2Vec2FeatureExtractor(return_attention_mask=large).save_pretrained(directory)
    return directory


def save_ast(directory: Path, frames: int = 64) -> Path:
    """An AST for classification with a window of 64 frames (0.65 s) of 128 mel bins."""
    save_random(ASTForAudioClassification, ASTConfig(**TOWER, max_length=frames), directory)
    ASTFeatureExtractor(max_length=frames).save_pretrained(directory)
    return directory


def save_bert(directory: Path, **tokenizer: Any) -> Path:
    """A BERT of 64 positions; it knows characters of a few scripts."""
    return _save_text(BertModel, BertConfig, word_tokenizer(**tokenizer), directory)


def save_roberta(directory: Path) -> Path:
    """A RoBERTa of 64 positions in a table of 66 rows, with a byte-level tokenizer without a limit."""
    return _save_text(RobertaModel, RobertaConfig, byte_tokenizer(), directory, max_position_embeddings=66)


def save_modernbert(directory: Path) -> Path:
    """A ModernBERT of 64 rotary positions, with a local attention of 16."""
    tokenizer = byte_tokenizer()
    ids = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    return _save_text(ModernBertModel, ModernBertConfig, tokenizer, directory, local_attention=16, **ids)


def save_mpnet(directory: Path) -> Path:
    """An MPNet of 64 positions in a table of 66 rows."""
    vocab = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *_characters()])}
    tokenizer = MPNetTokenizer(vocab=vocab, model_max_length=512)
    return _save_text(MPNetModel, MPNetConfig, tokenizer, directory, max_position_embeddings=66)


def save_t5(directory: Path) -> Path:
    """The encoder half of a T5: relative positions, so only the tokenizer sets a limit."""
    tokenizer = word_tokenizer(model_max_length=48)
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    save_random(T5EncoderModel, config, directory)
    tokenizer.save_pretrained(directory)
    return directory


def word_tokenizer(**options: Any) -> BertTokenizer:
    """WordPiece over single characters."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_characters()]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, **options)


def byte_tokenizer(**options: Any) -> RobertaTokenizer:
    """Byte-level BPE with a few merges: it can encode any text. Padding is 1, like RoBERTa's."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "er", "Ġa"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return RobertaTokenizer(vocab=vocab, merges=[("e", "r"), ("Ġ", "a")], **options)


def tone(rate: int, seconds: float, hertz: Sequence[float] = (440.0, 1000.0, 3000.0)) -> np.ndarray:
    """A chord, float32 [frames]."""
    time = np.arange(round(rate * seconds)) / rate
    return np.mean([np.sin(2 * np.pi * frequency * time) for frequency in hertz], axis=0).astype(np.float32)


def noise(rate: int, seconds: float, seed: int = 0) -> np.ndarray:
    """White noise at a tenth of full scale, float32 [frames]."""
    return (0.1 * np.random.default_rng(seed).standard_normal(round(rate * seconds))).astype(np.float32)


def _characters() -> list[str]:
    plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,äдождьσς市場人"
    return [*plain, *(f"##{character}" for character in plain)]


def _save_text(cls: Any, config: Any, tokenizer: Any, directory: Path, **options: Any) -> Path:
    options = {"max_position_embeddings": 64, "vocab_size": len(tokenizer)} | TOWER | options
    save_random(cls, config(pad_token_id=tokenizer.pad_token_id, **options), directory)
    tokenizer.save_pretrained(directory)
    return directory
