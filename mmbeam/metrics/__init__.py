"""Scores of what came out, as sums that add up: text against references, retrieval, linear probes.

Pure: no I/O but of a file of references, no Beam and no torch. The libraries behind a score (sacrebleu,
rouge-score, jiwer, scikit-learn) are imported when it is asked for. Over a corpus, mmbeam.transforms adds up
the `Counts` of text.py and the document frequencies of cider.py; retrieval.py and probe.py work on the
vectors themselves, in one process.
"""
