"""A trial's id names its content; label subsets are stratified and nested; draws are shared; a seed
changes what a seed should.
"""

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import Field
from toys import image_files, image_rows, image_splits, job_of, rows_of, shared_of, trial_of

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.registry import Options
from pipeline.config.schema import ComponentConfig, Job, Train
from pipeline.core.contracts import Technique
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.data import manifests
from pipeline.data.stream import Rows, TooManyBadRowsError
from pipeline.io import checksums
from pipeline.report.trial_record import TrialRecord
from pipeline.techniques.linear_probe import LinearProbe
from pipeline.transfer import baseline_trials, cached_heads, fanout, grid, targets
from pipeline.transfer import trial as one_trial
from pipeline.transfer.grid import label_subset

paths = image_splits(60, 24, 24)


@pytest.fixture(scope="module")
def world(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    job = job_of(folder, paths)
    return job, shared_of(folder, job, paths)


def changed(job: Job, path: str, value) -> Job:
    data = job.model_dump(mode="json")
    *parents, last = path.split(".")
    at = data
    for name in parents:
        at = at[name]
    at[last] = value
    return Job.model_validate(data)


# ---------------------------------------------------------------- ids


def test_a_name_says_what_the_trial_is(world):
    job, shared = world
    first = trial_of(job, shared, {"lp_ft": {"probe_share": 0.4}}, fraction=0.05, seed=2)
    assert first.name == "task/src/lp_ft(probe_share=0.4)/0.05/seed2"
    scratch = trial_of(job, shared, "scratch", fraction=5)
    assert scratch.name == f"task/{scratch.backbone.replace('/', '-')}/scratch/5/seed0"
    drawn = trial_of(job, shared, "full", {"weight_decay": 0.1, "lr": 0.003}, stage="search")
    assert drawn.name == "task/src/full/1.0/seed0/search/lr=0.003,weight_decay=0.1"
    assert trial_of(job, shared, "full", stage="search").name == "task/src/full/1.0/seed0/search"
    together = [fanout.WorkItem((first, scratch), True)]
    assert fanout.tune_name(together, 0) == f"0-{first.name}+1", "what Ray shows"


@pytest.mark.parametrize(
    "words",
    [
        {"hyper": {"lr": 0.02}},
        {"fraction": 0.5},
        {"fraction": 1},
        {"seed": 1},
        {"stage": "search"},
        {"technique": "full"},
        {"technique": "scratch"},
        {"technique": {"lp_ft": {}}},
        {"technique": {"lp_ft": {"probe_share": 0.4}}},
    ],
    ids=str,
)
def test_an_id_follows_what_the_trial_is(world, words):
    job, shared = world
    plain = trial_of(job, shared)
    assert trial_of(job, shared).id == plain.id
    assert trial_of(job, shared, **words).id != plain.id


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 5),
        ("targets.task.metric", "macro_f1"),
        ("targets.task.objective.options", {"label_smoothing": 0.1}),
        *[
            (f"targets.task.train.{name}", value)
            for name, value in {
                "steps": 13,
                "global_batch": 8,
                "optimizer": "sgd",
                "lr": 0.02,
                "beta1": 0.8,
                "beta2": 0.9,
                "weight_decay": 0.2,
                "warmup": 0.3,
                "schedule": "constant",
                "clip_norm": None,
                "precision": "bf16",
                "ema": 0.9,
                "augment": False,
                "keep": "last",
                "eval_every_steps": 3,
                "canonical_shards": 4,
            }.items()
        ],
    ],
)
def test_an_id_follows_every_setting_that_matters(world, path, value):
    job, shared = world
    assert trial_of(changed(job, path, value), shared).id != trial_of(job, shared).id


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "other"),
        ("storage", "elsewhere"),
        ("fanout.seeds", 7),
        ("fanout.cpus_per_trial", 0.5),
        ("techniques", [{"name": "full"}]),
        ("targets.task.label_fractions", [0.1, 1.0]),
        ("targets.task.techniques", [{"name": "full"}]),
        ("targets.task.data.max_bad_rows", 0.5),
        ("sources.src.workers", 4),
        *[
            (f"targets.task.train.{name}", value)
            for name, value in {
                "log_every_steps": 3,
                "checkpoint_every_steps": 7,
                "checkpoint_every_minutes": 2.5,
                "trace_rows": True,
                "max_bad_steps": 50,
            }.items()
        ],
    ],
)
def test_an_id_does_not_follow_what_changes_no_number(world, path, value):
    job, shared = world
    assert trial_of(changed(job, path, value), shared).id == trial_of(job, shared).id


def test_an_id_follows_weights_and_rows_and_scratch_has_no_weights(world):
    job, shared = world
    group = next(iter(shared.backbone_groups.values()))

    def made(source, technique, source_key, data_key):
        return grid.make_trial(
            job,
            "task",
            grid.PlannedEntry(group, source, ComponentConfig(name=technique), 1.0),
            {},
            0,
            "final",
            source_key,
            data_key,
        ).id

    assert made("src", "full", "a", "d") != made("src", "full", "b", "d")
    assert made("src", "full", "a", "d") != made("src", "full", "a", "e")
    assert (
        made(grid.SCRATCH, "scratch", "a", "d")
        == made(grid.SCRATCH, "scratch", "b", "d")
        != made(grid.SCRATCH, "scratch", "a", "e")
    )


