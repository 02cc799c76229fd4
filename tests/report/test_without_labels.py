"""Gains at label fraction 0 are over the source's network as it is, not over scratch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from written_reports import report_texts

from pipeline.report import blocks, matrix, without_labels
from tests.report.test_advice import UNITS, entry, store

LABELS = {"label_fraction": "0/class"}


def page(*entries) -> str:
    known = store(entry("none", "scratch", 0.6), entry("src", "full", 0.8), *entries)
    found = matrix.matrix_entries(known.rows, known.runs)
    shown = without_labels.blocks_of(found, known.runs, {"t": 3})
    return blocks.markdown("x", shown)


def test_each_seed_is_compared_with_the_one_trial_of_zero_shot():
    zero_shot = entry("src", "zero_shot", 0.6, seeds=1, **LABELS)
    dann, adabn = entry("src", "dann", 0.8, **LABELS), entry("src", "adabn", 0.7, seeds=1, **LABELS)
    found = page(zero_shot, dann, adabn)
    gain = sum(row.value for row in dann[0]) / 3 - zero_shot[0][0].value
    assert f"+{gain:.3f} [+" in found and "wins" in found
    (adapted,) = [line for line in found.splitlines() if "adabn" in line]
    assert matrix.SINGLE_SEED in adapted, "one seed is no verdict"
    assert "full" not in found, "it had labels"


def test_another_source_or_no_zero_shot_is_no_reference():
    dann = entry("src", "dann", 0.8, **LABELS)
    other = entry("other", "zero_shot", 0.6, seeds=1, **LABELS)
    assert "Without labels" not in page(dann) and "Without labels" not in page(dann, other)


@pytest.mark.parametrize("lost", ["dann", "zero_shot"])
def test_without_predictions_nothing_is_compared(lost):
    zero_shot = entry("src", "zero_shot", 0.6, seeds=1, **LABELS)
    dann = entry("src", "dann", 0.8, **LABELS)
    known = store(zero_shot, dann)
    runs = {name: run for name, run in known.runs.items() if lost not in name}
    found = matrix.matrix_entries(known.rows, known.runs)
    shown = without_labels.blocks_of(found, runs, {"t": 3})
    assert matrix.UNCOMPARED in blocks.markdown("x", shown)


def test_a_seed_of_all_folds_is_compared_with_zero_shot_on_all_folds(tmp_path):
    parts = []
    for fold in (1, 2, 3):
        for technique, level, seeds in (("zero_shot", 0.6, 1), ("dann", 0.8, 3)):
            rows, runs = entry("src", technique, level, seeds, draw=fold, fold=fold, **LABELS)
            shifted = {
                name: replace(run, rows=run.rows + fold * UNITS) for name, run in runs.items()
            }
            parts.append((rows, shifted))
    known = store(*parts)
    text, _ = report_texts(tmp_path, known.rows, known.runs)
    shown = text[text.index("## Without labels of the target") :]
    adapted = next(line for line in shown.splitlines() if "| dann |" in line)
    assert matrix.UNCOMPARED not in adapted and matrix.WINS in adapted
