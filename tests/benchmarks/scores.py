"""What scoring a source for a target costs, against fine-tuning it once.

    ONETOMANY_DATA=/path/to/data .venv/bin/python tests/benchmarks/scores.py --json scores.json     # about 15 minutes on 2 quiet cores; --quick: 30 s

A timm ResNet-18 with random weights (their values do not change the time) at 64 px on the clothing
photos (3068 training rows), as in probes.py. ``scoring``: every registered score with its interval,
from the features of 2000 training rows of the target and 500 of the source. ``fine-tune``: one
full fine-tune of 30 epochs (as in jobs/vision/vision.yaml) with its validations, its test and its
record, extrapolated from runs of one and of two epochs, and the same of 10 epochs. All in processor
seconds. Target: fine-tune / scoring at least 50. Beside them the seconds of each score alone, and
LogME of 50,000 x 2,048 features (target: below 60 s).

Measured on 2026-12-02 with the command above on two quiet cores: scoring 17.6 s [16.0, 18.7], a
fine-tune of 30 epochs 1120 s [1010, 1190], 68 times as much [54, 70], and of 10 epochs 23 times.
Most of the scoring is the network's pass over 2500 rows, which alone is a 40th of a fine-tune of 10
epochs: there the target of 50 cannot be met. LogME of the large features took 8.6 s. With one
thread, on 2026-12-01, it was 94 and 32 times. Beside other work the two runs of the extrapolation
differ by chance.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import probes
import timing

EPOCHS, FEW_EPOCHS = 30, 10
LARGE, QUICK_LARGE = (50_000, 2_048), (2_000, 256)


def pair_of(shared: Any) -> Any:
    """The pair of source and target, with a head of ten classes and rows for the distances."""
    from pipeline.checkpoints import bundle
    from pipeline.core.specs import ObjectiveSpec
    from pipeline.transfer import scoring

    (target, key), data = next(iter(shared.targets.items()))
    state = {"values": list(range(10)), "labels": [str(k) for k in range(10)]}
    spec = ObjectiveSpec("classification", {}, state)
    head = bundle.build_task(data.arch, spec, seed=0).objective.state_dict()
    shared.heads["photos"] = (spec, {name: tensor.numpy() for name, tensor in head.items()})
    rows = scoring.sample(data.train.selection), dict(data.spec.data.columns)
    return scoring.SourceTargetPair("photos", key, target, rows)


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Processor seconds of this process: both sides run in it, and a busy machine adds none."""
    began = time.process_time()
    work()
    return time.process_time() - began


def fine_tune(shared: Any, first: Any, epochs: int, turn: int) -> float:
    """Seconds of one full fine-tune."""
    from pipeline.config.schema import ComponentConfig
    from pipeline.transfer import trial

    (name, data), *_ = shared.targets.items()
    train = data.spec.train.model_copy(update={"epochs": epochs})
    short = replace(data, spec=data.spec.model_copy(update={"train": train}))
    one = replace(
        first,
        technique=ComponentConfig(name="full"),
        id=f"full{epochs}x{turn}",
        hyper_parameters={},
    )
    return cpu_seconds(lambda: trial.run(one, replace(shared, targets={name: short})))


def large_logme(quick: bool) -> float:
    import numpy as np

    from pipeline.transfer.scores.logme import logme

    rng = np.random.default_rng(0)
    shape = QUICK_LARGE if quick else LARGE
    labels = rng.integers(0, 100, shape[0])
    features = rng.standard_normal(shape, dtype=np.float32)
    features += rng.standard_normal((100, shape[1]), dtype=np.float32)[labels]
    return cpu_seconds(lambda: logme(features, labels))


def main() -> None:
    args = timing.options(__doc__, repeats=3)
    found = timing.describe(args)
    from pipeline.transfer import scoring

    with tempfile.TemporaryDirectory() as root:
        shared, group = probes.shared_of(root, args.quick)
        pair, turn = pair_of(shared), iter(range(10**6))
        scored: list[Any] = []

        def scoring_seconds() -> float:
            return cpu_seconds(lambda: scored.append(scoring.score_pair(pair, shared)))

        few: list[float] = []

        def fine_tuning_seconds() -> float:
            one, two = (fine_tune(shared, group[0], k, next(turn)) for k in (1, 2))
            if two <= one and not args.quick:
                raise SystemExit(
                    f"two epochs took {two:.1f} s and one {one:.1f}: measure on a quiet machine"
                )
            few.append(one + (FEW_EPOCHS - 1) * (two - one))
            return one + (EPOCHS - 1) * (two - one)

        scoring_seconds()  # warm-up
        times = timing.interleaved(
            {"scoring": scoring_seconds, "fine-tune": fine_tuning_seconds}, args.repeats
        )
    ratio = timing.ratio(times["fine-tune"], times["scoring"])
    few_ratio = timing.ratio(few, times["scoring"])
    last = scored[-1]
    missing = [name for name, score in last.scores.items() if score.value is None]
    assert not missing, f"undefined: {missing}"
    large = large_logme(args.quick)
    timing.table(
        f"one source for one target, {last.rows} + {last.source_rows} rows",
        ["side", "processor seconds, median [min, max]", "note"],
        [
            ["scoring", timing.Spread.of(times["scoring"]).text(), "all scores"],
            ["fine-tune", timing.Spread.of(times["fine-tune"]).text(), f"{EPOCHS} epochs"],
            [
                "fine-tune / scoring",
                ratio.text(),
                timing.verdict(ratio.median >= 50, "at least 50"),
            ],
            [f"of {FEW_EPOCHS} epochs / scoring", few_ratio.text(), ""],
            ["features", f"{last.seconds:.3g}", "by the clock, shared by all scores"],
            *([name, f"{score.seconds:.3g}", ""] for name, score in last.scores.items()),
            ["logme, large", f"{large:.3g}", timing.verdict(large < 60, "below 60 s")],
        ],
    )
    each = {name: score.seconds for name, score in last.scores.items()}
    timing.write(
        args, found, {**times, "features": last.seconds, "scores": each, "large_logme": large}
    )


if __name__ == "__main__":
    main()