# ---------------------------------------------------------------- label subsets


def labelled(counts=(200, 100, 40, 3)):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    rows = image_rows(len(labels))
    return rows_of(
        rows.modality, {"image": np.zeros((len(labels), 1, 8, 8), np.uint8), "label": labels}
    ), labels


def test_shares_are_stratified_and_leave_no_class_out():
    rows, labels = labelled()
    for share in (0.01, 0.05, 0.25, 0.5):
        places = label_subset(rows, labels, share, seed=1)
        found = Counter(labels[places].tolist())
        assert found == {c: max(1, round(share * n)) for c, n in enumerate((200, 100, 40, 3))}
        assert (np.diff(places) > 0).all()
    assert np.array_equal(label_subset(rows, labels, 1.0, seed=1), np.arange(343))


@pytest.mark.parametrize("kind", ["share", "number"])
def test_subsets_of_one_seed_are_nested(kind):
    rows, labels = labelled()
    sizes = (0.01, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0) if kind == "share" else (1, 2, 5, 30, 500)
    for seed in range(3):
        found = [set(label_subset(rows, labels, size, seed).tolist()) for size in sizes]
        assert all(a < b for a, b in itertools.pairwise(found))


def test_seeds_choose_other_rows_and_the_same_seed_the_same():
    rows, labels = labelled()
    found = [label_subset(rows, labels, 0.25, seed) for seed in range(8)]
    assert len({tuple(places) for places in found}) == 8 and np.array_equal(
        found[0], label_subset(rows, labels, 0.25, 0)
    )
    assert {len(places) for places in found} == {len(found[0])}
    often = np.bincount(
        np.concatenate([label_subset(rows, labels, 0.25, seed) for seed in range(200)]),
        minlength=343,
    )[labels == 0]
    assert often.min() > 20 and often.max() < 85  # 50 on average: every row has its chance


def test_integers_are_rows_a_class():
    rows, labels = labelled()
    for n in (1, 5, 40):
        assert Counter(labels[label_subset(rows, labels, n, 0)].tolist()) == {
            0: n,
            1: n,
            2: n,
            3: min(n, 3),
        }


def test_a_subset_follows_row_ids_and_not_places():
    """The same rows in another selection (one bad row left out) give the same choice."""
    rows, labels = labelled()
    keep = np.arange(343) != 17
    fewer = rows.subset(np.flatnonzero(keep))
    whole = set(rows.selection.ids(label_subset(rows, labels, 5, 0)).tolist())
    part = set(fewer.selection.ids(label_subset(fewer, labels[keep], 5, 0)).tolist())
    assert len(whole - part) <= 1 and whole - part <= {rows.selection.ids(np.array([17]))[0]}


def test_without_labels_a_share_is_of_all_rows():
    rows, _ = labelled()
    assert len(label_subset(rows, None, 0.1, 0)) == 34 and len(label_subset(rows, None, 7, 0)) == 7


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_outside_its_range_is_refused(share):
    rows, labels = labelled()
    with pytest.raises(
        ValueError, match=r"must be above 0 and at most 1\.0; integers are rows per class"
    ):
        label_subset(rows, labels, share, 0)


def test_fractions_are_told_apart_in_words():
    assert [grid.fraction_text(f, "behaviour_cloning") for f in (1, 0.05, 0)] == [
        "1 rows",
        "0.05",
        "0 rows",
    ]
    assert [grid.fraction_text(f) for f in (1, 1.0, 0.05, 0.25, 10)] == [
        "1/class",
        "1.0",
        "0.05",
        "0.25",
        "10/class",
    ]


# ---------------------------------------------------------------- draws


def drawn(job: Job, technique: str | dict = "full") -> list[dict]:
    component = ComponentConfig.model_validate(technique)
    return grid.draws(job, job.targets["task"], component)


def searching(job: Job, search: dict | str, count: int = 400, seed: int = 0) -> Job:
    fanout = job.fanout.model_dump(mode="json") | {"search": search, "trials": count}
    return changed(changed(job, "seed", seed), "fanout", fanout)


def test_draws_are_log_uniform_within_their_range(world):
    low, high = 1e-4, 1e-1
    found = np.array([draw["lr"] for draw in drawn(searching(world[0], {"lr": [low, high]}))])
    place = (np.log(found) - math.log(low)) / (math.log(high) - math.log(low))
    assert place.min() > -1e-6 and place.max() < 1 + 1e-6 and len(set(found)) == 400
    counts = np.histogram(place, bins=10, range=(0, 1))[0]
    assert ((counts - 40) ** 2 / 40).sum() < 27.9  # chi square, 9 degrees of freedom, p = 0.001


def test_draws_of_choices_and_whole_numbers(world):
    found = drawn(searching(world[0], {"weight_decay": [0.0, 0.1, 0.5], "global_batch": [8, 64]}))
    assert (
        set(Counter(d["weight_decay"] for d in found)) == {0.0, 0.1, 0.5}
        and min(Counter(d["weight_decay"] for d in found).values()) > 90
    )
    assert all(isinstance(d["global_batch"], int) and 8 <= d["global_batch"] <= 64 for d in found)
    Train.model_validate(found[0])


