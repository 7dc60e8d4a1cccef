"""Encoders that run on other packages: open_clip, timm, and what sentence-transformers alone implements.

The packages are extras (`pip install 'mmbeam[open_clip]'`, `'mmbeam[timm]'`, `sentence-transformers`). Weights are read
here, from safetensors. Images are preprocessed on the device where the package's transform is one that the kernels
have: resize by the shorter side or to a size, centre crop, normalise. Otherwise the package's own transform runs on the
CPU, and the summary says so.
"""

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, cast

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmbeam.errors import ModelError
from mmbeam.models.encoders.base import Encoded, Encoder, EncoderSpec
from mmbeam.models.loading import model_files, read_json
from mmbeam.names import Modality
from mmbeam.ops.image import ImageRecipe, Interpolation, preprocess
from mmbeam.types import ImageHWC

OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
PRECISIONS: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")  # of open_clip's tokenizer, which reads them in texts
LEVEL = 1 / 255


def import_package(name: str, install: str) -> Any:
    """Return an optional package. Raises ModelError if it is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ModelError(f"the model needs the package {name}, which is not installed; run `pip install {install}`")
    return importlib.import_module(name)


class ImagePackageEncoder(Encoder):
    """An encoder of images whose preprocessing is a recipe, or a transform of its package."""

    package: ClassVar[str]

    def __init__(self, spec: EncoderSpec, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec, device, dtype)
        self.model = model
        self.recipe: ImageRecipe | None
        self.transform: Any

    def prepare(self, modality: Modality, values: Sequence[Any]) -> Any:
        """Return the package's own pixels of images, if there is no recipe."""
        return [self._pixels(image) for image in values] if modality == "image" and self.recipe is None else None

    def _pixels(self, image: ImageHWC) -> torch.Tensor:
        if self.pixel_filter is not None:
            pixels_1CHW = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
            image = self.pixel_filter(pixels_1CHW)[0].permute(1, 2, 0).contiguous().numpy()
        pixels_CHW: torch.Tensor = self.transform(Image.fromarray(image))
        return pixels_CHW

    def _batch(self, images: Sequence[Any]) -> torch.Tensor:
        """Return images, or prepared ones, as the model's input."""
        if self.recipe is not None:
            return preprocess(images, self.recipe, self.device, self.dtype, self.pixel_filter)
        pixels = [image if isinstance(image, torch.Tensor) else self._pixels(image) for image in images]
        return torch.stack(pixels).to(self.device, self.dtype)

    @classmethod
    def notes(cls, recipe: ImageRecipe | None) -> tuple[str, ...]:
        """Return what the summary says of the preprocessing."""
        if recipe is not None:
            return ()
        return (
            f"images are preprocessed by {cls.package}'s own transform on the CPU, which the kernels cannot follow",
        )


class OpenClipEncoder(ImagePackageEncoder):
    """A model of open_clip: images and texts in one space. It has no vectors of tokens."""

    package = "open_clip"

    def __init__(self, spec: EncoderSpec, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec, model, device, dtype)
        open_clip = _open_clip()
        directory = Path(spec.directory)
        config = read_json(directory, OPEN_CLIP_FILES[0])
        self.recipe, self.transform = _open_clip_preprocessing(config)
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{directory}")
        self._lock = Lock()

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read open_clip_config.json."""
        _open_clip()
        options = read_json(directory, OPEN_CLIP_FILES[0])
        weights = directory / OPEN_CLIP_FILES[1]
        if not weights.is_file():
            raise ModelError(
                f"{directory}: has no {weights.name}; pickled weights (open_clip_pytorch_model.bin) are never loaded. "
                "If you trust them, load them with open_clip and save `model.state_dict()` with safetensors"
            )
        try:
            width, context = int(options["model_cfg"]["embed_dim"]), options["model_cfg"]["text_cfg"]
            recipe, _ = _open_clip_preprocessing(options)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{directory}/{OPEN_CLIP_FILES[0]}: {type(error).__name__}: {error}") from error
        return EncoderSpec(
            family="open_clip",
            directory=str(directory),
            dims={"image": width, "text": width},
            image_side=None if recipe is None else recipe.shorter_side,
            max_text_tokens=int(context.get("context_length", 77)),
            notes=cls.notes(recipe),
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Build the model with open_clip, and load its weights from safetensors."""
        directory = Path(spec.directory)
        try:
            model = _open_clip().create_model(
                f"local-dir:{directory}",
                load_weights=False,
                pretrained_text=False,
                precision=PRECISIONS[dtype],
                device=str(device),
            )
            model.load_state_dict(load_file(directory / OPEN_CLIP_FILES[1]))
            return cls(spec, model.eval(), device, dtype)
        except Exception as error:  # open_clip raises errors of many types
            raise ModelError(f"{directory}: open_clip cannot load it: {type(error).__name__}: {error}") from error

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Any], tokens: bool = False) -> Encoded:
        """Encode images of any sizes, uint8 [H, W, 3], or prepared ones."""
        return Encoded(pooled=self.model.encode_image(self._batch(images)))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, padded to the model's context."""
        with self._lock:
            rows: list[list[int]] = self.tokenizer([_plain(text) for text in texts]).tolist() if texts else []
        return rows

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated, without special tokens."""
        with self._lock:
            if hasattr(self.tokenizer, "encode"):
                return [len(self.tokenizer.encode(_plain(text))) for text in texts]
            hub_tokenizer = self.tokenizer.tokenizer
            return [len(hub_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode texts that `tokenize` made."""
        return Encoded(pooled=self.model.encode_text(torch.tensor(list(map(list, token_ids)), device=self.device)))


