"""A search that learns: proposals follow from the validation values and the seed alone, lie in their
ranges, and find a planted optimum better than random draws. So do the children of a population.
"""

import json
import math
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stage_runs
from pydantic import ValidationError
from toys import image_files

from pipeline.config import extras
from pipeline.config.registry import Options
from pipeline.config.schema import (
    ComponentConfig,
    Fanout,
    Job,
    Train,
    hyper_parameter_text,
    spec_hash,
)
from pipeline.io import storage
from pipeline.report import trial_folder
from pipeline.transfer import (
    dry_run,
    existing_trials,
    fanout,
    grid,
    planned_trials,
    population,
    proposals,
    stages,
    trial,
)

LOW, HIGH = 1e-4, 1e-1
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
BAYESOPT_EXTRA = PROJECT["optional-dependencies"]["bayesopt"]
each_searcher = pytest.mark.parametrize("searcher", ["optuna", "hyperopt", "bayesopt"])


def make(setting: dict):
    return SimpleNamespace(id=json.dumps(setting, sort_keys=True), hyper_parameters=setting)


def job_of(fanout: dict, technique: str | dict = "full") -> Job:
    data = {"train": "a", "validation": "b", "test": "c", "modality": "image"}
    return Job.model_validate(
        {
            "name": "toy",
            "sources": {"a": {"backbone": "bundle:a"}},
            "targets": {
                "task": {"data": data, "objective": "classification", "train": {"lr": 0.01}}
            },
            "techniques": [technique],
            "fanout": {"searcher": "optuna", "trials": 16, **fanout},
        }
    )


def known(job: Job, values: dict, technique: str | dict = "full") -> list[dict]:
    component = ComponentConfig.model_validate(technique)
    found = proposals.search_trials(job, job.targets["task"], component, True, make, values, {})
    return [one.hyper_parameters for one in found]


def searched(job: Job, value, technique: str | dict = "full") -> tuple[list[dict], list[int]]:
    """The settings of a whole search and how many each generation had."""
    values, sizes = {}, []
    while len(found := known(job, values, technique)) > len(values):
        sizes.append(len(found) - len(values))
        values = {make(one).id: value(one) for one in found}
    return found, sizes


def bowl(at: dict[str, float]):
    """Largest, 0, at one value of each name, on a logarithmic scale from `LOW` to `HIGH`."""

    def value(setting: dict) -> float:
        return -sum(
            (math.log(setting[name] / best) / math.log(HIGH / LOW)) ** 2
            for name, best in at.items()
        )

    return value


RATE = {"search": {"lr": [LOW, HIGH]}}


# ---------------------------------------------------------------- generations


@pytest.mark.parametrize(
    ("trials", "sizes"), [(2, [1, 1]), (4, [1] * 4), (10, [3, 3, 2, 2]), (16, [4] * 4)]
)
def test_there_are_as_many_settings_as_random_draws_in_four_generations(trials, sizes):
    job = job_of({**RATE, "trials": trials})
    found, counted = searched(job, bowl({"lr": 1e-2}))
    drawn = grid.draws(job, job.targets["task"], ComponentConfig(name="full"))
    assert counted == sizes and len(found) == len(drawn) == trials
    assert found[: sizes[0]] == drawn[: sizes[0]] and found[sizes[0] :] != drawn[sizes[0] :]


def test_a_random_draw_that_comes_twice_is_tried_once():
    """Equal settings are one trial, which would run twice at a time in one folder."""
    random = {"searcher": "random", "trials": 8}
    found = known(job_of({**random, "search": {"weight_decay": [0.0, 0.01, 0.1]}}), {})
    assert sorted(one["weight_decay"] for one in found) == [0.0, 0.01, 0.1]
    found = known(job_of({**random, "search": {"lr": [0.02, 0.02]}}), {})
    assert found == [{"lr": 0.02}], "not the target's own rate"