def test_draws_come_from_the_jobs_seed_alone(world):
    """No entry, source or technique enters: scratch is searched over the same draws."""
    search = {"lr": [1e-4, 1e-1]}
    assert drawn(searching(world[0], search)) == drawn(searching(world[0], search))
    assert drawn(searching(world[0], search)) != drawn(searching(world[0], search, seed=1))
    assert (
        drawn(searching(world[0], search, count=5))
        == drawn(searching(world[0], search, count=9))[:5]
    )
    assert drawn(world[0]) == [{}]


@pytest.mark.parametrize("name", sorted(registry.entries("technique")))
def test_declared_ranges_hold_values_that_the_technique_takes(name):
    """Each end and each choice makes a technique, and whole options have choices, not ranges."""
    kind = registry.get("technique", name)
    for option, values in kind(kind.options_class()).search_space().items():
        assert len(values) > 1
        if len(values) == 2:
            assert 0 < values[0] < values[1] and all(isinstance(one, float) for one in values)
        if option != "lr":
            for value in values:
                kind.options_class(**{option: value})


@pytest.mark.parametrize(
    "name", ["l2_sp", "delta", "bss", "distillation", "lwf", "co_tuning", "pooled"]
)
def test_the_strength_of_a_penalty_is_searched(name):
    """With one strength for every target the search would compare defaults, not techniques."""
    declared = registry.get("technique", name)().search_space()
    assert {"weight", "features"} & set(declared)


def test_declared_ranges_are_drawn_for_each_technique_alike(world):
    """As many trials each, the job's own settings first, lr relative to the target's."""
    job = searching(world[0], "auto", 200)
    lr = job.targets["task"].train.lr
    for technique in ("scratch", "full", "lp_ft", "lora", {"linear_probe": {"solver": "sgd"}}):
        found = drawn(job, technique)
        assert len(found) == 200 and found[0] == {}
    full = drawn(job)[1:]
    factors = np.array([draw["lr"] / lr for draw in full])
    assert 0.03 <= factors.min() < 0.05 and 2 < factors.max() <= 3.0
    decays = [draw["technique.layer_decay"] for draw in full]
    assert min(decays) >= 0.65 and max(decays) <= 1.0 and len(set(decays)) > 150
    assert {draw["technique.rank"] for draw in drawn(job, "lora")[1:]} == {4, 8, 16, 32}
    assert drawn(job) == drawn(job) and drawn(job)[:9] == drawn(searching(world[0], "auto", 9))


def probe_that_is(world, tmp_path, options: dict, paths) -> tuple[bool, Any]:
    """Whether a probe's head was solved on a target with these options, and its job."""
    job = changed(world[0], "targets.task.objective", {"classification": options})
    shared = shared_of(tmp_path, job, paths)
    one = trial_of(job, shared, {"linear_probe": {"penalty": 0.1}}, stage="search")
    (unit,) = fanout.group_into_work_items([one], shared)
    if not unit.is_stack:
        return False, job
    (record,) = cached_heads.run([one], shared)
    return record.rows[0].settings.get("solver") == "lbfgs", job


@pytest.mark.parametrize("options", [{}, {"dropout": 0.2}, {"mixup": 0.2}], ids=str)
def test_a_probe_is_searched_where_its_head_is_not_solved(world, tmp_path, paths, options):
    """Steps at the one rate of a whole network would be no equal budget."""
    solved, job = probe_that_is(world, tmp_path, options, paths)
    found = drawn(searching(job, "auto", 5), "linear_probe")
    assert len(found) == (1 if solved else 5)
    assert solved == (options == {})


def test_a_probe_of_streamed_rows_or_of_tokens_is_searched(world):
    job = searching(world[0], "auto", 5)
    probe = ComponentConfig(name="linear_probe")
    target = job.targets["task"]
    assert len(grid.draws(job, target, probe)) == 1
    assert len(grid.draws(job, target, probe, in_memory=False)) == 5
    several = target.model_copy(update={"workers": 2})
    tokens = target.model_copy(update={"objective": ComponentConfig(name="tagging")})
    assert [len(grid.draws(job, one, probe)) for one in (several, tokens)] == [5, 5]


def test_options_are_searched_where_the_head_is_solved_too(world, monkeypatch):
    class Selective(LinearProbe):
        def search_space(self):
            return {**super().search_space(), "share": (0.01, 1.0)}

    monkeypatch.setattr(grid, "technique_of", lambda component: Selective())
    found = drawn(searching(world[0], "auto", 5), "linear_probe")
    assert [set(draw) for draw in found] == [set(), *[{"technique.share"}] * 4]


def test_the_selection_of_features_is_searched_only_where_there_is_one(world):
    """By steps every feature is used, so that draws of the lasso would be equal trials."""
    job = searching(world[0], "auto", 5)
    used, target = ComponentConfig(name="head_to_toe"), job.targets["task"]
    for in_memory, name in ((True, "technique.lasso"), (False, "lr")):
        found = grid.draws(job, target, used, in_memory)
        assert [set(draw) for draw in found] == [set(), *[{name}] * 4]


