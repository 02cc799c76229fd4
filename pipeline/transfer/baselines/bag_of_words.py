"""Texts by the words that stand in them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any

import numpy as np
from pydantic import Field
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind, Setting
from pipeline.media.words import WORD, plain_texts


class BagOfWordsOptions(Options):
    words: int = Field(2, ge=1, le=5, description="longest run of words that is counted")
    min_rows: int = Field(1, ge=1, description="a run counts where so many training rows have it")
    penalties: list[float] = Field(
        [0.1, 1.0, 10.0, 100.0],
        min_length=1,
        description="values of C, the inverse of the penalty; the best on validation rows is kept",
    )


@register("baseline", "bag_of_words", options=BagOfWordsOptions)
class BagOfWords(Baseline):
    """TF-IDF of words and pairs of words, and logistic regression (ridge regression of numbers).

    Strong where single words tell the class (topics, sentiment), and where labelled rows are many.
    Wang and Manning 2012, "Baselines and Bigrams".
    """

    roles = ("text",)
    label_kinds = ("classes", "label_sets", "numbers")

    def settings(self) -> tuple[Setting, ...]:
        return tuple({"C": value} for value in self.options.penalties)

    def inputs(self, rows: BaselineRows) -> list[str]:
        """Return the text of each row, in Unicode's form NFC; that of a pair follows it."""
        columns = [rows.read_column(role) for role in ("text", "text_pair")]
        texts_of_columns = [plain_texts(column) for column in columns if column is not None]
        rows_of_texts = zip(*texts_of_columns, strict=True)
        return [unicodedata.normalize("NFC", " ".join(filter(None, row))) for row in rows_of_texts]

    def transformer(self) -> TfidfVectorizer:
        return _Words(
            ngram_range=(1, self.options.words),
            min_df=self.options.min_rows,
            sublinear_tf=True,
            token_pattern=WORD.pattern,
        )

    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        if label_kind == "numbers":
            return Ridge(alpha=1 / (2 * setting["C"]))
        return LogisticRegression(C=setting["C"], max_iter=1000)


class _Words(TfidfVectorizer):
    """`TfidfVectorizer` that also takes texts without a run of words that enough rows have.

    They have one column of zeros.
    """

    def fit(self, raw_documents: Any, y: Any = None) -> Any:
        runs_of = self.build_analyzer()
        rows_by_run = Counter(run for text in raw_documents for run in set(runs_of(text)))
        has_runs = max(rows_by_run.values(), default=0) >= self.min_df
        return super().fit(raw_documents, y) if has_runs else _NoWords()


class _NoWords:
    def transform(self, rows: list[str]) -> np.ndarray:
        return np.zeros((len(rows), 1))
