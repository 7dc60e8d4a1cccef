"""Input and output: patterns to shards to units, byte streams to samples, rows to files. No Beam, no torch."""
