"""The metrics log of a run: JSON Lines and TensorBoard files, beside the bundle; bad rows are listed there too."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline import storage


class MetricsLog:
    """``metrics.jsonl``, ``quarantine.jsonl`` and ``tensorboard/`` under a folder; remote folders are brought up to date by ``flush``."""

    def __init__(self, uri: str, resume_step: int = 0, tensorboard: bool = True):
        self.uri, self.remote = uri, storage.is_remote(uri)
        self._scratch = tempfile.TemporaryDirectory() if self.remote else None
        self.folder = Path(self._scratch.name if self._scratch else uri)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._before(resume_step)
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resume_step)
        self._flushed = time.monotonic()

    def _before(self, resume_step: int) -> None:
        """Lines of steps after the resume point are dropped: they are written again."""
        target = storage.join(self.uri, "metrics.jsonl")
        kept = b""
        if resume_step and storage.exists(target):
            lines = storage.read_bytes(target).splitlines()
            kept = b"".join(line + b"\n" for line in lines if json.loads(line).get("step", 0) <= resume_step)
        (self.folder / "metrics.jsonl").write_bytes(kept)

    def write(self, record: dict[str, Any]) -> None:
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **record}) + "\n")
        if self._writer:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name not in ("step", "steps"):
                    self._writer.add_scalar(name, value, record["step"])
        if self.remote and time.monotonic() - self._flushed > 30:
            self.flush()

    def quarantine(self, rows: list[dict[str, Any]]) -> None:
        with open(self.folder / "quarantine.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def flush(self) -> None:
        if self._writer:
            self._writer.flush()
        if self.remote:
            for path in self.folder.rglob("*"):
                if path.is_file():
                    storage.write_bytes(storage.join(self.uri, str(path.relative_to(self.folder))), path.read_bytes())
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._writer:
            self._writer.close()
        if self._scratch:
            self._scratch.cleanup()
