"""Tiny checkpoints of the text families beside BERT's: ALBERT, DeBERTa, DistilBERT, ELECTRA, T5, XLM-RoBERTa.

Each has the head that it was trained with, and a tokenizer of its own class, like the published checkpoints.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiny_audio_text import TOWER, WIDTH, word_tokenizer
from tiny_clip import save_random
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertTokenizer,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2Tokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForPreTraining,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)


def save_albert(directory: Path) -> Path:
    """An ALBERT of 64 positions whose two layers share their weights, with factorised embeddings of 16."""
    tokenizer = AlbertTokenizer(vocab=unigrams(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]))
    config = AlbertConfig(vocab_size=len(tokenizer), embedding_size=16, max_position_embeddings=64, **TOWER)
    return _save(AlbertForMaskedLM, config, tokenizer, directory)


def save_deberta(directory: Path) -> Path:
    """A DeBERTa v3 (of type deberta-v2): relative positions only, in buckets."""
    tokenizer = DebertaV2Tokenizer(vocab=unigrams(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    relative = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
    buckets = {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}
    config = DebertaV2Config(
        vocab_size=len(tokenizer), max_position_embeddings=64, legacy=False, **TOWER, **relative, **buckets
    )
    return _save(DebertaV2ForMaskedLM, config, tokenizer, directory)


def save_distilbert(directory: Path) -> Path:
    """A DistilBERT of 64 positions."""
    tokenizer = word_tokenizer()
    sizes = {"dim": WIDTH, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
    return _save(DistilBertForMaskedLM, DistilBertConfig(vocab_size=len(tokenizer), **sizes), tokenizer, directory)


def save_electra(directory: Path) -> Path:
    """An ELECTRA discriminator of 64 positions with embeddings of 16."""
    tokenizer = word_tokenizer()
    config = ElectraConfig(vocab_size=len(tokenizer), embedding_size=16, max_position_embeddings=64, **TOWER)
    return _save(ElectraForPreTraining, config, tokenizer, directory)


def save_xlm_roberta(directory: Path) -> Path:
    """An XLM-RoBERTa of 64 positions in a table of 66 rows, whose tokenizer treats `</s>` as an ordinary piece."""
    tokenizer = XLMRobertaTokenizer(vocab=unigrams(["<s>", "<pad>", "</s>", "<unk>"], after=["<mask>"]))
    config = XLMRobertaConfig(vocab_size=len(tokenizer), pad_token_id=1, max_position_embeddings=66, **TOWER)
    return _save(XLMRobertaForMaskedLM, config, tokenizer, directory)


def save_t5(directory: Path, config: Any = T5Config, model: Any = T5ForConditionalGeneration) -> Path:
    """A whole T5, mT5 or UMT5 of 64 tokens, whose encoder is the text encoder."""
    tokenizer = T5Tokenizer(vocab=unigrams(["<pad>", "</s>", "<unk>"]), extra_ids=4, model_max_length=64)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return _save(model, config(vocab_size=len(tokenizer), **sizes), tokenizer, directory)


TEXT_FAMILIES: dict[str, Callable[[Path], Path]] = {
    "albert": save_albert,
    "deberta-v2": save_deberta,
    "distilbert": save_distilbert,
    "electra": save_electra,
    "mt5": lambda directory: save_t5(directory, MT5Config, MT5ForConditionalGeneration),
    "t5": save_t5,
    "umt5": lambda directory: save_t5(directory, UMT5Config, UMT5ForConditionalGeneration),
    "xlm-roberta": save_xlm_roberta,
}


def unigrams(special: Sequence[str], after: Sequence[str] = ()) -> list[tuple[str, float]]:
    """Return a unigram vocabulary of letters of some scripts and a few longer pieces."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!</>[]äöüжд市場人"
    pieces = [*((letter, -5.0) for letter in letters), ("▁dog", -3.0), ("er", -3.5)]
    return [*((token, 0.0) for token in special), *pieces, *((token, 0.0) for token in after)]


def _save(model: Any, config: Any, tokenizer: Any, directory: Path) -> Path:
    save_random(model, config, directory)
    tokenizer.save_pretrained(directory)
    return directory
