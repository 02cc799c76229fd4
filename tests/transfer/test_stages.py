"""A job's stages in this process, from bundles that are there already: what is refused, what is
run, what the table and `report` say of it.
"""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stage_runs
import torch
from safetensors.torch import save_file
from stage_runs import (
    COLUMNS,
    MODALITY,
    Silent,
    changed,
    prepared,
    primary,
    run_through,
    saved_vit,
    trials_in_this_process,
)
from toys import image_files, image_splits, label_state, task_of

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.schema import ComponentConfig, Job
from pipeline.core.specs import Architecture
from pipeline.data import duplicates
from pipeline.io import checksums, file_identity, storage
from pipeline.report import results
from pipeline.report.results import ResultRow
from pipeline.report.trial_record import TrialRecord
from pipeline.train import row_checks, source
from pipeline.train.ranks import Ranks
from pipeline.transfer import (
    dry_run,
    existing_trials,
    grid,
    job_state,
    overlap,
    planned_trials,
    scoring,
    stages,
    targets,
    trial,
)

paths = image_splits(36, 18, 18, scope="session")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "a": saved_vit(folder / "a", 1),
        "b": saved_vit(folder / "b", 2),
        "far": saved_vit(folder / "far", 3, mean=0.4),
    }


job_of = partial(stage_runs.job_of, techniques=("scratch", "full"), seeds=1)


def with_data(job: Job, name: str, **data) -> Job:
    dumped = job.model_dump(mode="json")
    dumped["targets"][name]["data"] |= data
    return Job.model_validate(dumped)


@pytest.fixture
def here(monkeypatch):
    """Trials run in this process, one after the other; the ids of those that ran."""
    return trials_in_this_process(monkeypatch)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, bundles, paths):
    """The folder of a finished run of source ``a``."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        trials_in_this_process(patch)
        run_through(job_of(folder, {"a": bundles["a"]}, paths))
    return folder


@pytest.fixture
def finished_job(finished, tmp_path, bundles, paths):
    """A job of source ``a`` that has run, in a folder of its own."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return job_of(tmp_path, {"a": bundles["a"]}, paths)


def reported(job: Job) -> tuple[job_state.JobState, list[dict[str, Any]]]:
    """What `report` finds, in a command of its own."""
    state = prepared(job)
    return state, stages.collect_existing_rows(state)


