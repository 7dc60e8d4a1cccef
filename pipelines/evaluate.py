"""Measure what a run wrote: what one submits to a runner.

    python pipelines/evaluate.py out --reference caption

runs in this process. The arguments are those of `mmbeam evaluate` (see --help), and every Apache Beam pipeline
option is taken as Beam spells it. Texts are scored by the runner's workers, who must reach the run's output and
the place for the scores; retrieval and probes are done in the process that submits.
Exit status: 0 done, 1 failed, 2 bad arguments.
"""

import sys

from mmbeam.cli import entry

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    entry()
