"""A job with a budget of trials: what is trained, what is cut and stays in sight, what is refused."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import stage_runs
from stage_runs import changed, prepared, primary, run_through, saved_vit, trials_in_this_process
from toys import image_splits

from pipeline.config.schema import Fanout, Job
from pipeline.io import storage
from pipeline.report import results, trial_folder
from pipeline.report.results import ResultRow
from pipeline.transfer import budget, dry_run, existing_trials, fanout, stages

SOURCES, TECHNIQUES = ("a", "b", "c"), ("full", "lp_ft", "bitfit")


paths = image_splits(36, 18, 18)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {name: saved_vit(folder / name, seed) for seed, name in enumerate(SOURCES)}


@pytest.fixture
def here(monkeypatch):
    """Trials run in this process, one after the other; the ids of those that ran."""
    return trials_in_this_process(monkeypatch)


def with_train(job: Job, **train: Any) -> Job:
    dumped = job.model_dump(mode="json")
    for target in dumped["targets"].values():
        target["train"] |= train
    return Job.model_validate(dumped)


def job_of(folder, bundles, paths, allowed: int | None = 8, **more) -> Job:
    """Nine pairs, two seeds: 18 trials and 2 of scratch, with nine steps each."""
    select = {} if allowed is None else {"select": {"budget": allowed}}
    make = partial(stage_runs.job_of, techniques=("scratch", *TECHNIQUES))
    return with_train(make(folder, bundles, paths, **{**select, **more}), steps=9)


def steps_of(rows: list[ResultRow]) -> int:
    """The steps of all trials."""
    return sum({row.trial_id: row.steps or 0 for row in rows}.values())


def test_a_budget_trains_less_and_what_it_cut_stays_in_sight(tmp_path, bundles, paths, here):
    """By hand: 9 pairs with 1 of 9 steps, 3 with all, one of them with 2 seeds, scratch twice."""
    job = job_of(tmp_path, bundles, paths)
    lines = dry_run.describe(prepared(job))
    assert (
        "target task at 100 % labels, budget: 9 pairs of source and technique: 9 with 1/9 of the "
        "steps, 3 with all steps, 1 with 2 seeds; with 2 trials of scratch it costs 8 trials"
    ) in lines
    assert any(
        "10 entries: 12 search trials and 4 final trials of 9 steps on 36 rows" in line
        for line in lines
    )
    assert any(line.startswith("in all: 16 trials, 72 steps") for line in lines)
    assert (
        "budget: at most 8 of 8 trials are spent; a trial with all its steps counts as one, a "
        "shorter one by its share"
    ) in lines

    state, rows = run_through(job)
    assert len(here) == len({row.trial_id for row in rows}) == 16
    assert steps_of(rows) == 72 == 9 * 8, "the full matrix has 180"
    tested = {row.trial_id for row in rows if row.split == "test"}
    assert len(tested) == 4 and len(primary(rows, source="none")) == 2

    cut = {row.trial_id: row for row in rows if row.status == "pruned"}
    assert len(cut) == 8 and not tested & cut.keys()
    assert {row.trial_stage for row in cut.values()} == {"search"}
    seeds = {row.seed for row in rows if row.trial_stage == "search"}
    assert seeds.isdisjoint(row.seed for row in rows if row.trial_stage == "final")
    reasons = sorted(row.error.partition(":")[0] for row in cut.values())
    assert reasons == [
        *["cut by the budget after rung 1 of 2 (1/9 of the steps)"] * 6,
        *["cut by the budget after rung 2 of 2 (all steps)"] * 2,
    ]
    kept = next(row for row in primary(rows) if row.source != "none")
    pairs = {(row.source, row.technique) for row in cut.values()}
    assert pairs | {(kept.source, kept.technique)} == {(s, t) for s in SOURCES for t in TECHNIQUES}
    assert kept.drawn == "{}" and "searched" not in (kept.interval or "")
    note = (
        f"task at 100 % labels: the budget trained {kept.source} · {kept.technique} with every "
        "seed and cut 8 of 9 pairs of source and technique"
    )
    assert note in state.notes and note in state.progress.lines
    shifts = [one for scores in state.source_scores.values() for one in scores.shifts]
    assert sum(one.within_target for one in shifts) == 1, (
        "test rows are compared with training rows in the features of one source"
    )

    _, (markdown, _) = stages.write_report(state, rows)
    text = storage.read_bytes(markdown).decode()
    assert "## Cut by the budget" in text
    for row in cut.values():
        reason = row.error.removeprefix(results.CUT_BY_BUDGET).strip()
        assert f"| task | {row.source} · {row.technique} | 100 % | {reason} |" in text
    assert "Where hyper-parameters were searched" not in text, "nothing was"

    again = prepared(job)
    assert sorted(stages.collect_existing_rows(again), key=str) == sorted(rows, key=str)
    ended = existing_trials.trial_status(prepared(job))
    assert len(ended) == 16 and all(done for _, done in ended)
    assert existing_trials.all_ids(prepared(job)) == {row.trial_id for row in rows}


@pytest.mark.slow
def test_a_job_that_was_killed_decides_the_same(tmp_path, bundles, paths, here):
    """Records of any rung and of final trials are gone: those trials run again and no others."""
    job = job_of(tmp_path, bundles, paths)
    _, rows = run_through(job)
    ran = list(here)
    for lost in (ran[3:], [ran[0], ran[10]], ran[12:]):
        folders = trial_folder.find_all(job.root)
        for one in lost:
            shutil.rmtree(storage.join(job.root, folders[one]))
        here.clear()
        status = [done for _, done in existing_trials.trial_status(prepared(job))]
        assert not (status and all(status))
        _, again = run_through(job)
        assert sorted(here) == sorted(lost)
        assert {(row.trial_id, row.status) for row in again} == {
            (row.trial_id, row.status) for row in rows
        }


@pytest.mark.parametrize(
    ("techniques", "trials", "steps"),
    [
        # 3 of 6 pairs take steps: 3 with 1 of 9, then 2 with all, and at most 1 with 2 seeds
        (["linear_probe", "full"], 12, 2 * 9 + 3 * 1 + 4 * 9),
        (["linear_probe"], 9, 2 * 9),
    ],
)
def test_solved_heads_take_no_steps_of_a_budget_and_are_tried_once(
    tmp_path, bundles, paths, here, techniques, trials, steps
):
    job = changed(job_of(tmp_path, bundles, paths, 7), techniques=techniques)
    lines = dry_run.describe(prepared(job))
    assert any(line.startswith(f"in all: {trials} trials, {steps} steps;") for line in lines)
    assert any("(linear_probe: the head is solved, no training steps)" in line for line in lines)
    _, rows = run_through(job)
    assert len(here) == len(set(here)) == len({row.trial_id for row in rows}) == trials
    solved = {row.trial_id for row in rows if row.technique == "linear_probe"}
    assert len(solved & {row.trial_id for row in rows if row.trial_stage == "search"}) == 3
    assert steps_of([row for row in rows if row.technique != "linear_probe"]) <= steps


@pytest.mark.slow
def test_a_larger_budget_keeps_what_was_trained_and_none_trains_everything(
    tmp_path, bundles, paths, here
):
    _, small = run_through(job_of(tmp_path, bundles, paths))
    here.clear()
    _, large = run_through(job_of(tmp_path, bundles, paths, 13))
    assert here and not set(here) & {row.trial_id for row in small}
    here.clear()
    _, whole = run_through(job_of(tmp_path, bundles, paths, 20))
    assert all(row.status == "done" and row.trial_stage == "final" for row in whole)
    finals = {row.trial_id for row in (*small, *large) if row.trial_stage == "final"}
    assert set(here) == {row.trial_id for row in whole} - finals
    here.clear()
    _, without = run_through(job_of(tmp_path, bundles, paths, None))
    assert not here and {row.trial_id for row in without} == {row.trial_id for row in whole}


def failing(sources: str, made: list[str]):
    """Return what runs trials, of which those of the search with these sources fail."""
    run = fanout.run

    def with_failures(name, wanted, shared, *more):
        records = run(name, wanted, shared, *more)
        for number, one in enumerate(wanted):
            if one.stage == "search" and one.source in sources:
                made.append(one.id)
                records[number] = fanout.trial.failed_record(one, shared, "ValueError: broken")
        return records

    return with_failures


@pytest.mark.slow
def test_what_failed_at_a_rung_does_not_change_what_is_kept_later(
    tmp_path, bundles, paths, here, monkeypatch
):
    """The trials would end well now; other pairs would go on, and be paid for beside the first."""
    made: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(fanout, "run", failing("a", made))
        state, rows = run_through(job_of(tmp_path, bundles, paths))
    (note,) = [note for note in state.notes if "search trials of the budget failed" in note]
    assert "were cut: a · full, a · lp_ft, a · bitfit. They do not run again" in note
    here.clear()
    assert all(
        done for _, done in existing_trials.trial_status(prepared(job_of(tmp_path, bundles, paths)))
    )
    again, later = run_through(job_of(tmp_path, bundles, paths))
    assert not here and again.notes == state.notes
    assert {(one.trial_id, one.status) for one in later} == {
        (one.trial_id, one.status) for one in rows
    }
    run_through(job_of(tmp_path, bundles, paths, 13))
    assert set(made) <= set(here), "another budget decides anew"


@pytest.mark.slow
def test_where_every_trial_of_a_rung_failed_they_run_again(
    tmp_path, bundles, paths, here, monkeypatch
):
    made: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(fanout, "run", failing("abc", made))
        run_through(job_of(tmp_path, bundles, paths))
    here.clear()
    run_through(job_of(tmp_path, bundles, paths))
    assert set(made[:9]) <= set(here), "all pairs with a ninth of the steps"


@pytest.mark.slow
def test_a_pair_that_fails_at_a_rung_is_cut_and_its_error_kept(
    tmp_path, bundles, paths, here, monkeypatch
):
    job, made = job_of(tmp_path, bundles, paths), []
    monkeypatch.setattr(fanout, "run", failing("a", made))
    _, rows = run_through(job)
    failed = {row.trial_id for row in rows if row.status == "failed"}
    assert failed == set(made) and len(failed) == 3, "none of them came to the second rung"
    assert all(row.error == "ValueError: broken" for row in rows if row.status == "failed")
    assert {row.source for row in primary(rows)} <= {"none", "b", "c"}


def test_a_choice_by_score_comes_first_where_both_are_asked_for(tmp_path, bundles, paths, here):
    job = job_of(tmp_path, bundles, paths, None)
    both = changed(job, fanout={"seeds": 2, "select": {"score": "knn", "top": 1, "budget": 7}})
    state, rows = run_through(both)
    sources = {row.source for row in rows} - {"none"}
    assert len(sources) == 1 and len(state.scores) == 3
    alone = job_of(tmp_path, bundles, paths).fanout
    assert alone.by_score is None and alone.budget == 8


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(280)
def test_a_budget_on_ray_trains_fewer_steps_than_the_matrix(tmp_path, bundles, paths, ray_here):
    """Four pairs with 1 of 9 steps, two with all, one of them with 2 seeds, and scratch twice."""
    job = job_of(tmp_path, {name: bundles[name] for name in "ab"}, paths, 7)
    job = changed(job, techniques=["full", "bitfit"])
    state, rows = run_through(job)
    assert steps_of(rows) == 4 * 1 + 2 * 9 + 2 * 9 + 2 * 9 < (4 * 2 + 2) * 9
    cut = {row.trial_id: row for row in rows if row.status == "pruned"}
    assert sorted((row.steps, row.source != "none", row.split) for row in cut.values()) == [
        (1, True, "validation"),
        (1, True, "validation"),
        (9, True, "validation"),
    ]
    assert all(row.status == "done" for row in primary(rows)) and len(primary(rows)) == 4
    again = prepared(job)
    assert sorted(stages.collect_existing_rows(again), key=str) == sorted(rows, key=str)
    assert again.notes == state.notes


# ---------------------------------------------------------------- what is refused


def test_a_budget_that_does_not_do_is_refused_before_anything_runs(tmp_path, bundles, paths):
    with pytest.raises(
        budget.BudgetError,
        match=r"fanout\.select\.budget: 6 trials are too few for this job: scratch takes 2, and 5 "
        r"more are needed .*: give at least 7, or fewer techniques",
    ):
        prepared(job_of(tmp_path, bundles, paths, 6))
    prepared(job_of(tmp_path, bundles, paths, 7))


@pytest.mark.parametrize(("decode", "least"), [("memory", 5), ("auto", 7), ("train", 7)])
def test_heads_count_as_solved_where_rows_are_sure_to_be_in_memory(
    tmp_path, bundles, paths, decode, least
):
    """Three probes by hand: solved 3/9 of a trial, else 3/9 and two whole ones; the best one twice,
    scratch twice."""

    def job(allowed: int) -> Job:
        found = changed(job_of(tmp_path, bundles, paths, allowed), techniques=["linear_probe"])
        dumped = found.model_dump(mode="json")
        dumped["targets"]["task"]["data"]["decode"] = decode
        return Job.model_validate(dumped)

    remedy = "; or say data.decode: memory for targets" if decode == "auto" else "seeds$"
    with pytest.raises(budget.BudgetError, match=f"give at least {least}, .*{remedy}"):
        prepared(job(least - 1))
    prepared(job(least))


@pytest.mark.parametrize(
    ("fan", "message"),
    [
        (
            {"trials": 4, "search": {"lr": [1e-3, 1e-1]}, "select": {"budget": 7}},
            "trials is 4, and a budget searches no hyper-parameters: its search trials compare "
            "sources and techniques. Leave trials and search out, or the budget",
        ),
        (
            {"select": {"top": None}},
            "null keeps every source, so select does nothing: remove it, or set budget",
        ),
    ],
    ids=["search", "top"],
)
def test_settings_that_a_budget_does_not_go_with_are_refused(fan, message):
    with pytest.raises(ValueError, match=message):
        Fanout.model_validate(fan)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label_fractions", [0, 1.0], "at 0 no label of the target may be used to choose by"),
        ("folds", 3, "would keep other pairs of source and technique in each fold"),
    ],
)
def test_targets_that_a_budget_cannot_choose_for_are_refused(
    tmp_path, bundles, paths, field, value, message
):
    dumped = job_of(tmp_path, bundles, paths).model_dump(mode="json")
    dumped["targets"]["task"][field] = value
    if field == "folds":  # they make the splits
        dumped["targets"]["task"]["data"] |= {"validation": None, "test": None}
    with pytest.raises(ValueError, match=message) as caught:
        Job.model_validate(dumped)
    assert f"targets.task.{field}" in str(caught.value)


def test_what_combines_final_trials_is_refused(tmp_path, bundles, paths):
    job = job_of(tmp_path, bundles, paths, 8, keep_bundles="all")
    job = changed(job, techniques=["full", "uniform_soup"])
    with pytest.raises(
        ValueError,
        match=r"targets\.task: techniques: uniform_soup combines final trials, of which "
        r"fanout\.select\.budget drops some: leave the technique out, or the budget",
    ):
        prepared(job)


@pytest.mark.parametrize(
    ("train", "length"),
    [
        ({"steps": 8}, "steps: 8"),
        ({"steps": None}, "epochs: 1 of 36 rows, so 3 steps,"),
        ({"steps": None, "epochs": 2.5}, "epochs: 2.5 of 36 rows, so 8 steps,"),
    ],
    ids=["steps", "one epoch", "epochs"],
)
def test_steps_that_cannot_be_cut_are_refused(tmp_path, bundles, paths, train, length):
    """An epoch has 3 steps: 36 rows in batches of 12."""
    job = with_train(job_of(tmp_path, bundles, paths), **train)
    with pytest.raises(ValueError) as caught:
        prepared(job)
    assert str(caught.value) == (
        f"targets.task.train.{length} cannot be cut to 1/9, which fanout.select.budget tries "
        "first: at least 9 steps, or no budget"
    )


def test_a_budget_of_null_is_none_and_changes_no_hash():
    plain = Fanout.model_validate({"select": {"score": "gbc", "top": 1}})
    null = Fanout.model_validate({"select": {"score": "gbc", "top": 1, "budget": None}})
    assert plain.select is not None and "budget" not in plain.select.model_dump(mode="json")
    assert null == plain and null.budget is None and null.by_score == plain.select
