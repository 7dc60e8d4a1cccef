"""Tiny checkpoints of models with images in a chat's prompt, with all their files."""

from pathlib import Path
from typing import Any

from tiny_audio_text import TOWER
from tiny_generators_hub import byte_vocabulary, chat_tokenizer, chatml, ids_of, save
from tokenizers import AddedToken
from transformers import (
    BartConfig,
    BartTokenizer,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GemmaTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

SMALL: dict[str, Any] = TOWER | {"num_key_value_heads": 2, "max_position_embeddings": 1024}
SQUARE = {"height": 48, "width": 48}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
IMAGE_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
VISION_TOKENS = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
GEMMA3_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}


def save_florence2(directory: Path) -> Path:
    """A Florence-2 of 64 x 64 pixels, 5 tokens an image."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>"]
    vocabulary = {token: index for index, token in enumerate([*special, *byte_vocabulary()])}
    tokenizer = BartTokenizer(vocab=vocabulary, merges=[], extra_special_tokens={"image_token": "<image>"})
    text = BartConfig(
        d_model=32,
        max_position_embeddings=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        forced_eos_token_id=None,
        decoder_start_token_id=tokenizer.eos_token_id,
        **ids_of(tokenizer),
    )
    vision = Florence2VisionConfig(
        depths=[1, 1, 1, 1],
        embed_dim=[8, 8, 16, 16],
        num_heads=[2, 2, 2, 2],
        num_groups=[2, 2, 2, 2],
        window_size=4,
        projection_dim=32,
    )
    config = Florence2Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=tokenizer.image_token_id
    )
    config.decoder_start_token_id = tokenizer.eos_token_id
    side = {"height": 64, "width": 64}
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    images.image_seq_length = 5
    return save(Florence2ForConditionalGeneration, config, directory, Florence2Processor(images, tokenizer))


def save_smolvlm(directory: Path, idefics: bool = False) -> Path:
    """A SmolVLM or Idefics3 with tiles of 32 x 32 pixels, 4 tokens each, of images of at most 96."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special_tokens = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = chat_tokenizer(*tiles, "<video>", image="<image>", **special_tokens)
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    config = (Idefics3Config if idefics else SmolVLMConfig)(
        text_config=LlamaConfig(**SMALL, **ids_of(tokenizer)).to_dict(),
        vision_config=vision,
        scale_factor=2,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    options: dict[str, Any] = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
    if idefics:
        processor: Any = Idefics3Processor(Idefics3ImageProcessorPil(**options), tokenizer, image_seq_len=4)
        return save(Idefics3ForConditionalGeneration, config, directory, processor)
    images = SmolVLMImageProcessorPil(**options)
    processor = SmolVLMProcessor(images, tokenizer, SmolVLMVideoProcessor(**options), image_seq_len=4)
    return save(SmolVLMForConditionalGeneration, config, directory, processor)


def save_gemma3(directory: Path) -> Path:
    """A Gemma 3 of 48 x 48 pixels, 9 tokens an image."""
    tokenizer = gemma_tokenizer(GEMMA3_TOKENS, GEMMA3_TOKENS["boi_token"])
    config = Gemma3Config(
        text_config=SMALL | {"head_dim": 8, "sliding_window": 16, "vocab_size": len(tokenizer)},
        vision_config=TOWER | {"image_size": 48, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=9,
        tie_word_embeddings=False,  # random tied embeddings repeat the prompt's last token
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size=SQUARE), tokenizer, image_seq_length=9)
    return save(Gemma3ForConditionalGeneration, config, directory, processor)


def save_qwen2_5_vl(directory: Path) -> Path:
    """A Qwen2.5-VL of patches of 14 pixels in groups of 2 x 2."""
    tokenizer = qwen_tokenizer()
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config=SMALL | {"rope_parameters": ROPE} | ids_of(tokenizer),
        vision_config=vision | {"fullatt_block_indexes": [1], "window_size": 56},
        **qwen_ids(tokenizer),
    )
    images, videos = Qwen2VLImageProcessorPil(size=limits(28)), Qwen2VLVideoProcessor()
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)
    return save(Qwen2_5_VLForConditionalGeneration, config, directory, processor)


def save_qwen3_vl(directory: Path) -> Path:
    """A Qwen3-VL of patches of 16 pixels in groups of 2 x 2."""
    tokenizer = qwen_tokenizer()
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = Qwen3VLConfig(
        text_config=SMALL | {"head_dim": 8, "rope_parameters": ROPE} | ids_of(tokenizer),
        vision_config=vision | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **qwen_ids(tokenizer),
    )
    images, videos = Qwen2VLImageProcessorPil(patch_size=16, size=limits(32)), Qwen3VLVideoProcessor()
    processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)
    return save(Qwen3VLForConditionalGeneration, config, directory, processor)


def qwen_tokenizer(**special_tokens: str) -> Any:
    """A tokenizer with the image tokens of Qwen-VL."""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return chat_tokenizer(
        image=image, audio="<|audio_bos|><|AUDIO|><|audio_eos|>", **IMAGE_TOKENS, **VISION_TOKENS, **special_tokens
    )


def qwen_ids(tokenizer: Any) -> dict[str, int]:
    """The ids of those tokens by their names in configurations."""
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in IMAGE_TOKENS.items()}
    start, end = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS.values()))
    return ids | {"vision_start_token_id": start, "vision_end_token_id": end}


def limits(side: int) -> dict[str, int]:
    """Size limits of images: 2 to 16 groups of `side` x `side` pixels."""
    return {"shortest_edge": 2 * side * side, "longest_edge": 16 * side * side}


def gemma_tokenizer(special_tokens: dict[str, str], image: str, audio: str = "") -> Any:
    """Letters, bytes for everything else, a begin token, and a chat template of Gemma's kind."""
    tokens = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        *special_tokens.values(),
        "<start_of_turn>",
        "<end_of_turn>",
    ]
    tokens += ["<|im_start|>", "<|im_end|>", "<|video|>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + [*"▁abcdefghijklmnopqrstuvwxyz.,<>|", "\n", "\n\n"]
    merges: Any = [("\n", "\n")]
    tokenizer = GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, extra_special_tokens=special_tokens
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")]
    )
    tokenizer.chat_template = "{{ bos_token }}" + chatml(image, audio)
    return tokenizer


IMAGE_MODELS = {
    "gemma3": save_gemma3,
    "idefics3": lambda directory: save_smolvlm(directory, idefics=True),
    "qwen2_5_vl": save_qwen2_5_vl,
    "qwen3_vl": save_qwen3_vl,
    "smolvlm": save_smolvlm,
}
