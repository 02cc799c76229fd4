"""Demonstrations in simulation: episodes of an expert, one row each."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, nearest, register
from pipeline.core.rng import mix
from pipeline.io import storage
from pipeline.prepare.engine.episodes import (
    Episode,
    EpisodeImporter,
    Episodes,
    Result,
    episode_fields,
    episode_row,
)
from pipeline.prepare.engine.importing import Notes, invalid_row, parse_names
from pipeline.prepare.engine.shard_tasks import Amounts, ProgressCallback, Settings
from pipeline.prepare.engine.table_importer import SCANS
from pipeline.simulation import environment, experts, rollout, training
from pipeline.simulation.environment import World
from pipeline.simulation.trained_policy import TrainedPolicy

SPLITS = {"train": "episodes", "validation": "validation_episodes", "test": "test_episodes"}
"""Splits, whose order is part of the seeds, and the option with each one's episodes."""
SEED_BITS = 53
"""Seeds of worlds are whole numbers that JSON readers keep exactly."""
PPO, WORLDS = "ppo", 8
"""The expert that is trained here, and the number of worlds for that if dynamics are random."""
MORE = [
    pa.field("environment", pa.string()),
    pa.field("return", pa.float64()),
    pa.field("success", pa.bool_()),
    pa.field("random_return", pa.float64()),
    pa.field("random_success", pa.bool_()),
    pa.field("random_steps", pa.int64()),
]


class RolloutsOptions(Options):
    expert: str = Field(
        "",
        description="who acts: lqr (pendulums), reach, push, wall, random; ppo: trained here "
        "first; or the .safetensors of one that was",
    )
    expert_steps: int = Field(
        1_000_000,
        ge=1,
        description="with expert=ppo: steps of the environment that it is trained for, on one core",
    )
    episodes: int = Field(100, ge=0, description="episodes to train on")
    validation_episodes: int = Field(0, ge=0, description="episodes for validation")
    test_episodes: int = Field(
        0,
        ge=0,
        description="episodes for testing: their worlds are those in which a policy is tried",
    )
    max_steps: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="steps after which an episode is cut; 0: as the environment has it",
    )
    seed: int = Field(
        0, ge=0, description="of all episodes: each follows from it, its split and its number alone"
    )
    dynamics: str = Field(
        "",
        description="multipliers mass, friction, damping, gear, and latency (steps), noise: "
        "mass=2.5,gear=0.45, or drawn mass=0.5..2",
    )
    skills: str = Field(
        "", description="of environments with several: episodes are shared out evenly, reach,push"
    )
    explore: float = Field(
        0.0,
        ge=0,
        le=1,
        description="train episodes only: noise of what is executed, a share of half an action's "
        "range (DART)",
    )
    keep: Literal["all", "success"] = Field(
        "all", description="success: only episodes in which the expert succeeded"
    )
    embodiment: str = Field(
        "", description="the robot's name; empty: the environment's, without its version"
    )


class Job(NamedTuple):
    """An episode to be made."""

    split: str
    number: int
    world: World


