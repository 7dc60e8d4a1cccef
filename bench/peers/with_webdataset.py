"""webdataset and torch's DataLoader: worker processes decode and preprocess, the main process runs the model."""

import io
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset as wds
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

case, output, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
processor = CLIPImageProcessor.from_pretrained(case / "model")


def preprocess(data: bytes) -> torch.Tensor:
    return processor(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")["pixel_values"][0]


def main() -> None:
    shards = sorted(map(str, (case / "shards").glob("*.tar")))
    samples = wds.WebDataset(shards, shardshuffle=False, empty_check=False)
    samples = samples.to_tuple("__key__", "jpg").map_tuple(str, preprocess)
    loader = torch.utils.data.DataLoader(samples.batched(batch), batch_size=None, num_workers=os.cpu_count() or 1)
    model = CLIPModel.from_pretrained(case / "model").eval()
    output.mkdir(parents=True)
    schema = pa.schema({"key": pa.string(), "embedding": pa.list_(pa.float32())})
    with pq.ParquetWriter(output / "rows.parquet", schema) as writer, torch.inference_mode():
        for keys, pixels in loader:
            vectors = model.get_image_features(pixel_values=pixels).pooler_output
            writer.write_table(pa.table([list(keys), list(vectors.numpy())], schema))


if __name__ == "__main__":
    main()
