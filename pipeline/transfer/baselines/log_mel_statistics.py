"""Recordings by how loud each band of frequencies is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind, Setting
from pipeline.media import spectrogram

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010


class LogMelCosineOptions(Options):
    mels: int = Field(64, ge=1, description="bands of the mel scale")


class LogMelStatisticsOptions(LogMelCosineOptions):
    penalties: list[float] = Field(
        [0.01, 0.1, 1.0, 10.0],
        min_length=1,
        description="values of C, the inverse of the penalty; the best on validation rows is kept",
    )


@register("baseline", "log_mel_statistics", options=LogMelStatisticsOptions)
class LogMelStatistics(Baseline):
    """Logistic regression on the mean and deviation over time of each band of the log-mel spectrum,
    or ridge regression of numbers.

    It knows timbre and level, but not the order of sounds: strong for scenes and speakers, weak for
    words.

    Log-mel bands are the step before the cepstral coefficients of Davis and Mermelstein 1980.
    """

    roles = ("audio",)
    label_kinds = ("classes", "label_sets", "numbers")

    def settings(self) -> tuple[Setting, ...]:
        return tuple({"C": value} for value in self.options.penalties)

    def inputs(self, rows: BaselineRows) -> np.ndarray:
        return _statistics(rows, self.options.mels)

    def transformer(self) -> StandardScaler:
        return StandardScaler()

    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        if label_kind == "numbers":
            return Ridge(alpha=1 / (2 * setting["C"]))
        return LogisticRegression(C=setting["C"], max_iter=1000)


@register("baseline", "log_mel_cosine", options=LogMelCosineOptions)
class LogMelCosine(Baseline):
    """Cosine of the mean and deviation over time of each band of the log-mel spectrum, standardised
    by the training rows.

    Two settings are tried: these statistics, and their linear discriminants of the training rows'
    identities (Fisher 1936, with the shrinkage of Ledoit and Wolf 2004). The better one on the
    validation rows is kept.
    """

    roles = ("audio",)
    label_kinds = ("identities",)

    def settings(self) -> tuple[Setting, ...]:
        return {"discriminants": 0.0}, {"discriminants": 1.0}

    def inputs(self, rows: BaselineRows) -> np.ndarray:
        return _statistics(rows, self.options.mels)

    def transformer(self) -> StandardScaler:
        return StandardScaler()

    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        if setting["discriminants"]:
            return Discriminants(solver="eigen", shrinkage="auto")
        return FunctionTransformer()  # the identity


class Discriminants(LinearDiscriminantAnalysis):
    """Linear discriminants. Rows stay as they are where each class has too few rows for them, such
    as one or two.
    """

    def fit(self, X, y):  # noqa: N803
        self.is_fitted = len(X) > len(np.unique(y))
        if self.is_fitted:
            try:
                super().fit(X, y)
            except np.linalg.LinAlgError:  # the covariance within classes has no inverse
                self.is_fitted = False
        return self

    def transform(self, X):  # noqa: N803
        return super().transform(X) if self.is_fitted else X


def _statistics(rows: BaselineRows, mels: int) -> np.ndarray:
    """Return (n, 2 mels) float32: the means of each band, then the deviations."""
    rate = rows.modality.inputs()["rate"]
    window, hop = spectrogram.window_samples(rate, WINDOW_SECONDS, HOP_SECONDS)
    found = np.zeros((len(rows.arrays["audio"]), 2 * mels), np.float32)
    for row, samples in zip(found, rows.arrays["audio"], strict=True):
        sound = spectrogram.floats(torch.tensor(samples))[None]
        mel = spectrogram.log_mel(sound, rate, window, hop, mels)[0]
        both = [mel.mean(0), mel.std(0, correction=0)]
        row[:] = torch.cat(both).numpy()
    return found
