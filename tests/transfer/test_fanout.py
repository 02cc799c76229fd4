"""What runs, in which company, what is stopped early, which bundles stay and what can never run:
the fan-out's decisions, without a cluster.
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import itertools
import json
import math
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray.tune.schedulers import TrialScheduler
from rich.console import Console
from stage_runs import Silent
from toys import image_splits, job_of, shared_of, trial_of

from pipeline.config.schema import ComponentConfig, Fanout, Job
from pipeline.modalities.image import Image
from pipeline.report.trial_record import TrialRecord
from pipeline.train import launch
from pipeline.train.launch import ClusterError
from pipeline.train.progress import Progress
from pipeline.train.ranks import Ranks
from pipeline.transfer import fanout
from pipeline.transfer import trial as one_trial
from pipeline.transfer.fanout import GroupedASHA
from pipeline.transfer.grid import Trial
from pipeline.transfer.heartbeat_board import HeartbeatBoard
from pipeline.transfer.scoring import SourceTargetPair, score_pair

paths = image_splits(30, 12, 12)


@pytest.fixture(scope="module")
def world(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    job = job_of(folder, paths)
    return job, shared_of(folder, job, paths)


# ---------------------------------------------------------------- ASHA within each entry


def play(entries: dict[int, str], signed_metric: dict[int, list[float]]) -> dict[int, float]:
    """Return the percent at which each trial was stopped.

    They validate in turns, in the order of ``signed_metric``, as often as they have numbers.

    What Tune does with a trial: added, told of, completed; its last report says that it is
    finished.
    """
    scheduler = GroupedASHA(entries)
    running = {
        unit: SimpleNamespace(
            trial_id=f"trial-{unit}", config={"item_index": unit}, last_result=None
        )
        for unit in signed_metric
    }
    for one in running.values():
        scheduler.on_trial_add(None, one)
    stopped = {}
    for k in range(max(map(len, signed_metric.values()))):
        for unit, values in signed_metric.items():
            if unit not in running or k >= len(values):
                continue
            one, percent = running[unit], 100 * (k + 1) / len(values)
            one.last_result = {
                "signed_metric": values[k],
                "percent": percent,
                "training_iteration": k + 1,
            }
            if scheduler.on_trial_result(None, one, one.last_result) == TrialScheduler.STOP:
                stopped[unit] = percent
                scheduler.on_trial_complete(None, running.pop(unit), one.last_result)
            elif k + 1 == len(values):
                last = {
                    "signed_metric": 0.0,
                    "percent": 100.0,
                    "done_trials": 1,
                    "failed_trials": 0,
                    "finished": True,
                }
                assert scheduler.on_trial_result(None, one, last) == TrialScheduler.CONTINUE
                scheduler.on_trial_complete(None, running.pop(unit), last)
    return stopped


@pytest.mark.parametrize("times", [1, 5, 6, 10, 41])
@pytest.mark.parametrize("course", ["rising", "falling", "nan"])
def test_a_trial_without_rivals_is_never_stopped(times, course):
    values = {
        "rising": np.arange(times),
        "falling": -np.arange(times),
        "nan": np.full(times, np.nan),
    }[course]
    assert play({0: "a"}, {0: values.tolist()}) == {}


@pytest.mark.parametrize("times", [5, 6, 10, 41])
def test_the_worse_trials_of_an_entry_are_stopped_at_the_first_rung(times):
    stopped = play(
        dict.fromkeys(range(8), "a"), {unit: [1.0 - unit / 10] * times for unit in range(8)}
    )
    assert set(stopped) == set(range(1, 8)), (
        "told of from the best to the worst, each is below the half before it"
    )
    first = (
        math.ceil(times * 0.2) / times * 100
    )  # the first validation at or after 20 percent of the steps
    assert all(percent == pytest.approx(first) for percent in stopped.values())


@pytest.mark.parametrize("times", [1, 5, 6, 10, 41])
def test_the_best_trial_of_an_entry_is_never_stopped(times):
    rng = np.random.default_rng(times)
    some = 0
    for _ in range(30):
        order = rng.permutation(9).tolist()
        stopped = play(
            dict.fromkeys(order, "a"),
            {unit: [unit / 10 + 0.01 * k for k in range(times)] for unit in order},
        )
        assert 8 not in stopped
        rungs = {round(100 * math.ceil(times * share) / times) for share in (0.2, 0.4, 0.8)}
        assert {round(percent) for percent in stopped.values()} <= rungs
        some += len(stopped)
    assert some > 60, "and others are"


@pytest.mark.parametrize(
    ("falls", "at"),
    [
        ([0.9, 0.1, 0.05, 0.05, 0.0], 40.0),
        ([0.9, 0.8, 0.1, 0.05, 0.0], 80.0),
        ([0.9, 0.8, 0.1, 0.9, 0.0], None),
    ],
)
def test_a_trial_that_falls_behind_is_stopped_at_a_later_rung(falls, at):
    stopped = play(dict.fromkeys(range(3), "a"), {0: [0.7] * 5, 1: [0.8] * 5, 2: falls})
    assert stopped.get(2) == at, (
        "at 20, 40 and 80 percent it is held against the others, and between them it is not"
    )


def test_entries_do_not_compete():
    """However bad a technique is on a target, its trials are held against each other alone."""
    entries = {**dict.fromkeys(range(4), "good"), 4: "bad", 5: "worse"}
    signed_metric = {unit: [0.9] * 5 for unit in range(4)} | {4: [0.1] * 5, 5: [0.0] * 5}
    assert play(entries, signed_metric) == {}
    assert play(dict.fromkeys(entries, "one"), signed_metric) == {4: 20.0, 5: 20.0}


@pytest.mark.parametrize("lost", [np.nan, -np.inf])
def test_a_trial_whose_metric_is_not_finite_is_stopped(lost):
    """It is worse than any other; where all are so, nothing tells which to stop."""
    entries = dict.fromkeys(range(3), "one")
    assert play(entries, {0: [0.9] * 5, 1: [0.9] * 5, 2: [lost] * 5}) == {2: 20.0}
    assert play(entries, {0: [0.1] * 5, 1: [0.1, lost] + [0.1] * 3, 2: [0.1] * 5}) == {1: 40.0}
    assert play(entries, {unit: [lost] * 5 for unit in range(3)}) == {}
    found = play(entries, {0: [0.8] * 5, 1: [lost] * 5, 2: [0.1] * 5})
    assert found == {1: 20.0, 2: 20.0}, "the others are judged as if it were not there"


def test_trials_of_an_entry_may_come_when_others_are_through():
    scheduler = GroupedASHA({0: "a", 1: "a"})
    first, second = (
        SimpleNamespace(trial_id=f"trial-{unit}", config={"item_index": unit}, last_result=None)
        for unit in range(2)
    )
    finished = {"signed_metric": 0.0, "percent": 100.0, "finished": True}
    scheduler.on_trial_add(None, first)
    for percent in (20, 40, 60, 80, 100):
        assert (
            scheduler.on_trial_result(None, first, {"signed_metric": 0.5, "percent": percent})
            == TrialScheduler.CONTINUE
        )
    assert scheduler.on_trial_result(None, first, finished) == TrialScheduler.CONTINUE
    scheduler.on_trial_complete(None, first, finished)
    scheduler.on_trial_add(None, second)
    assert (
        scheduler.on_trial_result(None, second, {"signed_metric": 0.4, "percent": 20})
        == TrialScheduler.STOP
    )
    assert "1 entries" in scheduler.debug_string()


def test_a_trial_that_says_it_is_finished_is_not_stopped_and_its_last_report_is_no_result():
    """It carries no metric: a trial that failed must not lower the bar for the others."""
    scheduler = GroupedASHA(dict.fromkeys(range(3), "a"))
    good, failed, third = (
        SimpleNamespace(trial_id=f"trial-{unit}", config={"item_index": unit}, last_result=None)
        for unit in range(3)
    )
    for one in (good, failed, third):
        scheduler.on_trial_add(None, one)
    finished = {
        "signed_metric": 0.0,
        "percent": 100.0,
        "done_trials": 1,
        "failed_trials": 1,
        "finished": True,
    }
    assert (
        scheduler.on_trial_result(None, good, {"signed_metric": 0.5, "percent": 80})
        == TrialScheduler.CONTINUE
    )
    assert scheduler.on_trial_result(None, failed, finished) == TrialScheduler.CONTINUE
    scheduler.on_trial_complete(None, failed, finished)
    assert (
        scheduler.on_trial_result(None, third, {"signed_metric": 0.3, "percent": 80})
        == TrialScheduler.STOP
    ), "below 0.5, and not above the half of 0.5 and 0"


# ---------------------------------------------------------------- what a Tune trial reports


def run_unit(monkeypatch, shared, unit, run, asha=True, **config):
    """What ``run_work_item`` reports, with ``trial.run`` replaced."""
    reports = []
    monkeypatch.setattr(fanout.tune, "report", reports.append)
    monkeypatch.setattr(fanout.ray, "get", lambda reference: reference)
    monkeypatch.setattr(one_trial, "run", run)
    fanout.run_work_item(
        {"item_index": 0, "threads": 1, "workers": 0, "cpus": 1.0, "gpus": 0.0, **config},
        [shared],
        [unit],
        asha,
    )
    return reports


@pytest.mark.parametrize(("metric", "signed_metric"), [("accuracy", 0.25), ("loss", -0.25)])
def test_the_signed_metric_is_higher_for_the_better_whatever_the_metric(
    paths, tmp_path, monkeypatch, metric, signed_metric
):
    job = job_of(tmp_path, paths, metric=metric)
    shared = shared_of(tmp_path, job, paths)

    def run(one, shared, report):
        report(3, 12, {metric: 0.25})
        return TrialRecord(one.id)

    unit = fanout.WorkItem((trial_of(job, shared, "full", stage="search"),), False)
    first, last = run_unit(monkeypatch, shared, unit, run)
    assert (first["signed_metric"], first["percent"], first["step"], first["validation"]) == (
        signed_metric,
        25.0,
        3,
        {metric: 0.25},
    )
    assert last == {"signed_metric": 0.0, "done_trials": 1, "failed_trials": 0, "finished": True}
    assert len(run_unit(monkeypatch, shared, unit, run, asha=False)) == 1, (
        "validations are told to a scheduler alone"
    )


def test_whatever_a_trial_raises_becomes_its_record(paths, tmp_path, monkeypatch):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)

    def run(one, shared, report):
        raise MemoryError("no more\nof it" + "x" * 5000)

    one = trial_of(job, shared, "full")
    (last,) = run_unit(monkeypatch, shared, fanout.WorkItem((one,), False), run)
    assert last["failed_trials"] == 1
    record = one_trial.read_record(shared.root, one.folder)
    assert (
        record is not None
        and record.status == "failed"
        and record.error.startswith("MemoryError: no more")
        and len(record.error) == 2000
    )


# ---------------------------------------------------------------- which bundles stay


def made(
    root: Path,
    seed: int,
    validation: float,
    higher: bool = True,
    entry: str = "full",
    status: str = "done",
) -> Trial:
    """A trial as `trial.write_results` leaves it: its bundle, then its record."""
    one = Trial(
        "src",
        "base",
        "timm/x",
        "task",
        ComponentConfig(name=entry),
        {},
        1.0,
        seed,
        "final",
        f"{entry}-{seed}",
        f"trials/{entry}-{seed}",
    )
    folder = root / "trials" / one.id
    uri = str(folder / "bundle")
    Path(uri).mkdir(parents=True)
    Path(uri, "manifest.json").write_text("{}")
    metric = "accuracy" if higher else "loss"
    rows = [
        {
            "metric": metric,
            "higher_is_better": higher,
            "split": split,
            "seed": seed,
            "bundle_uri": uri,
        }
        for split in ("test", "validation")
    ]
    record = {
        "trial_id": one.id,
        "cell": one.entry,
        "status": status,
        "rows": rows,
        "validation": {metric: validation, "other": -validation},
    }
    (folder / "record.json").write_text(json.dumps(record))
    return one


def left(root: Path) -> list[str]:
    return sorted(folder.parent.name for folder in (root / "trials").glob("**/bundle"))


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("once", [True, False])
def test_the_best_seed_of_an_entry_keeps_its_bundle(tmp_path, order, higher, once):
    """In whatever order trials end, one by one or all at once; lower is better for a loss; NaN is
    the worst of all.
    """
    values = [0.2, float("nan"), 0.9, 0.5]
    trials = [made(tmp_path, seed, values[seed], higher) for seed in order]
    best: dict = {}
    if once:
        fanout.prune_bundles(str(tmp_path), trials, "best", best)
    else:
        for one in trials:
            fanout.prune_bundles(str(tmp_path), [one], "best", best)
    winner = f"full-{2 if higher else 0}"
    assert left(tmp_path) == [winner] and [record.trial_id for record in best.values()] == [winner]
    assert all((tmp_path / "trials" / one.id / "record.json").exists() for one in trials), (
        "their results stay"
    )
    again: dict = {}
    fanout.prune_bundles(str(tmp_path), trials, "best", again)
    assert left(tmp_path) == [winner] and again == best, (
        "the results table comes to the same, from the records"
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_an_entry_of_equals_keeps_one_bundle(tmp_path, order, value):
    """The same one as trials end, in whatever order, and at the end of the run, in the trials'
    own.
    """
    ended, best = [made(tmp_path, seed, value) for seed in order], {}
    for one in ended:
        fanout.prune_bundles(str(tmp_path), [one], "best", best)
    fanout.prune_bundles(str(tmp_path), sorted(ended, key=lambda one: one.seed), "best", {})
    assert left(tmp_path) == ["full-0"]


def test_entries_keep_a_bundle_each_and_failed_trials_do_not_count(tmp_path):
    trials = [
        made(tmp_path, 0, 0.5),
        made(tmp_path, 1, 0.9, status="failed"),
        made(tmp_path, 2, 0.6, entry="lp_ft"),
        made(tmp_path, 3, 0.4, entry="lp_ft"),
    ]
    missing = dataclasses.replace(trials[0], id="never-ran", folder="trials/never-ran")
    fanout.prune_bundles(str(tmp_path), [missing, *trials], "best", {})
    assert left(tmp_path) == ["full-0", "full-1", "lp_ft-2"]


@pytest.mark.parametrize("keep", ["all", "none"])
def test_nothing_is_pruned_where_all_are_kept_or_none_was_made(tmp_path, keep):
    trials = [made(tmp_path, seed, seed / 10) for seed in range(3)]
    fanout.prune_bundles(str(tmp_path), trials, keep, {})
    assert len(left(tmp_path)) == 3


def test_trials_make_bundles_only_where_some_are_kept(paths, tmp_path):
    job = job_of(tmp_path, paths, {"steps": 2})
    for keep in (True, False):
        shared = shared_of(tmp_path, job, paths, root=f"keep-{keep}", keep_bundles=keep)
        for stage in ("search", "final"):
            record = one_trial.run(trial_of(job, shared, "full", stage=stage), shared, Ranks())
            assert (record.rows[0].bundle_uri is not None) == (keep and stage == "final")
        assert len(left(Path(shared.root))) == keep


# ---------------------------------------------------------------- what can never run


def asking(paths, folder, workers: int = 0, **words) -> Job:
    job = job_of(folder, paths, workers=workers)
    return job.model_copy(update={"fanout": Fanout.model_validate(words)})


@pytest.mark.parametrize(
    ("words", "workers", "nodes", "message"),
    [
        (
            {"cpus_per_trial": 6},
            0,
            [(4.0, 0.0)] * 4,
            "a trial asks for 6 CPU and 0 GPU, the cluster has 4 nodes of 4 CPU + 0 GPU",
        ),
        (
            {"gpus_per_trial": 1},
            0,
            [(4.0, 0.0)],
            "a trial asks for 1 CPU and 1 GPU, the cluster has 1 node of 4 CPU + 0 GPU",
        ),
        ({"gpus_per_trial": 2}, 0, [(8.0, 1.0)] * 2, "a trial asks for 1 CPU and 2 GPU"),
        ({}, 5, [(4.0, 0.0)], "a trial asks for 1 CPU and 0 GPU for each of 5 ranks"),
        (
            {"cpus_per_trial": 3},
            3,
            [(4.0, 0.0)] * 2,
            "a trial asks for 3 CPU and 0 GPU for each of 3 ranks",
        ),
        (
            {"gpus_per_trial": 0.75},
            3,
            [(16.0, 2.0)],
            "a trial asks for 1 CPU and 0.75 GPU for each of 3 ranks",
        ),
        ({}, 0, [], "the cluster has no nodes"),
    ],
    ids=str,
)
def test_a_trial_that_can_never_run_is_refused_with_its_target(
    paths, tmp_path, words, workers, nodes, message
):
    with pytest.raises(ClusterError) as caught:
        fanout.check_fits(asking(paths, tmp_path, workers, **words), nodes)
    assert str(caught.value).startswith("targets.task: a trial asks for") and message in str(
        caught.value
    )
    assert (
        "it can never be met. Lower fanout.cpus_per_trial, fanout.gpus_per_trial or the "
        "target's workers" in str(caught.value)
    )


@pytest.mark.parametrize(
    ("words", "workers", "nodes"),
    [
        ({}, 0, [(0.5, 0.0)]),  # one CPU is a default, no wish: a smaller machine gives what it has
        ({"cpus_per_trial": 4}, 0, [(2.0, 0.0), (4.0, 0.0)]),
        ({}, 4, [(4.0, 0.0)]),
        ({}, 4, [(2.0, 0.0)] * 2),
        ({}, 4, [(8.0, 1.0)]),
        ({"gpus_per_trial": 0.5}, 3, [(8.0, 2.0)]),
        ({"gpus_per_trial": 0}, 4, [(4.0, 1.0)]),
    ],
    ids=str,
)
def test_trials_that_fit(paths, tmp_path, words, workers, nodes):
    fanout.check_fits(asking(paths, tmp_path, workers, **words), nodes)


def test_a_trial_takes_what_the_job_says_or_a_share():
    assert fanout.per_trial(Fanout.model_validate({}), [(4.0, 0.0), (8.0, 0.0)]) == (1.0, 0.0)
    assert fanout.per_trial(Fanout.model_validate({}), [(0.5, 0.0)]) == (0.5, 0.0)
    assert fanout.per_trial(Fanout.model_validate({}), [(4.0, 0.0), (8.0, 1.0)]) == (1.0, 0.25)
    assert fanout.per_trial(Fanout.model_validate({}), [(0.0, 0.0)]) == (1.0, 0.0), (
        "a head without CPUs: never an empty bundle"
    )
    assert fanout.per_trial(
        Fanout.model_validate({"cpus_per_trial": 6, "gpus_per_trial": 0}), [(4.0, 1.0)]
    ) == (6.0, 0.0)


# ---------------------------------------------------------------- what is still to run


@pytest.mark.parametrize(
    ("status", "scheduler", "again"),
    [
        (None, "fifo", True),
        (None, "asha", True),
        ("done", "fifo", False),
        ("done", "asha", False),
        ("failed", "fifo", True),
        ("failed", "asha", True),
        ("pruned", "asha", False),
        ("pruned", "fifo", True),
    ],
)
def test_what_failed_runs_again_and_what_was_stopped_early_when_nothing_stops_it_any_more(
    tmp_path, status, scheduler, again
):
    one = made(tmp_path, 0, 0.5, status=status or "done")
    if status is None:
        (tmp_path / "trials" / one.id / "record.json").unlink()
    assert (
        fanout.unfinished(
            str(tmp_path),
            one,
            Fanout.model_validate(
                {"scheduler": scheduler, "trials": 2, "search": {"lr": [1e-3, 1e-2]}}
            ),
        )
        is again
    )


def test_only_what_is_to_run_is_run(world, monkeypatch, tmp_path):
    job, shared = world
    trials = [trial_of(job, shared, "full", seed=seed) for seed in range(4)]
    for one, status in zip(trials, ("done", "failed", "pruned"), strict=False):
        one_trial.failed_record(one, shared, "why", status)
    ran = []

    def tune(name, work, shared, spec, workers, progress, wait, before):
        ran.extend(one.id for unit in work for one in unit.trials)
        for one in (one for unit in work for one in unit.trials):
            one_trial.failed_record(one, shared, "", "done")

    monkeypatch.setattr(fanout, "_tune", tune)
    records = fanout.run("x", trials, shared, job.fanout, Progress())
    assert ran == [one.id for one in trials[1:]] and [record.trial_id for record in records] == [
        one.id for one in trials
    ]
    assert [record.status for record in records] == ["done"] * 4


# ---------------------------------------------------------------- units


def ids(unit: fanout.WorkItem) -> list[str]:
    return [one.id for one in unit.trials]


def test_frozen_trials_of_one_backbone_and_target_run_together_and_others_alone(world):
    job, shared = world
    probes = [
        trial_of(job, shared, "linear_probe", {"lr": lr}, fraction, seed)
        for lr in (0.01, 0.1)
        for fraction in (0.5, 1.0)
        for seed in range(2)
    ]
    searched = [
        trial_of(job, shared, "linear_probe", {"lr": lr}, stage="search") for lr in (0.01, 0.1)
    ]
    others = [
        trial_of(job, shared, name, seed=seed)
        for name in ("scratch", "full", "lp_ft")
        for seed in range(2)
    ]
    mixed = [
        trial
        for pair in itertools.zip_longest(probes, searched, others)
        for trial in pair
        if trial is not None
    ]
    found = fanout.group_into_work_items(mixed, shared)
    alone = [unit for unit in found if not unit.is_stack]
    together = [unit for unit in found if unit.is_stack]
    assert found == [*alone, *together], "the long ones first"
    assert sorted(ids(unit) for unit in alone) == sorted([one.id] for one in others)
    assert sorted(sorted(ids(unit)) for unit in together) == sorted(
        sorted(one.id for one in group) for group in (probes, searched)
    )


def test_a_group_has_a_bounded_size(world, monkeypatch):
    job, shared = world
    monkeypatch.setattr(fanout, "MAX_STACKED_TRIALS", 3)
    probes = [trial_of(job, shared, "linear_probe", seed=seed) for seed in range(7)]
    found = fanout.group_into_work_items(probes, shared)
    assert [len(unit.trials) for unit in found] == [3, 3, 1] and all(
        unit.is_stack for unit in found
    )
    assert [i for unit in found for i in ids(unit)] == [one.id for one in probes]


def test_frozen_trials_of_rows_that_do_not_lie_in_memory_or_of_several_ranks_run_alone(
    paths, tmp_path
):
    job = job_of(tmp_path, {**paths, "decode": "train"})
    shared = shared_of(tmp_path, job, paths)
    assert not next(iter(shared.targets.values())).in_memory
    job_ranks = job_of(tmp_path, paths, workers=2)
    for one_job, held in ((job, shared), (job_ranks, shared_of(tmp_path, job_ranks, paths))):
        probes = [trial_of(one_job, held, "linear_probe", seed=seed) for seed in range(3)]
        assert [
            (ids(unit), unit.is_stack) for unit in fanout.group_into_work_items(probes, held)
        ] == [([one.id], False) for one in probes]


def test_the_line_tells_trials_that_have_begun_since():
    """Tune calls ``on_trial_start`` while a trial is still pending: a long trial would be told as
    none.
    """
    console, times = (
        Console(file=io.StringIO(), force_terminal=False, width=200),
        itertools.count(0, 60),
    )
    work = [
        SimpleNamespace(trials=("a",), first=None),
        SimpleNamespace(trials=("b", "c"), first=None),
    ]
    show = fanout.ProgressCallback(
        "fine-tune",
        work,
        SimpleNamespace(root=""),
        Progress(console, clock=lambda: next(times)),
        "none",
        num_done_before=20,
    )
    trials = [SimpleNamespace(config={"item_index": unit}, status="PENDING") for unit in range(2)]
    show.on_trial_start(0, trials, trials[0])
    trials[1].status = "RUNNING"
    show.on_step_end(0, trials)
    assert [line.partition(" ")[2].strip() for line in console.file.getvalue().splitlines()] == [
        "fine-tune: trials 20/23, 20 done before  0 running, 0 failed",
        "fine-tune: trials 20/23, 20 done before  2 running, 0 failed",
    ]


def test_the_time_left_falls_while_trials_run(monkeypatch):
    """Two of six took 100 s, so that the others take 200; it rose as long as none ended."""
    console, clock, now = (
        Console(file=io.StringIO(), force_terminal=False, width=200),
        itertools.count(0, 60),
        [1000.0],
    )
    monkeypatch.setattr(fanout.time, "time", lambda: now[0])
    work = [SimpleNamespace(trials=(str(i),), first=None) for i in range(6)]
    show = fanout.ProgressCallback(
        "fine-tune",
        work,
        SimpleNamespace(root=""),
        Progress(console, clock=lambda: next(clock)),
        "all",
    )
    trials = [
        SimpleNamespace(
            config={"item_index": unit},
            status="RUNNING",
            last_result={"finished": True, "failed_trials": 0, "done_trials": 1},
        )
        for unit in range(6)
    ]
    now[0] += 100
    for trial in trials[:2]:  # Tune gives them another status after it has told
        show.on_trial_complete(0, trials, trial)
    for passed in (60, 60, 120):
        now[0] += passed
        show.on_step_end(0, trials)
    message = [
        line.rpartition("failed")[2].strip()
        for line in console.file.getvalue().splitlines()
        if "trials 2/6  4 running" in line
    ]
    assert message == ["ETA 3m20s", "ETA 2m20s", "ETA 1m20s", ""], "no time is left: it is unknown"


def test_a_network_in_a_reference_cycle_is_freed():
    network = torch.nn.Linear(1, 1)
    network.itself = [network]
    left = weakref.ref(network)
    del network
    assert left() is not None
    fanout.release_memory()
    assert left() is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_what_a_trial_took_goes_back_to_the_system():
    def held() -> int:
        """MiB that are this process's own."""
        return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) >> 10

    fanout.release_memory()
    before = held()
    parts = [
        np.ones(8 << 10) for _ in range(8 << 10)
    ]  # 64 KiB each: below what the C library maps by itself
    last = parts[-1]
    del parts
    kept = held()
    fanout.release_memory()
    assert kept - before > 400 and held() - before < 100 and last.any()