def alike(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    def key(row):
        return row.trial_id, str(row.split), str(row.metric)

    return sorted(one, key=key) == sorted(other, key=key)


# -------------------------------------------------------- a whole run, and what `report` says of it


def test_a_run_leaves_its_table_and_report_says_the_same(tmp_path, bundles, paths, here):
    job = job_of(tmp_path, {"a": bundles["a"], "b": bundles["b"]}, paths, seeds=2)
    before = prepared(job)
    assert (
        existing_trials.trial_status(before)
        == [(one, False) for one, _ in existing_trials.trial_status(before)]
        and len(existing_trials.trial_status(before)) == 6
    ), "known, and none done"
    _, rows = run_through(job)
    assert len(here) == 2 * (1 + 2), "scratch once for the two sources, which read alike"
    assert {(row.source, row.technique, row.seed) for row in primary(rows)} == {
        *(("none", "scratch", seed) for seed in range(2)),
        *((name, "full", seed) for name in "ab" for seed in range(2)),
    }
    scratch = {row.seed: row.value for row in primary(rows, source="none")}
    for row in primary(rows):
        if row.source == "none":
            assert row.gain is None and row.scratch_value is None
        else:
            assert row.scratch_value == scratch[row.seed], "of the same seed"
            assert (
                row.gain == pytest.approx(row.value - row.scratch_value)
                and row.gain_low <= row.gain <= row.gain_high
            )
    losses = [
        row for row in rows if row.metric == "loss" and row.split == "test" and row.source != "none"
    ]
    assert losses and all(
        row.gain == pytest.approx(row.scratch_value - row.value) for row in losses
    ), "lower is better"
    assert all(row.gain is None for row in rows if row.split == "validation")
    written = results.read(job.root)
    assert alike(written, rows) and len(written) == 6 * 2 * 3
    state, again = reported(job)
    assert alike(again, rows) and state.notes == [] and state.unusable_targets == {}
    ended = existing_trials.trial_status(prepared(job))
    assert (
        len(ended) == 6
        and all(done for _, done in ended)
        and {one.id for one, _ in ended} == set(here)
    )
    here.clear()
    _, third = run_through(job)
    assert here == [] and alike(third, rows), "a second run runs nothing"


@pytest.mark.slow
def test_the_table_tells_on_how_much_a_comparison_rests(tmp_path, bundles, paths, here):
    """Paired seeds, the corrected p value of the primary metric, and the gain over the target's
    best scratch network.
    """
    task = task_of(
        "timm/test_resnet", {"channels": 3, "size": 32}, "classification", label_state(), seed=5
    )
    bundle.save(str(tmp_path / "resnet"), task, MODALITY, training={"transfer": ""}, metrics={})
    job = job_of(
        tmp_path,
        {"a": bundles["a"], "b": f"bundle:{tmp_path / 'resnet'}"},
        paths,
        seeds=2,
    )
    state, rows = run_through(job)
    entries = {
        (entry.source, entry.backbone): entry for entry in stages.write_report(state, rows)[0]
    }
    for row in rows:
        compared = row.split == "test" and row.source != "none"
        entry = entries[row.source, row.backbone]
        assert row.paired_seeds == (2 if compared else None)
        assert row.gain_p_holm == (
            entry.gain_p_holm if compared and row.metric == entry.metric else None
        )
        if compared:
            best = next(
                other.value
                for other in rows
                if (other.source, other.backbone, other.seed, other.metric, other.split)
                == ("none", entry.best_scratch, row.seed, row.metric, "test")
            )
            assert row.baseline_gain == pytest.approx(
                (row.value - best) * (1 if row.higher_is_better else -1)
            )
    assert {entry.best_scratch for entry in entries.values() if entry.source != "none"} <= {
        "timm/test_vit",
        "timm/test_resnet",
    }
    assert alike(results.read(job.root), rows) and alike(reported(job)[1], rows)


def test_a_bundle_is_told_of_where_it_is(tmp_path, bundles, paths, here):
    """The best seed of each entry, and no other, says where its bundle lies."""
    _, rows = run_through(job_of(tmp_path, {"a": bundles["a"]}, paths, seeds=2))
    uris = {row.trial_id: row.bundle_uri for row in primary(rows)}
    assert all(
        uri is None or bundle.load(uri).manifest.spec_hash == name for name, uri in uris.items()
    )
    assert sum(uri is not None for uri in uris.values()) == 2
    for entry in (("none", "scratch"), ("a", "full")):
        of = {
            row.trial_id: row
            for row in rows
            if (row.source, row.technique) == entry
            and row.split == "validation"
            and row.metric == "accuracy"
        }
        (kept,) = (row for row in of.values() if row.bundle_uri)
        assert kept.value == max(row.value for row in of.values())


def test_a_row_never_names_a_bundle_that_is_gone(tmp_path, bundles, paths, here):
    """After a run that kept the best bundles, another that keeps others or has fewer seeds."""
    job = job_of(tmp_path, {"a": bundles["a"]}, paths, seeds=2)
    run_through(job)
    for words in ({"seeds": 1}, {"keep_bundles": "none"}, {"keep_bundles": "all"}):
        _, rows = run_through(changed(job, fanout={"seeds": 2, **words}))
        named = {row.bundle_uri for row in rows if row.bundle_uri}
        assert all(map(bundle.exists, named)), words


def test_a_gain_without_predictions_has_no_interval(finished_job):
    """A metric may lack test units too. It is better or worse by its direction."""
    (row,) = primary(reported(finished_job)[1], source="none")
    storage.remove_tree(storage.join(finished_job.root, row.folder, "predictions.npz"))
    _, again = reported(finished_job)
    compared = [row for row in again if row.gain is not None]
    assert sorted(row.metric for row in compared) == ["accuracy", "loss", "macro_f1"]
    for row in compared:
        sign = -1 if row.metric == "loss" else 1
        assert (
            row.gain == pytest.approx(sign * (row.value - row.scratch_value))
            and row.gain_low is row.gain_high is None
        )


def test_report_before_anything_ran_has_no_rows(tmp_path, bundles, paths):
    job = job_of(tmp_path, {"a": bundles["a"]}, paths)
    _, rows = reported(job)
    assert rows == [] and results.read(job.root) == []


def test_an_interrupted_run_is_reported_as_far_as_it_came(
    tmp_path, bundles, paths, here, monkeypatch
):
    job = job_of(tmp_path, {"a": bundles["a"]}, paths)
    real, count = trial.run, []

    def stop(one, shared, ranks):
        if len(count) == 1:
            raise KeyboardInterrupt
        count.append(one.id)
        return real(one, shared, ranks)

    monkeypatch.setattr(trial, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        run_through(job)
    _, rows = reported(job)
    assert {row.trial_id for row in rows} == set(count)
    ended = existing_trials.trial_status(prepared(job))
    assert sorted(done for _, done in ended) == [False, True]
    monkeypatch.setattr(trial, "run", real)
    here.clear()
    run_through(job)
    assert here == [one.id for one, done in ended if not done], "the rest alone"


def test_a_technique_more_keeps_the_rows_that_are_there(finished_job, here):
    _, rows = reported(finished_job)
    _, more = run_through(changed(finished_job, techniques=["scratch", "full", "linear_probe"]))
    assert len(here) == 1 and {
        row.trial_id for row in more if row.technique == "linear_probe"
    } == set(here)
    assert alike([row for row in more if row.technique != "linear_probe"], rows)
    written = results.read(finished_job.root)
    assert alike(written, more)
    here.clear()
    _, fewer = run_through(finished_job)
    assert here == [] and alike(fewer, rows), "the table of a job is of the job as it is now"


def test_the_table_marks_rows_of_trials_that_are_no_longer_in_the_job(finished_job, here):
    steps = finished_job.model_dump(mode="json")
    steps["targets"]["task"]["train"]["steps"] = 4
    longer = Job.model_validate(steps)
    _, rows = run_through(longer)
    written = results.read(finished_job.root)
    now = {row.trial_id for row in rows}
    assert len(written) == 2 * len(rows), "what was run before is kept"
    assert {row.trial_id for row in written if row.current} == now
    assert all(row.current is False for row in written if row.trial_id not in now)
    reported(finished_job)
    assert {row.trial_id for row in results.read(finished_job.root) if not row.current} == now, (
        "the job as it was before again"
    )


def searched(rows, technique):
    """Draw to seed to validation value."""
    out: dict[float, dict[int, float]] = {}
    for row in rows:
        if (row.trial_stage, row.technique, row.metric) == ("search", technique, "accuracy"):
            assert row.split == "validation"
            out.setdefault(json.loads(row.hyper_parameters)["lr"], {})[row.seed] = row.value
    return out


def test_each_technique_is_searched_over_its_own_ranges(tmp_path, bundles, paths, here):
    """As many draws for each, options too; all draws of a technique are one entry of the table."""
    job = job_of(
        tmp_path,
        {"a": bundles["a"]},
        paths,
        techniques=("scratch", "full", "linear_probe"),
        trials=3,
        search="auto",
        search_finalists={"top": 1},
    )
    _, rows = run_through(job)
    assert {row.status for row in rows} == {"done"}
    search = {row.trial_id: row for row in rows if row.trial_stage == "search"}
    counts = Counter(row.technique for row in search.values())
    assert counts == {"scratch": 3, "full": 3}, "linear_probe has nothing to search"
    drawn = [json.loads(row.drawn) for row in search.values() if row.technique == "full"]
    assert sorted(map(sorted, drawn)) == [[], *[["lr", "technique.layer_decay"]] * 2]
    rate = job.targets["task"].train.lr
    assert all(0.03 <= draw["lr"] / rate <= 3 for draw in drawn if draw)
    final = [row for row in rows if row.trial_stage == "final" and row.technique == "full"]
    (chosen,) = {row.drawn for row in final}
    best = max(
        (row.value, -place, row.drawn)
        for place, row in enumerate(
            row
            for row in rows
            if (row.trial_stage, row.technique, row.metric) == ("search", "full", "accuracy")
        )
    )
    assert chosen == best[2]
    assert {results.technique(row) for row in final} == {"full"}


@pytest.mark.slow
def test_a_probe_of_streamed_rows_is_searched_as_scratch_is(tmp_path, bundles, paths, here):
    """Its head trains by steps there; the report knows it too."""
    job = job_of(
        tmp_path,
        {"a": bundles["a"]},
        paths,
        techniques=("scratch", "linear_probe"),
        trials=2,
        search="auto",
        search_finalists={"top": 1},
    )
    job = with_data(job, "task", decode="train")
    _, rows = run_through(job)
    assert [len(searched(rows, name)) for name in ("scratch", "linear_probe")] == [2, 2]
    assert alike(reported(job)[1], rows)


def test_a_draw_that_failed_with_a_further_seed_does_not_win(world_of_draws):
    search, records = world_of_draws
    assert planned_trials.winning_draws(search, records) == {"entry": {"lr": 0.2}}
    records[-1] = replace(records[-1], status="failed")
    assert planned_trials.winning_draws(search, records) == {"entry": {"lr": 0.1}}, (
        "with one seed fewer than the other"
    )
    assert planned_trials.ranked_draws(search[:3], records[:3]) == {
        "entry": [{"lr": 0.3}, {"lr": 0.2}, {"lr": 0.1}]
    }
    assert planned_trials.winning_draws([], []) == {}


@pytest.fixture
def world_of_draws():
    """Three draws with one seed, of which two were tried again."""
    values = {(0.1, 0): 0.5, (0.2, 0): 0.6, (0.3, 0): 0.7, (0.1, 1): 0.6, (0.2, 1): 0.9}
    search, records = [], []
    for (lr, seed), value in values.items():
        search.append(
            SimpleNamespace(id=f"{lr}-{seed}", entry="entry", hyper_parameters={"lr": lr})
        )
        row = ResultRow(metric="accuracy", split="validation", value=value, higher_is_better=True)
        records.append(TrialRecord(search[-1].id, rows=(row,)))
    return search, records


def test_a_search_tries_its_best_draws_again_and_picks_the_best_of_these(
    tmp_path, bundles, paths, here
):
    job = job_of(
        tmp_path,
        {"a": bundles["a"]},
        paths,
        trials=3,
        search={"lr": [1e-4, 1e-1]},
        search_finalists={"top": 2, "seeds": 1},
    )
    _, rows = run_through(job)
    draws = grid.draws(job, job.targets["task"], ComponentConfig(name="full"))
    for technique in ("scratch", "full"):
        values = searched(rows, technique)
        assert sorted(values) == sorted(draw["lr"] for draw in draws)
        again = [lr for lr, seeds in values.items() if len(seeds) > 1]
        (other,) = set(values) - set(again)
        assert all(set(values[lr]) == {1000, 1001} for lr in again)
        assert min(values[lr][1000] for lr in again) >= values[other][1000]
        best = max(again, key=lambda lr: sum(values[lr].values()))
        final = primary(rows, technique=technique)
        assert [row.seed for row in final] == [0], "a lucky network is not counted twice"
        assert {json.loads(row.hyper_parameters)["lr"] for row in final} == {best}, (
            "of draws that are equally good, the first"
        )
    for row in rows:
        drawn = json.loads(row.drawn)
        assert drawn in draws and drawn["lr"] == json.loads(row.hyper_parameters)["lr"]
    assert alike(reported(job)[1], rows)
    ended = existing_trials.trial_status(prepared(job))
    assert len(ended) == 2 * (3 + 2 + 1) and all(done for _, done in ended)


@pytest.mark.slow
def test_ended_knows_nothing_of_the_finals_while_the_search_is_not_through(
    tmp_path, bundles, paths, here
):
    job = job_of(
        tmp_path,
        {"a": bundles["a"]},
        paths,
        techniques=("scratch", "full"),
        trials=2,
        search={"lr": [1e-4, 1e-1]},
    )
    assert existing_trials.trial_status(prepared(job)) == []
    run_through(job)
    one = next(
        one for one, _ in existing_trials.trial_status(prepared(job)) if one.stage == "search"
    )
    storage.remove_tree(storage.join(job.root, one.folder, "record.json"))
    assert existing_trials.trial_status(prepared(job)) == []


def test_ended_is_empty_while_a_source_has_no_bundle(tmp_path, bundles, paths):
    pretrained = {
        "data": {
            **{k: paths[k] for k in ("train", "validation")},
            "modality": {"image": {"size": 32}},
            "columns": COLUMNS,
        },
        "backbone": "timm/test_vit",
        "objective": "classification",
        "train": {"steps": 2, "global_batch": 12},
    }
    job = job_of(tmp_path, {"a": bundles["a"], "new": pretrained}, paths)
    state = prepared(job)
    assert existing_trials.trial_status(state) == [] and stages.collect_existing_rows(state) == []
    with pytest.raises(ValueError, match="sources new have no bundle yet: run `pretrain`"):
        stages.prepare_shared(state)


# ---------------------------------------------------------------- names and contents


def test_two_names_of_one_bundle_are_two_sources(tmp_path, bundles, paths, here):
    job = job_of(tmp_path, {"a": bundles["a"], "same": bundles["a"]}, paths)
    state, rows = run_through(job)
    assert state.sources["a"].key != state.sources["same"].key
    by_source = {
        name: {row.trial_id for row in primary(rows, source=name)} for name in ("a", "same", "none")
    }
    assert (
        all(len(found) == 1 for found in by_source.values())
        and len(set.union(*by_source.values())) == 3
    )
    values = [
        sorted((row.seed, row.value) for row in primary(rows, source=name))
        for name in ("a", "same")
    ]
    assert values[0] == values[1], "with the same results"


def test_what_a_checkpoint_holds_decides_and_not_its_place(finished_job, tmp_path, bundles, here):
    rows = reported(finished_job)[1]
    shutil.copytree(bundles["a"].removeprefix("bundle:"), tmp_path / "there")
    moved = changed(finished_job, sources={"a": {"backbone": f"bundle:{tmp_path / 'there'}"}})
    assert prepared(moved).sources["a"].key == prepared(finished_job).sources["a"].key
    assert {row.trial_id for row in run_through(moved)[1]} == {
        row.trial_id for row in rows
    } and here == []
    shutil.rmtree(tmp_path / "there")
    saved_vit(tmp_path / "there", 2)
    assert prepared(moved).sources["a"].key != prepared(finished_job).sources["a"].key, (
        "the same path, other weights"
    )
    _, again = run_through(moved)
    assert len(here) == 1, "full; scratch has no weights of a source"
    assert {row.trial_id for row in primary(again, source="none")} == {
        row.trial_id for row in primary(rows, source="none")
    }


def test_rows_that_are_there_take_the_label_that_their_backbone_has_now(
    finished_job, bundles, here
):
    """A second backbone group of one architecture: timm/test_vit becomes timm/test_vit@a, and the new table
    names it so in every row.
    """
    rows = reported(finished_job)[1]
    assert {row.backbone for row in rows} == {"timm/test_vit"}
    sources = {name: {"backbone": bundles[name]} for name in ("a", "far")}
    _, both = run_through(changed(finished_job, sources=sources))
    assert len(here) == 2, "only what is new: full and scratch of the other backbone group"
    old = {row.trial_id for row in rows}
    assert {row.backbone for row in both if row.trial_id in old} == {"timm/test_vit@a"}
    assert {row.backbone for row in both if row.trial_id not in old} == {"timm/test_vit@far"}
    assert alike(results.read(finished_job.root), both), "in the file too"
    for row in primary(both):
        if row.source != "none":
            (against,) = primary(both, source="none", backbone=row.backbone, seed=row.seed)
            assert row.scratch_value == against.value, "scratch of its own backbone group"


def test_a_target_with_another_name_is_another_target(tmp_path, bundles, paths, here):
    _, rows = run_through(
        job_of(
            tmp_path,
            {"a": bundles["a"]},
            paths,
            target_names=("one", "two"),
        )
    )
    assert len({row.trial_id for row in rows}) == 2 * 2
    assert {(row.target, row.source) for row in primary(rows)} == {
        (t, s) for t in ("one", "two") for s in ("a", "none")
    }


# ---------------------------------------------------------------- sources kept by score


def test_the_best_scored_source_alone_is_fanned_out_and_report_agrees(
    tmp_path, bundles, paths, here
):
    job = job_of(
        tmp_path,
        {"a": bundles["a"], "b": bundles["b"]},
        paths,
        select={"score": "logme", "top": 1},
    )
    assert existing_trials.trial_status(prepared(job)) == [], (
        "which sources are fanned out must be found out first"
    )
    state, rows = run_through(job)
    scored = stages.score(state, stages.prepare_shared(prepared(job)))
    best = max(scored, key=lambda row: row["logme"])["source"]
    other = "b" if best == "a" else "a"
    assert {row.source for row in rows} == {best, "none"}
    assert f"task: sources kept by logme: {best}; left out: {other}" in state.notes
    named = primary(rows, source=best)
    assert all(
        (row.score_name, row.score_value)
        == ("logme", pytest.approx(max(one["logme"] for one in scored)))
        for row in named
    )
    again, same = reported(job)
    assert alike(same, rows) and again.notes == state.notes
    text = storage.read_bytes(stages.write_report(again, same)[1][0]).decode()
    assert (
        f"| task | {best} | LogME | fine-tuned |" in text
        and f"| task | {other} | LogME | left out |" in text
    ), "the score of each stays in the report"
    assert len(existing_trials.trial_status(prepared(job))) == 2 and all(
        done for _, done in existing_trials.trial_status(prepared(job))
    )
    here.clear()
    everything = changed(job, fanout={"seeds": 1})
    _, all_rows = run_through(everything)
    assert len(here) == 1 and {row.source for row in all_rows} == {"a", "b", "none"}
    run_through(job)
    assert alike(reported(job)[1], rows), "though trials of the other source have ended meanwhile"


def test_a_source_without_a_score_is_ranked_last_and_named_and_the_others_go_on(
    tmp_path, bundles, paths, here
):
    """Weights that overflowed: one note, not the end of the run; NaN is no best score."""
    broken = task_of(
        "timm/test_vit", {"channels": 3, "size": 32}, "classification", label_state(), seed=9
    )
    with torch.no_grad():
        next(broken.backbone.parameters()).fill_(float("nan"))
    bundle.save(str(tmp_path / "broken"), broken, MODALITY, training={"transfer": ""}, metrics={})
    sources = {"broken": f"bundle:{tmp_path / 'broken'}", "a": bundles["a"], "b": bundles["b"]}
    job = job_of(tmp_path, sources, paths, select={"score": "knn", "top": 2})
    state, rows = run_through(job)
    assert {row.source for row in rows} == {"a", "b", "none"}
    named = [note for note in state.notes if "source broken has no score (" in note]
    assert len(named) == 1 and "not finite" in named[0]
    assert [row["source"] for row in stages.score(state, stages.prepare_shared(prepared(job)))][
        -1
    ] == "broken"


def test_sources_that_a_target_names_now_are_those_that_are_fanned_out(
    tmp_path, bundles, paths, here
):
    """What an earlier run kept by score is no answer for another choice of sources."""
    job = job_of(
        tmp_path,
        {"a": bundles["a"], "b": bundles["b"]},
        paths,
        select={"score": "logme", "top": 1},
    )
    _, rows = run_through(job)
    (best,) = {row.source for row in rows} - {"none"}
    other = "b" if best == "a" else "a"
    dumped = job.model_dump(mode="json")
    dumped["targets"]["task"]["sources"] = [other]
    job = Job.model_validate(dumped)
    ended = existing_trials.trial_status(prepared(job))
    assert best not in {one.source for one, _ in ended} and not (
        ended and all(done for _, done in ended)
    ), "else `run` says that nothing is to run"
    assert best not in {row.source for row in reported(job)[1]}
    assert {row.source for row in run_through(job)[1]} == {other, "none"}


def test_rows_that_were_there_before_have_their_sources_score_too(finished_job, bundles, here):
    sources = {name: {"backbone": bundles[name]} for name in "ab"}
    fanout_ = {"seeds": 1, "select": {"score": "knn", "top": 2}}
    _, rows = run_through(changed(finished_job, sources=sources, fanout=fanout_))
    assert len(here) == 1 and {row.score_name for row in primary(rows) if row.source != "none"} == {
        "knn"
    }


def test_every_score_is_recorded_and_audited_where_there_is_a_choice(
    tmp_path, bundles, paths, here
):
    sources = {"a": bundles["a"], "b": bundles["b"]}
    job = job_of(tmp_path, sources, paths)
    state, rows = run_through(job)
    assert set(state.source_scores) == {"a|task", "b|task"}
    for name in "ab":
        kept = json.loads(primary(rows, source=name)[0].source_scores or "")
        assert kept["logme"]["low"] < kept["logme"]["value"] < kept["logme"]["high"]
        assert kept["frechet"] == {"value": None, "low": None, "high": None}
    assert {row.source_scores for row in primary(rows, source="none")} == {None}
    assert {row.score_name for row in rows} == {None}, "no score chose the sources"
    again, same = reported(job)
    assert again.source_scores == state.source_scores and alike(same, rows)
    text = storage.read_bytes(stages.write_report(again, same)[1][0]).decode()
    assert "## What the scores were worth" in text and "| image | LogME |" in text
    assert "undefined" in text and "the source is a checkpoint" in text


def test_shift_alone_is_measured_where_there_is_no_choice(tmp_path, bundles, here):
    """And that of the test rows, whose labels it reads, when all trials have ended."""
    paths = image_files(tmp_path / "data", {"train": 36, "validation": 18, "test": 36})
    job = job_of(tmp_path, {"a": bundles["a"]}, paths)
    state, rows = run_through(job)
    (pair,) = state.source_scores.values()
    source, own = pair.shifts
    assert pair.scores == {} and {row.source_scores for row in rows} == {None}
    assert source.others == "source a" and not source.within_target
    assert own.within_target and own.features_of == "a"
    assert own.covariate.low <= 0.5 <= own.covariate.high and own.concept is not None
    again, same = reported(job)
    assert again.source_scores == state.source_scores
    text = storage.read_bytes(stages.write_report(again, same)[1][0]).decode()
    assert "## Shift" in text and "What the scores were worth" not in text
    assert run_through(job)[0].source_scores == state.source_scores


def test_a_score_that_no_source_has_leaves_none_out(tmp_path, bundles, paths, here):
    job = job_of(
        tmp_path,
        {"a": bundles["a"], "b": bundles["b"]},
        paths,
        select={"score": "mmd", "top": 1},
    )
    state, rows = run_through(job)
    assert {row.source for row in rows} == {"a", "b", "none"}
    assert "task: no source has a mmd score, so none is left out by it" in state.notes
    assert {row.score_value for row in primary(rows, source="a")} == {None}


# ---------------------------------------------------------------- bad targets, bad labels


def damaged(paths: dict[str, str], folder: Path, split: str, count: int) -> dict[str, str]:
    """The same files with ``count`` pictures of one split cut short."""
    table = pq.read_table(paths[split])
    pictures = [
        picture[:30] if i < count else picture
        for i, picture in enumerate(table["picture"].to_pylist())
    ]
    folder.mkdir(exist_ok=True)
    pq.write_table(
        table.set_column(
            table.schema.get_field_index("picture"), "picture", pa.array(pictures, pa.binary())
        ),
        folder / f"{split}.parquet",
    )
    return {**paths, split: str(folder / f"{split}.parquet")}


def with_bad_target(job: Job, paths: dict[str, str]) -> Job:
    """The job with target ``bad`` of the given files beside target ``task``."""
    dumped = job.model_dump(mode="json")
    dumped["targets"]["bad"] = dumped["targets"]["task"]
    return with_data(Job.model_validate(dumped), "bad", **paths)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_target_over_its_budget_of_bad_rows_is_left_out_and_the_other_goes_on(
    finished_job, tmp_path, paths, here, split
):
    """And `report` still tells of it."""
    job = with_bad_target(finished_job, damaged(paths, tmp_path / "damaged", split, 9))
    state, rows = run_through(job)
    assert set(state.unusable_targets) == {"bad"} and state.unusable_targets["bad"].startswith(
        f"9 of {36 if split == 'train' else 18} rows cannot be used"
    )
    assert {row.target for row in rows} == {"task"} and len(primary(rows)) == 2
    failed = stages.failures(state, rows)
    assert len(failed) == 1 and failed[0].startswith("targets.bad: 9 of ")
    assert any(
        line.startswith("warning: targets.bad is left out: 9 of") for line in state.progress.lines
    )
    assert any(note.startswith("bad: left out: 9 of") for note in state.notes), "in the report"
    again, same = reported(job)
    assert alike(same, rows)
    assert again.notes == state.notes and again.unusable_targets == state.unusable_targets
    assert stages.failures(again, same) == failed, "so `report` exits with 1 as the run did"
    if split == "train":
        _, rows = run_through(with_data(job, "bad", max_bad_rows=0.5))
        assert {row.target for row in primary(rows)} == {"task", "bad"}


def test_a_target_that_was_left_out_is_tried_again(finished_job, tmp_path, paths, here):
    """Its budget is no part of any key, and yet a larger one is enough."""
    job = changed(finished_job, fanout={"seeds": 1, "select": {"score": "knn", "top": 1}})
    job = with_bad_target(job, damaged(paths, tmp_path / "damaged", "train", 9))
    run_through(job)
    job = with_data(job, "bad", max_bad_rows=0.5)
    ended = existing_trials.trial_status(prepared(job))
    assert not (ended and all(done for _, done in ended)), "else `run` says that nothing is to run"
    here.clear()
    state, rows = run_through(job)
    assert (
        len(here) == 2
        and state.unusable_targets == {}
        and {row.target for row in primary(rows)} == {"task", "bad"}
    )


def test_where_every_target_is_left_out_nothing_runs(tmp_path, bundles, paths, here):
    job = with_data(
        job_of(tmp_path, {"a": bundles["a"]}, paths),
        "task",
        **damaged(paths, tmp_path / "damaged", "validation", 9),
    )
    with pytest.raises(ValueError, match=r"^targets\.task: 9 of 18 rows cannot be used"):
        run_through(job)
    assert here == []


def test_bad_rows_within_the_budget_are_left_out_and_noted(tmp_path, bundles, paths, here):
    job = with_data(
        job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("scratch",)),
        "task",
        **damaged(paths, tmp_path / "damaged", "train", 2),
        max_bad_rows=0.1,
    )
    state, rows = run_through(job)
    assert state.unusable_targets == {} and {row.n_train for row in rows} == {34}
    (note,) = state.notes
    assert (
        note.startswith("task: train 36, validation 18, test 18 rows")
        and "2 rows left out: train " in note
        and "train.parquet row 0: " in note
    )
    assert reported(job)[0].notes == state.notes


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_never_seen_in_training_is_refused_before_anything_starts(
    tmp_path, bundles, paths, split, monkeypatch
):
    monkeypatch.setattr(targets, "CHECKED_ROWS", 7)
    table = pq.read_table(paths[split])
    labels = [*table["class"].to_pylist()[:-1], "class 9"]
    pq.write_table(
        table.set_column(table.schema.get_field_index("class"), "class", pa.array(labels)),
        tmp_path / "odd.parquet",
    )
    job = with_data(
        job_of(tmp_path, {"a": bundles["a"]}, paths),
        "task",
        **{split: str(tmp_path / "odd.parquet")},
    )
    with pytest.raises(ValueError) as caught:
        prepared(job)
    message = str(caught.value)
    assert message.startswith(
        f"targets.task.data, {split} split: column class: label 'class 9' is in no training row"
    )


def test_all_problems_of_a_job_are_told_at_once(tmp_path, bundles, paths):
    job = job_of(
        tmp_path,
        {"a": bundles["a"], "gone": f"bundle:{tmp_path / 'nowhere'}"},
        paths,
        target_names=("one", "two"),
    )
    job = with_data(
        with_data(job, "one", columns={"image": "pictures", "label": "class"}),
        "two",
        test=str(tmp_path / "none.parquet"),
    )
    with pytest.raises(ValueError) as caught:
        prepared(job)
    message = str(caught.value).splitlines()
    assert any("nowhere" in line for line in message) and any(
        "targets.one.data.columns.image" in line and "picture" in line for line in message
    )
    assert any("none.parquet" in line for line in message)


def test_what_a_job_names_twice_is_refused(tmp_path, bundles, paths):
    """Its trials would run at the same time in one folder, and be in the table twice."""
    job = job_of(tmp_path, {"a": bundles["a"]}, paths)
    target = {**job.model_dump(mode="json")["targets"]["task"], "label_fractions": [1, 1.0, 1.0]}
    twice = {"techniques": ["full", {"lora": {"rank": 4}}, "full"], "baselines": ["majority"] * 2}
    job = changed(job, targets={"task": {**target, "sources": ["a", "a"]}}, **twice)
    with pytest.raises(ValueError) as caught:
        prepared(job)
    found = [line.partition(" is there twice")[0] for line in str(caught.value).splitlines()]
    assert found == [
        "techniques: full",
        "baselines: majority",
        "targets.task.sources: a",
        "targets.task.label_fractions: 1.0",
    ]


# ----------------------------------------------------- rows of a target that are also in a source


def with_source_data(job: Job, name: str, train: str, form: str = "auto", columns=COLUMNS) -> Job:
    """The job with a source that was pretrained on those files; its bundle is put in its place."""
    dumped = job.model_dump(mode="json")
    dumped["sources"][name] = {
        "data": {
            "train": train,
            "modality": {"image": {"size": 32}},
            "columns": columns,
            "format": form,
            "validation_fraction": 0.0,
        },
        "backbone": "timm/test_vit",
        "objective": "classification",
        "train": {"steps": 2, "global_batch": 4},
    }
    made = Job.model_validate(dumped)
    saved_vit(Path(source.plan_source(made, name).bundle_uri), 7)
    return made


@pytest.mark.slow
def test_a_part_replaces_its_own_results_and_leaves_the_others(tmp_path, bundles, paths, here):
    job = job_of(
        tmp_path,
        {"a": bundles["a"], "b": bundles["b"]},
        paths,
        target_names=("task", "other"),
    )
    run_through(job)
    metadata = Path(job.root, "facts.json")
    before = metadata.read_bytes()
    now = job.model_dump(mode="json")["targets"]
    now["task"]["train"]["lr"] = 0.02

    def shown(current: bool) -> list[tuple[str, str]]:
        rows = [row for row in results.read(job.root) if row.current is current]
        return sorted({row.trial_id: (row.target, row.source) for row in rows}.values())

    every = sorted((target, source) for target in now for source in ("a", "b", "none"))
    of_a = changed(job, targets=now, only=["a"])
    _, rows = run_through(of_a)
    assert shown(current=True) == every, "each once"
    assert shown(current=False) == [("task", "a"), ("task", "none")]
    assert alike(reported(of_a)[1], rows)
    run_through(changed(job, targets=now, only=["task"]))
    assert shown(current=True) == every
    assert shown(current=False) == [("task", "a"), ("task", "b"), ("task", "none")]
    assert metadata.read_bytes() == before, "what the whole run told the report"


def test_a_part_is_checked_without_the_rest(tmp_path, bundles, paths, monkeypatch):
    job = job_of(tmp_path, {"a": bundles["a"], "b": bundles["b"]}, paths)
    words = {
        "data": {"uri": "x", "modality": "text", "columns": {"text": "t", "label": "l"}},
        "objective": "classification",
    }
    targets_ = {**job.model_dump(mode="json")["targets"], "words": words}
    job = changed(job, targets=targets_, baselines=["majority", "bag_of_words"])
    state = prepared(changed(job, only=["a"]))
    assert list(state.sources) == ["a"]
    assert list(state.targets) == list(state.job.targets) == ["task"], "the bundle reads no text"
    monkeypatch.setattr(
        job_state, "_modality_name", lambda stage: "text" if stage.name == "b" else "image"
    )
    state = prepared(changed(job, only=["task"]))
    assert list(state.sources) == list(state.job.sources) == ["a"], "b reads no images"


def test_files_that_are_known_by_size_and_time_are_reported(tmp_path, bundles, paths, here):
    job = job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("scratch",))
    assert prepared(job).notes == []
    state = prepared(with_data(job, "task", identity="stat"))
    assert len(state.notes) == 1 and state.notes[0] in state.progress.lines
    assert state.notes[0].startswith(
        "targets.task: its local files are identified by size and modification time, not by content"
    )


