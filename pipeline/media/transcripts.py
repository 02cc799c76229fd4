"""Transcripts of speech: normalised by named rules, as labels of an alphabet, compared by edit
distance, and as subtitles.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pipeline.core.ragged import lengths, padded, ragged

BLANK = "<blank>"
"""The name of label 0, which stands for no label at all (Graves et al. 2006)."""
MOST_CHARACTERS = 500
WORD_BEGINS = "▁"
"""How sub-words write the space before a word (SentencePiece, Kudo and Richardson 2018)."""
ROWS_AT_ONCE = 256
"""Pairs whose distances are counted together."""


# ---------------------------------------------------------------- normalisation


class _Punctuation(dict[int, str]):
    """What ``no_punctuation`` makes of each character's code, found out once: dashes, connectors
    and slashes (those of fractions too) part words, other marks and symbols vanish.
    """

    def __missing__(self, code: int) -> str:
        kind = unicodedata.category(chr(code))
        parts = kind in ("Pd", "Pc") or chr(code) in "/\\\u2044\u2215"
        self[code] = " " if parts else "" if kind[0] in "PS" and chr(code) != "'" else chr(code)
        return self[code]


class _Format(dict[int, str]):
    """What ``nfkc`` makes of each character's code before it composes: characters of format vanish,
    but for those that join letters or keep them apart.
    """

    def __missing__(self, code: int) -> str:
        self[code] = (
            ""
            if unicodedata.category(chr(code)) == "Cf" and chr(code) not in "\u200c\u200d"
            else chr(code)
        )
        return self[code]


_PUNCTUATION, _FORMAT = _Punctuation(), _Format()
_APOSTROPHES = str.maketrans({**dict.fromkeys("’‘ʼ‛`´\uff40\u1fef\u1ffd", "'"), "ŉ": "'n"})


def _composed(text: str) -> str:
    """Letters and accents as one character again, as ``nfkc`` has them: a change of case parts
    some, and where a mark between them goes they come together.
    """
    return unicodedata.normalize("NFC", text)


RULES: dict[str, Callable[[str], str]] = {
    "apostrophe": lambda text: text.translate(_APOSTROPHES),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text.translate(_FORMAT)),
    "upper": lambda text: _composed(text.upper()),
    "lower": lambda text: _composed(text.lower()),
    "no_punctuation": lambda text: _composed(text.translate(_PUNCTUATION)),
    "spaces": lambda text: " ".join(text.split()),
}
"""Rules of normalisation by name. apostrophe: its typographic forms become ', those too that nfkc
would make (of ŉ). nfkc: Unicode's compatibility composition (UAX 15), without characters of format
(Cf: soft hyphens, spaces of no width, byte order marks), but for the joiner and non-joiner, which
spell words. no_punctuation: Unicode's marks (P) and symbols (S) go, but for '; dashes, underscores
and slashes become spaces, also that of ½, which is 1 2. spaces: white space becomes single spaces,
none at the ends. A text that went through the rules of ``rules_of`` stays as it is when it goes
through them again.
"""


def rules_of(case: str, punctuation: str) -> str:
    """Names of the rules, in their order, with spaces between them: what state and results say of a
    text. ``case`` is upper, lower or keep, ``punctuation`` drop or keep.
    """
    return " ".join(
        [
            "apostrophe",
            "nfkc",
            *([case] if case != "keep" else []),
            *(["no_punctuation"] if punctuation == "drop" else []),
            "spaces",
        ]
    )


def normalised(text: str, rules: str) -> str:
    """The text after the named rules. Raises ValueError for a rule that is not known."""
    for name in rules.split():
        if name not in RULES:
            raise ValueError(
                f"normalization {rules!r}: there is no rule {name!r}; rules are {', '.join(RULES)}"
            )
        text = RULES[name](text)
    return text


# ---------------------------------------------------------------- alphabets


@dataclass(frozen=True)
class Alphabet:
    """Labels of normalised texts. ``labels``: their names by number, the blank first.
    ``characters``: all that the training texts hold. ``tokenizer``: JSON of the sub-words, "" where
    each character is a label.
    """

    labels: tuple[str, ...]
    characters: str
    tokenizer: str = ""

    @classmethod
    def of(cls, texts: Iterable[str]) -> Alphabet:
        """The characters of normalised texts, sorted; the space parts words. Raises ValueError for
        no character and for more than 500.
        """
        found = _characters(texts)
        if len(found) > MOST_CHARACTERS:
            raise ValueError(
                f"they hold {len(found)} different characters, more than {MOST_CHARACTERS} "
                f"(the first ones: {found[:20]!r}): set units: subwords, "
                "with a vocabulary of some thousands, or look whether this is the column of "
                "the transcripts"
            )
        return cls((BLANK, *found), found)

    @classmethod
    def of_subwords(cls, texts: Sequence[str], vocabulary: int) -> Alphabet:
        """``vocabulary`` labels at most, the blank with them: byte pair encoding (Sennrich et al.
        2016) trained on normalised texts.

        Raises ValueError where the characters alone are as many.
        """
        found = _characters(texts)
        if len(found) + 2 >= vocabulary:
            raise ValueError(
                f"they hold {len(found)} different characters, so that vocabulary {vocabulary} "
                "has no room for sub-words: set vocabulary to "
                f"{4 * len(found)} or so, or units: characters"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=WORD_BEGINS, prepend_scheme="always"
        )
        tokenizer.train_from_iterator(
            texts,
            trainers.BpeTrainer(vocab_size=vocabulary - 1, special_tokens=[], show_progress=False),
        )
        named = sorted(tokenizer.get_vocab(), key=lambda token: tokenizer.get_vocab()[token])
        return cls((BLANK, *named), found, tokenizer.to_str())

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Alphabet:
        return cls(tuple(state["labels"]), state["characters"], state["tokenizer"])

    def state(self) -> dict[str, Any]:
        """JSON from which ``from_state`` makes it again."""
        return {
            "labels": [*self.labels],
            "characters": self.characters,
            "tokenizer": self.tokenizer,
        }

    @cached_property
    def _number(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    @cached_property
    def _trained(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer)

    @cached_property
    def _pieces(self) -> tuple[str, ...]:
        """What each label writes."""
        return (
            "",
            *(
                label.replace(WORD_BEGINS, " ") if self.tokenizer else label
                for label in self.labels[1:]
            ),
        )

    def strange(self, text: str) -> str:
        """ "" or which characters of a normalised text are outside the alphabet, and how often they
        come.
        """
        often = Counter(text)
        strange = [
            f"{letter!r} ({count}x)"
            for letter, count in sorted(often.items())
            if letter not in self.characters
        ]
        more = f", and {len(strange) - 8} more" if len(strange) > 8 else ""
        return f"no training transcript holds {', '.join(strange[:8])}{more}" if strange else ""

    def encode(self, text: str) -> np.ndarray:
        """(L,) int32 label numbers of a normalised text, all of whose characters are known."""
        numbers = (
            [one + 1 for one in self._trained.encode(text).ids]
            if self.tokenizer
            else [self._number[letter] for letter in text]
        )
        return np.array(numbers, dtype=np.int32)

    def decode(self, labels: Iterable[int]) -> str:
        """The text of label numbers, single spaces between its words; numbers below 1 write
        nothing.
        """
        return " ".join("".join(self._pieces[label] for label in labels if label > 0).split())

    def words(
        self, labels: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> list[tuple[str, int, int]]:
        """(word, its first frame, its last one) of label numbers (L,) that lie on the frames
        ``first`` to ``last`` (L,).
        """
        out: list[tuple[str, int, int]] = []
        letters = [
            (letter, int(a), int(b))
            for label, a, b in zip(labels, first, last, strict=True)
            if label > 0
            for letter in self._pieces[label]
        ]
        inside = False
        for letter, a, b in letters:
            if letter.isspace():
                inside = False
            elif inside:
                word, begin, _ = out[-1]
                out[-1] = (word + letter, begin, b)
            else:
                out.append((letter, a, b))
                inside = True
        return out


def _characters(texts: Iterable[str]) -> str:
    found = "".join(sorted(set().union(*map(set, texts))))
    if not found.strip():
        raise ValueError("they hold no character once they are normalised")
    return found


def repeats(labels: np.ndarray) -> int:
    """How many labels (L,) equal the one before: CTC parts them by a blank, which takes a frame of
    its own.
    """
    return int((labels[1:] == labels[:-1]).sum())


# ---------------------------------------------------------------- edit distances


def edit_distances(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) int64: how many insertions, deletions and substitutions turn each of ``ours`` (whole
    numbers, at least 0) into its partner (Levenshtein 1966).

    Many pairs at a time, a column of their tables in one step: torchaudio's and a plain loop take a
    pair in Python, 10 ms for 200 letters.
    """
    out = np.zeros(len(ours), dtype=np.int64)
    order = np.argsort([len(one) for one in ours], kind="stable")
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = order[start : start + ROWS_AT_ONCE]
        a, b = (ragged(side[row] for row in rows) for side in (ours, theirs))
        ends = lengths(a), lengths(b)
        a, b = padded(a, fill=-1), padded(b, fill=-2)
        ramp = np.arange(b.shape[1] + 1)
        table = np.broadcast_to(ramp, (len(rows), len(ramp)))
        out[rows] = ends[1]  # of those that are empty
        for i in range(a.shape[1]):
            change = np.minimum(table[:, :-1] + (b != a[:, i : i + 1]), table[:, 1:] + 1)
            change = np.concatenate([np.full((len(rows), 1), i + 1), change], axis=1)
            table = (
                np.minimum.accumulate(change - ramp, axis=1) + ramp
            )  # insertions: the least of all that end further left
            done = np.flatnonzero(ends[0] == i + 1)
            out[rows[done]] = table[done, ends[1][done]]
    return out


