"""One to Many: pretrain backbones once, adapt them to many targets, and measure whether the
transfer paid.

The public functions are those of `pipeline.api`. They are imported when they are first used, so
that importing this package stays light.

Importing it also makes Python's garbage collector run less often (`gc.set_threshold`): importing
torch, transformers and Ray makes some two million objects, and with Python's defaults (700, 10, 10)
looking through them again and again is a fifth of the start of each process. A job on Ray starts a
dozen processes for each source.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import (
        Outcome,
        advise,
        best_bundle,
        embed,
        embed_files,
        export,
        finetune,
        init,
        load_bundle,
        load_job,
        predict,
        prepare_data,
        pretrain,
        push,
        results,
        run,
        score,
    )

__all__ = [
    "Outcome",
    "advise",
    "best_bundle",
    "embed",
    "embed_files",
    "export",
    "finetune",
    "init",
    "load_bundle",
    "load_job",
    "predict",
    "prepare_data",
    "pretrain",
    "push",
    "results",
    "run",
    "score",
]

__version__ = "0.1.0"

gc.set_threshold(100_000, 20, 10)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
