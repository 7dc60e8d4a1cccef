"""Classifiers of images, audio and texts: a score per class, of a single-label or a multi-label model.

Scores are a softmax over the classes, or a sigmoid of each if `problem_type` in config.json is
multi_label_classification or the model has one class; those of a regression are the model's numbers. Images, and audio
of the families that have kernels, are preprocessed on the device; others by the checkpoint's own processor.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoFeatureExtractor

from mmbeam.config import Labelling
from mmbeam.errors import ModelError
from mmbeam.models.encoders.audio import AST_WINDOWS_PER_BATCH, SpeechEncoder
from mmbeam.models.encoders.base import EncoderSpec
from mmbeam.models.labellers.base import (
    LabellerSpec,
    ScoreLabeller,
    class_names,
    defaults,
    load_model,
)
from mmbeam.models.labellers.processed import ProcessedImages
from mmbeam.models.recipes import (
    SPEECH_UNSUPPORTED,
    RecipeError,
    check_image_size,
    read_ast_recipe,
    read_image_recipe,
    read_wave_recipe,
)
from mmbeam.models.tokenizing import TextTokenizer, check_vocabulary, pad, text_limit, vocabulary_size
from mmbeam.names import Modality
from mmbeam.ops.audio import to_rate, upload_waves
from mmbeam.ops.image import ImageRecipe, Patching, preprocess, upload_images
from mmbeam.ops.log_mel import AST_RATE, AstRecipe, ast_log_mel, ast_windows
from mmbeam.ops.transfer import to_device, to_host, upload_ids
from mmbeam.types import Sample

logger = logging.getLogger(__name__)

TOP_K = 5
PIECE_SECONDS = 30  # the longest piece of audio: attention costs the square of the length
FIXED_SIDE = ("vit", "deit", "beit", "data2vec-vision")  # types whose positions are those of one size of image
PADDED = (  # types of texts that a mask makes independent of padding; texts of other types run in batches of one length
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet"),
    *("roberta", "xlm-roberta", "xlm-roberta-xl"),
)
SPEECH = ("wav2vec2", "hubert", "wavlm")


class Classifier(ScoreLabeller):
    """A model with a classification head."""

    def __init__(self, spec: LabellerSpec, model: Any) -> None:
        super().__init__(spec, model.device, model.dtype)
        self.model = model

    def scores(self, logits_BC: torch.Tensor) -> torch.Tensor:
        """Return the scores of logits, float32."""
        problem = self.model.config.problem_type
        logits_BC = logits_BC.float()
        if problem == "regression":
            return logits_BC
        # transformers' classification of audio has a softmax even of one class, which is always 1.
        is_multi = problem == "multi_label_classification" or logits_BC.shape[1] == 1
        return logits_BC.sigmoid() if is_multi else logits_BC.softmax(-1)


class ImageClassifier(Classifier):
    """ViT, DeiT, BEiT, Swin, ResNet, ConvNeXt and every other class of AutoModelForImageClassification."""

    def __init__(self, spec: LabellerSpec, model: Any) -> None:
        super().__init__(spec, model)
        directory = Path(spec.directory)
        recipe = _fast_recipe(directory)
        self.recipe = recipe if isinstance(recipe, ImageRecipe) else None
        self.processed = None if self.recipe is not None else ProcessedImages(directory, model)

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read the configuration and the image processor's file."""
        recipe = _fast_recipe(directory)
        notes: tuple[str, ...] = ()
        if not isinstance(recipe, ImageRecipe):
            notes = (f"{recipe}; images are preprocessed by the checkpoint's own processor",)
        elif config.model_type in FIXED_SIDE:
            check_image_size(directory, config.image_size, recipe)
        return LabellerSpec(
            family=config.model_type,
            directory=str(directory),
            labelling=defaults(labelling, top_k=TOP_K),
            modalities=("image",),
            classes=class_names(directory, config, labelling),
            image_side=recipe.shorter_side if isinstance(recipe, ImageRecipe) else None,
            notes=notes,
        )

    @classmethod
    def load(cls, spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> "ImageClassifier":
        """Load the weights."""
        return cls(spec, load_model(spec, device, dtype))

    def prepare(self, modality: Modality, items: Sequence[Any]) -> Any:
        """Return the images on the device, or the processor's outputs for them."""
        if self.processed is not None:
            return self.processed.prepare(items, self.pixel_filter)
        return items if self.device.type == "cpu" else upload_images(items, self.device, self.recipe)

    @torch.inference_mode()
    def compute(self, modality: Modality, inputs: Any) -> torch.Tensor:
        """Return the scores of images, [B, C]."""
        if self.recipe is not None:
            pixels_BCHW = preprocess(inputs, self.recipe, self.device, self.dtype, self.pixel_filter)
            return to_host(self.scores(self.model(pixels_BCHW).logits))
        assert self.processed is not None
        rows: dict[int, torch.Tensor] = {}
        for positions, outputs in self.processed.compute(inputs, ("logits",)):
            rows.update(zip(positions, outputs["logits"], strict=True))
        return to_host(self.scores(torch.stack([rows[position] for position in range(len(inputs))])))


def _fast_recipe(directory: Path) -> ImageRecipe | RecipeError:
    """Return the recipe of a checkpoint's image processor, or why only the processor itself can follow it."""
    try:
        recipe = read_image_recipe(directory)
    except RecipeError as error:
        return error
    if isinstance(recipe.size, Patching):
        return RecipeError(f"{directory}: its image processor makes patches")
    return recipe


class AudioClassifier(Classifier):
    """AST, wav2vec 2.0, HuBERT, WavLM and every other class of AutoModelForAudioClassification.

    The scores of a clip longer than a window of AST (10 s), or than 30 s, are the means of those of its evenly spread
    windows, or of its pieces. wav2vec 2.0, HuBERT and WavLM pool all frames of a clip.
    """

    def __init__(self, spec: LabellerSpec, model: Any) -> None:
        super().__init__(spec, model)
        directory = Path(spec.directory)
        config = model.config
        self.ast: AstRecipe | None = None
        self.speech: SpeechEncoder | None = None
        self.extractor: Any = None
        if spec.family == "audio-spectrogram-transformer":
            self.ast = read_ast_recipe(directory)
        elif _is_plain_speech(config):
            width = config.hidden_size
            speech = EncoderSpec(family=spec.family, directory=spec.directory, dims={"audio": width})
            self.speech = SpeechEncoder(speech, model.base_model, read_wave_recipe(directory))
        else:
            self.extractor = _read_extractor(directory)

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read the configuration and the feature extractor's file."""
        if config.model_type == "audio-spectrogram-transformer":
            recipe, rate = read_ast_recipe(directory), AST_RATE
            if (config.num_mel_bins, config.max_length) != (recipe.n_mels, recipe.n_frames):
                raise ModelError(
                    f"{directory}: config.json expects {config.num_mel_bins} mel bins and {config.max_length} frames, "
                    f"the feature extractor makes {recipe.n_mels} and {recipe.n_frames}; use the files of one model"
                )
        elif _is_plain_speech(config):
            rate = read_wave_recipe(directory).sampling_rate
        else:
            rate = int(_read_extractor(directory).sampling_rate)
        return LabellerSpec(
            family=config.model_type,
            directory=str(directory),
            labelling=defaults(labelling, top_k=TOP_K),
            modalities=("audio",),
            classes=class_names(directory, config, labelling),
            sampling_rate=rate,
        )

    @classmethod
    def load(cls, spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> "AudioClassifier":
        """Load the weights; features are computed in float32."""
        return cls(spec, load_model(spec, device, dtype))

    def prepare(self, modality: Modality, items: Sequence[Any]) -> Any:
        """Return the clips and their rates; or for each the inputs that the feature extractor makes of its pieces."""
        waves, rates = [wave for wave, _ in items], [rate for _, rate in items]
        if self.extractor is None:
            return (waves if self.device.type == "cpu" else upload_waves(waves, rates, self.device)), rates
        rate = int(self.extractor.sampling_rate)
        clips = []
        for clip in to_rate(waves, rates, rate, torch.device("cpu")):
            pieces = torch.tensor_split(clip, -(-len(clip) // (PIECE_SECONDS * rate)))
            inputs = [self.extractor(piece.numpy(), sampling_rate=rate, return_tensors="pt") for piece in pieces]
            clips.append([{name: self._to_device(value) for name, value in values.items()} for values in inputs])
        return clips

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return to_device(tensor.to(self.dtype) if tensor.is_floating_point() else tensor, self.device)

    @torch.inference_mode()
    def compute(self, modality: Modality, inputs: Any) -> torch.Tensor:
        """Return the scores of clips, [B, C]."""
        if self.speech is not None:
            waves, rates = inputs
            encoded = self.speech.encode_audio(waves, rates, tokens=True)
            logits = [
                self.model.classifier(self.model.projector(frames_TD.to(self.dtype)).mean(0))
                for frames_TD in encoded.tokens or ()
            ]
            return to_host(self.scores(torch.stack(logits)))
        if self.ast is not None:
            waves, rates = inputs
            windows = [ast_windows(clip, self.ast) for clip in to_rate(waves, rates, AST_RATE, self.device)]
            flat = [window for of_clip in windows for window in of_clip]
            step = max(len(windows), AST_WINDOWS_PER_BATCH)
            parts = [
                self.scores(self.model(ast_log_mel(flat[first : first + step], self.ast).to(self.dtype)).logits)
                for first in range(0, len(flat), step)
            ]
            scores = torch.split(torch.cat(parts), list(map(len, windows)))
        else:
            scores = tuple(
                torch.cat([self.scores(self.model(**piece).logits) for piece in pieces]) for pieces in inputs
            )
        return to_host(torch.stack([of_clip.mean(0) for of_clip in scores]))


def _is_plain_speech(config: Any) -> bool:
    """Return whether SpeechEncoder computes the frames that the head takes."""
    unsupported = ("use_weighted_layer_sum", *SPEECH_UNSUPPORTED)
    return config.model_type in SPEECH and not any(getattr(config, name, False) for name in unsupported)


def _read_extractor(directory: Path) -> Any:
    try:
        return AutoFeatureExtractor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types
        raise ModelError(
            f"{directory}: its feature extractor cannot be read: {type(error).__name__}: {error}"
        ) from error


class TextClassifier(Classifier):
    """BERT, RoBERTa, DistilBERT, DeBERTa and every other class of AutoModelForSequenceClassification.

    Texts are truncated to the model's limit. Without padding a text has the scores that transformers gives it alone;
    types whose mask makes padding harmless are padded to the longest text of a batch.
    """

    def __init__(self, spec: LabellerSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.tokenizer = TextTokenizer(Path(spec.directory))
        self.vocabulary = vocabulary_size(model)

    @classmethod
    def describe(cls, directory: Path, config: Any, labelling: Labelling) -> LabellerSpec:
        """Read the configuration and the tokenizer's files."""
        check_vocabulary(directory)
        return LabellerSpec(
            family=config.model_type,
            directory=str(directory),
            labelling=defaults(labelling, top_k=TOP_K),
            modalities=("text",),
            classes=class_names(directory, config, labelling),
            max_text_tokens=text_limit(directory, config.get_text_config()),
        )

    @classmethod
    def load(cls, spec: LabellerSpec, device: torch.device, dtype: torch.dtype) -> "TextClassifier":
        """Load tokenizer and weights."""
        return cls(spec, load_model(spec, device, dtype))

    def items(self, modality: Modality, samples: Sequence[Sample]) -> list[Any]:
        """Return the token ids of each text."""
        assert self.spec.max_text_tokens is not None
        return cast(
            list[Any],
            self.tokenizer.encode([sample.model_text or "" for sample in samples], self.spec.max_text_tokens),
        )

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, not truncated, without special tokens."""
        return self.tokenizer.count(texts)

    def prepare(self, modality: Modality, items: Sequence[Any]) -> Any:
        """Return the token ids, on a GPU also as one copy in its memory."""
        return items if self.device.type == "cpu" else upload_ids(items, self.device)

    @torch.inference_mode()
    def compute(self, modality: Modality, inputs: Any) -> torch.Tensor:
        """Return the scores of texts, [B, C]."""
        logits: dict[int, torch.Tensor] = {}
        for positions in alike(inputs, self.model.config):
            ids = inputs if len(positions) == len(inputs) else [inputs[position] for position in positions]
            ids_BL, mask_BL = pad(ids, self.tokenizer.pad_id, self.device, vocabulary=self.vocabulary)
            output = self.model(input_ids=ids_BL, attention_mask=mask_BL)
            logits.update(zip(positions, output.logits, strict=True))
        return to_host(self.scores(torch.stack([logits[position] for position in range(len(inputs))])))


def alike(ids: Sequence[Sequence[int]], config: Any) -> list[list[int]]:
    """Return the positions of texts that run together: all, those of one length, or one each.

    A decoder takes the last token that is not padding, which needs a padding token.
    """
    if config.model_type in PADDED:
        return [list(range(len(ids)))]
    if config.get_text_config().pad_token_id is None:
        return [[position] for position in range(len(ids))]
    lengths = np.array(list(map(len, ids)))
    return [np.flatnonzero(lengths == length).tolist() for length in np.unique(lengths)]
