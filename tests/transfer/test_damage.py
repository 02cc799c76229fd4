"""A flipped bit in what trials left: it is said, and what can be made again is made again."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stage_runs import run_through

from pipeline.io import storage
from pipeline.report import results, trial_folder
from pipeline.report.results import ResultRow
from pipeline.transfer import existing_trials, stages
from tests.transfer import test_stages
from tests.transfer.test_stages import job_of, reported

bundles, here, paths = test_stages.bundles, test_stages.here, test_stages.paths
TIMES = ("seconds", "started_at")


def plain(rows: list[ResultRow]) -> list[str]:
    return sorted(
        repr({name: value for name, value in row.columns().items() if name not in TIMES})
        for row in rows
    )


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture
def job(tmp_path, bundles, paths):
    return job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("scratch", "full"), seeds=1)


def damage_record(folder: Path) -> Path:
    """Another digit of a value that the table publishes: still JSON, still a number."""
    path = folder / "record.json"
    found = re.search(rb'"value": 0\.\d', path.read_bytes())
    assert found
    flip(path, found.end() - 1)
    return path


def damage_predictions(folder: Path) -> Path:
    path = folder / "predictions.npz"
    flip(path, path.stat().st_size // 2)
    return path


@pytest.mark.parametrize("damage", [damage_record, damage_predictions])
def test_a_trial_of_which_something_is_damaged_runs_again(job, here, caplog, damage):
    _, rows = run_through(job)
    one = next(row.trial_id for row in rows if row.technique == "full")
    ran = sorted(here)
    here.clear()
    path = damage(Path(job.root, trial_folder.find_all(job.root)[one]))
    state, left = reported(job)
    assert f"{path} is damaged" in caplog.text and "the next run makes it again" in caplog.text
    assert existing_trials.trial_status(state) and not all(
        done for _, done in existing_trials.trial_status(state)
    )
    if damage is damage_record:
        assert {row.trial_id for row in left} == {row.trial_id for row in rows} - {one}, (
            "its numbers are not believed"
        )
    _, again = run_through(job)
    assert here == [one] and one in ran
    assert plain(again) == plain(rows)
    assert all(done for _, done in existing_trials.trial_status(state))


def test_a_damaged_table_is_written_again_from_the_records(job, here, caplog):
    _, rows = run_through(job)
    before = results.read(job.root)
    path = Path(job.root, "results.parquet")
    group = pq.ParquetFile(path).metadata.row_group(0)
    values = group.column(results.SCHEMA.get_field_index("value"))
    in_its_numbers = (values.dictionary_page_offset + values.data_page_offset) // 2
    flip(path, in_its_numbers)
    with pytest.raises(storage.DamagedError, match=r"results\.parquet is damaged"):
        results.read(job.root)
    reported(job)
    assert (
        "results.parquet is damaged" in caplog.text
        and "it is written again from the records" in caplog.text
    )
    assert plain(results.read(job.root)) == plain(before) and len(before) == len(rows)


@pytest.mark.slow
def test_every_flipped_bit_of_a_small_table_is_found_or_changes_nothing(tmp_path):
    rows = [
        ResultRow(
            trial_id=f"t{i}",
            status="done",
            trial_stage="final",
            metric="accuracy",
            split="test",
            value=i / 7,
        )
        for i in range(3)
    ]
    results.append(str(tmp_path), rows)
    path, expected = tmp_path / "results.parquet", results.read(str(tmp_path))
    data, silent, found = path.read_bytes(), [], 0
    for place in range(0, len(data), 29):
        flip(path, place, place % 8)
        try:
            silent += [place] if results.read(str(tmp_path)) != expected else []
        except (storage.DamagedError, ValueError):
            found += 1
        path.write_bytes(data)
    assert not silent and found > 10


def test_damaged_facts_are_made_again(job, here, caplog):
    state, _ = run_through(job)
    here.clear()
    path = Path(job.root, "facts.json")
    flip(path, path.read_bytes().index(b'"notes"') + 2)
    assert existing_trials.trial_status(state) == [], "the run goes through its stages"
    run_through(job)
    assert (
        here == []
        and all(done for _, done in existing_trials.trial_status(state))
        and existing_trials.trial_status(state)
    )


def test_damaged_features_are_computed_again(tmp_path, bundles, paths, caplog):
    import torch

    from pipeline.checkpoints import bundle
    from pipeline.transfer import cached_heads

    job = job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("linear_probe",), seeds=1)
    shared = stages.prepare_shared(test_stages.prepared(job))
    backbone_key = next(iter(shared.backbone_groups))
    backbone = bundle.build_backbone(shared.targets["task", backbone_key].arch, seed=3).eval()
    words = (backbone, shared, "a", backbone_key, "task", "test", torch.device("cpu"))
    first, _ = cached_heads.kept_features(*words)
    (path,) = Path(job.root, "features").rglob("content")
    flip(path, path.stat().st_size - 2, 3)
    again, _ = cached_heads.kept_features(*words)
    assert (
        torch.equal(first, again)
        and f"{path} is damaged" in caplog.text
        and "the features are computed again" in caplog.text
    )
    caplog.clear()
    cached_heads.kept_features(*words)
    assert not caplog.text


def test_a_damaged_import_is_brought_in_again(tmp_path, caplog):
    from pipeline.data import manifests

    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "\n".join(f"row {i},{i % 3}" for i in range(50))
    )

    def read() -> list[dict]:
        found = manifests.build(str(tmp_path / "rows.csv"), "auto", str(tmp_path / "imports"))
        return manifests.read_columns(manifests.Selection(found), ["text", "label"]).to_pylist()

    rows = read()
    (path,) = (tmp_path / "imports").rglob("rows.parquet")
    flip(path, 20)
    assert (
        read() == rows
        and f"{path} is damaged" in caplog.text
        and "the files are brought in again" in caplog.text
    )
