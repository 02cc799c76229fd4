"""The extras of this package: what only some jobs need, and how to install it."""

from __future__ import annotations

EXTRAS = {
    "speech": ("flashlight",),
    "robotics": ("gymnasium", "mujoco", "stable_baselines3", "av"),
    "optuna": ("optuna",),
    "quantized": ("bitsandbytes",),
}
"""Extras of pyproject.toml, each with the modules that it brings."""


def install(extra: str) -> str:
    """Return the commands that install an extra, for error messages."""
    return f"uv sync --extra {extra} (without a clone: pip install 'onetomany[{extra}]')"