def test_a_generation_waits_for_every_trial_of_the_earlier_ones():
    job = job_of(RATE)
    whole, _ = searched(job, bowl({"lr": 1e-2}))
    values = {make(one).id: bowl({"lr": 1e-2})(one) for one in whole}
    for place in range(16):
        some = {key: value for key, value in values.items() if key != make(whole[place]).id}
        assert known(job, some) == whole[: 4 * (place // 4 + 1)]


@pytest.mark.parametrize(
    ("searcher", "changed"),
    [
        ("optuna", 9.0),
        ("optuna", None),
        ("hyperopt", 9.0),
        ("hyperopt", None),
        pytest.param("bayesopt", 9.0, marks=pytest.mark.slow),  # 4 s a generation
    ],
)
def test_the_same_values_give_the_same_proposals_and_another_best_one_does_not(changed, searcher):
    """Another trial becomes the best, or the best one fails: the estimator reads their order."""
    job = job_of({"search": "auto", "searcher": searcher})

    def value(setting):
        return math.sin(100 * sum(setting.values()))

    whole, _ = searched(job, value)
    values = {make(one).id: value(one) for one in whole}
    proposals.ask.cache_clear()  # as in a new process
    assert known(job, values) == whole and whole[0] == {}
    for until in (4, 8, 12):
        ranked = sorted(whole[:until], key=value)
        key = make(ranked[-1] if changed is None else ranked[0]).id
        began = 4 * (whole.index(json.loads(key)) // 4 + 1)
        found = known(job, values | {key: changed})
        assert found[:began] == whole[:began]
        assert len(found) >= began + 4 and found[began : began + 4] != whole[began : began + 4]
    # a value of the last generation decides nothing
    assert known(job, values | {make(whole[15]).id: changed}) == whole
    assert searched(job.model_copy(update={"seed": 1}), value)[0][1:] != whole[1:]


@each_searcher
def test_a_search_goes_on_where_every_trial_failed(searcher):
    found, sizes = searched(job_of({**RATE, "searcher": searcher}), lambda setting: None)
    assert sizes == [4] * 4 and len({one["lr"] for one in found}) == 16


def test_random_draws_wait_for_nothing_and_nothing_to_search_is_no_trial():
    job = job_of({**RATE, "searcher": "random"})
    component = ComponentConfig(name="full")
    assert known(job, {}) == grid.draws(job, job.targets["task"], component)
    probe = job_of({"search": "auto"})
    assert known(probe, {}, "linear_probe") == [], "its head is solved, and there is no rate"


# ---------------------------------------------------------------- ranges


@pytest.mark.parametrize("searcher", ["optuna", "hyperopt"])
def test_proposals_lie_in_the_ranges_and_choices_that_techniques_declare(searcher):
    job = job_of({"search": "auto", "trials": 32, "searcher": searcher})
    for technique in ("full", "lora", "lp_ft"):
        # the best settings lie at an end of their range
        found, _ = searched(job, lambda setting: sum(setting.values()), technique)
        space = grid.technique_of(ComponentConfig(name=technique)).search_space()
        assert found[0] == {} and len(found) == 32
        for name, values in space.items():
            key, scale = (name, 0.01) if name == "lr" else (grid.OPTION + name, 1.0)
            drawn = [one[key] / scale for one in found[1:]]
            if all(isinstance(value, float) for value in values):
                assert min(drawn) >= values[0] * (1 - 1e-5), (technique, name)
                assert max(drawn) <= values[1] * (1 + 1e-5), (technique, name)
            else:
                assert set(drawn) <= set(values)


def test_stated_whole_numbers_and_choices_are_taken_by_train():
    search = {"global_batch": [8, 64], "weight_decay": [0.0, 0.1, 0.5], "lr": [LOW, HIGH]}
    first, last = [], []
    for seed in range(8):
        job = job_of({"search": search, "trials": 24}).model_copy(update={"seed": seed})
        found, _ = searched(job, lambda one: one["global_batch"] - 500 * one["weight_decay"])
        assert all(isinstance(one["global_batch"], int) for one in found)
        assert all(8 <= one["global_batch"] <= 64 for one in found)
        assert {one["weight_decay"] for one in found} <= {0.0, 0.1, 0.5}
        first, last = [*first, *found[:6]], [*last, *found[18:]]

    def means(settings: list[dict]) -> tuple[float, ...]:
        best = [one["weight_decay"] == 0.0 for one in settings]
        return float(np.mean(best)), float(np.mean([one["global_batch"] for one in settings]))

    assert means(last)[0] > means(first)[0] + 0.1 and means(last)[1] > means(first)[1] + 3, (
        "it has learned which choice and which end are best"
    )


def test_settings_of_few_choices_are_not_tried_twice():
    found, sizes = searched(job_of({"search": {"lr": [0.001, 0.01, 0.1]}}), bowl({"lr": 0.01}))
    assert sorted(one["lr"] for one in found) == sorted({one["lr"] for one in found})
    assert sum(sizes) == len(found) <= 3


class Choosy(Options):
    weight: float = 0.1
    mode: str = "b"
    far: float = 50.0
    none: float | None = None


def test_the_jobs_own_settings_count_where_they_lie_in_the_ranges():
    """lr relative to the target's; 50 is outside of its range, and none is no number."""
    values = {
        "lr": (0.1, 10.0),
        "weight": (0.01, 1.0),
        "mode": ("a", "b"),
        "far": (0.1, 1.0),
        "none": (0.1, 1.0),
    }
    space = grid.SearchSpace(values, False, 0.02, Choosy(), 0)
    assert space.from_hyper_parameters({}) == {"lr": 1.0, "weight": 0.1, "mode": 1}
    drawn = {"lr": 0.3, "weight": 0.05, "mode": "a", "far": 0.2, "none": 0.7}
    setting = space.to_hyper_parameters(drawn)
    assert setting["lr"] == 0.006 and setting["technique.mode"] == "a"
    assert space.from_hyper_parameters(setting) == pytest.approx({**drawn, "mode": 0})
    assert space.from_hyper_parameters({"lr": 0.02 * 10.000004})["lr"] == 10.0, (
        "rounded past the end"
    )


# ---------------------------------------------------------------- what it finds


@pytest.mark.parametrize(
    ("searcher", "seeds", "distance", "wins"),
    [
        ("optuna", 20, 0.5, 0.7),
        ("hyperopt", 60, 0.7, 0.55),
        pytest.param("bayesopt", 4, 0.5, 0.7, marks=pytest.mark.slow),
    ],
)
def test_a_planted_optimum_is_found_better_than_by_random_draws(searcher, seeds, distance, wins):
    """Mean and number of seeds with a smaller distance to the optimum, with as many trials."""
    search = {"lr": [LOW, HIGH], "weight_decay": [LOW, HIGH]}
    found, drawn = [], []
    for seed in range(seeds):
        job = job_of({"search": search, "trials": 24, "searcher": searcher})
        job = job.model_copy(update={"seed": seed})
        value = bowl({"lr": 5e-4, "weight_decay": 3e-2})
        random = grid.draws(job, job.targets["task"], ComponentConfig(name="full"))
        found.append(-max(map(value, searched(job, value)[0])))
        drawn.append(-max(map(value, random)))
    assert np.mean(found) < distance * np.mean(drawn), (found, drawn)
    assert np.mean(np.array(found) < np.array(drawn)) >= wins


@each_searcher
def test_a_huge_value_of_a_training_that_diverged_hides_no_differences(searcher):
    """The ends of the range are known and the best: bayesopt may propose them again."""
    ends = (("lr", (1e-3, 1.0)),)
    rates = (1e-3, 0.01, 0.05, 0.2, 0.6, 1.0)
    known = tuple(((("lr", rate),), math.log(rate)) for rate in rates)
    found = [
        proposals.ask(searcher, ends, (*known, ((("lr", 0.002),), lowest)), 3, 1)
        for lowest in (-50.0, -1e200)
    ]
    assert found[0] == found[1] and len(found[0]) == 3


@each_searcher
def test_a_failed_setting_counts_as_the_worst(searcher):
    """All others are as good as each other: it goes where none has failed."""
    ends = (("lr", (1e-3, 1.0)),)
    rates = (1e-3, 2e-3, 4e-3, 0.2, 0.5, 1.0)
    failed = tuple(((("lr", rate),), 1.0 if rate < 0.1 else None) for rate in rates)
    found = [
        dict(one)["lr"] for s in range(8) for one in proposals.ask(searcher, ends, failed, 1, s)
    ]
    assert np.median(found) < 0.03, found


def test_hyperopt_numbers_the_earlier_trials_from_the_oldest(monkeypatch):
    """It gives those with the smallest numbers the least weight."""
    built = []

    def build(*args):
        built.append(fanout.build_searcher(*args))
        return built[-1]

    monkeypatch.setattr(proposals, "fanout", SimpleNamespace(**vars(fanout)))
    monkeypatch.setattr(proposals.fanout, "build_searcher", build)
    known = tuple(((("lr", rate),), rate) for rate in (0.01, 0.1, 0.5))
    proposals.ask("hyperopt", (("lr", (1e-3, 1.0)),), known, 1, 12345)
    points = built[0].get_state()["hyperopt_trials"].trials[:3]
    assert [math.exp(one["misc"]["vals"]["lr"][0]) for one in points] == pytest.approx(
        [0.01, 0.1, 0.5]
    )


@each_searcher
def test_a_searcher_gets_the_earlier_trials_as_they_were(searcher):
    """The points that it is given come back in their order, as what it proposed first."""
    points = [{"a": 0.25, "b": -1.5}, {"a": 0.75, "b": -0.5}, {"a": 0.5, "b": -1.0}]
    built = fanout.build_searcher(searcher, {"a": (0.0, 1.0), "b": (-2.0, 0.0)}, points, 3)
    assert [built.suggest(str(number)) for number in range(3)] == points


# ---------------------------------------------------------------- a job


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    paths = image_files(folder, {"train": 36, "validation": 18, "test": 18})
    return stage_runs.saved_vit(folder / "a", 1), paths


def toy_job(folder, toy, **fan) -> Job:
    bundle, paths = toy
    return stage_runs.job_of(
        folder,
        {"a": bundle},
        paths,
        techniques=("scratch", "full"),
        **{
            "seeds": 1,
            "trials": 4,
            "searcher": "optuna",
            "search": {"lr": [LOW, HIGH]},
            "search_finalists": {"top": 1},
            **fan,
        },
    )


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_with_the_settings_that_it_had(tmp_path, toy, monkeypatch):
    ran = stage_runs.trials_in_this_process(monkeypatch)
    whole = toy_job(tmp_path / "whole", toy, searcher="hyperopt")
    _, rows = stage_runs.run_through(whole)
    expected = list(ran)
    assert len(expected) == len(set(expected)) == 2 * 4 + 2
    assert all(done for _, done in existing_trials.trial_status(stage_runs.prepared(whole)))
    found = {row.drawn for row in rows if row.trial_stage == "search" and row.source == "a"}
    assert len(found) == 4 and all(LOW <= json.loads(one)["lr"] <= HIGH for one in found)
    assert sorted(map(str, stages.collect_existing_rows(stage_runs.prepared(whole)))) == sorted(
        map(str, rows)
    )

    for one in expected[5:]:  # it was killed when the second of its third generation had begun
        storage.remove_tree(storage.join(whole.root, trial_folder.find_all(whole.root)[one]))
    assert existing_trials.trial_status(stage_runs.prepared(whole)) == [], (
        "the search is not finished"
    )
    proposals.ask.cache_clear()
    ran.clear()
    _, again = stage_runs.run_through(whole)
    assert ran == expected[5:]
    assert [(one.trial_id, one.drawn) for one in again] == [(r.trial_id, r.drawn) for r in rows]


def test_a_dry_run_counts_no_more_than_for_random_draws(tmp_path, toy):
    def said(searcher: str) -> str:
        job = toy_job(tmp_path, toy, searcher=searcher)
        lines = dry_run.describe(stage_runs.prepared(job))
        return next(line for line in lines if line.startswith("in all"))

    assert said("optuna") == said("random") and "10 trials" in said("random")


@each_searcher
def test_a_job_is_refused_before_anything_starts_where_its_searcher_is_not_installed(
    searcher, tmp_path, toy, monkeypatch
):
    (module,) = extras.EXTRAS[searcher]
    monkeypatch.setattr(proposals, "find_spec", lambda name: None if name == module else name)
    with pytest.raises(ValueError) as error:
        stage_runs.prepared(toy_job(tmp_path, toy, searcher=searcher))
    assert str(error.value) == (
        f"fanout.searcher: {searcher} is not installed: uv pip install -e '.[{searcher}]' "
        "(without a GPU add --torch-backend cpu; without a clone: pip install "
        f"'onetomany[{searcher}]'), or use random"
    )
    stage_runs.prepared(toy_job(tmp_path, toy, searcher="random"))


def test_another_version_of_bayesopt_is_refused(tmp_path, toy, monkeypatch):
    assert f"bayesian-optimization=={proposals.BAYESOPT_VERSION}" in BAYESOPT_EXTRA
    monkeypatch.setattr(proposals, "version", lambda package: "3.0.0")
    with pytest.raises(ValueError, match=r"calls version 1\.4\.3 of bayesian-optimization, and 3"):
        stage_runs.prepared(toy_job(tmp_path, toy, searcher="bayesopt"))
    stage_runs.prepared(toy_job(tmp_path, toy, searcher="hyperopt"))


def test_bayesopt_refuses_choices(tmp_path, toy):
    search = {"lr": [LOW, HIGH], "weight_decay": [0.0, 0.01, 0.1]}
    with pytest.raises(ValueError) as error:
        stage_runs.prepared(toy_job(tmp_path, toy, searcher="bayesopt", search=search))
    assert str(error.value) == (
        "fanout.searcher: bayesopt searches ranges alone, and scratch has choices of "
        "weight_decay: say optuna or hyperopt, or state a range (with search: auto, state the "
        "option in techniques)"
    )
    stage_runs.prepared(toy_job(tmp_path, toy, searcher="hyperopt", search=search))


def test_jobs_without_it_have_the_hashes_that_they_had():
    assert spec_hash(Fanout()) == "1c71ff19698f"
    assert spec_hash(Fanout(trials=8, search="auto")) == "da1c2df1800f"
    assert spec_hash(Fanout(trials=8, search="auto", searcher="optuna")) != "da1c2df1800f"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"trials": 1}, "trials is 1, so that nothing is drawn"),
        ({**RATE, "trials": 8, "scheduler": "asha"}, "asha stops some: say scheduler fifo"),
    ],
    ids=["one trial", "asha"],
)
def test_what_it_does_not_go_with_is_refused(words, message):
    with pytest.raises(ValidationError, match=message):
        Fanout.model_validate({"searcher": "optuna", **words})


