"""Daft: files on disk, since it does not read tars; Daft decodes, a class UDF per core embeds with one thread."""

import os
import sys
from pathlib import Path

import daft
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

case, output, batch = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3])


@daft.udf(return_dtype=daft.DataType.list(daft.DataType.float32()), batch_size=batch, concurrency=os.cpu_count() or 1)
class Embed:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = CLIPModel.from_pretrained(case / "model").eval()
        self.processor = CLIPImageProcessor.from_pretrained(case / "model")

    def __call__(self, images: daft.Series) -> list[list[float]]:
        with torch.inference_mode():
            pictures = [Image.fromarray(image) for image in images.to_pylist()]
            pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]
            return self.model.get_image_features(pixel_values=pixels).pooler_output.tolist()


def main() -> None:
    files = sorted((case / "files").glob("*.jpg"))
    table = daft.from_pydict({"key": [file.stem for file in files], "path": [file.as_uri() for file in files]})
    image = daft.functions.decode_image(daft.functions.download(daft.col("path")), mode="RGB")
    table.select(daft.col("key"), Embed(image).alias("embedding")).write_parquet(str(output))


if __name__ == "__main__":
    main()
