"""Tiny checkpoints of architectures without a family here, from their configurations."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from tiny_audio_text import TOWER, WIDTH, byte_tokenizer, word_tokenizer
from tiny_clip import DIM, SIDE, save_random
from tiny_generators_hub import chat_tokenizer, ids_of, save

SQUARE = {"height": SIDE, "width": SIDE}
VISION = TOWER | {"image_size": SIDE, "patch_size": 16}
STAGED: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 3,
    "image_size": SIDE,
    "patch_size": 4,
}


def _image(
    name: str, processor: str, config: dict[str, Any], head: str = "Model", **options: Any
) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        cls, configuration = getattr(transformers, name + head), getattr(transformers, name + "Config")(**config)
        save_random(cls, configuration, directory)
        getattr(transformers, processor + "Pil")(**options).save_pretrained(directory)
        return directory

    return build


def _text(name: str, config: dict[str, Any], head: str = "Model", **tokenizer_options: Any) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        tokenizer = word_tokenizer(**tokenizer_options)
        options = {"vocab_size": len(tokenizer), "pad_token_id": 0, **config}
        save_random(getattr(transformers, name + head), getattr(transformers, name + "Config")(**options), directory)
        tokenizer.save_pretrained(directory)
        return directory

    return build


def _decoder(name: str, config: dict[str, Any]) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        tokenizer = byte_tokenizer()
        options = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **config,
        }
        save_random(
            getattr(transformers, name + "ForCausalLM"), getattr(transformers, name + "Config")(**options), directory
        )
        tokenizer.save_pretrained(directory)
        return directory

    return build


def _joint(
    name: str, processor: str, text: dict[str, Any], vision: dict[str, Any], **options: Any
) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        tokenizer = word_tokenizer(model_max_length=64)
        text_config = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, **text}
        config = getattr(transformers, name + "Config")(text_config=text_config, vision_config=vision, **options)
        save_random(getattr(transformers, name + "Model"), config, directory)
        getattr(transformers, processor + "Pil")(**{"size": SQUARE, "crop_size": SQUARE}).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return build


def _audio(name: str, cls: str, config: dict[str, Any], extractor: str, **options: Any) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        save_random(getattr(transformers, cls), getattr(transformers, name + "Config")(**config), directory)
        getattr(transformers, extractor)(**options).save_pretrained(directory)
        return directory

    return build


SMALL_EFFICIENTNET: dict[str, Any] = {
    "image_size": SIDE,
    "width_coefficient": 0.25,
    "depth_coefficient": 0.1,
    "hidden_dim": 320,
    "kernel_sizes": [3, 3],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
    "depthwise_padding": [],
}
CONV: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 8),
    "conv_stride": (8, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
POSITIONS = {"max_position_embeddings": 64}


class Checkpoints(dict[str, Path]):
    """The directories of checkpoints, each built when it is first asked for."""

    def __init__(self, root: Path, builders: Mapping[str, Callable[[Path], Path]]) -> None:
        super().__init__()
        self.root, self.builders = root, builders

    def __missing__(self, name: str) -> Path:
        self[name] = self.builders[name](self.root / name)
        return self[name]


AUTO: dict[str, Callable[[Path], Path]] = {
    "swin": _image("Swin", "ViTImageProcessor", STAGED, "ForImageClassification", size=SQUARE),
    "swinv2": _image("Swinv2", "ViTImageProcessor", STAGED, size=SQUARE),
    "beit": _image(
        "Beit",
        "BeitImageProcessor",
        VISION | {"use_mean_pooling": True, "layer_scale_init_value": 1.0},
        size=SQUARE,
        do_center_crop=False,
    ),
    "deit": _image(
        "DeiT",
        "DeiTImageProcessor",
        VISION,
        "ForImageClassification",
        size={"height": 56, "width": 56},
        crop_size=SQUARE,
    ),
    "efficientnet": _image(
        "EfficientNet",
        "EfficientNetImageProcessor",
        SMALL_EFFICIENTNET,
        size=SQUARE,
    ),
    "regnet": _image(
        "RegNet",
        "ConvNextImageProcessor",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
        size={"shortest_edge": SIDE},
    ),
    "poolformer": _image(
        "PoolFormer",
        "PoolFormerImageProcessor",
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
        size={"shortest_edge": SIDE},
        crop_size=SQUARE,
    ),
    "hiera": _image(
        "Hiera",
        "BitImageProcessor",
        {
            "image_size": [SIDE, SIDE],
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "query_stride": [2, 2],
            "masked_unit_size": [4, 4],
        },
        size=SQUARE,
        crop_size=SQUARE,
    ),
    "modernbert": _text(
        "ModernBert",
        TOWER
        | POSITIONS
        | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
        "ForMaskedLM",
    ),
    "camembert": _text("Camembert", TOWER | POSITIONS, "ForMaskedLM"),
    "ernie": _text("Ernie", TOWER | POSITIONS),
    "gte": _text("Gte", TOWER | POSITIONS),
    "nomic_bert": _text("NomicBert", TOWER | POSITIONS),
    "llama": _decoder("Llama", TOWER | {"num_key_value_heads": 2}),
    "bart": _text(
        "Bart",
        {
            "d_model": WIDTH,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            **POSITIONS,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "decoder_start_token_id": 2,
        },
    ),
    "altclip": _joint(
        "AltCLIP",
        "CLIPImageProcessor",
        TOWER | {"project_dim": WIDTH, **POSITIONS, "max_position_embeddings": 66, "pad_token_id": 1},
        VISION,
        projection_dim=DIM,
    ),
    "align": _joint(
        "Align",
        "EfficientNetImageProcessor",
        TOWER | POSITIONS,
        SMALL_EFFICIENTNET,
        projection_dim=64,
    ),
    "clipseg": _joint("CLIPSeg", "ViTImageProcessor", TOWER | POSITIONS, VISION, projection_dim=DIM),
    "data2vec-audio": _audio(
        "Data2VecAudio", "Data2VecAudioForCTC", TOWER | CONV | {"vocab_size": 8}, "Wav2Vec2FeatureExtractor"
    ),
    "wav2vec2-conformer": _audio(
        "Wav2Vec2Conformer", "Wav2Vec2ConformerModel", TOWER | CONV | {"hidden_act": "gelu"}, "Wav2Vec2FeatureExtractor"
    ),
    "wav2vec2-bert": _audio(
        "Wav2Vec2Bert",
        "Wav2Vec2BertModel",
        TOWER | {"feature_projection_input_dim": 160},
        "SeamlessM4TFeatureExtractor",
    ),
    "moonshine": _audio(
        "Moonshine",
        "MoonshineForConditionalGeneration",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "vocab_size": 32,
            "eos_token_id": 2,
            "bos_token_id": 1,
        },
        "Wav2Vec2FeatureExtractor",
    ),
    "parakeet_ctc": _audio(
        "ParakeetCTC",
        "ParakeetForCTC",
        {
            "encoder_config": TOWER | {"num_mel_bins": 80, "subsampling_conv_channels": 8, "conv_kernel_size": 5},
            "vocab_size": 16,
        },
        "ParakeetFeatureExtractor",
    ),
}


def save_paligemma(directory: Path) -> Path:
    """A PaliGemma of 48 x 48 pixels and 9 tokens an image, without a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = len(tokenizer) + 1200  # the processor adds tokens of places and segments
    config = transformers.PaliGemmaConfig(
        text_config=TOWER
        | ids_of(tokenizer)
        | {"model_type": "gemma", "vocab_size": size, "num_key_value_heads": 2, "head_dim": 8},
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=WIDTH,
    )
    images = transformers.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 9
    processor: Any = transformers.PaliGemmaProcessor(images, tokenizer)
    return save(transformers.PaliGemmaForConditionalGeneration, config, directory, processor)


