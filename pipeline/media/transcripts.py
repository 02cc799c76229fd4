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
from typing import Any, NamedTuple, TypedDict

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from pipeline.core.ragged import lengths, pad, ragged
from pipeline.media.words import UNSPACED

BLANK = "<blank>"
"""Name of label 0, which means no label (Graves et al. 2006)."""
MAX_CHARACTERS = 500
WORD_BEGINS = "▁"
"""How sub-words write the space before a word (SentencePiece, Kudo and Richardson 2018)."""
ROWS_AT_ONCE = 256
"""Pairs whose distances are computed together."""


# ---------------------------------------------------------------- normalisation


class _Punctuation(dict[int, str]):
    """Table of what ``no_punctuation`` makes of each character, computed on demand.

    Dashes, connectors and slashes (also in fractions) become spaces; other marks and symbols are
    removed.
    """

    def __missing__(self, code: int) -> str:
        kind = unicodedata.category(chr(code))
        parts = kind in ("Pd", "Pc") or chr(code) in "/\\\u2044\u2215"
        self[code] = " " if parts else "" if kind[0] in "PS" and chr(code) != "'" else chr(code)
        return self[code]


class _Format(dict[int, str]):
    """Table of what ``nfkc`` makes of each character before composition, computed on demand.

    Format characters are removed, except for those that join letters or keep them apart.
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
    """Compose letters and accents, as ``nfkc`` does.

    A change of case decomposes some, and removing a mark between them brings others together.
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
"""Rules of normalisation by name.

apostrophe: its typographic forms become ', also those that nfkc would make (of ŉ). nfkc: Unicode's
compatibility composition (UAX 15), without format characters (Cf: soft hyphens, zero-width spaces,
byte order marks) except for joiner and non-joiner, which spell words. no_punctuation: Unicode's
marks (P) and symbols (S) are removed, except for '; dashes, underscores and slashes become spaces,
also that of ½, which is 1 2. spaces: white space becomes single spaces, none at the ends. A text
that was normalised by the rules of ``rules_of`` is not changed by them again.
"""


