"""What the report says to use for each target, and the bundle that `predict` then takes."""

import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import pipeline
from pipeline import cli
from pipeline.io.storage import StorageError
from pipeline.report import gains, matrix, per_label, results, winners
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


def best_of_tables(entries):
    """The entry that the tables of classes and labels are of."""
    runs = dict.fromkeys(one for entry in entries for one in entry.trial_ids)
    return per_label.best_entry(entries, runs)[0]


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


@pytest.mark.parametrize(
    "choose",
    [winners.winner, gains.chosen, best_of_tables],
)
def test_test_rows_break_no_tie(choose):
    rows, _, _ = plain()
    found = [replace(row, params_trained=7) for row in validated(rows, best=())]
    turned = [
        replace(row, value=1 - (row.value or 0.0)) if row.split == "test" else row for row in found
    ]
    first, second = (
        [entry for entry in entries_of(each) if entry.label_fraction == "1.0"]
        for each in (found, turned)
    )
    assert len({entry.validation for entry in first}) == 1
    assert first[0].key != second[0].key, "they are sorted by test values"
    assert choose(first).key == choose(second).key == min(entry.key for entry in first)
    smaller = [replace(first[-1], params_trained=5), *first[:-1]]
    assert choose(smaller).key == first[-1].key
    several = [replace(smaller[0], technique="ensemble", params_trained=0), *smaller]
    assert choose(several) == smaller[0], "one network rather than several"


def test_the_winner_has_the_most_labels():
    """Though one with fewer has a larger value on a few validation rows."""
    rows, _, _ = plain()
    lucky = [
        replace(row, value=0.99)
        if row.split == "validation" and row.label_fraction == "0.05"
        else row
        for row in validated(rows)
    ]
    assert winners.winner(entries_of(lucky)).label_fraction == "1.0"
    by_class = [
        replace(row, label_fraction="25/class", n_train=50)
        if row.label_fraction == "0.05"
        else replace(row, n_train=900)
        for row in lucky
    ]
    assert winners.winner(entries_of(by_class)).label_fraction == "1.0"
    few = [row for row in by_class if row.label_fraction == "25/class"]
    assert winners.winner(entries_of(few)).label_fraction == "25/class"


def test_a_network_that_is_used_as_it_is_stands_beside_those_with_the_most_labels():
    rows, _, _ = plain()
    untrained = {"technique": "zero_shot", "label_fraction": "0/class", "params_trained": 0}
    found = validated(rows)
    extra = [
        replace(row, **untrained, n_train=0, trial_id=f"{row.trial_id}-as-it-is", value=0.95)
        for row in found
        if (row.source, row.technique, row.label_fraction) == ("garments", "full", "1.0")
    ]
    best = winners.winner(entries_of([*found, *extra]))
    assert (best.technique, best.label_fraction) == ("zero_shot", "0/class")
    trained = [replace(row, params_trained=7) for row in extra]
    assert winners.winner(entries_of([*found, *trained])).label_fraction == "1.0"
    # tent is validated before it adapts; a soup has the labels of its trials
    for name in ("tent", "greedy_soup"):
        others = [replace(row, technique=name) for row in extra]
        assert winners.winner(entries_of([*found, *others])).label_fraction == "1.0", name
        assert winners.winner(entries_of(others)).technique == name


@pytest.mark.slow
def test_a_winner_with_fewer_labels_is_said_to_be_one(tmp_path):
    rows, runs, curves = plain()
    found = [
        row
        for row in validated(rows)
        if row.split == "test" or (row.target, row.label_fraction) != ("clothing", "1.0")
    ]
    _, md, _ = write(tmp_path, found, runs, curves)
    assert "no network with 100 % labels has a value on validation rows" in md
    assert "no network with" not in write(tmp_path, validated(rows), runs, curves)[1]


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


def test_scratch_that_is_shown_to_be_worse_is_not_used_though_it_validates_best():
    rows, runs, _ = plain()
    rows = validated(rows, ("none", "scratch"))
    entries = [one for one in matrix.matrix_entries(rows, runs) if one.target == "clothing"]
    assert any(one.verdict == "wins" and one.survives for one in entries)
    assert winners.winner(entries).source == "garments"
    # the network that wins has no bundle: scratch is shown to be worse all the same
    bundles = [row if row.source != "garments" else replace(row, bundle_uri=None) for row in rows]
    assert winners.with_bundle(entries, bundles).source == "digits"
    doubted = [replace(one, gain_p_holm=0.2) for one in entries]
    assert winners.winner(doubted).source == "none"
    lost = [
        replace(one, verdict="loses", gain_p_holm=0.01) if one.technique == "lp_ft" else one
        for one in entries
    ]
    assert winners.winner(lost).technique != "lp_ft"


