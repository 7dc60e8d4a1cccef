"""`python -m mmbeam` is the command line."""

from mmbeam.cli import entry

entry()
