"""Tiny checkpoints of the generator families on the hub, with random weights and all their files; and their checks."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tiny_audio_text import TOWER, byte_tokenizer, word_tokenizer
from tiny_clip import save_random
from tiny_text import unigrams
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoProcessor,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Tokenizer,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PegasusTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from mmbeam.models.generators import describe, load
from mmbeam.models.generators.base import Generator
from mmbeam.prompts.ask import Decoding, Generated, Request

CPU = torch.device("cpu")
NEW = 8  # tokens
HALVES: dict[str, Any] = {
    f"{half}_{kind}": size
    for half in ("encoder", "decoder")
    for kind, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
}


def chatml(image: str = "", audio: str = "") -> str:
    """A chat template like Qwen's, with its placeholders of an image and of audio."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}"
        + image
        + "{% else %}"
        + audio
        + "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def load_tiny(directory: Path) -> Generator:
    """Load the generator of a checkpoint, as the stage does."""
    return load(describe(directory), CPU, torch.float32)


def generate(model: Generator, requests: Sequence[Request], **options: Any) -> list[Generated]:
    """Generate the texts of requests in one batch."""
    return model.generate(requests, Decoding(max_new_tokens=NEW, **options))


def check_batches(model: Generator, requests: Sequence[Request], **options: Any) -> list[Generated]:
    """Return the texts of a batch, which equal those of single requests and of another order."""
    together = generate(model, requests, **options)
    alone = [generate(model, [request], **options)[0] for request in requests]
    backwards = generate(model, requests[::-1], **options)[::-1]
    for others in (alone, backwards):
        assert [text.token_ids for text in others] == [text.token_ids for text in together]
        assert [text.text for text in others] == [text.text for text in together]
        assert [text.logprob for text in others] == pytest.approx([text.logprob for text in together], abs=1e-3)
    fewest = 1 if "num_beams" in options else len(requests) // 2  # beams often end in the same repetitions
    assert len({text.token_ids for text in together}) > fewest  # the texts depend on the requests
    return together


def check_scores(model: Generator, requests: Sequence[Request], texts: Sequence[Generated]) -> None:
    """Check that the scores equal the log-probabilities found while generating."""
    assert model.score(requests, texts) == pytest.approx([text.logprob for text in texts], abs=1e-3)


@torch.inference_mode()
def check_chats(model: Any, reference: Any, requests: Sequence[Request]) -> None:
    """Check that prompts and texts equal those of the checkpoint's own processor and of `reference.generate`."""
    processor: Any = AutoProcessor.from_pretrained(model.spec.directory)
    for request, text in zip(requests, generate(model, requests), strict=True):
        media = {"image": request.image, "audio": request.audio and request.audio[0]}
        parts: list[Any] = [{"type": kind, kind: value} for kind, value in media.items() if value is not None]
        subject = " and ".join({"image": "the image", "audio": "the sound"}[part["type"]] for part in parts)
        words = request.text or f"Describe {subject} in one sentence."
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert inputs["input_ids"][0].tolist() == model.encode_prompt(request)
        ids = reference.generate(**inputs, do_sample=False, max_new_tokens=NEW)[0]
        assert tuple(ids[inputs["input_ids"].shape[1] :].tolist()[: len(text.token_ids)]) == text.token_ids


def check_bfloat16(directory: Path, requests: Sequence[Request]) -> None:
    """Check that the model runs in the dtype of GPUs: no input has another one."""
    texts = generate(load(describe(directory), CPU, torch.bfloat16), requests)
    assert all(math.isfinite(text.logprob) for text in texts)


def byte_vocabulary(*special: str) -> dict[str, int]:
    """A vocabulary of the 256 bytes and special tokens."""
    return {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}


def chat_tokenizer(*special: str, image: str = "", audio: str = "", **special_tokens: str) -> Any:
    """A byte-level tokenizer like Qwen's with a chat template; `special_tokens` have names."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    tokenizer = Qwen2Tokenizer(
        vocab=byte_vocabulary(*marks, *special_tokens.values()),
        merges=[],
        extra_special_tokens=special_tokens,
        eos_token="<|im_end|>",
    )
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.chat_template = chatml(image, audio)
    return tokenizer


def save(model: Any, config: Any, directory: Path, *files: Any, **generation: Any) -> Path:
    """Save a model of varied texts, its tokenizer and processors; `generation` goes into generation_config.json."""
    save_random(model, config, directory)
    for file in files:
        file.save_pretrained(directory)
    if generation:
        saved_options = json.loads((directory / "generation_config.json").read_text())
        saved_options.pop("_from_model_config", None)
        (directory / "generation_config.json").write_text(json.dumps(saved_options | generation))
    return directory


def ids_of(tokenizer: Any) -> dict[str, Any]:
    """The special ids and vocabulary size of a tokenizer, as configurations name them."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in names}


