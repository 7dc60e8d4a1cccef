"""Evaluate the output of a run: a pipeline file to submit to a runner.

    python pipelines/evaluate.py out --reference caption

runs in this process. The arguments are those of `mmbeam evaluate` (see --help). Every Apache Beam pipeline option is
accepted as Beam spells it. Texts are scored by the runner's workers, which must be able to reach the run's output and
the directory for the scores. Retrieval and probes run in the submitting process.
Exit status: 0 done, 1 failed, 2 invalid arguments.
"""

import sys

from mmbeam.cli import entry

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    entry()
