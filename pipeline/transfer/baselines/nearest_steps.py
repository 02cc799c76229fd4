"""Actions of the demonstrated steps that look most alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Baseline, BaselineRows, LabelKind, Setting

READ = ("observations", "space", "task")
"""The decoded arrays of a trajectory that are read; frames are not."""


class NearestStepsOptions(Options):
    neighbours: list[int] = Field(
        [1, 5, 20],
        min_length=1,
        description="numbers of neighbours, of which the best on validation rows is kept; no more "
        "than there are demonstrated steps",
    )


@register("baseline", "nearest_steps", options=NearestStepsOptions)
class NearestSteps(Baseline):
    """The mean action of the demonstrated steps with the nearest observations.

    Observations are standardised by the demonstrated steps. Those of the same robot and task are
    searched, and of all tasks of the robot where its task was never demonstrated. Strong where few
    demonstrations cover what the policy meets; it does not extrapolate. Pari et al. 2021, "The
    Surprising Effectiveness of Representation Learning for Visual Imitation".
    """

    roles = ("observations",)
    label_kinds = ("actions",)

    def settings(self) -> tuple[Setting, ...]:
        return tuple({"neighbours": value} for value in self.options.neighbours)

    def inputs(self, rows: BaselineRows) -> np.ndarray:
        """Return (m, 2 + O) float32 of m steps: the numbers of space and task, the observation."""
        assert rows.positions is not None
        steps = rows.modality.collate({name: rows.arrays[name] for name in READ})
        is_step = steps["mask"].numpy()
        row, _ = np.nonzero(is_step)
        space = steps["space"].numpy()[row]
        task = steps["task"].numpy()[row]
        group = np.stack([space, task], axis=1)
        observations = steps["observations"].numpy()[is_step]
        return np.concatenate([group.astype(np.float32), observations], axis=1)

    def estimator(self, setting: Setting, seed: int, label_kind: LabelKind) -> Any:
        return _NearestSteps(int(setting["neighbours"]))


class _NearestSteps(RegressorMixin, BaseEstimator):
    """Nearest neighbours of each robot and task (the first two inputs) apart."""

    def __init__(self, neighbours: int):
        self.neighbours = neighbours

    def fit(self, inputs: np.ndarray, actions: np.ndarray) -> _NearestSteps:
        self.width = actions.shape[1]
        self.of_task: dict[tuple[int, int], Pipeline] = {}
        self.of_robot: dict[int, Pipeline] = {}
        for space in np.unique(inputs[:, 0]):
            mine = inputs[:, 0] == space
            self.of_robot[int(space)] = self._fitted(inputs[mine], actions[mine])
            for task in np.unique(inputs[mine, 1]):
                same = mine & (inputs[:, 1] == task)
                self.of_task[int(space), int(task)] = self._fitted(inputs[same], actions[same])
        return self

    def _fitted(self, inputs: np.ndarray, actions: np.ndarray) -> Pipeline:
        nearest = KNeighborsRegressor(min(self.neighbours, len(actions)))
        return make_pipeline(StandardScaler(), nearest).fit(inputs[:, 2:], actions)

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """Return (m, A) actions; zeros, the mean action, for a robot without a demonstration."""
        out = np.zeros((len(inputs), self.width))
        tasks = np.unique(inputs[:, :2], axis=0).astype(np.int64)
        for space, task in tasks.tolist():
            mine = (inputs[:, :2] == (space, task)).all(1)
            model = self.of_task.get((space, task), self.of_robot.get(space))
            if model is not None:
                out[mine] = model.predict(inputs[mine, 2:])
        return out
