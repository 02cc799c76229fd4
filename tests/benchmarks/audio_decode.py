"""Sound decoded: batches of the stream against a bare soundfile loop, in seconds of sound per
second and core.

    ONETOMANY_DATA=/path/to/data .venv/bin/python tests/benchmarks/audio_decode.py --json audio.json     # about 5 minutes on 2 quiet cores; --quick: 40 s

The 450 training recordings of an4 (FLAC, 16 kHz, 2.7 s each) are written several times over as
Parquet with row groups of 256 rows. ``bare`` is ``soundfile.read(io.BytesIO(data), dtype="int16")``
of encoded recordings that lie in memory, in one thread: nothing is read, checked, shuffled or
collated. ``train``: the stream with one thread in this process; ``workers``: Ray Data with one
actor. Both read the Parquet file in the order of a plan that cuts batches of 160 padded seconds
from rows of like length, decode by the audio modality and hand padded int16 batches to a consumer
that does nothing. Warm-up is left out, and a side stops long before its end.

``per core`` is seconds of sound per second of processor time, of this process and for ``workers``
of all that it started, Ray's own included; ``wall`` by the clock (the stream decodes in one thread
or process, and collates in another). Target: at least 0.75 of the bare loop per core.

A side warms up until the reader holds as many row groups as it may keep: before that it takes fresh
memory from the system for all that it reads, which is zeroed page by page and costs as much again
as reading (0.59 of bare over the first 200 batches, once in a run).

Seen (2 cores beside other trainings): --place train, 5 turns: bare 6657 [6494, 6785], train 6785
[6643, 7295] seconds of sound a second of one core, 1.02 [1.01, 1.08] of bare; both, 3 turns: train
1.08 [0.92, 1.11] of bare and workers 0.81 [0.63, 0.86], Ray's processes included. Decoding the same
files takes 0.98 of bare's time in this process: what reading and collating add is less than what
differs between turns.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ingest
import timing

from pipeline.core.specs import ModalitySpec

COPIES, BATCH_SECONDS, WARM, STEPS = 64, 160.0, 250, 160
QUICK = {"copies": 3, "warm": 2, "steps": 6}
TARGET = 0.75


def make_parquet(copies: int, path: Path) -> list[bytes]:
    """The recordings' files, which the Parquet file holds ``copies`` times."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(
        timing.data_folder() / "speech/an4/train.parquet", columns=["audio", "duration_s"]
    )
    files = [
        value["bytes"] if isinstance(value, dict) else value for value in table["audio"].to_pylist()
    ]
    tiled = pa.table(
        {
            "audio": pa.array(files * copies, pa.binary()),
            "seconds": table["duration_s"].to_pylist() * copies,
        }
    )
    pq.write_table(tiled, path, row_group_size=256, compression="none", use_dictionary=False)
    print(
        f"  {len(tiled)} rows, {path.stat().st_size >> 20} MiB, "
        f"{sum(tiled['seconds'].to_pylist()):.0f} s of sound",
        flush=True,
    )
    return files


class Side:
    """Seconds of sound per second of processor time of a stream of (seconds in a batch), after its
    warm-up; ``wall`` by the clock. ``alone``: Ray has no part in it, and what its idle processes
    take is not counted.
    """

    def __init__(self, stream: Callable[[], Iterator[float]], warm: int, steps: int, alone: bool):
        self.stream, self.warm, self.steps, self.alone = stream, warm, steps, alone
        self.wall: list[float] = []
        self.elsewhere: list[float] = []

    def __call__(self) -> float:
        stream = self.stream()
        for _ in range(self.warm):
            next(stream)
        before, began = ingest.processor_seconds(), time.perf_counter()
        sound = sum(next(stream) for _ in range(self.steps))
        took, after = time.perf_counter() - began, ingest.processor_seconds()
        stream.close()  # type: ignore[attr-defined]
        here, elsewhere = after[0] - before[0], 0.0 if self.alone else after[1] - before[1]
        self.wall.append(sound / took)
        self.elsewhere.append(elsewhere / max(1e-9, here + elsewhere))
        time.sleep(1.0)  # what the side started has ended before the next one begins
        return sound / (here + elsewhere)