def test_a_rate_that_the_job_states_for_a_head_is_not_raised_again(world):
    job = searching(world[0], "auto", 100)
    lr = job.targets["task"].train.lr
    for options, low, high in (({"solver": "sgd"}, 1.0, 100.0), ({"lr_scale": 10.0}, 0.1, 10.0)):
        factors = [draw["lr"] / lr for draw in drawn(job, {"linear_probe": options})[1:]]
        assert low <= min(factors) < 1.5 * low and high / 1.5 < max(factors) <= high


class Choosy(Technique):
    """A technique of a plugin."""

    space: ClassVar[dict[str, Any]] = {}

    def search_space(self):
        return self.space


class ChoosyOptions(Options):
    mode: Literal["a", "b"] = "a"
    rank: int = Field(8, ge=1, le=64)
    weight: float = 0.1


def test_two_texts_or_whole_numbers_are_choices(world, monkeypatch):
    made = Choosy(ChoosyOptions())
    made.space = {"mode": ("a", "b"), "rank": (4, 64), "weight": (0.1, 1.0)}
    monkeypatch.setattr(grid, "technique_of", lambda component: made)
    found = drawn(searching(world[0], "auto", 40))[1:]
    assert {draw["technique.mode"] for draw in found} == {"a", "b"}
    assert {draw["technique.rank"] for draw in found} == {4, 64}
    assert len({draw["technique.weight"] for draw in found}) == 39


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"rank": (4, 128)}, "^rank: 128: Input should be less than or equal to 64$"),
        ({"weight": (0.0, 1.0)}, r"weight: \(0.0, 1.0\) must be \(low, high\) with 0 < low < high"),
        ({"rank": (4, 8, 64), "mode": ("b", "a"), "lr": (0.1, 1.0)}, "^$"),
    ],
)
def test_declared_values_are_tried_before_anything_starts(monkeypatch, space, message):
    def made(component: ComponentConfig) -> Choosy:
        one = Choosy(ChoosyOptions(**component.options))
        one.space = space
        return one

    monkeypatch.setattr(grid, "technique_of", made)
    assert re.search(message, grid.search_problem(ComponentConfig(name="full")))


def test_an_option_that_the_job_states_is_not_drawn(world):
    job = searching(world[0], "auto", 5)
    stated = drawn(job, {"full": {"layer_decay": 0.8}})[1:]
    assert all(set(draw) == {"lr"} for draw in stated)
    assert drawn(job, "linear_probe") == [{}], "the solver has no learning rate"


def test_drawn_options_are_the_trials_own(world):
    job, shared = world
    one = trial_of(job, shared, hyper={"lr": 0.02, "technique.layer_decay": 0.7}, technique="full")
    assert one.technique_object.options.layer_decay == 0.7
    assert one.drawn_technique.options == {"layer_decay": 0.7}, "a bundle is loaded with it"
    assert one.train_settings == {"lr": 0.02} and one.technique.options == {}
    plain = trial_of(job, shared, technique="full")
    assert one.entry == plain.entry and one.id != plain.id


# ---------------------------------------------------------------- entries


def bases_of(*names):
    modality = ModalitySpec("image", {}, {})
    return grid.backbone_groups(
        {
            name: (Architecture(f"timm/{arch}", {}, {}), replace(modality, state={"mean": [mean]}))
            for name, arch, mean in names
        }
    )


def test_sources_that_read_alike_share_one_scratch(world):
    found = bases_of(("a", "r", 0.5), ("b", "r", 0.5), ("c", "r", 0.1), ("d", "v", 0.5))
    assert [group.sources for group in found] == [("a", "b"), ("c",), ("d",)]
    assert [group.label for group in found] == ["timm/r@a", "timm/r@c", "timm/v"]
    assert len({group.key for group in found}) == 3
    job = changed(world[0], "targets.task.label_fractions", [0.1, 1.0])
    entries = grid.planned_entries(job, "task", found, {"a", "b", "c"})
    assert all(
        group.label != "timm/v" for group, *_ in entries
    )  # no chosen source, so no scratch either
    scratch = Counter(
        (group.label, fraction)
        for group, source, component, fraction in entries
        if source == grid.SCRATCH
    )
    assert scratch == {
        (label, fraction): 1 for label in ("timm/r@a", "timm/r@c") for fraction in (0.1, 1.0)
    }
    assert Counter(source for _, source, _, _ in entries) == {"none": 4, "a": 6, "b": 6, "c": 6}


def test_scratch_is_always_there_and_first(world):
    job = changed(world[0], "techniques", [{"name": "full"}])
    assert [component.name for component in grid.techniques(job, job.targets["task"])] == [
        "scratch",
        "full",
    ]
    job = changed(world[0], "targets.task.techniques", [{"name": "lp_ft"}, {"name": "scratch"}])
    assert [component.name for component in grid.techniques(job, job.targets["task"])] == [
        "scratch",
        "lp_ft",
    ]
    job = changed(world[0], "targets.task.techniques", [{"name": "random_probe"}, {"name": "full"}])
    assert [component.name for component in grid.techniques(job, job.targets["task"])] == [
        "scratch",
        "random_probe",
        "full",
    ]


