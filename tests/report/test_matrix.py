"""Entries of a results table: what a search adds to the interval of a gain, and what a gain is
over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toys import result_row

from pipeline.config.provenance import Provenance
from pipeline.core.metrics import catalog
from pipeline.report import code_versions, matrix, per_label, stats
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions

UNITS = 200
NOW, BEFORE = (
    Provenance(code={"pipeline.core.metrics.catalog": "same"}, versions={"timm": version})
    for version in ("2.0", "1.0")
)


def row_of(source: str, technique: str, seed: int, **more: Any) -> ResultRow:
    trial_id = f"{source}-{more.get('backbone', 'b')}-{technique}-{seed}"
    return result_row(source, technique, seed, **{"trial_id": trial_id, "drawn": "{}", **more})


def of_seeds(
    source: str, technique: str, level: float, **more: Any
) -> tuple[list[ResultRow], dict[str, RunPredictions]]:
    """Test and validation rows and test predictions of three seeds of an entry."""
    rows, runs = [], {}
    for seed in range(3):
        rng = np.random.default_rng([seed, len(source), len(technique)])
        label = np.arange(UNITS) % 2
        right = rng.random(UNITS) < level
        scores = (np.eye(2)[label] == right[:, None]).astype(np.float32)
        run = RunPredictions(
            np.arange(UNITS),
            {"scores": scores, "label": label, "loss": np.zeros(UNITS), "count": np.ones(UNITS)},
            seed,
        )
        row = row_of(
            source, technique, seed, value=catalog.metric("accuracy").value(run.predictions), **more
        )
        rows += [row, replace(row, split="validation")]
        runs[row.trial_id] = run
    return rows, runs


def searched(
    source: str,
    technique: str,
    metric: str = "accuracy",
    seeds: Sequence[int] = (0, 1000, 1001),
    **ran: list[int],
) -> list[ResultRow]:
    """Validation rows of a search: two settings with some seeds each, about equally good."""
    rng, rows = np.random.default_rng(0), []
    for lr in (0.1, 0.2):
        for place, seed in enumerate(seeds):
            hyper_parameters = {"lr": lr, **{name: values[place] for name, values in ran.items()}}
            drawn = {
                "hyper_parameters": json.dumps(hyper_parameters),
                "drawn": json.dumps({"lr": lr}),
            }
            rows.append(
                row_of(
                    source,
                    technique,
                    seed,
                    trial_stage="search",
                    split="validation",
                    metric=metric,
                    trial_id=f"{source}-{technique}-{lr}-{seed}",
                    value=0.7 + rng.normal(0, 0.05),
                    **drawn,
                )
            )
    return rows


def compared(*searches: dict[str, Any], level: float = 0.75) -> matrix.MatrixEntry:
    """The entry of a source, and scratch; both were searched in the same way, or not at all."""
    scratch, fine_tuned = of_seeds("none", "scratch", 0.7), of_seeds("a", "full", level)
    rows = [*scratch[0], *fine_tuned[0]]
    for options in searches:
        rows += searched("none", "scratch", **options) + searched("a", "full", **options)
    return next(
        entry
        for entry in matrix.matrix_entries(rows, scratch[1] | fine_tuned[1])
        if entry.source == "a"
    )


def width(entry: matrix.MatrixEntry) -> float:
    assert entry.gain_low is not None and entry.gain_high is not None
    return entry.gain_high - entry.gain_low


def test_seeds_of_a_setting_belong_together_though_their_steps_differ():
    """Batches by cost and a label share: an epoch has other steps with every seed."""
    without, alike, by_seed = (
        compared(),
        compared({"steps": [30, 30, 30]}),
        compared({"steps": [33, 27, 30]}),
    )
    assert by_seed.interval.endswith("3 paired seeds and the choice of hyper-parameters")
    assert by_seed == alike and width(by_seed) != width(without)


def test_a_search_by_another_metric_than_the_tested_one_says_that_its_noise_is_not_included():
    """Policies: tested by their success in worlds, validated by the error of single actions."""
    without, other = compared(), compared({"metric": "action_error"})
    assert other.interval.endswith(
        "without the noise of the search, which was judged by action_error"
    )
    assert width(other) == pytest.approx(width(without))


@pytest.mark.parametrize("search", [{"metric": "action_error"}, {"seeds": [0]}])
def test_no_gain_is_won_where_the_noise_of_its_search_is_unknown(search):
    known, unknown = compared({}, level=0.95), compared(search, level=0.95)
    assert known.verdict == matrix.WINS and known.survives
    assert unknown.verdict == matrix.SEARCH_NOISE and not unknown.survives
    assert unknown.over_scratch.low is not None and unknown.over_scratch.low > 0
    assert compared(search).verdict == matrix.NOT_SHOWN, "a wider interval holds zero too"
    gain = stats.Gain(0.1, 0.05, 0.15, 0.001, 3)
    cells = [per_label.gain_estimate(gain, 2, True, entry) for entry in (known, unknown)]
    assert [cell.tone for cell in cells] == [matrix.WINS, matrix.SEARCH_NOISE], "nor of a class"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 0.2, matrix.WINS),
        (-0.2, -0.1, matrix.LOSES),
        (0.0, 0.2, matrix.NOT_SHOWN),
        (-0.2, 0.0, matrix.NOT_SHOWN),
        (float("nan"), float("nan"), matrix.NOT_SHOWN),
    ],
)
def test_an_interval_without_a_bound_beyond_zero_shows_nothing(low, high, verdict):
    assert matrix.verdict(low, high, 3, True) == verdict


def test_where_there_is_nothing_to_choose_from_nothing_is_said():
    assert compared().interval.endswith("gain: 95 % over test units and 3 paired seeds")


# ---------------------------------------------------------------- what a gain is over


def marks(
    old: str, *parts: tuple[list[dict[str, Any]], dict[str, RunPredictions]]
) -> dict[tuple[str, str, str], str]:
    """How entries are marked where the trials whose id starts with ``old`` are of before, and the
    others of now.
    """
    rows, runs = [], {}
    for more_rows, more_runs in parts:
        rows += more_rows
        runs |= more_runs
    made = {
        name: code_versions.TrialProvenance(BEFORE if name.startswith(old) else NOW)
        for name in runs
    }
    found = code_versions.mark_entries(matrix.matrix_entries(rows, runs), rows, made)
    return {(entry.source, entry.backbone, entry.technique): entry.code_mark for entry in found}


def test_a_random_probe_is_mixed_with_the_linear_probe_that_it_is_held_against():
    scratch, probed = of_seeds("none", "scratch", 0.7), of_seeds("a", "linear_probe", 0.75)
    random = of_seeds("none", "random_probe", 0.6)
    assert marks("a-b-linear_probe", scratch, probed, random) == {
        ("none", "b", "scratch"): "",
        ("a", "b", "linear_probe"): code_versions.MIXED,
        ("none", "b", "random_probe"): code_versions.MIXED,
    }
    assert marks("none-b-scratch", scratch, probed, random)["none", "b", "random_probe"] == "", (
        "scratch is no part of it"
    )


def test_a_gain_over_the_best_scratch_of_another_backbone_is_mixed_too():
    own, best = of_seeds("none", "scratch", 0.6), of_seeds("none", "scratch", 0.8, backbone="c")
    fine_tuned = of_seeds("a", "full", 0.75)
    assert marks("none-c-scratch", own, best, fine_tuned)["a", "b", "full"] == code_versions.MIXED
    worse = of_seeds("none", "scratch", 0.5, backbone="c")
    assert marks("none-c-scratch", own, worse, fine_tuned)["a", "b", "full"] == "", (
        "no gain is over it"
    )


def test_what_trains_nothing_is_compared_with_scratch_of_each_seed():
    """Its own seed decides nothing, and it stays one trial."""
    scratch, (rows, runs) = of_seeds("none", "scratch", 0.7), of_seeds("a", "ensemble", 0.9)
    one = [replace(row, params_trained=0) for row in rows if row.seed == 0]
    for known in (runs | scratch[1], {}):
        found = matrix.matrix_entries([*scratch[0], *one], known)
        entry, reference = sorted(found, key=lambda entry: entry.source)
        assert entry.gain == pytest.approx(entry.mean - reference.mean)
        assert entry.paired_seeds == 1 and "each seed" in entry.interval
        assert entry.verdict == ("one seed" if known else "not compared")
    trained = [replace(row, params_trained=5) for row in one]
    found = matrix.matrix_entries([*scratch[0], *trained], {})
    assert next(entry for entry in found if entry.source == "a").gain == pytest.approx(
        one[0].value - scratch[0][0].value
    )


def test_a_seed_whose_value_is_nan_counts_as_failed():
    """Of scratch too: the other seeds are compared."""
    scratch, fine_tuned = of_seeds("none", "scratch", 0.5), of_seeds("a", "full", 0.9)
    runs = scratch[1] | fine_tuned[1]
    diverged = [replace(row, value=math.nan) if row.seed == 1 else row for row in scratch[0]]
    entry, reference = sorted(
        matrix.matrix_entries([*diverged, *fine_tuned[0]], runs), key=lambda entry: entry.source
    )
    assert (entry.verdict, entry.paired_seeds) == ("wins", 2)
    assert (reference.n_seeds, reference.n_failed) == (2, 1) and reference.mean is not None
    assert reference.validation is not None, "of the other seeds"
    without = [replace(row, value=math.nan) for row in scratch[0]]
    (none,) = matrix.matrix_entries(without, {})
    assert (none.n_seeds, none.n_failed, none.mean) == (3, 0, None), "the metric has no value"


def test_a_random_probe_is_not_held_against_a_probe_without_a_validation_value():
    random, best = of_seeds("none", "random_probe", 0.6), of_seeds("b", "linear_probe", 0.9)
    unknown = [
        replace(row, value=math.nan) if row.split == "validation" else row
        for row in of_seeds("a", "linear_probe", 0.7)[0]
    ]
    found = matrix.matrix_entries([*unknown, *best[0], *random[0]], {})
    assert {one.against for one in found if one.source == "none"} == {"linear_probe of b"}


def test_an_entry_names_what_its_gains_are_over():
    own, best = of_seeds("none", "scratch", 0.6), of_seeds("none", "scratch", 0.8, backbone="c")
    fine_tuned = of_seeds("a", "full", 0.75)
    found = matrix.matrix_entries(
        [*own[0], *best[0], *fine_tuned[0]], own[1] | best[1] | fine_tuned[1]
    )
    by_source = {(entry.source, entry.backbone): entry for entry in found}
    assert set(by_source["a", "b"].compared_with) == {
        ("none", "b", "t", "scratch", "1.0"),
        ("none", "c", "t", "scratch", "1.0"),
    }
    assert by_source["none", "b"].compared_with == ()
