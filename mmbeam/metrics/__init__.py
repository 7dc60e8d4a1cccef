"""Scores of the output: text against references, retrieval, and linear probes.

Apart from reading a file of references there is no I/O, no Beam and no torch. The libraries behind a score
(sacrebleu, rouge-score, jiwer, scikit-learn) are imported when it is requested. For a corpus, mmbeam.transforms
sums the `Counts` of text.py and the document frequencies of cider.py; retrieval.py and probe.py need all
vectors in one process.
"""
