"""A round pusher on a table that brings a puck to a goal: two motors, one contact, ground
friction. The MuJoCo model is defined here.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from pipeline.core.rng import mix
from pipeline.simulation.environment import World, simulator

PUCK, PUSHER = 0.05, 0.03
"""Radii in metres."""
TOUCH = PUCK + PUSHER
XML = f"""
<mujoco model="push">
  <option timestep="0.005" integrator="implicitfast"/>
  <visual><global offwidth="640" offheight="480"/></visual>
  <worldbody>
    <light pos="0 0 2"/>
    <geom name="table" type="plane" size="0.6 0.6 0.1" friction="0.3 0.005 0.0001"
          rgba="0.9 0.9 0.9 1"/>
    <body name="pusher" pos="0 0 0.03">
      <joint name="pusher_x" type="slide" axis="1 0 0" limited="true"
             range="-0.55 0.55" damping="1"/>
      <joint name="pusher_y" type="slide" axis="0 1 0" limited="true"
             range="-0.55 0.55" damping="1"/>
      <geom name="pusher" type="cylinder" size="{PUSHER} 0.02" mass="0.5"
            friction="0.3 0.005 0.0001" contype="2" conaffinity="2" rgba="0.2 0.4 0.8 1"/>
    </body>
    <body name="puck" pos="0 0 0.0201">
      <joint name="puck_x" type="slide" axis="1 0 0"/>
      <joint name="puck_y" type="slide" axis="0 1 0"/>
      <joint name="puck_z" type="slide" axis="0 0 1"/>
      <joint name="puck_turn" type="hinge" axis="0 0 1"/>
      <geom name="puck" type="cylinder" size="{PUCK} 0.02" mass="0.3"
            friction="0.3 0.005 0.0001" contype="3" conaffinity="3" rgba="0.8 0.3 0.2 1"/>
    </body>
    <site name="goal" type="cylinder" size="0.02 0.001" rgba="0.2 0.7 0.3 1"/>
  </worldbody>
  <actuator>
    <motor joint="pusher_x" gear="6" ctrllimited="true" ctrlrange="-1 1"/>
    <motor joint="pusher_y" gear="6" ctrllimited="true" ctrlrange="-1 1"/>
  </actuator>
