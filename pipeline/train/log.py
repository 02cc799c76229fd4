"""The log of a run: metrics as JSON Lines and TensorBoard files, and a list of bad rows."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Required, TypedDict, cast

import numpy as np

from pipeline.data.manifests import LeftOut
from pipeline.io import s3, storage, write_fence

NO_CURVES = ("step", "steps", "resumed_from", "validated_step")
"""Numbers of a record that TensorBoard does not draw."""


class LogRecord(TypedDict, total=False):
    """A line of ``metrics.jsonl``: of training steps, of a validation, or of an early stop.

    It also has numbers by name: means of the loss and of what the objective logs since the last
    line, and validation metrics as ``validation_NAME``.
    """

    step: Required[int]
    steps: Required[int]
    """Steps of the whole run."""
    phase: str
    lr: float
    grad_norm: float
    rows_per_second: float
    unit: str
    """Unit of throughput where it is not rows: tokens, seconds and the like."""
    units_per_second: float
    wait_share: float
    """Share of the time in which the loop waited for data."""
    skipped_steps: int
    """Number of steps so far that were not finite."""
    eta_seconds: float
    resumed_from: int
    warning: str
    validated_step: int
    stopped: str
    """Why the run stopped before its last step."""
    bad_rows: int
    """Number of rows so far that could not be used."""


def with_numbers(record: LogRecord, numbers: Mapping[str, float]) -> LogRecord:
    """Return a record with numbers added to its own keys."""
    return cast("LogRecord", {**record, **numbers})


class RowTrace:
    """Appends a line {step, rows, pid} for every step of a rank to ``rows-rank<rank>.jsonl``.

    A run that continues from a resume point appends to the file: of a step that is taken again the
    last line counts. Only for local folders.
    """

    def __init__(self, folder: str, rank: int):
        if storage.is_remote(folder):
            raise ValueError(f"train.trace_rows writes to a local folder; storage is {folder}")
        self.path = Path(storage.join(folder, f"rows-rank{rank}.jsonl"))
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, rows: np.ndarray) -> None:
        write_fence.check(str(self.path))
        with s3.naming("write", self.path), open(self.path, "a") as file:
            line = {"step": step, "rows": rows.tolist(), "pid": os.getpid()}
            file.write(json.dumps(line) + "\n")


class MetricsLog:
    """Writes ``metrics.jsonl``, ``quarantine.jsonl`` and ``tensorboard/`` into a folder.

    A remote folder is updated by ``flush``, which ``write`` calls twice a minute.
    """

    def __init__(self, uri: str, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        write_fence.check(uri)
        self.uri, self.remote = uri, storage.is_remote(uri)
        self._scratch = tempfile.TemporaryDirectory() if self.remote else None
        self.folder = Path(self._scratch.name if self._scratch else uri)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._drop_lines_after(resume_step)
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resume_step)
        self._flushed = time.monotonic()

    def _drop_lines_after(self, resume_step: int) -> None:
        """Drop lines that an earlier part of the run wrote after the resume point."""
        lines = self._lines("metrics.jsonl") if resume_step else []
        kept = [line for line in lines if line.get("step", 0) <= resume_step]
        self._write_lines("metrics.jsonl", kept, "w")
        listed = self._lines("quarantine.jsonl") if resume_step else []
        self._quarantined = {(row.get("split"), row["row"]) for row in listed}
        if listed or storage.exists(storage.join(self.uri, "quarantine.jsonl")):
            self._write_lines("quarantine.jsonl", listed, "w")

    def _write_lines(
        self, name: str, lines: Sequence[Mapping[str, Any]], mode: Literal["w", "a"]
    ) -> None:
        """Raises StorageError, which names the file and what to do."""
        path = self.folder / name
        with s3.naming("write", path), open(path, mode) as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """Return the records of a file, without a last line that a kill has cut off."""
        uri, out = storage.join(self.uri, name), []
        for line in storage.read_bytes(uri).splitlines() if storage.exists(uri) else ():
            with suppress(ValueError):
                out.append(json.loads(line))
        return out

    def write(self, record: LogRecord) -> None:
        """Append a record; its numbers go to TensorBoard too."""
        write_fence.check(self.uri)
        self._write_lines("metrics.jsonl", [{"time": round(time.time(), 3), **record}], "a")
        self._check_writer()
        for name, value in record.items():
            is_number = isinstance(value, (int, float)) and not math.isnan(value)
            if is_number and name not in NO_CURVES:  # a metric without a value has no point
                self._writer.add_scalar(name, value, record["step"])
        if self.remote and time.monotonic() - self._flushed > 30:
            self.flush()

    def quarantine(self, rows: Sequence[LeftOut]) -> None:
        """List bad rows, each once."""
        write_fence.check(self.uri)
        fresh = {(row.split, row.row): row for row in reversed(rows)}
        new = [
            row._asdict() for key, row in reversed(fresh.items()) if key not in self._quarantined
        ]
        self._write_lines("quarantine.jsonl", new, "a")
        self._quarantined |= set(fresh)

    def _writer_is_alive(self) -> bool:
        """Whether the thread that writes TensorBoard's files still runs.

        It ends at the first error, and whoever gave it more values would wait for ever.
        """
        thread = getattr(self._events(), "_worker", None)
        return thread is None or thread.is_alive()

    def _events(self) -> Any:
        """The object that writes TensorBoard's files; None before the first value."""
        file_writer: Any = self._writer.file_writer
        return file_writer.event_writer if file_writer else None

    def _check_writer(self) -> None:
        if not self._writer_is_alive():
            raise storage.StorageError(
                f"cannot write {self.folder / 'tensorboard'}: its writer has stopped, as it does "
                "where the disk is full; free space there or choose another storage"
            )

    def flush(self) -> None:
        """Write buffered values to the disk, and bring a remote folder up to date."""
        self._check_writer()
        with s3.naming("write", self.folder / "tensorboard"):
            self._writer.flush()
        if self.remote:
            for path in self.folder.rglob("*"):
                if path.is_file():
                    storage.write_bytes(
                        storage.join(self.uri, str(path.relative_to(self.folder))),
                        path.read_bytes(),
                    )
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Write everything that is still buffered.

        Raises:
            StorageError: something could not be written.
        """
        try:
            self.flush()
            with s3.naming("write", self.folder / "tensorboard"):
                self._writer.close()
        finally:
            if self._scratch:
                self._scratch.cleanup()

    def abandon(self) -> None:
        """Close the log after an error of the run; further errors of the log are ignored."""
        with suppress(OSError):
            if self._writer_is_alive():
                self.close()
        events = self._events()
        if events is None or events._closed:
            return
        if events._worker.is_alive():
            events._worker.stop()
        with suppress(OSError):
            events._ev_writer.close()
        # else tensorboardX tries to close it when Python ends, and prints its error
        events._closed = True