@register("importer", "rollouts", options=RolloutsOptions)
class Rollouts(EpisodeImporter):
    """Episodes of an expert in simulation.

    SOURCE is an environment, such as InvertedDoublePendulum-v5, Hopper-v5 or
    onetomany/WallFollowing-v0 (extra robotics). Columns of a row, which is an episode:

    - episode, task (the skill), embodiment, observations, rewards, terminated, truncated, steps
    - actions: those that the expert chose
    - executed: those that were done. They are the expert's own, except in train episodes with --set
      explore=: noise leads to observations that the expert alone never meets (DART, Laskey et al.
      2017). Validation and test episodes have no noise.
    - environment: id, steps, seed and dynamics, which make the world again
    - return, and success (null if not defined)
    - random_return, random_success, random_steps: those of a random policy in the same world (null
      if its simulation diverged)

    The same seeds give the same rows with any number of workers. An expert that is trained here, by
    proximal policy optimisation in worlds of these dynamics, is stored beside the rows as
    _expert.safetensors, and may be named as the expert of other runs.

    Left out and counted: episodes in which the simulator diverged, and with --set keep=success
    those in which the expert failed.
    """

    reads_files = False
    rows_a_part = 16

    def __init__(self, options: Any = None):
        super().__init__(options)
        o = self.options
        if not o.expert:
            raise ValueError(
                f"--set expert= is missing: who acts? {nearest('', [*experts.EXPERTS, PPO])}, "
                "or the file of a trained one"
            )
        self.ranges = _ranges(o.dynamics)
        self.skills = parse_names(o.skills)
        if not sum(getattr(o, option) for option in SPLITS.values()):
            raise ValueError(
                "--set episodes=0: no episodes in any split; give episodes=, "
                "validation_episodes= or test_episodes="
            )
        if o.expert == PPO and len(self.skills) > 1:
            raise ValueError(
                f"--set expert=ppo: one is trained for one skill, not for {o.skills}; prepare "
                "them apart"
            )
        self.classes: list[str] | None = None
        self.fps: float | None = None
        self.robot, self.world, self.code = "", World("", 1, 0), ""
        self.trained: Any = None

    # ------------------------------------------------------------ what there is to make

    def index(self, source: str, settings: Settings) -> Episodes:
        o = self.options
        environment.check_environment_id(source)
        self.robot = o.embodiment or re.sub(r".*[:/]|-v\d+$", "", source)
        steps = o.max_steps or self._time_limit(source)
        self.world = World(source, steps, 0, {}, self.skills[0] if self.skills else "")
        jobs = []
        for place, (split, option) in enumerate(SPLITS.items()):
            for number in range(getattr(o, option)):
                seed = mix(o.seed, place, number) >> (63 - SEED_BITS)
                skill = self.skills[number % len(self.skills)] if self.skills else ""
                dynamics = environment.sample_dynamics(self.ranges, seed)
                jobs.append(Job(split, number, World(source, steps, seed, dynamics, skill)))
        content = self._load()
        first_worlds = {job.world.skill: job.world for job in reversed(jobs)}
        widths = [self._check_world(world) for world in first_worlds.values()]
        # other environments may report success in their last step's `info`
        judged = rollout.has_success_criterion(source) or not environment.is_part_of_gymnasium(
            source
        )
        self.label = "task" if self.skills else "success" if judged else ""
        if o.keep == "success" and not judged:
            raise ValueError(
                f"--set keep=success: what success is in {source} is not known; known: "
                f"{', '.join(rollout.WITH_CRITERION)}. Leave keep out"
            )
        versions = {name: metadata.version(name) for name in ("gymnasium", "mujoco")}
        info = {
            "expert": o.expert,
            "dynamics": o.dynamics,
            "skills": self.skills,
            "classes": self.classes,
            "explore": o.explore,
            "fps": self.fps,
            "versions": versions,
        }
        made_by = [content, *map(" ".join, versions.items()), *filter(None, [self.code])]
        fingerprint = " ".join([source, str(steps), *made_by])
        numbers_a_step = max(seen + 2 * done + 1 for seen, done in widths)
        sizes = np.full(len(jobs), 4.0 * steps * numbers_a_step)
        columns = [*episode_fields(self.classes is not None, True, executed=True), *MORE]
        return Episodes(
            jobs,
            [job.split for job in jobs],
            sizes,
            columns,
            fingerprint,
            {"steps at most": steps},
            info,
        )

    def _load(self) -> str:
        """Load the expert of a file and return the file's SHA-256; "" for other experts."""
        name = self.options.expert
        if not name.endswith(".safetensors"):
            return ""
        if not storage.exists(name):
            raise ValueError(
                f"{name}: no such file for --set expert; name the _expert.safetensors that "
                "expert=ppo left beside its rows"
            )
        data = storage.read_bytes(name)
        try:
            self.trained = TrainedPolicy.from_bytes(data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return hashlib.sha256(data).hexdigest()

    def before_shards(self, output: str, report_progress: ProgressCallback) -> None:
        """Train the expert, if asked for; a training that was stopped goes on."""
        if self.options.expert != PPO:
            return
        kept = storage.join(output, "_expert.safetensors")
        if storage.exists(kept):
            self.trained = TrainedPolicy.from_bytes(storage.read_bytes(kept))
            return
        ranged = any(isinstance(value, tuple) for value in self.ranges.values())
        seeds = [mix(self.options.seed, len(SPLITS), i) for i in range(WORLDS if ranged else 1)]
        dynamics = [environment.sample_dynamics(self.ranges, seed) for seed in seeds]
        worlds = [replace(self.world, dynamics=one) for one in dynamics]
        self.trained = training.train(
            worlds[0],
            env_steps=self.options.expert_steps,
            seed=self.options.seed,
            others=worlds[1:],
            progress=lambda line: report_progress(f"expert: {line}", False),
            checkpoint=storage.join(output, SCANS, "training.safetensors"),
        )
        storage.write_bytes(kept, self.trained.to_bytes())

    def _time_limit(self, source: str) -> int:
        """Return the steps of an episode that the environment defines.

        Raises ValueError for an environment without a limit, or that cannot be made.
        """
        env = environment.make(World(source, 1, 0, {}, self.skills[0] if self.skills else ""))
        env.close()
        import gymnasium

        registered = gymnasium.registry.get(source.rpartition(":")[2])
        found = getattr(env.unwrapped, "time_limit", None) or (
            registered.max_episode_steps if registered else None
        )
        if not found:
            raise ValueError(
                f"{source} has no time limit of its own; say how long an episode is: --set "
                "max_steps=400"
            )
        return int(found)

    def _check_world(self, world: World) -> tuple[int, int]:
        """Return (numbers of an observation, of an action) of a world.

        Raises ValueError for a world that cannot be made, or in which the expert cannot act.
        """
        env = environment.make(world)
        try:
            seen, done = env.observation_space, env.action_space
            seconds = getattr(env.unwrapped, "dt", None)
            self.fps = round(1 / float(seconds), 6) if seconds else None
            environment.check_spaces(env, world.id)
            self.code = environment.code_of(env)
            idle = environment.multipliers_without_effect(env, world.dynamics)
            if idle:
                raise ValueError(
                    f"--set dynamics={self.options.dynamics}: {', '.join(idle)} changes nothing in "
                    f"{world.id}; leave it out"
                )
            if done.shape and not np.isfinite([done.low, done.high]).all():
                raise ValueError(
                    f"{world.id}: actions without bounds ({done}), so there is no random policy to "
                    "compare with; give its action_space finite bounds"
                )
            self.classes = (
                None
                if done.shape
                else list(getattr(env.unwrapped, "classes", None) or map(str, range(done.n)))
            )
            if self.classes and self.options.explore:
                raise ValueError(
                    f"--set explore={self.options.explore:g}: noise of numbers, while "
                    f"{world.id} takes classes of actions; leave it out"
                )
        finally:
            env.close()
        if self.trained is not None:
            self._check_trained(world)
        elif self.options.expert != PPO:
            experts.expert(self.options.expert, world)
        return seen.shape[0], done.shape[0] if done.shape else 4

    def _check_trained(self, world: World) -> None:
        """Raise ValueError for an expert of another environment or skill; dynamics may differ."""
        own = World.parse(self.trained.metadata.get("world", ""))
        wanted = World.parse(world.text())
        if (own.id, own.skill) != (wanted.id, wanted.skill):
            theirs, asked = (
                f"{one.id} (skill {one.skill})" if one.skill else one.id for one in (own, wanted)
            )
            raise ValueError(
                f"--set expert={self.options.expert} was trained in {theirs}, while {asked} is "
                "asked for; name an expert of its own"
            )

    # ------------------------------------------------------------ the episodes of a part

    def episodes(self, items: list[Job], settings: Settings) -> Iterator[Result]:
        # one after the other: an expert gains nothing from a batch, and a single model stays in the
        # processor's cache
        for job in items:
            explore = self.options.explore if job.split == "train" else 0.0
            expert = self.trained or experts.expert(self.options.expert, job.world)
            (shown,) = experts.demonstrations([job.world], [expert], explore)
            random = shown
            if self.options.expert != "random":
                actor = experts.expert("random", job.world)
                (random,) = experts.demonstrations([job.world], [actor])
            yield self._result(job, shown, random)

    def _result(self, job: Job, found: rollout.Episode, random: rollout.Episode) -> Result:
        name, total = f"{job.split}-{job.number:06d}", float(found.rewards.sum())
        if found.diverged:
            reason = f"the simulator diverged: {found.diverged}"
            invalid = invalid_row(f"episode {name}", job.split, reason)
            return Result(job.split, invalid=invalid, amounts={"diverged": 1})
        amounts = {"simulated": 1, "return": total, **_success(found.success)}
        if job.world.skill:
            amounts |= _success(found.success, f" at {job.world.skill}")
        if random.diverged:
            random_figures: tuple[Any, ...] = (None, None, None)
            amounts["random diverged"] = 1
        else:
            random_figures = float(random.rewards.sum()), random.success, len(random.rewards)
            amounts |= {
                "random": 1,
                "random return": random_figures[0],
                **_success(random.success, " of random"),
            }
        if self.options.keep == "success" and found.success is None:
            raise ValueError(
                f"--set keep=success: {job.world.id} does not say in its last step's info whether "
                "it succeeded (success or is_success); leave keep out"
            )
        if self.options.keep == "success" and not found.success:
            return Result(job.split, amounts={**amounts, "failed": 1})
        assert found.executed is not None
        actions, executed = (
            acts if self.classes is None else [self.classes[code] for code in acts.tolist()]
            for acts in (found.actions, found.executed)
        )
        episode = Episode(
            name,
            found.observations,
            actions,
            found.terminated,
            found.truncated,
            found.rewards,
            None,
            job.world.skill,
            self.robot,
            executed,
        )
        more = zip(MORE, (job.world.text(), total, found.success, *random_figures), strict=True)
        columns = {field.name: pa.array([value], field.type) for field, value in more}
        table = episode_row(episode, job.split, columns)
        return Result(job.split, table, amounts={**amounts, "steps": len(found.rewards)})

    def summary_amounts(self, amounts: Amounts) -> Notes:
        shares = {
            "expert's success": ("success", "judged"),
            "expert's return, mean": ("return", "simulated"),
            "random policy's success": ("success of random", "judged of random"),
            "random policy's return, mean": ("random return", "random"),
            **{
                f"expert's success at {skill}": (f"success at {skill}", f"judged at {skill}")
                for skill in self.skills
            },
        }
        out: Notes = {"steps": amounts["steps"]}
        for text, (name, of) in shares.items():
            if of in amounts:
                out[text] = {
                    split: round(amounts[name].get(split, 0) / count, 4)
                    for split, count in amounts[of].items()
                }
        return out | {
            text: amounts[name]
            for name, text in (
                ("diverged", "episodes in which the simulator diverged"),
                ("random diverged", "episodes in which the random policy's simulation diverged"),
                ("failed", "episodes left out, in which the expert failed"),
            )
            if name in amounts
        }


def _success(success: bool | None, whose: str = "") -> dict[str, int]:
    """Return the counts to add up; none where success is not known."""
    return {} if success is None else {f"judged{whose}": 1, f"success{whose}": int(success)}


def _ranges(text: str) -> dict[str, float | tuple[float, float]]:
    """Parse mass=2.5,gear=0.5..2 to numbers and (low, high). Raises ValueError for another form."""
    out: dict[str, float | tuple[float, float]] = {}
    known = (*environment.MULTIPLIERS, *environment.ADDED)
    for part in parse_names(text):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in known or name in out:
            raise ValueError(
                f"--set dynamics={text}: {name!r} "
                + ("occurs twice" if name in out else f"is not one of them; {nearest(name, known)}")
            )
        try:
            ends = [float(end) for end in value.split("..")] if equals else []
        except ValueError:
            ends = []
        if len(ends) not in (1, 2) or sorted(ends) != ends:
            raise ValueError(
                f"--set dynamics={text}: {part!r} is no number and no range; write {name}=2.5 "
                f"or {name}=0.5..2"
            )
        for end in ends:
            World("", 1, 0, {name: end})
        out[name] = ends[0] if len(ends) == 1 else (ends[0], ends[1])
    return out
