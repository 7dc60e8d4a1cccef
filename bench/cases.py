"""The corpora and models of the benchmark: synthetic media with natural statistics, and models with random weights."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import shards as real
import tiny_audio_text
import torch
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

DISTINCT = 200  # distinct files; a corpus repeats them under other keys, which costs a decoder the same


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: a corpus and a model."""

    name: str
    modality: str
    samples: int
    make: Callable[[int], bytes]  # file content by number
    extension: str
    model: Callable[[Path], Any]  # writes a checkpoint directory
    per_shard: int = 250
    batch: int = 32

    def build(self, root: Path) -> Path:
        """Return the case's directory under `root`, and make it unless it exists."""
        directory = root / self.name
        about = {"modality": self.modality, "samples": self.samples, "batch": self.batch}
        done = directory / "case.json"
        if not done.exists() or json.loads(done.read_text()) != about:
            (directory / "shards").mkdir(parents=True, exist_ok=True)
            self._write_shards(directory / "shards")
            self.model(directory / "model")
            done.write_text(json.dumps(about))
        return directory

    def _write_shards(self, directory: Path) -> None:
        distinct = [self.make(number) for number in range(min(DISTINCT, self.samples))]
        for start in range(0, self.samples, self.per_shard):
            with tarfile.open(directory / f"{start // self.per_shard:05}.tar", "w") as tar:
                for number in range(start, min(start + self.per_shard, self.samples)):
                    data = distinct[number % len(distinct)]
                    member = tarfile.TarInfo(f"{number:07}.{self.extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def clip(vision: dict[str, int], text: dict[str, int], width: int, side: int = 224) -> Callable[[Path], None]:
    """Return a function that writes a CLIP with random weights, these towers and a byte-level tokenizer."""

    def write(directory: Path) -> None:
        torch.manual_seed(0)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
        ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        config = CLIPConfig(text_config=text | ends, vision_config=vision | {"image_size": side}, projection_dim=width)
        CLIPModel(config).save_pretrained(directory)
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
            directory
        )
        tokenizer.save_pretrained(directory)

    return write


def tower(hidden: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
    }


def photo(number: int) -> bytes:
    """Return a JPEG of 512 x 512 pixels, about 100 KB."""
    return real.encode_image(real.natural_image(number, 512, 512), "jpg", quality=99)


def thumbnail(number: int, side: int = 32) -> bytes:
    return real.encode_image(real.natural_image(number, side, side), "jpg")


def sound(number: int) -> bytes:
    """Return ten seconds of FLAC at 48 kHz."""
    return real.encode_sound(real.natural_sound(number, 10.0, 48_000), 48_000, "flac")


def sentence(number: int) -> bytes:
    return " ".join(f"word{(number * 7 + i) % 97}" for i in range(8 + number % 40)).encode()


CASES = [
    Case(
        name="image-clip-vit-b-32",
        modality="image",
        samples=1000,
        make=photo,
        extension="jpg",
        model=clip(tower(768, 12) | {"patch_size": 32}, tower(512, 12), 512),
    ),
    Case(
        name="image-clip-15m",
        modality="image",
        samples=4000,
        make=photo,
        extension="jpg",
        model=clip(tower(320, 8) | {"patch_size": 32}, tower(256, 4) | {"vocab_size": 8192}, 256),
    ),
    Case(
        name="audio-clap-tiny",
        modality="audio",
        samples=200,
        make=sound,
        extension="flac",
        per_shard=50,
        model=tiny_audio_text.save_clap,
    ),
    Case(
        name="text-clip-15m",
        modality="text",
        samples=4000,
        make=sentence,
        extension="txt",
        per_shard=1000,
        model=clip(tower(320, 8) | {"patch_size": 32}, tower(256, 4) | {"vocab_size": 8192}, 256),
    ),
]

LARGE = tower(1024, 24) | {"patch_size": 14}
GPU_CASES = [
    replace(CASES[0], name="gpu-clip-vit-b-32", samples=16_000, per_shard=1000, batch=256),
    replace(
        CASES[0],
        name="gpu-clip-vit-l-14",
        samples=8000,
        per_shard=500,
        batch=256,
        model=clip(LARGE, tower(768, 12), 768),
    ),
]
TINY = clip(tower(64, 1) | {"patch_size": 16}, tower(64, 1), 32, side=32)


def memory_case(samples: int) -> Case:
    """Return a case of small images and a tiny model, in which memory that grows with the corpus would show."""
    return Case(
        name=f"memory-{samples}",
        modality="image",
        samples=samples,
        make=thumbnail,
        extension="jpg",
        per_shard=max(250, samples // 20),
        model=TINY,
    )
