import io
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console
from written_reports import report_texts

from pipeline.core.metrics import catalog
from pipeline.report import blocks, plots, report, results, terminal
from pipeline.report import matrix as entries_module
from pipeline.report.results import ResultRow
from pipeline.report.source_summary import SourceSummary
from pipeline.report.stats import RunPredictions
from pipeline.report.trial_record import CurvePoint

# skill of each (source, technique) by target: what the simulated trials are good for
SKILL = {
    "clothing": {
        ("none", "scratch"): 0.72,
        ("garments", "full"): 0.83,
        ("garments", "lp_ft"): 0.84,
        ("garments", "linear_probe"): 0.76,
        ("digits", "full"): 0.725,
    },
    "handwriting": {
        ("none", "scratch"): 0.90,
        ("garments", "full"): 0.905,
        ("garments", "lp_ft"): 0.91,
        ("garments", "linear_probe"): 0.78,
        ("digits", "full"): 0.95,
    },
}


def trial(target, source, technique, fraction, seed, skill, n=400):
    """(results rows, Run, curve) of one simulated finished trial."""
    rng = np.random.default_rng([seed, len(technique), len(source), len(target), len(fraction)])
    easy = np.random.default_rng(len(target)).normal(
        size=n
    )  # shared by all trials: some test rows are easier
    level = (
        skill
        - (0.15 if fraction != "1.0" else 0.0) * (2 if source == "none" else 1)
        + rng.normal(0, 0.004)
    )
    right = easy + rng.normal(0, 0.6, n) < np.quantile(easy, min(level, 0.99))
    label = np.arange(n) % 2
    scores = np.where((label[:, None] == [0, 1]) == right[:, None], 3.0, 0.0).astype(np.float32)
    predictions = {
        "scores": scores,
        "label": label,
        "loss": np.where(right, 0.05, 3.05) + rng.random(n) * 0.01,
        "count": np.ones(n),
    }
    trial_id = f"{target[:2]}-{source[:2]}-{technique}-{fraction.replace('/', '')}-{seed}"
    common = {
        "job": "vision",
        "source": source,
        "backbone": "timm/resnet18",
        "target": target,
        "objective": "classification",
        "technique": technique,
        "hyper_parameters": json.dumps({"lr": 0.001 if technique == "full" else 0.01}),
        "seed": seed,
        "label_fraction": fraction,
        "trial_id": trial_id,
        "trial_stage": "final",
        "status": "done",
        "split": "test",
        "n_train": 12000 if fraction == "1.0" else 600,
        "n_eval": n,
        "n_units": n,
        "params_trained": 5130 if technique == "linear_probe" else 11_181_642,
        "steps": 300,
        "seconds": 4.2 if technique == "linear_probe" else 41.0 + seed,
        "device": "cpu",
        "spec_hash": "0f3c9a12be77",
        "git_sha": "ab12cd3",
        "started_at": datetime(2025, 6, 1, 9, tzinfo=UTC) + timedelta(minutes=seed),
    }
    rows = [
        ResultRow.from_columns(
            {
                **common,
                "metric": name,
                "value": catalog.metric(name).value(predictions),
                "higher_is_better": catalog.metric(name).higher_is_better,
            }
        )
        for name in ("accuracy", "loss")
    ]
    curve = [
        CurvePoint(s, {"accuracy": level * (1 - np.exp(-s / (60 if source != "none" else 120)))})
        for s in range(30, 301, 30)
    ]
    return rows, RunPredictions(np.arange(n), predictions, seed), curve


def failure(target, error, trial_id="fa-1", **more):
    return ResultRow.from_columns(
        {
            "job": "vision",
            "source": "garments",
            "backbone": "timm/resnet18",
            "target": target,
            "technique": "lora",
            "hyper_parameters": "{}",
            "seed": 1,
            "label_fraction": "1.0",
            "trial_id": trial_id,
            "trial_stage": "final",
            "status": "failed",
            "error": error,
            **more,
        }
    )


def simulate(skill=SKILL, fractions=("0.05", "1.0"), seeds=3):
    rows, runs, curves = [], {}, {}
    for target, by_method in skill.items():
        for (source, technique), level in by_method.items():
            for fraction in fractions:
                for seed in range(seeds):
                    new, run, curve = trial(target, source, technique, fraction, seed, level)
                    rows += new
                    runs[new[0].trial_id], curves[new[0].trial_id] = run, curve
    return rows, runs, curves


PRETRAINING = [
    SourceSummary(
        source="garments",
        backbone="timm/resnet18",
        objective="classification",
        steps=2000,
        rows=512_000,
        seconds=803.0,
        rows_per_second=638.0,
        metrics={"accuracy": 0.912},
        transfer="kept 120 tensors\nnew 2: head.weight, head.bias\ndropped 2: fc.weight, fc.bias",
        bundle="runs/vision/sources/garments",
        splits="the publisher's train file, 10 % of it held out by hash as validation",
    )
]
TRACEBACK = (
    'Traceback (most recent call last):\n  File "train/loop.py", line 12, in fit\nValueError: '
    "label 'coat' is not in the state <classes>"
)


