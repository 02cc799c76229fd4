"""What other code or library versions made is kept and marked, listed by --dry-run, and made anew
on request alone.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from stage_runs import (
    COLUMNS,
    changed,
    job_of,
    prepared,
    primary,
    saved_vit,
    trials_in_this_process,
)
from stage_runs import run_through as again
from toys import image_splits

from pipeline.checkpoints import bundle
from pipeline.config import plugins, provenance
from pipeline.config.provenance import Provenance
from pipeline.config.schema import Job
from pipeline.data.stream import DataWorkers
from pipeline.io import checksums, storage
from pipeline.report import code_versions, matrix, results, terminal, trial_folder
from pipeline.report.trial_record import TrialRecord
from pipeline.train import loop, pretrain, resume_history, source
from pipeline.train.ranks import Ranks
from pipeline.transfer import (
    cached_heads,
    dry_run,
    existing_trials,
    grid,
    job_state,
    planned_trials,
    stages,
    trial,
)

paths = image_splits(36, 18, 18)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    return {"a": saved_vit(tmp_path_factory.mktemp("bundles") / "a")}


@pytest.fixture
def here(monkeypatch):
    return trials_in_this_process(monkeypatch)


@pytest.fixture
def edit(monkeypatch):
    """As if parts of the code had been edited, or another version of a library been installed:
    edit("technique full", timm="9.9").
    """
    real, installed = provenance.code_of, provenance.versions()

    def change(*parts: str, **versions: str) -> None:
        def code_of(modules, pieces):
            return {
                part: f"{text} edited" if part in parts else text
                for part, text in real(modules, pieces).items()
            }

        monkeypatch.setattr(provenance, "code_of", code_of)
        monkeypatch.setattr(provenance, "versions", lambda: {**installed, **versions})
        provenance.made_by.cache_clear()

    yield change
    provenance.made_by.cache_clear()


def toy(folder, bundles, paths) -> Job:
    return job_of(folder, {"a": {"backbone": bundles["a"]}}, paths, ("scratch", "full"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, bundles, paths):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        trials_in_this_process(patch)
        again(toy(folder, bundles, paths))
    return folder


@pytest.fixture
def finished_job(finished, tmp_path, bundles, paths) -> Job:
    """A job that has run, in a folder of its own."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return toy(tmp_path, bundles, paths)


def shown(
    state: job_state.JobState, rows: list[dict[str, Any]]
) -> tuple[list[matrix.MatrixEntry], str, str]:
    """The entries, report.md and the terminal's table."""
    found, (markdown, _) = stages.write_report(state, rows)
    text = io.StringIO()
    Console(width=100, file=text).print(terminal.table(found))
    return found, storage.read_bytes(markdown).decode(), text.getvalue()


# ---------------------------------------------------------------- trials


def assert_trained_from_the_start(job: Job, state: job_state.JobState, one: str) -> None:
    record = trial.read_record(job.root, trial_folder.find_all(job.root)[one])
    assert record is not None and record.resumed_from == 0
    assert state.trial_provenance[one].changes == ()


def test_every_trial_and_bundle_records_what_made_it(finished_job):
    job = finished_job
    rows = stages.collect_existing_rows(prepared(job))
    folders = trial_folder.find_all(job.root)
    assert len(folders) == 4
    for folder in folders.values():
        record = trial.read_record(job.root, folder)
        assert record is not None
        made = record.made
        assert made is not None
        assert made.versions == provenance.versions()
        assert made.versions["torch"].startswith("2.")
        assert {
            "objective classification",
            "modality image",
            "model timm",
            "pipeline.train.loop",
            "pipeline.core.metrics.catalog",
        } <= made.code.keys()
        assert sum(part.startswith("technique ") for part in made.code) == 1
    for row in results.read(job.root):
        assert json.loads(row.versions) == provenance.versions() and len(row.made_by) == 12
    assert len({row.made_by for row in rows}) == 2, "two techniques"
    kept = next(row.bundle_uri for row in primary(rows) if row.bundle_uri)
    assert bundle.load(kept).manifest.made is not None


