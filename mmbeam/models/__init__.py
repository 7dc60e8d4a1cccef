"""Models: where their files are, how they load, where they run, and one module per family."""
