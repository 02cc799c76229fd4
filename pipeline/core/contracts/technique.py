"""What a technique promises: how a backbone is adapted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pipeline.config.registry import Options
from pipeline.core.batch import Batch
from pipeline.core.contracts.objective import Task


@dataclass(frozen=True)
class Phase:
    """A part of a run with its own rates: a schedule of its own, and a fresh optimiser."""

    name: str
    steps: int
    lr_scale: float = 1.0


class Technique:
    """How a backbone is adapted, as hooks that by default do nothing (= train everything)."""

    registered_name: ClassVar[str]
    options_class: ClassVar[type[Options]]
    from_source: ClassVar[bool] = True
    """False: the backbone starts from its random initialisation."""
    needs_training: ClassVar[bool] = True
    """False: the source's network is tried as it is; one trial stands for all label fractions and
    seeds.
    """
    frozen: ClassVar[bool] = False
    """True: the backbone never moves, so that its features may be computed once."""

    def __init__(self, options: Any = None):
        self.options: Any = options if options is not None else self.options_class()

    def wrap(self, task: Task) -> Task:
        return task

    def steps(self, steps: int) -> int:
        """How many it takes where the target is given so many."""
        return steps

    def phases(self, steps: int) -> tuple[Phase, ...]:
        return (Phase("all", steps),)

    def rates(self, layers: dict[str, list[str]], phase: str) -> dict[str, float]:
        """Learning-rate multiplier of every layer, 0 for frozen. Must name each layer exactly
        once.
        """
        return dict.fromkeys(layers, 1.0)

    def penalty(self, task: Task, batch: Batch) -> Tensor | None:
        """A regulariser added to the mean loss."""
        return None

    def streams(self) -> tuple[str, ...]:
        """Names of further streams that the loss reads."""
        return ()

    def finish(self, task: Task) -> Task:
        """The trained task as it is tested and kept, under the names of the one that ``wrap`` was
        given: adapters are merged into the weights.
        """
        return task

    def at_test(self, task: Task, stream: Any) -> Task:
        """Change of the task before the test rows are read (e.g. statistics of the target)."""
        return task

    def after_fanout(self, trials: list[Any]) -> list[Any]:
        """Further trials made of finished ones (soups, weight-space ensembles)."""
        return []