def test_a_probe_of_random_weights_starts_where_scratch_does_and_moves_the_head_alone(world):
    job, shared = world
    found = {name: trial_of(job, shared, name) for name in ("scratch", "random_probe")}
    start, kept = (
        one_trial.build_task(one, shared)[0].backbone.state_dict() for one in found.values()
    )
    assert all(torch.equal(start[name], kept[name]) for name in start)
    record = one_trial.run(found["random_probe"], shared)
    task = one_trial.build_task(found["random_probe"], shared)[0]
    assert record.rows[0].params_trained == sum(p.numel() for p in task.objective.parameters())
    assert cached_heads.can_stack([found["random_probe"]], shared) and not cached_heads.can_stack(
        [found["scratch"]], shared
    )


# ---------------------------------------------------------------- seeds and what a trial is made of


def test_a_seed_changes_initialisation_order_and_subset(world):
    job, shared = world
    seen = []
    for seed in range(3):
        one = trial_of(job, shared, "full", fraction=0.5, seed=seed)
        task, moved, start = one_trial.build_task(one, shared)
        train, rows, _ = one_trial.resolve_training(one, shared)
        plan = one_trial.order_of(one, shared, train, rows)
        ids = rows.selection.ids(np.arange(len(rows)))
        seen.append(
            (
                start,
                tuple(plan.batch(0)[0]),
                tuple(ids),
                task.objective.head.weight.detach().clone(),
                task.backbone.state_dict(),
            )
        )
        assert moved.endswith("; new head") and "0 new, 0 dropped" in moved
    for part in range(3):
        assert len({row[part] for row in seen}) == 3
    assert not torch.equal(seen[0][3], seen[1][3])
    assert all(
        torch.equal(a, b) for a, b in zip(seen[0][4].values(), seen[1][4].values(), strict=True)
    )  # the source's weights are one


def test_scratch_starts_from_nothing_of_the_source(world):
    job, shared = world
    starts = [
        one_trial.build_task(trial_of(job, shared, "scratch", seed=seed), shared)
        for seed in range(2)
    ]
    assert starts[0][1] == "new backbone and head (scratch)" and starts[0][2] != starts[1][2]
    matrices = [name for name, p in starts[0][0].backbone.named_parameters() if p.dim() > 1]
    for name in matrices:
        own, source = (
            starts[0][0].backbone.state_dict()[name],
            torch.from_numpy(shared.weights["src"][name]),
        )
        assert not torch.equal(own, source)
        assert not torch.equal(own, starts[1][0].backbone.state_dict()[name])


def test_the_head_of_a_seed_is_the_same_for_every_technique(world):
    """Paired by seed: scratch and full differ by their backbone alone."""
    job, shared = world
    heads = [
        one_trial.build_task(trial_of(job, shared, technique, seed=4), shared)[
            0
        ].objective.head.weight
        for technique in ("scratch", "full", "linear_probe")
    ]
    assert all(torch.equal(heads[0], head) for head in heads)


def test_the_batch_is_never_larger_than_the_rows(world):
    job, shared = world
    train, rows, steps = one_trial.resolve_training(
        trial_of(job, shared, "full", fraction=2), shared
    )
    assert len(rows) == 6 and train.global_batch == 6 and steps == 12
    train, rows, steps = one_trial.resolve_training(
        trial_of(job, shared, "full", {"lr": 0.5, "global_batch": 7}), shared
    )
    assert (train.lr, train.global_batch, len(rows)) == (0.5, 7, 60)
    assert (
        one_trial.resolve_training(trial_of(job, shared, "linear_probe"), shared)[0].augment
        is False
    )
    assert one_trial.resolve_training(trial_of(job, shared, "full"), shared)[0].augment is True


# ---------------------------------------------------------------- a trial runs


def test_a_trial_writes_what_truly_ran(world, paths, tmp_path):
    job, _ = world
    shared = shared_of(tmp_path, job, paths, keep_bundles=True)
    one = trial_of(job, shared, "lp_ft", {"lr": 0.004}, fraction=0.5, seed=2)
    record = one_trial.run(one, shared)
    rows = record.rows
    assert {(row.split, row.metric) for row in rows} == {
        (s, m) for s in ("test", "validation") for m in ("accuracy", "macro_f1", "loss")
    }
    first = rows[0]
    assert (
        first.split,
        first.metric,
        first.status,
        first.steps,
        first.n_train,
        first.n_eval,
        first.n_units,
    ) == ("test", "accuracy", "done", 12, 30, 24, 24)
    assert first.settings["lr"] == 0.004 and first.settings["global_batch"] == 16
    task, _, start = one_trial.build_task(one, shared)
    assert first.settings["start_weights"] == start and first.params_trained == sum(
        p.numel() for p in task.parameters()
    )
    assert (
        first.value_low <= first.value <= first.value_high
        and first.interval == "95% bootstrap over test rows"
    )
    assert one_trial.read_record(shared.root, one.folder).trial_id == one.id
    run = one_trial.read_predictions(shared.root, one.folder, 2)
    assert run is not None and run.rows.tolist() == list(range(24))
    assert (
        run.predictions["scores"].argmax(1) == run.predictions["label"]
    ).mean() == pytest.approx(first.value)
    again = bundle.load(first.bundle_uri).task()
    assert list(again.objective.state["labels"]) == ["class 0", "class 1", "class 2"]
    assert one_trial.weights_hash(again) != start