def save_t5(directory: Path, **options: Any) -> Path:
    """A T5. Positions are relative, so that only the tokenizer has a limit. `options` go into config.json."""
    tokenizer = T5Tokenizer(vocab=unigrams(["<pad>", "</s>", "<unk>"]), extra_ids=4, model_max_length=64)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)}
    save(T5ForConditionalGeneration, T5Config(decoder_start_token_id=0, **sizes), directory, tokenizer)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | options))
    return directory


def save_bart(directory: Path) -> Path:
    """A BART of 64 positions, which must begin with its begin token."""
    tokenizer = byte_tokenizer(model_max_length=64)
    config = BartConfig(
        d_model=32,
        max_position_embeddings=64,
        decoder_start_token_id=tokenizer.eos_token_id,
        **HALVES,
        **ids_of(tokenizer),
    )
    return save(BartForConditionalGeneration, config, directory, tokenizer, forced_bos_token_id=tokenizer.bos_token_id)


def save_mbart(directory: Path) -> Path:
    """An mBART, whose target language is a token."""
    tokenizer = MBartTokenizer(vocab=unigrams(["<s>", "<pad>", "</s>", "<unk>"]), src_lang="en_XX", tgt_lang="de_DE")
    config = MBartConfig(
        d_model=32,
        max_position_embeddings=64,
        decoder_start_token_id=tokenizer.eos_token_id,
        **HALVES,
        **ids_of(tokenizer),
    )
    return save(MBartForConditionalGeneration, config, directory, tokenizer)


def save_m2m100(directory: Path) -> Path:
    """An M2M100 of 64 positions, with the tokens of a hundred languages after its vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *_sentencepiece(directory / "sentencepiece.bpe.model")]
    (directory / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    tokenizer = M2M100Tokenizer(str(directory / "vocab.json"), str(directory / "sentencepiece.bpe.model"))
    size = len(pieces) + len(tokenizer.lang_code_to_id) + 8
    return _save_multilingual(directory, tokenizer, size)


def save_nllb(directory: Path) -> Path:
    """An NLLB: an M2M100 with two hundred languages under other names."""
    vocabulary = {piece: index for index, (piece, _) in enumerate(unigrams(["<s>", "<pad>", "</s>", "<unk>"]))}
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[], src_lang="eng_Latn")
    return _save_multilingual(directory, tokenizer, len(tokenizer))


def _save_multilingual(directory: Path, tokenizer: Any, size: int) -> Path:
    config = M2M100Config(
        d_model=32,
        max_position_embeddings=64,
        decoder_start_token_id=tokenizer.eos_token_id,
        **HALVES,
        **(ids_of(tokenizer) | {"vocab_size": size}),
    )
    return save(M2M100ForConditionalGeneration, config, directory, tokenizer)


def save_marian(directory: Path, languages: Sequence[str] = ()) -> Path:
    """A Marian with two sentencepiece models and a vocabulary; `languages` are its target languages."""
    directory.mkdir(parents=True, exist_ok=True)
    pieces = _sentencepiece(directory / "source.spm")
    _sentencepiece(directory / "target.spm")
    codes = [f">>{language}<<" for language in languages]
    vocabulary = {piece: index for index, piece in enumerate(["</s>", "<unk>", *pieces, *codes, "<pad>"])}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = MarianTokenizer(*(str(directory / name) for name in ("source.spm", "target.spm", "vocab.json")))
    config = MarianConfig(
        d_model=32,
        max_position_embeddings=64,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        **HALVES,
        **(ids_of(tokenizer) | {"bos_token_id": 0}),
    )
    return save(MarianMTModel, config, directory, tokenizer)


def save_pegasus(directory: Path) -> Path:
    """A Pegasus of 64 positions."""
    tokenizer = PegasusTokenizer(vocab=unigrams(["<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>"]), offset=0)
    config = PegasusConfig(
        d_model=32, max_position_embeddings=64, decoder_start_token_id=0, **HALVES, **ids_of(tokenizer)
    )
    return save(PegasusForConditionalGeneration, config, directory, tokenizer)


def save_bert_to_bert(directory: Path) -> Path:
    """An EncoderDecoder of two BERTs of 64 and 32 positions."""
    tokenizer = word_tokenizer(model_max_length=64)
    bert = TOWER | {"vocab_size": len(tokenizer)}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**bert, max_position_embeddings=64), BertConfig(**bert, max_position_embeddings=32)
    )
    config.decoder_start_token_id, config.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return save(EncoderDecoderModel, config, directory, tokenizer)


def save_gpt2(directory: Path) -> Path:
    """A GPT-2 of 96 positions, without padding and without a chat template."""
    tokenizer = GPT2Tokenizer(vocab=byte_vocabulary("<|endoftext|>"), merges=[])
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 256}
    return save(
        GPT2LMHeadModel, GPT2Config(n_positions=96, n_embd=32, n_layer=2, n_head=4, **ids), directory, tokenizer
    )


def save_llama(directory: Path) -> Path:
    """A Llama with a begin token and no chat template."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(max_position_embeddings=256, **TOWER, **ids_of(tokenizer))
    return save(LlamaForCausalLM, config, directory, tokenizer)


