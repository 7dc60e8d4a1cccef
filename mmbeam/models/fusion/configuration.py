"""Configuration of the fusion model. Every field has a default that works for a small corpus."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import combinations
from typing import Any, ClassVar, Literal, get_args

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig

from mmbeam.errors import ModelError
from mmbeam.names import FUSION_MODALITIES, FUSIONS, GENERATOR_KINDS, LOSSES, SIMILARITIES, BuiltinEncoder, Modality
from mmbeam.types import Origin

EncoderKind = Literal[BuiltinEncoder, "pretrained", "features"]
# Names that no source may have: the other inputs of the model, and its embeddings that come from no single source.
RESERVED = (
    *("labels", "groups", "views", "inputs", "generation_config", "encoder_outputs", "decoder_input_ids"),
    *("past_key_values", "use_cache", "return_dict", "fused", "caption"),
)
PAD, BOS, EOS = 0, 1, 2  # token ids in every vocabulary of this model
IGNORED = -100  # label padding, which torch's cross-entropy ignores
MASK = "_mask"  # suffix of the input that marks which of a source's values are real

IMAGE_SHAPE = (3, 64, 64)  # channels, height, width
AUDIO_SHAPE = (1, 64, 64)  # channels, frames, mel bins
CHANNELS: Mapping[Modality, tuple[int, ...]] = {"image": (32, 64, 128), "audio": (16, 32, 64, 128)}
PATCHES: Mapping[Modality, tuple[int, int]] = {"image": (8, 8), "audio": (4, 64)}  # audio: four frames, all mel bins


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One encoder and its input. A model may have several sources of one modality.

    kind: "conv" applies residual convolutions to an image or spectrogram, or along a text; "mlp", "lstm" and
    "transformer" read patches of a grid or tokens of a text, with learned positions; "pretrained" is an encoder
    of transformers; "features" are precomputed vectors.
    """

    modality: Modality
    kind: EncoderKind = "conv"
    shape: tuple[int, ...] = ()  # of a grid: channels, height, width (audio: 1, frames, mel bins)
    channels: tuple[int, ...] = ()  # conv on a grid: of each stage; a stage halves height and width
    patch: tuple[int, ...] = ()  # mlp, lstm, transformer on a grid: height, width
    layers: int = 2  # of mlp, lstm, transformer, and conv on a text
    max_tokens: int = 64  # of a text or of token features; samples of a waveform
    width: int = 0  # of a feature vector, or of a pretrained encoder's last hidden states
    tokens: bool = False  # features: [tokens, width] per sample instead of [width]
    model: Mapping[str, Any] | None = None  # pretrained: its configuration, with model_type
    frozen: bool = False  # pretrained: its weights are not trained
    origin: Origin | None = None  # the model that the encoder or the features come from, if known

    @classmethod
    def parse(cls, name: str, data: Mapping[str, Any]) -> "SourceConfig":
        """Return one source of a configuration, checked. Raises ModelError naming the source and the field."""
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(data) - set(known))
        missing = [field.name for field in known.values() if field.default is MISSING and field.name not in data]
        if unknown or missing:
            raise ModelError(f"source {name}: unknown {unknown}, missing {missing}; the fields are {', '.join(known)}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        if not name or "." in name or "|" in name or name.endswith(MASK) or hasattr(nn.ModuleDict(), name):
            raise ModelError(f"source {name!r}: not a valid name for a module; rename the column")
        if name in RESERVED:
            raise ModelError(f"source {name!r}: the model has another input of this name; rename the column")
        source = cls(**values | {"origin": _origin(name, data.get("origin"))})
        source._check(name)
        return source

    def _check(self, name: str) -> None:
        if self.modality not in FUSION_MODALITIES or self.kind not in get_args(EncoderKind):
            raise ModelError(
                f"source {name}: modality {self.modality!r}, kind {self.kind!r}; expected one of "
                f"{', '.join(FUSION_MODALITIES)} and one of {', '.join(get_args(EncoderKind))}"
            )
        needs = {"features": ("width",), "pretrained": ("model",), "conv": ("shape", "channels")}
        needed = needs.get(self.kind, ("shape", "patch"))
        if self.modality == "text":  # texts have no grid
            needed = tuple(field for field in needed if field in ("width", "model"))
        for field in needed:
            if not getattr(self, field):
                raise ModelError(f"source {name}: kind {self.kind} requires {field}")
        if "shape" in needed and len(self.shape) != 3:
            raise ModelError(f"source {name}: shape {self.shape}; expected channels, height and width")
        if "patch" in needed and (
            len(self.patch) != 2 or any(s % p for s, p in zip(self.shape[1:], self.patch, strict=True))
        ):
            raise ModelError(f"source {name}: patch size {self.patch} does not divide {self.shape[1:]}")


def media_source(modality: Modality, kind: EncoderKind | None = None) -> dict[str, Any]:
    """Return a source with an encoder of this model: by default convolutions, and a Transformer for texts."""
    if modality == "text":
        return {"modality": "text", "kind": kind or "transformer"}
    return {
        "modality": modality,
        "kind": kind or "conv",
        "shape": list(IMAGE_SHAPE if modality == "image" else AUDIO_SHAPE),
        "channels": list(CHANNELS[modality]),
        "patch": list(PATCHES[modality]),
    }


def feature_source(
    modality: Modality, width: int, tokens: bool = False, origin: Origin | None = None
) -> dict[str, Any]:
    """Return a source of precomputed vectors, one per sample, or several with `tokens`."""
    source: dict[str, Any] = {"modality": modality, "kind": "features", "width": width, "tokens": tokens}
    return source if origin is None else {**source, "origin": origin._asdict()}


@strict
class FusionConfig(PreTrainedConfig):
    """Configuration of a FusionModel.

    sources: the encoders by name; for features the name is the Parquet column. fusion: how the tokens of all
    sources become one sequence. fused_tokens: its length, unless fusion is attention. generator_kind: the text
    decoder. embedding_dim: width of the shared space. pairs: the sources to align, where "fused" and (if the
    model has a text encoder of its own) "caption" also count; None aligns all. similarities: the similarity
    functions to train; the first is meant for comparing embeddings. loss_weights: of the LOSSES; a missing
    loss has weight 0.
    """

    model_type = "mmbeam-fusion"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "generator_layers"}  # generate() sizes caches by it

    sources: dict[str, Any] | None = None
    vocab_size: int = 512
    hidden_size: int = 128
    num_attention_heads: int = 4
    ffn_size: int = 512
    dropout: float = 0.1
    fusion: str = "attention"
    fusion_layers: int = 2
    fused_tokens: int = 8
    generator_kind: str = "transformer"
    generator_layers: int = 2
    max_target_positions: int = 128
    embedding_dim: int = 64
    pairs: list[Any] | None = None
    similarities: list[Any] | tuple[Any, ...] = ("cosine",)
    loss_weights: dict[str, Any] | None = None
    label_smoothing: float = 0.0
    pad_token_id: int | None = PAD
    bos_token_id: int | None = BOS
    eos_token_id: int | list[int] | None = EOS
    decoder_start_token_id: int | None = BOS
    is_encoder_decoder: bool | None = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.sources = self.sources or {modality: media_source(modality) for modality in FUSION_MODALITIES}
        self.loss_weights = {"caption": 1.0, "align": 0.1, "reconstruct": 0.1} | (self.loss_weights or {})
        self.similarities = list(self.similarities)
        super().__post_init__(**kwargs)
        for name, allowed in (("fusion", FUSIONS), ("generator_kind", GENERATOR_KINDS)):
            if getattr(self, name) not in allowed:
                raise ModelError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        heads = self.num_attention_heads
        if self.hidden_size < 1 or self.hidden_size % 2 or self.hidden_size % heads:
            raise ModelError(
                f"hidden_size {self.hidden_size}: expected an even number that {heads} attention heads divide"
            )
        _check_names("loss_weights", self.loss_weights, LOSSES)
        _check_names("similarities", self.similarities, SIMILARITIES)
        self.parsed_sources()

    def parsed_sources(self) -> dict[str, SourceConfig]:
        """Return the checked sources, ordered by modality and name, since config.json is sorted. Raises ModelError."""
        parsed = {name: SourceConfig.parse(name, data) for name, data in (self.sources or {}).items()}
        return dict(sorted(parsed.items(), key=lambda item: (FUSION_MODALITIES.index(item[1].modality), item[0])))

    def aligned_pairs(self) -> list[tuple[str, str]]:
        """Return the pairs to align. A pair of a name with itself aligns two views of one source."""
        names = [*self.parsed_sources(), "fused"]
        if text_tower(self.parsed_sources()) is not None:
            names.append("caption")
        if self.pairs is None:  # "fused" contains the other sources: aligning it with them is trivial
            pairs = combinations(names, 2)
            return [pair for pair in pairs if "fused" not in pair or pair == ("fused", "caption")]
        for pair in self.pairs:
            _check_names("pairs", pair, names)
        return [(a, b) for a, b in self.pairs]

    @classmethod
    def for_media(
        cls,
        modalities: Sequence[Modality] = FUSION_MODALITIES,
        kinds: Mapping[Modality, EncoderKind] | None = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> "FusionConfig":
        """Return a model with `sources`, and an encoder of its own for each of `modalities` that has no source.

        `kinds` are the kinds of these encoders; `options` are the other fields.
        """
        all_sources = {name: dict(source) for name, source in (sources or {}).items()}
        covered = {source["modality"] for source in all_sources.values()}
        media = {m: media_source(m, (kinds or {}).get(m)) for m in modalities if m not in covered}
        return cls(sources={**media, **all_sources}, **options)


def text_tower(sources: Mapping[str, SourceConfig]) -> str | None:
    """Return the text source with this model's vocabulary, which can encode captions too; None if there is none."""
    texts = (name for name, source in sources.items() if source.modality == "text")
    return next((name for name in texts if sources[name].kind not in ("pretrained", "features")), None)


def _origin(source: str, data: Mapping[str, str] | None) -> Origin | None:
    if data is None:
        return None
    is_mapping = isinstance(data, dict) and set(data) == set(Origin._fields)
    if not is_mapping or not all(isinstance(value, str) for value in data.values()):
        raise ModelError(f"source {source}: origin {data!r}; expected {', '.join(Origin._fields)}")
    return Origin(**data)


def _check_names(what: str, names: Sequence[str] | Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ModelError(f"{what}: unknown {', '.join(map(str, unknown))}; expected some of {', '.join(known)}")