class Killed(Exception):  # noqa: N818 - a stand-in for a kill, not an error
    pass


def killed_after(steps: int):
    """Called at every step that a trial takes; ends it at one of them."""
    taken = iter(range(1, 10**6))

    def alive():
        if next(taken) == steps:
            raise Killed

    return alive


def without_time(record: TrialRecord) -> dict:
    """A record but for what is another every time, and for where it lies."""
    rows = [replace(row, seconds=None, started_at=None, bundle_uri=None) for row in record.rows]
    return replace(record, rows=tuple(rows), resumed_from=0).to_json()


@pytest.mark.parametrize("technique", ["lp_ft", "scratch", "linear_probe"])
def test_a_trial_that_was_killed_goes_on_bit_for_bit(paths, tmp_path, technique):
    """As a source does, by the same resume points, in the trial's own folder; they go when the
    record is written.
    """
    job = job_of(
        tmp_path,
        paths,
        {"checkpoint_every_steps": 4, "eval_every_steps": 3, "ema": 0.9, "trace_rows": True},
    )
    whole = shared_of(tmp_path, job, paths, root="whole", keep_bundles=True)
    parts = dataclasses.replace(whole, root=str(tmp_path / "parts"))
    one = trial_of(job, whole, technique)
    want = one_trial.run(one, whole)
    with pytest.raises(Killed):
        one_trial.run(one, parts, on_step=killed_after(7))
    points = Path(one_trial.checkpoint_folder(parts, one))
    assert sorted(p.name for p in points.iterdir()) == ["step-0000000004"]
    torch.manual_seed(12345)  # the process that goes on has a random state of its own
    taken = []
    found = one_trial.run(one, parts, on_step=lambda: taken.append(1))
    assert found.resumed_from == 4 and len(taken) == 12 - 4 and want.resumed_from == 0
    assert without_time(found) == without_time(want) and not points.exists()
    weights = [bundle.load(record.rows[0].bundle_uri).tensors for record in (found, want)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])

    def lines_of(world, name: str) -> list[dict]:
        text = Path(one_trial.folder_uri(world, one), name).read_text()
        return [json.loads(line) for line in text.splitlines()]

    logs = [[line["step"] for line in lines_of(world, "metrics.jsonl")] for world in (parts, whole)]
    assert logs[0] == logs[1], "no step stands twice"
    traces = [
        {line["step"]: line["rows"] for line in lines_of(world, "rows-rank0.jsonl")}
        for world in (parts, whole)
    ]
    assert traces[0] == traces[1] and sorted(traces[0]) == list(range(12)), (
        "trace_rows: every step's rows, as for a source"
    )


def test_a_trial_that_failed_keeps_its_resume_points_for_the_next_run(paths, tmp_path):
    job = job_of(tmp_path, paths, {"checkpoint_every_steps": 4})
    shared = shared_of(tmp_path, job, paths)
    one = trial_of(job, shared, "full")
    with pytest.raises(Killed):
        one_trial.run(one, shared, on_step=killed_after(7))
    one_trial.failed_record(one, shared, "the trial's process died")
    assert Path(one_trial.checkpoint_folder(shared, one), "step-0000000004").exists()
    one_trial.failed_record(one, shared, "stopped early by asha", "pruned")
    assert not Path(one_trial.checkpoint_folder(shared, one)).exists()


def test_a_trial_starts_again_where_its_rows_come_in_another_order(paths, tmp_path, monkeypatch):
    """Else rows of the epoch would come twice, and others never."""
    monkeypatch.setattr("pipeline.train.pretrain.ROWS_SHUFFLE_BYTES", 0)
    job = job_of(tmp_path, paths, {"checkpoint_every_steps": 4})
    shared = shared_of(tmp_path, job, paths)
    one = trial_of(job, shared, "full")
    with pytest.raises(Killed):
        one_trial.run(one, shared, on_step=killed_after(7))
    streamed(job, shared, paths)  # as with data.decode: train
    messages: list[str] = []
    with checksums.notifications_to(messages.append):
        record = one_trial.run(one, shared)
    assert record.resumed_from == 0
    assert "trained on rows in another order than now (data.decode, or which" in messages[0]


def streamed(job: Job, shared, paths) -> None:
    """The target's rows read from their files as the trials of ``shared`` go on."""
    ((place, data),) = shared.targets.items()
    shared.targets[place] = dataclasses.replace(
        data, train=dataclasses.replace(data.train, arrays=None)
    )