def _open_clip() -> Any:
    return import_package("open_clip", "'mmbeam[open_clip]'")


def _plain(text: str) -> str:
    """Return a text that spells no special token: its tokens are the same, but for the special ones."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _open_clip_preprocessing(config: Mapping[str, Any]) -> tuple[ImageRecipe | None, Any]:
    """Return the recipe of open_clip's transform for inference, None if the kernels lack it, and the transform."""
    module = importlib.import_module("open_clip.transform")
    side = (config["model_cfg"].get("vision_cfg") or {}).get("image_size", 224)
    options = module.PreprocessCfg(**{"size": side, **(config.get("preprocess_cfg") or {})})
    size = (options.size, options.size) if isinstance(options.size, int) else tuple(options.size)
    recipe = None
    if options.interpolation in ("bicubic", "bilinear") and (options.resize_mode == "squash" or size[0] == size[1]):
        recipe = ImageRecipe(
            size={"squash": size, "shortest": size[0]}.get(options.resize_mode),
            interpolation=cast(Interpolation, options.interpolation),
            crop=size if options.resize_mode == "shortest" else None,
            rounds_crop=True,
            scale=LEVEL,
            mean=tuple(options.mean),
            std=tuple(options.std),
        )
    is_known = options.resize_mode in ("squash", "shortest")
    return recipe if is_known else None, module.image_transform_v2(options, is_train=False)


class TimmEncoder(ImagePackageEncoder):
    """A backbone of timm: its features before the classifier. It has no vectors of tokens."""

    package = "timm"

    def __init__(self, spec: EncoderSpec, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec, model, device, dtype)
        self.recipe, self.transform = _timm_preprocessing(model)

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Read config.json and build the model without weights."""
        with torch.device("meta"):
            model = _timm_model(directory, config)
            try:
                height, width = model.pretrained_cfg["input_size"][1:]
                dims = model(torch.zeros(1, 3, height, width)).shape[1]
            except Exception as error:  # operations that need values
                raise ModelError(f"{directory}: timm's model cannot be tried: {error}") from error
        if not (directory / "model.safetensors").is_file():
            raise ModelError(f"{directory}: has no model.safetensors; pickled weights are never loaded")
        recipe, _ = _timm_preprocessing(model)
        return EncoderSpec(
            family="timm",
            directory=str(directory),
            dims={"image": dims},
            image_side=None if recipe is None else recipe.shorter_side,
            notes=cls.notes(recipe),
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Build the model with timm, and load its weights from safetensors, without the classifier's."""
        directory = Path(spec.directory)
        model = _timm_model(directory, read_json(directory, "config.json"))
        try:
            missing = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False).missing_keys
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ModelError(f"{directory}: its weights do not fit its config.json: {error}") from error
        if missing:
            raise ModelError(f"{directory}: weights are missing, and would be random: {', '.join(missing[:5])}")
        return cls(spec, model.eval().to(device, dtype), device, dtype)

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Any], tokens: bool = False) -> Encoded:
        """Encode images of any sizes, uint8 [H, W, 3], or prepared ones."""
        return Encoded(pooled=self.model(self._batch(images)))


def _timm_model(directory: Path, config: Mapping[str, Any]) -> Any:
    """Return the model of a timm directory with random weights, without its classifier."""
    timm = import_package("timm", "'mmbeam[timm]'")
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise ModelError(
            f"{directory}/config.json: architecture is {name!r}; expected a model of timm {timm.__version__}"
        )
    try:
        return timm.create_model(f"local-dir:{directory}", pretrained=False, num_classes=0).eval()
    except Exception as error:
        raise ModelError(f"{directory}: timm cannot build {name}: {type(error).__name__}: {error}") from error


