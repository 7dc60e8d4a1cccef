"""Measure a GPU and mmbeam on it, in one call of at most ten minutes: `python bench/gpu.py`.

It needs torch, transformers, pyarrow, pillow and numpy, and neither Beam nor a codec. Each section runs in a process of
its own with a deadline; one that fails or takes too long does not stop the others. OUT holds a JSON file per section
and table.txt. `--smoke` runs every section on the CPU in tiny sizes, to see that the script works.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The sizes that are measured."""

    device: str
    megabytes: int  # of a copy
    side: int  # of a matrix
    threads: tuple[int, ...]
    pictures: int
    models: tuple[tuple[str, dict[str, int]], ...]
    batches: tuple[int, ...]
    windows: tuple[int, ...]  # MiB
    processes: tuple[int, ...]
    tokens: int
    repeats: int


TOWER_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TOWER_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FULL = Scale(
    device="cuda",
    megabytes=256,
    side=8192,
    threads=(1, 2, 4, 8, 16),
    pictures=2048,
    models=(("vit-b-32", TOWER_B | {"patch_size": 32}), ("vit-l-14", TOWER_L | {"patch_size": 14})),
    batches=(32, 128, 256, 512),
    windows=(32, 256, 1024),
    processes=(1, 2, 4),
    tokens=64,
    repeats=10,
)
SMOKE = Scale(
    device="cpu",
    megabytes=1,
    side=64,
    threads=(1, 2),
    pictures=8,
    models=(("vit-tiny", TINY | {"patch_size": 32}),),
    batches=(2,),
    windows=(1,),
    processes=(2,),
    tokens=4,
    repeats=1,
)


def photo(number: int, height: int = 512, width: int = 512) -> bytes:
    """Return a JPEG with the statistics of a photograph."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = (smooth + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def decoded(data: bytes) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def timed(call: Callable[[], object], repeats: int) -> float:
    """Return the seconds of one call, the device included, after one that is not counted."""
    import torch

    def finish() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    call()
    finish()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    finish()
    return (time.perf_counter() - begin) / repeats


@contextlib.contextmanager
def decoding(threads: int) -> Iterator[None]:
    """Decode pictures on this many threads meanwhile."""
    stop, data = threading.Event(), photo(0)

    def decode() -> None:
        while not stop.is_set():
            decoded(data)

    workers = [threading.Thread(target=decode, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def machine(scale: Scale, out: Path) -> list[Row]:
    """Bandwidth, arithmetic, and the cost of a launch alone and beside decoding threads."""
    import torch

    size = scale.megabytes << 20
    pageable, pinned = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    if scale.device == "cuda":
        pinned = pinned.pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=scale.device)
    rows: list[Row] = []
    for name, source in (("pageable", pageable), ("pinned", pinned)):
        seconds = timed(lambda source=source: target.copy_(source, non_blocking=True), scale.repeats)  # type: ignore[misc]
        rows.append({"what": f"copy to the device, {name}", "GB/s": size / seconds / 1e9})
    matrix = torch.randn(scale.side, scale.side, device=scale.device, dtype=torch.bfloat16)
    seconds = timed(lambda: matrix @ matrix, scale.repeats)
    rows.append({"what": "product of bfloat16 matrices", "TFLOP/s": 2 * scale.side**3 / seconds / 1e12})
    small = torch.zeros(1, device=scale.device)

    def launches() -> None:
        for _ in range(1000):
            small.add_(1)

    rows.append({"what": "launch", "us": timed(launches, scale.repeats) * 1000})
    with decoding(scale.threads[-1]):
        seconds = timed(launches, scale.repeats)
    rows.append({"what": f"launch beside {scale.threads[-1]} decoding threads", "us": seconds * 1000})
    if scale.device == "cuda":
        rows.append(
            {"what": torch.cuda.get_device_name(), "GiB": torch.cuda.get_device_properties(0).total_memory >> 30}
        )
    return rows


def decode(scale: Scale, out: Path) -> list[Row]:
    """Decoding 512 x 512 JPEGs with Pillow, and with simplejpeg and nvJPEG where they are installed."""
    data = [photo(number) for number in range(16)]
    work = [data[number % len(data)] for number in range(max(16, scale.pictures // 4))]
    decoders: dict[str, Callable[[bytes], Any]] = {"Pillow": decoded}
    with contextlib.suppress(ImportError):
        import simplejpeg

        decoders["simplejpeg"] = simplejpeg.decode_jpeg
    rows: list[Row] = []
    for name, call in decoders.items():
        for threads in scale.threads:
            with ThreadPoolExecutor(threads) as pool:
                begin = time.perf_counter()
                list(pool.map(call, work))
            rate = len(work) / (time.perf_counter() - begin)
            rows.append({"what": f"{name}, threads: {threads}", "pictures/s": rate})
    if scale.device == "cuda":
        with contextlib.suppress(ImportError):
            import torch
            from torchvision.io import decode_jpeg

            tensors = [torch.frombuffer(bytearray(item), dtype=torch.uint8) for item in work]
            seconds = timed(lambda: decode_jpeg(tensors, device="cuda"), 3)
            rows.append({"what": "nvJPEG (torchvision)", "pictures/s": len(work) / seconds})
    return rows


def save_model(out: Path, name: str, config: dict[str, int]) -> Path:
    """Save a ViT with random weights, unless it exists."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    directory = out / "models" / name
    if not (directory / "model.safetensors").exists():
        ViTModel(ViTConfig(**config, image_size=224), add_pooling_layer=False).save_pretrained(directory)
        ViTImageProcessorPil().save_pretrained(directory)
    return directory