def test_a_job_that_carries_nothing_over_is_reported(tmp_path, bundles, paths):
    job = job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=())
    said = "targets.task: scratch is its only technique, so no source is transferred to it"
    assert prepared(job).progress.lines == [said]
    assert prepared(changed(job, techniques=["full"])).progress.lines == []
    said = "the job has no targets: its sources are pretrained, nothing is compared"
    assert prepared(changed(job, targets={})).progress.lines == [said]


def test_a_target_whose_file_changes_is_an_error(tmp_path, bundles, paths, here):
    for split, path in paths.items():
        (tmp_path / f"{split}.parquet").write_bytes(Path(path).read_bytes())
    job = with_data(
        job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("scratch",)),
        "task",
        **{split: str(tmp_path / f"{split}.parquet") for split in paths},
    )
    state = prepared(job)
    table = pq.read_table(tmp_path / "test.parquet")
    pq.write_table(table.slice(1), tmp_path / "test.parquet")
    with pytest.raises(file_identity.ChangedFileError, match=r"test\.parquet was changed"):
        stages.prepare_shared(state)


def test_a_trial_whose_streamed_files_change_leaves_no_record(tmp_path, bundles, paths, here):
    """Rows that are not held in memory name image files, and one of them changes while the trial
    runs.
    """
    table = pq.read_table(paths["train"])
    names = [str(tmp_path / f"{i}.png") for i in range(len(table))]
    for name, data in zip(names, table["picture"].to_pylist(), strict=True):
        Path(name).write_bytes(data)
    pq.write_table(
        table.set_column(table.schema.get_field_index("picture"), "picture", pa.array(names)),
        tmp_path / "train.parquet",
    )
    job = job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("scratch",), seeds=1)
    job = with_data(job, "task", train=str(tmp_path / "train.parquet"), decode="train")
    state = prepared(job)
    shared = stages.prepare_shared(state)
    (one,) = planned_trials.final_trials(
        state, list(shared.backbone_groups.values()), {"task": {"a"}}, {}
    )
    Path(names[3]).write_bytes(table["picture"][4].as_py())
    with pytest.raises(file_identity.ChangedFileError, match=f"^{names[3]} was changed"):
        trial.run(one, shared, Ranks())
    assert trial.read_record(job.root, one.folder) is None
    state = prepared(job)
    shared = stages.prepare_shared(state)
    (again,) = planned_trials.final_trials(
        state, list(shared.backbone_groups.values()), {"task": {"a"}}, {}
    )
    assert again.id != one.id and trial.run(again, shared, Ranks()).status == "done"