def test_a_changed_technique_is_kept_marked_and_made_anew_on_request(finished_job, here, edit):
    job = finished_job
    state, rows = again(job)
    found, markdown, terminal = shown(state, rows)
    assert here == []
    assert (
        not any(entry.code_mark for entry in found) and "†" not in terminal and "†" not in markdown
    ), "nothing has changed"
    assert not [line for line in dry_run.describe(prepared(job)) if "other code" in line]

    edit("technique full")
    message = dry_run.describe(prepared(job))
    assert (
        "2 of 4 trials were made by other code or versions than those of now and are used as "
        "they are; --remake changed makes them anew" in message
    )
    assert "2 trials: technique full changed" in message
    state, rows = again(job)
    assert here == [], "nothing that is done is redone in silence"
    found, markdown, terminal = shown(state, rows)
    assert {entry.technique for entry in found if entry.code_mark == code_versions.OTHER} == {
        "full"
    }
    assert not any(entry.code_mark == code_versions.MIXED for entry in found)
    assert "full †" in terminal and "† made by other code or versions" in terminal
    assert "† made by other code or versions" in markdown
    assert "2 trials: technique full changed" in markdown

    message = dry_run.describe(prepared(job, "sources", "trials"))
    assert (
        "2 of 4 trials were made by other code or versions than those of now and are made anew"
        in message
    )
    assert not all(
        done for _, done in existing_trials.trial_status(prepared(job, "sources", "trials"))
    ), "else `run` says that nothing is to run"
    state, rows = again(job, "sources", "trials")
    assert sorted(here) == sorted({row.trial_id for row in rows if row.technique == "full"}), (
        "exactly those"
    )
    assert not any(entry.code_mark for entry in shown(state, rows)[0])
    here.clear()
    assert all(done for _, done in existing_trials.trial_status(prepared(job, "trials"))), (
        "and once"
    )
    again(job, "trials")
    assert here == []


@pytest.mark.slow
def test_a_combined_trial_is_made_anew_with_the_trials_that_it_combines(
    tmp_path, bundles, paths, here, edit
):
    plugins.use([str(Path(__file__).parents[1] / "plugin" / "adaptation")])
    try:
        job = changed(
            toy(tmp_path, bundles, paths),
            techniques=["full", "soup"],
            fanout={"seeds": 2, "keep_bundles": "all"},
        )
        _, rows = again(job)
        here.clear()
        edit("technique full")
        assert "3 trials: technique full changed" in dry_run.describe(prepared(job)), "and the soup"
        again(job, "trials")
        ids = {row.trial_id for row in rows if row.technique in ("full", "soup")}
        assert sorted(here) == sorted(ids) and len(ids) == 3
        here.clear()
        again(job, "trials")
        assert here == [], "and once"

        # as if the run had been stopped after a member: its record is newer than the soup's
        member = next(row.trial_id for row in rows if row.technique == "full")
        soup = next(row.trial_id for row in rows if row.technique == "soup")
        storage.remove_tree(storage.join(job.root, trial_folder.find_all(job.root)[member]))
        again(job)
        here.clear()
        again(job, "trials")
        assert here == [soup]
    finally:
        plugins.use([])


def test_a_comparison_of_trials_of_different_versions_carries_the_mark(finished_job, here, edit):
    """Scratch of one version of a library beside fine-tunes of another."""
    job = changed(finished_job, techniques=["scratch", "full", "lp_ft"])
    edit(timm="9.9")
    state, rows = again(job)
    found, markdown, terminal = shown(state, rows)
    by_technique = {entry.technique: entry.code_mark for entry in found}
    assert by_technique == {
        "scratch": code_versions.OTHER,
        "full": code_versions.OTHER,
        "lp_ft": code_versions.MIXED,
    }, "scratch is as old as full is"
    assert "lp_ft ‡" in terminal and "‡ compares trials of different code or versions" in terminal
    record = trial.read_record(job.root, primary(rows, technique="full")[0].folder)
    assert record is not None and record.made is not None
    before = record.made
    mixed = (
        "the gain compares trials of different code or versions (timm 9.9 and "
        f"{before.versions['timm']})"
    )
    assert all(mixed in row.interval for row in primary(rows, technique="lp_ft"))
    assert all("different code" not in row.interval for row in primary(rows, technique="full"))
    assert f"| timm | {before.versions['timm']} (4 trials), 9.9 (2 trials) |" in markdown, (
        "each trial's versions, not today's beside yesterday's"
    )


def test_seeds_of_different_code_make_an_entry_mixed(finished_job, here, edit):
    edit("pipeline.train.loop")
    state, rows = again(changed(finished_job, fanout={"seeds": 3}))
    assert {entry.code_mark for entry in shown(state, rows)[0]} == {code_versions.MIXED}