# ---------------------------------------------------------------- populations

PBT = {**RATE, "searcher": "pbt"}
STEPS = (20, 40, 60, 80, 100)
"""Validations of a training of 100 steps."""


def known_members(job, curves: dict, technique: str | dict = "full") -> list[dict]:
    component = ComponentConfig.model_validate(technique)
    target = job.targets["task"]
    found = proposals.search_trials(job, target, component, True, make, {}, curves)
    return [one.hyper_parameters for one in found]


def searched_members(job, curve, technique: str | dict = "full") -> tuple[list[dict], list[int]]:
    """The settings of a whole search, and how many came at each point."""
    curves, sizes = {}, []
    while len(found := known_members(job, curves, technique)) > len(curves):
        sizes.append(len(found) - len(curves))
        curves = {make(one).id: curve(one) for one in found}
    return found, sizes


def rate_at(setting: dict, step: int, own: float = 0.01) -> float:
    rates = [setting.get("lr", own)]
    rates += [one["lr"] for one in setting.get("changes", ()) if one["step"] <= step]
    return rates[-1]


def progress(best):
    """A curve that grows in each step by less, the further the rate is from ``best(step)``."""

    def curve(setting: dict) -> dict[int, float]:
        gains = [-abs(math.log(rate_at(setting, step) / best(step))) for step in range(100)]
        return {step: float(np.sum(gains[:step])) for step in STEPS}

    return curve


