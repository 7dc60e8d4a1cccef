"""mmbeam: embeddings and captions for buckets of image-text-audio shards.

Nothing heavy is imported here, so that `mmbeam --help` is fast.
"""

__version__ = "0.1.0"