def test_the_bundle_is_that_of_the_best_seed():
    rows, _, _ = plain()
    found = validated(rows)
    best = winners.winner(entries_of(found))
    assert winners.bundle_of(best, found) == "bundles/cl-ga-lp_ft-1.0-2"
    dropped = [replace(row, bundle_uri=None) if row.seed == 2 else row for row in found]
    assert winners.bundle_of(best, dropped) == "bundles/cl-ga-lp_ft-1.0-1"
    diverged = [replace(row, value=math.nan) if row.seed == 0 else row for row in found]
    assert winners.bundle_of(best, diverged) == "bundles/cl-ga-lp_ft-1.0-2"


def without_bundles_of(rows, source, technique):
    return [
        replace(row, bundle_uri=None) if (row.source, row.technique) == (source, technique) else row
        for row in rows
    ]


def test_a_metric_of_the_simulator_has_no_validation_values_and_the_bundle_is_found():
    rows, _, _ = plain()
    found = [
        replace(row, metric="action_error", value=1 - row.value, higher_is_better=False)
        if row.split == "validation"
        else row
        for row in validated(rows)
    ]
    best = winners.winner(entries_of(found))
    assert winners.bundle_of(best, found) == "bundles/cl-ga-lp_ft-1.0-2"


def test_an_ensemble_has_no_bundle_so_the_commands_take_the_next_network(tmp_path):
    """As a network whose bundle somebody has deleted."""
    rows, runs, curves = plain()
    found = without_bundles_of(validated(rows), "garments", "lp_ft")
    found = [
        replace(row, value=row.value + 0.1)
        if (row.split, row.source, row.technique) == ("validation", "digits", "full")
        else row
        for row in found
    ]
    _, md, _ = write(tmp_path / "report", found, runs, curves)
    taken = winners.with_bundle(entries_of(found), found)
    assert (taken.source, taken.technique) == ("digits", "full")
    uri = winners.bundle_of(taken, found)
    assert "has no bundle: the commands take digits with full" in md
    assert f"onetomany predict {uri} FILES -o predictions/clothing" in md
    assert f"onetomany export {uri} exported/clothing" in md
    results.append(str(tmp_path), found)
    there = f"{tmp_path}/trials/{uri.removeprefix('bundles/')}/bundle"
    message = rf"garments with lp_ft .* has no bundle; .* digits with full .* predict {there} FILES"
    with pytest.raises(ValueError, match=message):
        pipeline.best_bundle(str(tmp_path), "clothing")


def test_a_network_of_one_seed_of_three_is_not_chosen_where_others_have_three(tmp_path):
    rows, runs, curves = plain()
    found = [
        replace(row, status="failed", split=None, metric=None, value=None, error="out of memory")
        if (row.source, row.technique) == ("garments", "lp_ft") and row.seed > 0
        else row
        for row in validated(rows)
    ]
    best = winners.winner(entries_of(found))
    assert (best.source, best.technique) != ("garments", "lp_ft")
    alone = [row for row in found if (row.source, row.technique) == ("garments", "lp_ft")]
    assert winners.winner(entries_of(alone)).n_seeds == 1
    _, md, _ = write(tmp_path, alone, runs, curves)
    assert "1 of 3 seeds" in md[: md.index("A comparison is") if "A comparison is" in md else None]


def in_folds(rows):
    """Return the rows in two folds, of which the second has easier validation rows and seed 0 is
    best in it.
    """
    out = []
    for row in rows:
        easier = 0.2 + 0.05 * (row.seed == 0) if row.split == "validation" else 0.0
        for fold in (1, 2):
            uri = row.bundle_uri and f"{row.bundle_uri}-fold{fold}"
            value = row.value + easier * (fold == 2)
            name = f"{row.trial_id}-fold{fold}"
            out.append(replace(row, trial_id=name, fold=fold, value=value, bundle_uri=uri))
    return out


def test_seeds_in_folds_are_compared_by_the_validation_rows_of_all_folds(tmp_path):
    rows, runs, curves = plain()
    found = in_folds(validated(rows))
    results.append(str(tmp_path), found)
    expected = f"{tmp_path}/trials/cl-ga-lp_ft-1.0-0-fold1/bundle"
    assert pipeline.best_bundle(str(tmp_path), "clothing") == expected
    _, md, _ = write(tmp_path, found, runs, curves)
    assert "the commands take the network of one fold" in md and "a job without folds" in md
    assert "chosen on 642 validation rows" in md
    assert f"onetomany export {tmp_path} exported/clothing --target clothing" in md
    # keep_bundles: best keeps another seed in each fold
    best_of_each = [
        row if (row.seed, row.fold) in ((2, 1), (0, 2)) else replace(row, bundle_uri=None)
        for row in found
    ]
    root = str(tmp_path / "best")
    results.append(root, best_of_each)
    assert pipeline.best_bundle(root, "clothing") == f"{root}/trials/cl-ga-lp_ft-1.0-0-fold2/bundle"


