"""What a trial costs beyond its training, through the real fan-out on Ray Tune; memory of the
driver over 200 trials.

    .venv/bin/python tests/benchmarks/fanout.py --json fanout.json      # about 6 minutes on 2 quiet cores; --quick: 60 s

Trivial trials: one step on 40 rows of 16 tokens, a BERT of one layer 8 wide, technique full,
validated once, tested, with predictions and record written. Cost: transfer/fanout.run with 10 and
with 50 of them in turns, in one Ray session, after a fan-out that is not counted; the slope is (t50
- t10) / 40, the fixed start t10 - 10 x slope. Beside it: the same trial called in this process,
which says how much of the slope is the trial's own and how much Tune's. Memory: what is
resident of this process while 200 trials run: its greatest value up to the 50th and up to the 200th. Targets:
slope at most 0.1 s, fixed start at most 10 s, memory within 5 %.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import timing

from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.train.progress import Progress


def shared_of(root: str) -> tuple[Any, Any]:
    """What the trials read, made in memory, and a function (how many, first seed) to trials."""
    import numpy as np
    import pyarrow as pa

    from pipeline.checkpoints import bundle
    from pipeline.config.schema import ComponentConfig, Job
    from pipeline.data.manifests import Manifest, RowGroup, Selection
    from pipeline.data.stream import Decoder, Rows
    from pipeline.modalities.text import Text, TextOptions
    from pipeline.transfer import grid as trials
    from pipeline.transfer.trial import Shared, TargetData

    # The job names a file that exists; the rows are made below
    here = str(Path(__file__).resolve())
    job = Job.model_validate(
        {
            "name": "trivial",
            "storage": root,
            "sources": {"source": {"backbone": "transformers/bert", "init": "file:none"}},
            "targets": {
                "target": {
                    "data": {
                        "train": here,
                        "modality": "text",
                        "columns": {"text": "text", "label": "label"},
                    },
                    "objective": "classification",
                    "train": {"steps": 1, "global_batch": 8},
                }
            },
        }
    )
    options = TextOptions(length=16, vocabulary=256)
    lines = pa.table({"text": Path(__file__).read_text().splitlines()})
    text = ModalitySpec(
        "text", options.model_dump(), Text.fit(options, lines, {"text": "text"}, "bert")
    )
    modality = bundle.build_modality(text)
    arch = Architecture(
        "transformers/bert", {"layers": 1, "hidden": 8, "heads": 1}, modality.inputs()
    )
    base = trials.backbone_groups({"source": (arch, text)})[0]
    objective = ObjectiveSpec("classification", {}, {"values": [0, 1], "labels": ["no", "yes"]})

    def rows(n: int, seed: int) -> Any:
        random = np.random.default_rng(seed)
        arrays = {
            "tokens": random.integers(5, 256, (n, 16)).astype(np.uint16),
            "lengths": np.full(n, 16, dtype=np.int32),
            "label": np.arange(n) % 2,
        }
        manifest = Manifest(("memory",), (RowGroup(0, 0, n, 1),), pa.schema([]), str(seed))
        return Rows(
            Selection(manifest), Decoder(modality, "classification", objective.state, {}), arrays
        )

    parts = [rows(40, seed) for seed in range(3)]
    data = TargetData(
        job.targets["target"],
        objective,
        *parts,
        parts[0].arrays["label"],
        None,
        "made in memory",
        arch,
        text,
    )
    weights = {
        name: tensor.numpy()
        for name, tensor in bundle.build_backbone(arch, seed=0).state_dict().items()
    }
    shared = Shared(
        job.name,
        job.root,
        0,
        {base.key: base},
        {"source": weights},
        {"source": "random"},
        {("target", base.key): data},
        False,
    )

    def some(count: int, first: int) -> list[Any]:
        entry = trials.PlannedEntry(base, "source", ComponentConfig(name="full"), 1.0)
        return [
            trials.make_trial(job, "target", entry, {}, first + k, "final", "random", "memory")
            for k in range(count)
        ]

    return shared, some


class Count(Progress):
    """Counts the trials that have ended, and prints nothing."""

    def __init__(self):
        super().__init__()
        self.ended = 0

    def update(self, line: str, final: bool = False) -> None:
        found = re.search(r"trials (\d+)/", line)
        self.ended = int(found[1]) if found else self.ended

    def note(self, line: str) -> None:
        pass


class Memory(threading.Thread):
    """Samples this process's resident bytes with the number of ended trials, ten times a second."""

    def __init__(self, count: Count):
        super().__init__(daemon=True)
        self.count, self.samples, self.ended = count, [], threading.Event()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while not self.ended.wait(0.1):
            self.samples.append((self.count.ended, me.memory_info().rss))

    def peak(self, trials: int) -> int:
        """Greatest resident bytes until so many trials had ended."""
        return max(rss for ended, rss in self.samples if ended <= trials)