def changed_pictures(path: str, places: list[int], quality: int = 90) -> pa.Table:
    """Rows of a file, their pictures encoded anew as JPEG: other bytes, nearly the same pixels."""
    table = pq.read_table(path).take(places)
    out = []
    for picture in table["picture"].to_pylist():
        buffer = io.BytesIO()
        with PIL.Image.open(io.BytesIO(picture)) as image:
            image.save(buffer, "JPEG", quality=quality, subsampling=0)
        out.append(buffer.getvalue())
    return table.set_column(table.schema.get_field_index("picture"), "picture", pa.array(out))


def with_target(job: Job, **fields) -> Job:
    dumped = job.model_dump(mode="json")
    dumped["targets"]["task"] |= fields
    return Job.model_validate(dumped)


@pytest.fixture
def leaking(tmp_path, bundles, paths):
    """A job whose source holds 5 of the target's test pictures as they are and 3 encoded anew."""
    test, train = pq.read_table(paths["test"]), pq.read_table(paths["train"])
    pq.write_table(
        pa.concat_tables(
            [train.slice(0, 20), test.slice(2, 5), changed_pictures(paths["test"], [10, 11, 17])]
        ),
        tmp_path / "corpus.parquet",
    )
    return with_source_data(
        job_of(tmp_path, {"a": bundles["a"]}, paths),
        "corpus",
        str(tmp_path / "corpus.parquet"),
    )


