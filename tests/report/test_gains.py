from dataclasses import replace

import numpy as np
import pytest

from pipeline.report import blocks, gains, matrix, report
from pipeline.report.source_scores import PairScores, ScoreValue
from tests.report.test_report import SKILL, backbones, find, simulate, write


@pytest.fixture(scope="module")
def entries():
    rows, runs, _ = simulate()
    return report.matrix_entries(rows, runs)


def by_target(entries):
    return {target: [entry for entry in entries if entry.target == target] for target in SKILL}


DECIMALS = dict.fromkeys(SKILL, 3)


def test_the_first_thing_in_the_report_is_where_transfer_hurts(tmp_path):
    _, md, html = write(tmp_path, *simulate())
    first = md.split("\n\n")[1]
    assert first.startswith(
        "> For target handwriting (100 % labels), fine-tuning garments with linear\\_probe"
    ) or first.startswith(
        "> For target handwriting (100 % labels), fine-tuning garments with linear_probe"
    )
    assert "is worse than training from scratch: better than scratch is digits with full" in first
    assert html.index("is worse than training from scratch") < html.index("A comparison is one")


def test_without_a_winner_the_warning_says_scratch(entries):
    group = [
        entry
        for entry in by_target(entries)["handwriting"]
        if entry.label_fraction == "1.0" and entry.verdict != "wins"
    ]
    (warning,) = gains.warnings({"handwriting": group}, DECIMALS)
    assert warning.kind == "warning"
    assert warning.text.endswith("is worse than training from scratch: use scratch.")
    lost = find(entries, "handwriting", technique="linear_probe")
    assert blocks.with_minus_sign(f"{lost.gain:+.3f} [") in warning.text
    assert gains.warnings({"clothing": by_target(entries)["clothing"]}, DECIMALS) == []


def test_all_techniques_of_a_source_that_lose_are_named_at_once(entries):
    loss = matrix.GainEstimate(-0.1, -0.2, -0.01)
    group = [
        replace(entry, verdict="loses", over_scratch=loss, gain_p_holm=0.01)
        for entry in by_target(entries)["clothing"]
        if entry.label_fraction == "1.0" and entry.source != "none"
    ]
    (warning,) = gains.warnings({"clothing": group}, DECIMALS)
    assert "garments with any of 3 techniques (at worst" in warning.text
    assert "digits with full (−0.100" in warning.text


def test_a_loss_that_holms_correction_takes_away_is_no_warning(entries):
    group = [entry for entry in by_target(entries)["handwriting"] if entry.label_fraction == "1.0"]
    by_luck = [
        replace(entry, gain_p_holm=0.2) if entry.verdict == "loses" else entry for entry in group
    ]
    assert any(entry.verdict == "loses" for entry in group)
    assert gains.warnings({"handwriting": group}, DECIMALS) != []
    assert gains.warnings({"handwriting": by_luck}, DECIMALS) == []
    doubt = ", though not after Holm's correction."
    for p_value, is_doubted in ((0.2, True), (0.01, False)):
        won = [replace(c, gain_p_holm=p_value) if c.verdict == "wins" else c for c in group]
        (warning,) = gains.warnings({"handwriting": won}, DECIMALS)
        assert "better than scratch is digits with" in warning.text
        assert warning.text.endswith(doubt) == is_doubted


def test_gains_of_several_backbones_are_compared_over_the_best_scratch_network(tmp_path):
    """garments gains .2 over its own weak scratch network and .02 over the best one."""
    rows, runs, _ = backbones()
    own = report.matrix_entries(rows, runs)
    compared = matrix.comparable_across_backbones(own)
    weak, before = find(compared), find(own)
    assert (weak.gain, weak.gain_low) == (
        before.over_best_scratch.value,
        before.over_best_scratch.low,
    )
    assert weak.gain < 0.05 < before.gain and weak.verdict == "not shown"
    assert find(compared, source="digits").gain == find(own, source="digits").gain
    _, table = gains.cost_figures({"clothing": compared}, {"clothing": 3})
    assert sum("none" in line[0] for line in table.rows) <= 1
    figure, _ = gains.cost_figures({"clothing": compared}, {"clothing": 3})
    assert "gains are over the one that is best on validation rows" in figure.caption
    lost = [replace(entry, verdict="loses", gain_p_holm=0.01) for entry in compared]
    (warning,) = gains.warnings({"clothing": lost}, {"clothing": 3})
    assert "is worse than the target's best network from scratch: use scratch." in warning.text
    _, md, _ = write(tmp_path, *backbones())
    assert md.count("gains are over the one that is best on validation rows") >= 2
    assert matrix.comparable_across_backbones(compared)[0].gain == compared[0].gain
    single, single_runs, _ = simulate()
    alone = report.matrix_entries(single, single_runs)
    assert matrix.comparable_across_backbones(alone) == alone