class Fan:
    """Runs trials that were never run before, through transfer/fanout."""

    def __init__(self, shared: Any, some: Any):
        self.shared, self.some, self.first = shared, some, 0

    def __call__(self, count: int, progress: Any = None) -> float:
        from pipeline.config.schema import Fanout
        from pipeline.transfer import fanout

        trials, self.first = self.some(count, self.first), self.first + count
        began = time.perf_counter()
        records = fanout.run(
            "trivial", trials, self.shared, Fanout(keep_bundles="none"), progress or Count()
        )
        took = time.perf_counter() - began
        failed = [record.error for record in records if record.status != "done"]
        assert not failed, failed[0]
        return took


def main() -> None:
    args = timing.options(__doc__, repeats=3)
    found = timing.describe(args)
    few, many, all_of, middle = (2, 6, 8, 4) if args.quick else (10, 50, 200, 50)
    from pipeline.train import launch
    from pipeline.transfer import trial

    with tempfile.TemporaryDirectory() as root:
        launch.start(None, verbose=False)
        shared, some = shared_of(root)
        fan = Fan(shared, some)
        if not args.quick:
            print(f"  first fan-out of 2 trials, not counted: {fan(2):.1f} s")
        times = timing.interleaved(
            {f"{few} trials": lambda: fan(few), f"{many} trials": lambda: fan(many)},
            1 if args.quick else args.repeats,
        )
        alone = [timing.seconds(lambda one=one: trial.run(one, shared)) for one in some(12, 10**6)][
            2:
        ]
        count = Count()
        memory = Memory(count)
        memory.start()
        long = fan(all_of, count)
        memory.ended.set()
        memory.join()
        launch.stop()
    pairs = list(zip(times[f"{few} trials"], times[f"{many} trials"], strict=True))
    slopes = [(b - a) / (many - few) for a, b in pairs]
    slope, start = (
        timing.Spread.of(slopes),
        timing.Spread.of([a - few * s for (a, _), s in zip(pairs, slopes, strict=True)]),
    )
    peaks = {n: memory.peak(n) / 2**20 for n in (middle, all_of)}
    growth = peaks[all_of] / peaks[middle] - 1
    timing.table(
        "Fan-out of trivial trials",
        ["what", "median [min, max]", "target"],
        [
            *[
                [f"{name}, s", timing.Spread.of(values).text(), ""]
                for name, values in times.items()
            ],
            ["slope, s a trial", slope.text(), timing.verdict(slope.median <= 0.1, "at most 0.1")],
            ["fixed start, s", start.text(), timing.verdict(start.median <= 10, "at most 10")],
            ["the same trial in this process, s", timing.Spread.of(alone).text(), ""],
            [f"{all_of} trials, s", f"{long:.1f}", ""],
            [f"peak MiB of the driver up to trial {middle}", f"{peaks[middle]:.0f}", ""],
            [
                f"peak MiB of the driver up to trial {all_of}",
                f"{peaks[all_of]:.0f} ({growth:+.1%})",
                timing.verdict(growth <= 0.05, "at most +5 %"),
            ],
        ],
    )
    timing.write(
        args,
        found,
        {
            **times,
            "slope": slope,
            "start": start,
            "alone": alone,
            "long_seconds": long,
            "peaks_mib": peaks,
            "memory": memory.samples[:: max(1, len(memory.samples) // 200)],
        },
    )


if __name__ == "__main__":
    main()
