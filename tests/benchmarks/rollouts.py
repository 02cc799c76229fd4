"""`prepare rollouts` with two Ray workers against a bare gymnasium loop in one process:
environment steps per second.

    .venv/bin/python tests/benchmarks/rollouts.py --json rollouts.json      # about 3 minutes on 2 cores; --quick: 1 minute

HalfCheetah-v5 with random actions in episodes of 1000 steps, as the task has them, and
InvertedDoublePendulum-v5 with the LQR expert in episodes of 400. ``bare``: one environment in this
process, reset and stepped with that policy's actions, nothing kept. ``rollouts``: the importer as a
user runs it, on Ray with two CPUs, whose workers have run before: worlds made, the regulator
computed once, episodes simulated in parts of 16 (and a random policy's beside each, whose steps
count too), checked, and written as Parquet with manifest and summary; all of its wall time counts.
``alone``: the same in this process without Ray, by processor time, for what the importer itself
costs. Target: at least 1.6 of the bare loop. Two processes need two idle cores.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timing

STEPS, QUICK_STEPS, TARGET, WORKERS = 96_000, 6_000, 1.6, 2
CASES = {"HalfCheetah-v5": ("random", 1000), "InvertedDoublePendulum-v5": ("lqr", 400)}
"""The expert, and steps of an episode."""


def bare(name: str, steps: int, clock: Callable[[], float]) -> float:
    """Steps per second of a loop over one environment."""
    import gymnasium

    from pipeline.simulation.environment import World
    from pipeline.simulation.experts import expert

    who, length = CASES[name]
    env = gymnasium.make(name, disable_env_checker=True, max_episode_steps=length)
    acting = expert(who, World(name, length, 0))
    seen, _ = env.reset(seed=0)
    began = clock()
    for _ in range(steps):
        seen, _, terminated, truncated, _ = env.step(acting.act(env, seen))
        if terminated or truncated:
            seen, _ = env.reset()
    took = clock() - began
    env.close()
    return steps / took


def imported(name: str, steps: int, clock: Callable[[], float]) -> float:
    """Steps per second of the importer, on Ray where it runs."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from pipeline.prepare.engine import importing
    from pipeline.prepare.engine.write import Preparation, Settings

    who, length = CASES[name]
    count = max(2, steps // length)
    options = importing.options_of(
        "rollouts", [f"expert={who}", f"episodes={count}", f"max_steps={length}"]
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Preparation(
            "rollouts",
            name,
            str(Path(folder, "out")),
            options,
            Settings(rows_per_part=min(16, count // 2)),
        )
        began = clock()
        work.run()
        took = clock() - began
        description = pq.read_table(Path(folder, "out"), columns=["steps", "random_steps"])
    # pyright: ignore
    return sum(pc.sum(column).as_py() for column in description.itercolumns()) / took


def main() -> None:
    args = timing.options(__doc__, repeats=3)
    found = timing.describe(args)
    import ray

    steps, results, lines = QUICK_STEPS if args.quick else STEPS, {}, []

    wall, own = time.perf_counter, time.process_time
    for name in CASES:
        print(f"  {name}", flush=True)
        bare(name, 500, wall)  # warm
        costs = timing.interleaved(
            {
                "bare, processor": lambda name=name: bare(name, steps, own),
                "alone, processor": lambda name=name: imported(name, steps, own),
            },
            args.repeats,
        )
        ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
        try:
            imported(name, 4 * CASES[name][1], wall)  # warm: processes started, packages imported
            rates = timing.interleaved(
                {
                    "bare": lambda name=name: bare(name, steps, wall),
                    "rollouts": lambda name=name: imported(name, steps, wall),
                },
                args.repeats,
            )
        finally:
            ray.shutdown()
        results[name] = costs | rates
        for side, values in results[name].items():
            share = timing.ratio(
                values, costs["bare, processor"] if side in costs else rates["bare"]
            )
            description = (
                timing.verdict(share.median >= TARGET, f"at least {TARGET}")
                if side == "rollouts"
                else ""
            )
            lines.append(
                [
                    name,
                    side,
                    timing.Spread.of(values).text(4),
                    "" if side.startswith("bare") else share.text(),
                    description,
                ]
            )
    timing.table(
        "Environment steps per second of wall or processor time, median [min, max]",
        ["environment", "side", "steps/s", "of bare", "target"],
        lines,
    )
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
