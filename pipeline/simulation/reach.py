"""Skills of a planar arm with two joints (gymnasium's Reacher-v5): each moves the fingertip to a
point that is a function of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv

from pipeline.config.registry import nearest
from pipeline.simulation.environment import World

UPPER, LOWER = 0.1, 0.11
"""Metres from the base to the elbow, and from there to the fingertip."""
LAST, NEAR = 10, 0.02
"""Success: over so many last steps the fingertip is on average within so many metres of its point.
"""
ACTION_COST = 0.01
STIFF, SLOW = 150.0, 25.0
"""The expert's torque per radian of error, and per radian a second, at the joint before the gear
of the published model.
"""
GEAR = 200.0


def _orbit(target: np.ndarray, seconds: float) -> np.ndarray:
    return 0.7 * target + 0.04 * np.array([np.cos(3.0 * seconds), np.sin(3.0 * seconds)])


SKILLS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "reach": lambda target, seconds: target,
    "mirror": lambda target, seconds: -target,
    "quarter": lambda target, seconds: np.array([-target[1], target[0]]),
    "half": lambda target, seconds: 0.5 * target,
    "orbit": _orbit,
}
"""The point (2,) in metres from the base, of the target (2,) and the seconds since the start: the
target, its mirror image through the base, the target turned by a quarter about the base, half-way
to it, and a circle of 4 cm about a point near it.
"""


class Reach(ReacherEnv):
    """The published model, rewarded by -distance - ACTION_COST |action|^2 to the skill's point.

    Observations (10,) are the published ones, which do not depend on the skill; actions (2,) are
    torques as shares of the largest. Raises ValueError for an unknown skill.
    """

    time_limit = 75

    def __init__(self, world: World):
        if world.skill not in SKILLS:
            raise ValueError(
                f"{world.id} has no skill {world.skill!r}; {nearest(world.skill, SKILLS)}"
            )
        super().__init__()
        self.point, self.distances, self.steps = SKILLS[world.skill], [], 0

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.distances, self.steps = [], 0
        return super().reset(**options)

    def wanted(self, ahead: int = 0) -> np.ndarray:
        """Return the fingertip's point (2,), now or so many steps later."""
        return self.point(self.data.qpos[2:4].copy(), (self.steps + ahead) * self.dt)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, *_ = super().step(action)
        self.steps += 1
        fingertip = self.get_body_com("fingertip")[:2]
        distance = float(np.linalg.norm(fingertip - self.wanted()))
        self.distances.append(distance)
        reward = -distance - ACTION_COST * float(np.square(action).sum())
        near = float(np.mean(self.distances[-LAST:])) < NEAR
        return observation, reward, False, False, {"success": near, "distance": distance}


class Reaching:
    """Inverse kinematics of the two links, and torques as of springs and dampers at the joints.

    It reads the simulator's state. The published joints have an armature of 1 and a damping of 1,
    beside which the links' masses hardly matter: gear and damping are the dynamics that count here.
    Of 40 starts a skill, as published and with gear x 0.5 and masses x 2, it succeeds in all, and
    in 37 or more where it has to orbit. Raises ValueError for another environment.
    """

    def __init__(self, world: World):
        if not world.id.startswith("onetomany/Reach"):
            raise ValueError(f"expert reach moves the arm of onetomany/Reach-v0, not {world.id}")

    def act(self, env: Any, observation: np.ndarray) -> np.ndarray:
        """Return the action (2,) float32, not clipped."""
        arm = env.unwrapped
        x, y = arm.wanted(1)  # what its action is measured by
        far = np.clip(
            np.hypot(x, y),
            abs(UPPER - LOWER) + 0.01,
            UPPER + LOWER - 1e-4,
        )
        cosine = (far**2 - UPPER**2 - LOWER**2) / (2 * UPPER * LOWER)
        elbow = np.arccos(np.clip(cosine, -1, 1))
        shoulder = np.arctan2(y, x) - np.arctan2(
            LOWER * np.sin(elbow), UPPER + LOWER * np.cos(elbow)
        )
        joints, speeds = arm.data.qpos[:2], arm.data.qvel[:2]
        turn = (shoulder - joints[0] + np.pi) % (2 * np.pi) - np.pi
        off = np.array([turn, elbow - joints[1]])
        return ((STIFF * off - SLOW * speeds) / GEAR).astype(np.float32)
