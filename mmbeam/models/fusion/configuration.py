"""What a fusion model is made of. Every field has a default that works for a small corpus."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import combinations
from typing import Any, ClassVar, Literal, get_args

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig

from mmbeam.errors import ModelError
from mmbeam.types import MODALITIES, Modality, Origin

Kind = Literal["conv", "mlp", "lstm", "transformer", "pretrained", "features"]
Fusion = Literal["attention", "concat", "gated", "bilinear"]
GeneratorKind = Literal["transformer", "lstm"]
Similarity = Literal["cosine", "dot", "bilinear"]
LOSSES = ("caption", "align", "reconstruct", "modality_adversary", "generator_adversary")
# No source can be called so: they are other inputs of the model, or embeddings that no source has.
RESERVED = (
    *("labels", "groups", "views", "inputs", "generation_config", "encoder_outputs", "decoder_input_ids"),
    *("past_key_values", "use_cache", "return_dict", "fused", "caption"),
)
PAD, BOS, EOS = 0, 1, 2  # the first tokens of every vocabulary of this model
IGNORED = -100  # padding of labels, which torch's cross-entropy ignores
MASK = "_mask"  # suffix of the input that tells which of a source's values are real

IMAGE_SHAPE = (3, 64, 64)  # channels, height, width
AUDIO_SHAPE = (1, 64, 64)  # channel, frames, mel bins
CHANNELS: Mapping[Modality, tuple[int, ...]] = {"image": (32, 64, 128), "audio": (16, 32, 64, 128)}
PATCHES: Mapping[Modality, tuple[int, int]] = {"image": (8, 8), "audio": (4, 64)}  # audio: all bins of four frames


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One encoder and what it reads. A model may have several of one modality.

    conv: residual convolutions over the picture or spectrogram, or along the text. mlp, lstm, transformer:
    over patches of the grid or tokens of the text, with positions learned. pretrained: any encoder of
    transformers. features: none, but vectors that were computed before.
    """

    modality: Modality
    kind: Kind = "conv"
    shape: tuple[int, ...] = ()  # of a grid: channels, height, width (sound: 1, frames, mel bins)
    channels: tuple[int, ...] = ()  # conv on a grid: of each stage, which halves the sides
    patch: tuple[int, ...] = ()  # mlp, lstm, transformer on a grid: height, width
    layers: int = 2  # of mlp, lstm, transformer, and conv on a text
    max_tokens: int = 64  # of a text, or of token features; samples of a waveform
    width: int = 0  # of one vector of features, or of a pretrained encoder's last hidden states
    tokens: bool = False  # features: [tokens, width] per sample, and not [width]
    model: Mapping[str, Any] | None = None  # pretrained: its configuration, with model_type
    frozen: bool = False  # pretrained: it stays as it is
    origin: Origin | None = None  # the model whose encoder it is, or that made its features, if that is known

    @classmethod
    def parse(cls, name: str, data: Mapping[str, Any]) -> "SourceConfig":
        """Check one source of a configuration. Raises ModelError naming source and field."""
        known = {each.name: each for each in fields(cls)}
        unknown = sorted(set(data) - set(known))
        missing = [each.name for each in known.values() if each.default is MISSING and each.name not in data]
        if unknown or missing:
            raise ModelError(f"source {name}: unknown {unknown}, missing {missing}; it has {', '.join(known)}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        _check_name(name)
        source = cls(**values | {"origin": _origin(name, data.get("origin"))})
        source._check(name)
        return source

    def _check(self, name: str) -> None:
        if self.modality not in MODALITIES or self.kind not in get_args(Kind):
            raise ModelError(
                f"source {name}: modality {self.modality!r}, kind {self.kind!r}; expected one of "
                f"{', '.join(MODALITIES)} and one of {', '.join(get_args(Kind))}"
            )
        needs = {"features": ("width",), "pretrained": ("model",), "conv": ("shape", "channels")}
        needed = needs.get(self.kind, ("shape", "patch"))
        if self.modality == "text":  # of its own encoders none is a grid's
            needed = tuple(field for field in needed if field in ("width", "model"))
        for field in needed:
            if not getattr(self, field):
                raise ModelError(f"source {name}: a source of kind {self.kind} needs {field}")
        if "shape" in needed and len(self.shape) != 3:
            raise ModelError(f"source {name}: shape {self.shape}; expected channels, height and width")
        if "patch" in needed and (
            len(self.patch) != 2 or any(s % p for s, p in zip(self.shape[1:], self.patch, strict=True))
        ):
            raise ModelError(f"source {name}: patches of {self.patch} do not divide {self.shape[1:]}")


def media_source(modality: Modality, kind: Kind | None = None) -> dict[str, Any]:
    """A source of this model's own encoders: convolutions for pictures and sounds, a Transformer for texts."""
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
    """A source that is fed the vectors of some encoder, one or several a sample."""
    known = {} if origin is None else {"origin": origin._asdict()}
    return {"modality": modality, "kind": "features", "width": width, "tokens": tokens, **known}


@strict
class FusionConfig(PreTrainedConfig):
    """Configuration of a FusionModel.

    sources: the encoders by name; for features the name is the Parquet column. fusion: how the sources'
    tokens become one sequence. fused_tokens: its length, where fusion is not attention. generator_kind: what
    writes the text. embedding_dim: width of the shared space. pairs: which sources are aligned, "fused"
    and (with a text encoder of its own) "caption" included; None aligns all. similarities: by which
    products; the first is the one that embeddings are meant to be compared by. loss_weights: of the parts
    of the training loss, those of LOSSES left out being 0.
    """

    model_type = "mmbeam-fusion"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "generator_layers"}  # of which caches are made

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
        self.sources = self.sources or {modality: media_source(modality) for modality in MODALITIES}
        self.loss_weights = {"caption": 1.0, "align": 0.1, "reconstruct": 0.1} | (self.loss_weights or {})
        self.similarities = list(self.similarities)
        super().__post_init__(**kwargs)
        for name, allowed in (("fusion", Fusion), ("generator_kind", GeneratorKind)):
            if getattr(self, name) not in get_args(allowed):
                raise ModelError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(get_args(allowed))}")
        heads = self.num_attention_heads
        if self.hidden_size < 1 or self.hidden_size % 2 or self.hidden_size % heads:
            raise ModelError(
                f"hidden_size {self.hidden_size}: expected an even number that {heads} attention heads divide"
            )
        _check_names("loss_weights", self.loss_weights, LOSSES)
        _check_names("similarities", self.similarities, get_args(Similarity))
        self.parsed_sources()

    def parsed_sources(self) -> dict[str, SourceConfig]:
        """The sources, checked, by modality and name: a file of JSON keeps no order. Raises ModelError."""
        parsed = {name: SourceConfig.parse(name, data) for name, data in (self.sources or {}).items()}
        return dict(sorted(parsed.items(), key=lambda each: (MODALITIES.index(each[1].modality), each[0])))

    def aligned_pairs(self) -> list[tuple[str, str]]:
        """The pairs to align; a pair of one name with itself compares two views of it."""
        names = [*self.parsed_sources(), "fused"]
        if text_tower(self.parsed_sources()) is not None:
            names.append("caption")
        if self.pairs is None:  # what is fused holds its sources: to be like them says nothing
            pairs = combinations(names, 2)
            return [pair for pair in pairs if "fused" not in pair or pair == ("fused", "caption")]
        for pair in self.pairs:
            _check_names("pairs", pair, names)
        return [(a, b) for a, b in self.pairs]

    @classmethod
    def for_media(
        cls,
        modalities: Sequence[Modality] = MODALITIES,
        kinds: Mapping[Modality, Kind] | None = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> "FusionConfig":
        """A model with `sources`, and of each modality that none of them is of, its own encoder.

        `kinds` are the kinds of its own; `options` are the other fields.
        """
        given = {name: dict(source) for name, source in (sources or {}).items()}
        left = [modality for modality in modalities if modality not in {of["modality"] for of in given.values()}]
        own = {modality: media_source(modality, (kinds or {}).get(modality)) for modality in left}
        return cls(sources={**own, **given}, **options)

    @classmethod
    def for_features(cls, columns: Mapping[str, tuple[Modality, int, bool]], **options: Any) -> "FusionConfig":
        """A model fed with columns of features: modality, width, and whether there are tokens."""
        return cls(sources={name: feature_source(*of) for name, of in columns.items()}, **options)


def text_tower(sources: Mapping[str, SourceConfig]) -> str | None:
    """The source that reads texts as tokens of this model's vocabulary, and so can read captions; None if none does."""
    own = (name for name, source in sources.items() if source.modality == "text")
    return next((name for name in own if sources[name].kind not in ("pretrained", "features")), None)


def _origin(source: str, data: Mapping[str, str] | None) -> Origin | None:
    if data is None:
        return None
    if (
        not isinstance(data, dict)
        or set(data) != set(Origin._fields)
        or not all(isinstance(each, str) for each in data.values())
    ):
        raise ModelError(f"source {source}: origin {data!r}; expected {', '.join(Origin._fields)}")
    return Origin(**data)


def _check_name(source: str) -> None:
    if not source or "." in source or "|" in source or source.endswith("_mask") or hasattr(nn.ModuleDict(), source):
        raise ModelError(f"source {source!r}: no name for a part of a model; rename the column")
    if source in RESERVED:
        raise ModelError(f"source {source!r}: the model has another input of this name; rename the column")


def _check_names(what: str, names: Sequence[str] | Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ModelError(f"{what}: {', '.join(map(str, unknown))}: expected of {', '.join(known)}")
