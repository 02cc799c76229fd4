"""Trajectories: batches of the stream against a bare pyarrow scan of the same file, in
megabytes per second and core.

    .venv/bin/python tests/benchmarks/trajectory_batches.py --json trajectories.json     # about a minute; --quick: 10 s

4000 episodes of a Hopper's widths (observations of 11 numbers, actions of 3; 50 to 1000 steps,
random walks in float32) are written as Parquet as the importers write it: one row an episode, zstd,
row groups of about 8 MB. ``bare`` reads their columns with
``pyarrow.parquet.ParquetFile.read_row_group`` in one thread and does nothing with them: no
shuffling, nothing standardised, padded or collated. ``stream`` is what training reads: batches of
32 rows in the order of a plan (row groups permuted, rows permuted inside), decoded by modality
trajectory in this process with one thread: numbers checked, standardised, padded. ``mixed`` is the
same with three embodiments of 11, 17 and 8 numbers in turn, against a bare scan of its own file.
Megabytes are those of the Arrow columns in memory, the same on both sides; seconds are processor
time of this process. Target: at least 0.6 of the bare scan.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing

from pipeline.core.specs import ModalitySpec

EPISODES, QUICK_EPISODES, GROUP_MB, BATCH, TARGET = 4000, 200, 8, 32, 0.6
ROBOTS = {"hopper": (11, 3), "walker": (17, 6), "reacher": (8, 2)}
"""Numbers of an observation and of an action."""
COLUMNS = {role: role for role in ("observations", "actions", "embodiment")}


def make_parquet(path: Path, episodes: int, robots: tuple[str, ...]) -> float:
    """Writes the episodes; returns the megabytes of their columns."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, total, writer, held, size = np.random.default_rng(0), 0, None, [], 0
    for i in range(episodes):
        robot, steps = robots[i % len(robots)], int(rng.integers(50, 1001))
        row: dict[str, Any] = {"embodiment": [robot]}
        for name, width in zip(("observations", "actions"), ROBOTS[robot], strict=True):
            walk = pa.array(
                rng.normal(0, 1, (steps, width)).cumsum(0, dtype=np.float32).reshape(-1)
            )
            inner = pa.ListArray.from_arrays(
                pa.array(np.arange(steps + 1, dtype=np.int32) * width), walk
            )
            row[name] = pa.ListArray.from_arrays(pa.array([0, steps], pa.int32()), inner)
        held.append(pa.table(row))
        size, total = size + held[-1].nbytes, total + held[-1].nbytes
        if size >= GROUP_MB << 20 or i == episodes - 1:
            writer = writer or pq.ParquetWriter(path, held[0].schema, compression="zstd")
            writer.write_table(pa.concat_tables(held).combine_chunks())
            held, size = [], 0
    assert writer is not None
    writer.close()
    return total / 1e6


def sides_of(path: Path, megabytes: float) -> dict[str, Callable[[], float]]:
    """A bare scan of a file and its batches."""
    import pyarrow.parquet as pq

    from pipeline.modalities.trajectory import Trajectory, TrajectoryOptions

    state = Trajectory.fit(
        TrajectoryOptions(), pq.ParquetFile(path).read_row_group(0), COLUMNS, "policy/mlp"
    )
    return timing.batches_and_scan(
        path, megabytes, ModalitySpec("trajectory", {}, state), COLUMNS, BATCH
    )


def main() -> None:
    args = timing.options(__doc__, repeats=5)
    found = timing.describe(args)
    import pyarrow as pa
    import torch

    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    episodes = QUICK_EPISODES if args.quick else EPISODES
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Callable[[], float]] = {}
        for name, robots in (("", ("hopper",)), (" mixed", tuple(ROBOTS))):
            path = Path(folder, f"episodes{name}.parquet")
            sides |= {
                f"{side}{name}": work
                for side, work in sides_of(path, make_parquet(path, episodes, robots)).items()
            }
        for side in sides.values():
            side()  # warm
        rates = timing.interleaved(sides, args.repeats)
    lines = []
    for name, values in rates.items():
        share = timing.ratio(values, rates[name.replace("stream", "bare")])
        description = (
            ["", ""]
            if name.startswith("bare")
            else [share.text(), timing.verdict(share.median >= TARGET, f"at least {TARGET}")]
        )
        lines.append([name, timing.Spread.of(values).text(4), *description])
    timing.table(
        "Megabytes of trajectories per second of one core, median [min, max]",
        ["side", "MB/s", "of bare", "target"],
        lines,
    )
    timing.write(args, found, rates)


if __name__ == "__main__":
    main()
