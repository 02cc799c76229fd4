"""Small optional protocols: what some modalities can say of rows, for checks before any training.

A modality has a capability by having the method; nothing else has to be declared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np


class TruncationStats(NamedTuple):
    """How much of some rows lies beyond what is read of each.

    Attributes:
        rows: Number of rows that were looked at.
        cut: How many of them are cut.
        units: Words or tokens in all rows.
        lost: How many of those are cut off.
        unit: What the units are.
    """

    rows: int
    cut: int
    units: int
    lost: int
    unit: str

    @property
    def share(self) -> float:
        """Return the share of the units that is cut off."""
        return self.lost / self.units if self.units else 0.0


@runtime_checkable
class TruncatesLongRows(Protocol):
    """A modality that reads only the beginning of long rows (texts)."""

    def truncation(self, table: Any, columns: dict[str, str]) -> TruncationStats | None:
        """Return how much of the table's rows is cut off.

        None where rows of this kind are read whole or refused.
        """
        ...


class NameDifference(NamedTuple):
    """Names that one side of a transfer has and the other lacks.

    Attributes:
        what: Which names these are, in words.
        names: The names.
        rare: How many further names too few rows have to show them: a rare name may tell who
            somebody
            is.
    """

    what: str
    names: tuple[str, ...]
    rare: int = 0

    def text(self) -> str:
        """Return the difference as one line."""
        few = f"{self.rare} that few rows have" if self.rare else ""
        return (
            f"{self.what} ({len(self.names) + self.rare}): "
            f"{', '.join([*self.names, *([few] if few else [])])}"
        )


@runtime_checkable
class ComparesFeatureNames(Protocol):
    """A modality whose inputs are known by name (variables, fields, categories)."""

    def name_differences(self, table: Any, columns: dict[str, str]) -> list[NameDifference]:
        """Return the names that these rows lack of the fitted state, and the state of them."""
        ...


@runtime_checkable
class HasSingleFeatures(Protocol):
    """A modality whose rows consist of single features (columns of a table, variables)."""

    def single_features(
        self, table: Any, columns: dict[str, str]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each feature's name with its value in every row.

        Only features that the modality reads; with a fitted state those that it knows. Values are
        (n,) float64, NaN where there is none, or (n,) int64 numbers of categories.
        """
        ...