def write(root, rows, runs, curves, **more):
    given = {
        "pretraining": PRETRAINING,
        "splits": dict.fromkeys(SKILL, "the publisher's own train and test files"),
        "notes": ["2 rows of clothing also stand in garments."],
        "versions": {"torch": "2.11.0", "job spec hash": "0f3c9a12be77"},
        **more,
    }
    entries = report.matrix_entries(rows, runs)
    given |= {"job_name": "vision", "entries": entries, "curves": curves}
    return entries, *report_texts(root, rows, runs, **given)


def example(root):
    """A realistic job: wins, losses, ties, a failure and a duplicate."""
    rows, runs, curves = simulate()
    rows += [
        failure("clothing", TRACEBACK, "cl-lora-1"),
        failure("clothing", TRACEBACK, "cl-lora-2", seed=2),
        failure("handwriting", "RuntimeError: out of memory", "ha-lora-1"),
    ]
    twins = [r for r in rows if r.trial_id == "cl-di-full-1.0-0" and r.metric == "loss"]
    rows += [
        replace(
            r, trial_id="cl-di-full-search", trial_stage="search", hyper_parameters='{"lr": 0.1}'
        )
        for r in twins
    ]
    return write(root, rows, runs, curves)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return example(tmp_path_factory.mktemp("report"))


