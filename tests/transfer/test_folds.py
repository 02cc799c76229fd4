"""Cross-validation of a target (``targets.x.folds``): each row is tested once with each seed, and
what is shown is over all rows.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stage_runs
from stage_runs import Silent
from toys import image_files, result_rows

from pipeline.config.schema import Job, spec_hash
from pipeline.core.metrics import catalog
from pipeline.report import advice, folds, matrix, per_label, results, shift, stats
from pipeline.report.source_scores import PairScores, ScoreValue
from pipeline.train.source import data_key
from pipeline.transfer import (
    dry_run,
    existing_trials,
    grid,
    job_state,
    planned_trials,
    stages,
    targets,
    trial,
)

ROWS = 48


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    paths = image_files(folder / "data", {"rows": ROWS})
    return folder, stage_runs.saved_vit(folder / "vit"), paths["rows"]


def job_of(toy, folds: int | None = 3, techniques=("scratch", "linear_probe"), **changes) -> Job:
    folder, source, uri = toy
    job = stage_runs.job_of(folder, {"a": source}, {"uri": uri}, techniques)
    dumped = job.model_dump(mode="json") | {"baselines": ["majority"]}
    dumped["targets"]["task"]["data"]["validation_fraction"] = 0.25
    if folds is not None:
        dumped["targets"]["task"]["folds"] = folds
    data = {**dumped["targets"]["task"]["data"], **changes.pop("data", {})}
    dumped["targets"]["task"] |= {**changes.pop("target", {}), "data": data}
    return Job.model_validate({**dumped, **changes})


@pytest.fixture(scope="module")
def ended(toy):
    """A job of three folds that has run, its rows, and the ids of the trials that ran."""
    with pytest.MonkeyPatch.context() as patch:
        ran = stage_runs.trials_in_this_process(patch)
        state, rows = stage_runs.run_through(job_of(toy))
    return state, rows, ran


def accuracies(rows) -> list[results.ResultRow]:
    return [row for row in rows if row.metric == "accuracy" and row.split == "test"]


@pytest.mark.slow
def test_a_seed_tests_each_row_in_one_fold(ended):
    state, rows, ran = ended
    assert len(set(ran)) == 3 * 2 * 3, "techniques and a baseline x seeds x folds"
    found = accuracies(rows)
    assert {row.target for row in found} == {"task"}
    assert {row.fold for row in found} == {1, 2, 3}
    for technique in ("scratch", "linear_probe", "majority"):
        for seed in (0, 1):
            ids = [
                trial.read_predictions(state.job.root, row.folder, seed).rows  # type: ignore[union-attr]
                for row in found
                if (row.technique, row.seed) == (technique, seed)
            ]
            assert sorted(np.concatenate(ids)) == list(range(ROWS))
    assert all(row.n_eval == ROWS / 3 for row in found)
    stored = results.read(state.job.root)
    assert {row.fold for row in stored} == {1, 2, 3} and {row.target for row in stored} == {"task"}


def test_a_gain_is_over_the_scratch_network_of_the_same_seed_and_fold(ended):
    _, rows, _ = ended
    found = {(row.technique, row.seed, row.fold): row for row in accuracies(rows)}
    for (technique, seed, fold), row in found.items():
        if technique == "linear_probe":
            scratch = found["scratch", seed, fold]
            assert row.scratch_value == scratch.value
            assert row.baseline_gain == row.gain == row.value - scratch.value
            assert row.paired_seeds == 2
            baseline = found["majority", seed, fold]
            assert row.best_baseline_gain == row.value - baseline.value


def test_entries_and_report_are_of_all_rows(ended):
    state, rows, _ = ended
    entries, (_, page) = stages.write_report(state, rows)
    entry = next(entry for entry in entries if entry.technique == "linear_probe")
    assert (entry.target, entry.n_seeds, entry.paired_seeds, entry.n_test) == ("task", 2, 2, ROWS)
    each = [row.value for row in accuracies(rows) if row.technique == "linear_probe"]
    assert entry.mean == pytest.approx(np.mean(each)), "folds have equal numbers of rows"
    assert entry.gain_low is not None and entry.verdict in matrix.COMPARED
    text = Path(page).read_text()
    assert "3 folds, whose test rows are pooled" in text
    assert "task.fold" not in text.replace("/trials/task.fold", ""), "but in a bundle's place"
    advised = advice.advise([advice.Store("toy", results.read(state.job.root))])
    assert [one.target for one in advised] == ["task"]


@pytest.mark.slow
def test_an_interrupted_run_of_folds_goes_on(toy, ended, monkeypatch):
    """The trials of one fold alone are those of the job that runs all."""

    ran = stage_runs.trials_in_this_process(monkeypatch)
    stage_runs.run_through(job_of(toy))
    one, rows = stage_runs.run_through(job_of(toy, target={"fold": 2}))
    assert ran == [] and {row.fold for row in rows} == {2}
    assert list(one.targets) == ["task.fold2"]
    assert all(done for _, done in existing_trials.trial_status(stage_runs.prepared(job_of(toy))))
    assert {row.technique for row in rows} == {"scratch", "linear_probe", "majority"}
    lost = next(row for row in rows if row.technique == "scratch")
    (toy[0] / "runs" / "toy" / lost.folder / trial.RECORD).unlink()
    stage_runs.run_through(job_of(toy))
    assert ran == [lost.trial_id]


def test_what_a_dry_run_counts(toy):
    lines = dry_run.describe(stages.check(job_of(toy), Silent()))
    assert any(line.startswith("in all: 18 trials") for line in lines)
    assert any("tested in all folds" in line for line in lines)


def test_a_fold_without_test_rows_of_a_class_says_so(toy):
    stage = stages.check(job_of(toy), Silent()).targets["task.fold2"]
    assert not targets.missing_classes(stage)
    classes = targets.classes_of_rows(stage.spec, stage.splits.test, stage.state)
    test = stage.splits.test.keep(classes != 1)
    (found,) = targets.missing_classes(replace(stage, splits=replace(stage.splits, test=test)))
    assert found.text.startswith(f"no test row of this fold has class {stage.state['labels'][1]};")


def test_a_search_is_of_each_fold_alone(toy, monkeypatch):
    """Nested: no fold's setting is chosen by rows that the fold tests."""
    search = {"lr": [0.003, 0.01, 0.03]}
    fanout = {"seeds": 1, "trials": 2, "search": search, "search_finalists": {"top": 1}}
    state = stages.check(job_of(toy, techniques=["scratch"], fanout=fanout), Silent())
    groups = job_state.backbone_groups(state)
    chosen = {name: set(job_state.matching_sources(state, name)) for name in state.targets}
    found = planned_trials.search_trials(state, groups, chosen)
    by_fold = {one.entry: one.target for one in found}
    assert len(found) == 3 * 2 and sorted(by_fold.values()) == [f"task.fold{k}" for k in (1, 2, 3)]
    for stage in state.targets.values():
        parts = [
            set(selection.ids(np.arange(len(selection))))
            for selection in stage.splits.by_name().values()
        ]
        assert not parts[2] & (parts[0] | parts[1]) and len(set.union(*parts)) == ROWS


