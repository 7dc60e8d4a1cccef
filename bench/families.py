"""Texts by models of transformers, prompts and texts of mixed length: `mmbeam caption` against two bare loops.

A Llama of 25 M parameters goes on from texts, a BLIP of 26 M from the words that a caption begins with. The bare loops
read the same shards with the standard library's tarfile, decode ahead in a thread pool, and call the model on inputs
prepared and padded as mmbeam prepares them: one in the order of arrival, one on mmbeam's own batches.

Random weights end no text, so a processor of logits, the same in all three, ends each after a number of tokens that
its prompt decides: about as many as the prompt has, as in a translation, e^(0.3 z) times, z normal and drawn by the
prompt. So the order by length tells much of how long a text will be, and not all.

One process measures a model: its three loops take turns. Imports, loading, a first batch and the third of a second
in which a pipeline starts and ends are outside; opening the shard and writing rows inside.
"""

import hashlib
import io
import json
import math
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from statistics import NormalDist
from typing import Any

import torch
from cases import thumbnail
from generation import CACHE, CORES, LIMITS, raw_samples
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
)

from mmbeam.config import Windows
from mmbeam.decode.image import decode_image
from mmbeam.models.generators import describe, family_of, load
from mmbeam.prompts.ask import Decoding, Request
from mmbeam.readers.windows import Lookahead, ordered_map
from mmbeam.stages.generate import plan_batches

SAMPLES, BATCH, ROUNDS = 128, 32, 5
WORDS = 8192
SIDE = 160  # pixels of a picture
DECODING = Decoding(max_new_tokens=100)
SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
}


def words(number: int, most: int) -> str:
    """A text of 4 to `most` words, lognormal, half of them of fewer than 16."""
    random = Random(number)
    count = min(most, max(4, round(random.lognormvariate(math.log(16), 0.8))))
    return " ".join(f"w{random.randrange(WORDS)}" for _ in range(count))


def tokenizer() -> BertTokenizer:
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*marks, *(f"w{number}" for number in range(WORDS))]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}, model_max_length=512)


def save_llama(directory: Path) -> None:
    names = tokenizer()
    ids = {"bos_token_id": names.cls_token_id, "eos_token_id": names.sep_token_id, "pad_token_id": names.pad_token_id}
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(names), **ids)).save_pretrained(directory)
    names.save_pretrained(directory)


def save_blip(directory: Path) -> None:
    names = tokenizer()
    ids = {"bos_token_id": names.cls_token_id, "sep_token_id": names.sep_token_id, "eos_token_id": names.sep_token_id}
    text = {**SIZES, "num_hidden_layers": 6, "encoder_hidden_size": 384, "vocab_size": len(names), "pad_token_id": 0}
    vision = {**SIZES, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": 32}
    config = BlipConfig(text_config=text | ids, vision_config=vision)
    BlipForConditionalGeneration(config).save_pretrained(directory)
    BlipProcessor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), names).save_pretrained(directory)


MODELS: dict[str, Callable[[Path], None]] = {"llama": save_llama, "blip": save_blip}


def build(name: str, samples: int) -> Path:
    """A model and its shards, made unless they are there."""
    directory = CACHE / f"families-{name}-{samples}"
    if not (directory / "done").exists():
        torch.manual_seed(0)
        MODELS[name](directory / "model")
        write_shard(directory / "0.tar", samples, pictures=name == "blip")
        (directory / "done").touch()
    return directory