constant = progress(lambda step: 3e-3)


# ---------------------------------------------------------------- members and children


@pytest.mark.parametrize(
    ("trials", "sizes"), [(7, [4, 1, 1, 1]), (10, [7, 1, 1, 1]), (16, [10, 2, 2, 2])]
)
def test_there_are_as_many_trainings_as_trials(trials, sizes):
    job = job_of({**PBT, "trials": trials})
    found, counted = searched_members(job, constant)
    drawn = grid.draws(job, job.targets["task"], ComponentConfig(name="full"))
    assert counted == sizes and found[: sizes[0]] == drawn[: sizes[0]]


def test_the_worst_are_replaced_by_children_of_the_best():
    """By hand: at 20, 40 and 60 of 100 steps, the last validations of three quarters."""
    found, sizes = searched_members(job_of({**PBT, "trials": 16}), constant)
    members, children = found[: sizes[0]], found[sizes[0] :]
    for point, step in enumerate((20, 40, 60)):
        ranked = sorted(members, key=lambda one: -constant(one)[step])
        best, rest = ranked[:2], ranked[:-2]
        born = children[2 * point : 2 * point + 2]
        for child in born:
            *before, change = child["changes"]
            parent = {**child, "changes": before} if before else {"lr": child["lr"]}
            assert parent in best and change["step"] == step and set(change) == {"step", "lr"}
            ratio = change["lr"] / rate_at(parent, step)
            assert LOW <= change["lr"] <= HIGH and ratio != 1
        members = [*rest, *born]


