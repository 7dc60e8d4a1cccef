"""`python -m mmbeam` is the command line."""

import sys

from mmbeam.cli import main

sys.exit(main())