@pytest.mark.parametrize(("shuffle", "most"), [("auto", 2.0), ("rows", None)])
def test_a_target_beyond_memory_is_shuffled_by_the_sources_rule(
    tmp_path, monkeypatch, shuffle, most
):
    """How often its file is read in an epoch: a full permutation of rows in many row groups reads
    each of them again and again.
    """
    paths = image_files(tmp_path / "data", {"train": 512, "validation": 8, "test": 8})
    job = changed(
        job_of(tmp_path, paths, {"steps": None, "epochs": 1.0, "global_batch": 8}),
        "targets.task.data.shuffle",
        shuffle,
    )
    shared = shared_of(tmp_path, job, paths)
    streamed(job, shared, paths)
    monkeypatch.setattr(
        "pipeline.train.pretrain.ROWS_SHUFFLE_BYTES", 0
    )  # as if the files were larger than what is read as single rows
    monkeypatch.setattr(
        "pipeline.data.loader.READER_BYTES", 1 << 17
    )  # and a reader kept few of the 32 row groups
    monkeypatch.setattr("pipeline.data.stream.ITEM_ROWS", (8, 8))
    reads = Counter()
    original = manifests.pq.ParquetFile.read_row_group

    def counted(self, number, *args, **words):
        reads.update([number])
        return original(self, number, *args, **words)

    monkeypatch.setattr(manifests.pq.ParquetFile, "read_row_group", counted)
    one_trial.run(trial_of(job, shared, "full", stage="search"), shared)
    epochs = sum(reads.values()) / len(reads)
    assert len(reads) == 32 and (epochs < most if most else epochs > 5), (
        f"each row group is read {epochs:.1f} times an epoch"
    )


def write_damaged(path: str, unreadable: Iterable[int], unlabelled: Iterable[int] = ()) -> None:
    """Write a file of images again, with rows that have no picture or no label."""
    table = pq.read_table(path)
    pictures, classes = table["picture"].to_pylist(), table["class"].to_pylist()
    for row in unreadable:
        pictures[row] = b"no picture"
    for row in unlabelled:
        classes[row] = None
    pq.write_table(pa.table({"picture": pictures, "class": classes}), path, row_group_size=16)


def test_bad_rows_of_a_trial_with_few_labels_count_against_those_of_the_whole_split(tmp_path):
    paths = image_files(tmp_path / "data", {"train": 200, "validation": 8, "test": 8})
    job = changed(job_of(tmp_path, paths), "targets.task.data.decode", "train")
    few = trial_of(job, shared_of(tmp_path, job, paths), "full", fraction=4)
    drawn = one_trial.labelled_rows(few, shared_of(tmp_path, job, paths))
    write_damaged(paths["train"], unreadable=drawn[:2])
    shared = shared_of(tmp_path, job, paths)
    record = one_trial.run(trial_of(job, shared, "full", fraction=4), shared)
    assert len(drawn) == 12 and record.rows[0].n_train == 10, "0.01 of 200 rows may be bad"


def test_a_trial_ends_where_more_of_its_few_labels_are_bad_than_chance_explains(tmp_path):
    """A quarter of its rows, which are fewer than data.max_bad_rows of the split."""
    paths = image_files(tmp_path / "data", {"train": 400, "validation": 8, "test": 8})
    job = changed(job_of(tmp_path, paths, label_fractions=[4]), "baselines", ["majority"])
    job = changed(job, "targets.task.data.decode", "train")
    shared = shared_of(tmp_path, job, paths)
    trial = trial_of(job, shared, "full", fraction=4)
    (group,) = shared.backbone_groups.values()
    baseline = grid.baseline_trials(job, "task", group, "data")[trial.seed]
    write_damaged(paths["train"], unreadable=one_trial.labelled_rows(trial, shared)[:3])
    damaged = shared_of(tmp_path, job, paths)
    message = "3 of the 12 rows drawn cannot be used, far more than data.max_bad_rows=0.01 allows"
    for run, one in ((one_trial.run, trial), (baseline_trials.run, baseline)):
        with pytest.raises(TooManyBadRowsError, match=message):
            run(one, damaged)


@pytest.mark.parametrize("decode", ["memory", "train"])
def test_rows_without_a_label_count_against_the_budget_wherever_rows_are_decoded(tmp_path, decode):
    paths = image_files(tmp_path / "data", {"train": 200, "validation": 8, "test": 8})
    write_damaged(paths["train"], unreadable=[100], unlabelled=[5, 6])
    job = changed(job_of(tmp_path, paths), "targets.task.data.decode", decode)
    with pytest.raises(TooManyBadRowsError, match=r"3 of 200 rows cannot be used.*row 100: "):
        shared = shared_of(tmp_path, job, paths)
        one_trial.run(trial_of(job, shared, "full"), shared)


def test_a_search_trial_never_reads_the_test_rows(world, paths, tmp_path):
    job, _ = world
    shared = shared_of(tmp_path, job, paths)
    data = next(iter(shared.targets.values()))
    data.test = None  # type: ignore[assignment]
    record = one_trial.run(trial_of(job, shared, "full", stage="search"), shared)
    assert {row.split for row in record.rows} == {"validation"} and all(
        row.value_low is None for row in record.rows
    )