def errors(said: Sequence[str], right: Sequence[str]) -> dict[str, np.ndarray]:
    """``word_errors``, ``words``, ``char_errors`` and ``chars`` (n,) int64 of normalised hypotheses
    and references: their edit distances, and how many words and characters (spaces too) the
    references have. WER and CER are the ratios of their sums, as jiwer has it.
    """
    number: dict[str, int] = {}
    words = [
        [
            np.array(
                [number.setdefault(word, len(number)) for word in text.split()], dtype=np.int64
            )
            for text in side
        ]
        for side in (said, right)
    ]
    letters = [
        [np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64) for text in side]
        for side in (said, right)
    ]
    return {
        "word_errors": edit_distances(*words),
        "words": lengths(ragged(words[1])),
        "char_errors": edit_distances(*letters),
        "chars": lengths(ragged(letters[1])),
    }


# ---------------------------------------------------------------- subtitles

CUE_SECONDS, LINE_CHARACTERS, CUE_LINES, PAUSE_SECONDS, SHOWN_SECONDS = 7.0, 42, 2, 1.5, 1.0
"""A cue lasts at most 7 s and has two lines of 42 characters, as broadcasters advise; it ends
before a pause of 1.5 s, and is shown for 1 s at least where the next one leaves room.
"""


class Cue(NamedTuple):
    """Lines that are shown from ``start`` to ``end`` (seconds)."""

    start: float
    end: float
    lines: tuple[str, ...]


