"""Images for the tests, similar to photographs, encoded as JPEG or PNG and decoded again."""

import functools
import io

import numpy as np
from PIL import Image

from mmbeam.types import ImageHWC

# Height, width: tiny, odd, square, wide, tall, very wide; two of one size.
SIZES = (
    *((1, 1), (2, 50), (50, 3), (31, 32), (48, 48), (47, 33), (97, 401)),
    *((224, 224), (427, 640), (640, 427), (427, 640), (30, 700), (512, 512)),
)


def encoded(height: int, width: int, seed: int, kind: str) -> bytes:
    """Return a file with smooth noise, a gradient and hard edges."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    rows, columns = np.mgrid[0:height, 0:width]
    gradient = 60 * (columns / max(1, width - 1))[..., None] * np.array([1, -1, 0.5])
    edges = 80 * ((rows // 17 + columns // 23) % 3 == 0)[..., None]
    noise = rng.normal(0, 4, (height, width, 3))
    pixels = np.clip(smooth + gradient + edges - 40 + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return file.getvalue()


@functools.cache
def pictures(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[ImageHWC]:
    """Return decoded images, uint8 [H, W, 3], alternately from JPEG and PNG."""
    kinds = ("JPEG", "PNG")
    files = [encoded(height, width, seed, kinds[seed % 2]) for seed, (height, width) in enumerate(sizes)]
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