def save_idefics(directory: Path) -> Path:
    """An Idefics of 48 x 48 pixels, without a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]}
    )
    ids = ids_of(tokenizer)
    config = transformers.IdeficsConfig(
        **TOWER,
        **ids,
        additional_vocab_size=0,
        cross_layer_interval=1,
        use_resampler=False,
        alpha_initializer="ones",
        vision_config={
            "embed_dim": WIDTH,
            "image_size": SIDE,
            "patch_size": 16,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "intermediate_size": 64,
        },
        max_position_embeddings=256,
    )
    processor: Any = transformers.IdeficsProcessor(
        transformers.IdeficsImageProcessorPil(image_size=SIDE), tokenizer, image_size=SIDE
    )
    return save(transformers.IdeficsForVisionText2Text, config, directory, processor)


def save_git(directory: Path) -> Path:
    """A GIT of 48 x 48 pixels."""
    tokenizer = word_tokenizer(model_max_length=64)
    config = transformers.GitConfig(
        vision_config=VISION,
        **TOWER,
        **POSITIONS,
        vocab_size=len(tokenizer),
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return save(transformers.GitForCausalLM, config, directory, transformers.GitProcessor(images, tokenizer))


def save_moonshine(directory: Path) -> Path:
    """A Moonshine with a tokenizer."""
    tokenizer = byte_tokenizer()
    config = transformers.MoonshineConfig(
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        decoder_start_token_id=tokenizer.bos_token_id,
        **ids_of(tokenizer),
    )
    processor: Any = transformers.Wav2Vec2Processor(
        transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer
    )
    return save(transformers.MoonshineForConditionalGeneration, config, directory, processor)


def save_internvl(directory: Path) -> Path:
    """An InternVL of 48 x 48 pixels in one tile, whose chat template is its own."""
    tokenizer = chat_tokenizer(
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<video>",
        image="<IMG_CONTEXT>\n",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = transformers.InternVLConfig(
        text_config=TOWER
        | ids_of(tokenizer)
        | {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 8},
        vision_config=TOWER | {"image_size": [SIDE, SIDE], "patch_size": [12, 12]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = transformers.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False)
    processor: Any = transformers.InternVLProcessor(
        images,
        tokenizer,
        transformers.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    return save(transformers.InternVLForConditionalGeneration, config, directory, processor)


def save_glmasr(directory: Path) -> Path:
    """A GLM-ASR: a chat model of audio, whose feature extractor's mask has another name."""
    marks = ("<|pad|>", "<|begin_of_audio|>", "<|end_of_audio|>")
    tokenizer = chat_tokenizer(*marks, audio="<|begin_of_audio|><|pad|><|end_of_audio|>")
    config = transformers.GlmAsrConfig(
        audio_config=TOWER | {"num_mel_bins": 80, "max_position_embeddings": 100},
        text_config=TOWER | ids_of(tokenizer) | {"model_type": "llama", "num_key_value_heads": 2},
        audio_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
    )
    extractor = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    processor: Any = transformers.GlmAsrProcessor(extractor, tokenizer, chat_template=tokenizer.chat_template)
    return save(transformers.GlmAsrForConditionalGeneration, config, directory, processor)


