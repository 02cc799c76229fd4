"""What a run and the report say of a source that has its bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True)
class SourceSummary:
    """A source and how it was trained; None or empty where its bundle does not say."""

    source: str
    backbone: str = ""
    objective: str = ""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """Metrics of the validation rows."""
    steps: int | None = None
    rows: int | None = None
    seconds: float | None = None
    """Seconds of training."""
    rows_per_second: float | None = None
    stopped_at: int | None = None
    """The step after which ``train.patience`` ended it; None: it did not."""
    transfer: str = ""
    """Which tensors were copied from the checkpoint that it started from."""
    splits: str = ""
    warning: str = ""
    bundle: str = ""
    """Where its bundle is."""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    changes: tuple[str, ...] = ()
    """How code and versions differ now from those that made it."""

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """Make a summary from what `launch.run_source` and `launch.source_metadata` return."""
        values = {column.name: metadata.get(column.name) for column in fields(cls)}
        return cls(**{name: value for name, value in values.items() if value is not None})
