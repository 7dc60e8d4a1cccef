"""Beam's own RunInference and WriteToParquet on the DirectRunner, with threads."""

import io
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import torch
from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

case, output, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
processor = CLIPImageProcessor.from_pretrained(case / "model")


def read(shard: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            yield member.name.partition(".")[0], file.read()


class Clip(ModelHandler[bytes, np.ndarray, CLIPModel]):
    """Embeds batches of encoded images."""

    def load_model(self) -> CLIPModel:
        return CLIPModel.from_pretrained(case / "model").eval()

    def run_inference(
        self, items: Sequence[bytes], model: CLIPModel, inference_args: Any = None
    ) -> Iterable[np.ndarray]:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in items]
        with torch.inference_mode():
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            return list(model.get_image_features(pixel_values=pixels).pooler_output.numpy())

    def batch_elements_kwargs(self) -> dict[str, int]:
        return {"min_batch_size": batch, "max_batch_size": batch}


def main() -> None:
    shards = sorted(map(str, (case / "shards").glob("*.tar")))
    schema = pa.schema({"key": pa.string(), "embedding": pa.list_(pa.float32())})
    options = PipelineOptions(
        ["--runner=DirectRunner", "--direct_running_mode=multi_threading", f"--direct_num_workers={os.cpu_count()}"]
    )
    with beam.Pipeline(options=options) as pipeline:
        (
            pipeline
            | beam.Create(shards)
            | beam.Reshuffle()
            | beam.FlatMap(read)
            | RunInference(KeyedModelHandler(Clip()))
            | beam.Map(lambda pair: {"key": pair[0], "embedding": pair[1].tolist()})
            | beam.io.WriteToParquet(str(output / "rows"), schema, file_name_suffix=".parquet")
        )


if __name__ == "__main__":
    main()
