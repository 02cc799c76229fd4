"""A robot with 24 range sensors that follows the walls of rooms in the plane. No MuJoCo.

It simulates the SCITOS G5 log (Freire et al. 2009, "Short-term memory mechanisms in neural network
learning of robot navigation tasks"; UCI data set 194). What is like the log was measured on its
first three quarters; what differs from one room to the next is drawn around that:

- Sensors: S1 looks back, S7 right, S13 ahead, S19 left. Here sensor i (from 0) is at -180 + 15 i
  degrees, counter-clockwise.
- Move-Forward: 0.17 m/s (SPEED).
- Slight-Left-Turn: 0.16 m/s, 8.5 degrees/s (SPEED, SLIGHT_LEFT).
- Slight-Right-Turn: 0.09 m/s, 1 to 3 degrees/s (half of SPEED, SLIGHT_RIGHT).
- Sharp-Right-Turn: on the spot, 10 degrees/s (SHARP_RIGHT).
- A flat wall beside the robot: sensors 45 degrees off its normal also see it, those 60 degrees off
  do not (BEAM, GLANCING).
- No echo: 5 m in 2 to 36 % of the readings, for some steps in a row (NO_ECHO_SHARE,
  REDRAW_PROBABILITY).
- The driver (`WallFollower`) looked at the smallest of S11..S15 and the smallest of S18..S20.

The driver turned sharply right where the first was at most 0.9 m; else slightly right where the
second was below 0.495 m, slightly left above 0.9 m, and drove ahead between them. That gives every
one of the log's actions. A random forest that has seen 60 rooms of this world and nothing of the
log has a macro-F1 of 0.95 on the log's last quarter, a small perceptron 0.74, logistic regression
0.66 (1 % of the log's training time: 0.27, -, 0.21).
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from pipeline.core.rng import mix
from pipeline.simulation.environment import World

ACTIONS = ("Move-Forward", "Sharp-Right-Turn", "Slight-Left-Turn", "Slight-Right-Turn")
"""Names of the actions by number, as in the published log."""
SENSORS, MAX_RANGE, HERTZ = 24, 5.0, 9.0
"""Number of sensors, their range in metres, readings and actions a second."""
ANGLES = np.deg2rad(-180 + 15 * np.arange(SENSORS))
AHEAD, LEFT = slice(10, 15), slice(17, 20)
"""Sensors S11..S15 and S18..S20, which the driver used."""
NEAR_AHEAD, NEAR_LEFT, FAR_LEFT = 0.9, 0.4945, 0.9
"""Thresholds of the driver's rule, in metres."""
SPEED = (0.15, 0.2)
SLIGHT_LEFT = (6.0, 11.0)
SLIGHT_RIGHT = (1.0, 3.0)
SHARP_RIGHT = (8.0, 13.0)
"""Ranges of m/s and degrees/s, drawn once a room."""
BEAM = np.deg2rad((-14.0, -7.0, 0.0, 7.0, 14.0))
"""Rays of one sensor's beam; it reads the nearest echo."""
GLANCING = (35.0, 50.0)
"""Degrees from a wall's normal beyond which it sends no echo straight back (ultrasound: walls are
mirrors), drawn once a room; corners always do.
"""
CORNER = 0.04
"""Metres from a wall's end that count as its corner."""
NO_ECHO_SHARE, REDRAW_PROBABILITY = (0.3, 0.9), 0.2
"""Of the echoes that come back by way of a second wall, the share that is lost, drawn once for
each room; and the probability that a sensor draws anew, at each step, whether its echo is lost.
"""
JITTER = 0.006
"""Standard deviation of a reading, in metres."""
RADIUS = 0.25
"""Of the robot, in metres: a wall that is closer is hit."""
PAID_DISTANCE, MIN_SPEED = (0.3, 1.1), 0.05
"""Metres from the wall on the left at which the robot is rewarded; and the metres a second that it
must drive at such distances, on average over an episode, for success.
"""