@pytest.mark.parametrize(
    ("mode", "left_out"),
    [
        ("none", []),
        pytest.param("exact", [2, 3, 4, 5, 6], marks=pytest.mark.slow),
        ("near", [2, 3, 4, 5, 6, 10, 11, 17]),
    ],
)
def test_test_rows_that_stand_in_a_source_are_counted_and_left_out_where_the_job_says_so(
    leaking, here, mode, left_out
):
    job = with_target(leaking, drop_overlap=mode)
    state, rows = run_through(job)
    counted = (
        "task: 5 of 18 test rows are also in source corpus, 3 more nearly so (perceptual hash)"
    )
    assert counted in state.notes and counted in state.progress.lines
    message = (
        f"task: {len(left_out)} of 18 test rows left out because they are also in a source "
        f"(drop_overlap: {mode})"
    )
    assert (message in state.notes) == (mode != "none")
    assert (any("a is a checkpoint" in note for note in state.notes)) == (mode != "none")
    kept = [i for i in range(18) if i not in left_out]
    for row in primary(rows):
        assert row.n_eval == len(kept) and row.split_origin.startswith(
            "validation files; test files"
        )
        assert trial.read_predictions(job.root, row.folder, row.seed).rows.tolist() == kept, (
            "scratch and every source alike"
        )
        assert row.split_origin.endswith(f"left out ({mode})") == (mode != "none")
    again, same = reported(job)
    assert (
        again.notes == state.notes
        and again.num_dropped_test_rows == state.num_dropped_test_rows == {"task": len(left_out)}
        and alike(same, rows)
    )
    text = storage.read_bytes(stages.write_report(again, same)[1][0]).decode()
    assert (
        f"test 18 rows (validation files; test files); {len(left_out)} of the test rows are "
        "also in a source and were left out" in text
    ) == bool(left_out)
    assert counted in text
    here.clear()
    run_through(job)
    assert here == []
    other = changed(job, fanout={"seeds": 1, "select": {"top": 1}})
    assert reported(other)[0].notes == [], "notes of another job are none of this one"


