"""Caption every sample of shards, or of computed features: a pipeline file to submit to a runner.

    python pipelines/caption.py --input 'shards/*.tar' --output out --model MODEL_DIR

runs in this process. For a model that was trained on features, the input is the output of `mmbeam embed`:

    python pipelines/caption.py --input FEATURES_DIR --output out --model MODEL_DIR

The arguments are those of `mmbeam caption` (see --help). Every Apache Beam pipeline option is accepted as Beam spells
it:

    python pipelines/caption.py --input 'gs://bucket/shards/*.tar' --output gs://bucket/out --model ORG/NAME \\
        --device cuda --runner=FlinkRunner --flink_master=HOST:8081 \\
        --environment_type=EXTERNAL --environment_config=localhost:50000

If the workers are on other machines, `--device` names their device, and they must be able to reach `--output` and the
model. The same command again does only the units that are not committed.
Exit status: 0 done, 1 failed, 2 invalid arguments, 3 done but some shards could not be read (run again).
"""

import sys

from mmbeam.cli import entry

if __name__ == "__main__":
    sys.argv.insert(1, "caption")
    entry()
