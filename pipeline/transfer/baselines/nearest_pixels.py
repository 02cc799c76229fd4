"""Images by the training images that look most alike, pixel by pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind, Setting


class NearestPixelsOptions(Options):
    size: int = Field(32, ge=1, description="larger images are averaged to so many pixels a side")
    neighbours: list[int] = Field(
        [1, 5, 20],
        min_length=1,
        description="numbers of neighbours, of which the best on validation rows is kept; no more "
        "than there are labelled rows",
    )


@register("baseline", "nearest_pixels", options=NearestPixelsOptions)
class NearestPixels(Baseline):
    """The classes, or the mean number, of the nearest training images by the Euclidean distance of
    their pixels.

    Strong where objects are centred and alike (digits), weak for photographs.

    Cover and Hart 1967, "Nearest Neighbor Pattern Classification".
    """

    roles = ("image",)
    label_kinds = ("classes", "label_sets", "numbers")

    def settings(self) -> tuple[Setting, ...]:
        return tuple({"neighbours": value} for value in self.options.neighbours)

    def inputs(self, rows: BaselineRows) -> np.ndarray:
        """Return (n, C * side * side) float32 from 0 to 1."""
        images = torch.from_numpy(rows.arrays["image"])
        side = min(self.options.size, *images.shape[-2:])
        small = F.adaptive_avg_pool2d(images.float() / 255, side)
        return small.flatten(1).numpy()

    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        kind = _NearestNumbers if label_kind == "numbers" else _Nearest
        return kind(int(setting["neighbours"]))


class _AllOfFew:
    """Takes all rows where there are fewer than neighbours."""

    n_neighbors: int

    def fit(self, X: Any, y: Any) -> Any:  # noqa: N803 - scikit-learn's names
        self.n_neighbors = min(self.n_neighbors, len(y))
        nearest: Any = super()
        return nearest.fit(X, y)


class _Nearest(_AllOfFew, KNeighborsClassifier):
    pass


class _NearestNumbers(_AllOfFew, KNeighborsRegressor):
    pass