def test_another_way_to_leave_rows_out_is_other_trials(leaking, tmp_path, here, paths):
    """Also when a source's rows change: others may be left out then."""
    key = prepared(leaking).targets["task"].key
    assert prepared(with_target(leaking, drop_overlap="exact")).targets["task"].key != key
    before = prepared(with_target(leaking, drop_overlap="near")).targets["task"].key
    pq.write_table(pq.read_table(paths["train"]).slice(0, 22), tmp_path / "corpus.parquet")
    assert (
        prepared(leaking).targets["task"].key == key
        and prepared(with_target(leaking, drop_overlap="near")).targets["task"].key != before
    )


def test_rows_are_read_once_to_be_compared(leaking, here, monkeypatch):
    stages.prepare_shared(prepared(leaking))
    monkeypatch.setattr(duplicates, "SignatureMaker", None)
    stages.prepare_shared(prepared(leaking))


def test_repeats_of_a_targets_own_training_rows_are_reported(tmp_path, bundles, paths, here):
    pq.write_table(
        pa.concat_tables(
            [
                pq.read_table(paths["test"]),
                pq.read_table(paths["train"]).slice(3, 2),
                changed_pictures(paths["train"], [9]),
            ]
        ),
        tmp_path / "test.parquet",
    )
    job = with_target(
        with_data(
            job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("scratch",)),
            "task",
            test=str(tmp_path / "test.parquet"),
        )
    )
    state = prepared(job)
    shared = stages.prepare_shared(state)
    assert state.notes == [
        "task: 2 of 21 test rows are also in its own training rows, 1 more nearly so "
        "(perceptual hash)"
    ]
    assert all(len(data.test) == 21 for data in shared.targets.values()), (
        "told, and left to the user"
    )