</mujoco>"""
"""The pusher has no weight on the table; the puck lies on it and slides with friction."""
LAST, NEAR = 10, 0.03
"""Success: over so many last steps the puck is on average within so many metres of the goal."""
ACTION_COST = 0.01


class Push(gymnasium.Env):
    """The environment; 40 steps a second.

    Observations (10,) float32: x, y of the pusher, its velocity, of the puck, its velocity, of the
    goal; metres and m/s. Actions (2,): forces as shares of the largest, 6 N. The reward is -(metres
    from puck to goal) - ACTION_COST |action|^2; an episode never terminates.

    The seed draws the puck within 20 cm of the centre, the goal 15 to 30 cm from it, and the pusher
    where it touches neither. Raises ValueError for a skill.
    """

    time_limit, frame_skip = 200, 5

    def __init__(self, world: World):
        if world.skill:
            raise ValueError(f"{world.id} has no skill {world.skill!r}; leave skill out")
        mujoco = simulator()
        self.model = mujoco.MjModel.from_xml_string(XML)
        self.data, self.mujoco = mujoco.MjData(self.model), mujoco
        self.observation_space = spaces.Box(-np.inf, np.inf, (10,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.dt = self.frame_skip * self.model.opt.timestep
        self.rng, self.goal, self.distances = np.random.default_rng(), np.zeros(2), []

    def reset(
        self, *, seed: int | None = None, options: Any = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw puck, goal and pusher by the seed, or by the stream if there is none."""
        if seed is not None:
            self.rng = np.random.default_rng(mix(seed, 0x905))
        rng, self.distances = self.rng, []
        self.mujoco.mj_resetData(self.model, self.data)
        puck = _around(rng, 0.0, 0.2)
        while True:
            self.goal = puck + _around(rng, 0.15, 0.3)
            pusher = _around(rng, 0.0, 0.45)
            if np.abs(self.goal).max() < 0.35 and np.linalg.norm(pusher - puck) > TOUCH + 0.02:
                break
        self.data.qpos[:4] = *pusher, *puck
        self.model.site("goal").pos[:2] = self.goal
        self.mujoco.mj_forward(self.model, self.data)
        return self._seen(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Apply forces (2,) for one step."""
        self.data.ctrl[:] = action
        self.mujoco.mj_step(self.model, self.data, self.frame_skip)
        self.distances.append(float(np.linalg.norm(self.data.qpos[2:4] - self.goal)))
        reward = -self.distances[-1] - ACTION_COST * float(np.square(action).sum())
        near = float(np.mean(self.distances[-LAST:])) < NEAR
        return self._seen(), reward, False, False, {"success": near, "distance": self.distances[-1]}

    def _seen(self) -> np.ndarray:
        place, speed = self.data.qpos, self.data.qvel
        pusher = [place[:2], speed[:2]]
        puck = [place[2:4], speed[2:4]]
        return np.concatenate([*pusher, *puck, self.goal]).astype(np.float32)


class Pushing:
    """An expert that goes round the puck to the side away from the goal, and then pushes it.

    It slows down as the puck nears the goal. It reads the simulator's state, masses, damping and
    gears. Raises ValueError for another environment.
    """

    FAST, PUSH = 0.6, 0.25
    """Speed of going and of pushing, m/s."""
    GRIP = 12.0
    """Share of a difference in speed that is corrected in a second."""

    def __init__(self, world: World):
        if not world.id.startswith("onetomany/Push"):
            raise ValueError(f"expert push moves the puck of onetomany/Push-v0, not {world.id}")

    def act(self, env: Any, observation: np.ndarray) -> np.ndarray:
        """Return the action (2,) float32, not clipped."""
        plain = env.unwrapped
        model, data = plain.model, plain.data
        pusher, puck, goal = data.qpos[:2], data.qpos[2:4], plain.goal
        way, pushing = self._way(pusher, puck, goal)
        mass = float(model.body("pusher").mass[0])
        velocity = data.qvel[:2]
        force = model.dof_damping[:2] * velocity + mass * self.GRIP * (way - velocity)
        if pushing:  # the puck's own mass and friction
            heavy = float(model.body("puck").mass[0])
            along = way / max(float(np.linalg.norm(way)), 1e-9)
            force = force + heavy * (
                self.GRIP * (way - data.qvel[2:4]) / 2
                + 9.81 * float(model.geom("puck").friction[0]) * along
            )
        return (force / model.actuator_gear[:, 0]).astype(np.float32)

    def _way(
        self, pusher: np.ndarray, puck: np.ndarray, goal: np.ndarray
    ) -> tuple[np.ndarray, bool]:
        """Return the velocity (2,) m/s that the pusher should have, and whether it pushes the puck.

        Args:
            pusher, puck, goal: (2,) positions in metres.
        """
        left = goal - puck
        far = float(np.linalg.norm(left))
        if far < 0.004:
            return np.zeros(2), False
        line, to = left / far, puck - pusher
        gap = float(np.linalg.norm(to))
        side = np.array([-left[1], left[0]]) / far
        # metres from the pusher to the puck along the line to the goal, and beside it
        ahead, beside = float(to @ line), float(to @ side)
        if ahead > 0.9 * TOUCH and abs(beside) < 0.35 * TOUCH:
            if gap > TOUCH + 0.005:
                return self._towards(to, 0.02 + gap - TOUCH), False
            # push through a point that lies to the puck's other side, so that it turns back to the
            # line
            speed = min(self.PUSH, 0.01 + 1.5 * far)
            return speed * line + 3.0 * beside * side, True
        behind = puck - 1.25 * TOUCH * line
        # the pusher is beside the puck or in front of it: go round it
        if ahead < 0.6 * TOUCH and abs(beside) < 1.2 * TOUCH and gap < 2.5 * TOUCH:
            turn = -np.sign(beside) if beside else 1.0
            out = (
                behind + turn * 1.35 * TOUCH * side
                if abs(beside) > TOUCH
                else puck + turn * 1.5 * TOUCH * side
            )
            return self._towards(out - pusher, float(np.linalg.norm(out - pusher))), False
        return self._towards(behind - pusher, float(np.linalg.norm(behind - pusher))), False

    def _towards(self, to: np.ndarray, far: float) -> np.ndarray:
        """Return a velocity (2,) in the direction `to`, slower where `far` metres are few."""
        direction = to / max(float(np.linalg.norm(to)), 1e-9)
        return direction * min(self.FAST, 5.0 * far)


def _around(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Draw a point (2,) uniformly by area, from `low` to `high` metres from the origin."""
    angle = rng.uniform(-np.pi, np.pi)
    far = np.sqrt(rng.uniform(low**2, high**2))
    return far * np.array([np.cos(angle), np.sin(angle)])
