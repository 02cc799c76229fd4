"""An expert for Hopper-v5 by PPO, as `prepare rollouts --set expert=ppo` trains one, beside random
actions: the mean return of ten episodes.

    .venv/bin/python tests/benchmarks/hopper.py --json hopper.json      # about 8 minutes of one core a seed

jobs/robotics/locomotion_small.yaml rests on seed 2: at least 1500 after a million environment steps. Not
every seed learns to hop: with seed 0 the hopper stands still (a return of 1034).
"""

from __future__ import annotations

import numpy as np
import timing

STEPS, QUICK_STEPS, TARGET = 1_000_000, 20_000, 1500
SEEDS = (2, 0)


def mean_return(world, act) -> float:
    """Return the mean over ten episodes of the sum of rewards; `act` gives the action at an
    observation.
    """
    from pipeline.simulation.environment import make

    env, found = make(world), []
    for seed in range(100, 110):
        observation, _ = env.reset(seed=seed)
        found.append(0.0)
        ended = False
        while not ended:
            observation, reward, terminated, truncated, _ = env.step(act(env, observation))
            found[-1] += float(reward)
            ended = terminated or truncated
    env.close()
    return float(np.mean(found))


def main() -> None:
    args = timing.options(__doc__, repeats=1)
    found = timing.describe(args)
    from pipeline.simulation.environment import World
    from pipeline.simulation.training import train

    world = World("Hopper-v5", steps=1000, seed=0, dynamics={})
    steps, draw = QUICK_STEPS if args.quick else STEPS, np.random.default_rng(0)
    results = {"random": mean_return(world, lambda env, observation: draw.uniform(-1, 1, 3))}
    for seed in SEEDS[: 1 if args.quick else None]:
        expert = train(world, env_steps=steps, seed=seed)
        results[f"seed {seed}"] = mean_return(world, expert.act)
    best = results[f"seed {SEEDS[0]}"]
    timing.table(
        f"Mean return of ten episodes after {steps} environment steps",
        ["actions", "return", "target"],
        [
            [
                name,
                f"{value:.0f}",
                timing.verdict(best >= TARGET, f"at least {TARGET}")
                if name == f"seed {SEEDS[0]}"
                else "",
            ]
            for name, value in results.items()
        ],
    )
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