def test_keys_of_targets_without_folds_are_what_they_were(toy):
    job = job_of(toy, folds=None, data={"test_fraction": 0.2})
    assert not {"folds", "fold"} & job.targets["task"].model_dump(mode="json").keys()
    assert grid.expand_folds(job) is job
    stage = stages.check(job, Silent()).targets["task"]
    assert stage.key == spec_hash(data_key(stage.spec.data), stage.splits.fingerprint)
    of_folds = list(stages.check(job_of(toy), Silent()).targets.values())
    assert len({one.key for one in of_folds}) == 3, "folds have rows of equal number"
    first, second, _ = of_folds
    cut_otherwise = replace(first, splits=replace(first.splits, test=second.splits.test))
    assert cut_otherwise.key != first.key, "the same fold of other rows"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"test_fraction": 0.2}}, "data.test_fraction"),
        ({"data": {"split_column": "class"}}, "data.split_column"),
        ({"target": {"fold": 4}}, "there are 3 folds"),
        ({"folds": None, "target": {"fold": 1}}, "folds is not given"),
        ({"fanout": {"select": {"top": 1}}}, "fanout.select would choose"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_folds_have_no_use_for_is_refused(toy, changes, message):
    with pytest.raises(ValueError, match=message):
        job_of(toy, **changes)


def test_a_target_with_the_name_of_a_fold_is_refused(toy):
    job = job_of(toy)
    other = job_of(toy, folds=None, data={"test_fraction": 0.2}).targets["task"]
    both = job.model_copy(update={"targets": {**job.targets, "task.fold2": other}})
    with pytest.raises(ValueError, match=r"task.fold2: a fold of task has this name"):
        stages.check(both, Silent())


def test_too_many_folds_are_refused_once(toy):
    with pytest.raises(ValueError, match=r"targets.task.folds: 40 folds") as error:
        stages.check(job_of(toy, folds=40), Silent())
    assert str(error.value).count("40 folds") == 1


def test_a_fold_that_cannot_be_prepared_leaves_out_the_whole_target(toy, monkeypatch, tmp_path):
    """Four of five folds would pass for all rows."""
    prepare = targets.prepare

    def of_a_bad_fold(target, group):
        if target.spec.fold == 2:
            raise ValueError("9 of 16 rows cannot be used")
        return prepare(target, group)

    monkeypatch.setattr(targets, "prepare", of_a_bad_fold)
    dumped = job_of(toy, storage=str(tmp_path)).model_dump(mode="json")
    dumped["targets"]["other"] = job_of(toy, folds=None, data={"test_fraction": 0.25}).model_dump(
        mode="json"
    )["targets"]["task"]
    state = stages.check(Job.model_validate(dumped), Silent())
    shared = stages.prepare_shared(state)
    assert list(state.targets) == ["other"] and {name for name, _ in shared.targets} == {"other"}
    assert stages.failures(state, []) == ["targets.task: fold 2: 9 of 16 rows cannot be used"]
    state = stages.check(job_of(toy, storage=str(tmp_path)), Silent())
    with pytest.raises(ValueError, match=r"^targets.task: fold 2: 9 of 16 rows cannot be used$"):
        stages.prepare_shared(state)


def test_a_problem_of_all_folds_is_told_once_with_the_name_in_the_job(toy):
    with pytest.raises(ValueError, match=r"targets.task: techniques: dann reads the rows") as error:
        stages.check(job_of(toy, techniques=("scratch", "dann")), Silent())
    assert len(str(error.value).splitlines()) == 1 and "fold" not in str(error.value)


# ---------------------------------------------------------------- pooling


def whole_run(seed: int, groups: np.ndarray | None = None, skill: float = 1.0, n: int = 90):
    """Predictions of one network on all rows."""
    label = np.arange(n) % 3
    scores = np.random.default_rng(seed).normal(size=(n, 3)) + skill * np.eye(3)[label]
    arrays = {"label": label, "scores": scores}
    return stats.RunPredictions(np.arange(n), arrays, seed, groups)


def in_folds(run: stats.RunPredictions, rows: list[results.ResultRow], fold_of: np.ndarray):
    """Rows and runs as if each fold had a trial of its own; their groups are numbered anew."""
    cut_rows, cut_runs = [], {}
    for fold in np.unique(fold_of).tolist():
        mine = fold_of == fold
        groups = None if run.groups is None else np.unique(run.groups[mine], return_inverse=True)[1]
        arrays = {name: array[mine] for name, array in run.predictions.items()}
        part = stats.RunPredictions(run.rows[mine], arrays, run.seed, groups)
        for row in rows:
            accuracy = catalog.metric("accuracy").value(arrays)
            name = f"{row.trial_id}-{fold}"
            cut_runs[name] = part
            cut_rows.append(
                replace(row, trial_id=name, fold=fold + 1, value=accuracy, n_eval=int(mine.sum()))
            )
    return cut_rows, cut_runs


def both_ways(groups=None, fold_of=None):
    """Entries of three seeds on all rows at once, and in folds."""
    fold_of = np.arange(90) % 4 if fold_of is None else fold_of
    rows, runs, cut_rows, cut_runs = [], {}, [], {}
    for seed in range(3):
        for source, technique, skill in (("none", "scratch", 0.5), ("a", "full", 1.5)):
            run = whole_run(seed + 10 * (source == "a"), groups, skill)
            run = replace(run, seed=seed)
            found = result_rows(source, technique, run, "accuracy")
            rows += found
            runs |= {row.trial_id: run for row in found}
            more_rows, more_runs = in_folds(run, found, fold_of)
            cut_rows += more_rows
            cut_runs |= more_runs
    return (rows, runs), (cut_rows, cut_runs)


def test_pooled_folds_are_as_one_run_on_all_rows():
    whole, cut = (matrix.matrix_entries(*one) for one in both_ways())
    for ours, expected in zip(cut, whole, strict=True):
        assert ours == replace(expected, n_test=90, trial_ids=ours.trial_ids)


def test_pooled_groups_are_those_of_all_folds():
    groups = np.arange(90) // 3
    _, (rows, runs) = both_ways(groups, groups % 4)
    pooled_rows, pooled_runs = folds.pool(rows, runs)
    assert len(pooled_rows) == 6
    for row in pooled_rows:
        run = pooled_runs[row.trial_id]
        assert (run.rows == np.arange(90)).all()
        assert len(np.unique(run.groups)) == 30 and row.n_eval == 90  # type: ignore[arg-type]
        assert len(np.unique(np.stack([run.groups, groups]), axis=1)[0]) == 30  # type: ignore[list-item]


def test_without_predictions_a_seed_is_the_mean_of_its_folds():
    _, (rows, _) = both_ways()
    entry = next(one for one in matrix.matrix_entries(rows, {}) if one.source == "a")
    each = [row.value for row in rows if row.source == "a"]
    assert entry.mean == pytest.approx(np.mean(each)) and entry.n_seeds == 3
    assert matrix.T_INTERVAL in entry.interval


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_seed_of_which_a_fold_failed_is_a_failed_trial(is_recorded):
    """Its values on the other folds are those of easier or harder rows."""
    _, (rows, runs) = both_ways()
    easy = {1: 0.9, 2: 0.5, 3: 0.5, 4: 0.5}
    rows += [replace(row, split="validation", value=easy[row.fold or 0]) for row in rows]
    failed, kept = [], []
    for row in rows:
        is_lost = (row.source, row.seed, row.fold) == ("a", 0, 2)
        (failed if is_lost else kept).append(row)
    if is_recorded:
        lost = {"status": "failed", "value": None, "metric": None, "split": None}
        kept.append(replace(failed[0], **lost, error="broken"))
    pooled, _ = folds.pool(kept, runs)
    (row,) = [row for row in pooled if row.status == "failed"]
    assert row.error == f"fold 2 of seed 0: {'broken' if is_recorded else 'not run yet'}"
    found = matrix.matrix_entries(kept, runs)
    entry = next(one for one in found if one.source == "a")
    whole = next(one for one in matrix.matrix_entries(rows, runs) if one.source == "a")
    assert (entry.n_failed, entry.n_seeds, entry.paired_seeds, entry.n_test) == (1, 2, 2, 90)
    assert entry.validation == pytest.approx(whole.validation) == pytest.approx(0.6)
    assert "rows that all of them have" not in entry.interval


def test_a_fold_of_which_all_trials_failed_is_not_left_out():
    _, (rows, runs) = both_ways()
    lost = {"status": "failed", "value": None, "metric": None, "split": None, "error": "broken"}
    rows = [replace(row, **lost) if row.fold == 2 else row for row in rows]
    found = matrix.matrix_entries(rows, runs)
    assert {(one.verdict, one.n_failed) for one in found} == {(matrix.FAILED, 3)}


def entities(seed: int, skill: float, n: int = 90) -> stats.RunPredictions:
    """Counts of two types in sentences; none of the second type in the rows of the second fold."""
    rng = np.random.default_rng(seed)
    actual = rng.poisson(2, (n, 2))
    actual[1::3, 1] = 0
    hits = rng.binomial(actual, skill)
    arrays = {"actual": actual, "hits": hits, "guessed": hits + (actual > hits)}
    return stats.RunPredictions(np.arange(n), arrays, seed, labels=("PER", "MISC"))


def test_a_type_that_a_fold_lacks_is_valued_on_the_rows_of_all_folds():
    whole_rows, whole_runs, cut_rows, cut_runs = [], {}, [], {}
    for seed in range(3):
        for source, technique, skill in (("none", "scratch", 0.4), ("a", "full", 0.8)):
            run = replace(entities(seed + 10 * (source == "a"), skill), seed=seed)
            parts = {
                fold: replace(
                    run,
                    rows=run.rows[fold::3],
                    predictions={name: array[fold::3] for name, array in run.predictions.items()},
                )
                for fold in range(3)
            }
            for fold, part in {None: run, **parts}.items():
                rows, runs = (whole_rows, whole_runs) if fold is None else (cut_rows, cut_runs)
                (first,) = result_rows(source, technique, part, "entity_f1")
                first = replace(first, fold=None if fold is None else fold + 1)
                first = replace(first, trial_id=f"{first.trial_id}-{fold}")
                runs[first.trial_id] = part
                of_type = catalog.metric("entity_f1").per_label
                found = of_type.values(part.predictions, part.labels)  # type: ignore[union-attr]
                assert len(found) == (1 if fold == 1 else 2)
                rows += [first]
                rows += [replace(first, metric=f"entity_f1/{k}", value=v) for k, v in found.items()]
    pooled_rows, pooled_runs = folds.pool(cut_rows, cut_runs)
    assert len({row.trial_id for row in pooled_rows}) == 6, "one for each source and seed"
    expected = {(row.source, row.seed, row.metric): row.value for row in whole_rows}
    assert expected == {
        (row.source, row.seed, row.metric): pytest.approx(row.value) for row in pooled_rows
    }
    assert {row.n_eval for row in pooled_rows} == {90}
    entries = matrix.matrix_entries(cut_rows, cut_runs)
    assert per_label.label_blocks("t", entries, pooled_rows, pooled_runs) == per_label.label_blocks(
        "t", matrix.matrix_entries(whole_rows, whole_runs), whole_rows, whole_runs
    )


def test_rows_without_folds_stay_as_they_are():
    (rows, runs), _ = both_ways()
    pooled_rows, pooled_runs = folds.pool(rows, runs)
    assert pooled_rows == rows and pooled_runs == runs


def test_scores_of_folds_are_their_mean():
    def pair(target: str, value: float | None) -> PairScores:
        scores = {
            "logme": ScoreValue(2.0, 1.0, 3.0),
            "leep": ScoreValue(value, reason="" if value else "no class"),
        }
        return PairScores("a", target, scores, rows=10)

    found = {"a|t.fold1": pair("t.fold1", 1.0), "a|t.fold2": pair("t.fold2", 4.0)}
    names = {"t.fold1": "t", "t.fold2": "t"}
    mean = folds.pool_scores(found, names)["a|t"]
    assert mean.target == "t" and mean.scores["leep"].value == 2.5
    assert mean.scores["logme"] == ScoreValue(2.0, 1.0, 3.0)
    found["a|t.fold2"] = pair("t.fold2", None)
    lacking = folds.pool_scores(found, names)["a|t"].scores["leep"]
    assert lacking.value is None and lacking.reason == "no class"


def test_a_shift_names_the_fold_of_its_rows():
    """Test rows of two folds are other rows; their training rows are nearly the same."""

    def pair(fold: int) -> PairScores:
        shifts = (
            shift.Shift("source a", "the target's training rows"),
            shift.Shift("its own training rows", "the target's test rows", within_target=True),
        )
        return PairScores("a", f"t.fold{fold}", {}, shifts=shifts)

    found = {f"a|t.fold{fold}": pair(fold) for fold in (1, 2)}
    names = {f"t.fold{fold}": "t" for fold in (1, 2)}
    pooled = folds.pool_scores(found, names)["a|t"]
    assert [one.rows for one in pooled.shifts] == [
        "the target's training rows of fold 1",
        "the target's test rows of fold 1",
        "the target's test rows of fold 2",
    ]
    alone = folds.pool_scores({"a|t.fold2": pair(2)}, names)["a|t"]
    assert [one.rows for one in alone.shifts] == [
        "the target's training rows of fold 2",
        "the target's test rows of fold 2",
    ]
    whole = folds.pool_scores({"a|t": replace(pair(1), target="t")}, {"t": "t"})["a|t"]
    assert whole.shifts == pair(1).shifts