class Page(HTMLParser):
    """Checks that tags nest, and collects attributes and text."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


# ---------------------------------------------------------------- entries


def find(entries, target="clothing", source="garments", technique="full", fraction="1.0"):
    (entry,) = (
        c
        for c in entries
        if (c.target, c.source, c.technique, c.label_fraction)
        == (target, source, technique, fraction)
    )
    return entry


def test_entries_hold_the_mean_over_seeds_and_the_paired_gain(written):
    entries = written[0]
    rows, _, _ = simulate()

    def mean(source, technique):
        return np.mean(
            [
                r.value
                for r in rows
                if (r.target, r.source, r.technique, r.label_fraction, r.metric)
                == ("clothing", source, technique, "1.0", "accuracy")
            ]
        )

    entry = find(entries)
    assert entry.metric == "accuracy"
    assert entry.n_seeds == 3
    assert entry.n_failed == 0
    assert entry.n_test == 400
    assert entry.n_train == 12000
    assert entry.mean == pytest.approx(mean("garments", "full"))
    assert entry.low < entry.mean < entry.high
    assert entry.gain == pytest.approx(mean("garments", "full") - mean("none", "scratch"))
    assert entry.gain_low < entry.gain < entry.gain_high
    assert entry.seconds == pytest.approx(42)
    assert entry.params_trained == 11_181_642
    assert json.loads(entry.hyper_parameters) == {"lr": 0.001}
    assert (
        entry.interval
        == "mean: 95 % over test units and 3 seeds; gain: 95 % over test units and 3 paired seeds"
    )
    assert entry.paired_seeds == 3
    scratch = find(entries, source="none", technique="scratch")
    assert scratch.gain is scratch.gain_low is None
    assert scratch.verdict == "reference"
    assert scratch.mean is not None


def test_verdicts_follow_the_interval(written):
    entries = written[0]
    assert find(entries).verdict == "wins"
    assert find(entries, "handwriting", technique="linear_probe").verdict == "loses"
    assert find(entries, source="digits").verdict == "not shown"
    for entry in entries:
        if entry.gain_low is not None:
            assert (entry.verdict == "wins") == (entry.gain_low > 0)
            assert (entry.verdict == "loses") == (entry.gain_high < 0)


def test_entries_are_sorted_by_target_fraction_and_value(written):
    entries = written[0]
    assert [c.target for c in entries] == sorted(c.target for c in entries)
    for target in SKILL:
        group = [c for c in entries if c.target == target]
        assert [c.label_fraction for c in group] == sorted(
            (c.label_fraction for c in group), key=float
        )
        means = [c.mean for c in group if c.label_fraction == "0.05" and c.mean is not None]
        assert len(means) > 3 and means == sorted(means, reverse=True)
    assert sorted(["1.0", "0.05", "5/class", "10/class"], key=entries_module.fraction_order) == [
        "5/class",
        "10/class",
        "0.05",
        "1.0",
    ]
    assert [plots.fraction_label(f) for f in ("0 rows", "1 rows", "2 rows", "0.05")] == [
        "none",
        "1 row",
        "2 rows",
        "5 %",
    ]
    assert [plots.labels_text(f) for f in ("0/class", "0 rows", "0.05", "25/class", "5 rows")] == [
        "no labels",
        "no labels",
        "5 % labels",
        "25 labels a class",
        "5 labelled rows",
    ]
    assert sorted(["0.5", "10 rows", "2 rows"], key=entries_module.fraction_order) == [
        "2 rows",
        "10 rows",
        "0.5",
    ]


def test_scratch_is_matched_on_backbone_target_and_fraction():
    rows, runs, _ = simulate({"clothing": SKILL["clothing"]})
    other = [
        replace(r, backbone="timm/vit", trial_id=r.trial_id + "v")
        for r in rows
        if r.source != "none"
    ]
    rows = [r for r in rows if not (r.source == "none" and r.label_fraction == "0.05")] + other
    for entry in report.matrix_entries(
        rows, runs | {r.trial_id: runs[r.trial_id[:-1]] for r in other}
    ):
        compared = entry.backbone == "timm/resnet18" and entry.label_fraction == "1.0"
        assert entry.verdict in (
            {"reference", "wins", "loses", "not shown"} if compared else {"not compared"}
        )


def test_missing_predictions_fall_back_to_the_seeds_and_say_so():
    rows, runs, _ = simulate({"clothing": SKILL["clothing"]}, fractions=("1.0",))
    whole = find(report.matrix_entries(rows, runs))
    entry = find(
        report.matrix_entries(rows, {k: v for k, v in runs.items() if not k.endswith("full-1.0-1")})
    )
    assert "Student's t over seeds" in entry.interval
    assert whole.verdict == "wins"
    assert entry.verdict == "not compared", "seeds alone do not tell"
    assert entry.mean == pytest.approx(whole.mean)
    assert entry.gain == pytest.approx(whole.gain)
    assert entry.gain_low < entry.gain < entry.gain_high
    (one,) = (
        c
        for c in report.matrix_entries([r for r in rows if r.seed == 0], {})
        if c.technique == "lp_ft"
    )
    assert one.gain is not None
    assert one.gain_low is None
    assert one.verdict == "not compared"
    assert "one seed" in one.interval
    unpaired = {
        k: replace(v, rows=v.rows + 1000) if "-scratch-" in k else v for k, v in runs.items()
    }
    assert "no test row in common" in find(report.matrix_entries(rows, unpaired)).interval


def test_lower_is_better_turns_the_gain():
    rows, runs, _ = simulate({"clothing": SKILL["clothing"]}, fractions=("1.0",))
    entry = find(report.matrix_entries([r for r in rows if r.metric == "loss"], runs))
    assert entry.metric == "loss"
    assert not entry.higher_is_better
    assert entry.verdict == "wins"
    assert entry.gain > 0
    assert find(
        report.matrix_entries([r for r in rows if r.metric == "loss"], {})
    ).gain == pytest.approx(entry.gain)


def test_failures_are_counted_also_when_the_search_never_finished():
    rows, runs, _ = simulate({"clothing": SKILL["clothing"]}, fractions=("1.0",))
    lost = [
        r.trial_id for r in rows if r.technique == "full" and r.source == "garments" and r.seed == 2
    ]
    rows = [r for r in rows if r.trial_id not in lost] + [
        failure("clothing", "boom", lost[0], technique="full", seed=2)
    ]
    rows += [failure("clothing", "boom", f"s{i}", trial_stage="search") for i in range(4)]
    rows += [
        failure("clothing", "slow", "p", technique="gradual", trial_stage="search", status="pruned")
    ]
    entries = report.matrix_entries(rows, runs)
    assert (find(entries).n_seeds, find(entries).n_failed, find(entries).paired_seeds) == (2, 1, 2)
    lora = find(entries, technique="lora")
    assert (lora.n_seeds, lora.n_failed, lora.verdict, lora.mean) == (0, 4, "failed", None)
    assert not [c for c in entries if c.technique == "gradual"]


def test_groups_of_the_runs_are_used():
    rows, runs, _ = simulate({"clothing": SKILL["clothing"]}, fractions=("1.0",))
    grouped = {k: replace(v, groups=v.rows // 20) for k, v in runs.items()}
    assert (
        find(report.matrix_entries(rows, grouped)).interval
        == "mean: 95 % over test groups and 3 seeds; gain: 95 % over test groups and 3 paired seeds"
    )


# ---------------------------------------------------------------- what a verdict needs


def kept(rows, runs, keep):
    """Rows and runs of the trials that ``keep`` says of a row."""
    rows = [row for row in rows if keep(row)]
    ids = {row.trial_id for row in rows}
    return rows, {name: run for name, run in runs.items() if name in ids}


def test_below_two_paired_seeds_nothing_is_won_or_lost():
    """Of three seeds against one of scratch one is paired; likewise where the other seeds
    failed.
    """
    rows, runs, _ = simulate({"clothing": SKILL["clothing"]}, fractions=("1.0",))
    for seeds, of in ((3, "none"), (1, "garments")):
        entry = find(
            report.matrix_entries(
                *kept(rows, runs, lambda row, of=of: row.source != of or row.seed == 0)
            )
        )
        assert (entry.n_seeds, entry.paired_seeds, entry.verdict, entry.gain_p_holm) == (
            seeds,
            1,
            "one seed",
            None,
        )
        assert entry.gain is not None
        assert "gain: 95 % over test units of one seed, whose spread is unknown" in entry.interval
    two = find(
        report.matrix_entries(*kept(rows, runs, lambda row: row.source != "none" or row.seed < 2))
    )
    assert (two.n_seeds, two.paired_seeds) == (3, 2)
    assert two.verdict in entries_module.COMPARED
    assert "and 2 paired seeds" in two.interval


def test_the_number_of_paired_seeds_stands_in_table_and_report(tmp_path):
    rows, runs, curves = simulate({"clothing": SKILL["clothing"]}, fractions=("1.0",))
    rows, runs = kept(rows, runs, lambda row: row.source != "none" or row.seed == 0)
    entries, md, _ = write(tmp_path, rows, runs, curves)
    lines = render(entries).splitlines()
    assert any("garments" in line and "one seed" in line and " 1 of 3 " in line for line in lines)
    assert "One seed (a verdict needs 2): " in md and md.startswith(
        "# vision: no verdict: one seed cannot tell a gain from luck, 2 are needed"
    )
    (row,) = (line for line in md.splitlines() if line.startswith("| garments · full | 0."))
    assert row.endswith("<br>one seed | 1 of 3 |")


def test_comparisons_are_corrected_for_their_number(written):
    from pipeline.report import stats

    entries = [entry for entry in written[0] if entry.verdict in entries_module.COMPARED]
    assert [entry.gain_p_holm for entry in entries] == pytest.approx(
        stats.holm([entry.over_scratch.p_value for entry in entries])
    )
    assert all(
        (entry.over_scratch.p_value < 0.05) == (entry.verdict != "not shown") for entry in entries
    )
    stands = [entry for entry in entries if entry.survives]
    text = render(written[0])
    assert 0 < len(stands) < sum(entry.verdict != "not shown" for entry in entries)
    assert len(re.findall(r"(wins|loses) \*  ", text)) == len(stands)
    assert written[1].count("Holm's correction for all 16 comparisons of the job") == 1
    plain = sum(entry.verdict != "not shown" for entry in entries) - len(stands)
    assert f"**{plain}** by the plain interval alone" in written[1]
    assert {entry.gain_p_holm for entry in written[0] if entry.verdict == "reference"} == {None}


def test_too_few_units_outside_of_the_most_frequent_class_are_too_few_to_tell(tmp_path):
    """59 test rows with 3 of one class, on which every trial of a source is right and scratch is
    wrong.
    """
    rows, runs, curves = simulate(
        {"clothing": {("none", "scratch"): 0.3, ("garments", "full"): 0.95}}, fractions=("1.0",)
    )

    def few(run):
        label = (np.arange(400) < 3).astype(np.int64)
        right = run.predictions["scores"].argmax(1) == run.predictions["label"]
        scores = np.where((label[:, None] == [0, 1]) == right[:, None], 3.0, 0.0)
        return replace(run, predictions={**run.predictions, "label": label, "scores": scores})

    entries, md, _ = write(tmp_path, rows, {name: few(run) for name, run in runs.items()}, curves)
    entry = find(entries)
    evidence = "3 test rows outside of the most frequent class, a verdict needs 10"
    assert entry.verdict == "too few to tell"
    assert entry.gain_low > 0
    assert entry.over_scratch.evidence == evidence
    assert entry.gain_p_holm is None and evidence in md and "too few to tell" in render(entries)
    assert md.startswith("# vision: no verdict: there are too few test rows")
    assert find(report.matrix_entries(rows, runs)).verdict == "wins"


def test_the_title_says_why_no_comparison_has_a_verdict(tmp_path):
    skill = {"clothing": {("none", "scratch"): 0.3, ("garments", "full"): 0.95}}
    rows, runs, curves = simulate(skill, fractions=("1.0",))
    _, without_predictions, _ = write(tmp_path, rows, {}, curves)
    assert without_predictions.startswith("# vision: no verdict: test predictions are missing")
    entries = report.matrix_entries(rows, runs)
    noisy = [replace(one, verdict="search noise") for one in entries if one.source != "none"]
    text, _ = report_texts(tmp_path, rows, runs, entries=noisy)
    assert "no verdict: it is not known how much the search itself varies" in text


# ---------------------------------------------------------------- words


def test_no_difference_is_never_claimed(written):
    for text in (*written[1:], render(written[0])):
        assert (
            "no difference"
            not in text.replace("does not say that there is no difference", "").lower()
        )
        assert "not shown" in text


def test_scratch_has_one_name_for_its_source(written):
    _, md, html = written
    assert "none · scratch" in md and "none · scratch" in html
    assert any(
        line.startswith(" none ") and "scratch" in line for line in render(written[0]).splitlines()
    )
    assert "| scratch |" not in md


def test_a_random_probe_is_held_against_the_linear_probe_of_the_best_source(tmp_path):
    skill = {
        "clothing": {
            ("none", "scratch"): 0.72,
            ("none", "random_probe"): 0.5,
            ("garments", "linear_probe"): 0.8,
            ("digits", "linear_probe"): 0.7,
        }
    }
    rows, runs, curves = simulate(skill, fractions=("1.0",))
    rows += [replace(row, split="validation") for row in rows if row.metric == "accuracy"]
    entries, md, _ = write(tmp_path, rows, runs, curves)
    entry = find(entries, source="none", technique="random_probe")
    best = find(entries, technique="linear_probe")
    assert (entry.against, entry.verdict, entry.paired_seeds) == (
        "linear_probe of garments",
        "loses",
        3,
    )
    assert entry.gain == pytest.approx(entry.mean - best.mean) and not entry.transfers
    assert "against linear_probe of garments<br>" in md
    assert "of 2 comparisons" in md, "not a comparison with scratch"
    assert "linear_probe of" in render(entries)
    alone = find(
        report.matrix_entries(*kept(rows, runs, lambda row: row.technique != "linear_probe")),
        source="none",
        technique="random_probe",
    )
    assert (alone.verdict, alone.gain) == ("not compared", None)


def backbones(tmp_path=None):
    """A weak and a strong backbone, each with scratch and one source."""
    rows, runs, curves = simulate(
        {"clothing": {("none", "scratch"): 0.6, ("garments", "full"): 0.8}}, fractions=("1.0",)
    )
    more, more_runs, more_curves = simulate(
        {"clothing": {("none", "scratch"): 0.78, ("digits", "full"): 0.82}}, fractions=("1.0",)
    )
    more = [
        replace(row, backbone="timm/vit", trial_id=f"v{row.trial_id}", seconds=900.0)
        for row in more
    ]
    rows, runs = [*rows, *more], runs | {f"v{name}": run for name, run in more_runs.items()}
    rows += [replace(row, split="validation") for row in rows if row.metric == "accuracy"]
    return rows, runs, curves | {f"v{name}": curve for name, curve in more_curves.items()}


def test_gains_over_different_scratch_networks_say_so_and_stand_beside_the_gain_over_the_best(
    tmp_path,
):
    entries, md, _ = write(tmp_path, *backbones())
    weak, strong = find(entries), find(entries, source="digits")
    best = next(
        entry for entry in entries if entry.source == "none" and entry.backbone == "timm/vit"
    )
    assert weak.best_scratch == strong.best_scratch == "timm/vit"
    assert weak.over_best_scratch.value == pytest.approx(weak.mean - best.mean)
    assert weak.over_best_scratch.low < weak.over_best_scratch.value < weak.over_best_scratch.high
    assert weak.gain > weak.over_best_scratch.value
    assert strong.over_best_scratch.value == strong.gain
    assert "measured against 2 different scratch networks" in md
    assert "best scratch network by validation (100 % labels: timm/vit)" in md
    assert f"{weak.over_best_scratch.value:+.3f}<br>[" in md
    assert any(
        "best scratch" in line and f"{weak.over_best_scratch.value:+.3f}" in line
        for line in render(entries).splitlines()
    )
    rows, runs, _ = backbones()
    turned = [replace(row, value=-row.value) if row.split == "validation" else row for row in rows]
    assert {
        entry.best_scratch
        for entry in report.matrix_entries(turned, runs)
        if entry.source != "none"
    } == {"timm/resnet18"}, "validation rows decide, not test rows"
    assert (
        "different scratch networks"
        not in write(tmp_path / "one", *simulate({"clothing": SKILL["clothing"]}))[1]
    )


def test_costs_are_not_pooled_over_backbones(tmp_path):
    _, md, _ = write(tmp_path, *backbones())
    cost = md[md.index("## Cost") :].split("\n\n**Training time of every")
    assert "none · scratch (timm/resnet18) | 42 s" in cost[1]
    assert "none · scratch (timm/vit) | 15.0 min" in cost[1]


def test_scores_of_sources_that_were_left_out_stay(tmp_path):
    rows, runs, curves = simulate({"clothing": SKILL["clothing"]}, fractions=("1.0",))
    scores = {
        "garments|clothing": {"score_name": "logme", "score_value": 0.5},
        "letters|clothing": {"score_name": "logme", "score_value": 0.1},
    }
    _, md, _ = write(tmp_path, rows, runs, curves, scores=scores)
    assert "| clothing | garments | LogME | fine-tuned | 0.5 |" in md
    assert "| clothing | letters | LogME | left out | 0.1 |" in md


# ---------------------------------------------------------------- terminal


def render(entries, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(terminal.table(entries))
    return console.file.getvalue()


def test_scratch_is_told_apart_where_a_target_has_several_backbones(written):
    entries = [c for c in written[0] if c.target == "clothing"]
    one = entries + [replace(c, backbone="timm/vgg11") for c in entries if c.source == "none"]
    assert any(" none vgg11" in line for line in render(one).splitlines())
    assert "vgg11" not in render(entries)


def test_table_is_readable_in_100_columns_without_colour(written):
    text = render(written[0])
    assert max(len(line) for line in text.splitlines()) <= 100 and "…" not in text
    for target in SKILL:
        assert len(re.findall(rf"^{target}\b", text, re.MULTILINE)) == 1
    wins = [line for line in text.splitlines() if re.search(r" wins( \*)?  ", line)]
    losses = [line for line in text.splitlines() if re.search(r" loses( \*)?  ", line)]
    assert len(wins) == sum(c.verdict == "wins" for c in written[0])
    assert len(losses) == sum(c.verdict == "loses" for c in written[0]) > 0
    entry = find(written[0])
    (line,) = (line for line in wins if f"{entry.gain:+.3f}" in line)
    assert "garments" in line
    assert "full" in line
    assert f"[{entry.gain_low:+.3f}, {entry.gain_high:+.3f}]" in line
    assert f"{entry.mean:.3f} [{entry.low:.3f}, {entry.high:.3f}]" in line
    assert "42 s" in line
    assert text.count("100 % labels") == text.count("5 % labels") == len(SKILL)
    words = {word for word, _, _ in report.WORDS}
    for name in terminal.COLUMNS:
        assert name.removesuffix(" [95 %]").capitalize() in {*words, "Gain"}, name


def test_rows_stand_by_value_the_best_first(written):
    entries, md, _ = written
    text = render(entries)
    for target in SKILL:
        part = text[text.index(f"\n{target}") :]
        for fraction in ("0.05", "1.0"):
            best_first = sorted(
                (c for c in entries if (c.target, c.label_fraction) == (target, fraction)),
                key=lambda c: -(c.mean or -1.0),
            )
            shown = [f"{c.mean:.3f} [{c.low:.3f}" for c in best_first if c.mean is not None]
            places = [part.index(one) for one in shown]
            assert places == sorted(places)
            rows = [f"| {c.mean:.3f}<br>[{c.low:.3f}" for c in best_first if c.mean is not None]
            places = [md.index(one) for one in rows]
            assert places == sorted(places)
    lower = [replace(c, higher_is_better=False) for c in entries]
    worst_first = sorted(entries, key=entries_module.by_value)
    assert sorted(lower, key=entries_module.by_value)[0].mean == min(
        c.mean for c in worst_first if c.mean is not None
    )


def test_table_takes_names_as_they_are(written):
    assert "[bold]x[/bold]" in render(
        [replace(written[0][0], source="[bold]x[/bold]", target="[red]t")], 140
    )
    assert "gain over scratch" in render([])


# ---------------------------------------------------------------- written


def test_html_is_self_contained_and_well_formed(written):
    html = written[2]
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link", html)
    parsed = Page(html)
    for tag, name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (tag, name, value)
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", html) + [
        value[1:] for _, name, value in parsed.attributes if name == "href"
    ]
    assert used and set(used) <= set(ids)
    assert (
        parsed.tags.count("svg") == 8 and "#0101" not in html and "#0102" not in html
    )  # forest, learning, labels and cost for each of two targets
    assert "prefers-color-scheme:dark" in html and 'name="viewport"' in html
    assert set(re.findall(r"var\((--\w+)\)", html)) <= set(re.findall(r"(--\w+):", html))


def test_every_number_appears_and_losses_are_not_hidden(written):
    entries, md, html = written
    for text in (md, html):
        for entry in entries:
            if entry.mean is None:
                continue
            shown = [f"{entry.mean:.3f}", f"[{entry.low:.3f}, {entry.high:.3f}]"]
            if entry.gain is not None:
                shown += [
                    f"{entry.gain:+.3f}",
                    f"[{entry.gain_low:+.3f}, {entry.gain_high:+.3f}]",
                    f"{blocks.MARKS[entry.verdict]} {entry.verdict}{' *' if entry.survives else ''}",
                ]
            if text is md:
                row = "<br>".join(shown[2:]).replace("*", r"\*")
                assert f"| {'<br>'.join(shown[:2])} | {row or '–'} |" in text
                continue
            for number in shown:
                assert blocks.with_minus_sign(number) in text.replace("\u00a0", " "), number
    wins, losses = (sum(c.verdict == v for c in entries) for v in ("wins", "loses"))
    assert wins and losses
    kept, kept_losses = (
        sum(c.verdict == v and c.gain_p_holm < 0.05 for c in entries) for v in ("wins", "loses")
    )
    assert 0 < kept < wins and kept_losses, "some wins do not survive the correction"
    assert f"Transfer paid in {kept} of 16 comparisons, and lost in {kept_losses}" in html
    assert f"transfer paid in {kept} of 16 comparisons, and lost in {kept_losses}" in md
    assert f"{kept} of {wins} wins and {kept_losses} of {losses} loss" in md


def test_the_report_says_where_everything_comes_from(written):
    for text in written[1:]:
        for needle in (
            "0f3c9a12be77",
            "2.11.0",
            "ab12cd3",
            "the publisher's own train and test files",
            "11,181,642",
            "2 rows of clothing also stand in garments.",
            "512,000",
            "dropped 2: fc.weight",
            "cl-lora-2",
            "out of memory",
            "identical in 2 trials that differ in hyper parameters",
            "2025-06-01",
            "Efron and Tibshirani",
            "of 16 comparisons without any true difference, about 0.8",
            "lr 0.001",
        ):
            assert needle in text.replace("&#x27;", "'"), needle


def test_markdown_tables_are_well_formed(written):
    check_markdown(written[1])


def unfenced(text):
    return re.sub(r"(?ms)^(`{3,})\n.*?^\1$", "", text)


def check_markdown(text):
    tables = [b for b in unfenced(text).split("\n\n") if b.startswith("|")]
    assert tables
    for block in tables:
        lines = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
        assert len({len(line) for line in lines}) == 1, block
        assert all(re.fullmatch(r" (:--|--:) ", part) for part in lines[1])


EVIL = '<b>|"x"&`$y$*'


def test_names_and_errors_are_escaped_everywhere(tmp_path):
    skill = {EVIL: {("none", "scratch"): 0.7, (EVIL, EVIL): 0.8}}
    rows, runs, curves = simulate(skill)
    rows += [failure(EVIL, "<script>alert(1)</script>\n```\nend")]
    pretraining = [
        replace(PRETRAINING[0], source=EVIL, transfer=EVIL, splits=EVIL, metrics={EVIL: 1.0})
    ]
    _, md, html = write(
        tmp_path,
        rows,
        runs,
        curves,
        pretraining=pretraining,
        splits={EVIL: EVIL, "<i>other": EVIL},
        notes=[EVIL],
        versions={EVIL: EVIL},
    )
    parsed = Page(html)
    assert not {"b", "i", "script", "x"} & (set(parsed.tags) - {"b"})
    assert html.count("<b>") == html.count("</b>")
    assert "<b>|" not in html and "<script>" not in html and EVIL in "".join(parsed.text)
    assert (
        '<svg role="img" aria-label="Gain over scratch with 95 % intervals: &lt;b&gt;|&quot;x&quot;'
        in html
    )
    check_markdown(md)
    assert not re.search(r"<(?!br>)", unfenced(md))
    assert "````\n<script>alert(1)</script>\n```\nend\n````" in md


def test_a_job_whose_trials_all_failed_still_reports(tmp_path):
    rows = [failure("clothing", TRACEBACK, f"t{i}", seed=i) for i in range(3)]
    entries, md, html = write(tmp_path, rows, {}, {}, pretraining=[])
    assert [c.verdict for c in entries] == ["failed"]
    for text in (md, html):
        assert "o trial finished" in text
        assert "3 trials failed" in text
        assert "t0" in text
        assert "is not in the state" in text
    Page(html)
    check_markdown(md)
    assert "failed" in render(entries)


def test_signatures_and_passwords_of_addresses_are_left_out(tmp_path):
    signed = "https://me:p4ss@host/a.csv?Signature=sec-ret/x-y"
    rows = [failure("clothing", f"ValueError: {signed}", "t0")]
    splits, notes = {"clothing": f"{signed} files"}, [f"left out: {signed} row 3"]
    _, *texts = write(tmp_path, rows, {}, {}, pretraining=[], splits=splits, notes=notes)
    for text in texts:
        assert "host" in text
        assert not any(part in text for part in ("p4ss", "Signature", "sec-ret", "x-y"))


def test_nothing_at_all_still_reports(tmp_path):
    _, md, html = write(tmp_path, [], {}, {}, pretraining=[], splits={}, notes=[], versions={})
    Page(html)
    assert "nothing to compare with scratch yet" in md
    assert "Nothing to compare with scratch yet" in html


def test_sparse_input_is_taken(tmp_path):
    """One fraction, no curves, no n_train, a source that was only loaded."""
    rows, runs, _ = simulate({"clothing": SKILL["clothing"]}, fractions=("5/class",), seeds=1)
    rows = [
        replace(r, n_train=None, seconds=None, params_trained=None, started_at=None, device=None)
        for r in rows
    ]
    results.append(str(tmp_path), rows)
    entries, _, html = write(
        tmp_path, results.read(str(tmp_path)), runs, {}, pretraining=[SourceSummary("loaded")]
    )
    assert Page(html).tags.count("svg") == 1 and "5/class" in html
    assert all("one seed" in entry.interval for entry in entries)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    rows, runs, curves = simulate({"clothing": SKILL["clothing"]}, seeds=2)
    first, second = (write(tmp_path / name, rows, runs, curves)[1:] for name in ("a", "b"))
    assert first == second


def test_decimals_follow_the_interval():
    assert blocks.decimal_places([(0.81, 0.83), (0.5, 0.6), (0.7, 0.72)]) == 3
    assert blocks.decimal_places([(20.0, 21.0)]) == 2
    assert blocks.decimal_places([(1000.0, 1400.0)]) == 0
    assert blocks.decimal_places([(0.5, 0.5), (None, None)]) == 3


def test_curves_are_means_over_seeds():
    rows, _, curves = simulate({"clothing": {("garments", "full"): 0.8}}, fractions=("1.0",))
    panels = report.learning_curves("clothing", "accuracy", rows, curves)
    points = dict(panels["1.0"]["garments", "full"])
    assert points[30] == pytest.approx(np.mean([c[0].metrics["accuracy"] for c in curves.values()]))
    assert report.learning_curves("clothing", "auroc", rows, curves) == {}
    solved = {name: curve[-1:] for name, curve in curves.items()}
    assert report.learning_curves("clothing", "accuracy", rows, solved) == {}, "of one point each"


def test_a_curve_is_of_all_seeds_at_each_step():
    """Also where they were validated at other steps, or one of them stopped early."""
    rows, _, _ = simulate({"clothing": {("garments", "full"): 0.8}}, ("1.0",), seeds=2)
    ids = list(dict.fromkeys(row.trial_id for row in rows))
    values = [{10: 0.2, 20: 0.4, 40: 0.8}, {20: 0.6, 30: 0.8}]
    curves = {
        trial_id: [CurvePoint(step, {"accuracy": value}) for step, value in of_seed.items()]
        for trial_id, of_seed in zip(ids, values, strict=True)
    }
    panels = report.learning_curves("clothing", "accuracy", rows, curves)
    points = panels["1.0"]["garments", "full"]
    assert points == [(20, pytest.approx(0.5)), (30, pytest.approx(0.7))]


def test_scratch_networks_of_two_backbones_are_two_lines():
    rows, runs, curves = backbones()
    panels = report.learning_curves("clothing", "accuracy", rows, curves)
    scratch = {
        technique: points
        for (source, technique), points in panels["1.0"].items()
        if source == "none"
    }
    of_backbone = {row.trial_id: row.backbone for row in rows if row.source == "none"}
    for name in ("timm/resnet18", "timm/vit"):
        of_seeds = [curves[one] for one, backbone in of_backbone.items() if backbone == name]
        last = np.mean([curve[-1].metrics["accuracy"] for curve in of_seeds])
        assert scratch[f"scratch ({name})"][-1] == (300, pytest.approx(last))
    svg = plots.label_efficiency(report.matrix_entries(rows, runs))
    assert all(f">scratch ({name})<" in svg for name in ("timm/resnet18", "timm/vit"))
    alone = [row for row in rows if row.backbone == "timm/vit"]
    panels = report.learning_curves("clothing", "accuracy", alone, curves)
    assert ("none", "scratch") in panels["1.0"]


def test_plots_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    svg = plots.learning(
        {
            "1.0": {
                ("garments", "full"): [(1.0, 0.5), (2.0, 0.6)],
                ("none", "scratch"): [(1.0, 0.4)],
            }
        },
        "accuracy",
    )
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert {k: v for k, v in matplotlib.rcParams.items() if k != "backend"} == {
        k: v for k, v in before.items() if k != "backend"
    }


# ---------------------------------------------------------------- words, costs, what is missing


LESS_USED = (
    "Verdict",
    "Score",
    "Gain over best scratch",
    "Gain over best baseline",
    "Failed, stopped, cut",
)
"""Words of parts of a report that this one has not."""


def test_words_of_the_report_name_columns_of_the_results_table(written):
    named = {name for _, columns, _ in report.WORDS for name in columns.split(", ") if name}
    assert named <= set(results.COLUMNS) and len(named) > 15
    md = written[1]
    for word, _, _ in report.WORDS:
        assert word in LESS_USED or md.lower().count(word.lower()) > 1, word


def test_the_cost_of_a_source_is_counted_once_for_all_targets(written):
    md = written[1]
    table = md[md.index("| Source, backbone |") :].split("\n\n")[0]
    (row,) = (line for line in table.splitlines() if line.startswith("| garments<br>"))
    rows = [r for r in simulate()[0] if r.source == "garments" and r.metric == "accuracy"]
    seconds = sum(r.seconds for r in rows)
    assert row == (
        f"| garments<br>timm/resnet18 | 11,181,642 | 13.4 min | 2 | {len(rows) + 3} | "
        f"{blocks.format_seconds(seconds)} | {blocks.format_seconds(seconds / len(rows))} | 42 s |"
    )
    assert "| none<br>timm/resnet18 | 11,181,642 | – | 2 |" in table


def test_the_scratch_beside_a_source_is_that_of_its_targets(tmp_path):
    """digits serves clothing alone, whose scratch takes 40 s; that of handwriting takes 400 s."""
    skill = {"clothing": SKILL["clothing"], "handwriting": {("none", "scratch"): 0.9}}
    rows, runs, _ = simulate(skill, fractions=("1.0",), seeds=1)
    slow = {("clothing", "none"): 40.0, ("handwriting", "none"): 400.0}
    rows = [replace(r, seconds=slow.get((r.target, r.source), r.seconds)) for r in rows]
    _, md, _ = write(tmp_path, rows, runs, {})
    table = md[md.index("| Source, backbone |") :].split("\n\n")[0]
    (row,) = (line for line in table.splitlines() if line.startswith("| digits<br>"))
    assert row.endswith("| 40 s |")


def test_what_is_missing_stands_in_one_place(tmp_path):
    rows, runs, curves = simulate({"clothing": SKILL["clothing"]}, fractions=("1.0",))
    rows, runs = kept(
        rows, runs, lambda row: (row.source, row.seed) != ("digits", 1) and row.seed < 2
    )
    rows += [
        failure("clothing", "RuntimeError: out of memory", "cl-lora-1"),
        failure("clothing", "", "p", technique="lp_ft", trial_stage="search", status="pruned"),
        failure(
            "clothing",
            "cut by the budget: rank 3 of 3",
            "c",
            technique="bitfit",
            trial_stage="search",
            status="pruned",
            split="validation",
            metric="accuracy",
            value=0.5,
        ),
    ]
    scores = {
        name: {"score_name": "logme", "score_value": 0.1}
        for name in ("garments|clothing", "letters|clothing")
    }
    _, md, _ = write(
        tmp_path, rows, runs, curves, scores=scores, left_out=["targets.shoes: no rows"]
    )
    part = md[md.index("## What failed, was left out or is unknown") : md.index("## Cost")]
    for words in (
        "targets.shoes: no rows",
        "sources not fine-tuned, because of their LogME: letters.",
        "1 search trial stopped early (fanout.scheduler)",
        "One seed (a verdict needs 2): clothing: digits · full · 100 %.",
        "out of memory",
        "Cut by the budget",
        "garments · bitfit",
        "2 rows of clothing also stand in garments.",
    ):
        assert words in part, words
    nothing = write(tmp_path / "b", *simulate({"clothing": SKILL["clothing"]}), notes=[])[1]
    assert "none was cut, and no comparison lacks a verdict" not in nothing, "no validation values"


def test_the_summary_of_a_source_is_read_from_what_its_run_says():
    said = {"seed": 0, "warning": "", "stopped_at": None, "metrics": {"auroc": 0.5}, "cached": True}
    found = SourceSummary.from_metadata(
        {**said, "source": "s", "changes": ("torch 1 then, 2 now",)}
    )
    assert found == SourceSummary("s", metrics={"auroc": 0.5}, changes=("torch 1 then, 2 now",))


def test_hyper_parameters_are_short_and_without_checksums(tmp_path):
    rows, runs, curves = simulate()
    stored = json.dumps({"lr": 0.001, "penalty": 3.1622776601683795, "start_weights": "2e89c66"})
    rows = [replace(row, hyper_parameters=stored) for row in rows]
    _, page, text = write(tmp_path, rows, runs, curves)
    for one in (page, text):
        assert "lr 0.001, penalty 3.162" in one
        assert "3.1622" not in one and "start_weights" not in one
