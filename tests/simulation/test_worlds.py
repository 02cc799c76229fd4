"""Our own environments: the arm's skills and the room with range sensors, with their experts."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import f1_score

from pipeline.simulation import range_world, reach
from pipeline.simulation.environment import World, make
from pipeline.simulation.experts import demonstrations, expert
from pipeline.simulation.range_world import ACTIONS, ANGLES, MAX_RANGE

ROOM = "onetomany/WallFollowing-v0"
ARM = "onetomany/Reach-v0"
LOG = Path(
    os.environ.get("ONETOMANY_DATA", "/"), "robotics/scitos_wall_following/wall_following.parquet"
)


@pytest.mark.parametrize("skill", reach.SKILLS)
def test_the_scripted_arm_does_every_skill(skill):
    worlds = [World(ARM, reach.Reach.time_limit, seed, {}, skill) for seed in range(6)]
    found = demonstrations(worlds, [expert("reach", world) for world in worlds])
    assert all(one.success and one.truncated and len(one.rewards) == 75 for one in found)
    random = demonstrations(worlds, [expert("random", world) for world in worlds])
    assert not any(one.success for one in random) and max(
        one.rewards.sum() for one in random
    ) < min(one.rewards.sum() for one in found)


def test_skills_are_points_of_the_target():
    target = np.array([0.1, -0.05])
    assert np.allclose(
        [reach.SKILLS[name](target, 0.0) for name in ("reach", "mirror", "quarter", "half")],
        [[0.1, -0.05], [-0.1, 0.05], [0.05, 0.1], [0.05, -0.025]],
    )
    circle = (
        np.array([reach.SKILLS["orbit"](target, t) for t in np.linspace(0, 3, 50)]) - 0.7 * target
    )
    assert np.allclose(np.linalg.norm(circle, axis=1), 0.04) and np.ptp(circle[:, 0]) > 0.07


def test_a_moving_point_is_measured_where_it_is_after_the_step():
    arm = make(World(ARM, 75, 3, {}, "orbit")).unwrapped
    arm.reset(seed=3)
    target = arm.data.qpos[2:4].copy()
    assert np.array_equal(arm.wanted(), reach.SKILLS["orbit"](target, 0.0))
    for step in range(1, 4):
        ahead = arm.wanted(1)
        _, _, _, _, info = arm.step(np.zeros(2))
        want = reach.SKILLS["orbit"](target, step * arm.dt)
        assert np.array_equal(arm.wanted(), want) and np.array_equal(ahead, want)
        assert info["distance"] == np.linalg.norm(arm.get_body_com("fingertip")[:2] - want)


def test_the_arm_that_reaches_does_not_mirror():
    """What counts is the skill's own point, not that of another."""
    world = World(ARM, 75, 3, {}, "reach")

    class Elsewhere:
        def act(self, env, observation):
            arm = env.unwrapped
            arm.point, kept = reach.SKILLS["mirror"], arm.point
            action = expert("reach", world).act(env, observation)
            arm.point = kept
            return action

    assert not demonstrations([world], [Elsewhere()])[0].success


def test_an_unknown_skill_is_named():
    with pytest.raises(
        ValueError, match="onetomany/Reach-v0 has no skill 'reech'; did you mean reach"
    ):
        make(World(ARM, 5, 0, {}, "reech"))


# ---------------------------------------------------------------- the room


def test_rays_meet_walls_where_geometry_says():
    walls = np.array(
        [(0.0, 0.0, 4.0, 0.0), (4.0, 0.0, 4.0, 3.0), (4.0, 3.0, 0.0, 3.0), (0.0, 3.0, 0.0, 0.0)]
    )
    distance, glance, wall, _ = range_world.cast(
        walls, np.array([1.0, 1.0]), np.deg2rad([0, 90, 180, -90, 45])
    )
    assert (
        np.allclose(distance, [3, 2, 1, 1, 2 * np.sqrt(2)])
        and np.allclose(glance, [1, 1, 1, 1, np.sqrt(0.5)])
        and wall[:4].tolist() == [1, 2, 3, 0]
    )
    assert np.allclose(np.rad2deg(ANGLES[[12, 18, 0, 6]]), [0, 90, -180, -90])


def test_the_follower_follows_and_resembles_the_log():
    worlds = [World(ROOM, 200, seed) for seed in range(12)]
    found = demonstrations(worlds, [expert("wall", world) for world in worlds])
    assert np.mean([one.success for one in found]) > 0.9
    seen = np.concatenate([one.observations for one in found])
    assert seen.min() >= 0 and seen.max() == MAX_RANGE and seen.shape[1] == 24
    assert set(np.concatenate([one.actions for one in found]).tolist()) == {0, 1, 2, 3}
    blind = demonstrations(worlds, [expert("random", world) for world in worlds])
    assert np.mean([one.success for one in blind]) < np.mean([one.success for one in found])


