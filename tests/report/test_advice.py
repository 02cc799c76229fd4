"""Advice from results tables: closed forms, constructed stores, too little evidence, foreign
files.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline import api
from pipeline.cli import app
from pipeline.config.schema import Job
from pipeline.core.metrics import catalog
from pipeline.io import storage
from pipeline.report import advice, matrix, results, stats
from pipeline.report.advice import NewTarget, Store
from pipeline.report.gain_model import GainModel
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions
from pipeline.transfer import trial

UNITS = 400


def entry(
    source: str,
    technique: str,
    level: float | tuple[float, ...],
    seeds: int = 3,
    draw: int = 7,
    **more: Any,
) -> tuple[list[ResultRow], dict[str, RunPredictions]]:
    """Test rows and predictions of an entry whose networks are right with probability ``level``.

    Entries of the same ``draw`` are right on the same units as far as their levels allow.
    """
    rows, runs = [], {}
    levels = level if isinstance(level, tuple) else (level,) * seeds
    for seed, level in enumerate(levels):
        rng = np.random.default_rng([seed, draw])
        label = np.arange(UNITS) % 2
        right = rng.random(UNITS) < level
        scores = (np.eye(2)[label] == right[:, None]).astype(np.float32)
        arrays = {
            "scores": scores,
            "label": label,
            "loss": np.zeros(UNITS),
            "count": np.ones(UNITS),
        }
        values = {
            "trial_id": f"{source}-{technique}-{seed}-{sorted(more.items())}",
            "job": "j",
            "source": source,
            "backbone": "b",
            "target": "t",
            "objective": "classification",
            "technique": technique,
            "label_fraction": "1.0",
            "seed": seed,
            "trial_stage": "final",
            "status": "done",
            "split": "test",
            "metric": "accuracy",
            "higher_is_better": True,
            "modality": "table",
            "seconds": 2.5,
            "params_trained": 1200,
            "value": catalog.metric("accuracy").value(arrays),
            **more,
        }
        row = ResultRow.from_columns(values)
        rows.append(row)
        runs[row.trial_id] = RunPredictions(np.arange(UNITS), arrays, seed)
    return rows, runs


def store(*entries: tuple[list[ResultRow], dict[str, RunPredictions]], name: str = "one") -> Store:
    rows, runs = [], {}
    for found_rows, found_runs in entries:
        rows += found_rows
        runs |= found_runs
    return Store(name, rows, runs)


def good_and_bad(**more: Any) -> Store:
    return store(
        entry("none", "scratch", 0.60, **more),
        entry("good", "full", 0.80, **more),
        entry("good", "linear_probe", 0.75, **more),
        entry("bad", "full", 0.50, **more),
        entry("bad", "linear_probe", 0.45, **more),
        name=str(more),
    )


# ---------------------------------------------------------------- the advice


def test_a_source_that_pays_is_recommended_and_one_that_hurts_is_named():
    (found,) = advice.advise([good_and_bad()])
    assert (found.verdict, found.source, found.technique) == ("use", "good", "full")
    assert found.expected is not None
    mean, low, high = found.expected
    store_ = good_and_bad()
    measured = max(
        one.over_best_scratch.value or 0 for one in matrix.matrix_entries(store_.rows, store_.runs)
    )
    assert 0 < low < mean < high and measured - 0.01 < mean < measured
    text = "\n".join(found.lines())
    assert "use source good with full" in text and "over 3 seeds" in text
    assert "2.5 s, 1,200 parameters trained" in text
    assert "source bad with full hurts" in text
    assert "the chance that" in found.next_experiment


def test_where_every_source_hurts_scratch_is_the_advice():
    (found,) = advice.advise([store(entry("none", "scratch", 0.8), entry("bad", "full", 0.5))])
    assert (found.verdict, found.source) == ("scratch", None)
    assert "train from scratch" in found.headline


def test_an_interval_around_zero_is_not_enough():
    (found,) = advice.advise([store(entry("none", "scratch", 0.7), entry("same", "full", 0.71))])
    assert (found.verdict, found.source) == ("not enough evidence", None)
    assert "contains zero" in found.headline


def test_one_seed_is_not_enough():
    few = store(entry("none", "scratch", 0.6, seeds=1), entry("good", "full", 0.9, seeds=1))
    (found,) = advice.advise([few])
    assert found.verdict == "not enough evidence" and found.expected is None
    assert "1 seed paired with scratch, 2 are needed" in found.headline
    assert found.next_experiment == "another seed of source good with full and of scratch"


def test_without_scratch_there_is_no_gain():
    (found,) = advice.advise([store(entry("good", "full", 0.9))])
    assert found.verdict == "not enough evidence" and "no gain over scratch" in found.headline


def test_one_more_seed_where_seeds_differ_most():
    """The runner-up's gains differ between seeds, the best one's do not."""
    gains = {"good": (0.27, 0.3, 0.33), "wild": (0.1, 0.29, 0.5)}
    known = store(
        entry("none", "scratch", 0.5), entry("good", "full", 0.8), entry("wild", "full", 0.79)
    )
    rows = [
        replace(row, value=0.5 + (gains[row.source][row.seed] if row.source in gains else 0.0))
        for row in known.rows
    ]
    (found,) = advice.advise([Store("one", rows, known.runs)])
    assert found.next_experiment.startswith("one more seed of source wild with full")
    before, after = map(int, re.findall(r"(\d+)%", found.next_experiment))
    assert after < before <= 50


def test_seeds_that_agree_leave_the_doubt_to_the_test_rows():
    known = store(
        entry("none", "scratch", 0.5), entry("good", "full", 0.8), entry("near", "full", 0.79)
    )
    rows = [replace(row, value=0.5 + 0.3 * (row.source != "none")) for row in known.rows]
    (found,) = advice.advise([Store("one", rows, known.runs)])
    assert found.next_experiment.startswith("more test rows, or another split")


def test_two_stores_are_read_together():
    """Like entries of another job draw the expected gain; trials in both are used once."""
    one, other = good_and_bad(), good_and_bad(target="u")
    alone = advice.advise([one])[0]
    together = {found.target: found for found in advice.advise([one, other])}
    assert set(together) == {"t", "u"}
    assert together["t"].expected != alone.expected
    again = advice.advise([one, Store("copy", one.rows, one.runs)])
    assert [found.expected for found in again] == [alone.expected]
    only = advice.advise([one, other], "u")
    assert [found.target for found in only] == ["u"]
    assert only[0].expected == together["u"].expected
    assert only[0].headline == f"use source good with full ({other.name})"


def test_scratch_that_two_stores_share_is_scratch_of_both():
    """The second job took the scratch trials of the first, so they have the same ids."""
    scratch = entry("none", "scratch", 0.6)
    one = store(scratch, entry("good", "full", 0.8))
    two = store(scratch, entry("better", "full", 0.9), name="two")
    (found,) = advice.advise([one, two])
    assert found.headline == "use source better with full (two)"
    assert any("good with full (one) pays too" in line for line in found.others)


def test_twelve_gains_over_the_same_scratch_are_no_evidence_together():
    """Each measured interval contains zero; their mean has scratch's error, however many agree."""
    entries = [entry(f"s{k}", "full", 0.68) for k in range(12)]
    crowd = store(entry("none", "scratch", 0.60, draw=8), *entries)
    measured = [
        one for one in matrix.matrix_entries(crowd.rows, crowd.runs) if one.source != "none"
    ]
    assert all(one.over_best_scratch.low < 0 < one.over_best_scratch.value for one in measured)
    (first,) = {
        (one.over_best_scratch.value, one.over_best_scratch.low, one.over_best_scratch.high)
        for one in measured
    }
    variance = ((first[2] - first[1]) / (2 * stats.NORMAL_95)) ** 2
    pairs = [(f"s{k}", "full", "t") for k in range(12)]
    alone = GainModel(pairs, [first[0]] * 12, [variance] * 12).posterior([0])
    assert alone.means - stats.NORMAL_95 * alone.covariance[0] ** 0.5 > 0, "independent errors"
    (found,) = advice.advise([crowd])
    assert (found.verdict, found.source) == ("not enough evidence", None)
    _, low, high = found.expected
    assert high - low >= first[2] - first[1] - 1e-12


