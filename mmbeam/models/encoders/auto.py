"""Checkpoints without a family: any model that transformers' AutoModel loads, with the checkpoint's own processors.

What such a model encodes follows from its class: texts, images and audio by get_text_features, get_image_features and
get_audio_features if the class has them, else what its forward takes; of an encoder-decoder, the encoder; of a model
that takes only several modalities together, the tower of each. A vector is the output that the class calls pooled
(pooler_output) if it has one and the files hold its weights. Otherwise it is the class token of an image, the last
token of a text in a decoder, and the mean over the tokens, cells or frames of anything else.

Inputs are preprocessed one by one on the CPU. Inputs of equal shape share a batch, and nothing is padded (unless the
processor itself pads), so that a vector equals that of transformers for the input alone. Audio of more than 30 s is
encoded in pieces of at most 30 s, and its vector is their mean.
"""

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor
from transformers.models.auto import modeling_auto

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec, encode_windows
from mmbeam.models.loading import check_weights, load_pretrained, read_config, read_json
from mmbeam.models.recipes import AS_DECODED, read_image_processor
from mmbeam.models.tokenizing import TextTokenizer, check_vocabulary, pad, text_limit, vocabulary_size
from mmbeam.names import Modality
from mmbeam.ops.audio import to_rate
from mmbeam.types import ImageHWC, Waveform

logger = logging.getLogger(__name__)

PIECE_SECONDS = 30  # the longest piece of audio: attention costs the square of the length
PIECES_PER_BATCH = 8
GOOD_TEXT = "a text that every working model encodes"
SIDE = 64  # pixels of the image with which a model is tried
# Towers of models whose forward takes several modalities together.
TOWERS: Mapping[Modality, tuple[str, ...]] = {
    "image": ("vision_model", "vision_tower", "visual_model", "visual", "image_encoder", "vision_encoder"),
    "audio": ("audio_model", "audio_tower", "speech_encoder", "audio_encoder"),
    "text": ("text_model", "text_encoder", "language_model"),
}
MAIN_INPUTS: Mapping[Modality, tuple[str, ...]] = {
    "image": ("pixel_values",),
    "audio": ("input_values", "input_features", "audio_values"),
    "text": ("input_ids",),
}
AUDIO_MASKS = ("input_features_mask", "feature_attention_mask", "padding_mask")
UNUSED = (r"(^|\.)mask_token$", r"(^|\.)masked_spec_embed$")  # weights that are used in pre-training only
POOLER = re.compile(r"(^|\.)pooler\.")
CLASS_TOKEN = re.compile(r"(^|\.)(cls|class)_(token|embedding|embed)s?$")

Inputs = Mapping[str, torch.Tensor]


class Route(NamedTuple):
    """How one modality becomes a vector."""

    module: str  # of the model: the dotted name of a part; "": all of it
    method: str  # "forward" or "get_image_features" and the like


@dataclass(frozen=True, kw_only=True)
class Processors:
    """The preprocessing of a checkpoint; None for what it lacks."""

    image: Any = None
    audio: Any = None
    tokenizer: TextTokenizer | None = None
    text_length: int | None = None  # the fixed number of tokens to which the processor pads texts


