"""The ranks of a run, as in torch.distributed, and their devices."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and the device of this rank."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0


def default_device() -> torch.device:
    """Return the GPU of this process, or the CPU where it has none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
