"""Ray Data: its reader decodes; one actor per core preprocesses and embeds with one thread."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import CLIPImageProcessor, CLIPModel

case, output, batch = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3])


class Embed:
    def __init__(self, directory: str) -> None:
        torch.set_num_threads(1)
        self.model = CLIPModel.from_pretrained(directory).eval()
        self.processor = CLIPImageProcessor.from_pretrained(directory)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            pixels = self.processor(list(rows["jpg"]), return_tensors="pt")["pixel_values"]
            vectors = self.model.get_image_features(pixel_values=pixels).pooler_output.numpy()
        return {"key": rows["__key__"], "embedding": np.asarray(vectors)}


def main() -> None:
    cores = os.cpu_count() or 1
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)
    rows = ray.data.read_webdataset(sorted(map(str, (case / "shards").glob("*.tar"))))
    embedded = rows.map_batches(
        Embed,
        fn_constructor_args=(str(case / "model"),),
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=cores),
        num_cpus=0.5,  # the rest is for reading and writing
    )
    embedded.write_parquet(str(output))


if __name__ == "__main__":
    main()