def test_values_are_perturbed_as_in_the_paper_or_drawn_anew():
    """By 0.8 or 1.2 with probability 3/4, as often one as the other."""
    ratios = []
    for seed in range(60):
        job = job_of({**PBT, "trials": 30}).model_copy(update={"seed": seed})
        found, _ = searched_members(job, constant)
        for child in found:
            for change in child.get("changes", ())[-1:]:
                before = [child["lr"], *(one["lr"] for one in child["changes"][:-1])]
                ratios.append(change["lr"] / before[-1])
    ratios = np.array(ratios)
    smaller, larger = np.isclose(ratios, 0.8, rtol=1e-4), np.isclose(ratios, 1.2, rtol=1e-4)
    assert len(ratios) == 60 * 12
    assert np.mean(smaller | larger) == pytest.approx(0.75, abs=0.05)
    assert np.sum(smaller) / np.sum(smaller | larger) == pytest.approx(0.5, abs=0.06)


def test_what_cannot_change_is_inherited_and_choices_move_to_a_neighbour():
    search = {"lr": [1e-3, 3e-3, 1e-2, 3e-2], "weight_decay": [LOW, HIGH], "beta1": [0.8, 0.95]}
    job = job_of({"search": search, "searcher": "pbt", "trials": 40})
    found, _ = searched_members(job, constant)
    children = [one for one in found if "changes" in one]
    parents = {one["beta1"] for one in found if "changes" not in one}
    assert len(children) == 15 and {one["beta1"] for one in children} <= parents
    for child in children:
        assert all(set(change) == {"step", "lr", "weight_decay"} for change in child["changes"])
        assert {one["lr"] for one in child["changes"]} <= set(search["lr"])
        Train.model_validate({"steps": 100, **child})


