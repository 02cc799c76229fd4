"""The actor that has the newest progress of a run's ranks.

Its process imports this module, which must not import torch: that takes seconds and memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.train.log import LogRecord


class Board:
    """The newest progress of the ranks, and the error that ends the run."""

    def __init__(self):
        self.record: LogRecord | None = None
        self.fatal: str | None = None

    def post(self, record: LogRecord) -> None:
        """Keep the newest record of rank 0; what an earlier record had beside it stays."""
        before = self.record
        # after a restart steps are taken again
        if before is not None and record["step"] >= before["step"]:
            record = {**before, **record}
        self.record = record

    def fail(self, message: str) -> None:
        """Keep the first message of an error that ends the run."""
        self.fatal = self.fatal or message

    def read(self) -> tuple[LogRecord | None, str | None]:
        """Return the newest record, and the error that ends the run; None for what is not there."""
        return self.record, self.fatal
