"""Resume points: model, optimiser, average, kept weights, position and every rank's random state, whole or absent."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline import folders, storage
from pipeline.rng import mix

KEPT = 2


def _steps(uri: str) -> list[int]:
    """Steps of the complete resume points, ascending."""
    found = storage.list_files(uri) if storage.is_dir(uri) else []
    names = [f.rsplit("/", 2)[-2] for f in found if f.endswith("/manifest.json")]
    return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))


def _folder(uri: str, step: int) -> str:
    return storage.join(uri, f"step-{step:010d}")


def save(uri: str, ranks: Any, state: dict[str, Any]) -> None:
    """Called by every rank at the same step; returns when the resume point is visible."""
    random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if ranks.device.type == "cuda" else None}
    everyone: list[Any] = [random]
    if ranks.count > 1:
        everyone = [None] * ranks.count
        dist.all_gather_object(everyone, random)
    if ranks.first:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "state.pt")
            torch.save({**state, "random": everyone}, path)
            folders.commit_folder(_folder(uri, state["step"]), {"state.pt": path}, {"step": state["step"], "format_version": 1})
        for old in _steps(uri)[:-KEPT]:
            storage.remove_tree(_folder(uri, old))
    if ranks.count > 1:
        dist.barrier()


def load(uri: str, ranks: Any) -> dict[str, Any] | None:
    """The newest complete resume point, the same on every rank; none when there is none. Raises StorageError when it is damaged."""
    newest = [(_steps(uri) or [None])[-1]] if ranks.first else [None]
    if ranks.count > 1:
        dist.broadcast_object_list(newest, src=0)
    if newest[0] is None:
        return None
    folder = _folder(uri, newest[0])
    folders.verify_folder(folder, folders.open_folder(folder))
    return torch.load(io.BytesIO(storage.read_bytes(storage.join(folder, "state.pt"))), map_location="cpu", weights_only=True)


def restore_rng(state: dict[str, Any], seed: int, ranks: Any) -> None:
    """This rank's random state; a rank that was not there gets one of its own."""
    if ranks.rank >= len(state["random"]):
        torch.manual_seed(mix(seed, ranks.rank, state["step"]))
        return
    mine = state["random"][ranks.rank]
    torch.set_rng_state(mine["cpu"])
    if mine["cuda"] is not None and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"])


def newest(uri: str) -> int:
    """Step of the newest complete resume point, 0 when there is none."""
    return (_steps(uri) or [0])[-1]


def clear(uri: str) -> None:
    storage.remove_tree(uri)