def sides(path: Path, files: list[bytes], warm: int, steps: int, place: str) -> dict[str, Side]:
    import numpy as np
    import soundfile

    from pipeline.checkpoints import bundle
    from pipeline.data import manifests
    from pipeline.data.stream import (
        DataWorkers,
        Decoder,
        Rows,
        plan_of,
        rows_per_item,
        train_batches,
    )

    modality = bundle.build_modality(
        ModalitySpec("audio", {}, {"features": "mel", "mean": [0.0] * 80, "std": [1.0] * 80})
    )
    decoder = Decoder(modality, None, {}, {"audio": "audio", "seconds": "seconds"})
    rows = Rows(manifests.Selection(manifests.build(str(path), "parquet", "")), decoder).with_costs(
        0
    )
    # As a source of this size is read
    plan = plan_of(rows, 0, 0, BATCH_SECONDS, shuffle="blocks", item_rows=rows_per_item(rows, 8))
    span = range(2 * (warm + steps))  # twice what is read: no side comes near its end

    def ours(place: str) -> Callable[[], Iterator[float]]:
        def make() -> Iterator[float]:
            stream = train_batches(
                rows,
                plan,
                span,
                decode=place,
                threads=1,
                workers=DataWorkers(actors=1, cpus_per_actor=0.5),
            )  # type: ignore[arg-type]
            try:
                for loaded in stream:
                    yield float(loaded.batch["audio_lengths"].sum()) / 16000
            finally:
                stream.close()  # type: ignore[attr-defined]

        return make

    def bare() -> Iterator[float]:
        order = np.random.default_rng(0).permutation(np.arange(len(files) * 100) % len(files))
        for start in range(0, len(order), 50):
            yield (
                sum(
                    len(soundfile.read(io.BytesIO(files[i]), dtype="int16")[0])
                    for i in order[start : start + 50]
                )
                / 16000
            )

    batch = next(iter(train_batches(rows, plan, range(1), decode="train"))).batch
    for row, length, id_ in zip(batch["audio"], batch["audio_lengths"], batch.rows, strict=True):
        want = soundfile.read(io.BytesIO(files[id_ % len(files)]), dtype="int16")[0]
        assert len(want) == length and (row[:length].numpy() == want).all(), (
            "the sides give different samples"
        )
    made = {
        "bare": Side(bare, warm, steps, True),
        "train": Side(ours("train"), warm, steps, True),
        "workers": Side(ours("workers"), warm, steps, False),
    }
    return {name: side for name, side in made.items() if name == "bare" or place in (name, "both")}


def main() -> None:
    args = timing.options(
        __doc__,
        repeats=5,
        place={
            "choices": ["train", "workers", "both"],
            "default": "both",
            "help": "where recordings are decoded",
        },
    )
    found = timing.describe(args)
    spec = {"copies": COPIES, "warm": WARM, "steps": STEPS} | (QUICK if args.quick else {})
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "an4.parquet")
        files = make_parquet(spec["copies"], path)
        from pipeline.train import launch

        if args.place != "train":
            launch.start(None, verbose=False)
        made = sides(path, files, spec["warm"], spec["steps"], args.place)
        rates = timing.interleaved(made, args.repeats)
        if args.place != "train":
            launch.stop()
    lines, results = [], {}
    for name, side in made.items():
        core, wall = (
            timing.ratio(rates[name], rates["bare"]),
            timing.ratio(side.wall, made["bare"].wall),
        )
        results[name] = {
            "per_core": rates[name],
            "wall": side.wall,
            "elsewhere_share": side.elsewhere,
        }
        met = timing.verdict(core.median >= TARGET, f"at least {TARGET}") if name != "bare" else ""
        spreads = [timing.Spread.of(values).text(4) for values in (rates[name], side.wall)]
        lines.append(
            [
                name,
                *spreads,
                timing.Spread.of(side.elsewhere).text(2),
                *(("", "") if name == "bare" else (core.text(), wall.text())),
                met,
            ]
        )
    timing.table(
        "Seconds of sound per second, median [min, max]",
        ["side", "per core", "wall", "share elsewhere", "per core / bare", "wall / bare", "target"],
        lines,
    )
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
