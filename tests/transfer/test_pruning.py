"""Trials that a job no longer has: named by `report`, in no table, and removed on request, but for
what another job starts from.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from stage_runs import changed, job_of, prepared, run_through, saved_vit, trials_in_this_process
from toys import image_splits
from typer.testing import CliRunner

from pipeline import cli
from pipeline.checkpoints import bundle
from pipeline.config.provenance import Provenance
from pipeline.config.schema import Job
from pipeline.io import storage
from pipeline.report import results, trial_folder
from pipeline.train import resume_history
from pipeline.transfer import existing_trials, pruning, stages, trial

paths = image_splits(36, 18, 18)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return saved_vit(tmp_path_factory.mktemp("bundles") / "a")


@pytest.fixture
def here(monkeypatch):
    return trials_in_this_process(monkeypatch)


def with_steps(job: Job, steps: int) -> Job:
    data = job.model_dump(mode="json")
    data["targets"]["task"]["train"]["steps"] = steps
    return Job.model_validate(data)


@pytest.fixture(scope="module")
def run_twice(tmp_path_factory, vit, paths) -> tuple[Path, Job, set[str], set[str]]:
    """A job that was run with three steps and then with four: (its folder, the job as it is now, ids
    of stale trials, of current ones).
    """
    folder = tmp_path_factory.mktemp("run_twice")
    first = job_of(folder, {"a": {"backbone": vit}}, paths, ("scratch", "full"))
    with pytest.MonkeyPatch.context() as patch:
        trials_in_this_process(patch)
        _, old = run_through(first)
        _, new = run_through(with_steps(first, 4))
    ids = ({row.trial_id for row in rows} for rows in (old, new))
    return folder / "runs", with_steps(first, 4), *ids


@pytest.fixture
def both(tmp_path, run_twice, here) -> tuple[Job, set[str], set[str]]:
    """``run_twice`` in a folder of one's own: (job, ids of stale trials, of current ones)."""
    folder, job, old, new = run_twice
    shutil.copytree(folder, tmp_path / "runs")
    return changed(job, storage=str(tmp_path / "runs")), old, new


def folders(job: Job) -> set[str]:
    return set(trial_folder.find_all(job.root))


def test_stale_rows_stand_in_no_table_and_go_with_their_trials_and_nothing_else_does(both):
    """Named first, then removed."""
    job, old, new = both
    state = prepared(job)
    rows = stages.collect_existing_rows(state)
    (message,) = pruning.describe_stale(results.read(job.root))
    total = len(results.read(job.root))
    assert message.startswith(f"{total // 2} of the {total} rows of results.parquet are stale")
    assert (
        "task: a, full, 100 % labels (2 trials); task: scratch of timm/test_vit, scratch, 100 % labels (2 trials)"
        in message
    )
    entries, (markdown, _) = stages.write_report(state, rows)
    assert [entry.n_seeds for entry in entries] == [2, 2], "two seeds of now, not four"
    assert "rows of results.parquet are stale" in storage.read_bytes(markdown).decode()
    assert state.notes == [], "told anew each time, not kept"
    assert pruning.describe_stale([row for row in results.read(job.root) if row.current]) == []
    assert folders(job) == old | new
    found = existing_trials.stale(prepared(job))
    assert (
        set(found.trials) == old
        and found.rows == len(results.read(job.root)) // 2
        and not found.kept
    )
    before = [row for row in results.read(job.root) if row.current]
    pruning.prune(job.root, found)
    assert folders(job) == new and results.read(job.root) == before
    assert all(bundle.exists(row.bundle_uri) for row in before if row.bundle_uri)
    assert existing_trials.stale(prepared(job)).lines() == [
        "nothing is stale: every trial that is kept belongs to the job"
    ]
    assert all(done for _, done in existing_trials.trial_status(prepared(job))), (
        "nothing is to be run again"
    )


@pytest.mark.slow
def test_stacks_of_stale_trials_go(both):
    """Heads that were killed leave resume points beside the trials."""
    job, old, new = both
    now = Provenance({}, {})
    for name, ids in (("old", old), ("mixed", old | new), ("new", new)):
        folder = storage.join(job.root, "stacks", name)
        storage.write_json(storage.join(folder, resume_history.CHECKPOINTS, "point.json"), {})
        resume_history.ResumeHistory(folder, now, None, sorted(ids)).start(0, [])
    storage.write_json(
        storage.join(job.root, "stacks", "of_before", "step-0000000004", "state.json"), {}
    )
    found = existing_trials.stale(prepared(job))
    assert found.stacks == ("mixed", "of_before", "old")
    assert "stale: resume points of 3 stacks of heads that were killed" in found.lines()
    pruning.prune(job.root, found)
    assert {path.name for path in Path(job.root, "stacks").iterdir()} == {"new"}
    assert existing_trials.stale(prepared(job)).is_empty