# ---------------------------------------------------------------- trials that hang


class HangsInPython(Image):
    """A modality that never comes back from its first batch."""

    def collate(self, arrays):
        while True:
            pass


class HangsInC(Image):
    """The same in C code that keeps Python's lock, so that no thread of the process can do
    anything.
    """

    def collate(self, arrays):
        ctypes.PyDLL(None).sleep(10**6)


class Slow(Image):
    """Every batch takes a third of a second: slow, and not silent."""

    def collate(self, arrays):
        time.sleep(0.3)
        return super().collate(arrays)


def with_targets(shared, one, **kinds):
    """A trial of ``one``'s kind on each of further targets, which are read by modalities of their
    own.
    """
    data, out = shared.targets[one.target, one.backbone_key], []
    for name, kind in kinds.items():
        modality = kind(data.train.modality.options, data.train.modality.state)
        parts = {
            split: dataclasses.replace(
                rows, decoder=dataclasses.replace(rows.decoder, modality=modality)
            )
            for split in ("train", "validation", "test")
            for rows in [getattr(data, split)]
        }
        shared.targets[name, one.backbone_key] = dataclasses.replace(data, **parts)
        names = {"id": f"{one.id}-{name}", "folder": f"{one.folder}-{name}"}
        out.append(dataclasses.replace(one, target=name, **names))
    return out


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_that_hangs_is_ended_and_the_others_go_on(paths, tmp_path, ray_here):
    """In Python, in C code that holds the lock, and as heads on cached features; what is slow but
    alive is left alone.
    """
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    full, probe = trial_of(job, shared, "full"), trial_of(job, shared, "linear_probe")
    hanging = with_targets(shared, full, python=HangsInPython, c=HangsInC) + with_targets(
        shared, probe, heads=HangsInPython
    )
    fine = [full, probe, *with_targets(shared, full, slow=Slow)]
    spec = Fanout.model_validate({"silence_timeout_minutes": 0.5, "cpus_per_trial": 0.5})
    progress = Silent()
    records = fanout.run("x", [*hanging, *fine], shared, spec, progress)
    assert [record.status for record in records] == ["failed"] * 3 + ["done"] * 3, [
        record.error for record in records
    ]
    for record in records[:3]:
        assert (
            "took no step and read no batch for 0.5 minutes (fanout.silence_timeout_minutes)"
            in record.error
        )
    assert len([line for line in progress.lines if "its process was ended" in line]) == 3


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(280)
def test_a_trial_that_takes_too_long_is_ended(paths, tmp_path, ray_here):
    """It goes on step by step, so that silence does not catch it; its time does."""
    job = job_of(tmp_path, paths, {"steps": 10**5})
    shared = shared_of(tmp_path, job, paths)
    (endless,) = with_targets(shared, trial_of(job, shared, "full"), slow=Slow)
    spec = Fanout.model_validate({"trial_timeout_minutes": 0.1, "cpus_per_trial": 0.5})
    (record,) = fanout.run("x", [endless], shared, spec, Silent())
    assert (
        record.status == "failed"
        and "ran longer than 0.1 minutes (fanout.trial_timeout_minutes)" in record.error
    )