def test_what_is_made_of_other_trials_or_has_one_seed_is_on_no_front(entries):
    group = [
        replace(
            entry, technique="greedy_soup", seconds=0.001, over_scratch=matrix.GainEstimate(1.0)
        )
        if entry.technique == "lp_ft"
        else replace(entry, paired_seeds=1, seconds=0.001, over_scratch=matrix.GainEstimate(1.0))
        if entry.source == "digits"
        else entry
        for entry in by_target(entries)["clothing"]
        if entry.label_fraction == "1.0"
    ]
    more = replace(
        next(c for c in group if c.technique == "full"),
        technique="l2_sp",
        over_scratch=matrix.GainEstimate(0.05),
    )
    figure, table = gains.cost_figures({"clothing": [*group, more]}, DECIMALS)
    assert not any("soup" in line[0] or "digits" in line[0] for line in table.rows)
    assert "garments · greedy_soup" in figure.caption and "digits · full" in figure.caption


def test_the_technique_of_a_heat_map_is_chosen_on_validation_rows(entries):
    """The linear probe is the worst of garments on test rows and the best on validation rows."""
    turned = [
        replace(entry, validation=1.0 if entry.technique == "linear_probe" else 0.5)
        for entry in entries
    ]
    for given, technique, words in (
        (turned, "linear_probe", "best by its validation rows"),
        (entries, "lp_ft", "test rows, which flatters it"),
    ):
        out = gains.heat_maps(given, DECIMALS)
        text, table = out[1], out[2]
        assert words in text.text and table.heat
        assert table.header == ["100 % labels", "clothing", "handwriting"]
        lines = {line[0]: line[1:] for line in table.rows}
        assert list(lines) == ["digits", "garments"]
        entry = find(entries, "handwriting", technique=technique)
        assert lines["garments"][1].lines[0].startswith(f"{entry.gain:+.3f}")
        assert lines["garments"][1].lines[1] == technique
    shades = [abs(value.shade) for line in out[2].rows for value in line[1:]]
    assert max(shades) == 1 and sum(shade == 1 for shade in shades) == 2, "1 within each target"
    assert {block.title for block in out[3:]} == {
        "5 % labels",
        "full alone",
        "lp_ft alone",
        "linear_probe alone",
    }
    folded = next(block for block in out[3:] if block.title == "5 % labels")
    assert folded.blocks[0].header[0] == "", "its title has the labels already"


def test_the_most_labels_are_those_of_the_most_rows(entries):
    """50 rows a class of ten classes are more than 1 % of 10,000 rows; where all trials failed, the
    rows are in proportion to those of another fraction of the same kind.
    """
    labels = {"1.0": ("50/class", 500), "0.05": ("0.01", 100)}
    entries = [
        replace(entry, label_fraction=name, n_train=num_rows)
        for entry in entries
        for name, num_rows in [labels[entry.label_fraction]]
    ]
    assert matrix.most_labels_first(entries) == ["50/class", "0.01"]
    failed = [
        replace(entries[0], label_fraction=name, n_train=None, n_seeds=0)
        for name in ("20/class", "0.5", "0/class")
    ]
    assert matrix.most_labels_first([*failed, *entries]) == [
        "0.5",
        "50/class",
        "20/class",
        "0.01",
        "0/class",
    ]
    assert matrix.most_labels_first(failed) == ["0.5", "20/class", "0/class"]
    all_labels = replace(entries[0], label_fraction="1.0", n_train=600)
    more = replace(failed[0], label_fraction="200/class")
    of_50 = [entry for entry in entries if entry.label_fraction == "50/class"]
    assert matrix.most_labels_first([more, all_labels, *of_50]) == ["1.0", "200/class", "50/class"]
    _, _, first, *_ = gains.heat_maps(entries, DECIMALS)
    assert isinstance(first, blocks.Table) and first.header[0] == "50 labels a class"
    figure, _ = gains.cost_figures({"clothing": by_target(entries)["clothing"]}, DECIMALS)
    assert "with 50 labels a class" in figure.caption
    scores = {("clothing", "garments", "logme"): 0.5, ("clothing", "digits", "logme"): 0.1}
    (figure,) = gains.score_figures(entries, scores, DECIMALS)
    digits = find(entries, source="digits", fraction="50/class")
    assert figure.numbers.rows[1][3] == gains.gain_text(digits, 3)


def test_many_targets_stand_below_each_other(entries):
    full = [entry for entry in entries if entry.technique == "full" and entry.gain is not None]
    many = [replace(entry, target=f"{entry.target}{i}") for entry in full for i in range(4)]
    table = gains.heat_map("all", many, dict.fromkeys((one.target for one in many), 3))
    assert table.header == ["all", "digits", "garments"]
    assert [line[0] for line in table.rows] == sorted({one.target for one in many})
    few = [one for one in many if not one.target.startswith("handwriting")]
    across = gains.heat_map("all", few, dict.fromkeys((one.target for one in few), 3))
    assert across.header[1:] == [f"clothing{i}" for i in range(4)]
    lines = {line[0]: line[1:] for line in table.rows}
    assert [line[1:] for line in across.rows] == [
        [lines[target][row] for target in across.header[1:]] for row in range(2)
    ]


