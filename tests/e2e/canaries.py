"""Secrets in the environment of a run, and the search for them in what it left."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from pipeline.io import storage

SECRETS = {
    name: f"canary-{uuid.uuid4().hex}" for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
}
"""Made anew for each run of the tests, so that they stand in no source file that travels."""


def data_on_s3(s3_server: str, tiny_data: Path) -> str:
    """Write the pictures of the small job to S3, and return the folder."""
    uri = f"{s3_server}/secrets-data"
    storage.write_bytes(f"{uri}/images.parquet", (tiny_data / "images.parquet").read_bytes())
    return uri


def holds_a_secret(text: str | bytes) -> bool:
    """Whether one of SECRETS stands in the text."""
    held = text.encode() if isinstance(text, str) else text
    return any(secret.encode() in held for secret in SECRETS.values())


def files_that_hold_a_secret(folder: Path) -> list[str]:
    """The regular files below the folder in which one of SECRETS stands, also those in hidden
    folders.
    """
    paths = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return [
        str(path.relative_to(folder))
        for path in paths
        if path.is_file() and holds_a_secret(path.read_bytes())
    ]


def objects_that_hold_a_secret(uri: str) -> list[str]:
    """The same for everything that the run wrote on S3."""
    names = storage.list_files(uri)
    assert any(name.endswith("report.html") for name in names), names
    return [name for name in names if holds_a_secret(storage.read_bytes(name))]