def test_a_target_without_a_row_to_test_on_is_left_out_with_its_reason(
    tmp_path, bundles, paths, here
):
    job = with_source_data(
        job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("scratch",)),
        "corpus",
        paths["test"],
    )
    state = prepared(with_target(job, drop_overlap="exact"))
    with pytest.raises(
        ValueError,
        match=r"targets\.task\.drop_overlap: all 18 test rows are also in a source and none is "
        r"left",
    ):
        stages.prepare_shared(state)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            "simclr",
            "simclr is for sources; a target's rows have labels, or are texts to model: "
            "behaviour_cloning, classification, clm, .*multilabel",
        ),
        ("mlm", "mlm reads packed documents, and image rows cannot be packed: it is for text"),
    ],
)
def test_objectives_without_labels_are_for_sources_or_for_texts(
    tmp_path, bundles, paths, objective, message
):
    job = with_target(job_of(tmp_path, {"a": bundles["a"]}, paths), objective=objective)
    with pytest.raises(ValueError, match=rf"targets\.task\.objective: {message}"):
        prepared(job)


def test_near_duplicates_of_other_rows_than_images_are_refused(tmp_path, bundles):
    frame = pa.table({"words": [f"a {i}" for i in range(40)], "class": [i % 2 for i in range(40)]})
    pq.write_table(frame, tmp_path / "texts.parquet")
    dumped = job_of(
        tmp_path, {"a": bundles["a"]}, {"train": str(tmp_path / "texts.parquet")}
    ).model_dump(mode="json")
    dumped["targets"]["task"] |= {"drop_overlap": "near"}
    dumped["targets"]["task"]["data"] |= {
        "modality": "table",
        "columns": {"features": "words", "label": "class"},
        "test_fraction": 0.2,
    }
    with pytest.raises(
        ValueError,
        match=r"targets\.task\.drop_overlap: near duplicates are found among rows of "
        r"audio, image, series, text, these rows are table: use exact",
    ):
        prepared(Job.model_validate(dumped))


def test_sources_too_large_to_scan_are_said_to_be_and_are_read_to_leave_rows_out(
    leaking, here, monkeypatch
):
    monkeypatch.setattr(overlap, "MAX_ROWS", 25)
    state = prepared(leaking)
    stages.prepare_shared(state)
    assert state.notes == [
        "task: too many rows to look for its test rows in source corpus; drop_overlap: exact "
        "or near reads them all",
        "task: too many rows to look for its test rows in its own training rows",
    ]
    state = prepared(with_target(leaking, drop_overlap="near"))
    stages.prepare_shared(state)
    assert any("8 of 18 test rows left out" in note for note in state.notes)


# ---------------------------------------------------------------- what a target may have of its own


def test_bases_that_read_alike_keep_their_own_architectures(tmp_path, bundles, paths, here):
    task = task_of(
        "timm/test_resnet", {"channels": 3, "size": 32}, "classification", label_state(), seed=5
    )
    bundle.save(str(tmp_path / "resnet"), task, MODALITY, training={"transfer": ""}, metrics={})
    shared = stages.prepare_shared(
        prepared(job_of(tmp_path, {"a": bundles["a"], "b": f"bundle:{tmp_path / 'resnet'}"}, paths))
    )
    assert {
        shared.targets["task", group.key].arch.name for group in shared.backbone_groups.values()
    } == {
        "timm/test_vit",
        "timm/test_resnet",
    }
    for group in shared.backbone_groups.values():
        data = shared.targets["task", group.key]
        assert (
            data.arch == group.arch
            and data.train is shared.targets["task", next(iter(shared.backbone_groups))].train
        ), "decoded once"


def test_a_target_read_in_another_size_is_other_trials(tmp_path, bundles, paths, here, monkeypatch):
    kind = registry.get("modality", "image")
    monkeypatch.setattr(kind, "target_options", ("size",))
    job = job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("scratch",))
    _, rows = run_through(job)
    here.clear()
    larger = with_data(job, "task", modality={"image": {"size": 48}})
    state, other = run_through(larger)
    assert len(here) == 1 and not {row.trial_id for row in other} & {row.trial_id for row in rows}
    sizes = {}
    for one in (job, larger):
        state = prepared(one)
        (data,) = stages.prepare_shared(state).targets.values()
        sizes[data.key] = (
            data.train.arrays["image"].shape[-1],
            data.arch.inputs["size"],
            data.modality.options["size"],
        )
    assert list(sizes.values()) == [(32, 32, 32), (48, 48, 48)], (
        "and features of its rows are kept under another key"
    )


# ---------------------------------------------------------------- where splits come from


def test_every_row_says_where_its_splits_come_from_and_two_ways_never_share_a_table(
    tmp_path, bundles, paths, here
):
    job = job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("scratch",))
    _, files = run_through(job)
    random = with_data(
        job, "task", validation=None, test=None, test_fraction=0.3, validation_fraction=0.2
    )
    state, drawn = run_through(random)
    assert {row.split_origin for row in files} == {"validation files; test files"}
    assert {row.split_origin for row in drawn} == {
        "test: random 0.3 of train by hash of the row; validation: random 0.2 of train by "
        "hash of the row"
    }
    both = results.read(job.root)
    assert {row.split_origin for row in both} == {
        row.split_origin for row in [*files, *drawn]
    } and len(both) == len(files) + len(drawn)
    entries, where = stages.write_report(state, both)
    names = {f"task [{row.split_origin}]" for row in both}
    assert {entry.target for entry in entries} == names and all(
        entry.n_seeds == 1 for entry in entries
    )
    text = storage.read_bytes(where[0]).decode()
    assert all(name.split(" [")[1].rstrip("]") in text for name in names)
    entries, where = stages.write_report(state, drawn)
    assert {entry.target for entry in entries} == {"task"}
    assert "test: random 0.3 of train by hash of the row" in storage.read_bytes(where[0]).decode()


# ---------------------------------------------------------------- targets without classes


def test_a_score_that_reads_labels_needs_them(tmp_path, bundles, paths, here, monkeypatch):
    monkeypatch.setattr(scoring, "label_kinds", lambda *_: ())
    job = job_of(tmp_path, {"a": bundles["a"]}, paths, techniques=("scratch",))
    with pytest.raises(
        ValueError,
        match=r"fanout\.select: targets\.task is classification, and logme scores sources by "
        r"classes or label sets or numbers of rows: choose a score that reads no labels",
    ):
        prepared(changed(job, fanout={"seeds": 2, "select": {"top": 1}}))
    prepared(changed(job, fanout={"seeds": 2, "select": {"score": "mmd", "top": 1}}))


# ---------------------------------------------------------------- the report's files


