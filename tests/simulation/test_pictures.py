"""Pictures where they can be made, and none without a word where not."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pipeline.simulation.environment import World
from pipeline.simulation.experts import Demonstrator, expert
from pipeline.simulation.pictures import SIZE
from pipeline.simulation.rollout import rollout

MUJOCO = """
from pipeline.simulation.environment import World
from pipeline.simulation.experts import Demonstrator, expert
from pipeline.simulation.rollout import rollout
world = World("Reacher-v5", 7, 0)
who = Demonstrator([expert("random", world)])
found = rollout([world], who, frames=3, start=who.start)[0]
print(len(found.rewards), sorted({one.shape for one in found.frames}), len(found.frames), len({one.tobytes() for one in found.frames}))
"""


def shown(frames):
    world = World("onetomany/WallFollowing-v0", 7, 0)
    who = Demonstrator([expert("wall", world)])
    return rollout([world], who, frames=frames, start=who.start)[0].frames


def test_a_picture_every_so_many_steps():
    assert [len(shown(frames)) for frames in (0, 3, 7)] == [0, 3, 1]
    first, *_, last = shown(3)
    assert first.shape == (*SIZE, 3) and first.dtype == np.uint8 and not np.array_equal(first, last)
    assert {(0, 0, 0), (200, 40, 40), (255, 255, 255)} <= {
        tuple(colour) for colour in first.reshape(-1, 3).tolist()
    }


def test_mujoco_draws_only_where_a_driver_is_named(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    world = World("Reacher-v5", 4, 0)
    who = Demonstrator([expert("random", world)])
    found = rollout([world], who, frames=2, start=who.start)[0]
    assert found.frames == [] and len(found.rewards) == 4


@pytest.mark.slow
def test_mujoco_draws_through_egl_where_it_can():
    env = {**os.environ, "MUJOCO_GL": "egl"}
    message = subprocess.run(
        [sys.executable, "-c", MUJOCO], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    # The second: a machine without its driver
    assert message in (
        "7 [(96, 128, 3)] 3 3",
        "7 [] 0 0",
    )
