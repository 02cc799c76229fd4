"""Worlds make the same environment again, change what they say and nothing else, and refuse what
they cannot be.
"""

import json

import mujoco
import numpy as np
import pytest

from pipeline.simulation import environment
from pipeline.simulation.environment import World, check_environment_id, make, sample_dynamics

PENDULUM = "InvertedDoublePendulum-v5"


def model_of(**dynamics):
    return make(World(PENDULUM, 50, 0, dynamics)).unwrapped.model


def test_a_world_is_its_text():
    world = World("Hopper-v5", 300, 7, {"mass": 1.5, "latency": 2.0}, "hop")
    assert World.parse(world.text()) == world and world.text() == World.parse(world.text()).text()
    for text in ("", "[]", '{"id": "a"}', '{"id": "a", "steps": 3, "seed": 1, "dynamics": 4}'):
        with pytest.raises(ValueError, match="is not a world"):
            World.parse(text)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dynamics": {"mass": "x"}}, "could not convert string to float: 'x'"),
        ({"steps": "ten"}, "'ten'"),
        ({"seed": float("inf")}, "cannot convert float infinity"),
        ({"dynamics": {"mas": 2.0}}, "dynamics mas: did you mean mass"),
        ({"steps": 0}, "steps 0: an episode has at least 1"),
    ],
)
def test_a_text_that_is_no_world_is_named_with_what_is_wrong_in_it(changed, said):
    with pytest.raises(ValueError, match=r"'\{\"id\": \"Hopper-v5\".* is not a world: .*" + said):
        World.parse(json.dumps({"id": "Hopper-v5", "steps": 3, "seed": 1, **changed}))


@pytest.mark.parametrize(
    ("dynamics", "said"),
    [
        ({"mas": 2.0}, "dynamics mas: did you mean mass"),
        ({"mass": 0.0}, "dynamics mass=0.0: a multiplier above 0"),
        ({"gear": float("nan")}, "dynamics gear=nan"),
        ({"latency": 1.5}, "latency=1.5: a whole number of steps"),
        ({"noise": -1.0}, "noise=-1.0: a deviation from 0"),
    ],
)
def test_dynamics_that_are_none_are_refused(dynamics, said):
    with pytest.raises(ValueError, match=said):
        World(PENDULUM, 10, 0, dynamics)


def test_an_episode_has_steps_and_a_seed():
    with pytest.raises(ValueError, match="steps 0: an episode has at least 1"):
        World(PENDULUM, 0, 0)
    with pytest.raises(ValueError, match="seed -1: a whole number from 0"):
        World(PENDULUM, 5, -1)


def test_dynamics_change_what_they_say_and_nothing_else():
    plain = model_of()
    for name, arrays in environment.FIELDS.items():
        model = model_of(**{name: 2.5})
        for array in {array for fields in environment.FIELDS.values() for array in fields}:
            factor = 2.5 if array in arrays else 1.0
            assert np.allclose(getattr(model, array), factor * getattr(plain, array), rtol=1e-12), (
                name,
                array,
            )


def test_what_follows_from_masses_follows_them():
    """Subtree masses and inverse inertias are MuJoCo's own for a model that is written with those
    masses.
    """
    heavy = model_of(mass=2.5)
    text = mujoco.MjModel.from_xml_path(make(World(PENDULUM, 5, 0)).unwrapped.fullpath)
    text.body_mass[:] *= 2.5
    text.body_inertia[:] *= 2.5
    mujoco.mj_setConst(text, mujoco.MjData(text))
    for name in ("body_subtreemass", "dof_invweight0", "body_invweight0"):
        assert np.allclose(getattr(heavy, name), getattr(text, name))
        assert not np.allclose(getattr(heavy, name), getattr(model_of(), name))


def episode(world, actions):
    env = make(world)
    seen = [env.reset(seed=world.seed)[0]]
    for action in actions:
        seen.append(env.step(np.array([action]))[0])
    return np.array(seen)


def test_late_actions_come_so_many_steps_later():
    actions = np.linspace(-1, 1, 8)
    late = episode(World(PENDULUM, 50, 3, {"latency": 2}), actions)
    prompt = episode(World(PENDULUM, 50, 3), [0, 0, *actions[:6]])
    assert np.array_equal(late, prompt) and not np.allclose(
        late, episode(World(PENDULUM, 50, 3), actions)
    )


def test_noise_is_on_observations_alone_and_follows_the_seed():
    actions = [0.1] * 30
    clean, noisy = (
        episode(World(PENDULUM, 50, 3, dynamics), actions) for dynamics in ({}, {"noise": 0.05})
    )
    assert np.std(noisy - clean) == pytest.approx(0.05, rel=0.15)
    assert np.array_equal(noisy, episode(World(PENDULUM, 50, 3, {"noise": 0.05}), actions))
    assert not np.allclose(
        (noisy - clean)[0],
        (
            episode(World(PENDULUM, 50, 4, {"noise": 0.05}), actions)
            - episode(World(PENDULUM, 50, 4), actions)
        )[0],
    )