def test_subgroups_of_test_rows_stand_in_the_table_and_the_report_and_train_nothing(
    tmp_path, bundles, here
):
    """Named after the trials ran: their kept predictions are told apart."""
    files = image_files(tmp_path / "data", {"train": 36, "validation": 18, "test": 66}, classes=2)
    table = pq.read_table(files["test"])
    pq.write_table(
        table.append_column(
            "sex", pa.array([["female", "male", None][i % 3 if i < 60 else 0] for i in range(66)])
        ),
        files["test"],
    )
    job = job_of(tmp_path, {"a": bundles["a"]}, files)
    _, before = run_through(job)
    assert len(here) == 2 and not [row for row in before if "@" in (row.metric or "")]
    dumped = job.model_dump(mode="json")
    dumped["targets"]["task"]["subgroups"] = ["sex"]
    state, rows = run_through(Job.model_validate(dumped))
    assert len(here) == 2, "no trial is run anew"
    parts = [row for row in rows if "@" in (row.metric or "")]
    assert {row.metric for row in parts} == {
        "accuracy@sex=female",
        "accuracy@sex=male",
        "accuracy@sex=not recorded",
    } and len(parts) == 2 * 3
    assert {(row.metric.partition("=")[2], row.n_eval) for row in parts} == {
        ("female", 26),
        ("male", 20),
        ("not recorded", 20),
    }
    assert all(
        row.split == "test" and row.value_low <= row.value <= row.value_high and row.gain is None
        for row in parts
    )
    whole_rows = {row.trial_id: row.value for row in primary(rows)}
    for trial_id, value in whole_rows.items():
        mine = [row for row in parts if row.trial_id == trial_id]
        assert value == pytest.approx(sum(row.value * row.n_eval for row in mine) / 66)
    _, (markdown, _) = stages.write_report(state, rows)
    text = storage.read_bytes(markdown).decode()
    assert "### Subgroups" in text and "| sex=female | 26 |" in text and "### Calibration" in text
    assert alike(reported(Job.model_validate(dumped))[1], rows)
    assert alike(reported(job)[1], before)


def test_a_dry_run_says_how_many_rows_a_verdict_would_rest_on(tmp_path, bundles):
    """59 test rows with 3 of one class are too few; so are few patients with many rows."""

    def task(positives, **data):
        folder = tmp_path / f"{positives}{len(data)}"
        files = image_files(folder, {"train": 40, "validation": 20, "test": 59}, classes=2)
        for split, path in files.items():
            table = pq.read_table(path)
            column = pa.array([int(i < positives) for i in range(len(table))], pa.int64())
            table = table.set_column(table.schema.get_field_index("class"), "class", column)
            pq.write_table(
                table.append_column(
                    "patient", pa.array([f"{split}{i % 4}" for i in range(len(table))])
                ),
                path,
            )
        return dry_run.describe(
            prepared(with_data(job_of(tmp_path, {"a": bundles["a"]}, files), "task", **data))
        )

    assert (
        "target task, rows outside of the most frequent class: train 3, validation 3, test 3; "
        "too few for a verdict, which needs 10 in test" in task(3)
    )
    assert (
        "target task, rows outside of the most frequent class: train 15, validation 5, test 15; "
        "a verdict needs 10 in test" in task(15)
    )
    lines = task(15, group="patient")
    assert (
        "target task, groups outside of the most frequent class: train 4, validation 4, test 4; "
        "too few for a verdict, which needs 10 in test" in lines
    )


def test_a_dry_run_counts_the_trials_that_try_the_best_draws_again(tmp_path, bundles, paths):
    job = job_of(
        tmp_path,
        {"a": bundles["a"]},
        paths,
        seeds=2,
        trials=8,
        search={"lr": [1e-4, 1e-1]},
    )
    lines = dry_run.describe(prepared(job))
    assert any(
        "2 entries: 28 search trials (12 of them try the best draws again) and 4 final trials of 3 "
        "steps" in line
        for line in lines
    )
    assert any(line.startswith("in all: 32 trials, 96 steps") for line in lines)
    few = {**job.fanout.model_dump(mode="json"), "search": {"weight_decay": [0.0, 0.1, 0.2]}}
    lines = dry_run.describe(prepared(changed(job, fanout=few)))
    assert any("2 entries: 18 search trials (12 of them" in line for line in lines), "3 draws each"


def test_a_dry_run_counts_no_steps_of_heads_that_are_solved(tmp_path, bundles, paths):
    job = job_of(
        tmp_path, {"a": bundles["a"]}, paths, seeds=2, techniques=("scratch", "linear_probe")
    )
    lines = dry_run.describe(prepared(job))
    assert any(
        "4 final trials of 3 steps (linear_probe: the head is solved, no training steps) on" in line
        for line in lines
    )
    assert any(line.startswith("in all: 4 trials, 6 steps") for line in lines)


def test_a_source_that_is_a_checkpoint_without_data_is_made_and_its_note_kept(tmp_path):
    backbone = bundle.build_backbone(
        Architecture("timm/test_resnet", {}, {"channels": 3, "size": 32})
    )
    weights = {
        name.removeprefix("model."): tensor for name, tensor in backbone.state_dict().items()
    }
    save_file(weights, tmp_path / "w.safetensors")
    spec = {"backbone": "timm/test_resnet", "init": f"file:{tmp_path / 'w.safetensors'}"}
    job = Job.model_validate(
        {"name": "toy", "storage": str(tmp_path / "runs"), "sources": {"s": spec}}
    )

    def run() -> tuple[job_state.JobState, list[str]]:
        progress = Silent()
        state = job_state.JobState(job, progress, sources={"s": source.plan_source(job, "s")})
        stages.pretrain(state)
        return state, progress.lines

    made, lines = run()
    assert [line.startswith("sources.s: images are read at") for line in made.notes] == [True]
    assert len([line for line in lines if "images are read at" in line]) == 1
    again, lines = run()
    assert again.notes == made.notes and "done before" in lines[0]
    uri = made.sources["s"].bundle_uri
    manifest = bundle.load(uri).manifest
    assert (
        row_checks.findings_from_metadata(manifest.training)[0].line("sources.s") == made.notes[0]
    )


def test_findings_of_a_bundle_that_an_earlier_version_wrote_are_sentences():
    kept = {"findings": ["images are read at 32 pixels", ["few rows", True, False]]}
    found = row_checks.findings_from_metadata(kept)
    assert [one.line("s") for one in found] == [
        "s: images are read at 32 pixels",
        "warning: s: few rows",
    ]


def test_records_are_read_several_at_once_and_each_once(tmp_path, monkeypatch):
    """On S3 each read waits for an answer: a thousand trials would take minutes one after the
    other.
    """
    ids = [f"trial-{number}" for number in range(8)]
    for one in ids[1:]:
        checksums.write_document(
            f"{tmp_path}/trials/{one}/{trial.RECORD}", {"rows": [], "trial_id": one}
        )
    all_wait, read, asked = threading.Barrier(8), storage.read_bytes, []

    def read_together(uri):
        asked.append(uri)
        all_wait.wait(timeout=30)  # one after the other, nobody would ever come to the end
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", read_together)
    found = trial.read_records(str(tmp_path), {one: f"trials/{one}" for one in ids})
    assert {name: record.trial_id for name, record in found.items()} == {
        one: one for one in ids[1:]
    }
    assert len(asked) == 8
