"""The record of a trial: what it measured, what ran and what made it. It stands as JSON beside the
trial's predictions and bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Self

from pipeline.config import provenance
from pipeline.config.provenance import Provenance
from pipeline.report.results import ResultRow

VERSION = 1
"""The version of a record's JSON. Records that were written before they stated one have version
1.
"""


class CurvePoint(NamedTuple):
    """The validation metrics of a trial after so many steps."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has ended. Its rows have no gains yet, which need the other trials
    (`stages.collect`).
    """

    trial_id: str
    cell: str = ""
    """What is compared with scratch: everything but hyper-parameters and seed."""
    status: str = "done"
    """"done", "failed" or "pruned"."""
    error: str | None = None
    rows: tuple[ResultRow, ...] = ()
    validation: dict[str, float] = field(default_factory=dict[str, float])
    curve: tuple[CurvePoint, ...] = ()
    transfer: str = ""
    """Which tensors were carried over, and what else the run noted."""
    kept_step: int | None = None
    """The step whose weights were kept."""
    skipped_steps: int = 0
    resumed_from: int = 0
    parent_weights: str | None = None
    """SHA-256 of the weights of its source; None for scratch."""
    run: str | None = None
    """The run of the program that wrote it."""
    made_by: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict[str, str])
    begun_by: tuple[dict[str, Any], ...] = ()
    """What made earlier parts of it, where that was other code or versions."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Checksums of the files beside it."""

    @property
    def made(self) -> Provenance | None:
        """Code and versions that made it; None where they were not recorded."""
        return provenance.from_metadata({"made_by": self.made_by, "versions": self.versions})

    @property
    def failed(self) -> bool:
        return self.status == "failed"

    def to_json(self) -> dict[str, Any]:
        stated = {one.name: getattr(self, one.name) for one in fields(self)}
        rows = [row.to_json() for row in self.rows]
        curve = [{"step": point.step, **point.metrics} for point in self.curve]
        return {
            "version": VERSION,
            **stated,
            "rows": rows,
            "curve": curve,
            "begun_by": list(self.begun_by),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave. Raises ValueError where it is no record of a trial, or one of a
        newer version.
        """
        if found.get("version", VERSION) > VERSION:
            raise ValueError(
                f"it has version {found['version']}, this program reads up to {VERSION}; "
                "update onetomany"
            )
        if not isinstance(found.get("rows"), list):
            raise ValueError("it is no record of a trial")
        names = [one.name for one in fields(cls)]
        stated: dict[str, Any] = {
            name: value for name, value in found.items() if name in names and value is not None
        }
        stated["rows"] = tuple(ResultRow.from_json(row) for row in found["rows"])
        stated["curve"] = curve_of(stated.get("curve", ()))
        stated["begun_by"] = tuple(stated.get("begun_by", ()))
        return cls(**stated)


def curve_of(points: Iterable[Mapping[str, Any]]) -> tuple[CurvePoint, ...]:
    """A curve from the training loop's ``{"step", metric: value}``."""
    return tuple(
        CurvePoint(point["step"], {name: value for name, value in point.items() if name != "step"})
        for point in points
    )