def test_a_room_follows_from_its_seed():
    first, again, other = (
        demonstrations([World(ROOM, 30, seed)], [expert("wall", World(ROOM, 30, seed))])[0]
        for seed in (4, 4, 5)
    )
    assert np.array_equal(first.observations, again.observations) and not np.array_equal(
        first.observations[0], other.observations[0]
    )


def test_driving_into_a_wall_ends_the_episode():
    class Ahead:
        def act(self, env, observation):
            return 0

    found = demonstrations([World(ROOM, 500, 1)], [Ahead()])[0]
    assert found.terminated and not found.success and len(found.rewards) < 500


def test_an_action_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"action 4: there are 4, Move-Forward"):
        make(World(ROOM, 5, 0)).step(4)


def driven(action, **dynamics):
    """Metres and radians of one second of an action, in a room without noise."""
    env = make(World(ROOM, 50, 7, dynamics)).unwrapped
    env.reset(seed=7)
    place, heading = env.place, env.heading
    for _ in range(9):
        env.step(action)
    return np.linalg.norm(env.place - place), env.heading - heading


def test_actions_drive_and_turn_as_in_the_log():
    (ahead, straight), (spot, sharp), (left, slight), (right, slow) = (
        driven(action) for action in range(4)
    )
    assert (
        0.15 <= ahead <= 0.2
        and straight == 0
        and spot == 0
        and np.deg2rad(-13) <= sharp <= np.deg2rad(-8)
    )
    assert (
        np.deg2rad(6) <= slight <= np.deg2rad(11)
        and np.deg2rad(-3) <= slow <= np.deg2rad(-1)
        and right < 0.6 * left
    )


def test_gear_multiplies_all_speeds():
    for action in range(4):
        assert np.allclose(driven(action, gear=0.5), np.multiply(driven(action), 0.5), rtol=1e-2)


def test_walls_are_mirrors_to_glancing_beams():
    """Beside one long wall the sensors that look at it squarely tell its distance; the one that
    glances it hears the second wall, or nothing.
    """
    env = make(World(ROOM, 50, 0)).unwrapped
    env.walls = np.array(
        [
            (-50.0, 0.0, 50.0, 0.0),
            (50.0, 0.0, 50.0, 40.0),
            (50.0, 40.0, -50.0, 40.0),
            (-50.0, 40.0, -50.0, 0.0),
        ]
    )
    env.place, env.heading = np.array([0.0, 0.6]), np.pi  # the wall on the left
    seen = env.sense()
    assert (
        np.allclose(seen[17:20], 0.6, atol=0.04)
        and (seen[[15, 21]] < 1).all()
        and (seen[[13, 14, 22, 23, 6]] > 3).all()
    )


def logged():
    """(4092, 24) metres and names of actions of the first three quarters of the log; the last
    quarter is kept for the jobs.
    """
    table = pq.read_table(LOG).slice(0, 4092)
    return np.stack([table[f"S{i}"].to_numpy() for i in range(1, 25)], 1), table[
        "action_name"
    ].to_pylist()


@pytest.mark.data
@pytest.mark.skipif(not LOG.exists(), reason="needs the folder that ONETOMANY_DATA names")
def test_the_rule_is_the_one_that_the_real_robot_drove_by():
    seen, actions = logged()
    rule = expert("wall", World(ROOM, 5, 0))
    assert [ACTIONS[rule.act(None, one)] for one in seen] == actions and sorted(
        set(actions)
    ) == list(ACTIONS)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not LOG.exists(), reason="needs the folder that ONETOMANY_DATA names")
def test_a_classifier_that_has_seen_only_the_twin_knows_what_the_real_robot_did():
    worlds = [World(ROOM, 300, seed) for seed in range(20)]
    found = demonstrations(worlds, [expert("wall", world) for world in worlds])
    forest = RandomForestClassifier(50, min_samples_leaf=2, random_state=0)
    forest.fit(
        np.concatenate([one.observations for one in found]),
        np.concatenate([one.actions for one in found]),
    )
    seen, actions = logged()
    # 0.14 for the most frequent action alone
    assert (
        f1_score(actions, [ACTIONS[code] for code in forest.predict(seen)], average="macro") > 0.85
    )