def test_a_trial_that_another_job_starts_from_stays(both, tmp_path, vit, paths):
    job, old, new = both
    used = next(
        row.bundle_uri for row in results.read(job.root) if row.bundle_uri and row.trial_id in old
    )
    other = changed(job_of(tmp_path, {"b": {"backbone": f"bundle:{used}"}}, paths), name="other")
    stages.prepare_shared(prepared(other))
    found = existing_trials.stale(prepared(job))
    assert found.kept == {Path(used).parent.name.partition("-")[2]: "job other"}
    copy = changed(job, storage=str(tmp_path / "copies"))
    shutil.copytree(job.storage, copy.storage)
    assert existing_trials.stale(prepared(copy)).kept == found.kept, "named by its old place"
    pruning.prune(job.root, found)
    assert bundle.exists(used) and folders(job) == new | found.kept.keys()
    assert any(row.bundle_uri == used for row in results.read(job.root)), "and its rows"


@pytest.mark.slow
def test_jobs_that_recorded_no_uses_are_known_by_their_tables(both, tmp_path, paths):
    job, old, _ = both
    used = next(
        row.bundle_uri for row in results.read(job.root) if row.bundle_uri and row.trial_id in old
    )
    other = changed(job_of(tmp_path, {"b": {"backbone": f"bundle:{used}"}}, paths), name="other")
    run_through(other)
    storage.remove_tree(storage.join(other.root, pruning.USES_FILE))
    assert existing_trials.stale(prepared(job)).kept == {
        Path(used).parent.name.partition("-")[2]: "job other"
    }


@pytest.mark.slow
def test_a_trial_that_the_jobs_own_source_starts_from_stays(both, tmp_path):
    job, old, _ = both
    used = next(
        row.bundle_uri for row in results.read(job.root) if row.bundle_uri and row.trial_id in old
    )
    own = changed(job, sources={"a": {"backbone": f"bundle:{used}"}})
    run_through(own)
    assert existing_trials.stale(prepared(own)).kept == {
        Path(used).parent.name.partition("-")[2]: "this job's source a"
    }


@pytest.mark.slow
def test_nothing_is_pruned_while_the_jobs_trials_are_not_known(both):
    job, _, _ = both
    searching = changed(job, fanout={"seeds": 1, "trials": 2, "search": {"lr": [1e-4, 1e-1]}})
    with pytest.raises(
        ValueError,
        match=r"its search is not finished, so it is not known which trials belong to the job; run "
        r"it to its end first",
    ):
        existing_trials.stale(prepared(searching))
    run_through(searching)
    again = [
        row
        for row in results.read(job.root)
        if row.current and row.trial_stage == "search" and row.seed > 0
    ]
    assert again, "the best draws were tried again, and belong to the job"
    assert set(existing_trials.stale(prepared(searching)).trials) == folders(job) - {
        one.id for one, _ in existing_trials.trial_status(prepared(searching))
    }


def test_the_command_lists_first_and_removes_on_request(both, monkeypatch, tmp_path):
    job, old, new = both
    monkeypatch.setattr(cli, "load", lambda file, overrides, elsewhere: job)
    file = tmp_path / "job.yaml"
    file.write_text("name: toy\n")

    def call(*words: str):
        return CliRunner().invoke(cli.app, ["report", str(file), *words])

    plain = call()
    assert plain.exit_code == 0 and "are stale" in plain.output and folders(job) == old | new
    listed = call("--prune-stale", "--dry-run")
    assert (
        listed.exit_code == 0
        and "task: a, full, 100 % labels (2 trials)" in listed.output
        and folders(job) == old | new
    )
    assert call("--dry-run").exit_code == 2
    done = call("--prune-stale")
    assert (
        done.exit_code == 0 and "removed" in done.output and "are stale: their" not in done.output
    )
    assert folders(job) == new
    assert all(
        trial.read_record(job.root, one) is not None
        for one in trial_folder.find_all(job.root).values()
    )


@pytest.mark.slow
def test_a_part_of_a_job_leaves_the_rest_of_its_results(tmp_path, vit, paths, here):
    job = job_of(tmp_path, {"a": vit}, paths, ("scratch", "full"), ("one", "two"))
    run_through(job)
    trained = len(here)
    part = changed(job, only=["two"])
    state, rows = run_through(part)
    assert list(state.targets) == ["two"] and {row.target for row in rows} == {"two"}
    assert len(here) == trained, "its trials were done before"
    assert all(row.current for row in results.read(job.root))
    with pytest.raises(ValueError, match=r"only: pruning needs the whole job"):
        existing_trials.stale(state)
    assert not existing_trials.stale(prepared(job)).trials


def test_a_part_of_a_job_keeps_what_the_other_sources_use(tmp_path):
    root = str(tmp_path / "runs" / "job")
    pruning.record_uses(root, {"a": ["bundle:/one"], "b": ["bundle:/two"]})
    pruning.record_uses(root, {"b": ["bundle:/three"]}, of_part=True)
    users = pruning.uses(str(tmp_path / "runs" / "other"), {})
    assert {"/one", "/three"} == users.keys()
    pruning.record_uses(root, {"b": ["bundle:/three"]})
    assert {"/three"} == pruning.uses(str(tmp_path / "runs" / "other"), {}).keys()