def model(scale: Scale, out: Path) -> list[Row]:
    """Models on resident tensors: pictures per second by batch size and type, compiled or not; cosines with float32."""
    import torch
    from transformers import ViTModel

    rows: list[Row] = []
    for name, config in scale.models:
        directory = save_model(out, name, config)
        reference: Any = None
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            loaded: Any = ViTModel.from_pretrained(directory, add_pooling_layer=False, dtype=dtype).eval()
            loaded = loaded.to(scale.device)
            for batch in scale.batches:
                generator = torch.Generator().manual_seed(0)
                pixels = torch.randn(batch, 3, 224, 224, generator=generator).to(scale.device, dtype)
                for kind in ("eager", *(("compiled",) if scale.device == "cuda" and dtype == torch.bfloat16 else ())):
                    call = torch.compile(loaded) if kind == "compiled" else loaded
                    with torch.inference_mode():
                        seconds = timed(lambda call=call, pixels=pixels: call(pixels), scale.repeats)  # type: ignore[misc]
                        vectors = call(pixels).last_hidden_state[:, 0].float()
                    reference = vectors if dtype == torch.float32 and batch == scale.batches[0] else reference
                    row = {"what": f"{name}, {str(dtype)[6:]}, {kind}, batch {batch}", "pictures/s": batch / seconds}
                    if batch == scale.batches[0]:
                        cosine = torch.nn.functional.cosine_similarity(vectors, reference, dim=-1).min()
                        row["cosine with float32, lowest"] = float(cosine)
                    rows.append(row)
    return rows


def window_sizes(scale: Scale) -> dict[str, list[tuple[int, int]]]:
    """Return the heights and widths of the pictures of each corpus."""
    if scale.device == "cpu":
        return {"mixed": [(40, 60), (60, 40)]}
    mixed = [(360 + 16 * (step % 13), 640 - 20 * (step % 11)) for step in range(43)]
    return {"uniform": [(512, 512)], "mixed": mixed, "12 megapixels": [(3000, 4000)]}