def test_losses_are_red_and_gains_green(tmp_path):
    skill = {
        "clothing": {("none", "scratch"): 0.7, ("a", "full"): 0.9, ("b", "full"): 0.5},
    }
    _, _, html = write(tmp_path, *simulate(skill, fractions=("1.0",)))
    assert html.count("color-mix(in srgb,var(--wins) 45%") + html.count("var(--loses) 45%") == 1
    assert "color-mix(in srgb,var(--loses)" in html


def test_validation_of_an_entry_is_the_mean_of_its_final_trials_and_larger_is_better():
    rows, runs, _ = simulate({"clothing": SKILL["clothing"]}, fractions=("1.0",))
    mine = [row for row in rows if row.technique == "lp_ft" and row.metric == "accuracy"]
    assert {entry.validation for entry in report.matrix_entries(rows, runs)} == {None}
    for sign, higher in ((1, True), (-1, False)):
        more = [
            replace(row, split="validation", value=0.1 * row.seed, higher_is_better=higher)
            for row in mine
        ]
        entry = find(report.matrix_entries([*rows, *more], runs), technique="lp_ft")
        assert entry.validation == pytest.approx(sign * 0.1)


def test_the_front_is_what_no_other_point_beats():
    rng = np.random.default_rng(0)
    for _ in range(30):
        points = [tuple(map(float, point)) for point in rng.integers(0, 6, (12, 2))]
        beaten = {
            i
            for i, (cost, gain) in enumerate(points)
            if any(
                c <= cost and g >= gain and (c < cost or g > gain or j < i)
                for j, (c, g) in enumerate(points)
                if j != i
            )
        }
        front = gains.pareto_front(points)
        assert set(front) == set(range(12)) - beaten
        assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_the_cost_figure_lists_its_front_by_number(entries):
    figure, table = gains.cost_figures({"clothing": by_target(entries)["clothing"]}, DECIMALS)
    assert figure.svg.startswith("<svg") and "mathdefault" not in figure.svg
    assert [line[0] for line in table.rows] == [
        "1: garments · linear_probe",
        f"2: garments · {max((c for c in by_target(entries)['clothing'] if c.label_fraction == '1.0' and c.gain), key=lambda c: c.gain).technique}",
    ]
    assert table.rows[0][1] == "seconds and parameters" and table.rows[0][4] == "5,130"


def test_trials_that_train_nothing_stand_at_zero_parameters(entries):
    group = [
        replace(entry, params_trained=0, seconds=0.5)
        if entry.technique == "linear_probe"
        else replace(entry, params_trained=10**6)
        for entry in by_target(entries)["clothing"]
    ]
    _, table = gains.cost_figures({"clothing": group}, DECIMALS)
    assert table.rows[0][0] == "1: garments · linear_probe" and table.rows[0][4] == "0"


def test_scores_stand_beside_the_gains_of_their_sources(entries):
    scores = {
        ("clothing", "garments", "logme"): 0.5,
        ("clothing", "digits", "logme"): 0.1,
        ("handwriting", "garments", "logme"): 0.2,
        ("handwriting", "digits", "logme"): float("nan"),
    }
    (figure,) = gains.score_figures(entries, scores, DECIMALS)
    assert "for clothing" in figure.svg and "handwriting" not in figure.svg, "one source is no line"
    assert [line[:3] for line in figure.numbers.rows] == [
        ["clothing", "garments", "0.5"],
        ["clothing", "digits", "0.1"],
    ]
    assert gains.score_figures(entries, {}, DECIMALS) == []


def test_a_distance_is_listed_nearest_first_and_has_one_name(entries):
    """As the score that chose the sources, in the results rows, and among all scores."""
    name = gains.score_name("mmd")
    assert name == gains.score_name("mmd", False) == "MMD² (less is better)"
    assert gains.score_name("logme") == "LogME" and gains.score_name("of a plugin") == "of a plugin"
    scores = {("clothing", "garments", name): 0.2, ("clothing", "digits", name): 0.1}
    assert [key[1] for key, _ in gains.best_scores_first(scores)] == ["digits", "garments"]
    (figure,) = gains.score_figures(entries, scores, DECIMALS)
    assert [line[1] for line in figure.numbers.rows] == ["digits", "garments"]
    pair = PairScores("digits", "clothing", {"mmd": ScoreValue(0.1, higher_is_better=False)})
    rows = [replace(row, score_name="mmd", score_value=0.1) for row in simulate()[0][:1]]
    known = report.known_scores(rows, {})
    assert {key[2] for key in known} == {key[2] for key in gains.all_scores({"": pair})} == {name}


def test_all_scores_of_a_run_have_their_figure_folded(entries):
    source_scores = {
        f"{source}|clothing": PairScores(
            source,
            "clothing",
            {
                "logme": ScoreValue(value),
                "leep": ScoreValue(None, reason="no classes"),
                "mmd": ScoreValue(1 - value, higher_is_better=False),
                "knn": ScoreValue(value),
            },
        )
        for source, value in (("garments", 0.5), ("digits", 0.1))
    }
    out = gains.score_figures(entries, gains.all_scores(source_scores), DECIMALS)
    assert [block.title for block in out] == [
        "Gain beside LogME",
        "Gain beside MMD² (less is better)",
        "Gain beside kNN",
    ]
