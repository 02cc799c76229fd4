"""An environment of a user's own, which a job or a command names under `plugins`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Cart(gymnasium.Env):
    """A cart on a line, which succeeds where it ends within 0.1 of the middle."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        self.state = np.array([self.np_random.uniform(-1.0, 1.0), 0.0], np.float32)
        return self.state.copy(), {}

    def step(self, action: np.ndarray):
        place, speed = self.state
        speed = 0.5 * speed + 0.3 * float(action[0])
        self.state = np.array([place + speed, speed], np.float32)
        reward = -abs(float(self.state[0]))
        return self.state.copy(), reward, False, False, {"success": reward > -0.1}


gymnasium.register("own/Cart-v0", Cart, max_episode_steps=20)
