"""A policy trained by One to Many, step by step: observations in, actions out, in their own units.

This file was written beside the graph of an export, for the plugin of LeRobot. It needs torch
alone. The network is a program of torch.export. It runs on the CPU.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

MAX_DEVIATIONS = 10.0
"""Standardised observations are clipped to so many deviations, as in training."""


class PolicySpec(TypedDict):
    """What a network reads and gives. Shapes: O numbers of an observation, A of an action."""

    inputs: list[str]
    """Names of the tensors that the graph takes."""
    reach: int
    """How many of the last steps the network reads."""
    ensemble: float | None
    """An action is the mean of all its predictions, weighted by exp(-ensemble i), i = 0 the
    oldest; None: the newest prediction alone."""
    chunk: int
    """How many actions are predicted at each step."""
    tasks: list[str]
    """The tasks that the network knows."""
    observation_mean: list[float]
    observation_std: list[float]
    action_mean: list[float]
    action_std: list[float]


def load_graph(program: Tensor) -> Any:
    """Open a program of torch.export from the bytes (N,) uint8 of its file."""
    file = io.BytesIO(program.cpu().numpy().tobytes())
    with warnings.catch_warnings():
        # torch warns of its own buffers, which nothing writes to
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.export.load(file).module()


class PolicySteps:
    """Chooses the actions of B worlds that go in step, and remembers what the network reads."""

    def __init__(self, graph: Any, spec: PolicySpec):
        self.graph, self.spec = graph, spec
        self.observation_mean = torch.tensor(spec["observation_mean"])
        std = torch.tensor(spec["observation_std"], dtype=torch.float64)
        self.observation_scale = (1 / std).float()
        self.action_mean = torch.tensor(spec["action_mean"])
        self.action_std = torch.tensor(spec["action_std"])
        self.reset()

    def reset(self) -> None:
        """Forget everything seen and done: a new episode begins."""
        reach, chunk = self.spec["reach"], self.spec["chunk"]
        self.seen: deque[Tensor] = deque(maxlen=reach)
        self.done: deque[Tensor] = deque(maxlen=reach)
        self.plans: deque[Tensor] = deque(maxlen=chunk)

    def act(self, state: Tensor, tasks: Sequence[str] = ()) -> Tensor:
        """Return the actions (B, A) of a step.

        Args:
            state: (B, O), in the robot's own units.
            tasks: Of each world the task; none, or one that is not known: no task.
        """
        self._plan(state, tasks)
        newest = len(self.plans) - 1
        told = torch.stack([plan[:, newest - age] for age, plan in enumerate(self.plans)])
        rate = self.spec["ensemble"]
        if rate is None:
            value = told[-1]
        else:
            weights = torch.tensor([math.exp(-rate * i) for i in range(len(told))]).double()
            value = torch.einsum("i,ina->na", weights / weights.sum(), told.double()).float()
        return self._executed(value)

    def chunk(self, state: Tensor, tasks: Sequence[str] = ()) -> Tensor:
        """Return the next H actions (B, H, A) as they are predicted at this step.

        The first of them counts as executed.
        """
        plan = self._plan(state, tasks)
        self._executed(plan[:, 0])
        return plan * self.action_std + self.action_mean

    def _executed(self, value: Tensor) -> Tensor:
        """Remember a standardised action (B, A), and return it in its own units."""
        action = value * self.action_std + self.action_mean
        self.done[-1] = (action - self.action_mean) / self.action_std
        return action

    @torch.no_grad()
    def _plan(self, state: Tensor, tasks: Sequence[str]) -> Tensor:
        """Return standardised actions (B, H, A), of this step and those that follow."""
        state = state.detach().cpu().float()
        if self.seen and len(state) != len(self.seen[-1]):
            raise ValueError(
                f"{len(state)} observations, the step before had {len(self.seen[-1])}: call "
                "reset() where an episode begins"
            )
        observed = (state - self.observation_mean) * self.observation_scale
        self.seen.append(observed.clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS))
        self.done.append(torch.zeros(len(state), len(self.action_mean)))
        known = self.spec["tasks"]
        task = [known.index(name) + 1 if name in known else 0 for name in tasks]
        steps = len(self.seen)
        inputs = {
            "observations": self._padded(self.seen),
            "executed": self._padded(self.done),
            "mask": self._padded([torch.ones(len(state), dtype=torch.bool)] * steps),
            "task": torch.tensor(task or [0] * len(state)),
            "space": torch.zeros(len(state), dtype=torch.int64),  # there is one
        }
        actions = self.graph({name: inputs[name] for name in self.spec["inputs"]})["actions"]
        self.plans.append(actions[:, steps - 1])
        return self.plans[-1]

    def _padded(self, steps: Sequence[Tensor]) -> Tensor:
        """Return steps (B, T, ...); behind them are zeros, which no earlier step reads."""
        tensor = torch.stack(tuple(steps), 1)
        missing = max(2, self.spec["reach"]) - tensor.shape[1]
        return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1)
