"""Recordings by how loud each band of frequencies is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind, Setting
from pipeline.media import spectrogram

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010


class LogMelStatisticsOptions(Options):
    mels: int = Field(64, ge=1, description="bands of the mel scale")
    penalties: list[float] = Field(
        [0.01, 0.1, 1.0, 10.0],
        min_length=1,
        description="values of C, the inverse of the penalty; the best on validation rows is kept",
    )


@register("baseline", "log_mel_statistics", options=LogMelStatisticsOptions)
class LogMelStatistics(Baseline):
    """Logistic regression on the mean and deviation over time of each band of the log-mel spectrum,
    or ridge regression of numbers.

    It hears timbre and level, and no order: strong for scenes and speakers, weak for words.
    """

    roles = ("audio",)
    label_kinds = ("classes", "label_sets", "numbers")

    def settings(self) -> tuple[Setting, ...]:
        return tuple({"C": value} for value in self.options.penalties)

    def inputs(self, rows: BaselineRows) -> np.ndarray:
        """Return (n, 2 mels) float32: the means, then the deviations."""
        rate = rows.modality.inputs()["rate"]
        found = [self._statistics(samples, rate) for samples in rows.arrays["audio"]]
        return np.stack(found) if found else np.zeros((0, 2 * self.options.mels), np.float32)

    def _statistics(self, samples: np.ndarray, rate: int) -> np.ndarray:
        window, hop = spectrogram.window_samples(rate, WINDOW_SECONDS, HOP_SECONDS)
        sound = spectrogram.floats(torch.tensor(samples))[None]
        mel = spectrogram.log_mel(sound, rate, window, hop, self.options.mels)[0]
        return torch.cat([mel.mean(0), mel.std(0, correction=0)]).numpy()

    def transformer(self) -> StandardScaler:
        return StandardScaler()

    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        if label_kind == "numbers":
            return Ridge(alpha=1 / (2 * setting["C"]))
        return LogisticRegression(C=setting["C"], max_iter=1000)