def test_silence_and_time_count_from_the_first_beat_where_ranks_must_find_their_place_first(
    monkeypatch,
):
    """Their nodes may come minutes later."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    board = HeartbeatBoard()
    board.begin("a", b"process a", 0)
    board.begin("b", b"process b", 1, True)
    board.begin("c", b"process c", 2)
    now[0] = 50.0
    board.beat("a", 0)
    board.beat("c", 7)  # a beat of a unit that has ended there
    board.end(2)
    now[0] = 100.0
    assert (
        board.overdue(40.0, {}) == [(0, b"process a", "silence")] and board.overdue(40.0, {}) == []
    )
    board.beat("b", 1)
    now[0] = 145.0
    board.beat("b", 1)
    assert board.overdue(60.0, {1: 120.0}) == [], (
        "the time that it waited for its place is not its own"
    )
    now[0] = 225.0
    board.beat("b", 1)
    assert board.overdue(60.0, {1: 120.0}) == [(1, b"process b", "time")]


def test_a_rank_is_heard_of_before_it_does_anything(monkeypatch):
    """Else ranks that hang while they find each other, before any batch, would never be silent."""
    heard = []

    def hangs(one, shared, ranks):
        assert heard, "nobody would know that this rank has begun"
        heard.append("ran")

    sender = SimpleNamespace(listener=lambda: lambda: heard.append("beat"))
    monkeypatch.setattr(fanout.trial, "run", hangs)
    fanout.run_rank({"sender": sender, "trial": None, "shared": None}, Ranks())
    assert heard == ["beat", "ran"]


def test_heads_that_train_together_share_the_time_that_each_has(world, monkeypatch):
    job, shared = world
    monkeypatch.setattr(launch, "start_actor", lambda kind: None)
    trials = tuple(trial_of(job, shared, "linear_probe", seed=seed) for seed in range(3))
    work = [fanout.WorkItem(trials, True), fanout.WorkItem(trials[:1], False)]
    watchdog = fanout.Watchdog(
        work, Fanout.model_validate({"trial_timeout_minutes": 2.0}), Silent()
    )
    assert watchdog.limits == {0: 360.0, 1: 120.0} and watchdog.max_silence_seconds == 30 * 60
    assert (
        fanout.Watchdog(
            work, Fanout.model_validate({"silence_timeout_minutes": None}), Silent()
        ).max_silence_seconds
        is None
    )


@pytest.mark.ray
def test_scores_are_computed_on_the_workers(paths, tmp_path, ray_here):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    key = next(iter(shared.backbone_groups))
    data = shared.targets["task", key]
    rows = (data.test.selection, dict(data.spec.data.columns))
    pairs = [SourceTargetPair("src", key, "task", rows), SourceTargetPair("src", key, "task")]
    found = list(fanout.for_pairs(score_pair, pairs, shared, Fanout(cpus_per_trial=0.5)))
    for pair, theirs in zip(pairs, found, strict=True):
        ours = score_pair(pair, shared)
        assert not theirs.error and theirs.source_rows == ours.source_rows
        for name, score in ours.scores.items():
            assert theirs.scores[name].reason == score.reason
            assert (score.value is None) == (theirs.scores[name].value is None)
            if score.value is not None:
                assert theirs.scores[name].value == pytest.approx(score.value, rel=1e-3, abs=1e-3)
