"""Label every sample of shards, or of computed features: a pipeline file to submit to a runner.

    python pipelines/label.py --input 'shards/*.tar' --output out --model google/vit-base-patch16-224

runs in this process. The arguments are those of `mmbeam label` (see --help). Every Apache Beam pipeline option is
accepted as Beam spells it:

    python pipelines/label.py --input 'gs://bucket/shards/*.tar' --output gs://bucket/out --model ORG/NAME \\
        --device cuda --runner=FlinkRunner --flink_master=HOST:8081 \\
        --environment_type=EXTERNAL --environment_config=localhost:50000

If the workers are on other machines, `--device` names their device, and they must be able to reach `--output` and the
model. The same command again does only the units that are not committed.
Exit status: 0 done, 1 failed, 2 invalid arguments, 3 done but some shards could not be read (run again).
"""

import sys

from mmbeam.cli import entry

if __name__ == "__main__":
    sys.argv.insert(1, "label")
    entry()