@pytest.mark.slow
def test_records_of_before_count_as_not_recorded(finished_job, here):
    job = finished_job
    for folder in trial_folder.find_all(job.root).values():
        uri = storage.join(job.root, folder, "record.json")
        record = storage.read_json(uri)
        later = ("made_by", "versions", "parent_weights", "run", "content_sha256")
        storage.write_json(
            uri, {name: value for name, value in record.items() if name not in later}
        )
    state, rows = again(job)
    assert here == [] and {row.made_by for row in rows} == {row.versions for row in rows} == {None}
    assert any(
        "made before code and versions were recorded" in line
        for line in code_versions.describe_changes(state.trial_provenance)
    )
    found, markdown, _ = shown(state, rows)
    assert {entry.code_mark for entry in found} == {code_versions.OTHER}
    assert "| torch | not recorded |" in markdown
    again(job, "trials")
    assert len(here) == 4


def test_trials_of_a_source_that_was_made_anew_are_marked(finished_job, bundles):
    """Its key is the same, its weights are others: a trial's record says which it started from."""
    record = TrialRecord("one", **Provenance({}, {}).metadata(), parent_weights="old")
    assert code_versions.provenance_of_record(record, Provenance({}, {}), "a", "new").changes == (
        "source a was made anew since",
    )
    assert code_versions.provenance_of_record(record, Provenance({}, {}), "a", "old").changes == ()
    assert (
        code_versions.provenance_of_record(
            replace(record, parent_weights=None), Provenance({}, {}), "none", None
        ).changes
        == ()
    )
    rows = stages.collect_existing_rows(prepared(finished_job))
    weights = bundle.weights_sha256(bundles["a"].partition(":")[2])
    started = {
        row.source: trial.read_record(finished_job.root, row.folder).parent_weights for row in rows
    }
    assert started == {"a": weights, "none": None}


def with_resume_points(job: Job, technique: str) -> Job:
    """One trial of the technique (and of scratch), with a resume point at every step."""
    data = changed(
        job, techniques=list({"scratch": 0, technique: 0}), fanout={"seeds": 1}
    ).model_dump(mode="json")
    data["targets"]["task"]["train"] |= {"checkpoint_every_steps": 1, "steps": 3}
    return Job.model_validate(data)


def killed_in_training(monkeypatch, work, step: int = 3) -> None:
    """Do ``work``, which is killed in the trial's training before the resume point of ``step`` is
    written.
    """
    real = loop.fit

    def killed(run):
        left = iter(range(step))

        def alive():
            if next(left) == step - 1:
                raise KeyboardInterrupt

        return real(dataclasses.replace(run, on_step=alive))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            work()


def test_a_trial_that_other_code_goes_on_with_says_so(
    tmp_path, bundles, paths, here, edit, monkeypatch
):
    """Killed with a resume point, gone on with by other code: the record tells of both; made anew,
    the point is not used.
    """
    job = with_resume_points(toy(tmp_path, bundles, paths), "scratch")
    killed_in_training(monkeypatch, lambda: again(job))
    (one,) = set(here)
    folder = storage.join(job.root, trial_folder.find_all(job.root)[one])
    assert storage.list_files(storage.join(folder, "checkpoints"))
    assert len(resume_history.read_provenance(folder)) == 1
    edit("pipeline.train.loop")
    state, _ = again(job)
    record = trial.read_record(job.root, trial_folder.find_all(job.root)[one])
    assert record is not None and record.resumed_from > 0 and len(record.begun_by) == 1
    assert state.trial_provenance[one].changes == (
        "begun by other code or versions (pipeline.train.loop changed)",
    )
    assert resume_history.read_provenance(folder) == [], "the record has it"
    state, _ = again(job, "trials")
    assert_trained_from_the_start(job, state, one)


def test_a_trial_of_which_nothing_is_used_was_begun_by_nobody_else(
    tmp_path, bundles, paths, here, edit, monkeypatch
):
    """Killed before its first resume point, and run by other code: that code alone has made it."""
    job = with_resume_points(toy(tmp_path, bundles, paths), "scratch")
    killed_in_training(monkeypatch, lambda: again(job), step=1)
    (one,) = set(here)
    edit("pipeline.train.loop")
    state, _ = again(job)
    record = trial.read_record(job.root, trial_folder.find_all(job.root)[one])
    assert record is not None and record.resumed_from == 0 and record.begun_by == ()
    assert state.trial_provenance[one].changes == ()


