"""Runs whose trials lie under readable names, and those that an older version began."""

from __future__ import annotations

import csv
import glob
import io
import shutil

import pytest
from stage_runs import changed, job_of, prepared, run_through, saved_vit, trials_in_this_process
from toys import image_splits

from pipeline import api
from pipeline.checkpoints import bundle
from pipeline.io import checksums, storage
from pipeline.report import results, trial_folder
from pipeline.transfer import existing_trials, stages

LOCAL_AND_S3 = pytest.mark.parametrize(
    "root", ["local", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)


paths = image_splits(36, 18, 18)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return saved_vit(tmp_path_factory.mktemp("bundles") / "garments")


@pytest.fixture
def ran(monkeypatch):
    return trials_in_this_process(monkeypatch)


def job_at(root, tmp_path, vit, paths, seeds=2, **fan):
    techniques = ("scratch", "full", "uniform_soup")
    job = job_of(tmp_path, {"Gärments": vit}, paths, techniques, keep_bundles="all")
    fan = {"seeds": seeds, "keep_bundles": "all", **fan}
    return changed(job, storage=root, baselines=["majority"], fanout=fan)


def table_of(root: str) -> list[dict[str, str]]:
    text = storage.read_bytes(storage.join(root, "trials.csv")).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def without_folders(root: str) -> None:
    """Leave out of records what the older version did not write."""
    for folder in trial_folder.find_all(root).values():
        uri = storage.join(root, folder, "record.json")
        record = checksums.read_document(uri)
        for row in record["rows"]:
            assert row.pop("trial_folder") == folder
        checksums.write_document(uri, record)


@LOCAL_AND_S3
def test_trials_lie_under_names_and_all_that_read_them_find_them(root, tmp_path, vit, paths, ran):
    job = job_at(root, tmp_path, vit, paths)
    state, rows = run_through(job)
    stages.write_report(state, rows)
    found = trial_folder.find_all(job.root)
    assert sorted(folder.rpartition("-")[0] for folder in found.values()) == [
        "trials/task/Garments/full/labels-1.0/seed0",
        "trials/task/Garments/full/labels-1.0/seed1",
        "trials/task/Garments/uniform_soup/labels-1.0/seed0",
        "trials/task/baseline/majority/labels-1.0/seed0",
        "trials/task/baseline/majority/labels-1.0/seed1",
        "trials/task/timm-test_vit/scratch/labels-1.0/seed0",
        "trials/task/timm-test_vit/scratch/labels-1.0/seed1",
    ]
    assert set(found) == set(ran) == {row.trial_id for row in rows}
    assert {row.trial_id: row.folder for row in results.read(job.root)} == found
    assert {line["folder"] for line in table_of(job.root)} == set(found.values())
    best = api.best_bundle(job.root, "task")
    assert bundle.exists(best) and trial_folder.split_bundle(best)[0] == job.root
    gains = [row.gain_low for row in rows if row.technique == "full" and row.split == "test"]
    assert any(low is not None for low in gains), "predictions of two trials are compared"

    ran.clear()
    _, again = run_through(job)
    assert ran == [] and again == rows
    lost = next(row for row in rows if row.technique == "full")
    storage.remove_tree(storage.join(job.root, lost.folder, "record.json"))
    run_through(job)
    assert ran == [lost.trial_id] and trial_folder.find_all(job.root) == found

    if not storage.is_remote(root):
        check_copied_and_moved(job, tmp_path, ran)


def check_copied_and_moved(job, tmp_path, ran):
    """Bundles are those of the place that is read, and the original's are never removed."""
    fan = {"seeds": 2, "keep_bundles": "best"}
    techniques = ["scratch", "full"]
    copy = changed(job, storage=str(tmp_path / "copies"), techniques=techniques, fanout=fan)
    shutil.copytree(job.root, copy.root)
    originals = glob.glob(f"{job.root}/**/bundle", recursive=True)
    assert len(originals) == 5
    ran.clear()
    _, rows = run_through(copy)
    assert ran == [] and all(map(bundle.exists, originals))
    kept = {row.bundle_uri for row in rows if row.bundle_uri}
    assert len(kept) == 2 and all(map(bundle.exists, kept))
    assert all(uri.startswith(copy.root) for uri in kept)
    assert len(glob.glob(f"{copy.root}/**/full/**/bundle", recursive=True)) == 1, "removed here"

    root = shutil.move(copy.root, str(tmp_path / "moved"))
    shutil.rmtree(job.root)
    best = api.best_bundle(root, "task")
    assert bundle.load(best).manifest.spec_hash == trial_folder.split_bundle(best)[1]
    moved = {row.bundle_uri for row in results.read(root) if row.bundle_uri and row.current}
    assert moved == {uri.replace(copy.root, root) for uri in kept}


@LOCAL_AND_S3
def test_a_run_of_an_older_version_goes_on_where_its_trials_lie(
    root, tmp_path, vit, paths, ran, monkeypatch
):
    job = job_at(root, tmp_path, vit, paths)
    with monkeypatch.context() as older_version:
        older = lambda *args: trial_folder.old_layout_folder(args[6])  # noqa: E731
        older_version.setattr(trial_folder, "name_folder", older)
        _, rows = run_through(job)
    without_folders(job.root)
    storage.remove_tree(storage.join(job.root, results.FILE))
    before = trial_folder.find_all(job.root)
    assert {folder for folder in before.values()} == {f"trials/{one}" for one in ran}

    ran.clear()
    _, again = run_through(job)
    assert ran == [] and all(done for _, done in existing_trials.trial_status(prepared(job)))
    assert {row.bundle_uri for row in again} == {row.bundle_uri for row in rows}
    assert {row.trial_id: row.folder for row in results.read(job.root)} == before
    assert bundle.exists(api.best_bundle(job.root, "task"))
    lost = next(row for row in rows if row.technique == "full")
    storage.remove_tree(storage.join(job.root, lost.folder, "record.json"))
    run_through(job)
    assert ran == [lost.trial_id] and trial_folder.find_all(job.root) == before

    ran.clear()
    run_through(job_at(root, tmp_path, vit, paths, seeds=3))
    added = trial_folder.find_all(job.root).items() - before.items()
    assert len(ran) == len(added) > 0
    assert all(folder.startswith("trials/task/") for _, folder in added)
    assert existing_trials.stale(prepared(job)).trials == dict(added), "of another number of seeds"


def test_search_trials_lie_beside_the_final_ones(tmp_path, vit, paths, ran):
    search = {"trials": 2, "search": {"lr": [1e-4, 0.1]}, "search_finalists": {"top": 1}}
    job = job_at(str(tmp_path / "runs"), tmp_path, vit, paths, 1, **search)
    job = changed(job, techniques=["scratch", "full"], baselines=[])
    run_through(job)
    folders = trial_folder.find_all(job.root).values()
    leaves = [folder.rpartition("-")[0] for folder in folders if "/full/" in folder]
    place = "trials/task/Garments/full/labels-1.0"
    assert leaves.count(f"{place}/search-seed1000") == 2, "two draws, told apart by their ids"
    assert leaves.count(f"{place}/seed0") == 1
