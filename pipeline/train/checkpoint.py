"""Resume points of a run: weights, optimiser, moving average, position, every rank's random state.

A resume point is complete or absent; its bytes are checked before it is used.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.core.rng import mix
from pipeline.io import atomic_folder, s3, storage
from pipeline.train.evaluate import gather_objects
from pipeline.train.ranks import Ranks

KEPT = 2
"""How many resume points are kept: where the newest is damaged, the one before it is used."""


class RandomState(TypedDict):
    """State of torch's random generators on one rank."""

    cpu: Tensor
    cuda: Tensor | None


class TrainingState(TypedDict):
    """The state of a run, the same on every rank; torch reads its values with ``weights_only``."""

    step: int
    """How many steps were taken."""
    phase: int
    """Number of the technique's phase in which the last step was."""
    task: dict[str, Tensor]
    optimizer: dict[str, Any]
    """torch's ``state_dict``."""
    ema: dict[str, Tensor] | None
    """The moving average of the weights, where there is one."""
    keeper: Mapping[str, Any]
    """What `Keeper.state_dict` returned."""
    curve: list[dict[str, Any]]
    """Step and metrics of each validation."""
    skipped: int
    """How many steps were not finite."""
    seconds: float
    """Seconds of training so far."""


class ResumePoint(TrainingState):
    """The content of a resume point."""

    random: list[RandomState]
    """Random state of each rank."""
    bad_rows: dict[int, str]
    """Row id to reason of the rows that could not be read, of all ranks."""


def _steps(uri: str) -> list[int]:
    """Return the steps of the complete resume points, ascending."""
    files = storage.list_files(uri) if storage.is_dir(uri) else []
    names = [file.rsplit("/", 2)[-2] for file in files if file.endswith("/manifest.json")]
    return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))


def _folder(uri: str, step: int) -> str:
    return storage.join(uri, f"step-{step:010d}")


def save(
    uri: str, ranks: Ranks, state: TrainingState, bad_rows: dict[int, str] | None = None
) -> None:
    """Write a resume point; called by every rank at the same step.

    Args:
        state: The same on every rank.
        bad_rows: Row id to reason of the rows that this rank could not read so far; those of all
            ranks are written.
    """
    random: RandomState = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if ranks.device.type == "cuda" else None,
    }
    everyone = gather_objects((random, bad_rows or {}), ranks)
    if ranks.is_first:
        with storage.scratch_folder() as scratch:
            path = Path(scratch, "state.pt")
            unread = {row: reason for _, bad in everyone for row, reason in bad.items()}
            resume_point: ResumePoint = {
                **state,
                "random": [random for random, _ in everyone],
                "bad_rows": unread,
            }
            with s3.naming("write", path), open(path, "wb") as file:
                torch.save(resume_point, file)
            atomic_folder.commit_folder(
                _folder(uri, state["step"]),
                {"state.pt": path},
                {"step": state["step"], "format_version": 1},
            )
        for old in _steps(uri)[:-KEPT]:
            storage.remove_tree(_folder(uri, old))
    if ranks.count > 1:
        dist.barrier()


def load(
    uri: str, ranks: Ranks, restart_if_damaged: bool = False
) -> tuple[ResumePoint | None, list[str]]:
    """Read the newest resume point that is intact, the same one on every rank.

    Rank 0 finds it and broadcasts its step. Damaged resume points that are newer are removed:
    the run writes those steps again.

    Args:
        restart_if_damaged: Where none is intact, remove them all and start again from step 0.

    Returns:
        The saved state, or None when there is no resume point, and a line for each damaged
        resume point that was skipped.

    Raises:
        StorageError: On every rank: there are resume points and none is intact (unless
            ``restart_if_damaged``), or they cannot be read at this moment.
    """
    state: ResumePoint | None = None
    from_rank_zero: list[Any] = [None]
    if ranks.is_first:
        state, notes, problem = _newest_intact(uri, restart_if_damaged)
        from_rank_zero = [(state["step"] if state else None, notes, problem)]
    if ranks.count > 1:
        dist.broadcast_object_list(from_rank_zero, src=0)
    step, notes, problem = from_rank_zero[0]
    if problem:
        raise storage.StorageError(problem)
    if step is not None and state is None:
        state = _read(_folder(uri, step))
    return state, notes


def _newest_intact(uri: str, restart_if_damaged: bool) -> tuple[ResumePoint | None, list[str], str]:
    """Return the newest state that can be read, a line for each newer one that is damaged, and the
    error that stops the run, or "".
    """
    damaged: dict[int, str] = {}
    try:
        for step in reversed(_steps(uri)):
            try:
                state = _read(_folder(uri, step))
            except storage.StorageError as error:
                if not _is_damage(error):
                    raise
                damaged[step] = f"the resume point of step {step} is damaged ({error})"
                continue
            for newer in damaged:
                storage.remove_tree(_folder(uri, newer))
            return (
                state,
                [f"{line}: training goes on from that of step {step}" for line in damaged.values()],
                "",
            )
        if damaged and restart_if_damaged:
            storage.remove_tree(uri)
            again = "none is intact, so training starts again from step 0"
            return None, [f"{line}: {again}" for line in damaged.values()], ""
    except storage.StorageError as error:
        return None, [], str(error)
    if damaged:
        first = next(iter(damaged.values()))
        return (
            None,
            [],
            f"no resume point in {uri} is intact: {first}. Remove that folder to start again "
            "from step 0",
        )
    return None, [], ""


def _is_damage(error: storage.StorageError) -> bool:
    """Whether content is damaged or missing. Storage that does not answer is no damage."""
    return isinstance(error, (storage.DamagedError, storage.NotFoundError))


def _read(folder: str) -> ResumePoint:
    """Return the state of a resume point after comparing its checksums.

    Raises StorageError where they differ.
    """
    atomic_folder.verify_folder(folder, atomic_folder.open_folder(folder))
    content = storage.read_bytes(storage.join(folder, "state.pt"))
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def restore_rng(state: ResumePoint, seed: int, ranks: Ranks) -> None:
    """Restore this rank's random state. A rank that did not exist then gets a new one."""
    if ranks.rank >= len(state["random"]):
        torch.manual_seed(mix(seed, ranks.rank, state["step"]))
        return
    mine = state["random"][ranks.rank]
    torch.set_rng_state(mine["cpu"])
    if mine["cuda"] is not None and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"])