def cues(words: Iterable[Mapping[str, Any]]) -> list[Cue]:
    """Subtitles of {word, start, end} in the order of their times; a word that is longer than a
    line has one for itself.
    """
    held: list[tuple[float, float, list[str]]] = []
    for one in words:
        word, start, end = one["word"], float(one["start"]), float(one["end"])
        if held:
            begun, until, lines = held[-1]
            fits = len(lines[-1]) + 1 + len(word) <= LINE_CHARACTERS
            if (
                end - begun <= CUE_SECONDS
                and start - until < PAUSE_SECONDS
                and (fits or len(lines) < CUE_LINES)
            ):
                lines[-1:] = [f"{lines[-1]} {word}"] if fits else [lines[-1], word]
                held[-1] = (begun, max(until, end), lines)
                continue
        held.append((start, end, [word]))
    following = [*(start for start, _, _ in held), float("inf")][1:]
    return [
        Cue(start, max(min(end, after), min(start + SHOWN_SECONDS, after)), tuple(lines))
        for (start, end, lines), after in zip(held, following, strict=True)
    ]


def srt(shown: Iterable[Cue]) -> str:
    """A SubRip file of cues."""
    return "".join(
        f"{number}\n{_clock(one.start)} --> {_clock(one.end)}\n" + "\n".join(one.lines) + "\n\n"
        for number, one in enumerate(shown, 1)
    )


def _clock(seconds: float) -> str:
    whole = round(seconds * 1000)
    return f"{whole // 3600000:02d}:{whole // 60000 % 60:02d}:{whole // 1000 % 60:02d},{whole % 1000:03d}"


def file_names(recordings: Iterable[str], suffix: str) -> dict[str, str]:
    """A relative file name for each recording (a path, a URI or any name), all different, also
    where case is ignored; none leads out of its folder.

    Folders that all of them share are left out, and so is the recording's own suffix, unless two
    would then have one name.
    """
    names = sorted(set(recordings))
    parts = {
        name: [
            part
            for part in map(_safe, re.split(r"[/\\]", name.partition("://")[2] or name))
            if part.strip(".")
        ]
        or ["recording"]
        for name in names
    }
    folders = [part[:-1] for part in parts.values()]
    shared = next(
        (i for i, level in enumerate(zip(*folders, strict=False)) if len(set(level)) > 1),
        min(map(len, folders), default=0),
    )
    out: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        path = PurePosixPath(*parts[name][shared:])
        bare = path.with_suffix("") if re.fullmatch(r"\.[A-Za-z]\w{1,4}", path.suffix) else path
        tries = (str(bare), str(path), *(f"{path}-{number}" for number in range(2, len(names) + 2)))
        out[name] = next(one for one in tries if one.casefold() not in taken) + suffix
        taken.add(out[name].removesuffix(suffix).casefold())
    return out


def _safe(part: str) -> str:
    """One part of a path as every file system takes it: no control character, none of those that
    Windows refuses, 100 characters at most; "" for spaces.
    """
    return re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", part).strip()[:100]
