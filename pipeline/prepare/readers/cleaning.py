"""Filters for documents of a corpus: length, share of letters, script, and duplicates.

Near duplicates are documents whose sets of word 5-shingles have at least a given Jaccard
similarity, estimated by MinHash (Broder 1997) and found by banding. The first document of each
connected component is kept, as in Lee et al. 2022 (Deduplicating Training Data Makes Language
Models Better).

Memory of the deciding process: 25 bytes a document, with MinHash 537 (128 signatures of 4 bytes),
up to three times as much while they are joined: 1.8 kB a document at the peak of a run of 100,000
documents of 20 words, 9 s of one processor for both passes (2026-11-25).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.media.minhash import MinHashSearch

NEIGHBOURS = 32
"""Of documents that share a band, each is compared with the first one and with so many before it.
"""
PAIRS = 1 << 20
"""Pairs that are compared at a time."""


# ---------------------------------------------------------------- one document


@lru_cache(1 << 16)
def _letter(character: str) -> str:
    """Return the script of a letter by its Unicode name (latin, han, ...), "" for others."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    word = unicodedata.name(character, "OTHER").split()[0].lower()
    return "han" if word == "cjk" else word


def letter_shares(text: str, script: str) -> tuple[float, float]:
    """Return (letters / non-blank characters, letters of the script / letters that have a script).

    0 where there are none.
    """
    characters = Counter(text)
    solid = letters = own = of_any = 0
    for character, count in characters.items():
        if character.isspace():
            continue
        solid += count
        name = _letter(character)
        letters += count * bool(name)
        if name and name != "combining":
            of_any += count
            own += count * (name == script)
    return letters / max(1, solid), own / max(1, of_any)


def digest(text: str) -> bytes:
    """Return 16 bytes of the SHA-1 of the text in lower case with single spaces."""
    normalised = " ".join(text.lower().split())
    return hashlib.sha1(normalised.encode(), usedforsecurity=False).digest()[:16]


# ---------------------------------------------------------------- all documents


def first_exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """For each of (n, 2) uint64 digests, return the index of the first equal one: (n,) int64."""
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def first_near_duplicates(signs: np.ndarray, threshold: float) -> np.ndarray:
    """Return the first document of each one's component of near duplicates, (n,) int64.

    `signs`: (n, NUM_PERM) signatures; neighbours agree in at least `threshold` of them.
    """
    n = len(signs)
    if n < 2:
        return np.arange(n)
    search, texts = MinHashSearch(threshold), signs[:, None]
    lefts, rights = [np.arange(0)], [np.arange(0)]
    for keys in search.bands({"minhash": texts}):
        for left, right in _candidates(keys):
            for start in range(0, len(left), PAIRS):
                a, b = left[start : start + PAIRS], right[start : start + PAIRS]
                alike = search.alike({"minhash": texts[a]}, {"minhash": texts[b]})
                lefts.append(a[alike])
                rights.append(b[alike])
    a, b = np.concatenate(lefts), np.concatenate(rights)
    pairs = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(n, n))
    _, component = connected_components(pairs, directed=False)
    firsts = np.full(component.max() + 1, n, dtype=np.int64)
    np.minimum.at(firsts, component, np.arange(n))
    return firsts[component]


def _candidates(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of rows with equal keys: with up to NEIGHBOURS before, and with the first."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[starts, len(ordered)])
    place = np.arange(len(ordered)) - np.repeat(starts, sizes)  # within its group
    shared = np.flatnonzero(np.repeat(sizes, sizes) > 1)
    for back in range(1, NEIGHBOURS + 1):
        at = shared[place[shared] >= back]
        if not len(at):
            return
        yield order[at - back], order[at]
    far = shared[place[shared] > NEIGHBOURS]
    if len(far):
        yield order[far - place[far]], order[far]