def full_trial(job: Job) -> tuple[trial.Shared, grid.Trial]:
    """What the trials of a job read, and its trial of full fine-tuning."""
    state = prepared(job)
    shared = stages.prepare_shared(state)
    found = planned_trials.final_trials(
        state, list(shared.backbone_groups.values()), {"task": {"a"}}, {}
    )
    return shared, next(one for one in found if one.technique.name == "full")


def test_resume_points_of_other_weights_are_not_gone_on_with(tmp_path, bundles, paths, monkeypatch):
    """The source was made anew after its trial was killed: the trial starts again from the weights
    that its record names.
    """
    shared, one = full_trial(with_resume_points(toy(tmp_path, bundles, paths), "full"))
    killed_in_training(monkeypatch, lambda: trial.run(one, shared, Ranks()))
    points = trial.checkpoint_folder(shared, one)
    assert storage.list_files(points)
    anew = dataclasses.replace(shared, parent_weights={"a": "other"})
    message: list[str] = []
    with checksums.notifications_to(message.append):
        record = trial.run(one, anew, Ranks())
    assert record.resumed_from == 0 and record.parent_weights == "other" and record.begun_by == ()
    assert "trained from other weights of the source" in message[0]


def test_what_was_left_half_trained_is_made_anew_on_request(
    tmp_path, bundles, paths, here, edit, monkeypatch
):
    """A killed trial has no record: `--remake changed` drops its resume points of other code
    too.
    """
    job = with_resume_points(toy(tmp_path, bundles, paths), "scratch")
    killed_in_training(monkeypatch, lambda: again(job))
    (one,) = set(here)
    edit("pipeline.train.loop")
    state, _ = again(job, "trials")
    assert_trained_from_the_start(job, state, one)


def test_resume_points_of_before_they_had_a_record_count_as_not_recorded(
    tmp_path, bundles, paths, monkeypatch
):
    shared, one = full_trial(with_resume_points(toy(tmp_path, bundles, paths), "full"))
    killed_in_training(monkeypatch, lambda: trial.run(one, shared, Ranks()))
    storage.remove_tree(storage.join(trial.folder_uri(shared, one), resume_history.FILE))
    record = trial.run(one, shared, Ranks())
    assert record.resumed_from > 0
    origin = code_versions.provenance_of_record(
        record, record.made or Provenance({}, {}), "a", None
    )
    assert origin.changes == (f"begun by other code or versions ({provenance.NOT_RECORDED})",)


