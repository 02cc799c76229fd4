"""The puck goes where the expert pushes it, whatever the dynamics, and nowhere by itself."""

import numpy as np
import pytest

from pipeline.simulation import push
from pipeline.simulation.environment import World, make
from pipeline.simulation.experts import demonstrations, expert

PUSH = "onetomany/Push-v0"


@pytest.mark.parametrize(
    "dynamics",
    [{}, {"mass": 2.0, "friction": 1.5, "gear": 0.7}, {"mass": 0.5, "friction": 0.5}],
    ids=["nominal", "heavy", "light"],
)
def test_the_expert_brings_the_puck_to_its_goal(dynamics):
    worlds = [World(PUSH, push.Push.time_limit, seed, dynamics) for seed in range(6)]
    found = demonstrations(worlds, [expert("push", world) for world in worlds])
    assert all(one.success and not one.diverged and len(one.rewards) == 200 for one in found)
    random = demonstrations(worlds, [expert("random", world) for world in worlds])
    assert not any(one.success for one in random) and max(
        one.rewards.sum() for one in random
    ) < min(one.rewards.sum() for one in found)


def test_observations_are_what_they_say():
    env = make(World(PUSH, 10, 3))
    seen, _ = env.reset(seed=3)
    pusher, speed, puck, slide, goal = seen.reshape(5, 2)
    assert (
        not speed.any()
        and not slide.any()
        and 0.15 <= np.linalg.norm(goal - puck) <= 0.3
        and np.linalg.norm(pusher - puck) > push.TOUCH
    )
    later = env.step(np.array([1.0, 0.0]))[0].reshape(5, 2)
    assert (
        later[1][0] > 0.1
        and abs(later[1][1]) < 1e-3
        and np.allclose(later[4], goal)
        and np.allclose(later[2], puck, atol=1e-4)
    )


def test_friction_stops_the_puck_at_the_pace_of_coulomb():
    """A puck that slides at v comes to rest after v^2 / (2 mu g)."""
    for friction in (1.0, 2.0):
        plain = make(World(PUSH, 10, 0, {"friction": friction})).unwrapped
        plain.reset(seed=0)
        plain.data.qpos[:4] = 0.5, 0.5, -0.2, 0.0
        plain.data.qvel[2] = 0.8
        for _ in range(60):
            plain.step(np.zeros(2))
        assert plain.data.qpos[2] + 0.2 == pytest.approx(
            0.8**2 / (2 * 0.3 * friction * 9.81), rel=0.1
        )


def test_a_goal_that_nothing_is_pushed_to_is_no_success():
    class Still:
        def act(self, env, observation):
            return np.zeros(2, dtype=np.float32)

    found = demonstrations([World(PUSH, 30, 1)], [Still()])[0]
    assert (
        not found.success
        and found.truncated
        and np.allclose(found.observations[-1, 4:6], found.observations[0, 4:6], atol=1e-3)
    )


def test_pushing_has_no_skills_and_is_for_pucks():
    with pytest.raises(ValueError, match="onetomany/Push-v0 has no skill 'pull'"):
        make(World(PUSH, 5, 0, {}, "pull"))
    with pytest.raises(
        ValueError, match="expert push moves the puck of onetomany/Push-v0, not Hopper-v5"
    ):
        expert("push", World("Hopper-v5", 5, 0))