def test_noise_differs_from_episode_to_episode():
    """Where one environment is reset again and again, as in training: by the seed given to reset,
    and without one it goes on.
    """
    noisy, clean = (make(World(PENDULUM, 50, 3, dynamics)) for dynamics in ({"noise": 0.05}, {}))
    found = [noisy.reset(seed=seed)[0] - clean.reset(seed=seed)[0] for seed in (3, 8, 3)]
    assert np.allclose(found[0], found[2]) and not np.allclose(found[0], found[1])
    first = [env.reset()[0] for env in (noisy, clean)]
    assert not np.allclose(first[0] - first[1], found[0])


def test_ranges_are_drawn_by_the_seed_within_their_bounds():
    ranges = {"mass": (0.5, 2.0), "gear": 0.7, "latency": (0, 3), "noise": (0.0, 0.1)}
    found = [sample_dynamics(ranges, seed) for seed in range(400)]
    assert found[5] == sample_dynamics(ranges, 5) and len({one["mass"] for one in found}) == 400
    masses, late = np.array([one["mass"] for one in found]), {one["latency"] for one in found}
    assert (
        masses.min() >= 0.5
        and masses.max() <= 2.0
        and abs(np.log(masses).mean()) < 0.08
        and late == {0.0, 1.0, 2.0, 3.0}
    )
    assert {one["gear"] for one in found} == {0.7} and all(
        World(PENDULUM, 1, 0, one) for one in found
    )


@pytest.mark.parametrize("ends", [(2.0, 0.5), (0.0, 1.0), (1.0,), (1.0, float("nan"))])
def test_a_range_that_is_none_is_refused(ends):
    with pytest.raises(ValueError, match="dynamics mass="):
        sample_dynamics({"mass": ends}, 0)


def test_what_is_not_installed_is_named(monkeypatch):
    with pytest.raises(
        ValueError,
        match=r"environment 'InvertedDoublePendulun-v5' is not installed; did you mean "
        r"InvertedDoublePendulum-v5",
    ):
        make(World("InvertedDoublePendulun-v5", 10, 0))
    with pytest.raises(
        ValueError, match="environment 'Hopper' is not installed; did you mean Hopper-v5"
    ):
        check_environment_id("Hopper")
    make(World("CartPole", 10, 0)).close()  # rows that say so are read
    with pytest.raises(ValueError, match="nowhere:Hopper-v5: No module named 'nowhere'"):
        make(World("nowhere:Hopper-v5", 10, 0))
    with pytest.raises(ValueError, match="Hopper-v5 has no skill 'jump'"):
        make(World("Hopper-v5", 10, 0, {}, "jump"))
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with pytest.raises(ValueError, match="robotics"):
        make(World(PENDULUM, 10, 0))


def test_a_missing_simulator_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mujoco", None)
    for ident in (PENDULUM, "onetomany/Push-v0"):
        with pytest.raises(ValueError, match="robotics"):
            make(World(ident, 10, 0))


def test_masses_of_what_has_none_are_refused():
    with pytest.raises(ValueError, match="is not a MuJoCo environment: it has no mass to multiply"):
        make(World("onetomany/WallFollowing-v0", 10, 0, {"mass": 2.0}))


@pytest.mark.parametrize(
    "ident",
    [
        "planted_module:Env-v0",
        "planted_module:Hopper-v5",
        "os:system",
        "a/b/c-v0",
        "Hopper-v5 ",
        "",
        "../x",
        "x\n",
    ],
)
def test_a_row_cannot_name_code(ident, tmp_path, monkeypatch):
    """gymnasium imports what stands before a colon, from the working folder too."""
    (tmp_path / "planted_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ValueError,
        match="is not a plain id of a registered environment, such as Hopper-v5; rows cannot name "
        "code",
    ):
        make(World.parse(json.dumps({"id": ident, "steps": 5, "seed": 0, "dynamics": {}})))
    assert not (tmp_path / "ran").exists()


def test_a_text_never_names_code():
    """`prepare rollouts module:id` writes rows of the id alone."""
    text = World("planted_module:a/Env-v0", 5, 3).text()
    assert World.parse(text) == World("a/Env-v0", 5, 3)


def test_a_world_of_a_row_ends():
    with pytest.raises(ValueError, match="an episode has at most 1000000"):
        World.parse(json.dumps({"id": "Hopper-v5", "steps": 10**15, "seed": 0, "dynamics": {}}))
