"""Scores of the output: text against references, retrieval, and linear probes.

The only I/O is reading a file of references; Beam and torch are not used. A library that a score needs (sacrebleu,
rouge-score, jiwer, scikit-learn) is imported when the score is requested. For a corpus, mmbeam.transforms sums the
`Counts` of text.py and the document frequencies of cider.py; retrieval.py and probe.py need all vectors in one process.
"""
