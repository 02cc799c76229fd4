"""The interval of a gain from resampled test rows, against a bootstrap loop over scikit-learn.

    .venv/bin/python tests/benchmarks/intervals.py --json intervals.json      # 2 minutes; --quick: 10 s

Three networks and three scratch networks, one a seed, on 4000 test rows of two classes with 14 %
positive ones. ``report``: `report.stats.compare`, 1000 resamples of the rows, the same for all six
networks. ``loop``: scikit-learn's function for each resample and each network, timed for 20
resamples and extrapolated to as many. In processor seconds. The values of both for the same
resample are equal (tests/core/metrics). Target: 10 times as fast.

Measured on 2026-12-02 with --repeats 2 on a busy machine: AUROC 0.28 s against 21 s, average
precision 0.17 against 11, macro-F1 0.08 against 18, balanced accuracy 0.08 against 14. Before one
sparse product summed the draws, AUROC took 1.4 s and macro-F1 0.47. Of the small matrix of
healthcare (228 trials, 1122 test rows) `onetomany report` takes 58 s of processor time, where its
tables took some 210 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import timing

RESAMPLES = 20
"""Resamples of the loop."""


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Processor seconds of this process: other work on the machine adds none."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    args = timing.options(
        __doc__, repeats=3, rows={"type": int, "default": 4000, "help": "test rows"}
    )
    found = timing.describe(args)

    import numpy as np
    from sklearn import metrics

    from pipeline.core.metrics import catalog
    from pipeline.report import stats

    rows = 400 if args.quick else args.rows
    rng = np.random.default_rng(0)
    label = (rng.random(rows) < 0.14).astype(np.int64)

    def network(seed: int) -> stats.RunPredictions:
        scores = rng.normal(size=(rows, 2)).astype(np.float32)
        scores[:, 1] += label
        return stats.RunPredictions(np.arange(rows), {"scores": scores, "label": label}, seed)

    ours, scratch = ([network(seed) for seed in range(3)] for _ in range(2))
    functions: dict[str, Callable[[Any, Any], float]] = {
        "auroc": lambda true, scores: metrics.roc_auc_score(true, scores[:, 1] - scores[:, 0]),
        "auprc": lambda true, scores: metrics.average_precision_score(
            true, scores[:, 1] - scores[:, 0]
        ),
        "macro_f1": lambda true, scores: metrics.f1_score(true, scores.argmax(1), average="macro"),
        "balanced_accuracy": lambda true, scores: metrics.balanced_accuracy_score(
            true, scores.argmax(1)
        ),
    }

    def loop(function: Callable[[Any, Any], float]) -> None:
        for _ in range(RESAMPLES):
            drawn = rng.integers(0, rows, rows)
            for run in (*ours, *scratch):
                function(label[drawn], run.predictions["scores"][drawn])

    table: list[list[str]] = []
    medians: list[float] = []
    seconds: dict[str, dict[str, list[float]]] = {}
    for name, function in functions.items():
        metric = catalog.metric(name)
        sides = {
            "report": lambda metric=metric: cpu_seconds(
                lambda: stats.compare(metric, ours, scratch)
            ),
            "loop": lambda function=function: (
                cpu_seconds(lambda: loop(function)) * stats.DRAWS / RESAMPLES
            ),
        }
        seconds[name] = timing.interleaved(sides, args.repeats)
        faster = timing.ratio(seconds[name]["loop"], seconds[name]["report"])
        medians.append(faster.median)
        spreads = [timing.Spread.of(seconds[name][side]).text() for side in sides]
        table.append([name, *spreads, faster.text()])
    timing.table(
        f"a gain of three seeds, {rows} test rows, {stats.DRAWS} resamples: processor seconds",
        ["metric", "report", "loop over scikit-learn", "loop / report"],
        table,
    )
    print("  " + timing.verdict(min(medians) >= 10, "10 times as fast"))
    timing.write(args, found, seconds)


if __name__ == "__main__":
    main()
