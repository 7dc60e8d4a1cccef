"""How Beam sees a Batch: what it weighs. It is registered for Batch when mmbeam.transforms is imported.

Beam samples the sizes of all elements, fused or not, and with its own coder a size is the length of the
pickle: a copy of the first windows and then of one in many, pixels and all, for a counter.
"""

import pickle

from apache_beam import coders

from mmbeam.types import Batch


class BatchCoder(coders.Coder):
    """Weighs a Batch without touching its pixels. It pickles one only where a shuffle was put into the flow."""

    def encode(self, batch: Batch) -> bytes:
        return pickle.dumps(batch, protocol=5)

    def decode(self, encoded: bytes) -> Batch:
        batch: Batch = pickle.loads(encoded)
        return batch

    def estimate_size(self, batch: Batch) -> int:
        """Decoded bytes of the samples, and of what was made of them."""
        made: int = sum(feature.nbytes for feature in batch.features.values())
        return made + sum(sample.nbytes for sample in batch.samples)

    def is_deterministic(self) -> bool:
        return False

    def to_type_hint(self) -> type[Batch]:
        return Batch


coders.registry.register_coder(Batch, BatchCoder)