def flow(scale: Scale, out: Path) -> list[Row]:
    """The flow: decoding threads, two units in flight, the embed stage, by window size and number of processes."""
    rows: list[Row] = []
    name, config = scale.models[0]
    directory = save_model(out, name, config)
    for corpus in window_sizes(scale):
        for mib in scale.windows:
            for count in scale.processes if mib == max(scale.windows[:2]) else (1,):
                command = [sys.executable, __file__, "--flow", str(directory), corpus, str(mib), "--out", str(out)]
                command += ["--smoke"] if scale.device == "cpu" else []
                children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
                results = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
                rows.append(
                    {
                        "what": f"{name}, {corpus}, windows of {mib} MiB, processes: {count}",
                        "pictures/s": sum(result["rate"] for result in results),
                        "model seconds per second": sum(result["busy"] for result in results),
                    }
                )
    return rows


def flow_process(scale: Scale, directory: str, corpus: str, mib: int) -> Row:
    """Run units on two threads, which decode windows ahead of the stage."""
    from mmbeam.models.placement import get_device
    from mmbeam.stages.embed import embed_stage
    from mmbeam.types import Batch, Sample, WorkUnit

    sizes = window_sizes(scale)[corpus]
    files = [photo(number, *size) for number, size in enumerate(sizes)]
    nbytes = sum(height * width * 3 for height, width in sizes) / len(sizes)
    per_window = max(1, min(4096, scale.pictures, int((mib << 20) / nbytes)))
    total = scale.pictures if nbytes < 8 << 20 else scale.pictures // 8
    windows = max(4, total // per_window)
    device = get_device("cuda:0" if scale.device == "cuda" else "cpu")
    stage = embed_stage(directory, device=device.name)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def window(unit: int) -> Batch:
        images = pool.map(decoded, (files[number % len(files)] for number in range(per_window)))
        samples = tuple(
            Sample(key=str(n), shard="", offset=n, present=frozenset({"image"}), image=image)
            for n, image in enumerate(images)
        )
        return Batch(unit=WorkUnit(id=str(unit), inputs=()), index=0, last=False, samples=samples)

    def unit(number: int) -> float:
        busy = 0.0
        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(window, number)
            for index in range(windows // 2):
                batch = following.result()
                if index + 1 < windows // 2:
                    following = ahead.submit(window, number)
                busy += device.run(stage, batch).tally.seconds["compute"]
        return busy

    device.run(stage, window(0))
    begin = time.perf_counter()
    with ThreadPoolExecutor(2) as units:
        busy = sum(units.map(unit, range(2)))
    seconds = time.perf_counter() - begin
    return {"rate": 2 * (windows // 2) * per_window / seconds, "busy": busy / seconds}


def generation(scale: Scale, out: Path) -> list[Row]:
    """Tokens per second of a decoder, with a dynamic and a static cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    is_small = scale.device == "cpu"
    sizes = TINY | {"vocab_size": 256} if is_small else {"hidden_size": 2048, "intermediate_size": 8192}
    config = LlamaConfig(**sizes, **({} if is_small else {"num_hidden_layers": 16, "num_attention_heads": 32}))
    dtype = torch.float32 if is_small else torch.bfloat16
    with torch.device(scale.device):
        llama: Any = LlamaForCausalLM(config).to(dtype).eval()
    weights = sum(parameter.nbytes for parameter in llama.parameters())
    rows: list[Row] = []
    for batch in scale.batches:
        ids = torch.randint(1, 200, (batch, 64), device=scale.device)
        for cache in ("dynamic", "static"):
            options = {"max_new_tokens": scale.tokens, "min_new_tokens": scale.tokens, "do_sample": False}
            options |= {"cache_implementation": "static"} if cache == "static" else {}
            with torch.inference_mode():
                seconds = timed(lambda ids=ids, options=options: llama.generate(ids, pad_token_id=0, **options), 1)  # type: ignore[misc]
            row = {"what": f"Llama of {weights >> 20} MiB, {cache} cache, batch {batch}"}
            row |= {
                "tokens/s": batch * scale.tokens / seconds,
                "GB/s of weights": weights * scale.tokens / seconds / 1e9,
            }
            rows.append(row)
    return rows


def profile(scale: Scale, out: Path) -> list[Row]:
    """The kernels that take most of the time of one window, and a trace for chrome://tracing."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from mmbeam.models.placement import get_device
    from mmbeam.stages.embed import embed_stage
    from mmbeam.types import Batch, Sample, WorkUnit

    directory = save_model(out, *scale.models[0])
    sizes = window_sizes(scale)["mixed"]
    device = get_device("cuda:0" if scale.device == "cuda" else "cpu")
    stage = embed_stage(str(directory), device=device.name)
    samples = tuple(
        Sample(key=str(n), shard="", offset=n, present=frozenset({"image"}), image=decoded(photo(n, *size)))
        for n, size in enumerate(sizes)
    )
    batch = Batch(unit=WorkUnit(id="u", inputs=()), index=0, last=True, samples=samples)
    device.run(stage, batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if scale.device == "cuda" else [])]
    with profiler(activities=activities) as trace:
        device.run(stage, batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    trace.export_chrome_trace(str(out / "trace.json"))
    events = sorted(trace.key_averages(), key=lambda event: -getattr(event, "self_device_time_total", 0))[:10]
    return [{"what": event.key[:60], "ms": getattr(event, "self_device_time_total", 0) / 1000} for event in events]


def faults(scale: Scale, out: Path) -> list[Row]:
    """Out of memory and a device error, provoked: how they are classified."""
    import torch

    from mmbeam.models.placement import classify

    rows: list[Row] = []
    if scale.device == "cpu":
        return [{"what": "needs a GPU"}]
    for name, call in (
        ("out of memory", lambda: torch.empty(1 << 42, dtype=torch.uint8, device="cuda")),
        ("device-side assert", lambda: torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].cpu()),
    ):
        try:
            call()
        except Exception as error:
            rows.append({"what": name, "classified as": classify(error), "error": type(error).__name__})
    return rows


SECTIONS: dict[str, tuple[Callable[[Scale, Path], Sequence[Row]], int]] = {  # with the seconds that it may take
    "machine": (machine, 60),
    "decode": (decode, 60),
    "model": (model, 150),
    "flow": (flow, 200),
    "profile": (profile, 60),
    "generation": (generation, 120),
    "faults": (faults, 30),
}
TOTAL_SECONDS = 590


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu", help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # run in this process
    parser.add_argument("--flow", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    scale = SMOKE if args.smoke else FULL
    if args.flow:
        print(json.dumps(flow_process(scale, args.flow[0], args.flow[1], int(args.flow[2]))))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        rows = SECTIONS[args.section][0](scale, args.out)
        (args.out / f"{args.section}.json").write_text(json.dumps(rows, indent=1))
        return
    lines: list[str] = []
    end = time.monotonic() + TOTAL_SECONDS
    for name in args.sections or SECTIONS:
        (args.out / f"{name}.json").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--section", name, "--out", str(args.out)] + ["--smoke"] * args.smoke
        begin = time.monotonic()
        limit = min(SECTIONS[name][1], end - begin)
        environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if args.smoke else {})}
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        ) as process:
            try:
                stderr = process.communicate(timeout=max(limit, 1))[1]
                error = stderr.strip().splitlines()[-1:] if process.returncode else []
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                error = [f"not finished after {limit:.0f} s"]
        block = [f"{name} ({time.monotonic() - begin:.0f} s)", *(f"  FAILED: {line}" for line in error)]
        with contextlib.suppress(FileNotFoundError):
            for row in json.loads((args.out / f"{name}.json").read_text()):
                what = row.pop("what")
                values = (
                    f"{key} {value:,.4g}" if isinstance(value, float | int) else value for key, value in row.items()
                )
                block.append(f"  {what:<60} {', '.join(values)}")
        print("\n".join(block), flush=True)
        lines += block
        (args.out / "table.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
