"""The heartbeats of the processes that run trials.

`HeartbeatBoard` is an actor of Ray. Its process imports this module, so nothing here may import
torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class _Process:
    """A process that runs a work item."""

    actor: bytes
    """Its handle as an actor of Ray, pickled."""
    item_index: int
    """Index of the work item."""
    began: float
    """When it began, in seconds of `time.monotonic`."""
    last_beat: float
    """When it last sent a heartbeat, in seconds of `time.monotonic`."""


class HeartbeatBoard:
    """When each process that runs trials last sent a heartbeat, by the clock of this process."""

    def __init__(self):
        self.running: dict[str, _Process] = {}

    def begin(
        self, actor_id: str, actor: bytes, item_index: int, waits_for_ranks: bool = False
    ) -> None:
        """Note that a process begins a work item.

        Args:
            actor_id: Id of the process's actor, which its heartbeats carry.
            actor: The handle of that actor, pickled.
            item_index: Index of the work item.
            waits_for_ranks: Count silence and time from the first heartbeat, which each rank sends
                before anything else: a growing cluster may take long to place the ranks.
        """
        now = float("inf") if waits_for_ranks else time.monotonic()
        self.running[actor_id] = _Process(actor, item_index, now, now)

    def beat(self, actor_id: str, item_index: int) -> None:
        process = self.running.get(actor_id)
        if process is not None and process.item_index == item_index:
            process.last_beat = time.monotonic()
            process.began = min(process.began, process.last_beat)

    def end(self, item_index: int) -> None:
        self.running = {
            actor: process
            for actor, process in self.running.items()
            if process.item_index != item_index
        }

    def overdue(
        self, silence: float | None, limits: dict[int, float]
    ) -> list[tuple[int, bytes, str]]:
        """List the processes that are silent or over their time limit, each of them once.

        Args:
            silence: Seconds without a heartbeat; None: any number.
            limits: Seconds that a work item may take, by its index, where it has a limit.

        Returns:
            Index of the work item, pickled actor, and "silence" or "time".
        """
        now, out = time.monotonic(), []
        for actor_id, process in list(self.running.items()):
            late = now - process.began > limits.get(process.item_index, float("inf"))
            silent = silence is not None and now - process.last_beat > silence
            if late or silent:
                out.append((process.item_index, process.actor, "time" if late else "silence"))
                del self.running[actor_id]
        return out