def save_qwen2(directory: Path) -> Path:
    """A Qwen2 with a chat template."""
    tokenizer = chat_tokenizer()
    return save(
        Qwen2ForCausalLM, Qwen2Config(**TOWER, num_key_value_heads=2, **ids_of(tokenizer)), directory, tokenizer
    )


SEQ2SEQ = {
    "t5": save_t5,
    "bart": save_bart,
    "mbart": save_mbart,
    "marian": save_marian,
    "pegasus": save_pegasus,
    "encoder-decoder": save_bert_to_bert,
}
CAUSAL = {"gpt2": save_gpt2, "llama": save_llama, "qwen2": save_qwen2}


def _sentencepiece(path: Path) -> list[str]:
    """Train a unigram model on a few sentences and return its pieces."""
    sentences = ["a photo of a cat and a dog", "the quick brown fox jumps over the lazy dog", "zwei Katzen im Garten"]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences * 10),
            model_writer=file,
            vocab_size=64,
            hard_vocab_limit=False,
            pad_id=-1,
            bos_id=-1,
            eos_id=0,
            unk_id=1,
            minloglevel=2,
        )
    model = sentencepiece.SentencePieceProcessor(str(path))
    return [model.id_to_piece(index) for index in range(2, model.get_piece_size())]


def save_whisper(directory: Path, multilingual: bool = True, trained: bool = False) -> Path:
    """A Whisper with windows of 2 s, English-only unless `multilingual`.

    If `trained`, it writes no timestamps after <|notimestamps|>; random weights would.
    """
    stamps = [f"<|{index / 50:.2f}|>" for index in range(101)]
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer = WhisperTokenizer(vocab=byte_vocabulary(*special, *stamps), merges=[])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    end, start, english, german, translate, transcribe, *_, unstamped = tokenizer.convert_tokens_to_ids(special)
    config = WhisperConfig(
        d_model=32,
        max_source_positions=100,
        max_target_positions=40,
        decoder_start_token_id=start,
        suppress_tokens=[3, 4],
        begin_suppress_tokens=[5, end],
        **HALVES,
        **(ids_of(tokenizer) | {"pad_token_id": end}),
    )
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=2), tokenizer).save_pretrained(directory)
    options: dict[str, Any] = {"no_timestamps_token_id": unstamped, "max_initial_timestamp_index": 50}
    options["alignment_heads"] = [[0, 1], [1, 2]]
    options |= {"is_multilingual": multilingual, "max_length": 40, "begin_suppress_tokens": [5, end]}
    suppressed = [3, 4, *(tokenizer.convert_tokens_to_ids(stamps) if trained else ())]
    options |= {"suppress_tokens": suppressed, "forced_decoder_ids": [[1, None], [2, transcribe]]}
    if multilingual:
        options["lang_to_id"] = {"<|en|>": english, "<|de|>": german}
        options["task_to_id"] = {"translate": translate, "transcribe": transcribe}
    return save(WhisperForConditionalGeneration, config, directory, **options)