def test_a_proven_source_is_taken_before_a_larger_gain_in_doubt():
    """The seeds of the largest gain differ so much that its interval contains zero."""
    wild = entry("wild", "full", (0.45, 0.99, 0.99))
    both = store(entry("none", "scratch", 0.5), entry("sure", "full", 0.7), wild)
    entries = {one.source: one for one in matrix.matrix_entries(both.rows, both.runs)}
    assert (
        entries["wild"].over_best_scratch.value
        > entries["sure"].over_best_scratch.value
        > 0
        > entries["wild"].gain_low
    )
    (found,) = advice.advise([both])
    assert found.headline == "use source sure with full"


def test_one_unsettled_source_forbids_the_advice_to_train_from_scratch():
    bad = (entry("none", "scratch", 0.8), entry("bad", "full", 0.5))
    (found,) = advice.advise([store(*bad, entry("new", "full", 0.9, seeds=1))])
    assert found.verdict == "not enough evidence"
    assert "source new with full has 1 seed paired with scratch" in found.headline


def test_metrics_of_a_target_are_advised_on_apart():
    """Accuracy and mean squared error of targets of the same name have nothing in common."""
    one = good_and_bad()
    rows = [replace(row, objective="regression", metric="mse") for row in good_and_bad().rows]
    rows = [replace(row, trial_id=f"other-{row.trial_id}") for row in rows]
    found = advice.advise([one, Store("other", rows, {})])
    assert [(advised.metric, advised.verdict) for advised in found] == [
        ("accuracy", "use"),
        ("mse", "not enough evidence"),
    ]
    assert found[0].lines()[0].startswith("t at 100 % labels, accuracy: use source good")
    assert found[0].expected == advice.advise([one])[0].expected


