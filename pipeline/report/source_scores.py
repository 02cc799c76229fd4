"""The transferability scores of a source for a target, as runs record them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

from pipeline.io.json_values import JsonObject
from pipeline.report.shift import Shift


@dataclass(frozen=True)
class ScoreValue:
    """A score of a source for a target. ``value`` is None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True
    seconds: float | None = None
    """Seconds of this score alone, with its interval, once the features are there."""
    reason: str = ""
    """Why there is no value, or no interval."""


class SelectionScore(TypedDict):
    """The score by which a source was kept or left out, as its columns of the results table."""

    score_name: str
    score_value: float | None


@dataclass(frozen=True)
class PairScores:
    """Every score of a source for a target."""

    source: str
    target: str
    scores: dict[str, ScoreValue]
    rows: int = 0
    """Rows of the target that were read."""
    source_rows: int = 0
    seconds: float = 0.0
    """Seconds of the features that all scores share."""
    device: str = ""
    error: str = ""
    """Why nothing could be computed."""
    shifts: tuple[Shift, ...] = ()
    """How the target's rows differ from the source's, and among each other."""

    def to_json(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> PairScores:
        values = {name: ScoreValue(**value) for name, value in stored["scores"].items()}
        shifts = tuple(map(Shift.from_json, stored.get("shifts", ())))
        return replace(cls(**stored), scores=values, shifts=shifts)
