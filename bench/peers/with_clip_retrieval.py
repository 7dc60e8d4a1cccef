"""clip-retrieval's own inference command over the same shards, with as many preprocessing workers as cores."""

import os
import sys
from pathlib import Path

import all_clip.main
from clip_retrieval.clip_inference.main import main as clip_inference

case, output, batch = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3])

names = sorted(shard.stem for shard in (case / "shards").glob("*.tar"))

all_clip.main.warmup = lambda *_: None  # it uses ids of OpenAI's vocabulary, which the small model does not have

if __name__ == "__main__":
    clip_inference(
        input_dataset=str(case / "shards" / f"{{{names[0]}..{names[-1]}}}.tar"),
        output_folder=str(output),
        input_format="webdataset",
        enable_text=False,
        enable_metadata=False,
        batch_size=batch,
        num_prepro_workers=os.cpu_count() or 1,
        clip_model=f"hf_clip:{case / 'model'}",
        use_jit=False,
    )
