"""The vocabulary: names that the command line, the library and the files on disk share. It imports nothing of mmbeam.

Each closed set of names is a Literal, listed here once, so that `--help` and the checks of arguments agree.
"""

from collections.abc import Mapping
from typing import Literal, get_args

VERSION = "0.1.0"  # of mmbeam

Modality = Literal["image", "audio", "text", "video"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
FUSION_MODALITIES: tuple[Modality, ...] = ("image", "audio", "text")  # of the fusion model and its corpus
Kind = Literal["image", "audio", "text", "video", "metadata"]  # what a member of a sample holds
KINDS: tuple[Kind, ...] = get_args(Kind)
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Task = Literal["caption", "transcribe", "translate", "summarize", "dialogue"]  # what a generator is asked for
TASKS: tuple[Task, ...] = get_args(Task)
COLUMN_OF_TASK: Mapping[Task, str] = {  # the column of the generated text
    "caption": "caption",
    "transcribe": "transcript",
    "translate": "translation",
    "summarize": "summary",
    "dialogue": "reply",
}

LabelTask = Literal["classify", "zero-shot", "detect", "segment", "tag", "sentiment"]  # what a labeller is asked for
LABEL_TASKS: tuple[LabelTask, ...] = get_args(LabelTask)
COLUMN_OF_LABELS: Mapping[LabelTask, str] = {  # the column of the labels
    "classify": "labels",
    "zero-shot": "labels",
    "detect": "objects",
    "segment": "segments",
    "tag": "tags",
    "sentiment": "labels",
}
SegmentKind = Literal["semantic", "instance", "panoptic"]  # what a segment is: a class, an object, or either
SEGMENT_KINDS: tuple[SegmentKind, ...] = get_args(SegmentKind)

SynthesisModality = Literal["image", "audio"]  # what a synthesizer makes of a text
SYNTHESIS_MODALITIES: tuple[SynthesisModality, ...] = get_args(SynthesisModality)
FORMATS_OF_SYNTHESIS: Mapping[SynthesisModality, tuple[str, ...]] = {  # the first is the default
    "image": ("png", "jpg", "webp"),
    "audio": ("wav", "flac"),
}
MEDIA_COLUMN = "media"  # the name of a generated file in its shard
MEDIA_SHARD = "media_shard"  # the name of that shard under _media/
MEDIA_CONTENT = "media_content"  # the bytes of the file, which are written to the shard and to no column

Engine = Literal["transformers", "vllm"]  # runs a generator
ENGINES: tuple[Engine, ...] = get_args(Engine)
DType = Literal["float32", "float16", "bfloat16"]  # of a model's weights
DTYPES: tuple[DType, ...] = get_args(DType)

BuiltinEncoder = Literal["conv", "mlp", "lstm", "transformer"]  # of a fusion model, trained from scratch
BUILTIN_ENCODERS: tuple[BuiltinEncoder, ...] = get_args(BuiltinEncoder)
Fusion = Literal["attention", "concat", "gated", "bilinear"]  # makes one sequence of the tokens of all sources
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)
GeneratorKind = Literal["transformer", "lstm"]  # the text decoder of a fusion model
GENERATOR_KINDS: tuple[GeneratorKind, ...] = get_args(GeneratorKind)
Loss = Literal["caption", "align", "reconstruct", "modality_adversary", "generator_adversary"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
Similarity = Literal["cosine", "dot", "bilinear"]  # of two embeddings of a fusion model
SIMILARITIES: tuple[Similarity, ...] = get_args(Similarity)
Optimizer = Literal["adamw", "adam", "sgd"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
Schedule = Literal["cosine", "linear", "constant"]  # of the learning rate
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
Selection = Literal["loss", "exact_match"]  # the validation score that selects the best weights
SELECTIONS: tuple[Selection, ...] = get_args(Selection)

SHIPPED_MODEL = "shipped"  # the small fusion model that is part of this package
UNNAMED_MODEL = "model"  # stands for a model without a name in run.json and in the Parquet's metadata

_NETPBM = ("ppm", "pgm", "pbm", "pnm")
EXTENSIONS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "avif", "gif", "bmp", "tif", "tiff", *_NETPBM),
    "audio": ("wav", "flac", "mp3", "ogg", "oga", "opus", "m4a", "aac"),
    "text": ("txt",),
    "video": ("mp4", "m4v", "mov", "webm", "mkv", "avi"),
    "metadata": ("json",),
}
KIND_OF_EXTENSION: Mapping[str, Kind] = {ext: kind for kind, exts in EXTENSIONS.items() for ext in exts}

ZIP_SUFFIX = ".zip"
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ZIP_SUFFIX)
TABLE_NAMES = ("metadata.csv", "metadata.jsonl")  # beside the files of a folder: a row of metadata per file
_TEXT_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (  # a row per sample
    ".parquet",
    *_TEXT_TABLES,
    *(f"{suffix}{compressed}" for suffix in _TEXT_TABLES for compressed in (".gz", ".zst")),
)
_DOCUMENTS = ("json", "txt", "md", "html", "xml", "yaml", "yml", "log", "pdf", "npy")
NOT_INPUTS = (*(suffix[1:] for suffix in TABLE_SUFFIXES), *_DOCUMENTS)
LIST_SUFFIXES = (".txt", ".list")
FEATURE_SUFFIX = ".parquet"
PACK_INDEX = "index.json"  # beside the shards of `mmbeam pack`
PACK_FAILURES = "failures.jsonl"