def rules_of(case: str, punctuation: str) -> str:
    """Return the names of the rules, in order, separated by spaces, as state and results show them.

    ``case`` is upper, lower or keep, ``punctuation`` drop or keep.
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
    """Apply the named rules to a text. Raises ValueError for an unknown rule."""
    for name in rules.split():
        if name not in RULES:
            raise ValueError(
                f"normalization {rules!r}: there is no rule {name!r}; rules are {', '.join(RULES)}"
            )
        text = RULES[name](text)
    return text


# ---------------------------------------------------------------- alphabets


class AlphabetState(TypedDict):
    """An `Alphabet` in JSON."""

    labels: list[str]
    characters: str
    tokenizer: str


@dataclass(frozen=True)
class Alphabet:
    """Labels of normalised texts."""

    labels: tuple[str, ...]
    """Names by number, the blank first."""
    characters: str
    """All those of the training texts."""
    tokenizer: str = ""
    """JSON of the sub-words, "" where each character is a label."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> Alphabet:
        """Make an alphabet of the characters of normalised texts, sorted.

        Raises ValueError for no character and for more than 500.
        """
        characters = _characters(texts)
        if len(characters) > MAX_CHARACTERS:
            raise ValueError(
                f"they hold {len(characters)} different characters, more than {MAX_CHARACTERS} "
                f"(the first ones: {characters[:20]!r}): set units: subwords, "
                "with a vocabulary of some thousands, or look whether this is the column of "
                "the transcripts"
            )
        return cls((BLANK, *characters), characters)

    @classmethod
    def of_subwords(cls, texts: Sequence[str], vocabulary: int) -> Alphabet:
        """Make an alphabet of at most ``vocabulary`` labels by byte pair encoding (Sennrich et al.
        2016).

        Raises ValueError where the characters alone are as many.
        """
        characters = _characters(texts)
        if len(characters) + 2 >= vocabulary:
            raise ValueError(
                f"they hold {len(characters)} different characters, so that vocabulary "
                f"{vocabulary} has no room for sub-words: set vocabulary to "
                f"{4 * len(characters)} or so, or units: characters"
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
        return cls((BLANK, *named), characters, tokenizer.to_str())

    @classmethod
    def from_state(cls, state: AlphabetState) -> Alphabet:
        return cls(tuple(state["labels"]), state["characters"], state["tokenizer"])

    def state(self) -> AlphabetState:
        """JSON for ``from_state``."""
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
        """The text of each label."""
        return (
            "",
            *(
                label.replace(WORD_BEGINS, " ") if self.tokenizer else label
                for label in self.labels[1:]
            ),
        )

    def describe_unknown(self, text: str) -> str:
        """Describe the characters of a normalised text that the alphabet lacks; "" for none."""
        unknown = [
            f"{letter!r} ({count}x)"
            for letter, count in sorted(Counter(text).items())
            if letter not in self.characters
        ]
        more = f", and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        return f"no training transcript holds {', '.join(unknown[:8])}{more}" if unknown else ""

    def encode(self, text: str) -> np.ndarray:
        """Return (L,) int32 labels of a normalised text, all of whose characters are known."""
        numbers = (
            [one + 1 for one in self._trained.encode(text).ids]
            if self.tokenizer
            else [self._number[letter] for letter in text]
        )
        return np.array(numbers, dtype=np.int32)

    def decode(self, labels: Iterable[int]) -> str:
        """Return the text of labels, single spaces between words; numbers below 1 are skipped."""
        return " ".join("".join(self._pieces[label] for label in labels if label > 0).split())

    def words(
        self, labels: np.ndarray, first: np.ndarray, last: np.ndarray, segmented: bool = False
    ) -> list[tuple[str, int, int]]:
        """Return (word, first frame, last frame) of labels (L,) on the frames ``first`` to ``last``
        (L,).

        In scripts without spaces each character is a word, unless ``segmented`` says that the
        transcripts have spaces between words (`are_segmented`).
        """
        out: list[tuple[str, int, int]] = []
        letters = [
            (letter, int(a), int(b))
            for label, a, b in zip(labels, first, last, strict=True)
            if label > 0
            for letter in self._pieces[label]
        ]
        before = " "
        for letter, a, b in letters:
            if not letter.isspace():
                if before.isspace() or not (segmented or _is_one_word(before, letter)):
                    out.append((letter, a, b))
                else:
                    word, begin, _ = out[-1]
                    out[-1] = (word + letter, begin, b)
            before = letter
        return out


def _is_one_word(before: str, letter: str) -> bool:
    """Return whether neighbouring letters are of one word; a mark is of that of its letter."""
    is_mark = unicodedata.category(letter)[0] == "M"
    return is_mark or UNSPACED.search(before + letter) is None


def _num_unspaced(word: str) -> int:
    """Count the letters of a word that are of a script without spaces, without marks."""
    return sum(unicodedata.category(letter)[0] != "M" for letter in UNSPACED.findall(word))


def _characters(texts: Iterable[str]) -> str:
    characters = "".join(sorted(set().union(*map(set, texts))))
    if not characters.strip():
        raise ValueError("they hold no character once they are normalised")
    return characters


def repeats(labels: np.ndarray) -> int:
    """Count labels (L,) that equal the one before: CTC needs a blank between them, which takes a
    frame.
    """
    return int((labels[1:] == labels[:-1]).sum())


# ---------------------------------------------------------------- edit distances


def edit_distances(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> np.ndarray:
    """Return (n,) int64 Levenshtein distances between ``ours`` and their partners (Levenshtein
    1966).

    Sequences are integers of at least 0. Many pairs are computed together, a column of their tables
    in one step: torchaudio and a plain loop take 10 ms a pair of 200 letters in Python.
    """
    out = np.zeros(len(ours), dtype=np.int64)
    order = np.argsort([len(one) for one in ours], kind="stable")
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = order[start : start + ROWS_AT_ONCE]
        a, b = (ragged(side[row] for row in rows) for side in (ours, theirs))
        ends = lengths(a), lengths(b)
        a, b = pad(a, fill=-1), pad(b, fill=-2)
        ramp = np.arange(b.shape[1] + 1)
        table = np.broadcast_to(ramp, (len(rows), len(ramp)))
        out[rows] = ends[1]  # of those that are empty
        for i in range(a.shape[1]):
            replaced = table[:, :-1] + (b != a[:, i : i + 1])
            deleted = table[:, 1:] + 1
            change = np.minimum(replaced, deleted)
            change = np.concatenate([np.full((len(rows), 1), i + 1), change], axis=1)
            # insertions: a value further left, plus 1 for each column between
            table = np.minimum.accumulate(change - ramp, axis=1) + ramp
            done = np.flatnonzero(ends[0] == i + 1)
            out[rows[done]] = table[done, ends[1][done]]
    return out


def errors(said: Sequence[str], right: Sequence[str]) -> dict[str, np.ndarray]:
    """Count errors and units of normalised hypotheses and references.

    ``word_errors``, ``words``, ``char_errors`` and ``chars`` (n,) int64: edit distances, and how
    many words and characters (spaces too) the references have. WER and CER are the ratios of their
    sums, as in jiwer.
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
    """Make subtitles of {word, start, end} in the order of time; a word longer than a line has its
    own.

    In scripts without spaces none is between words, unless a word has several letters of one: then
    the transcripts had spaces (`Alphabet.words`).
    """
    words = list(words)
    segmented = any(_num_unspaced(entry["word"]) > 1 for entry in words)
    entries: list[tuple[float, float, list[str]]] = []
    for entry in words:
        word, start, end = entry["word"], float(entry["start"]), float(entry["end"])
        if entries:
            begun, until, lines = entries[-1]
            space = " " if segmented or _is_one_word(lines[-1][-1], word[0]) else ""
            fits = len(lines[-1]) + len(space) + len(word) <= LINE_CHARACTERS
            if (
                end - begun <= CUE_SECONDS
                and start - until < PAUSE_SECONDS
                and (fits or len(lines) < CUE_LINES)
            ):
                lines[-1:] = [f"{lines[-1]}{space}{word}"] if fits else [lines[-1], word]
                entries[-1] = (begun, max(until, end), lines)
                continue
        entries.append((start, end, [word]))
    following = [*(start for start, _, _ in entries), float("inf")][1:]
    return [
        Cue(start, max(min(end, after), min(start + SHOWN_SECONDS, after)), tuple(lines))
        for (start, end, lines), after in zip(entries, following, strict=True)
    ]


def srt(shown: Iterable[Cue]) -> str:
    """Format cues as a SubRip file."""
    return "".join(
        f"{number}\n{_clock(cue.start)} --> {_clock(cue.end)}\n" + "\n".join(cue.lines) + "\n\n"
        for number, cue in enumerate(shown, 1)
    )


def _clock(seconds: float) -> str:
    total_seconds, milliseconds = divmod(round(seconds * 1000), 1000)
    minutes, second = divmod(total_seconds, 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02d}:{minute:02d}:{second:02d},{milliseconds:03d}"


def file_names(recordings: Iterable[str], suffix: str) -> dict[str, str]:
    """Return a distinct relative file name for each recording (a path, a URI or any name).

    Names are distinct without regard to case, and none leads out of its folder. Common folders are
    left out, and so is the recording's suffix, unless two would then have one name.
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
        numbered = (f"{path}-{number}" for number in range(2, len(names) + 2))
        tries = (str(bare), str(path), *numbered)
        out[name] = next(one for one in tries if one.casefold() not in taken) + suffix
        taken.add(out[name].removesuffix(suffix).casefold())
    return out


def _safe(part: str) -> str:
    """Make one part of a path valid on every file system.

    No control characters, nothing that Windows rejects, at most 100 characters; "" for spaces.
    """
    return re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", part).strip()[:100]