LETTERS = "|ETAOINSHRDLU"  # of a CTC model; | is a space


def _ctc(name: str, cls: str) -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        vocabulary = {token: number for number, token in enumerate(("<pad>", "<s>", "</s>", "<unk>", *LETTERS))}
        (directory / "letters.json").write_text(json.dumps(vocabulary))
        tokenizer = transformers.Wav2Vec2CTCTokenizer(str(directory / "letters.json"))
        config = transformers.AutoConfig.for_model(
            name, **TOWER, conv_dim=(16,) * 7, num_conv_pos_embeddings=16, vocab_size=len(vocabulary), pad_token_id=0
        )
        processor: Any = transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), tokenizer)
        return save(getattr(transformers, cls), config, directory, processor)

    return build


def save_parakeet(directory: Path) -> Path:
    """A Parakeet CTC with a tokenizer of bytes; the blank is its padding token."""
    tokenizer = byte_tokenizer()
    encoder = TOWER | {"subsampling_conv_channels": 8, "conv_kernel_size": 9}
    config = transformers.ParakeetCTCConfig(
        encoder_config=encoder, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    processor: Any = transformers.ParakeetProcessor(transformers.ParakeetFeatureExtractor(), tokenizer)
    return save(transformers.ParakeetForCTC, config, directory, processor)


CTC: dict[str, Callable[[Path], Path]] = {
    "wav2vec2": _ctc("wav2vec2", "Wav2Vec2ForCTC"),
    "hubert": _ctc("hubert", "HubertForCTC"),
    "parakeet": save_parakeet,
}
CAPTIONERS: dict[str, Callable[[Path], Path]] = {
    "paligemma": save_paligemma,
    "idefics": save_idefics,
    "git": save_git,
    "moonshine": save_moonshine,
    "internvl": save_internvl,
    "glmasr": save_glmasr,
}
