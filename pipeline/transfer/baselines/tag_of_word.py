"""Words by the tag that they have most often."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin

from pipeline.config.registry import register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind, Setting
from pipeline.media.tagging_schemes import texts


@register("baseline", "tag_of_word")
class TagOfWord(Baseline):
    """The shares of the tags that a word has in the labelled training rows, whatever the words
    around it.

    An unknown word has the shares of the words that occur once. It is the usual baseline of
    part-of-speech tagging, where it is right for about 90 % of the words: Charniak et al. 1993,
    "Equations for Part-of-Speech Tagging".
    """

    roles = ("text",)
    label_kinds = ("position_classes",)

    def inputs(self, rows: BaselineRows) -> list[str]:
        """Return the labelled words, row by row, in Unicode's form NFC."""
        assert rows.positions is not None
        words_of_rows = texts(rows.read_column("text"))
        pairs = zip(words_of_rows, rows.positions, strict=True)
        return [
            unicodedata.normalize("NFC", words[place] or "")
            for words, labelled in pairs
            for place in np.flatnonzero(labelled)
        ]

    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        return _Tags()


class _Tags(ClassifierMixin, BaseEstimator):
    """Counts of the tags of each word."""

    def fit(self, words: list[str], tags: np.ndarray) -> _Tags:
        self.classes_, numbers = np.unique(tags, return_inverse=True)
        self.counts: dict[str, np.ndarray] = {}
        for word, number in zip(words, numbers, strict=True):
            counts = self.counts.setdefault(word, np.zeros(len(self.classes_)))
            counts[number] += 1
        once = [counts for counts in self.counts.values() if counts.sum() == 1]
        self.of_unknown: np.ndarray = np.sum(once or list(self.counts.values()), axis=0)
        return self

    def predict_proba(self, words: list[str]) -> np.ndarray:
        found: list[np.ndarray] = [self.counts.get(word, self.of_unknown) for word in words]
        counts = np.array(found).reshape(len(words), len(self.classes_))
        return counts / counts.sum(axis=1, keepdims=True)
