"""The record of a trial: its measurements, its settings and the code that made it.

It is a JSON file in the same folder as the trial's predictions and bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

from pipeline.config import provenance
from pipeline.config.provenance import MadeBy, Provenance, ProvenanceRecord
from pipeline.io.json_values import Json, JsonObject
from pipeline.report.results import ResultRow

VERSION = 1
"""The version of the JSON format. Records without a version were written before it was recorded and
have version 1.
"""


class CurvePoint(NamedTuple):
    """The validation metrics of a trial after ``step`` steps."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has ended.

    Its rows have no gains yet. `stages.collect` computes them from all trials.
    """

    trial_id: str
    cell: str = ""
    """The matrix entry: all settings of the trial except hyper-parameters and seed."""
    status: str = "done"
    """"done", "failed" or "pruned"."""
    error: str | None = None
    rows: tuple[ResultRow, ...] = ()
    validation: dict[str, float] = field(default_factory=dict[str, float])
    curve: tuple[CurvePoint, ...] = ()
    transfer: str = ""
    """Which tensors were copied from the source, and other notes of the run."""
    kept_step: int | None = None
    """The step whose weights were kept."""
    skipped_steps: int = 0
    resumed_from: int = 0
    parent_weights: str | None = None
    """SHA-256 of the weights of its source; None for scratch."""
    run: str | None = None
    """The run of the program that wrote it."""
    made_by: MadeBy | None = None
    versions: dict[str, str] = field(default_factory=dict[str, str])
    begun_by: tuple[ProvenanceRecord, ...] = ()
    """Other code and versions that trained earlier parts of it, before it was resumed."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Checksums of the other files of the trial."""

    @property
    def made(self) -> Provenance | None:
        """The code and versions that made it; None where they were not recorded."""
        return provenance.from_metadata({"made_by": self.made_by, "versions": self.versions})

    @property
    def failed(self) -> bool:
        """Whether the trial failed."""
        return self.status == "failed"

    def to_json(self) -> JsonObject:
        """Return the record as a JSON object."""
        stated = {field.name: getattr(self, field.name) for field in fields(self)}
        rows: list[Json] = [row.to_json() for row in self.rows]
        curve: list[Json] = [{"step": point.step, **point.metrics} for point in self.curve]
        return {
            "version": VERSION,
            **stated,
            "rows": rows,
            "curve": curve,
            "begun_by": list(stated["begun_by"]),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Make a record from the JSON object of `to_json`.

        Raises:
            ValueError: The object is no record of a trial, or has a newer version.
        """
        version = stored.get("version", VERSION)
        if isinstance(version, int) and version > VERSION:
            raise ValueError(
                f"it has version {version}, this program reads up to {VERSION}; update onetomany"
            )
        names = [field.name for field in fields(cls)]
        stated: dict[str, Any] = {
            name: value for name, value in stored.items() if name in names and value is not None
        }
        try:
            stated["rows"] = tuple(ResultRow.from_json(row) for row in stored["rows"])
            stated["curve"] = curve_of(stated.get("curve", ()))
            stated["begun_by"] = tuple(stated.get("begun_by", ()))
            return cls(**stated)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it is no record of a trial ({error!r})") from None


def curve_of(points: Iterable[Mapping[str, Any]]) -> tuple[CurvePoint, ...]:
    """Return a curve from the ``{"step": ..., metric: value}`` objects of the training loop."""
    return tuple(
        CurvePoint(point["step"], {name: value for name, value in point.items() if name != "step"})
        for point in points
    )
