"""The extras of this package: what only some jobs need, and how to install it."""

from __future__ import annotations

import sys

EXTRAS = {
    "speech": ("flashlight",),
    "robotics": ("gymnasium", "mujoco", "stable_baselines3", "av"),
    "optuna": ("optuna",),
    "hyperopt": ("hyperopt",),
    "bayesopt": ("bayes_opt",),
    "quantized": ("bitsandbytes",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "datasets": ("datasets",),
    "gcs": ("gcsfs",),
    "azure": ("adlfs",),
}
"""Extras of pyproject.toml, each with the modules that it brings."""


LAST_PYTHON = {"speech": (3, 12)}
"""The last version of Python that the packages of an extra have wheels for (pyproject.toml)."""


def install(extra: str) -> str:
    """Return the commands that install an extra, for error messages.

    Not by `uv sync`, which would remove other extras.
    """
    commands = (
        f"uv pip install -e '.[{extra}]' (without a GPU add --torch-backend cpu; without a clone: "
        f"pip install 'onetomany[{extra}]')"
    )
    last = LAST_PYTHON.get(extra)
    if last is None or sys.version_info[:2] <= last:
        return commands
    return f"{commands} with Python {last[0]}.{last[1]}, as there are no wheels for later ones"
