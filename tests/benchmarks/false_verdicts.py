"""How often a comparison without any true difference is called a win or a loss: A/A matrices
through the report's own verdicts.

    .venv/bin/python tests/benchmarks/false_verdicts.py --json false_verdicts.json     # 3 minutes of processor time; --quick: 12 s

No network is trained: predictions are drawn. Every test row has a difficulty that all networks
share; each entry (source, technique) has rows that it finds easier or harder than the others do,
whatever its seed (``Case.agree`` of the latent spread); each seed has a level of its own (deviation
0.01 or 0.02 of the metric) and its own noise on every row. All entries have the same expected metric
over rows and seeds, so every win and every loss is false. A matrix has 3 targets with 4 entries and
one scratch each, 12 comparisons, as the quickstart has; they go through
``report.matrix.matrix_entries``, search and choice through ``transfer.planned_trials``.

Columns:

- seed sd: the deviation between seeds.
- false: false verdicts among the comparisons that were judged, with their 95 % interval over
  matrices. Target: at most 5 %.
- not judged: the share of the others (one paired seed, too few units, search noise).
- interval: how many intervals exclude zero, whether judged or not.
- Holm: in how many matrices at least one win or loss survives Holm's correction.

Printed on 2026-12-02 by the command above (--repeats 60 is its default):

    60 matrices of 12 comparisons without a difference
      case                                      seed sd  false        not judged  interval  Holm
      ----------------------------------------  -------  -----------  ----------  --------  -----
      1 seed                                    0.01     –            100 %       10.1 %    0.0 %
      2 seeds                                   0.01     0.8 ± 0.7 %  0 %         0.8 %     0.0 %
      3 seeds                                   0.01     2.4 ± 1.5 %  0 %         2.4 %     0.0 %
      5 seeds                                   0.01     3.3 ± 1.2 %  0 %         3.3 %     0.0 %
      3 seeds, 2 of them failed                 0.01     –            100 %       10.4 %    0.0 %
      3 seeds, scratch 1                        0.01     –            100 %       10.6 %    0.0 %
      1 seed                                    0.02     –            100 %       26.8 %    0.0 %
      2 seeds                                   0.02     2.8 ± 1.3 %  0 %         2.8 %     0.0 %
      3 seeds                                   0.02     4.4 ± 1.9 %  0 %         4.4 %     3.3 %
      5 seeds                                   0.02     3.3 ± 1.3 %  0 %         3.3 %     5.0 %
      3 seeds, 2 of them failed                 0.02     –            100 %       23.5 %    0.0 %
      3 seeds, scratch 1                        0.02     –            100 %       24.0 %    0.0 %
      search, best of one seed, 400 test rows   0.01     0.0 ± 0.0 %  6 %         5.7 %     0.0 %
      search, 3 finalists, 400 test rows        0.01     3.3 ± 1.7 %  0 %         3.3 %     0.0 %
      search, best of one seed, 400 test rows   0.02     0.0 ± 0.0 %  8 %         7.8 %     0.0 %
      search, 3 finalists, 400 test rows        0.02     4.2 ± 2.2 %  0 %         4.2 %     5.0 %
      search, best of one seed, 2000 test rows  0.01     0.0 ± 0.0 %  12 %        12.1 %    0.0 %
      search, 3 finalists, 2000 test rows       0.01     5.1 ± 1.8 %  0 %         5.1 %     5.0 %
      search, best of one seed, 2000 test rows  0.02     0.0 ± 0.0 %  10 %        10.0 %    0.0 %
      search, 3 finalists, 2000 test rows       0.02     4.6 ± 1.7 %  0 %         4.6 %     5.0 %
      AUROC, 3 of 100 rows positive             0.01     –            100 %       10.8 %    0.0 %
      AUROC, 5 of 100 rows positive             0.01     –            100 %       9.4 %     0.0 %
      AUROC, 10 of 100 rows positive            0.01     4.0 ± 1.5 %  0 %         4.0 %     3.3 %
      AUROC, 20 of 100 rows positive            0.01     4.3 ± 1.8 %  0 %         4.3 %     3.3 %
      AUROC, 30 of 100 rows positive            0.01     5.6 ± 2.3 %  0 %         5.6 %     6.7 %
      5 groups of 20 rows                       0.01     –            100 %       0.7 %     0.0 %
      10 groups of 20 rows                      0.01     –            100 %       3.2 %     0.0 %
      20 groups of 20 rows                      0.01     4.6 ± 1.9 %  0 %         4.6 %     0.0 %
      40 groups of 20 rows                      0.01     5.3 ± 2.1 %  0 %         5.3 %     8.3 %

Three lines are above 5 %, each by less than its interval. The lines of AUROC and groups are the
harder null, in which the seeds of a network agree (STRONG_AGREE).

"The best of one seed" is `fanout.search_finalists: {top: 1}`. Its intervals leave out the noise of
the search, and 6 to 12 % of them exclude zero; the verdict of these is "search noise", so none is
won or lost.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import timing

from pipeline.report.results import ResultRow
from pipeline.report.trial_record import TrialRecord

TARGETS, ENTRIES = 3, 4
LEVEL = 0.8
"""Expected accuracy or AUROC of every network."""
AGREE, NOISE = 0.3, 0.3
STRONG_AGREE, WEAK_NOISE = 0.8, 0.2
"""Deviations of what an entry finds hard whatever its seed, and of each run's own noise, on a latent
scale where all sums to one. The second pair is the harder one for few units: the seeds of an entry
agree, so the units that happen to be tested on decide.
"""
DRAWS, VALIDATION_ROWS, LOSS_PER_DECADE = 8, 200, 0.05
"""A search: learning rates over two decades, the metric lost one decade from the best of them, and
the rows that it is judged on.
"""
Z, DENSITY = 0.8416212, 0.2799619
"""The normal quantile of LEVEL and the density there: a metric's change is DENSITY times that of
the latent level.
"""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    seeds: int = 3
    scratch_seeds: int | None = None
    deviation: float = 0.01
    rows: int = 400
    positives: int | None = None
    groups: int | None = None
    agree: float = AGREE
    noise: float = NOISE
    finalists: tuple[int, int] | None = None
    """Search with so many finalists and further seeds; none: no search."""
    lost: int = 0
    """Seeds of every entry with a source that failed."""


def cases() -> list[Case]:
    out = []
    for deviation in (0.01, 0.02):
        out += [
            Case(f"{seeds} seed{'s' if seeds > 1 else ''}", seeds, deviation=deviation)
            for seeds in (1, 2, 3, 5)
        ]
        out.append(Case("3 seeds, 2 of them failed", deviation=deviation, lost=2))
        out.append(Case("3 seeds, scratch 1", scratch_seeds=1, deviation=deviation))
    for rows in (400, 2000):
        for deviation in (0.01, 0.02):
            out.append(
                Case(
                    f"search, best of one seed, {rows} test rows",
                    deviation=deviation,
                    rows=rows,
                    finalists=(1, 0),
                )
            )
            out.append(
                Case(
                    f"search, 3 finalists, {rows} test rows",
                    deviation=deviation,
                    rows=rows,
                    finalists=(3, 2),
                )
            )
    few_units = partial(Case, agree=STRONG_AGREE, noise=WEAK_NOISE)
    out += [
        few_units(f"AUROC, {positives} of 100 rows positive", rows=100, positives=positives)
        for positives in (3, 5, 10, 20, 30)
    ]
    out += [
        few_units(f"{groups} groups of 20 rows", rows=20 * groups, groups=groups)
        for groups in (5, 10, 20, 40)
    ]
    return out


class Target:
    """Rows of one target: difficulties of the test and validation rows, the same for every
    network.
    """

    def __init__(self, case: Case, rng: np.random.Generator):
        self.case, self.rng = case, rng
        self.shared = math.sqrt(1 - case.agree**2 - case.noise**2)
        self.test = self._by_group(rng.normal(0, self.shared, case.rows))
        self.validation = rng.normal(0, self.shared, VALIDATION_ROWS)
        self.label = (
            np.arange(case.rows) % 2
            if case.positives is None
            else (np.arange(case.rows) < case.positives).astype(np.int64)
        )
        self.group = None if case.groups is None else np.arange(case.rows) % case.groups

    def _by_group(self, values: np.ndarray) -> np.ndarray:
        """The rows of a group are alike."""
        return (
            values
            if self.case.groups is None
            else values[np.arange(self.case.rows) % self.case.groups]
        )

    def entry(self) -> MatrixEntry:
        return MatrixEntry(
            self,
            self._by_group(self.rng.normal(0, self.case.agree, self.case.rows)),
            self.rng.normal(0, self.case.agree, VALIDATION_ROWS),
        )


@dataclass
class MatrixEntry:
    """One source and technique (or scratch): what it finds hard on test and validation rows."""

    target: Target
    test: np.ndarray
    validation: np.ndarray

    def test_predictions(self, quality: float) -> dict[str, np.ndarray]:
        """Return test predictions of a new seed."""
        latent = self._latent(self.target.test + self.test, quality)
        label = self.target.label
        if (
            self.target.case.positives is not None
            # the latent value separates positives from negatives: sqrt(2) Z apart is an AUROC of
            # LEVEL
        ):
            score = np.where(label == 1, math.sqrt(2) * latent[0], 0.0) + latent[1]
            scores = np.stack([np.zeros_like(score), score], axis=1)
        else:
            right = latent[0] + latent[1] > 0
            scores = (np.eye(2)[label] == right[:, None]).astype(np.float64)
        return {
            "scores": scores.astype(np.float32),
            "label": label,
            "loss": np.zeros(len(label)),
            "count": np.ones(len(label)),
        }

    def validated(self, quality: float) -> float:
        """Validation accuracy of a new seed."""
        level, noise = self._latent(self.target.validation + self.validation, quality)
        return float((level + noise > 0).mean())

    def _latent(self, rows: np.ndarray, quality: float) -> tuple[np.ndarray, np.ndarray]:
        """(the level of a seed, what differs by row)."""
        rng = self.target.rng
        level = Z + (quality + rng.normal(0, self.target.case.deviation)) / DENSITY
        return np.full(len(rows), level), rows + rng.normal(0, self.target.case.noise, len(rows))


def matrix_of(case: Case, seed: int) -> list[Any]:
    """The entries of one simulated job, as its report would have them."""
    from pipeline.core.metrics import catalog
    from pipeline.report import matrix
    from pipeline.report.stats import RunPredictions

    rng = np.random.default_rng([seed, len(case.name)])
    name = "accuracy" if case.positives is None else "auroc"
    rows: list[dict[str, Any]] = []
    runs: dict[str, RunPredictions] = {}
    draws = rng.uniform(-1, 1, DRAWS)
    for place in range(TARGETS):
        target = Target(case, rng)
        for number in range(ENTRIES + 1):
            source, entry = (
                ("none", "scratch") if not number else (f"source {number}", "full"),
                target.entry(),
            )
            seeds = case.scratch_seeds if not number and case.scratch_seeds else case.seeds
            common = ResultRow(
                job="aa",
                source=source[0],
                technique=source[1],
                backbone="b",
                target=f"t{place}",
                label_fraction="1.0",
                status="done",
                metric=name,
                higher_is_better=True,
            )
            draw = _searched(case, entry, draws, common, rows) if case.finalists else 0.0
            for one in range(seeds - (case.lost if number else 0)):
                trial_id = f"{place}-{number}-{one}"
                runs[trial_id] = RunPredictions(
                    np.arange(case.rows),
                    entry.test_predictions(-LOSS_PER_DECADE * draw**2),
                    one,
                    target.group,
                )
                value = catalog.metric(name).value(runs[trial_id].predictions)
                rows.append(
                    replace(
                        common,
                        trial_id=trial_id,
                        trial_stage="final",
                        split="test",
                        seed=one,
                        value=value,
                        hyper_parameters="{}",
                    )
                )
    return [entry for entry in matrix.matrix_entries(rows, runs) if entry.source != "none"]


def _searched(
    case: Case, entry: MatrixEntry, draws: np.ndarray, common: ResultRow, rows: list[ResultRow]
) -> float:
    """The draw that a search chooses, through the stages' own ranking; its rows are added to the
    table.
    """
    from pipeline.transfer import planned_trials

    search: list[Any] = []
    records: list[Any] = []

    def add(draw: float, seed: int) -> None:
        row = replace(
            common,
            trial_id=f"{common.target}-{common.source}-{draw}-{seed}",
            trial_stage="search",
            split="validation",
            seed=seed,
            value=entry.validated(-LOSS_PER_DECADE * draw**2),
            drawn=json.dumps({"lr": draw}),
        )
        rows.append(row)
        search.append(
            SimpleNamespace(id=row.trial_id, entry="entry", hyper_parameters={"lr": draw})
        )
        records.append(TrialRecord(row.trial_id, rows=(row,)))

    assert case.finalists is not None
    top, further = case.finalists
    for draw in draws:
        add(float(draw), 0)
    for hyper in planned_trials.ranked_draws(search, records)["entry"][:top] if top > 1 else ():
        for seed in range(1, 1 + further):
            add(hyper["lr"], seed)
    return planned_trials.winning_draws(search, records)["entry"]["lr"]


def measured(case: Case, matrices: int, first: int = 0) -> dict[str, Any]:
    """False verdicts of one case: shares by matrix, and in how many matrices Holm's correction
    leaves one.
    """
    shares, plain, family, judged, total = [], [], 0, 0, 0
    for seed in range(first, first + matrices):
        found = matrix_of(case, seed)
        description = [
            entry.verdict in ("wins", "loses")
            for entry in found
            if entry.verdict in ("wins", "loses", "not shown")
        ]
        shares += [float(np.mean(description))] if description else []
        plain.append(
            float(
                np.mean(
                    [(entry.gain_low or 0) > 0 or (entry.gain_high or 0) < 0 for entry in found]
                )
            )
        )
        family += any(entry.survives for entry in found)
        judged, total = judged + len(description), total + len(found)
    mean = float(np.mean(shares)) if shares else 0.0
    spread = (
        1.96 * float(np.std(shares, ddof=1)) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
    )
    return {
        "false": mean,
        "spread": spread,
        "not_judged": 1 - judged / total,
        "interval_alone": float(np.mean(plain)),
        "holm": family / matrices,
    }


def main() -> None:
    args = timing.options(__doc__, repeats=60)
    found = timing.describe(args)
    matrices = 4 if args.quick else args.repeats
    body, results = [], {}
    for case in cases():
        one = measured(case, matrices)
        results[f"{case.name}, {case.deviation}"] = one
        description = (
            "–"
            if one["not_judged"] == 1
            else f"{100 * one['false']:.1f} ± {100 * one['spread']:.1f} %"
        )
        alone = f"{100 * one['interval_alone']:.1f} %"
        body.append(
            [
                case.name,
                f"{case.deviation}",
                description,
                f"{100 * one['not_judged']:.0f} %",
                alone,
                f"{100 * one['holm']:.1f} %",
            ]
        )
        print(" | ".join(body[-1]), flush=True)
    head = ["case", "seed sd", "false", "not judged", "interval", "Holm"]
    timing.table(
        f"{matrices} matrices of {TARGETS * ENTRIES} comparisons without a difference", head, body
    )
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