def test_a_weight_decay_of_zero_stays():
    search = {"lr": [LOW, HIGH], "weight_decay": [0.0, 0.0, 0.0]}
    found, _ = searched_members(
        job_of({"search": search, "searcher": "pbt", "trials": 14}), constant
    )
    changes = [change for one in found for change in one.get("changes", ())]
    assert changes and all("weight_decay" not in change for change in changes)


def test_members_that_failed_are_the_worst_and_have_no_children():
    def curve(setting):
        return {} if rate_at(setting, 0) > 1e-2 else constant(setting)

    found, _ = searched_members(job_of({**PBT, "trials": 16}), curve)
    assert len(found) == 16
    assert all(one["lr"] <= 1e-2 for one in found if "changes" in one)
    nothing, sizes = searched_members(job_of({**PBT, "trials": 16}), lambda setting: {})
    assert sizes == [10] and not any("changes" in one for one in nothing)


def test_children_wait_for_every_member_and_the_same_curves_give_the_same_children():
    job = job_of({**PBT, "trials": 16})
    whole, _ = searched_members(job, constant)
    curves = {make(one).id: constant(one) for one in whole}
    assert known_members(job, curves) == whole
    for one in whole[:10]:
        assert (
            known_members(job, {k: v for k, v in curves.items() if k != make(one).id}) == whole[:10]
        )
    other = job.model_copy(update={"seed": 1})
    assert searched_members(other, constant)[0] != whole