def test_without_predictions_there_is_no_advice():
    """The report does not compare such entries; an interval over seeds alone is no evidence."""
    without = Store("one", good_and_bad().rows, {})
    verdicts = {one.verdict for one in matrix.matrix_entries(without.rows, {})}
    assert "not compared" in verdicts and "wins" not in verdicts
    (found,) = advice.advise([without])
    assert found.verdict == "not enough evidence" and "no test predictions" in found.headline


def test_a_gain_without_the_noise_of_its_search_is_no_evidence():
    one = store(entry("none", "scratch", 0.60), entry("good", "full", 0.80))
    (known,) = advice.advise([one])
    searched = [
        replace(
            row,
            trial_id=f"{row.trial_id}-{lr}",
            trial_stage="search",
            split="validation",
            drawn=f'{{"lr": {lr}}}',
        )
        for row in one.rows
        for lr in (0.1, 0.2)
        if row.seed == 0
    ]
    (unknown,) = advice.advise([Store("one", [*one.rows, *searched], one.runs)])
    assert known.verdict == "use" and unknown.verdict == "not enough evidence"
    assert "has an interval without the noise of its search" in unknown.headline
    assert "without a search" in unknown.next_experiment


def test_a_metric_without_bounds_is_pooled_within_a_target(monkeypatch):
    """Errors in degrees and in dollars have no mean; shares of right answers have."""
    assert matrix.is_bounded("accuracy") and not matrix.is_bounded("mse")
    one, other = good_and_bad(), good_and_bad(target="u")
    alone = advice.advise([one])[0].expected
    assert advice.advise([one, other], "t")[0].expected != alone
    monkeypatch.setattr(matrix, "is_bounded", lambda metric: False)
    assert advice.advise([one, other], "t")[0].expected == alone


def test_no_experiment_is_named_that_cannot_be_made():
    """An average of all seeds has no other seed, and without labels there is no scratch."""
    soup = entry("good", "uniform_soup", 0.9, seeds=1)
    (found,) = advice.advise([store(entry("none", "scratch", 0.6), soup)])
    assert found.verdict == "not enough evidence" and found.next_experiment == ""
    also = store(entry("none", "scratch", 0.6), soup, entry("good", "full", 0.8, seeds=1))
    (found,) = advice.advise([also])
    assert found.next_experiment == "another seed of source good with full and of scratch"
    (found,) = advice.advise([store(entry("good", "zero_shot", 0.6, label_fraction="0 rows"))])
    assert "which is not defined without labels" in found.headline
    assert found.next_experiment == ""


