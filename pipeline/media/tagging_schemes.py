"""Spans of texts: entities in rows of tags, counted as by conlleval and seqeval, and answers,
compared as by SQuAD's evaluation.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.core.arrow_lists import is_list

LETTERS = {"bio": "BI", "bioes": "BIES"}
"""Prefixes of a scheme: begin, inside, end and single. BIO is also called IOB2 (Tjong Kim Sang and
Veenstra 1999); BIOES adds the last word of an entity and entities of one word (Ratinov and Roth
2009, who call them L and U).
"""

PUNCTUATION = frozenset(string.punctuation)


# ---------------------------------------------------------------- columns


def texts(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Return the values of a column of texts, or of lists of texts, also where stored as bytes.

    Bytes that are not UTF-8 become U+FFFD: the modality leaves such a row out, and it must not stop
    the others.
    """
    return _decoded(column.cast(_of_bytes(column.type)).to_pylist())


def _of_bytes(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _of_bytes(kind.value_type)
    if is_list(kind):
        return pa.large_list(_of_bytes(kind.value_type))
    return pa.large_binary()


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


# ---------------------------------------------------------------- tags


def scheme(tags: Iterable[str]) -> str:
    """Return ``bio``, ``bioes`` or, for tags without prefixes (part of speech), ``none``.

    Raises ValueError for tags of no scheme: BILOU, prefixes without a type, prefixes at some tags
    only.
    """
    named = sorted(set(tags) - {"O"})
    prefixed = [tag for tag in named if re.match("[BIESLU]-.", tag)]
    bare = [tag for tag in named if tag in ("B", "I", "E", "S")]
    if named and len(bare) == len(named):
        raise ValueError(
            f"the tags {', '.join(bare)} name no type of entity; write B-TYPE, or set scheme: "
            "none, for which they are mere classes"
        )
    if not prefixed:
        return "none"
    if len(prefixed) < len(named):
        odd = next(tag for tag in named if tag not in prefixed)
        raise ValueError(
            f"tag {odd!r} has no prefix of a scheme, {prefixed[0]!r} has one; correct it, or "
            "set scheme: none, for which all are mere classes"
        )
    letters = {tag[0] for tag in prefixed}
    if letters & {"L", "U"}:
        raise ValueError(
            f"tag {next(tag for tag in prefixed if tag[0] in 'LU')!r} is of the scheme BILOU; "
            "write it as BIOES: L- as E-, U- as S-"
        )
    return "bioes" if letters & {"E", "S"} else "bio"


@cache
def split_tag(tag: str, scheme: str) -> tuple[str, str]:
    """Return (prefix, type) of a tag, ("O", "") outside. Raises ValueError for a tag of another
    scheme.
    """
    if tag == "O":
        return "O", ""
    if tag[:1] in LETTERS[scheme] and tag[1:2] == "-" and len(tag) > 2:
        return tag[0], tag[2:]
    raise ValueError(
        f"tag {tag!r} is not of the scheme {scheme}: O, or one of "
        f"{', '.join(f'{letter}-' for letter in LETTERS[scheme])} followed by a type"
    )


def check(tags: Sequence[str], scheme: str) -> str:
    """Return "" or why a row's tags break the scheme; words are numbered from 0.

    Raises ValueError for a tag of another scheme.
    """
    if scheme == "none":
        return ""
    before, kind = "O", ""
    for place, tag in enumerate([*tags, "O"]):
        letter, own = split_tag(tag, scheme)
        goes_on = letter in "IE" and before in "BI" and own == kind
        where = "it is the first word" if place == 0 else f"word {place - 1} is {tags[place - 1]}"
        if letter in "IE" and not goes_on:
            return f"tag {tag} of word {place} has no B-{own} before it ({where})"
        if scheme == "bioes" and before in "BI" and not goes_on:
            behind = f"{tag} follows" if place < len(tags) else "no word follows"
            return (
                f"tag {tags[place - 1]} of word {place - 1} opens an entity that no E-{kind} "
                f"closes ({behind})"
            )
        before, kind = letter, own
    return ""


class Chunks(NamedTuple):
    """Entities in the order of rows and words, (m,) int64 each: row, first and last word, type
    number.
    """

    row: np.ndarray
    first: np.ndarray
    last: np.ndarray
    kind: np.ndarray


@dataclass(frozen=True)
class Tagset:
    """The tags of a task by number: ``labels`` (L,), and ``types`` (T,) of entities.

    Without a scheme each tag is a type and each word an entity.
    """

    labels: tuple[str, ...]
    types: tuple[str, ...]
    scheme: str

    @classmethod
    def of(cls, tags: Iterable[str], scheme: str) -> Tagset:
        """Return all tags that the scheme makes of the types among ``tags``, also those that no row
        has.

        O comes first, then the tags of each type, in the order of their names. Raises ValueError
        for a tag of another scheme.
        """
        if scheme == "none":
            labels = tuple(sorted(set(tags)))
            return cls(labels, labels, scheme)
        types = tuple(sorted({split_tag(tag, scheme)[1] for tag in set(tags) - {"O"}}))
        return cls(
            ("O", *(f"{letter}-{kind}" for kind in types for letter in LETTERS[scheme])),
            types,
            scheme,
        )

    @cached_property
    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (L + 1,) type number of each tag, whether it opens and whether it closes an
        entity.

        The last entry is for no word (-1).
        """
        if self.scheme == "none":
            count = len(self.labels)
            return (
                np.append(np.arange(count), -1),
                np.append(np.ones(count, bool), False),
                np.append(np.ones(count, bool), False),
            )
        parts = [*(split_tag(tag, self.scheme) for tag in self.labels), ("O", "")]
        kinds = np.array([self.types.index(kind) if kind else -1 for _, kind in parts])
        return kinds, *(
            np.array([letter in letters for letter, _ in parts]) for letters in ("BS", "ES")
        )  # pyright: ignore[reportReturnType]

    def chunks(self, tags: np.ndarray, strict: bool = False) -> Chunks:
        """Return the entities of tag numbers (n, W), -1 where there is no word.

        As conlleval reads them (and seqeval by default): a run of tags of one type, which B and S
        open and E and S close, whatever is missing. ``strict``: only those that are complete in the
        scheme (seqeval's strict mode).
        """
        padded = np.full(
            (tags.shape[0], tags.shape[1] + 2),
            -1,
            dtype=np.int64,
        )
        padded[:, 1:-1] = tags
        kind, opens, closes = (part[padded] for part in self._parts)
        cut = (kind[:, :-1] != kind[:, 1:]) | closes[:, :-1] | opens[:, 1:]
        inside = kind[:, 1:-1] >= 0
        row, first = np.nonzero(inside & cut[:, :-1])
        last = np.nonzero(inside & cut[:, 1:])[1]
        chunks = Chunks(row, first, last, kind[row, first + 1])
        if strict:
            is_complete = opens[row, first + 1] & (
                closes[row, last + 1] if self.scheme == "bioes" else True
            )
            chunks = Chunks(*(part[is_complete] for part in chunks))
        return chunks

    def repaired(self, tags: np.ndarray) -> np.ndarray:
        """Return the same entities (n, W), as conlleval reads them, in valid tags: a leading I
        becomes B.
        """
        if self.scheme == "none":
            return tags
        number = {label: i for i, label in enumerate(self.labels)}
        out = np.where(tags >= 0, number["O"], tags)
        for row, first, last, kind in zip(*self.chunks(tags), strict=True):
            name = self.types[kind]
            out[row, first : last + 1] = number[f"I-{name}"]
            out[row, first] = number[f"B-{name}"]
            if self.scheme == "bioes":
                out[row, last] = number[f"E-{name}" if last > first else f"S-{name}"]
        return out

    def counts(
        self, guess: np.ndarray, truth: np.ndarray, strict: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count entities by type, (n, T) int64 each: found and right in type and both ends, found,
        true.
        """
        rows, width, types = *truth.shape, len(self.types)
        guessed, real = self.chunks(guess, strict), self.chunks(truth, strict)

        def key(of: Chunks) -> np.ndarray:
            return ((of.row * width + of.first) * width + of.last) * types + of.kind

        def tally(of: Chunks, where: np.ndarray | slice) -> np.ndarray:
            return np.bincount((of.row * types + of.kind)[where], minlength=rows * types).reshape(
                rows, types
            )

        return (
            tally(guessed, np.isin(key(guessed), key(real))),
            tally(guessed, slice(None)),
            tally(real, slice(None)),
        )


# ---------------------------------------------------------------- answers


def normalised(answer: str) -> str:
    """Lower-case and remove ASCII punctuation, English articles and extra spaces.

    SQuAD's ``normalize_answer`` (Rajpurkar et al. 2016).
    """
    bare = "".join(letter for letter in answer.lower() if letter not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(prediction: str, gold: str) -> float:
    """Return 1 where both texts are equal after normalisation, else 0."""
    return float(normalised(prediction) == normalised(gold))


def answer_f1(prediction: str, gold: str) -> float:
    """Return the F1 of the words that both texts share after normalisation.

    Where one has no words: whether both have none (the v2.0 script, Rajpurkar et al. 2018).
    """
    guess, truth = normalised(prediction).split(), normalised(gold).split()
    if not guess or not truth:
        return float(guess == truth)
    shared = sum((Counter(guess) & Counter(truth)).values())
    return 2 * shared / (len(guess) + len(truth))


def answer_scores(prediction: str, golds: Sequence[str]) -> tuple[float, float]:
    """Return (exact match, F1), each the best over the right answers.

    "" predicts that there is no answer; so do ``golds`` that are empty after normalisation.
    """
    golds = [gold for gold in golds if normalised(gold)] or [""]
    return max(exact_match(prediction, gold) for gold in golds), max(
        answer_f1(prediction, gold) for gold in golds
    )
