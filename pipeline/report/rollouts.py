"""Report blocks on policies in a simulator: success, return and length of their episodes.

They are compared with those of the expert and of random actions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.core.metrics.catalog import metric
from pipeline.io.wording import plural
from pipeline.report import plots, stats
from pipeline.report.blocks import (
    Block,
    Figure,
    Heading,
    Table,
    Text,
    Value,
    decimal_places,
    format_interval,
)
from pipeline.report.matrix import REFERENCE, MatrixEntry, fraction_order
from pipeline.report.per_label import runs_of
from pipeline.report.stats import RunPredictions

SHOWN_METRICS = ("success", "return", "steps")
"""Metrics of an episode.

The same metrics are recorded for the expert (``expert_success``) and for random actions
(``random_success``) in the same worlds.
"""
MAX_STRIPS = 5
Estimate = tuple[float, float, float]


def rollout_blocks(
    target: str,
    done: Sequence[MatrixEntry],
    runs: Mapping[str, RunPredictions],
) -> list[Block]:
    """Return the blocks on the policies of a target in its simulator.

    The table lists the expert, random actions and every entry, sorted by label fraction, so that
    untrained policies (zero shot) come first. Returns no block where no policy was run in a
    simulator.
    """
    ran = [
        (entry, seeds)
        for entry in done
        if (seeds := [run for run in runs_of(entry, runs) if "return" in run.predictions])
    ]
    if not ran:
        return []
    shown: list[tuple[str, str, list[RunPredictions]]] = []
    first = ran[0][1][:1]
    for who in ("expert", "random"):
        if any(
            not np.isnan(first[0].predictions.get(f"{who}_{name}", np.full(1, np.nan))).all()
            for name in SHOWN_METRICS
        ):
            shown.append((who, f"{who}_", first))
    ran.sort(
        key=lambda pair: (
            fraction_order(pair[0].label_fraction),
            pair[0].verdict == REFERENCE,
            pair[0].source,
            pair[0].technique,
        )
    )
    several = len({entry.backbone for entry, _ in ran}) > 1
    shown += [(_label(entry, several), "", seeds) for entry, seeds in ran]
    estimates = [
        [_estimate(f"{prefix}{name}", seeds) for name in SHOWN_METRICS]
        for _, prefix, seeds in shown
    ]
    digits = [
        decimal_places([line[i][1:] for line in estimates]) for i in range(len(SHOWN_METRICS))
    ]
    body: list[list[str | Value]] = [
        [label, *(_format_estimate(*pair) for pair in zip(line, digits, strict=True))]
        for (label, *_), line in zip(shown, estimates, strict=True)
    ]
    num_diverged = sum(
        int(run.predictions["diverged"].sum())
        for _, seeds in ran
        for run in seeds
        if "diverged" in run.predictions
    )
    caption = (
        f"{target}: mean over the {len(first[0].rows)} test worlds and seeds, with 95 % "
        "intervals; every policy starts from the same states. "
        + (
            f"In {num_diverged} episodes the simulation diverged; none of them is a success, and "
            "each has the lowest return of its policy and of random actions."
            if num_diverged
            else ""
        )
    )
    out: list[Block] = [
        Heading("In the simulator", 3),
        Text(caption.strip()),
        Table(["Policy", "Success", "Return", "Steps"], body),
    ]
    return [*out, *_strips(target, ran, several)]


def _strips(
    target: str, ran: list[tuple[MatrixEntry, list[RunPredictions]]], several: bool
) -> list[Block]:
    """Return pictures of the first test world.

    They show untrained policies and those trained on the fewest demonstrations. Returns no block
    where no pictures were recorded.
    """
    filmed = [
        (entry, rollout_frames)
        for entry, seeds in ran
        if (rollout_frames := seeds[0].rollout_frames) is not None
    ]
    if not filmed:
        return []
    least = min((entry.n_train or 0 for entry, _ in filmed if entry.n_train), default=0)
    shown = {
        _label(entry, several): frames
        for entry, frames in filmed
        if not entry.n_train or entry.n_train == least
    }
    caption = f"{target}: the first test world, one of the seeds; black is behind an episode's end."
    return [Figure(plots.strips(dict(list(shown.items())[:MAX_STRIPS])), caption)]


def _label(entry: MatrixEntry, several: bool) -> str:
    """Return the name of a policy, with its backbone where there are ``several``."""
    who = f"{entry.source} · {entry.technique}"
    who += f" ({entry.backbone})" if several else ""
    if not entry.n_train:
        return who
    return f"{who}, {plural(entry.n_train, 'episode')}"


def _estimate(name: str, seeds: list[RunPredictions]) -> Estimate:
    """Return (mean, low, high) of a metric, NaN where it was not recorded."""
    if any(name not in run.predictions for run in seeds):
        return math.nan, math.nan, math.nan
    return stats.mean_interval(metric(name), seeds)


def _format_estimate(value: Estimate, digits: int) -> str | Value:
    middle, low, high = (None if math.isnan(number) else number for number in value)
    return format_interval(middle, low, high, digits)
