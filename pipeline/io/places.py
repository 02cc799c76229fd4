"""Remove paths of this machine from what is published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.io import storage


def without_places(text: str) -> str:
    """Shorten each path or address in a text to its last part (``/home/ann/a.yaml`` to ``a.yaml``).

    The user name, password and query of an address are cut too.
    """
    text = storage.without_secrets(text).replace("://***@", "://").replace("?***", "")
    return re.sub(r"(?:\w+://|(?<![\w.])~?/)(?:[^\s,;'\"|]*/)?(?=[^\s/,;'\"|])", "", text)


def json_without_places(value: Any) -> Any:
    """Shorten the paths in all texts of a JSON value (`without_places`)."""
    if isinstance(value, str):
        return without_places(value)
    if isinstance(value, Mapping):
        return {name: json_without_places(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_without_places(one) for one in value]
    return value
