"""Runs: the output directory of a job, and the record of what was done.

    OUT/data/part-<unit>.parquet                  the rows of a unit, whose existence commits it
    OUT/_failures/part-<unit>-<attempt>.parquet   failure records; the footer of the unit's Parquet file names its file
    OUT/_mmbeam/run.json                          configuration, fingerprint, and what is recorded beside them
    OUT/_mmbeam/plan/<n>.jsonl                    work units, one file per launch that added or corrected some
    OUT/_mmbeam/commits/<unit>.json               a cache of the footers
    OUT/_mmbeam/attempts/<unit>-<attempt>.json    a mark of each attempt at a unit, until it ends by itself
    OUT/_mmbeam/stop.json, lock, summary.json

Every file is published whole (store.py). Reading a run writes nothing, so it needs no permission to write.
"""
