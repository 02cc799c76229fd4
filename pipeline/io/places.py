"""What is published names no place of the machine that it was made on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.io import storage


def without_places(text: str) -> str:
    """Return a text with the last part alone of each place on a disk or in a bucket.

    The user name, password and query of an address are cut too.
    """
    text = storage.without_secrets(text).replace("://***@", "://").replace("?***", "")
    return re.sub(r"(?:\w+://|(?<![\w.])~?/)(?:[^\s,;'\"|]*/)?(?=[^\s/,;'\"|])", "", text)


def json_without_places(value: Any) -> Any:
    """Return JSON with the last part alone of each place in its texts (`without_places`)."""
    if isinstance(value, str):
        return without_places(value)
    if isinstance(value, Mapping):
        return {name: json_without_places(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_without_places(one) for one in value]
    return value
