"""What the report says to use for each target, and the bundle that `predict` then takes."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

import pipeline
from pipeline import cli
from pipeline.report import matrix, results, winners
from tests.report.test_report import simulate, write


def validated(rows, best=("garments", "lp_ft"), bundles=True):
    """Return the rows with validation values, the highest for ``best`` with all labels, which
    rise with the seed.
    """
    out = []
    for row in rows:
        out.append(row)
        if row.split != "test" or row.metric != "accuracy":
            continue
        is_best = (row.source, row.technique, row.label_fraction) == (*best, "1.0")
        value = 0.5 + 0.3 * is_best + row.seed * 0.01
        uri = f"bundles/{row.trial_id}" if bundles else None
        out.append(replace(row, split="validation", value=value, bundle_uri=uri, n_eval=321))
    return out


def plain():
    rows, runs, curves = simulate()
    return [row for row in rows if row.split != "validation"], runs, curves


def entries_of(rows, target="clothing"):
    return [entry for entry in matrix.matrix_entries(rows, {}) if entry.target == target]


def test_the_winner_is_the_best_on_validation_rows_not_on_test_rows():
    rows, _, _ = plain()
    best = winners.winner(entries_of(validated(rows, ("digits", "full"))))
    assert (best.source, best.technique) == ("digits", "full")
    assert max(entries_of(rows), key=lambda entry: entry.mean).source == "garments"
    assert winners.winner(entries_of(rows)) is None  # no validation values
    scratch = winners.winner(entries_of(validated(rows, ("none", "scratch"))))
    assert scratch.source == "none"


def test_an_error_is_best_where_it_is_least():
    rows, _, _ = plain()
    turned = [
        replace(row, value=1 - row.value, higher_is_better=False)
        for row in validated(rows)
        if row.metric == "accuracy"
    ]
    best = winners.winner(entries_of(turned))
    assert (best.source, best.technique) == ("garments", "lp_ft")
    assert winners.bundle_of(best, turned).endswith("-2")


def test_the_bundle_is_that_of_the_best_seed():
    rows, _, _ = plain()
    found = validated(rows)
    best = winners.winner(entries_of(found))
    assert winners.bundle_of(best, found) == "bundles/cl-ga-lp_ft-1.0-2"
    dropped = [replace(row, bundle_uri=None) if row.seed == 2 else row for row in found]
    assert winners.bundle_of(best, dropped) == "bundles/cl-ga-lp_ft-1.0-1"


def test_the_report_says_what_to_use_and_the_commands(tmp_path):
    rows, runs, curves = plain()
    _, md, html = write(tmp_path, validated(rows), runs, curves)
    assert md.index("## What to use") < md.index("A comparison is one source")
    assert "garments with lp_ft" in md and "chosen on 321 validation rows" in md
    assert f"onetomany predict {tmp_path} FILES --target clothing -o predictions/clothing" in md
    assert "onetomany export bundles/cl-ga-lp_ft-1.0-2 exported/clothing" in html
    _, md, _ = write(tmp_path, validated(rows, bundles=False), runs, curves)
    assert "## What to use" in md and "onetomany predict" not in md


def test_a_jobs_folder_stands_for_the_bundle_of_its_winner(tmp_path):
    rows, _, _ = plain()
    root = str(tmp_path)
    results.append(root, validated(rows))
    assert pipeline.best_bundle(root, "clothing") == "bundles/cl-ga-lp_ft-1.0-2"
    with pytest.raises(ValueError, match="has 2 targets: name one, --target clothing"):
        pipeline.best_bundle(root)
    with pytest.raises(ValueError, match="no target 'shoes'; its targets are clothing, handwr"):
        pipeline.best_bundle(root, "shoes")
    with pytest.raises(ValueError, match="no trial has finished here"):
        pipeline.best_bundle(str(tmp_path / "elsewhere"))
    arguments = ["predict", root, "rows.parquet", "--target", "clothing", "-o", f"{root}/out"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2 and "bundles/cl-ga-lp_ft-1.0-2" in done.output


def test_a_winner_without_a_bundle_is_named_with_the_remedy(tmp_path):
    rows, _, _ = plain()
    results.append(str(tmp_path), validated(rows, bundles=False))
    with pytest.raises(ValueError, match=r"garments with lp_ft .* set fanout.keep_bundles: best"):
        pipeline.best_bundle(str(tmp_path), "clothing")
