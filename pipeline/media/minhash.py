"""Texts that are nearly the same: MinHash signatures of their word shingles.

Near duplicates are texts whose sets of word 5-shingles have at least a given Jaccard similarity,
estimated by MinHash (Broder 1997) and found by banding.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping

import numpy as np

from pipeline.media.words import WORD

NUM_PERM, SHINGLE = 128, 5
VERSION = 2
"""Of the rule by which signatures are made: raise it where the words of a text or their hashes
change, so that a folder that was prepared by the old rule is not taken for one of the new rule.
"""
RECALL = 0.999
"""Two documents exactly at the threshold share a band with at least this probability."""
BATCH_SIZE = 8192
"""Shingles that are hashed at a time: those of a book would take gigabytes."""


def shingles(text: str) -> set[bytes]:
    """Return all runs of SHINGLE words, in lower case and without punctuation.

    A shorter text has one shingle of all its words; one without words has its punctuation.
    """
    words = WORD.findall(unicodedata.normalize("NFC", text).lower()) or text.split()
    starts = range(max(1, len(words) - SHINGLE + 1))
    return {" ".join(words[i : i + SHINGLE]).encode() for i in starts}


def signatures(texts: Iterator[str]) -> Iterator[np.ndarray]:
    """Yield the MinHash signature of each text, (NUM_PERM,) uint32."""
    # here: datasketch is slow to import, and each worker that reads texts imports this module
    from datasketch import MinHash

    empty = MinHash(num_perm=NUM_PERM, seed=1)
    for text in texts:
        signature, runs = empty.copy(), list(shingles(text))
        for start in range(0, len(runs), BATCH_SIZE):
            signature.update_batch(runs[start : start + BATCH_SIZE])
        yield signature.hashvalues.astype(np.uint32)


def rows_per_band(threshold: float) -> int:
    """Return how many rows of a signature make a band.

    The more there are, the fewer pairs of texts share a band and are compared. It is the largest
    number with which a pair at the threshold still shares one with probability RECALL.
    """
    return max(
        (r for r in range(1, NUM_PERM + 1) if 1 - (1 - threshold**r) ** (NUM_PERM // r) >= RECALL),
        default=1,
    )


def hash_band(band: np.ndarray) -> np.ndarray:
    """Hash the rows of a band (n, r) to (n,) uint64. A collision costs one comparison."""
    out = np.zeros(len(band), dtype=np.uint64)
    for column in band.T:
        out = (out ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        out ^= out >> np.uint64(29)
    return out


class MinHashSearch:
    """Compares rows of one text or of two by ``minhash`` (n, texts, NUM_PERM).

    Rows are alike when each of their texts is. Two pairs at the threshold in both texts share a
    band less often than two texts do.
    """

    method = "MinHash of words"

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.settings = (threshold,)

    def bands(self, signatures: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
        values, rows = signatures["minhash"], rows_per_band(self.threshold)
        for first in range(0, NUM_PERM - rows + 1, rows):
            yield hash_band(values[:, :, first : first + rows].reshape(len(values), -1))

    def alike(
        self, signatures: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        same = np.count_nonzero(signatures["minhash"] == others["minhash"], axis=2)
        return (same >= self.threshold * NUM_PERM).all(1)