def write_shard(path: Path, samples: int, pictures: bool) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            members = {"txt": words(number, most=100).encode()}
            if pictures:
                members["jpg"] = thumbnail(number, SIDE)
            for field, data in members.items():
                member = tarfile.TarInfo(f"{number:06}.{field}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


class Ends(LogitsProcessor):
    """Ends each text after as many tokens as its prompt says, and none before."""

    def __init__(self, pad: int, end: int) -> None:
        self.pad, self.end = pad, end
        self.stops: torch.Tensor | None = None  # [B] the length of prompt and text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.stops is None:
            lengths = [length_after([token for token in row if token != self.pad]) for row in input_ids.tolist()]
            self.stops = torch.tensor(lengths) + input_ids.shape[1]
        ended = input_ids.shape[1] + 1 >= self.stops
        scores = scores.masked_fill(ended[:, None], -math.inf)
        scores[:, self.end] = torch.where(ended, 0.0, -math.inf)
        return scores


def length_after(prompt: Sequence[int]) -> int:
    """Tokens of the text that follows a prompt."""
    digest = hashlib.blake2b(repr(prompt).encode(), digest_size=8).digest()
    z = NormalDist().inv_cdf((int.from_bytes(digest) + 0.5) / 2**64)
    return max(2, min(DECODING.limit, round(len(prompt) * math.exp(0.3 * z))))


def end_texts(model_type: str) -> None:
    """Let every generation of the family end by `Ends`, mmbeam's and the bare loops'."""
    family: Any = family_of(model_type)
    own = family.options.fget

    def options(self: Any) -> dict[str, Any]:
        ids = self.tokenizer._tokenizer
        return {**own(self), "logits_processor": [Ends(ids.pad_token_id, ids.sep_token_id)]}

    family.options = property(options)


def to_request(fields: dict[str, bytes]) -> Request:
    image = decode_image(fields["jpg"], LIMITS)[0] if "jpg" in fields else None
    return Request(image=image, prompt=fields["txt"].decode())


def in_arrival_order(generator: Any, requests: Sequence[Request]) -> list[list[int]]:
    return [list(range(start, min(start + BATCH, len(requests)))) for start in range(0, len(requests), BATCH)]


def in_order_of_length(generator: Any, requests: Sequence[Request]) -> list[list[int]]:
    return plan_batches(generator, requests, DECODING, BATCH)


@torch.inference_mode()
def bare(generator: Any, directory: Path, plan: Callable[[Any, Sequence[Request]], list[list[int]]]) -> int:
    """Reads, generates and decodes tokens; the texts made."""
    made = 0
    with ThreadPoolExecutor(CORES) as pool:
        for window in windows(ordered_map(to_request, raw_samples([directory / "0.tar"]), pool, Lookahead(2 * BATCH))):
            for places in plan(generator, window):
                inputs = generator.inputs([window[place] for place in places])
                ids = generator.decoder.generate(
                    **inputs, **generator.options, max_new_tokens=DECODING.limit, do_sample=False
                )
                texts = generator.tokenizer._tokenizer.batch_decode(
                    ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )
                made += len(texts)
    return made


def windows(requests: Iterator[Request]) -> Iterator[list[Request]]:
    """As large as mmbeam's."""
    window: list[Request] = []
    size = 0
    for request in requests:
        window.append(request)
        size += 0 if request.image is None else request.image.nbytes
        if len(window) >= Windows().samples or size >= Windows().decoded_bytes:
            yield window
            window, size = [], 0
    if window:
        yield window


def mmbeam(directory: Path, shard: Path) -> tuple[int, float]:
    """The job, on the model that this process has loaded by then; rows, and the seconds of its one unit's steps."""
    from mmbeam.jobs.caption import CaptionOptions, prepare

    with tempfile.TemporaryDirectory(dir=directory) as output:
        options = CaptionOptions(
            input=(str(shard),),
            output=output,
            model=str(directory / "model"),
            task="caption",
            prompt="{text}",
            device="cpu",
            batch_size=BATCH,
            decoding=DECODING,
        )
        job = prepare(options)
        tally = job.execute().tally
        return tally.rows, sum(tally.seconds[step] for step in ("read_wait", "device_wait", "compute", "write"))


def measure(name: str, samples: int, rounds: int) -> dict[str, list[float]]:
    """Samples per second of each loop in each round, in one process."""
    directory = build(name, samples)
    end_texts(name)
    spec = describe(directory / "model")
    generator = load(spec, torch.device("cpu"), torch.float32)
    loops: dict[str, Callable[[], tuple[int, float]]] = {
        "arrival": lambda: timed(lambda: bare(generator, directory, in_arrival_order)),
        "ordered": lambda: timed(lambda: bare(generator, directory, in_order_of_length)),
        "mmbeam": lambda: mmbeam(directory, directory / "0.tar"),
    }
    warm = build(name, BATCH)
    bare(generator, warm, in_arrival_order)
    mmbeam(directory, warm / "0.tar")
    rates: dict[str, list[float]] = {loop: [] for loop in loops}
    for _ in range(rounds):
        for loop, run in loops.items():
            made, seconds = run()
            assert made == samples
            rates[loop].append(made / seconds)
    return rates


def timed(run: Callable[[], int]) -> tuple[int, float]:
    begin = time.perf_counter()
    return run(), time.perf_counter() - begin


def section(samples: int = SAMPLES, rounds: int = ROUNDS) -> None:
    """Print the table."""
    print(
        f"\ntexts by models of transformers, {samples:,} samples, batches of {BATCH}: samples/s, and mmbeam over each"
    )
    print(f"loop (median of {rounds} rounds in turn, lowest-highest); texts end by their prompt, see bench/families.py")
    print(f"{'model':<8}{'arrival':>9}{'ordered':>9}{'mmbeam':>9}   {'mmbeam / arrival':<22}mmbeam / ordered")
    for name in MODELS:
        command = [sys.executable, "-W", "ignore", __file__, name, str(samples), str(rounds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rates: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
        medians = "".join(f"{statistics.median(each):>9.1f}" for each in rates.values())
        print(f"{name:<8}{medians}   {ratio(rates, 'arrival'):<22}{ratio(rates, 'ordered')}", flush=True)


def ratio(rates: dict[str, list[float]], loop: str) -> str:
    ratios = sorted(mine / bare for mine, bare in zip(rates["mmbeam"], rates[loop], strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(CORES)
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        section()
