"""Caption every sample of a bucket of shards, or of computed features: what one submits to a runner.

    python pipelines/caption.py --input 'shards/*.tar' --output out --model MODEL_DIR

runs in this process; so does a run on what `mmbeam embed` wrote, for a model that was trained on such features:

    python pipelines/caption.py --input FEATURES_DIR --output out --model MODEL_DIR

The arguments are those of `mmbeam caption` (see --help), and every Apache Beam pipeline option is taken as
Beam spells it:

    python pipelines/caption.py --input 'gs://bucket/shards/*.tar' --output gs://bucket/out --model ORG/NAME \\
        --device cuda --runner=FlinkRunner --flink_master=HOST:8081 \\
        --environment_type=EXTERNAL --environment_config=localhost:50000

Where the workers are elsewhere, `--device` must say what they have, and `--output` and the model must be
where they can reach them. The same command again does only what is not committed yet.
Exit status: 0 done, 1 failed, 2 bad arguments, 3 done but some units could not be read (run again).
"""

import sys

from mmbeam.cli import entry

if __name__ == "__main__":
    sys.argv.insert(1, "caption")
    entry()
