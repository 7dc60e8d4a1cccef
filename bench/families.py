"""Generation by transformers models on prompts of mixed length: `mmbeam caption` against two bare loops.

A Llama of 25 M parameters continues texts, and a BLIP of 26 M continues the first words of a caption. The bare loops
read the same shards with the standard library's tarfile, decode ahead in a thread pool, and call the model on inputs
prepared and padded as mmbeam does: one loop in arrival order, the other on the batches that mmbeam plans.

A model with random weights does not end its texts. A logits processor, the same in all three loops, therefore ends a
text after n * e^(0.3 z) tokens, where n is the number of tokens of the prompt, and z is a standard normal number
derived from the prompt. As in translation, the length of the prompt predicts the length of the text, with an error.

One process measures a model and runs its three loops in turn. Excluded from the time are imports, loading, a first
batch, and the third of a second in which a pipeline starts and ends; opening the shard and writing rows are included.
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
SIDE = 160  # pixels of an image
DECODING = Decoding(max_new_tokens=100)
SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
}


def words(number: int, most: int) -> str:
    """Return a text of 4 to `most` words. The number is lognormal with median 16."""
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
    """Return the directory of a model and its shards, and make them unless they exist."""
    directory = CACHE / f"families-{name}-{samples}"
    if not (directory / "done").exists():
        torch.manual_seed(0)
        MODELS[name](directory / "model")
        write_shard(directory / "0.tar", samples, has_images=name == "blip")
        (directory / "done").touch()
    return directory


def write_shard(path: Path, samples: int, has_images: bool) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            members = {"txt": words(number, most=100).encode()}
            if has_images:
                members["jpg"] = thumbnail(number, SIDE)
            for field, data in members.items():
                member = tarfile.TarInfo(f"{number:06}.{field}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


class FixedLength(LogitsProcessor):
    """Ends each text after exactly `length_after(prompt)` tokens."""

    def __init__(self, pad: int, end: int) -> None:
        self.pad, self.end = pad, end
        self.lengths: torch.Tensor | None = None  # [B] tokens of prompt and text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.lengths is None:
            lengths = [length_after([token for token in row if token != self.pad]) for row in input_ids.tolist()]
            self.lengths = torch.tensor(lengths) + input_ids.shape[1]
        ended = input_ids.shape[1] + 1 >= self.lengths
        scores = scores.masked_fill(ended[:, None], -math.inf)
        scores[:, self.end] = torch.where(ended, 0.0, -math.inf)
        return scores


def length_after(prompt: Sequence[int]) -> int:
    """Return the number of tokens of the text that follows a prompt of token ids."""
    digest = hashlib.blake2b(repr(prompt).encode(), digest_size=8).digest()
    z = NormalDist().inv_cdf((int.from_bytes(digest) + 0.5) / 2**64)
    return max(2, min(DECODING.limit, round(len(prompt) * math.exp(0.3 * z))))


def end_texts(model_type: str) -> None:
    """Add FixedLength to every generation of the family, by mmbeam and by the bare loops."""
    family: Any = family_of(model_type)
    original = family.options.fget

    def options(self: Any) -> dict[str, Any]:
        ids = self.tokenizer._tokenizer
        return {**original(self), "logits_processor": [FixedLength(ids.pad_token_id, ids.sep_token_id)]}

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
    """Read, generate and decode the tokens; return the number of texts."""
    count = 0
    with ThreadPoolExecutor(CORES) as pool:
        for window in windows(ordered_map(to_request, raw_samples([directory / "0.tar"]), pool, Lookahead(2 * BATCH))):
            for indices in plan(generator, window):
                inputs = generator.inputs([window[index] for index in indices])
                ids = generator.decoder.generate(
                    **inputs, **generator.options, max_new_tokens=DECODING.limit, do_sample=False
                )
                texts = generator.tokenizer._tokenizer.batch_decode(
                    ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )
                count += len(texts)
    return count


def windows(requests: Iterator[Request]) -> Iterator[list[Request]]:
    """Yield windows of the same size as mmbeam's."""
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
    """Run the job with the model that this process has loaded; return its rows, and the seconds of its unit's steps."""
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
    """Return the samples per second of each loop in each round, in one process."""
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
            count, seconds = run()
            assert count == samples
            rates[loop].append(count / seconds)
    return rates


def timed(run: Callable[[], int]) -> tuple[int, float]:
    begin = time.perf_counter()
    return run(), time.perf_counter() - begin


def section(samples: int = SAMPLES, rounds: int = ROUNDS) -> None:
    """Print the table."""
    print(
        f"\ngeneration by transformers models, {samples:,} samples in batches of {BATCH}: samples/s, and mmbeam / loop"
    )
    print(f"(median of {rounds} rounds, lowest-highest); bench/families.py states how the length of a text is set")
    print(f"{'model':<8}{'arrival':>9}{'ordered':>9}{'mmbeam':>9}   {'mmbeam / arrival':<22}mmbeam / ordered")
    for name in MODELS:
        command = [sys.executable, "-W", "ignore", __file__, name, str(samples), str(rounds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rates: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
        medians = "".join(f"{statistics.median(values):>9.1f}" for values in rates.values())
        print(f"{name:<8}{medians}   {ratio(rates, 'arrival'):<22}{ratio(rates, 'ordered')}", flush=True)


def ratio(rates: dict[str, list[float]], loop: str) -> str:
    ratios = sorted(mmbeam / bare for mmbeam, bare in zip(rates["mmbeam"], rates[loop], strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(CORES)
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        section()