def test_another_modality_is_no_like_entry():
    one, other = good_and_bad(), good_and_bad(target="u", modality="image")
    assert advice.advise([one, other], "t")[0].expected == advice.advise([one])[0].expected


def test_an_unknown_target_names_those_that_are_there():
    with pytest.raises(ValueError, match=r"no tested trial of a target 'x'; there are t"):
        advice.advise([good_and_bad()], "x")


def test_fractions_are_advised_apart():
    both = store(
        *(
            one
            for fraction, level in (("0.05", 0.85), ("1.0", 0.6))
            for one in (
                entry("none", "scratch", 0.6, label_fraction=fraction),
                entry("good", "full", level, label_fraction=fraction),
            )
        )
    )
    verdicts = [(found.label_fraction, found.verdict) for found in advice.advise([both])]
    assert verdicts == [("0.05", "use"), ("1.0", "not enough evidence")]


# ---------------------------------------------------------------- what was not tried


def planted(*left_out: tuple[str, str, str], targets: str = "tu") -> Store:
    """Results of three sources and two techniques, of which source good and technique full pay."""
    of_source = {"good": 0.2, "fair": 0.05, "bad": -0.15}
    of_technique = {"full": 0.05, "linear_probe": -0.05}
    return store(
        *(entry("none", "scratch", 0.6, target=target) for target in targets),
        *(
            entry(source, technique, 0.6 + gain + more, target=target)
            for target in targets
            for source, gain in of_source.items()
            for technique, more in of_technique.items()
            if (source, technique, target) not in left_out
        ),
    )


def test_a_planted_pair_that_was_not_tried_is_the_next_experiment():
    known = planted(("good", "full", "t"), ("bad", "full", "t"))
    found = advice.advise([known], "t")[0]
    assert (found.verdict, found.source, found.technique) == ("use", "good", "linear_probe")
    assert found.untried[0].startswith("source good with full was not tried: predicted gain +0.2")
    assert found.next_experiment.startswith("a trial of source good with full and of scratch")
    assert "raises the expected gain of the best choice by 0." in found.next_experiment
    assert len(found.untried) == 2 and found.untried[0] in "\n".join(found.lines())


def test_a_bad_pair_that_was_not_tried_is_not_worth_a_trial():
    found = advice.advise([planted(("bad", "full", "t"))], "t")[0]
    assert (found.verdict, found.source, found.technique) == ("use", "good", "full")
    (only,) = found.untried
    assert only.startswith("source bad with full was not tried: predicted gain -0.")
    assert "source bad" not in found.next_experiment


def test_a_pair_that_a_budget_cut_was_tried_and_is_not_recommended():
    """It is the planted pair, which would be the next experiment if it had not been tried."""
    when = "cut by the budget after rung 1 of 2 (1/9 of the steps)"
    known = planted(("good", "full", "t"), ("bad", "full", "t"))
    cut, _ = entry(
        "good",
        "full",
        0.3,
        seeds=1,
        trial_stage="search",
        split="validation",
        status="pruned",
        error=when,
    )
    found = advice.advise([replace(known, rows=[*known.rows, *cut])], "t")[0]
    promise, of_budget = found.untried
    assert promise.startswith("source bad with full was not tried")
    assert of_budget == (
        "cut by the budget, so without a gain: source good with full after rung 1 of 2 (1/9 of "
        "the steps)"
    )
    assert "good with full" not in found.next_experiment
    elsewhere = advice.advise([replace(known, rows=[*known.rows, *cut])], "u")[0]
    assert "cut by the budget" not in "\n".join(elsewhere.lines())


