"""Small optional protocols: what some modalities can say of rows, for checks that are made before
any training.

A modality has a capability by having the method; nothing else has to be declared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np


class TruncationStats(NamedTuple):
    """How much of some rows lies beyond what is read of each: ``lost`` of ``units`` (words, tokens)
    in ``cut`` of ``rows`` rows.
    """

    rows: int
    cut: int
    units: int
    lost: int
    unit: str

    @property
    def share(self) -> float:
        return self.lost / self.units if self.units else 0.0


@runtime_checkable
class TruncatesLongRows(Protocol):
    """A modality that reads only the beginning of long rows (texts)."""

    def truncation(self, table: Any, columns: dict[str, str]) -> TruncationStats | None:
        """How much of the table's rows is cut off; None where rows of this kind are read whole or
        refused.
        """
        ...


class NameDifference(NamedTuple):
    """Names that one side of a transfer has and the other has not: ``names``, and ``rare`` further
    ones that too few rows have to be named (a rare name may tell who somebody is).
    """

    what: str
    names: tuple[str, ...]
    rare: int = 0

    def text(self) -> str:
        few = f"{self.rare} that few rows have" if self.rare else ""
        return (
            f"{self.what} ({len(self.names) + self.rare}): "
            f"{', '.join([*self.names, *([few] if few else [])])}"
        )


@runtime_checkable
class ComparesFeatureNames(Protocol):
    """A modality whose inputs are known by name (variables, fields, categories)."""

    def name_differences(self, table: Any, columns: dict[str, str]) -> list[NameDifference]:
        """All names that these rows lack of what the fitted state knows, and that the state lacks
        of theirs.
        """
        ...


@runtime_checkable
class HasSingleFeatures(Protocol):
    """A modality whose rows are made of single features (columns of a table, variables of a
    record).
    """

    def single_features(
        self, table: Any, columns: dict[str, str]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Each feature's name with its value in every row: (n,) float64, NaN where there is none,
        or (n,) int64 numbers of categories.

        Only what the modality reads: with a fitted state what that knows.
        """
        ...