def _timm_preprocessing(model: Any) -> tuple[ImageRecipe | None, Any]:
    """Return the recipe of timm's transform for inference, None if the kernels lack it, and the transform."""
    data = importlib.import_module("timm.data")
    options = data.resolve_model_data_config(model)
    crop = tuple(options["input_size"][1:])
    scaled = tuple(math.floor(side / (options["crop_pct"] or 0.875)) for side in crop)
    mode = options.get("crop_mode") or "center"
    recipe = None
    if options["interpolation"] in ("bicubic", "bilinear") and (
        (mode == "center" and scaled[0] == scaled[1]) or mode == "squash"
    ):
        recipe = ImageRecipe(
            size=scaled[0] if mode == "center" else scaled,
            interpolation=cast(Interpolation, options["interpolation"]),
            crop=crop,
            rounds_crop=True,
            scale=LEVEL,
            mean=tuple(options["mean"]),
            std=tuple(options["std"]),
        )
    return recipe, data.create_transform(**options, is_training=False)


class SentencePackageEncoder(Encoder):
    """A sentence-transformers model with modules that only the package itself implements. It has no vectors of tokens.

    Its "token ids" are a text's characters, since the package takes texts; the last one ends the text.
    """

    def __init__(self, spec: EncoderSpec, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(spec, device, dtype)
        self.model = model
        self._lock = Lock()

    @classmethod
    def describe(cls, directory: Path, config: Mapping[str, Any]) -> EncoderSpec:
        """Load the model to find the width of its vectors."""
        spec = EncoderSpec(family="", directory=str(directory), dims={})
        encoder = cls.load(spec, torch.device("cpu"), torch.float32)
        try:
            width = encoder.encode_text(encoder.tokenize(["a"])).pooled.shape[1]
        except Exception as error:  # errors of many types
            raise ModelError(f"{directory}: sentence-transformers fails: {type(error).__name__}: {error}") from error
        return EncoderSpec(
            family="sentence-transformers",
            directory=str(directory),
            dims={"text": width},
            notes=("it runs by the package sentence-transformers, slower than a family",),
        )

    @classmethod
    def load(cls, spec: EncoderSpec, device: torch.device, dtype: torch.dtype) -> Encoder:
        """Load the model by the package, after checking that its files name no code and no pickles."""
        directory = Path(spec.directory)
        package = import_package("sentence_transformers", "sentence-transformers")
        _check_modules(directory)
        try:
            model = package.SentenceTransformer(
                str(directory),
                device=str(device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except Exception as error:  # errors of many types
            raise ModelError(
                f"{directory}: sentence-transformers cannot load it: {type(error).__name__}: {error}"
            ) from error
        return cls(spec, model.to(dtype).eval(), device, dtype)

    def prepare(self, modality: Modality, values: Sequence[Any]) -> Any:
        """Return the texts that stand behind the characters."""
        return [_text(ids) for ids in values]

    def with_prompt(self, text: str) -> str:
        """Return the text: the package puts the prompt before it."""
        return text

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the characters of each text and an end."""
        return [[*map(ord, text), 0] for text in texts]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text; of words, if the tokenizer is not transformers'."""
        tokenizer = getattr(self.model, "tokenizer", None)
        with self._lock:
            if not callable(tokenizer):
                return [len(text.split()) for text in texts]
            return [len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]

    @torch.inference_mode()
    def encode_text(self, token_ids: Sequence[Any], tokens: bool = False) -> Encoded:
        """Encode texts, or their characters."""
        texts = [ids if isinstance(ids, str) else _text(ids) for ids in token_ids]
        with self._lock:
            vectors = self.model.encode(
                texts,
                prompt=self.spec.text_prompt,
                batch_size=len(texts),
                show_progress_bar=False,
                convert_to_tensor=True,
            )
        return Encoded(pooled=vectors)


def _text(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids[:-1]))


def _check_modules(directory: Path) -> None:
    """Raise ModelError if a file of the model names code from elsewhere, or a module has only pickled weights."""
    for name, path in model_files(directory).items():
        if path.suffix == ".json" and path.stat().st_size < 1 << 20:
            try:
                value = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                continue  # the package reports it
            _check_names(directory, name, value)
    for pickled in sorted(directory.rglob("*.bin")):
        if not pickled.with_name("model.safetensors").is_file():
            raise ModelError(f"{pickled}: pickled weights are never loaded; save the model again as safetensors")


def _check_names(directory: Path, name: str, value: Any) -> None:
    """Raise ModelError for a dotted name of code outside sentence-transformers and torch.nn."""
    if isinstance(value, list):
        for part in value:
            _check_names(directory, name, part)
    for key, part in value.items() if isinstance(value, dict) else ():
        names = part.values() if key == "types" and isinstance(part, dict) else [part]
        if key in ("type", "types", "activation_function", "tokenizer_class", "module_class"):
            for of_code in names:
                known = ("sentence_transformers.", "torch.nn.")
                if isinstance(of_code, str) and "." in of_code and not of_code.startswith(known):
                    raise ModelError(f"{directory}/{name}: {key} is {of_code!r}, code that is never run")
        _check_names(directory, name, part)