def test_a_new_target_gets_predictions_and_no_recommendation():
    new = NewTarget("w", "1.0", "table", "classification")
    found = advice.advise([planted(targets="tuv")], "w", [new])
    assert [(one.target, one.metric, one.verdict) for one in found] == [
        ("w", "accuracy", "not enough evidence")
    ]
    assert found[0].source is None and found[0].expected is None
    assert "other results predict the largest gain for source good with full" in found[0].headline
    assert found[0].untried[0].startswith("source good with full was not tried: predicted gain +0.")
    assert found[0].next_experiment.startswith("a trial of source good with full")
    elsewhere = NewTarget("w", "1.0", "image", "classification")
    (none,) = advice.advise([planted()], "w", [elsewhere])
    assert "no similar entry is there (image, classification" in none.headline


def test_trials_that_combine_others_predict_nothing_for_a_new_target():
    known = store(entry("none", "scratch", 0.6), entry("good", "uniform_soup", 0.8))
    new = NewTarget("w", "1.0", "table", "classification")
    (found,) = advice.advise([known], "w", [new])
    assert "no similar entry is there" in found.headline and not found.untried


def test_a_job_that_has_not_run_is_advised_on_from_another(tmp_path, monkeypatch):
    known = planted()
    results.append(str(tmp_path / "old"), known.rows)
    monkeypatch.setattr(
        trial,
        "read_predictions",
        lambda root, folder, seed: known.runs.get(folder.rpartition("/")[2]),
    )
    rows = {
        "train": "rows.parquet",
        "modality": "table",
        "columns": {"features": "x", "label": "y"},
    }
    task = {"data": rows, "objective": "classification"}
    job = Job.model_validate(
        {
            "name": "new",
            "storage": str(tmp_path),
            "sources": {"good": {**task, "backbone": "tables/mlp"}},
            "targets": {"w": task},
        }
    )
    found = api.advise([job, str(tmp_path / "old")])
    assert [one.target for one in found] == ["t", "u", "w"]
    assert found[2].untried and found[2].verdict == "not enough evidence"
    with pytest.raises(ValueError, match=r"no results\.parquet here"):
        api.advise([job])

    # what finished with fewer labels, or in an earlier version of the job, hides nothing
    of_target = [replace(row, target="w") for row in known.rows if row.target == "t"]
    few = [replace(row, label_fraction="0.1", trial_id=f"few {row.trial_id}") for row in of_target]
    stated = job.model_dump(exclude_unset=True)
    stated["targets"]["w"]["label_fractions"] = [0.1, 1.0]
    fewer_labels = Job.model_validate(stated)
    results.append(job.root, [*few, *of_target], current=[row.trial_id for row in few])
    found = api.advise([fewer_labels, str(tmp_path / "old")], "w")
    assert {one.label_fraction: bool(one.untried) for one in found}["1.0"]
    assert [one.label_fraction for one in found].count("0.1") == 1


# ---------------------------------------------------------------- files


def test_a_folder_and_its_table_give_the_same_advice(tmp_path):
    results.append(str(tmp_path), good_and_bad().rows)
    by_folder = api.advise([str(tmp_path)])
    by_file = api.advise([str(tmp_path / results.FILE), str(tmp_path)])
    assert by_folder == by_file == api.advise([tmp_path])
    shown = CliRunner().invoke(app, ["advise", str(tmp_path), "--target", "t"])
    assert shown.exit_code == 0, shown.output
    assert "t at 100 % labels, accuracy: " in shown.stdout and "Expected gain" in shown.stdout
    assert "source good with full has no test predictions" in shown.stdout


def test_no_results_and_foreign_files_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no results\.parquet here"):
        api.advise([str(tmp_path)])
    with pytest.raises(ValueError, match=r"rows\.parquet: a results table is named"):
        api.advise([str(tmp_path / "rows.parquet")])
    pq.write_table(pa.table({"pixel": [1]}), tmp_path / results.FILE)
    with pytest.raises(ValueError, match="columns that this version does not know: pixel"):
        api.advise([str(tmp_path)])
    (tmp_path / results.FILE).write_bytes(b"something else")
    with pytest.raises(storage.DamagedError, match="is damaged"):
        api.advise([str(tmp_path)])
    failed = CliRunner().invoke(app, ["advise", str(tmp_path)])
    assert failed.exit_code == 2 and failed.stderr.count("error:") == 1