def test_a_trial_whose_resume_points_are_all_damaged_starts_again(
    tmp_path, bundles, paths, monkeypatch
):
    shared, one = full_trial(with_resume_points(toy(tmp_path, bundles, paths), "full"))
    killed_in_training(monkeypatch, lambda: trial.run(one, shared, Ranks()))
    for path in Path(trial.checkpoint_folder(shared, one)).glob("*/state.pt"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    record = trial.run(one, shared, Ranks())
    assert record.status == "done" and record.resumed_from == 0
    assert "is damaged" in record.transfer
    assert "training starts again from step 0" in record.transfer


def test_features_of_other_code_are_computed_again(tmp_path, paths, here, edit):
    job = changed(pretraining(tmp_path, paths), techniques=["scratch", "linear_probe"])
    run_source(prepared(job).sources["src"])
    state = prepared(job)
    shared = stages.prepare_shared(state)
    (base,) = shared.backbone_groups.values()
    task = bundle.load(state.sources["src"].bundle_uri).task()

    def kept() -> set[str]:
        cached_heads.kept_features(
            task.backbone, shared, "src", base.key, "task", "train", torch.device("cpu")
        )
        return {path.name for path in Path(job.root, "features").iterdir()}

    first = kept()
    assert len(first) == 1 and kept() == first
    edit("model timm")
    assert len(kept()) == 2, "the old ones are not used in trials of new code"


# ---------------------------------------------------------------- sources


def pretraining(folder, paths) -> Job:
    spec = {
        "data": {
            **{name: paths[name] for name in ("train", "validation")},
            "modality": {"image": {"size": 32}},
            "columns": COLUMNS,
            "decode": "train",
        },
        "backbone": "timm/test_resnet",
        "objective": "classification",
        "train": {"steps": 4, "global_batch": 12, "checkpoint_every_steps": 2},
    }
    return job_of(folder, {"src": spec}, paths)


def run_source(stage: source.SourceStage) -> None:
    work = pretrain.rank_job(stage, source.prepare_source(stage), DataWorkers(), 1)
    pretrain.train_rank(work, Ranks(), decoded_rows=pretrain.decode_once(work))


def test_a_source_of_other_code_is_used_marked_and_made_anew_on_request(
    tmp_path, paths, here, edit
):
    job = pretraining(tmp_path, paths)
    stage = prepared(job).sources["src"]
    run_source(stage)
    assert stage.done and stage.changes() == ()
    first = bundle.load(stage.bundle_uri).manifest
    assert first.made is not None

    edit("pipeline.train.optim", torch="9.9")
    reasons = (
        "pipeline.train.optim changed",
        f"torch {first.made.versions['torch']} then, now 9.9",
    )  # type: ignore[union-attr]
    assert stage.changes() == reasons and stage.done
    state = prepared(job)
    stages.report_done(state, "src")
    assert any(
        "warning: src: made by other code or versions: pipeline.train.optim changed" in line
        for line in state.progress.lines
    )  # type: ignore[attr-defined]
    assert any(
        line.startswith("source src")
        and "[done, made by other code or versions: pipeline.train.optim changed, torch" in line
        for line in dry_run.describe(state)
    )

    anew = prepared(job, "sources").sources["src"]
    assert not anew.done and prepared(job, "trials").sources["src"].done
    message = dry_run.describe(prepared(job, "sources", "trials"))
    assert any(
        "[to run again, as it was made by other code or versions: pipeline.train.optim changed"
        in line
        for line in message
    )
    assert (
        "the trials of src are made anew too, unless the weights of the source come out as "
        "they were" in message
    )
    fitted = source.prepare_source(anew)
    assert bundle.load(stage.bundle_uri).manifest == first, (
        "the old one stays until the new one is whole"
    )
    work = pretrain.rank_job(anew, fitted, DataWorkers(), 1)
    pretrain.train_rank(work, Ranks(), decoded_rows=pretrain.decode_once(work))
    assert anew.done and anew.changes() == ()
    assert bundle.load(stage.bundle_uri).manifest.sha256 != first.sha256


def test_a_source_that_other_code_goes_on_with_says_so(tmp_path, paths, edit):
    """A killed run is gone on with, whatever began it; the bundle tells of both."""
    job = pretraining(tmp_path, paths)
    stage = prepared(job).sources["src"]
    source.prepare_source(stage)
    edit("pipeline.train.loop")
    run_source(stage)
    manifest = bundle.load(stage.bundle_uri).manifest
    assert len(manifest.made_by["begun_by"]) == 1
    assert stage.changes() == ("begun by other code or versions (pipeline.train.loop changed)",)


def test_resume_points_of_other_code_are_dropped_where_a_source_is_made_anew(tmp_path, paths, edit):
    job = pretraining(tmp_path, paths)
    stage = prepared(job).sources["src"]
    source.prepare_source(stage)
    leftover = storage.join(stage.uri, "checkpoints", "old.json")
    storage.write_json(leftover, {})
    assert source.begin(stage) == [] and storage.exists(leftover)
    edit("pipeline.train.loop")
    anew = prepared(job, "sources").sources["src"]
    assert source.begin(anew) == [] and not storage.exists(leftover)
    storage.write_json(leftover, {})
    assert source.begin(anew) == []
    assert storage.exists(leftover), "what the same code has begun is gone on with"


def test_a_half_trained_source_of_before_is_marked_or_made_anew(tmp_path, paths):
    """It has resume points, and nothing says what code they are of."""
    job = pretraining(tmp_path, paths)
    stage = prepared(job).sources["src"]
    leftover = storage.join(stage.uri, "checkpoints", "old.json")
    record = storage.join(stage.uri, resume_history.FILE)
    storage.write_json(leftover, {})
    others = source.begin(stage)
    assert len(others) == 1
    assert provenance.from_metadata(others[0]) is None, "marked as not recorded"
    storage.remove_tree(record)
    assert source.begin(prepared(job, "sources").sources["src"]) == []
    assert not storage.exists(leftover)


def test_a_bundle_that_the_job_names_is_what_it_is(tmp_path, bundles, paths, edit):
    stage = prepared(toy(tmp_path, bundles, paths), "sources", "trials").sources["a"]
    edit("model timm")
    assert stage.changes() == () and stage.done