class AutoEncoder(Encoder):
    """A model that AutoModel loads."""

    def __init__(self, spec: EncoderSpec, model: Any, processors: Processors, config: Any) -> None:
        parameter = next(model.parameters())
        super().__init__(spec, parameter.device, parameter.dtype)
        self.model = model
        self.processors = processors
        self.routes = _routes(model, config, processors)
        self.vocabulary = vocabulary_size(model)
        self.is_decoder = _is_decoder(config)
        self.poolings: dict[Modality, str] = {}  # how vectors are pooled, for a person; known after the first batch
        self.has_pooler = _has_pooler(Path(spec.directory), model)
        self.has_class_token = any(CLASS_TOKEN.search(name) for name, _ in model.named_parameters())
        self.audio_mask = self._audio_mask()
        self.token_types = {} if processors.tokenizer is None else processors.tokenizer.special_types()

    def _audio_mask(self) -> str | None:
        """Return the model's own name for the feature extractor's mask, if it has one."""
        if "audio" not in self.routes or self.routes["audio"].method == "forward":
            return None
        names = inspect.signature(getattr(self.model, self.routes["audio"].method)).parameters
        return next((name for name in AUDIO_MASKS if name in names), None)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Try the model on an input of each modality: without weights if that is possible, else with them."""
        parsed = read_config(directory)
        check_weights(directory)
        processors = _read_processors(directory)
        spec = EncoderSpec(
            family=parsed.model_type,
            directory=str(directory),
            dims={},
            sampling_rate=None if processors.audio is None else int(processors.audio.sampling_rate),
            max_text_tokens=_text_limit(directory, parsed, processors),
            is_generic=True,
        )
        try:
            with torch.device("meta"):
                model: Any = _plain(AutoModel.from_config(parsed, attn_implementation="eager").eval())
            return _tried(cls(spec, model, processors, parsed))
        except ModelError:
            raise
        except Exception as error:  # operations that need values
            logger.info("%s: loading the weights to try the model: %s", directory, error)
        return _tried(cls.load(spec, torch.device("cpu"), torch.float32), is_loaded=True)

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> "AutoEncoder":
        """Load the weights; the processors run in float32 on the CPU."""
        directory = Path(spec.directory)
        parsed = read_config(directory)
        ignored = UNUSED if _weight_names(directory, POOLER) else (*UNUSED, POOLER.pattern)
        model = _plain(load_pretrained(AutoModel, directory, device, dtype, ignore_missing=ignored))
        if hasattr(model.config, "mask_ratio"):  # a masked autoencoder leaves out patches at random, even in eval mode
            model.config.mask_ratio = 0.0
        return cls(spec, model, _read_processors(directory), parsed)

    def prepare(self, modality: Modality, values: Sequence[Any]) -> Any:
        """Return the processors' outputs for images, and for clips those of their pieces."""
        if modality == "image":
            return [self.prepare_image(image) for image in values]
        if modality == "audio":
            return [self.prepare_audio(wave, rate) for wave, rate in values], [rate for _, rate in values]
        return None

    def prepare_image(self, image: ImageHWC) -> dict[str, torch.Tensor]:
        """Return the inputs that the checkpoint's image processor makes of an image, on the CPU."""
        if self.pixel_filter is not None:
            pixels_CHW = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
            image = np.ascontiguousarray(self.pixel_filter(pixels_CHW[None])[0].permute(1, 2, 0).numpy())
        return _tensors(self.processors.image(image, **AS_DECODED))

    def prepare_audio(self, wave: Waveform, rate: int) -> list[dict[str, torch.Tensor]]:
        """Return the inputs that the checkpoint's feature extractor makes of each piece of a clip, on the CPU."""
        model_rate = int(self.processors.audio.sampling_rate)
        [clip] = to_rate([wave], [rate], model_rate, torch.device("cpu"))
        count = -(-len(clip) // (PIECE_SECONDS * model_rate))
        options = {} if self.audio_mask is None else {"return_attention_mask": True}
        return [
            _tensors(self.processors.audio(piece.numpy(), sampling_rate=model_rate, return_tensors="pt", **options))
            for piece in torch.tensor_split(clip, max(1, count))
        ]

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Any], tokens: bool = False) -> Encoded:
        """Encode images of any sizes, uint8 [H, W, 3], or prepared ones; tokens are the last hidden states."""
        inputs = [image if isinstance(image, dict) else self.prepare_image(image) for image in images]
        return self._encode("image", inputs, tokens)

    @torch.inference_mode()
    def encode_audio(self, waves: Sequence[Any], rates: Sequence[int], tokens: bool = False) -> Encoded:
        """Encode audio clips, or prepared ones; tokens are the last hidden states, piece after piece."""
        pieces = [
            wave if isinstance(wave, list) else self.prepare_audio(wave, rate)
            for wave, rate in zip(waves, rates, strict=True)
        ]
        return encode_windows(
            pieces, max(len(waves), PIECES_PER_BATCH), lambda some: self._encode("audio", some, tokens)
        )

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, special tokens included, truncated to the model's limit."""
        assert self.processors.tokenizer is not None
        assert self.spec.max_text_tokens is not None
        return self.processors.tokenizer.encode(texts, self.spec.max_text_tokens)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated, without special tokens."""
        assert self.processors.tokenizer is not None
        return self.processors.tokenizer.count(texts)

    def count_encoded(self, token_ids: Sequence[int]) -> int | None:
        """Return the number of tokens of a text by its ids; None for a text that is truncated or has a prompt."""
        assert self.processors.tokenizer is not None
        assert self.spec.max_text_tokens is not None
        if self.spec.text_prompt:
            return None
        return self.processors.tokenizer.count_encoded(token_ids, self.spec.max_text_tokens)

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode texts that `tokenize` made; tokens are the last hidden states."""
        tokenizer, cpu = self.processors.tokenizer, torch.device("cpu")
        assert tokenizer is not None
        inputs = []
        for ids in token_ids:
            length = self.processors.text_length
            ids_BL, mask_BL = pad(
                [ids], tokenizer.pad_id, cpu, length, tokenizer.padding_side, vocabulary=self.vocabulary
            )
            types_BL = torch.tensor([[self.token_types.get(token, 0) for token in ids_BL[0].tolist()]])
            one = {"input_ids": ids_BL, "attention_mask": mask_BL, "token_type_ids": types_BL}
            inputs.append({name: value for name, value in one.items() if name in tokenizer.inputs})
        return self._encode("text", inputs, tokens)

    def _encode(self, modality: Modality, inputs: Sequence[Inputs], tokens: bool) -> Encoded:
        """Encode inputs of one modality; those of equal shapes together."""
        route = self.routes[modality]
        module = self.model.get_submodule(route.module)
        method = module.forward if route.method == "forward" else getattr(module, route.method)
        names = inspect.signature(method).parameters
        if modality == "audio" and self.audio_mask is not None:
            renamed = {"attention_mask": self.audio_mask}
            inputs = [{renamed.get(name, name): value for name, value in values.items()} for values in inputs]
        shapes: dict[Any, list[int]] = {}
        for position, values in enumerate(inputs):
            # The batch is one for an image that is several tensors (patches and their grid) or several images, and for
            # audio of which the model selects frames by a mask.
            alone = modality == "image" and (len(values) > 1 or next(iter(values.values())).dim() != 4)
            alone = alone or (modality == "audio" and self.audio_mask is not None)
            shape = position if alone else tuple((name, value.shape) for name, value in sorted(values.items()))
            shapes.setdefault(shape, []).append(position)
        pooled: dict[int, torch.Tensor] = {}
        hidden: dict[int, torch.Tensor] = {}
        for positions in shapes.values():
            joined = {
                name: self._to_device(torch.cat([inputs[position][name] for position in positions]))
                for name in inputs[positions[0]]
                if name in names
                and not (name == "attention_mask" and self.device.type == "meta")  # its values are read
            }
            output = (module if route.method == "forward" else method)(**joined)
            vectors_BD, hidden_BLD = self._pool(modality, output, joined.get("attention_mask"), len(positions))
            pooled.update(zip(positions, vectors_BD, strict=True))
            if tokens and hidden_BLD is not None:
                hidden.update(zip(positions, hidden_BLD, strict=True))
        pooled_BD = torch.stack([pooled[position] for position in range(len(inputs))])
        kept = [hidden[position] for position in range(len(inputs))] if len(hidden) == len(inputs) else None
        return Encoded(pooled=pooled_BD, tokens=kept)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def _pool(
        self, modality: Modality, output: Any, mask_BL: torch.Tensor | None, count: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the vectors [B, D] of an output and its hidden states [B, L, D], if it has those."""
        route, hidden = self.routes[modality], getattr(output, "last_hidden_state", None)
        if hidden is None and getattr(output, "feature_maps", None):  # of a backbone
            hidden = output.feature_maps[-1]
        name = type(self.model.get_submodule(route.module)).__name__
        name += "" if route.method == "forward" else f".{route.method}"
        if hidden is not None and hidden.dim() == 4:  # [B, D, H, W] of a convolutional network
            hidden = hidden.flatten(2).transpose(1, 2)
        tokens = hidden if hidden is not None and hidden.dim() == 3 and len(hidden) == count else None
        pooled = output if isinstance(output, torch.Tensor) else getattr(output, "pooler_output", None)
        if isinstance(pooled, list | tuple):  # the tokens of each image
            pooled = torch.stack([of_image.flatten(0, -2).mean(0) for of_image in pooled])
        if pooled is not None and (self.has_pooler or route.method != "forward"):
            kind = "pooler_output" if isinstance(output, torch.Tensor) is False else "output"
            if pooled.dim() == 4:  # [B, D, 1, 1] or [B, D, H, W]
                pooled = pooled.flatten(2).mean(-1)
            elif pooled.dim() == 3:
                kind, pooled = f"mean over the {kind}", pooled.mean(1)
            if len(pooled) != count and count == 1:  # the parts of one image
                pooled = pooled.mean(0, keepdim=True)
            self.poolings[modality] = f"{kind} of {name}"
            return pooled, tokens
        if tokens is None:
            raise ModelError(f"{self.spec.directory}: {name} returns neither pooler_output nor last_hidden_state")
        if modality == "image" and self.has_class_token:
            self.poolings[modality] = f"class token of {name}"
            return tokens[:, 0], tokens
        if modality == "text" and self.is_decoder:
            self.poolings[modality] = f"last token of {name}"
            return tokens[:, -1], tokens
        self.poolings[modality] = f"mean over the last_hidden_state of {name}"
        if mask_BL is None or mask_BL.shape != tokens.shape[:2]:
            return tokens.float().mean(1), tokens
        weights_BL1 = mask_BL[..., None].float()
        return (tokens.float() * weights_BL1).sum(1) / weights_BL1.sum(1).clamp(min=1), tokens


def _tried(encoder: AutoEncoder, is_loaded: bool = False) -> EncoderSpec:
    """Return the spec of what the encoder encodes: each modality for which an input known to be good has a vector."""
    dims: dict[Modality, int] = {}
    token_dims: dict[Modality, int] = {}
    problems: dict[str, Exception] = {}
    for modality in encoder.routes:
        try:
            if modality == "image":
                shapes = ((SIDE, SIDE, 3), (SIDE, 2 * SIDE, 3))
                encoded = encoder.encode_image([np.full(shape, 127, np.uint8) for shape in shapes], tokens=True)
            elif modality == "audio":
                wave: Waveform = (0.1 * np.sin(np.arange(16000))).astype(np.float32)
                encoded = encoder.encode_audio([wave], [16000], tokens=True)
            else:
                encoded = encoder.encode_text(encoder.tokenize([GOOD_TEXT]), tokens=True)
        except Exception as error:
            if not is_loaded:
                raise
            problems[modality] = error
            continue
        dims[modality] = encoded.pooled.shape[1]
        if encoded.tokens is not None:
            token_dims[modality] = encoded.tokens[0].shape[1]
    if not dims:
        directory, name = encoder.spec.directory, type(encoder.model).__name__
        reasons = "; ".join(f"{modality}: {type(error).__name__}: {error}" for modality, error in problems.items())
        raise ModelError(
            f"{directory}: {name} encodes none of image, audio and text by itself"
            + (f" ({reasons})" if reasons else "; are the files of its processor or tokenizer missing?")
        )
    stated = "; ".join(f"{modality}: {encoder.poolings[modality]}" for modality in dims)
    dropped = "".join(f"; not {modality}: {error}" for modality, error in problems.items())
    note = (
        f"{encoder.spec.family} has no family of its own: it runs by AutoModel with the checkpoint's own processors, "
        f"slower than a family; vectors are {stated}{dropped}"
    )
    return replace(encoder.spec, dims=dims, token_dims=token_dims, notes=(note,))


def _plain(model: Any) -> Any:
    """Return the model without its head for another task: a few types have no other class."""
    if not re.search("For[A-Z]", type(model).__name__):
        return model
    return model.base_model if model.base_model is not model else getattr(model, "encoder", model)


def _read_processors(directory: Path) -> Processors:
    """Return the processors whose files the checkpoint has. Raises ModelError if it has none."""
    image = audio = None
    options: Any = {"local_files_only": True, "trust_remote_code": False}
    flat = read_json(directory, "preprocessor_config.json", required=False)
    nested = read_json(directory, "processor_config.json", required=False)
    has_pixels = "image_mean" in flat or "image_processor_type" in flat  # older image processors are "extractors" too
    if has_pixels or "image_processor" in nested or "image_processor_type" in nested:
        image = read_image_processor(directory)
    if (
        "feature_extractor" in nested
        or "audio_processor" in nested
        or ("feature_extractor_type" in flat and ("image_mean" not in flat or "image_processor_type" in flat))
    ):
        try:
            audio = AutoFeatureExtractor.from_pretrained(directory, **options)
        except Exception as error:  # transformers raises errors of many types
            raise ModelError(
                f"{directory}: its feature extractor cannot be read: {type(error).__name__}: {error}"
            ) from error
    try:
        check_vocabulary(directory)
    except ModelError:
        if image is None and audio is None:
            raise ModelError(
                f"{directory}: expected a tokenizer, an image processor or a feature extractor, found none; copy the "
                "whole directory"
            ) from None
        return Processors(image=image, audio=audio)
    tokenizer = TextTokenizer(directory)
    length = None
    try:
        auto: Any = AutoProcessor
        processor = auto.from_pretrained(directory, **options, **({} if image is None else {"backend": "pil"}))
        defaults = getattr(processor.valid_processor_kwargs, "_defaults", {}).get("text_kwargs", {})
        if defaults.get("padding") == "max_length":
            length = defaults.get("max_length") or tokenizer.max_length
    except Exception as error:  # no processor, or one that needs a package: its parts do
        logger.debug("%s: no AutoProcessor: %s", directory, error)
    return Processors(image=image, audio=audio, tokenizer=tokenizer, text_length=length)


def _routes(model: Any, config: Any, processors: Processors) -> dict[Modality, Route]:
    """Return the routes of the modalities that the checkpoint has a processor for."""
    part = ""
    if getattr(config, "is_encoder_decoder", False):
        encoder = model.get_encoder()
        if encoder is not None and encoder.main_input_name == model.main_input_name:
            part = next(name for name, module in model.named_modules() if module is encoder)
    available: dict[Modality, Any] = {
        "image": processors.image,
        "audio": processors.audio,
        "text": processors.tokenizer,
    }
    routes: dict[Modality, Route] = {}
    for modality, processor in available.items():
        if processor is None:
            continue
        towers = [name for name in TOWERS[modality] if isinstance(getattr(model, name, None), torch.nn.Module)]
        if hasattr(model, f"get_{modality}_features"):
            routes[modality] = Route("", f"get_{modality}_features")
        elif model.main_input_name in MAIN_INPUTS[modality]:
            together = len(getattr(model, "input_modalities", ())) > 1 and modality != "text" and towers
            routes[modality] = Route(towers[0] if together else part, "forward")
        elif towers:
            routes[modality] = Route(towers[0], "forward")
    return routes


def _is_decoder(config: Any) -> bool:
    """Return whether a token of a text is computed from those before it only, so that the last one stands for all."""
    model_type = config.get_text_config().model_type
    causal = {config.model_type, model_type} & {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    masked = {config.model_type, model_type} & {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    is_multimodal = config.model_type in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return (bool(causal) or is_multimodal) and not masked and not config.is_encoder_decoder


def _text_limit(directory: Path, config: Any, processors: Processors) -> int | None:
    if processors.tokenizer is None:
        return None
    return processors.text_length or text_limit(directory, config.get_text_config())


def _has_pooler(directory: Path, model: Any) -> bool:
    """Return whether pooler_output is of trained weights: many checkpoints of another task lack the pooler's."""
    needed = any(POOLER.search(name) for name, _ in model.named_parameters())
    return not needed or bool(_weight_names(directory, POOLER))


def _weight_names(directory: Path, pattern: re.Pattern[str]) -> list[str]:
    """Return the names of the checkpoint's weights that match."""
    index = read_json(directory, "model.safetensors.index.json", required=False).get("weight_map")
    names = list(index or ())
    if not names and (directory / "model.safetensors").is_file():
        with safe_open(directory / "model.safetensors", framework="pt") as file:
            names = list(file.keys())
    return [name for name in names if pattern.search(name)]


def _tensors(inputs: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that a processor made of one input."""
    if isinstance(inputs, torch.Tensor):
        return {"pixel_values": inputs}
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