def test_the_report_says_what_to_use_and_the_commands(tmp_path):
    rows, runs, curves = plain()
    _, md, html = write(tmp_path, validated(rows), runs, curves)
    assert md.index("## What to use") < md.index("A comparison is one source")
    assert "garments with lp_ft" in md and "chosen on 321 validation rows" in md
    assert f"onetomany predict {tmp_path} FILES --target clothing -o predictions/clothing" in md
    exported = f"onetomany export {tmp_path} exported/clothing --target clothing --kind bundle"
    assert exported in html, "nothing is known of this bundle: a copy always works"
    _, md, _ = write(tmp_path, validated(rows, bundles=False), runs, curves)
    assert "## What to use" in md and "onetomany predict" not in md


def test_a_gain_that_survives_the_correction_has_a_star_in_the_first_tables(tmp_path):
    rows, runs, curves = plain()
    _, md, _ = write(tmp_path, validated(rows), runs, curves)
    assert "lp_ft · 5 %<br>▲ wins \\*" in md  # the largest gain of a target
    entry = next(entry for entry in entries_of(rows) if entry.source == "garments")
    won = replace(
        entry, verdict=matrix.WINS, over_scratch=matrix.GainEstimate(value=0.2, low=0.1, high=0.3)
    )
    for p_value, words in ((0.01, "▲ wins *"), (0.2, "▲ wins")):
        assert winners.gain_cell(replace(won, gain_p_holm=p_value), 2).lines[1] == words


def test_a_jobs_folder_stands_for_the_bundle_of_its_winner(tmp_path):
    rows, _, _ = plain()
    root = str(tmp_path)
    results.append(root, validated(rows))
    assert pipeline.best_bundle(root, "clothing") == f"{root}/trials/cl-ga-lp_ft-1.0-2/bundle"
    with pytest.raises(ValueError, match="has 2 targets: name one, --target clothing"):
        pipeline.best_bundle(root)
    with pytest.raises(ValueError, match="no target 'shoes'; its targets are clothing, handwr"):
        pipeline.best_bundle(root, "shoes")
    with pytest.raises(ValueError, match="no trial has finished here"):
        pipeline.best_bundle(str(tmp_path / "elsewhere"))
    stopped = tmp_path / "stopped"
    (stopped / "trials/clothing/garments/full/labels-1.0/seed0-3f2a9c0b71de").mkdir(parents=True)
    (next(stopped.glob("trials/*/*/*/*/*")) / "record.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"trials that have begun: 1\..*`onetomany report JOB.yaml` writes"
    ):
        pipeline.predict(str(stopped), "rows.parquet", f"{root}/out")
    arguments = ["predict", root, "rows.parquet", "--target", "clothing", "-o", f"{root}/out"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2 and "trials/cl-ga-lp_ft-1.0-2/bundle" in done.output
    with pytest.raises(StorageError, match=r"trials/cl-ga-lp_ft-1\.0-2/bundle"):
        pipeline.export(root, f"{root}/exported", target="clothing")


def test_a_winner_without_a_bundle_is_named_with_the_remedy(tmp_path):
    rows, _, _ = plain()
    results.append(str(tmp_path), validated(rows, bundles=False))
    with pytest.raises(ValueError, match=r"garments with lp_ft .* set fanout.keep_bundles: best"):
        pipeline.best_bundle(str(tmp_path), "clothing")


@pytest.mark.slow
def test_a_network_with_a_techniques_own_modules_is_exported_as_a_copy(tmp_path):
    rows, runs, curves = plain()
    renamed = [
        replace(row, technique="bottleneck")
        if (row.target, row.source, row.technique) == ("clothing", "garments", "lp_ft")
        else row
        for row in rows
    ]
    found = [
        *validated(
            [row for row in renamed if row.target == "clothing"], ("garments", "bottleneck")
        ),
        *validated([row for row in renamed if row.target != "clothing"]),
    ]
    _, md, _ = write(tmp_path, found, runs, curves)
    assert f"onetomany predict {tmp_path} FILES --target clothing" in md
    assert f"onetomany export {tmp_path} exported/clothing --target clothing --kind bundle" in md
    assert f"onetomany export {tmp_path} exported/handwriting --target handwriting" in md
    assert "bottleneck leaves modules of its own in the network" in md
    assert "onnx" not in md, "the bundle is gone: nothing says that it can be a graph"