def test_a_failed_trial_has_its_row_without_the_signature_of_an_address(world, paths, tmp_path):
    job, _ = world
    shared = shared_of(tmp_path, job, paths)
    one = trial_of(job, shared, "full", {"lr": 0.6})
    shared.parents[one.source] = "https://me:word@host/a.pt?Signature=secret"
    record = one_trial.failed_record(one, shared, "no https://host/a?Signature=secret")
    assert one_trial.read_record(shared.root, one.folder) == record
    (row,) = record.rows
    assert (row.status, row.settings["lr"]) == ("failed", 0.6)
    assert (row.error, row.parent_uri) == ("no https://host/a?***", "https://***@host/a.pt?***")


def test_boxes_of_a_checkpoint_that_reads_cropped_images_are_refused(tmp_path, paths):
    """The job says nothing of how a checkpoint's images are read: it is known when the target's
    are.
    """
    boxed = {}
    for split, path in paths.items():
        table = pq.read_table(path)
        boxed[split] = str(tmp_path / f"{split}.parquet")
        pq.write_table(
            table.append_column(
                "boxes", pa.array([[[0.1, 0.1, 0.9, 0.9]]] * len(table))
            ).append_column("kinds", pa.array([[1]] * len(table))),
            boxed[split],
        )
    job = job_of(
        tmp_path,
        paths,
        data={
            **boxed,
            "modality": "image",
            "columns": {"image": "picture", "boxes": "boxes", "labels": "kinds"},
        },
        objective={"detection": {"names": ["ant", "cat", "bird"]}},
    )
    stage, options = targets.plan_target(job, "task"), {"size": 32, "channels": 3}
    crops, pads = (
        grid.backbone_groups(
            {
                "src": (
                    Architecture("timm/test_resnet", {}, {"channels": 3, "size": 32}),
                    ModalitySpec(
                        "image", {**options, "fit": fit}, {"mean": [0.5] * 3, "std": [0.2] * 3}
                    ),
                )
            }
        )[0]
        for fit in ("crop", "pad")
    )
    with pytest.raises(ValueError, match=r"data\.modality: fit: crop cuts away .* set fit: pad"):
        targets.prepare(stage, crops)
    data = targets.prepare(stage, pads)
    assert len(data.train) == 60
    assert [one.text for one in data.findings if "{1: ant, ...}" in one.text], "names from 1"


def test_a_crop_share_of_a_target_is_for_rows_that_are_cropped(tmp_path, paths):
    """What a target itself says is refused; a share that it inherits from its source and that its
    own fit has no use for is not.
    """

    def stage(**options):
        data = {
            **paths,
            "modality": {"image": options},
            "columns": {"image": "picture", "label": "class"},
        }
        return targets.plan_target(job_of(tmp_path, paths, data=data), "task")

    def group(**options):
        modality = ModalitySpec(
            "image", {"size": 32, "channels": 3, **options}, {"mean": [0.5] * 3, "std": [0.2] * 3}
        )
        return grid.backbone_groups(
            {"src": (Architecture("timm/test_resnet", {}, {"channels": 3, "size": 32}), modality)}
        )[0]

    with pytest.raises(
        ValueError,
        match=r"targets\.task\.data\.modality: crop_share 0\.5 has no effect with fit: squash",
    ):
        targets.plan_reading(stage(crop_share=0.5), group(fit="squash"))
    assert (
        targets.plan_reading(stage(fit="pad"), group(crop_share=0.9)).modality.options.fit == "pad"
    )


@pytest.mark.parametrize(
    ("objective", "technique", "in_memory", "batch"),
    [
        ("classification", "linear_probe", True, (None, 9)),
        ("classification", "linear_probe", False, (60.0, 64)),
        ("classification", "full", True, (60.0, 64)),
        ("ctc", "linear_probe", True, (60.0, 64)),
        ("ctc", "full", True, (60.0, 64)),
    ],
)
def test_rows_are_read_by_cost_unless_features_of_one_length_are_kept(
    objective, technique, in_memory, batch, tmp_path
):
    """Recognition has no features computed once: one long row among short ones must not be padded
    to by a batch of many.
    """
    pq.write_table(pa.table({"x": list(range(100))}), tmp_path / "rows.parquet")
    costs = np.where(np.arange(100) % 10, 4.0, 30.0)  # 6.6 on average
    decoder = SimpleNamespace(estimate_bytes=len)
    rows = Rows(
        manifests.Selection(manifests.build(str(tmp_path / "rows.parquet"), "auto", str(tmp_path))),
        decoder,
        costs=costs,
    )
    train = Train.model_validate({"batch_cost": 60.0, "steps": 5})
    spec = SimpleNamespace(train=train, workers=0, data=SimpleNamespace(shuffle="auto"))
    data = SimpleNamespace(
        train=rows,
        labels=None,
        spec=spec,
        objective=SimpleNamespace(name=objective, options={}),
        in_memory=in_memory,
    )
    shared = SimpleNamespace(targets={("task", "base"): data}, seed=0)
    component = ComponentConfig.model_validate(technique)
    one = grid.Trial(
        "src", "base", "base", "task", component, {}, 1.0, 0, "final", "id", "trials/id"
    )
    found, _, steps = one_trial.resolve_training(one, shared)
    assert (
        (found.batch_cost, found.global_batch) == batch
        and steps == 5
        and found.augment == (technique == "full")
    )