class RangeWorld(gymnasium.Env):
    """A room with boxes in it, drawn by the seed together with the robot's start, speeds and
    sensors.

    Actions are indices in ACTIONS. An observation is (24,) float32 metres from 0 to MAX_RANGE. The
    reward is the metres driven in a step while the nearest wall on the left is PAID_DISTANCE metres
    away, else 0. A collision terminates the episode. Success: no collision up to the time limit,
    and a mean reward of MIN_SPEED metres a second. Dynamics: gear multiplies all speeds; latency
    and noise as in every environment. Raises ValueError for a skill.
    """

    classes, time_limit, takes = ACTIONS, 450, ("gear",)

    def __init__(self, world: World):
        if world.skill:
            raise ValueError(f"{world.id} has no skill {world.skill!r}; leave skill out")
        self.observation_space = spaces.Box(0.0, MAX_RANGE, (SENSORS,), np.float32)
        self.action_space = spaces.Discrete(len(ACTIONS))
        self.gear = world.dynamics.get("gear", 1.0)
        self.reset(seed=world.seed)

    def reset(
        self, *, seed: int | None = None, options: Any = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw a room and a start by the seed, or by the stream if there is none."""
        if seed is not None:
            self.rng = np.random.default_rng(mix(seed, 0x5C1))
        rng = self.rng
        self.walls = room(rng)
        speed, slight_left, slight_right, sharp = (
            rng.uniform(*of) * self.gear for of in (SPEED, SLIGHT_LEFT, SLIGHT_RIGHT, SHARP_RIGHT)
        )
        self.drive = (
            (speed, 0.0),
            (0.0, -np.deg2rad(sharp)),
            (speed, np.deg2rad(slight_left)),
            (0.5 * speed, -np.deg2rad(slight_right)),
        )
        self.mirror = np.cos(np.deg2rad(rng.uniform(*GLANCING)))
        self.lost = rng.uniform(*NO_ECHO_SHARE)
        self.echo_draws = rng.random(SENSORS)
        self.place, self.heading = _start(self.walls, rng)
        self.steps, self.driven = 0, 0.0
        return self.sense(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one step. Raises ValueError for an unknown action."""
        if not 0 <= int(action) < len(ACTIONS):
            raise ValueError(
                f"action {action}: there are {len(ACTIONS)}, {', '.join(ACTIONS)}, numbered from 0"
            )
        speed, turn = self.drive[int(action)]
        self.heading += turn / HERTZ
        self.place = self.place + speed / HERTZ * np.array(
            [np.cos(self.heading), np.sin(self.heading)]
        )
        beside = cast(self.walls, self.place, self.heading + ANGLES[LEFT])[0].min()
        reward = speed / HERTZ if PAID_DISTANCE[0] <= beside <= PAID_DISTANCE[1] else 0.0
        self.steps, self.driven = self.steps + 1, self.driven + reward
        has_hit = clearance(self.walls, self.place) < RADIUS
        return (
            self.sense(),
            reward,
            bool(has_hit),
            False,
            {"success": bool(not has_hit and self.driven * HERTZ >= MIN_SPEED * self.steps)},
        )

    def picture(self, height: int, width: int) -> np.ndarray:
        """Draw the room from above, (height, width, 3) uint8: walls black, robot red with a blue
        front.
        """
        out = np.full((height, width, 3), 255, dtype=np.uint8)
        far_x, far_y = self.walls[:, 0].max(), self.walls[:, 1].max()
        scale = min((width - 1) / far_x, (height - 1) / far_y)
        along = np.linspace(0, 1, 2 * width)[:, None, None]
        front = self.place + RADIUS * np.array([np.cos(self.heading), np.sin(self.heading)])
        ring = np.linspace(0, 2 * np.pi, 60)
        hull = self.place + RADIUS * np.linspace(0.1, 1, 8)[:, None, None] * np.stack(
            [np.cos(ring), np.sin(ring)], 1
        )
        begin, end = self.walls[:, :2], self.walls[:, 2:]
        for points, colour in (
            (begin + along * (end - begin), (0, 0, 0)),
            (hull, (200, 40, 40)),
            (self.place + along * (front - self.place), (40, 40, 220)),
        ):
            pixels = (points.reshape(-1, 2) * scale).astype(int)
            out[
                np.clip(height - 1 - pixels[:, 1], 0, height - 1),
                np.clip(pixels[:, 0], 0, width - 1),
            ] = colour
        return out

    def sense(self) -> np.ndarray:
        """Return the sensors' readings: the nearest echo of their beams.

        Where all walls are met at a glancing angle, the echo is that of the second wall to which
        the beam is reflected, or none.
        """
        rays = (self.heading + ANGLES[:, None] + BEAM).ravel()
        distance, cosine, wall, corner = cast(self.walls, self.place, rays)
        is_echo = (cosine >= self.mirror) | corner
        echoes = np.where(is_echo, distance, np.inf)
        distances = echoes.reshape(SENSORS, -1).min(1)
        deaf = np.flatnonzero(np.isinf(distances))
        if len(deaf):
            ray = deaf * len(BEAM) + len(BEAM) // 2
            along = self.walls[wall[ray], 2:] - self.walls[wall[ray], :2]
            angle = 2 * np.arctan2(along[:, 1], along[:, 0]) - rays[ray]  # mirrored
            way = np.stack([np.cos(rays[ray]), np.sin(rays[ray])], 1)
            mirrored_at = self.place + (distance[ray] - 1e-6)[:, None] * way
            second = cast(self.walls, mirrored_at, angle)[0]
            distances[deaf] = np.where(
                self.echo_draws[deaf] < self.lost, MAX_RANGE, distance[ray] + second
            )
        renewed = self.rng.random(SENSORS) < REDRAW_PROBABILITY
        self.echo_draws = np.where(renewed, self.rng.random(SENSORS), self.echo_draws)
        return np.clip(
            distances + JITTER * self.rng.standard_normal(SENSORS), 0.0, MAX_RANGE
        ).astype(np.float32)


def cast(
    walls: np.ndarray, place: np.ndarray, angles: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Intersect rays with walls.

    Args:
        place: (2,) origin of all rays, or (n, 2).
        angles: (n,) in the room.
        walls: (M, 4).

    Returns:
        (n,) each: metres to the nearest wall (inf: none), cosine between the ray and its normal,
            its index, and whether the ray meets its corner.
    """
    start, along = walls[:, :2], walls[:, 2:] - walls[:, :2]
    x, y = np.cos(angles)[:, None], np.sin(angles)[:, None]
    to = start - np.atleast_2d(place)[:, None]  # (n or 1, M, 2)
    cross = x * along[:, 1] - y * along[:, 0]
    safe = np.where(np.abs(cross) < 1e-12, np.nan, cross)
    to_wall = to[..., 0] * along[:, 1] - to[..., 1] * along[:, 0]
    distance = to_wall / safe
    share = (to[..., 0] * y - to[..., 1] * x) / safe
    distance = np.where(
        (distance > 0) & (share >= 0) & (share <= 1),
        distance,
        np.inf,
    )
    wall = distance.argmin(1)
    every, length = np.arange(len(angles)), np.linalg.norm(along, axis=1)[wall]
    met = share[every, wall] * length
    return (
        distance[every, wall],
        np.abs(cross[every, wall]) / length,
        wall,
        np.minimum(met, length - met) < CORNER,
    )


def clearance(walls: np.ndarray, place: np.ndarray) -> float:
    """Return the metres from a point (2,) to the nearest of `walls` (M, 4)."""
    start, along = walls[:, :2], walls[:, 2:] - walls[:, :2]
    share = np.clip(
        ((place - start) * along).sum(1) / (along**2).sum(1),
        0,
        1,
    )
    nearest = start + share[:, None] * along
    return float(np.linalg.norm(nearest - place, axis=1).min())


def room(rng: np.random.Generator) -> np.ndarray:
    """Draw (M, 4) walls, from (x, y) to (x, y): a rectangle of 3.5 to 8 by 3 to 6 metres, and up
    to five boxes, of which one may stand free.
    """
    width, height = rng.uniform(3.5, 8), rng.uniform(3, 6)
    boxes = [(0.0, 0.0, width, height)]
    for _ in range(rng.integers(0, 5)):
        wide = rng.uniform(0.4, 1.8)
        deep = rng.uniform(0.3, 1.0)
        along = rng.uniform(0, 1)
        side = rng.integers(4)
        if side < 2:
            x, y = along * (width - wide), (0.0, height - deep)[side]
            boxes.append((x, y, x + wide, y + deep))
        else:
            x, y = (0.0, width - deep)[side - 2], along * (height - wide)
            boxes.append((x, y, x + deep, y + wide))
    if rng.random() < 0.5 and min(width, height) > 4:
        x = width / 2 + rng.uniform(-0.3, 0.3)
        y = height / 2 + rng.uniform(-0.3, 0.3)
        size = rng.uniform(0.2, 0.5)
        boxes.append((x - size, y - size, x + size, y + size))
    return np.array(
        [
            line
            for left, low, right, high in boxes
            for line in (
                (left, low, right, low),
                (right, low, right, high),
                (right, high, left, high),
                (left, high, left, low),
            )
        ]
    )


def _start(walls: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Draw a place beside one of the outer walls, and a heading that has it roughly on the left."""
    corner = walls[:4].reshape(-1, 2).max(0)
    while True:
        wall = walls[rng.integers(4)]
        along = wall[2:] - wall[:2]
        way = along / np.linalg.norm(along)
        inward = np.array([-way[1], way[0]])
        place = wall[:2] + rng.uniform(0, 1) * along + rng.uniform(0.4, 1.1) * inward
        heading = float(np.arctan2(-way[1], -way[0]) + rng.uniform(-0.5, 0.9))
        if (
            (place > 0.4).all()
            and (place < corner - 0.4).all()
            and not _within(walls, place)
            and clearance(walls, place) > 0.38
        ):
            return place, heading


def _within(walls: np.ndarray, place: np.ndarray) -> bool:
    """Whether a point is in one of the boxes."""
    boxes = walls[4:].reshape(-1, 4, 4)
    low, high = boxes[:, 0, :2], boxes[:, 1, 2:]
    return bool(((place > low) & (place < high)).all(1).any())


class WallFollower:
    """The rule by which the real robot was driven (see above), applied to the sensors' readings.

    Raises ValueError for another environment.
    """

    def __init__(self, world: World):
        if not world.id.startswith("onetomany/WallFollowing"):
            raise ValueError(f"expert wall drives in onetomany/WallFollowing-v0, not in {world.id}")

    def act(self, env: Any, observation: np.ndarray) -> int:
        """Return the index in ACTIONS for readings (24,) in metres."""
        ahead, left = observation[AHEAD].min(), observation[LEFT].min()
        if ahead <= NEAR_AHEAD:
            return 1
        return 2 if left > FAR_LEFT else 3 if left <= NEAR_LEFT else 0