def test_a_technique_without_a_rate_to_search_is_searched_at_random():
    job = job_of({"search": "auto", "searcher": "pbt", "trials": 8})
    drawn = grid.draws(job, job.targets["task"], ComponentConfig(name="head_to_toe"), True)
    space = grid.search_space(job, job.targets["task"], ComponentConfig(name="head_to_toe"), True)
    assert "lr" in space.values or known_members(job, {}, "head_to_toe") == grid.without_repeats(
        drawn
    )
    found, _ = searched_members(job, constant)
    assert found[0] == {} and sum("changes" in one for one in found) == 3
    assert known_members(job, {}, "linear_probe") == [], "its head is solved, and there is no rate"


@pytest.mark.parametrize(("falls", "least", "most"), [(True, 0.5, 0.75), (False, 1.2, 1.6)])
def test_a_rate_that_should_fall_is_found_better_than_by_random_draws(falls, least, most):
    """With as many trainings, over 40 seeds. Where one rate is best all along, fewer first members
    find it less well.
    """
    curve = progress(lambda step: 3e-2 if falls and step < 50 else 1e-3)
    found, drawn = [], []
    for seed in range(40):
        job = job_of({**PBT, "trials": 28}).model_copy(update={"seed": seed})
        random = grid.draws(job, job.targets["task"], ComponentConfig(name="full"))
        found.append(max(curve(one)[100] for one in searched_members(job, curve)[0]))
        drawn.append(max(curve(one)[100] for one in random))
    assert least < np.mean(found) / np.mean(drawn) < most


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({**PBT, "trials": 6}, "searcher pbt needs at least 7"),
        ({"search": {"steps": [50, 90], "lr": [LOW, HIGH]}}, "compares its members at the same"),
        ({"search": {"beta1": [0.8, 0.9]}}, "changes lr or weight_decay: give a range"),
        ({**PBT, "scheduler": "asha"}, "asha stops some"),
    ],
)
def test_a_search_that_is_no_population_is_refused(words, message):
    with pytest.raises(ValidationError, match=message):
        Fanout.model_validate({"trials": 8, "searcher": "pbt", **words})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"steps": 3}, "train.steps: 3: searcher pbt needs at least 4"),
        ({"steps": 20, "eval_every_steps": 6}, "a validation in each quarter: at most 5"),
        ({"epochs": 2, "eval_every_steps": 6}, "or give steps instead of epochs"),
        ({"steps": 20, "patience": 2}, "compares whole trainings: leave it out"),
        ({"steps": 20, "changes": [{"step": 3, "lr": 0.1}]}, "finds them: leave them out"),
    ],
)
def test_a_training_without_points_to_compare_at_is_refused(train, message):
    target = job_of({**PBT, "trials": 8}).targets["task"]
    [found] = population.problems(
        "task", target.model_copy(update={"train": Train.model_validate(train)})
    )
    assert found.startswith("targets.task.train.") and message in found


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"changes": [{"step": 5, "lr": 0.1}, {"step": 5, "lr": 0.2}]}, "in rising order"),
        ({"steps": 5, "changes": [{"step": 5, "lr": 0.1}]}, "the training has 5 steps"),
        ({"changes": [{"step": 5}]}, "say which lr or weight_decay"),
        (
            {"weight_decay": 0, "changes": [{"step": 5, "weight_decay": 0.1}]},
            "begins with a weight_decay above 0",
        ),
    ],
)
def test_changes_that_mean_nothing_are_refused(train, message):
    with pytest.raises(ValidationError, match=message):
        Train.model_validate(train)


