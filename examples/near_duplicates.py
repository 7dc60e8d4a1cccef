"""Print the pairs of near-duplicates among embedded pictures, the most similar first.

Usage: near_duplicates.py VECTORS [THRESHOLD]
"""

import sys

import numpy as np

import mmbeam

BLOCK_ROWS = 1024


def near_duplicates(output: str, threshold: float) -> list[tuple[float, str, str]]:
    """Return the cosine similarity and the keys of each pair of pictures at `threshold` or above."""
    rows = mmbeam.read_rows(output, ["key", "image_embedding"])
    rows = rows.filter(rows["image_embedding"].is_valid())
    keys = rows["key"].to_pylist()
    vectors = np.array(rows["image_embedding"].to_pylist(), np.float32)  # [pictures, width]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    pairs = []
    for first in range(0, len(vectors), BLOCK_ROWS):
        similarity = vectors[first : first + BLOCK_ROWS] @ vectors[first:].T
        for row, column in np.argwhere(np.triu(similarity >= threshold, k=1)):
            pairs.append((float(similarity[row, column]), keys[first + row], keys[first + column]))
    return sorted(pairs, reverse=True)


def main() -> None:
    """Read the arguments, and print the pairs."""
    threshold = float(sys.argv[2]) if len(sys.argv) > 2 else 0.95
    for similarity, first, second in near_duplicates(sys.argv[1], threshold):
        print(f"{similarity:.4f}  {first}  {second}")


if __name__ == "__main__":
    main()