def test_a_training_without_changes_has_the_hash_that_it_had():
    assert spec_hash(Train()) == "1ee53d7a85b2"
    assert spec_hash(Train(changes=({"step": 3, "lr": 0.1},))) != "1ee53d7a85b2"


# ---------------------------------------------------------------- a job


def test_changes_are_shown_in_words():
    changes = [{"step": 40, "lr": 0.00031234}, {"step": 60, "lr": 1e-3, "weight_decay": 0.1}]
    assert hyper_parameter_text("changes", changes) == (
        "from step 40 lr 0.0003123, from step 60 lr 0.001 and weight_decay 0.1"
    )
    assert hyper_parameter_text("lr", 0.01) == "0.01"


def population_job(folder, toy) -> Job:
    search = {"lr": [1e-3, 1e-1], "weight_decay": [0.01, 0.2]}
    job = toy_job(folder, toy, searcher="pbt", trials=7, search=search)
    target = job.targets["task"].model_dump(mode="json")
    target["train"] |= {"steps": 4, "eval_every_steps": 1}
    return stage_runs.changed(job, targets={"task": target})


def test_a_dry_run_counts_members_and_children(tmp_path, toy):
    job = population_job(tmp_path, toy)
    lines = dry_run.describe(stage_runs.prepared(job))
    assert any(line.startswith("in all: 16 trials") for line in lines), lines  # 2 x (7 + 1)


@pytest.mark.slow
def test_a_child_repeats_its_parent_up_to_its_change_and_a_killed_job_goes_on(
    tmp_path,
    toy,
    monkeypatch,
):
    ran = stage_runs.trials_in_this_process(monkeypatch)
    whole = population_job(tmp_path / "whole", toy)
    _, rows = stage_runs.run_through(whole)
    expected = list(ran)
    assert len(expected) == len(set(expected)) == 2 * 7 + 2
    records = {
        one: trial.read_records(whole.root, {one: folder})[one]
        for one, folder in trial_folder.find_all(whole.root).items()
    }
    drawn = {
        row.trial_id: json.loads(row.drawn)
        for row in rows
        if row.trial_stage == "search" and row.source == "a"
    }
    children = {one: setting for one, setting in drawn.items() if "changes" in setting}
    assert len(drawn) == 7 and len(children) == 3
    for one, setting in children.items():
        *before, change = setting["changes"]
        inherited = {k: v for k, v in setting.items() if k != "changes"}
        inherited |= {"changes": before} if before else {}
        (parent,) = (other for other, of in drawn.items() if of == inherited)
        curves = [planned_trials.validation_curve(records[x]) for x in (one, parent)]
        same = [step for step in curves[0] if step <= change["step"]]
        assert same and all(curves[0][step] == curves[1][step] for step in same)
        losses = [{p.step: p.metrics["loss"] for p in records[x].curve} for x in (one, parent)]
        assert all(losses[0][step] == losses[1][step] for step in same)
        assert losses[0] != losses[1], "after the change it is another training"

    for one in expected[9:]:  # it was killed when the first children had begun
        storage.remove_tree(storage.join(whole.root, trial_folder.find_all(whole.root)[one]))
    assert existing_trials.trial_status(stage_runs.prepared(whole)) == []
    ran.clear()
    _, again = stage_runs.run_through(whole)
    assert ran == expected[9:]
    assert [(one.trial_id, one.drawn) for one in again] == [(r.trial_id, r.drawn) for r in rows]
